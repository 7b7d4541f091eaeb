"""chapter_attention under pytest-benchmark: routing, number of chapters, int8 bank, peers."""

from dataclasses import replace

import pytest
from timed import SDPA, make_case, quick, time_competitor

from memattn.bench.chapter_attention import FLOAT_BANK, GATHERED, WHOLE_BANK, ChapterCase
from memattn.bench.engine import OURS

DIRECTIONS = ["forward", "backward"]


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["token", "block", "sequence"])
def test_who_selects(benchmark, kind, direction):
    time_competitor(benchmark, make_case(ChapterCase, kind), OURS, direction)


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n_chapters", [2, 8, 32])
def test_number_of_chapters(benchmark, n_chapters, direction):
    case = replace(make_case(ChapterCase, "token"), K=n_chapters)
    time_competitor(benchmark, case, OURS, direction)


@quick
@pytest.mark.parametrize("competitor", [OURS, FLOAT_BANK])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_int8_bank(benchmark, direction, competitor):
    time_competitor(benchmark, make_case(ChapterCase, "int8"), competitor, direction)


@quick
@pytest.mark.parametrize("competitor", [GATHERED, WHOLE_BANK, *(f"{x}, whole bank" for x in SDPA)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peers(benchmark, direction, competitor):
    time_competitor(benchmark, make_case(ChapterCase, "token"), competitor, direction)
