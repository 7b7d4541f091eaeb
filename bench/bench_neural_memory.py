"""neural_memory under pytest-benchmark: reads, chunk sizes, decoding, and its peers."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from timed import make_case, quick, time_competitor

from memattn.bench.engine import OURS
from memattn.bench.neural_memory import (
    LOOP,
    PER_SAMPLE,
    STATE_READ,
    TITANS,
    TITANS_DEFAULT,
    MemoryCase,
)

DIRECTIONS = ["forward", "backward"]
needs_titans = pytest.mark.skipif(
    find_spec("titans_pytorch") is None, reason="titans-pytorch is not installed"
)


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["token", "chunk"])
def test_what_is_read(benchmark, kind, direction):
    time_competitor(benchmark, make_case(MemoryCase, kind), OURS, direction)


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk_size", [16, 64, 256])
def test_chunk_size(benchmark, chunk_size, direction):
    case = replace(make_case(MemoryCase, "token"), chunk_size=chunk_size)
    time_competitor(benchmark, case, OURS, direction)


@quick
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_depth(benchmark, direction, depth):
    case = replace(make_case(MemoryCase, "token"), depth=depth)
    time_competitor(benchmark, case, OURS, direction)


@quick
@pytest.mark.parametrize("competitor", [OURS, STATE_READ])
def test_decoding(benchmark, competitor):
    case = make_case(MemoryCase, "step")
    time_competitor(benchmark, replace(case, T=case.chunk_size), competitor, "forward")


@quick
@pytest.mark.parametrize(
    "competitor",
    [
        pytest.param(TITANS, marks=needs_titans),
        pytest.param(TITANS_DEFAULT, marks=needs_titans),
        PER_SAMPLE,
        LOOP,
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peers(benchmark, direction, competitor):
    time_competitor(benchmark, make_case(MemoryCase, "token"), competitor, direction)
