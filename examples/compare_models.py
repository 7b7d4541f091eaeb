"""Titans and a plain decoder, trained at equal tokens and parameters and compared.

    python examples/compare_models.py --dim 512 --depth 6 --heads 8 --dim-head 64 \
        --segment-len 512 --batch-size 16 --lr 5e-5 --steps 10000 --dataset wikitext \
        --seq-len 1024 --data-dir ./data --output-dir ./outputs/comparison

It is ``memattn compare``, which describes the options with ``--help``.
"""

import sys

from memattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
