"""Continue a text: python scripts/inference.py --config configs/test_small.yaml --prompt "Hello"

The same as ``memattn generate``; see ``memattn generate --help``.
"""

import sys

from memattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
