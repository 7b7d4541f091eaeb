"""The memory transformer as a whole: every option runs, trains, generates, saves and loads."""

import pytest
import torch
from adapter_factories import make_base
from model_factories import SIZES, logits_of, make_tokens, perturb

from memattn.adapters import attach_memory, detach_memory
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.parts.chapter_memory import ChapterMemoryConfig

CHAPTERS = dict(num_memory_tokens=24, use_chapters=True, num_chapters=8, top_k_chapters=2)
OPTIONS = {
    "defaults of the fields": dict(num_memory_tokens=1024, use_chapters=False),
    "low rank": dict(use_low_rank_memory=True, memory_rank=4, use_low_rank_projections=True),
    "reduced": dict(use_low_rank_memory=True, low_rank_mode="reduced_dim", memory_rank=8),
    "variant B": dict(memory_block_variant="B", memory_num_heads=2, memory_num_kv_heads=1),
    "int8": dict(quantize_memory=True, memory_quant_training=True, memory_dim=12),
    "token": dict(routing_strategy_train="token", routing_strategy_inference="token"),
}


def make(**options):
    torch.manual_seed(0)
    config = MemAttnConfig.memory_transformer(
        **{**CHAPTERS, "wo_init_zero": False, **SIZES, **options}
    )
    return MemAttnForCausalLM(config)


@pytest.mark.parametrize("name", OPTIONS)
def test_full_model_trains_generates_and_loads(name, tmp_path):
    model, tokens = make(**OPTIONS[name]), make_tokens(T=30)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    model.eval()
    options = dict(do_sample=False, max_new_tokens=8, eos_token_id=None)
    cached = model.generate(tokens[:, :9], **options)
    assert torch.equal(cached, model.generate(tokens[:, :9], use_cache=False, **options))
    model.save_pretrained(tmp_path)
    loaded = MemAttnForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.parts == model.config.parts
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


@pytest.mark.parametrize(
    "options, layers, banks",
    [
        (dict(), [0, 1, 2, 3, 4, 5], [0] * 6),
        (dict(memory_layer_placement="first_k", memory_layer_k=2), [0, 1], [0, 0]),
        (dict(memory_layer_placement="last_k", memory_layer_k=2), [4, 5], [0, 0]),
        (dict(memory_layer_placement="every_n", memory_layer_n=4), [0, 4], [0, 0]),
        (dict(memory_layer_placement="none"), [], []),
        (dict(vanilla_mode=True), [], []),
        (
            dict(
                memory_layer_placement="custom",
                memory_layer_custom=[5, 1, 2],
                memory_sharing="every_k_layers",
            ),
            [1, 2, 5],
            [0, 0, 1],
        ),
        (dict(memory_sharing="per_layer", memory_layer_placement="every_n"), [0, 3], [0, 1]),
    ],
    ids=str,
)
def test_placement_and_sharing(options, layers, banks):
    model = make(**options, num_hidden_layers=6)
    placed = [i for i, block in enumerate(model.model.layers) if "chapter_memory" in block.parts]
    assert placed == layers
    found = [model.model.layers[i].parts["chapter_memory"].bank_index for i in placed]
    assert found == banks
    shared = [name for name, _ in model.named_parameters() if "shared_parts" in name]
    assert len(shared) == len(set(banks))
    assert model(make_tokens()).logits.isfinite().all()


def test_a_constant_router_makes_strategies_equal():
    """Without a weight a router says the same of every mean."""
    seen = []
    for strategy in ("token", "sequence", "rolling", "hybrid"):
        model = make(routing_strategy_inference=strategy, routing_block_size=4)
        model = perturb(model.double().eval())
        for block in model.model.layers:
            block.parts["chapter_memory"].router.weight.data.zero_()
        seen.append(logits_of(model, make_tokens()))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=1e-12)


def test_chapters_and_router_columns_permute_together():
    model = perturb(make(routing_block_size=4).double().eval())
    before = logits_of(model, make_tokens())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = model.model.shared_parts["chapter_memory"].banks[0].rows
        rows.copy_(rows.unflatten(0, (8, 3))[order].flatten(0, 1))
        for block in model.model.layers:
            router = block.parts["chapter_memory"].router
            router.weight.copy_(router.weight[order])
            router.bias.copy_(router.bias[order])
    torch.testing.assert_close(logits_of(model, make_tokens()), before, rtol=0, atol=1e-12)


def test_adapter_injection_on_a_small_model():
    base, tokens = make_base(), make_tokens(T=12)
    before = logits_of(base, tokens)
    part = ChapterMemoryConfig(**CHAPTERS, routing_block_size=4)
    attach_memory(base, part)
    assert torch.equal(logits_of(base, tokens), before)  # it starts as nothing
    loss = base(tokens, labels=tokens).loss
    loss.backward()
    learned = {name for name, p in base.named_parameters() if p.grad is not None}
    assert learned and all("chapter_memory" in name for name in learned)
    detach_memory(base)
    assert torch.equal(logits_of(base, tokens), before)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(num_memory_tokens=25),
            "num_memory_tokens must be divisible by num_chapters=8",
        ),
        (dict(top_k_chapters=9), "top_k_chapters must be at most .* = 8, got 9"),
        (dict(tokens_per_chapter=4), "tokens_per_chapter must be None or .* = 3, got 4"),
        (dict(num_shared_chapters=8), "num_shared_chapters must be below num_chapters=8"),
        (
            dict(memory_layer_placement="first"),
            "memory_layer_placement must be one of all",
        ),
        (dict(memory_layer_placement="custom"), "memory_layer_custom must be given for"),
        (dict(memory_layer_custom=[0]), "memory_layer_custom must be None without"),
        (
            dict(memory_layer_placement="custom", memory_layer_custom=[2]),
            "memory_layer_custom must name layers from 0 to 1",
        ),
        (dict(routing_strategy_train="bidirectional"), "routing_strategy_train must be causal"),
        (dict(routing_strategy_inference="last"), "routing_strategy_inference must be one of sequ"),
        (dict(memory_num_heads=5), "memory_num_heads must divide hidden_size=32, got 5"),
        (dict(memory_num_kv_heads=3), "memory_num_kv_heads must divide memory_num_heads=4, got 3"),
        (dict(memory_quant_bits=2), "memory_quant_bits must be one of 8, 4, got 2"),
        (dict(z_loss_coefficient=-1.0), "z_loss_coefficient must be finite and at least 0"),
        (dict(router_temperature=0.0), "router_temperature must be positive"),
        (dict(quantize_memory=True, memory_quant_bits=4, memory_dim=7), "memory_dim must be even"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(options, message):
    with pytest.raises(ValueError, match=f"parts.chapter_memory.{message}"):
        make(**options)


def test_a_misspelt_field_is_named():
    with pytest.raises(TypeError, match="top_k_chapter must be a field of"):
        make(top_k_chapter=2)
    with pytest.raises(ValueError, match=r"parts\[0\].top_k_chapter must be a field of"):
        MemAttnConfig(parts=[{"kind": "chapter_memory", "top_k_chapter": 2}])
