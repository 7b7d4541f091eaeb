"""Entry point that ``memattn bench`` and ``python -m memattn.bench`` share."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from memattn.bench.report import say
from memattn.bench.result_check import WrongResultError
from memattn.bench.run import parse_shape, run
from memattn.checks import must
from memattn.files import check_writable

EXAMPLES = """examples:
  bench --quick
  bench segmented_attention --kinds window --seq_lens 2048 4096 --shape H=16 window_size=512
  bench --suite cpu-bars --out runs/bench
  bench --all"""


def command(
    operators: Sequence[str],
    *,
    kinds: Sequence[str],
    seq_lens: Sequence[int],
    shape: Sequence[str],
    directions: Sequence[str],
    peers: Sequence[str],
    retune: bool,
    all: bool = False,
    out: str | None,
    **options: Any,
) -> int:
    """Run the benchmark that the command-line arguments describe; an empty argument is not given.

    By default this calls ``memattn.bench.run``. With ``retune`` it tunes tile sizes and writes
    ``<architecture>.json`` into ``out``. With ``all`` it measures every operator and writes pages:
    see ``memattn.bench.run_all``.

    Returns:
        The exit code: 1 if one of our operators gave a wrong result; its times are not printed.
    """
    chosen = {"kinds": kinds, "seq_lens": seq_lens, "shape": shape, "directions": directions}
    if retune:
        if all:
            must("all", "be left out with retune", all)
        return _retune(Path(out or "."))
    if all:
        return _all(operators, out, {**chosen, "peers": peers, **options})
    if list(peers) == ["none"]:
        wanted: Sequence[str] | None = []
    else:
        wanted = peers or None
    with _WrongResultExit() as outcome:
        run(
            operators or None,
            kinds=kinds or None,
            seq_lens=seq_lens or None,
            shape=parse_shape(shape) if shape else None,
            directions=directions or None,
            peers=wanted,
            out=out,
            **options,
        )
    return outcome.code


class _WrongResultExit(AbstractContextManager["_WrongResultExit"]):
    """Turns a WrongResultError into a message and exit code 1."""

    code = 0

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if not isinstance(error, WrongResultError):
            return False
        sys.stderr.write(f"memattn bench: wrong result, so no times are printed: {error}\n")
        self.code = 1
        return True


def _all(operators: Sequence[str], out: str | None, options: dict[str, Any]) -> int:
    """Measure every operator on one device and write pages."""
    from memattn.bench.run_all import FOLDER, run_all

    taken = {name: options.pop(name) for name in ("device", "backend", "seed")}
    for name, value in options.items():
        if value and value != "auto":
            must(name, "be left out with all", value)
    with _WrongResultExit() as outcome:
        run_all(operators or None, out=Path(out or FOLDER), **taken)
    return outcome.code


def _retune(folder: Path) -> int:
    """Time tile sizes on the current GPU and write the table of the fastest."""
    if not torch.cuda.is_available():
        must("retune", "have a CUDA device", "none")
    from memattn.bench.retune import retune
    from memattn_kernels import configs

    device = torch.device("cuda", torch.cuda.current_device())
    path = folder / f"{configs.device_architecture(device)}.json"
    check_writable("out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    retune(path, on_trial=lambda trial, result: say(f"{trial}: {result}"))
    say(f"wrote {path}")
    return 0
