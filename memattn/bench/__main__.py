"""``python -m memattn.bench``: the benchmarks where only PyTorch is installed."""

import argparse
import sys

from memattn.bench.gate import WrongResultError
from memattn.bench.run import DEVICES, DIRECTIONS, DTYPES, parse_shape, run
from memattn.bench.suite import SUITES
from memattn.ops._dispatch import BACKENDS


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code: 1 for a wrong operator, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m memattn.bench", description=run.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("operators", nargs="*", metavar="OPERATOR")
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--seq_lens", nargs="+", type=int, metavar="T")
    parser.add_argument("--shape", nargs="+", metavar="NAME=INTEGER")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS)
    parser.add_argument("--peers", nargs="*")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR")
    args = vars(parser.parse_args(argv))
    try:
        shape = None if args["shape"] is None else parse_shape(args["shape"])
        run(args.pop("operators") or None, **(args | {"shape": shape}))
    except WrongResultError as error:
        sys.stderr.write(f"wrong result, nothing is reported: {error}\n")
        return 1
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
