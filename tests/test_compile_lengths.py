"""One program of ``torch.compile`` for all lengths."""

import pytest
import torch
from model_factories import make_model, make_tokens
from torch._dynamo.testing import CompileCounter

LONGER = ("chapters", "future", "titans-lmm", "titans-mag", "titans-mal", "titans-mac_parallel")


def programs(system: str, lengths: tuple[int, ...]) -> list[int]:
    """How many programs there are after each length; what they compute is compared."""
    model = make_model(system, torch.float32, num_hidden_layers=1)
    counter, found = CompileCounter(), []
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T in lengths:
        ids = make_tokens(3, T)
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
        found.append(counter.frame_count)
    return found


@pytest.mark.parametrize(
    "system", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER)]
)
@torch.no_grad()
def test_lengths_after_the_second_compile_nothing_more(system, new_programs):
    assert programs(system, (19, 23, 41)) == [1, 2, 2]  # the first length, and any other


@pytest.mark.slow
@torch.no_grad()
def test_segments_that_follow_from_each_other_compile_for_their_number(new_programs):
    # segments of 9 tokens: 3 of them, then 5, each for any length of the last one
    assert programs("titans-mac", (19, 23, 26, 41, 38)) == [1, 2, 2, 3, 3]
