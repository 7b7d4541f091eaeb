"""task_masked_attention under pytest-benchmark: densities, partial tiles, mixed tasks, peers."""

from dataclasses import replace

import pytest
from timed import SDPA, make_case, quick, time_competitor

from memattn.bench.engine import OURS
from memattn.bench.task_masked_attention import BY_TASK, FULL_MASK, TaskMaskedCase

DIRECTIONS = ["forward", "backward"]
# torch.compile warns of its own calls
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("density", [5, 25, 50, 100])
def test_density(benchmark, density, direction):
    case = replace(make_case(TaskMaskedCase, "blocks"), density=density)
    time_competitor(benchmark, case, OURS, direction)


@quick
@pytest.mark.parametrize("competitor", [FULL_MASK, *SDPA, "flex"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peers_at_a_quarter_of_the_tiles(benchmark, direction, competitor):
    time_competitor(benchmark, make_case(TaskMaskedCase, "blocks"), competitor, direction)


@quick
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["graph", "tokens"])
def test_partial_tiles(benchmark, kind, direction):
    case = replace(make_case(TaskMaskedCase, kind), density=50)
    time_competitor(benchmark, case, OURS, direction)


@quick
@pytest.mark.parametrize("competitor", [OURS, BY_TASK, "flex"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n_tasks", [1, 8, 64])
def test_mixed_tasks(benchmark, n_tasks, direction, competitor):
    case = replace(make_case(TaskMaskedCase, "blocks"), B=64, H=1, T=256, n_tasks=n_tasks)
    time_competitor(benchmark, case, competitor, direction)
