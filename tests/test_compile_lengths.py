"""One program of ``torch.compile`` for all lengths."""

import pytest
import torch
from model_factories import make_model, make_tokens
from torch._dynamo.testing import CompileCounter


@pytest.mark.parametrize("system", ["both", pytest.param("chapters", marks=pytest.mark.slow)])
@torch.no_grad()
def test_lengths_after_the_second_compile_nothing_more(system, new_programs):
    model = make_model(system, torch.float32, num_hidden_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T in (19, 23, 41):
        ids = make_tokens(3, T)
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    assert counter.frame_count == 2  # the first length, and any other
