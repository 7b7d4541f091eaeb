"""future_attention under pytest-benchmark, causal attention and the naive module."""

import pytest
from timed import SDPA, make_case, quick, time_competitor

from memattn.bench.engine import OURS
from memattn.bench.future_attention import OUR_PAST, FutureCase

YARDSTICKS = [f"{name}, past only" for name in SDPA]


@quick
@pytest.mark.parametrize("competitor", [OURS, OUR_PAST, *YARDSTICKS, "naive"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["future", "mse", "cosine"])
def test_future_attention(benchmark, kind, direction, competitor):
    case = make_case(FutureCase, kind)
    peer = None if competitor == OURS else case.peers()[competitor]
    if peer is not None and peer.score_bytes > 1 << 30:
        pytest.skip(f"{competitor} would store {peer.score_bytes / 2**30:.1f} GiB of scores")
    time_competitor(benchmark, case, competitor, direction)
