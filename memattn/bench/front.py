"""The command, for both command lines: ``memattn bench`` and ``python -m memattn.bench``."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from memattn.bench.gate import WrongResultError
from memattn.bench.report import say
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
    """Call ``memattn.bench.run`` with what a command line gives, where empty means not given.

    ``retune`` does that instead, and writes ``<architecture>.json`` into ``out``; so does ``all``,
    which writes pages: see ``memattn.bench.everything``.

    Returns:
        The exit code: 1 where one of our operators is wrong, and nothing of it was printed.
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
    with _told() as told:
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
    return told.code


class _told(AbstractContextManager["_told"]):
    """Says what is wrong with an operator, and keeps the exit code."""

    code = 0

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if not isinstance(error, WrongResultError):
            return False
        sys.stderr.write(f"memattn bench: wrong result, nothing is printed: {error}\n")
        self.code = 1
        return True


def _all(operators: Sequence[str], out: str | None, options: dict[str, Any]) -> int:
    """Measure the suites of the device at hand, and write pages."""
    from memattn.bench.everything import FOLDER, run_all

    taken = {name: options.pop(name) for name in ("device", "backend", "seed")}
    for name, value in options.items():
        if value and value != "auto":
            must(name, "be left out with all", value)
    with _told() as told:
        run_all(operators or None, out=Path(out or FOLDER), **taken)
    return told.code


def _retune(folder: Path) -> int:
    """Time tile sizes on the card at hand, and write the table of the best."""
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
