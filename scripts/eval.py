"""Measure a trained model: python scripts/eval.py --config configs/test_small.yaml

The same as ``memattn evaluate``; see ``memattn evaluate --help``.
"""

import sys

from memattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
