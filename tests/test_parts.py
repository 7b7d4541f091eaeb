"""What the package's own parts say about themselves: counts of losses, cost, reach, spellings."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from model_factories import (
    SIZES,
    SYSTEMS,
    enable_checkpointing,
    logits_of,
    make_config,
    make_model,
    make_tokens,
    pad_left,
    perturb,
)
from torch import nn

from memattn.evaluate import audit
from memattn.models import AttentionConfig, FutureConfig, MemAttnConfig, MemAttnForCausalLM
from memattn.parts import PARTS, AddedPart, PartOutput, Role, register_part
from memattn.parts.causal import CausalConfig
from memattn.parts.segmented import SegmentedConfig


class SharedRows(nn.Module):
    """Rows that all layers add a mixture of."""

    def __init__(self, hidden_size):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(3, hidden_size))


@register_part
@dataclass(frozen=True, kw_only=True)
class MixtureConfig(AddedPart):
    """A mixture of shared rows, weighted by the normed states, plus a tenth of the residual."""

    kind: ClassVar[str] = "mixture"
    place: ClassVar[str] = "after_attention"
    repeatable: ClassVar[bool] = True
    place_of_fields: str = "after_attention"
    keeps: bool = False  # what attention gives, where it stands beside that

    @property
    def resolved_place(self):
        return self.place_of_fields

    def build_shared(self, sizes):
        return SharedRows(sizes.hidden_size)

    def build(self, sizes, layer):
        return nn.Linear(sizes.hidden_size, 3, bias=False)

    def run(self, module, hidden_states, context):
        mixture = module(hidden_states).softmax(-1) @ context.shared_module.rows
        if context.attended is not None:  # beside attention: a gate of what it gives
            attended = context.attended
            mixed = context.base.o_proj(attended * mixture)
            return PartOutput(attended if self.keeps else mixed)
        return PartOutput(mixture + 0.1 * context.residual)

    @staticmethod
    def init_weights(module, std):
        if isinstance(module, SharedRows):
            nn.init.normal_(module.rows, mean=1.0, std=std)

    def role(self, name, parameter):
        return Role("memory", 0.5) if name == "rows" else None


def make_mixtures(*parts):
    torch.manual_seed(0)
    config = MemAttnConfig.vanilla(parts=[{"kind": "mixture", **part} for part in parts], **SIZES)
    return MemAttnForCausalLM(config).double().eval()


def test_layers_share_the_module_of_a_part(tmp_path):
    model = make_mixtures({}, {})
    shared = [n for n, _ in model.named_parameters() if "shared_parts" in n]
    assert shared == [f"model.shared_parts.{n}.rows" for n in ("mixture", "mixture-2")]
    for name in shared:
        assert abs(model.get_parameter(name).mean() - 1.0) < 0.01  # by its own init_weights
        assert model.parameter_roles()[name] == Role("memory", 0.5)
        assert model.model.parameter_roles()[name.removeprefix("model.")] == Role("memory", 0.5)
    part, sizes = model.config.parts[0], model.config.sizes
    assert part.shared_cost(sizes, 7).parameters == 3 * 32
    assert part.cost(sizes, 7).parameters == 3 * 32  # its own matrix

    perturb(model)
    tokens = make_tokens()
    model.save_pretrained(tmp_path)
    loaded = MemAttnForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    logits = logits_of(model, tokens)
    torch.testing.assert_close(logits_of(loaded, tokens), logits, rtol=0, atol=1e-12)
    # the second part of the kind has its own rows
    loaded.model.shared_parts["mixture-2"].rows.data += 1.0
    assert not torch.allclose(logits_of(loaded, tokens), logits)
    assert audit(model, seq_len=16).verdict == "all 0"


def test_checkpointing_reaches_shared_modules():
    gradients = []
    for checkpoint in (False, True):
        model = perturb(make_mixtures({})).train()
        if checkpoint:
            enable_checkpointing(model)
        tokens = make_tokens()
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.shared_parts["mixture"].rows.grad)
    assert gradients[0].abs().min() > 0.0
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


def test_fields_decide_where_a_part_stands():
    seen = []
    for place in ("after_attention", "after_mlp"):
        model = perturb(make_mixtures({"place_of_fields": place}))
        block = model.model.layers[0]
        order = []
        for module in (block.parts["mixture"], block.mlp):
            module.register_forward_pre_hook(lambda module, args, order=order: order.append(module))
        seen.append(logits_of(model, make_tokens()))
        assert (order[0] is block.mlp) == (place == "after_mlp") and len(order) == 2
    assert not torch.allclose(*seen)
    for place in ("attention", "beside"):
        with pytest.raises(ValueError, match="parts.mixture.resolved_place must"):
            make_mixtures({"place_of_fields": place})


def test_parts_beside_attention_stand_instead_of_what_it_gives():
    """Each gets what attention got, and what the one before it made of the output."""
    place = {"place_of_fields": "beside_attention"}
    model, plain = (perturb(make_mixtures(*parts)) for parts in ([place, place], []))
    plain.load_state_dict(model.state_dict(), strict=False)
    block, tokens = model.model.layers[0], make_tokens()
    assert not block.part_norms  # they have attention's
    calls = []
    for module in (block.attention, *block.parts.values(), block.mlp_norm):
        module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    hidden_states = model(tokens, output_hidden_states=True).hidden_states[0]
    (normed, out), *mixtures, (residual, _) = calls
    for (given, mixture), name in zip(mixtures, block.parts, strict=True):
        assert given is normed
        out = block.attention.o_proj(out * (mixture.softmax(-1) @ rows_of(model, name)))
    torch.testing.assert_close(residual, hidden_states + out, rtol=0, atol=1e-14)

    keep = lambda part: replace(part, keeps=True) if part.kind == "mixture" else part
    model.replace_parts(keep)
    assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))


def rows_of(model, name):
    return model.model.shared_parts[name].rows


def band_positions(length, future_dim, n_ctx):
    """Positions whose future keys all have a real counterpart, one by one."""
    found = 0
    for i in range(length):
        ahead = [p for p in range(i + 1, i + future_dim + 1) if n_ctx is None or p < n_ctx]
        found += bool(ahead) and ahead[-1] < length
    return found


@pytest.mark.parametrize("source", ["table", "relative", "computed"])
def test_a_loss_counts_the_positions_that_it_is_the_mean_of(source):
    limit = 25
    model = make_model("future", source=source, max_position_embeddings=limit)
    n_ctx = None if source == "relative" else limit
    tokens = make_tokens(B=3, T=25)
    cu_seqlens = torch.tensor([0, 3, 3, 13, 25], dtype=torch.int32)
    left, mask = pad_left([tokens[0], tokens[1, :13], tokens[2, :4]], 25)
    for lengths, inputs in (
        ([25, 25, 25], dict(input_ids=tokens)),
        ([25, 13, 4], dict(input_ids=left, attention_mask=mask)),
        ([25, 13, 4], dict(input_ids=left.flip(1), attention_mask=mask.flip(1))),
        ([3, 10, 12], dict(input_ids=tokens[:1], cu_seqlens=cu_seqlens)),
    ):
        counts = model(**inputs, output_losses=True).loss_counts
        expected = sum(band_positions(length, 5, n_ctx) for length in lengths)
        assert counts["future_loss"] == 2 * expected  # two layers
    alone = model(tokens[:, :5], output_losses=True)
    assert alone.loss_counts["future_loss"] == 0 and alone.future_loss == 0


@pytest.mark.parametrize("system", [name for name in SYSTEMS if "titans" not in name])
def test_cost_is_that_of_the_module_and_its_visible_keys(system):
    config = make_config(system)
    model = make_model(system)
    length = 23
    for i, block in enumerate(model.model.layers):
        part = config.layer_parts(i)["attention"]
        parameters = dict(block.attention.named_parameters())
        cost = part.cost(config.sizes, length, i)
        assert cost.parameters == sum(p.numel() for p in parameters.values())
        matrices = sum(p.numel() for name, p in parameters.items() if name.endswith("proj.weight"))
        pairs = (cost.flops - 2 * length * matrices) / (4 * 4 * 8)
        assert pairs == sum(visible_keys(part, j, config) for j in range(length))


def visible_keys(part, i, config):
    """Keys that query i sees, one by one."""
    if part.kind == "future":
        return i + 1 + len(range(i + 1, min(i + part.future_dim, config.position_limit - 1) + 1))
    L, W = part.spans
    seen = [
        j
        for j in range(i + 1)
        if (L is None and W is None)
        or (L is not None and i // L == j // L)
        or (W is not None and j > i - W)
    ]
    return len(seen) + part.num_persistent_tokens


def test_reach_and_limits_are_those_of_the_parts():
    assert make_config("both").reach == 7 and make_config("window").reach == 4
    assert make_config("vanilla").reach == 0 and make_config("future").reach == 5
    assert make_config("chapters").reach == 7
    assert make_config("future").position_limit == 160
    assert make_config("future", source="relative").position_limit is None
    assert make_config("vanilla", position_embedding="learned").position_limit == 4096


def test_roles_are_those_of_learned_tokens_and_tables():
    roles = make_model("both").parameter_roles()
    persistent = [
        f"model.layers.{i}.attention.persistent_{n}" for i in (0, 1) for n in ("key", "value")
    ]
    assert roles == dict.fromkeys(persistent, Role("memory"))
    roles = make_model("learned").parameter_roles()  # the second layer alone has future keys
    tables = [f"model.layers.1.attention.future.{name}" for name in ("key", "value")]
    assert roles == dict.fromkeys(tables, Role("table"))


@pytest.mark.parametrize(
    "record, expected",
    [
        (dict(), CausalConfig()),
        (
            dict(kind="causal", segment_len=None, future=None, backend="cpp"),
            CausalConfig(backend="cpp"),
        ),
        (
            dict(
                kind="segmented",
                segment_len=4,
                window_size=None,
                num_persistent_tokens=2,
                future=None,
            ),
            SegmentedConfig(segment_len=4, num_persistent_tokens=2),
        ),
        (
            dict(
                kind="future", segment_len=None, num_persistent_tokens=0, future={"future_dim": 3}
            ),
            FutureConfig(future_dim=3),
        ),
        (
            dict(kind="future", future_dim=3, backend="cpp"),
            FutureConfig(future_dim=3, backend="cpp"),
        ),
        (
            dict(kind="future", future=FutureConfig(future_dim=3), backend="cpp"),
            FutureConfig(future_dim=3, backend="cpp"),
        ),
    ],
    ids=str,
)
def test_records_of_all_kinds_become_the_fields_of_one(record, expected):
    assert AttentionConfig(**record) == expected
    assert MemAttnConfig(attention=record).attention == expected
    assert MemAttnConfig(attention=expected.to_dict()).attention == expected
    assert type(expected) is PARTS[expected.kind]
