"""segmented_attention under pytest-benchmark: every competitor is checked, then timed."""

import pytest
from timed import SDPA, make_case, quick, time_competitor

from memattn.bench.engine import OURS
from memattn.bench.segmented_attention import SegmentedCase


@quick
@pytest.mark.parametrize("competitor", [OURS, *SDPA])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["causal", "window", "segment", "mac"])
def test_segmented_attention(benchmark, kind, direction, competitor):
    time_competitor(benchmark, make_case(SegmentedCase, kind), competitor, direction)
