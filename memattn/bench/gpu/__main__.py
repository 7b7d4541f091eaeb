"""``python -m memattn.bench.gpu``: run the session on a GPU, or a dry run on a CPU."""

import argparse
import os
import sys
from pathlib import Path

from memattn.checks import must

MIN_CAPABILITY = (8, 0)
MIN_MEMORY = 30 << 30  # bytes: the largest case while others are checked in float64


def main(argv: list[str] | None = None) -> int:
    """Run the session; returns the exit code: 1 for a wrong result, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m memattn.bench.gpu", description="Check, measure, test and tune on a GPU."
    )
    parser.add_argument("plan", nargs="*", help="stages and operators to run; default: all")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="time limit of all stages together"
    )
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 2))
    parser.add_argument(
        "--before", metavar="DIR", help="checkout of an earlier build to compare with"
    )
    parser.add_argument(
        "--dry", action="store_true", help="run on a CPU with interpreted kernels, without timing"
    )
    given = parser.parse_args(argv)
    if given.dry:
        # read when a kernel is defined
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return _run(given)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        sys.stderr.write(f"memattn gpu: error: {error}\n")
        return 2


def _run(given: argparse.Namespace) -> int:
    from memattn.bench.gpu import session as sessions

    stages, operators = read_plan(given.plan)
    if not 10 <= given.seconds <= 86400:
        must("seconds", "be between 10 and 86400", given.seconds)
    if not 1 <= given.workers <= 256:
        must("workers", "be between 1 and 256", given.workers)
    before = None if given.before is None else Path(given.before)
    if before is not None and not (before / "kernels" / "memattn_kernels").is_dir():
        must("before", "be a checkout of this project", before)
    if "before" in given.plan and before is None:
        must("before", "be given for the stage of that name", None)
    stages = [stage for stage in stages if stage != "before" or before is not None]
    if not given.dry:
        _check_card()
    folder = Path(given.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.jsonl").touch()
    except OSError as error:
        must("out", "be a folder that can be written", f"{folder}: {error.strerror}")
    session = sessions.Session(
        folder,
        stages,
        operators,
        given.seconds,
        dry=given.dry,
        n_workers=given.workers,
        before=before,
    )
    sessions.install_signal_handlers(session)
    return session.run()


def read_plan(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The stages (in their fixed order) and operators of a plan; all if it names none.

    Raises:
        ValueError: If a word is neither a stage nor an operator.
    """
    from memattn.bench.gpu.correctness import CASES
    from memattn.bench.gpu.session import STAGES

    words = [word for text in words for word in text.replace(",", " ").split()]
    for word in words:
        if word not in STAGES and word not in CASES:
            must(
                "PLAN",
                f"have stages ({', '.join(STAGES)}) and operators ({', '.join(CASES)})",
                word,
            )
    stages = [stage for stage in STAGES if stage in words] or list(STAGES)
    operators = tuple(name for name in CASES if name in words) or tuple(CASES)
    return stages, operators


def _check_card() -> None:
    """Raise unless there is a GPU that can run the session."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA device, and torch sees none; --dry runs on a CPU")
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        raise RuntimeError(f"needs a GPU of compute capability 8.0 or newer, got {capability}")
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < MIN_MEMORY:
        raise RuntimeError(
            f"needs a GPU with {MIN_MEMORY >> 30} GiB of memory, got {memory / 2**30:.0f} GiB"
        )


if __name__ == "__main__":
    sys.exit(main())
