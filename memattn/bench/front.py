"""The command, for both command lines: ``memattn bench`` and ``python -m memattn.bench``."""

import sys
from collections.abc import Sequence
from typing import Any

from memattn.bench.gate import WrongResultError
from memattn.bench.run import parse_shape, run

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

    Returns:
        The exit code: 1 where one of our operators is wrong, and nothing of it was printed.
    """
    if retune:
        from memattn.bench.retune import retune as renew

        renew(out)
        return 0
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
