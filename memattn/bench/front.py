"""The command, for both command lines: ``memattn bench`` and ``python -m memattn.bench``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memattn.bench.gate import WrongResultError
from memattn.bench.report import say
from memattn.bench.run import parse_shape, run
from memattn.checks import must

EXAMPLES = """examples:
  bench --quick
  bench segmented_attention --kinds window --seq_lens 2048 4096 --shape H=16 window_size=512
  bench --suite cpu-bars --out runs/bench"""


def command(
    operators: Sequence[str],
    *,
    kinds: Sequence[str],
    seq_lens: Sequence[int],
    shape: Sequence[str],
    directions: Sequence[str],
    peers: Sequence[str],
    retune: bool,
    out: str | None,
    **options: Any,
) -> int:
    """Call ``memattn.bench.run`` with what a command line gives, where empty means not given.

    ``retune`` does that instead, and writes ``<architecture>.json`` into ``out``.

    Returns:
        The exit code: 1 where one of our operators is wrong, and nothing of it was printed.
    """
    if retune:
        return _retune(Path(out or "."))
    if list(peers) == ["none"]:
        chosen: Sequence[str] | None = []
    else:
        chosen = peers or None
    try:
        run(
            operators or None,
            kinds=kinds or None,
            seq_lens=seq_lens or None,
            shape=parse_shape(shape) if shape else None,
            directions=directions or None,
            peers=chosen,
            out=out,
            **options,
        )
    except WrongResultError as error:
        sys.stderr.write(f"memattn bench: wrong result, nothing is printed: {error}\n")
        return 1
    return 0


def _retune(folder: Path) -> int:
    """Time tile sizes on the card at hand, and write the table of the best."""
    if not torch.cuda.is_available():
        must("retune", "have a CUDA device", "none")
    from memattn.bench.retune import retune
    from memattn_kernels import configs

    device = torch.device("cuda", torch.cuda.current_device())
    path = folder / f"{configs.device_architecture(device)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    retune(path, on_trial=lambda trial, result: say(f"{trial}: {result}"))
    say(f"wrote {path}")
    return 0
