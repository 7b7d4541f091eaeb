"""Train a model: python scripts/train.py --config configs/test_small.yaml

The same as ``memattn train``; see ``memattn train --help``.
"""

import sys

from memattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
