"""chapter_router under pytest-benchmark, and its composition of PyTorch's operators."""

from dataclasses import replace

import pytest
from timed import make_case, quick, time_competitor

from memattn.bench.chapter_router import COMPOSITION, RouterCase
from memattn.bench.engine import OURS


@quick
@pytest.mark.parametrize("competitor", [OURS, COMPOSITION])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("width", [64, 512])
def test_chapter_router(benchmark, width, direction, competitor):
    case = replace(make_case(RouterCase, "router"), E=width)
    time_competitor(benchmark, case, competitor, direction)
