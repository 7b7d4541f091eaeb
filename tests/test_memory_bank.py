"""Memory banks: shapes, low rank, quantisation, and what they project to."""

import pytest
import torch
from model_factories import SIZES, logits_of, make_tokens, perturb

from memattn import quantize_memory
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.nn import (
    FactorizedMemoryBank,
    QuantizedMemoryBank,
    ReducedDimMemoryBank,
    StandardMemoryBank,
)

BANKS = {
    "standard": lambda: StandardMemoryBank(24, 10, num_chapters=4),
    "factorized": lambda: FactorizedMemoryBank(24, 10, 6, num_chapters=4),
    "reduced_dim": lambda: ReducedDimMemoryBank(24, 6, num_chapters=4),
    "int8": lambda: QuantizedMemoryBank(StandardMemoryBank(24, 10, num_chapters=4), 8),
    "int4": lambda: QuantizedMemoryBank(FactorizedMemoryBank(24, 10, 6, num_chapters=4), 4),
    "int8 trained": lambda: QuantizedMemoryBank(
        ReducedDimMemoryBank(24, 6, num_chapters=4), 8, trainable=True
    ),
}
EXACT = dict(rtol=0, atol=1e-14)


@pytest.fixture(params=BANKS)
def bank(request):
    torch.manual_seed(0)
    return BANKS[request.param]().double()


def test_shapes_and_projections(bank):
    tokens = bank.expand_rows(bank.stored(dtype=torch.float64))
    weight = torch.randn(7, bank.width, dtype=torch.float64)
    assert tokens.shape == (4, 6, bank.width) and bank.tokens_per_chapter == 6
    torch.testing.assert_close(bank.project(weight), tokens @ weight.T, **EXACT)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(bank(), tokens, check_dtype=False)
    assert torch.equal(bank(some), bank()[some])
    torch.testing.assert_close(bank.project(weight, some), tokens[some] @ weight.T, **EXACT)


def test_gradients_reach_what_learns(bank):
    loss = bank.project(torch.randn(7, bank.width, dtype=torch.float64)).square().sum()
    parameters = list(bank.parameters())
    if parameters:
        loss.backward()
    assert all((p.grad != 0).all() for p in parameters)
    assert (bank.rows is None) == ("codes" in bank.state_dict())


@torch.no_grad()
def test_new_tokens_of_low_rank_are_as_large():
    torch.manual_seed(0)
    full, low = StandardMemoryBank(2000, 64), FactorizedMemoryBank(2000, 64, 16)
    assert full().std() == pytest.approx(0.02, rel=0.02)
    assert low().std() == pytest.approx(0.02, rel=0.1)
    assert low.basis.std() == pytest.approx(16**-0.5, rel=0.1)


def test_full_rank_factors_with_the_identity_are_the_bank():
    full, low = StandardMemoryBank(24, 10, 4).double(), FactorizedMemoryBank(24, 10, 10, 4).double()
    with torch.no_grad():
        low.basis.copy_(torch.eye(10))
        low.rows.copy_(full.rows)
    assert torch.equal(low(), full())


@pytest.mark.parametrize("bits, relative", [(8, 0.0059), (4, 0.107)])
def test_quantisation_error(bits, relative):
    rows = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    bank = StandardMemoryBank(1000, 64)
    with torch.no_grad():
        bank.rows.copy_(rows)
    packed = QuantizedMemoryBank(bank, bits)
    error = packed()[0] - rows
    assert (error.square().mean() / rows.square().mean()).sqrt() == pytest.approx(
        relative, rel=0.02
    )
    assert (error.abs() <= 0.5 * packed.scale[:, None] * (1 + 1e-6)).all()
    held = sum(b.numel() * b.element_size() for b in packed.buffers())
    assert held == 1000 * (64 * bits // 8 + 4) < 0.3 * 4 * rows.numel()


def test_training_sees_what_inference_reads():
    torch.manual_seed(0)
    bank = QuantizedMemoryBank(StandardMemoryBank(24, 10, num_chapters=4), 4, trainable=True)
    seen = bank().detach()
    bank().sum().backward()
    assert torch.equal(bank.rows.grad, torch.ones(24, 10))  # straight through
    bank.pack()
    torch.testing.assert_close(bank(), seen)  # which adds the rounding back to the rows
    assert not list(bank.parameters())


def test_scales_survive_a_cast():
    bank = QuantizedMemoryBank(StandardMemoryBank(24, 10), 8)
    before = bank.scale.clone()
    assert torch.equal(bank.bfloat16().scale, before)


@pytest.mark.parametrize("options", [dict(memory_quant_bits=8), dict(memory_quant_bits=4)])
def test_a_quantised_model_runs_saves_and_loads(options, tmp_path):
    torch.manual_seed(0)
    chapters = dict(num_memory_tokens=24, num_chapters=8, top_k_chapters=2)
    config = MemAttnConfig.memory_transformer(**chapters, **SIZES)
    model = perturb(MemAttnForCausalLM(config).eval())
    tokens = make_tokens()
    before = logits_of(model, tokens)
    quantize_memory(model, options["memory_quant_bits"])
    after = logits_of(model, tokens)
    bound = {8: 0.02, 4: 0.3}[options["memory_quant_bits"]]
    assert 0 < (after - before).square().mean().sqrt() < bound * before.std()
    model.save_pretrained(tmp_path)
    loaded = MemAttnForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, tokens), after)
    bank = loaded.model.shared_parts["chapter_memory"].banks[0]
    assert isinstance(bank, QuantizedMemoryBank) and bank.rows is None
    assert torch.equal(bank.codes, model.model.shared_parts["chapter_memory"].banks[0].codes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: StandardMemoryBank(10, 4, 3), "num_tokens must be divisible by num_chapters=3"),
        (lambda: StandardMemoryBank(0, 4), "num_tokens must be"),
        (lambda: QuantizedMemoryBank(StandardMemoryBank(4, 4), 5), "bits must be one of 8, 4"),
        (lambda: QuantizedMemoryBank(StandardMemoryBank(4, 3), 4), "bank must have an even number"),
        (lambda: quantize_memory(torch.nn.Linear(2, 2)), "model must have memory banks"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
