"""``python -m memattn.bench``: ``memattn bench`` without jsonargparse; needs PyTorch only."""

import argparse
import sys
from typing import Any

from memattn.bench.case import operators
from memattn.bench.cli_entry import EXAMPLES, command
from memattn.bench.run import DEVICES, DIRECTIONS, DTYPES
from memattn.bench.suite import SUITES
from memattn.ops._dispatch import BACKENDS


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code: 1 for a wrong operator, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m memattn.bench",
        description="Measure operators beside their peers; see memattn.bench.run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=", ".join(operators()))
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--retune", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=())
    parser.add_argument("--seq_lens", nargs="+", type=int, default=(), metavar="T")
    parser.add_argument("--shape", nargs="+", default=(), metavar="NAME=INTEGER")
    parser.add_argument("--directions", nargs="+", default=(), choices=DIRECTIONS)
    parser.add_argument("--peers", nargs="+", default=())
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--seed", type=int, default=0)
    arguments: dict[str, Any] = vars(parser.parse_args(argv))
    try:
        return command(**arguments)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        sys.stderr.write(f"memattn bench: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
