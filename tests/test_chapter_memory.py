"""Chapter memory in models: every strategy is causal and exact, and memory starts as nothing."""

import pytest
import torch
from model_factories import SIZES, logits_of, make_tokens, perturb

from memattn.evaluate import audit
from memattn.models import MemAttnConfig, MemAttnForCausalLM

CHAPTERS = dict(num_memory_tokens=24, use_chapters=True, num_chapters=8, top_k_chapters=2)
# each with other options, so that all of these are audited too
CASES = {
    "sequence": dict(memory_block_variant="B", memory_sharing="per_layer"),
    "rolling": dict(combine="independent", use_low_rank_memory=True, memory_rank=5),
    "token": dict(num_shared_chapters=2, use_low_rank_projections=True, projection_rank=3),
    "hybrid": dict(num_memory_tokens=320, num_chapters=160),  # more than a call selects
}


def make_memory(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = MemAttnConfig.memory_transformer(**CHAPTERS | options | SIZES)
    return MemAttnForCausalLM(config).to(dtype).eval()


def strategies(name, **options):
    return dict(routing_strategy_train=name, routing_strategy_inference=name, **options)


@pytest.mark.parametrize("strategy", CASES)
def test_every_strategy_is_exact(strategy):
    options = strategies(strategy, routing_block_size=4, routing_window_size=7)
    report = audit(make_memory(**options, **CASES[strategy]), seq_len=18)
    assert report.verdict == "all 0", report.failed
    assert all(row.value is not None for row in report.rows)


@pytest.mark.parametrize("options", [{}, dict(use_chapters=False), dict(memory_block_variant="B")])
def test_memory_starts_as_nothing(options):
    tokens = make_tokens()
    model = make_memory(**options)
    plain = MemAttnForCausalLM(MemAttnConfig.vanilla(**SIZES)).double().eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    assert not torch.equal(logits_of(perturb(model), tokens), logits_of(perturb(plain), tokens))
