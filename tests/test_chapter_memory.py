"""Chapter memory in models: every strategy is causal and exact, and memory starts as nothing."""

import pytest
import torch
from matplotlib.figure import Figure
from model_factories import SIZES, logits_of, make_tokens, perturb

from memattn.evaluate import audit
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM
from memattn.nn.chapter_routing import document_blocks, pool_blocks, sequence_blocks
from memattn.parts.views import part_views

CHAPTERS = dict(num_memory_tokens=24, use_chapters=True, num_chapters=8, top_k_chapters=2)
BLOCKS = dict(routing_block_size=4, routing_window_size=7)
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
    report = audit(make_memory(**strategies(strategy, **BLOCKS), **CASES[strategy]), seq_len=18)
    assert report.verdict == "all 0", report.failed
    assert all(row.value is not None for row in report.rows)


def test_the_whole_bank_is_exact():
    model = make_memory(use_chapters=False, quantize_memory=True, memory_quant_training=True)
    assert audit(model, seq_len=12).verdict == "all 0"


@pytest.mark.parametrize("options", [{}, dict(use_chapters=False), dict(memory_block_variant="B")])
def test_memory_starts_as_nothing(options):
    tokens = make_tokens()
    model = make_memory(**options)
    plain = MemAttnForCausalLM(MemAttnConfig.vanilla(**SIZES)).double().eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    assert not torch.equal(logits_of(perturb(model), tokens), logits_of(perturb(plain), tokens))


@pytest.mark.parametrize("strategy", ["sequence", "rolling", "hybrid"])
@pytest.mark.parametrize("R, W", [(1, 4), (4, 3), (4, 9), (5, 6)])
def test_blocks_are_routed_by_causal_means(strategy, R, W):
    """The rows that the router sees, against sums over a double loop."""
    T, x = 23, torch.randn(2, 23, 6, dtype=torch.float64)
    starts, ends = [0, 5], [23, 19]
    positions = torch.tensor([0, -5])
    blocks = sequence_blocks(positions, T, R, with_past=False, padded=True)
    real = torch.arange(T) >= torch.tensor(starts)[:, None]
    rows = pool_blocks(
        torch.where(real[..., None], x, 0.0),
        blocks,
        strategy=strategy,
        routing_block=R,
        routing_window=W,
    ).rows
    for b in range(2):
        for m, first in enumerate(range(starts[b], ends[b], R)):
            assert blocks.start[b, m] == first and blocks.number[b, m] == m
            means = {
                "sequence": x[b, starts[b] : first + 1].mean(0),
                "rolling": x[b, max(starts[b], first - W + 1) : first + 1].mean(0),
            }
            means["hybrid"] = (means["sequence"] + means["rolling"]) / 2
            torch.testing.assert_close(rows[b, m], means[strategy], rtol=0, atol=1e-14)


def test_documents_are_routed_alone():
    bounds = [0, 3, 3, 9, 20]
    x = torch.randn(1, 20, 6, dtype=torch.float64)
    options = dict(strategy="hybrid", routing_block=4, routing_window=6)
    blocks = document_blocks(torch.tensor(bounds, dtype=torch.int32), 20, 4)
    packed = pool_blocks(x, blocks, **options).rows
    alone = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        own = sequence_blocks(torch.zeros(1).long(), end - begin, 4, with_past=False, padded=False)
        alone.append(pool_blocks(x[:, begin:end], own, **options).rows)
    assert torch.equal(packed, torch.cat(alone, 1))


@torch.no_grad()
def feed(model, tokens, cache, mask=None):
    return model(tokens, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("record", [False, True])
def test_crops_up_to_a_block_are_exact(record):
    model = perturb(make_memory(**strategies("hybrid", **BLOCKS)))
    tokens = make_tokens(T=40)
    whole = logits_of(model, tokens)
    for before in (10, 16, 17, 19):
        for back in (1, 3, 4) + (9,) * record:
            cache = MemAttnCache(model.config)
            feed(model, tokens[:, : before - back], cache)
            if record:
                cache.activate_past_recording()
            # attention keeps all keys, so that chapter memory alone decides
            for t in range(before - back, before):
                feed(model, make_tokens(T=40, seed=1)[:, t : t + 1], cache)
            cache.crop(-back)
            left = before - back
            actual = feed(model, tokens[:, left : left + 11], cache)
            torch.testing.assert_close(actual, whole[:, left : left + 11], rtol=0, atol=1e-12)


def test_a_crop_behind_the_kept_blocks_is_refused(tmp_path):
    model = perturb(make_memory(**strategies("rolling", **BLOCKS)))
    tokens = make_tokens(T=30)
    cache = MemAttnCache(model.config)
    feed(model, tokens[:, :22], cache)
    with pytest.raises(ValueError, match="tokens_to_remove must be at least -4, the routing block"):
        cache.crop(-9)
    cache.save(tmp_path / "cache.safetensors")
    cache = MemAttnCache.load(tmp_path / "cache.safetensors")
    cache.crop(-3)
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be at least -4"):
        cache.crop(-4)  # seven in all
    actual = feed(model, tokens[:, 19:], cache)
    torch.testing.assert_close(actual, logits_of(model, tokens)[:, 19:], rtol=0, atol=1e-12)


def test_a_cache_holds_what_evaluation_needs():
    model = make_memory(routing_strategy_train="token").train()
    with pytest.raises(ValueError, match="past_key_values must be None in training mode"):
        model(make_tokens(), use_cache=True)
    model(make_tokens(), use_cache=False)
    other = make_memory(routing_block_size=5)
    with pytest.raises(ValueError, match="past_key_values must be of .*routing_block=5"):
        other(make_tokens(), past_key_values=MemAttnCache(model.config))
    assert not make_memory(routing_strategy_inference="token").config.parts[0].keeps_state


def test_losses_follow_their_switches():
    switches = dict(use_auxiliary_loss=True, use_z_loss=True, z_loss_coefficient=0.5)
    model = perturb(make_memory(**switches, routing_block_size=4)).train()
    tokens = make_tokens()
    output = model(tokens, labels=tokens)
    losses = output.losses
    assert losses.keys() == {
        *("load_balance_loss", "auxiliary_loss", "z_loss", "router_entropy", "dead_chapters")
    }
    extra = 0.01 * losses["load_balance_loss"] + 0.01 * losses["auxiliary_loss"]
    expected = output.lm_loss + extra + 0.5 * losses["z_loss"]
    torch.testing.assert_close(output.loss, expected)
    assert output.loss_counts["z_loss"] == 2 * 2 * 6  # layers, rows, blocks
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    off = make_memory(use_load_balance_loss=False).train()(tokens, labels=tokens)
    assert off.losses.keys() == {"router_entropy", "dead_chapters"} and off.loss == off.lm_loss


def test_usage_is_measured_and_drawn():
    model = perturb(make_memory(num_shared_chapters=1, routing_block_size=4))
    view = part_views()["chapters"]
    usage = view.measure(model, make_tokens())
    assert usage.load.shape == (2, 7) and torch.allclose(
        usage.load.sum(1), torch.tensor(2.0).double()
    )
    assert usage.dead.tolist() == (usage.load == 0).sum(1).tolist()
    assert (usage.entropy > 0).all() and (usage.entropy <= torch.tensor(7.0).log()).all()
    figure = Figure()
    view.draw(figure, usage)
    assert len(figure.axes) == 2
    with pytest.raises(TypeError, match="model must have layers of kind ChapterRouter"):
        view.measure(make_memory(use_chapters=False), make_tokens())


def published(**options):
    """The configuration of the workshop paper."""
    return MemAttnConfig.memory_transformer(
        vocab_size=49152,
        hidden_size=768,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2304,
        rope_theta=1e5,
        memory_layer_placement="custom",
        memory_layer_custom=[2, 6, 10, 14],
        use_chapters=True,
        num_memory_tokens=262_208,
        num_chapters=4097,
        num_shared_chapters=1,
        top_k_chapters=64,
        routed_scaling_factor=2.5,
        **options,
    )


def test_parameters_of_the_published_model():
    config = published()
    with torch.device("meta"):
        model = MemAttnForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    # theirs has a router row and a bias for the shared chapter in four layers, without a gradient
    assert total == 371_289_856 == 371_292_932 - 4 * (768 + 1)
    part = config.parts[0]
    layers = part.layers(16)
    assert layers == [2, 6, 10, 14]
    bank = part.shared_cost(config.sizes, 1).parameters
    assert bank == 201_375_744
    norms = len(layers) * 768
    memory = norms + sum(part.cost(config.sizes, 1, layer).parameters for layer in layers)
    assert memory == 22_042_628 - 4 * (768 + 1)
    assert total - bank - memory == 147_874_560  # the backbone
    assert published(vanilla_mode=True).parts[0].shared_cost(config.sizes, 1).parameters == 0


def test_cost_counts_what_is_multiplied():
    E, H, D, M, T = 32, 4, 8, 3, 23
    base = dict(num_shared_chapters=1, routing_block_size=4)
    model = make_memory(**base)
    part, sizes = model.config.parts[0], model.config.sizes
    rows, seen = 6, 3 * M  # of 23 tokens; three chapters for each
    own = 2 * T * 2 * E * E + 2 * rows * 7 * E + 4 * H * D * T * seen
    assert part.cost(sizes, T).flops == own + 2 * 24 * 2 * E * E  # all eight chapters
    assert part.cost(sizes, 3).flops == (
        2 * 3 * 2 * E * E + 2 * 7 * E + 4 * H * D * 3 * seen + 2 * seen * 2 * E * E
    )
    low = make_memory(**base, use_low_rank_memory=True, memory_rank=5).config.parts[0]
    folded = 2 * 2 * E * (24 * 5 + E * 5)  # the basis into both weights, then the rows
    assert low.cost(sizes, T).flops == own + folded
    assert low.shared_cost(sizes, T).parameters == 24 * 5 + E * 5
    codes = make_memory(quantize_memory=True).config.parts[0]
    assert codes.shared_cost(sizes, T).parameters == 24 * E
