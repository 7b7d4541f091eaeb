"""Inference by few calls of operators: as the modules compute it, and where they are plain."""

import copy
from typing import Any

import pytest
import torch
from sublayer_spies import spy_on
from torch import Tensor, nn

from memattn.models import (
    MemAttnCache,
    MemAttnConfig,
    MemAttnForCausalLM,
    block,
    decoder,
    plain_step,
)
from memattn.parts.causal import CausalConfig
from memattn.testing import assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not plain_step.AVAILABLE, reason="the C++ extension is not built"),
]
T, PREFILL = 30, 10
MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {"hidden_size": 72, "head_dim": 20, "num_key_value_heads": 2},
    "segmented": {"segment_len": 7, "window_size": 5, "num_persistent_tokens": 3},
    "future": {"future_dim": 5, "end_layer": 1},
    "titans": {"segment_len": 8},  # its MLP alone
}


def make_model(preset: str = "vanilla", **options: Any) -> MemAttnForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    config = getattr(MemAttnConfig, preset)(**{**sizes, **options})
    model = MemAttnForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tokens() -> Tensor:
    return torch.randint(97, (3, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decode(model: MemAttnForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of a prefill, and then of one token after the other."""
    masks = (lambda n: {}) if mask is None else (lambda n: {"attention_mask": mask[:, :n]})
    output = model(ids[:, :PREFILL], use_cache=True, **masks(PREFILL))
    logits, cache = [output.logits], output.past_key_values
    for t in range(PREFILL, ids.shape[1]):
        output = model(ids[:, t : t + 1], past_key_values=cache, **masks(t + 1))
        logits.append(output.logits)
    return torch.cat(logits, 1)


@pytest.fixture
def steps(monkeypatch) -> list[bool]:
    """Whether each call of a sublayer was one call of an operator; none is of all layers."""
    monkeypatch.setattr(decoder, "decoder_step", lambda *_: None)
    is_step = lambda hidden_states, *_: hidden_states.shape[1] == 1
    return spy_on(monkeypatch, "attention_step", "mlp_step", counts=is_step)


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_are_what_modules_compute(monkeypatch, steps, preset, padded):
    model, ids = make_model(preset, **MODELS[preset]), make_tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = mask[2, :9] = 0
    actual = decode(model, ids, mask)
    assert len(steps) == 4 * (T - PREFILL) and sum(steps) == len(steps) // (
        1 + (preset == "titans")
    )
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    low, high = (decode(m, ids, mask) for m in (model, copy.deepcopy(model).double()))
    real = mask == 1
    assert_within_budget(preset, actual[real], low[real], high[real])


@pytest.mark.parametrize("preset", ["vanilla", "segmented", "future"])
def test_one_call_of_all_layers_is_that_of_each(monkeypatch, preset):
    model, ids = make_model(preset, **MODELS[preset]), make_tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found: list[bool] = []
    whole = decoder.decoder_step

    def spy(layers, hidden_states, *args):
        result = whole(layers, hidden_states, *args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(decoder, "decoder_step", spy)
    actual = decode(model, ids, mask)
    assert found == [False] + [True] * (T - PREFILL)
    monkeypatch.setattr(decoder, "decoder_step", lambda *_: None)
    torch.testing.assert_close(actual, decode(model, ids, mask), rtol=0, atol=0)


@torch.no_grad()
def run_pieces(model: MemAttnForCausalLM, ids: Tensor, mask: Tensor, pieces: list[int]) -> Tensor:
    """Logits of tokens that come in pieces; the last piece gives its two newest alone."""
    found, cache, done = [], MemAttnCache(model.config), 0
    for n in pieces:
        done += n
        options = {"attention_mask": mask[:, :done], "past_key_values": cache}
        kept = 2 if done == sum(pieces) else 0
        output = model(ids[:, done - n : done], logits_to_keep=kept, **options)
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("rows", [3, 12])
def test_many_tokens_are_what_modules_compute(monkeypatch, preset, rows):
    """A prefill, a piece after it, single tokens, and the two tokens that are looked at."""
    model = make_model(preset, **MODELS[preset])
    ids = make_tokens().repeat(rows // 3, 1)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :11] = 0
    calls: list[int] = []

    def spy(function):
        def call(*args):
            result = function(*args)
            calls.append(0 if result is None else result.shape[1])
            return result

        return call

    for name in ("attention_step", "mlp_step"):
        monkeypatch.setattr(block, name, spy(getattr(block, name)))
    pieces = [9, 7, 1, 13]
    actual = run_pieces(model, ids, mask, pieces)
    plain = [2] if preset == "titans" else [2, 2]
    assert [n for n in calls if n][-len(plain) :] == plain
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    low, high = (run_pieces(m, ids, mask, pieces) for m in (model, copy.deepcopy(model).double()))
    columns = [*range(17), *range(T - 2, T)]
    real = mask[:, columns] == 1
    assert_within_budget(preset, actual[real], low[real], high[real])


@torch.no_grad()
def test_angles_reach_as_far_as_the_layer_that_sees_farthest(monkeypatch):
    """The first layer sees no positions ahead, the second does, at the end of the kept angles."""
    sizes = {"max_position_embeddings": 400, "future_dim": 90, "start_layer": 1}
    model, ids = make_model("future", **sizes), make_tokens()[:1].repeat(1, 8)
    monkeypatch.setattr(decoder, "decoder_step", lambda *_: None)
    last = lambda: [
        model(ids[:, :n], logits_to_keep=1, past_key_values=cache).logits
        for n, cache in ((180, MemAttnCache(model.config)), (1, cache_of(model, ids)))
    ]
    actual = last()
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    torch.testing.assert_close(actual, last())


def cache_of(model: MemAttnForCausalLM, ids: Tensor) -> MemAttnCache:
    cache = MemAttnCache(model.config)
    model(ids[:, :179], past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("preset", ["vanilla", "segmented", "future"])
def test_packed_documents_without_a_cache(monkeypatch, preset):
    model, ids = make_model(preset, **MODELS[preset]), make_tokens()[:1]
    bounds = torch.tensor([0, 11, 12, T], dtype=torch.int32)
    run = lambda model: model(ids, cu_seqlens=bounds, logits_to_keep=3).logits
    actual = run(model)
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    assert_within_budget(preset, actual, run(model), run(copy.deepcopy(model).double()))


@torch.no_grad()
def test_whoever_looks_sees_all_tokens():
    """Fewer hidden states reach the end only where nobody would notice."""
    model, ids, shapes = make_model(), make_tokens(), []
    see = lambda *args: shapes.append(args[2].shape[1])
    last: Any = model.model.layers[-1]
    expected = model(ids, logits_to_keep=1).logits
    for module in (last.mlp.down_proj, last, model.model.norm):
        handle = module.register_forward_hook(
            lambda m, a, out: see(m, a, out[0] if isinstance(out, tuple) else out)
        )
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected)
        handle.remove()
    handle = model.model.register_forward_hook(lambda m, a, out: see(m, a, out.last_hidden_state))
    model(ids, logits_to_keep=1)
    handle.remove()
    output = model(ids, logits_to_keep=1, output_hidden_states=True)
    shapes += [x.shape[1] for x in output.hidden_states]
    assert set(shapes) == {T} and len(shapes) == 4 + 3
    whole = model.model(ids).last_hidden_state[:, -5:]
    torch.testing.assert_close(model.model(ids, hidden_to_keep=5).last_hidden_state, whole)


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_instruction_set(monkeypatch, name):
    had = torch.ops.memattn_cpp.cpu_capability()
    try:
        torch.ops.memattn_cpp.set_cpu_capability(name)
    except (RuntimeError, ValueError):
        pytest.skip(f"this processor does not run {name}")
    try:
        model, ids = make_model("future", future_dim=5, hidden_size=72, head_dim=20), make_tokens()
        actual = decode(model, ids)
        monkeypatch.setattr(plain_step, "AVAILABLE", False)
        low, high = (decode(m, ids) for m in (model, copy.deepcopy(model).double()))
        assert_within_budget(name, actual, low, high)
    finally:
        torch.ops.memattn_cpp.set_cpu_capability(had)


def test_rows_do_not_depend_on_each_other():
    model, ids = make_model(), make_tokens()
    whole = decode(model, ids)[:, PREFILL:]
    # the prefill alone may round by the size of the batch
    torch.testing.assert_close(whole[1:2], decode(model, ids[1:2])[:, PREFILL:])


def test_what_is_not_plain_runs_as_modules(steps):
    """Hooks fire, adapters and other layers count, gradients flow."""
    ids, calls = make_tokens(), []
    model = make_model()
    first: Any = model.model.layers[0]
    handle = first.attention.q_proj.register_forward_hook(lambda *_: calls.append(1))
    decode(model, ids)
    assert len(calls) == 1 + T - PREFILL
    assert steps.count(False) == T - PREFILL  # attention of the one layer
    handle.remove()
    before = decode(model, ids)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    first.mlp.down_proj.__class__ = Doubled
    assert not torch.allclose(decode(model, ids), before)
    first.mlp.down_proj.__class__ = nn.Linear
    torch.testing.assert_close(decode(model, ids), before, rtol=0, atol=0)
    cache = model(ids[:, :PREFILL], use_cache=True).past_key_values
    model(ids[:, PREFILL : PREFILL + 1], past_key_values=cache).logits.sum().backward()
    assert first.attention.q_proj.weight.grad is not None


class TwiceConfig(CausalConfig):
    """A part that inherits the sources of its base, and computes something else."""

    def run(self, module, hidden_states, context):
        output = super().run(module, hidden_states, context)
        return output._replace(hidden_states=2.0 * output.hidden_states)


def without_contiguous_keys(model: Any) -> None:
    key = model.model.layers[0].attention.persistent_key
    key.data = key.data.transpose(0, 1).contiguous().transpose(0, 1)


def with_hook_on_table(model: Any) -> None:
    double = lambda module, args, rows: tuple(2.0 * row for row in rows)
    model.model.layers[0].attention.future.register_forward_hook(double)


def with_norms_by_default(model: Any) -> None:
    model.model.norm = nn.RMSNorm(64)
    model.model.layers[0].attention_norm = nn.RMSNorm(64)


def with_other_part(model: Any) -> None:
    model.model.layers[0].part_configs["attention"] = TwiceConfig()


def with_other_angles(model: Any) -> None:
    decode(model, make_tokens())
    model.model.rotary.theta = 500.0


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("segmented", without_contiguous_keys),
        ("future", with_hook_on_table),
        ("vanilla", with_norms_by_default),
        ("vanilla", with_other_part),
        ("vanilla", with_other_angles),
    ],
)
def test_changed_models_decode_as_their_modules_do(monkeypatch, preset, change):
    sizes = {"hidden_size": 64, "head_dim": 16} if preset == "vanilla" else {}
    model, ids = make_model(preset, **{**MODELS[preset], **sizes}), make_tokens()
    change(model)
    actual = decode(model, ids)
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    torch.testing.assert_close(actual, decode(model, ids))


def test_an_exported_program_takes_any_number_of_rows():
    class LastLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False, logits_to_keep=1).logits

    model, rows = LastLogits(), torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (make_tokens(),), dynamic_shapes={"ids": {0: rows}})
    many = make_tokens().repeat(4, 1)
    torch.testing.assert_close(program.module()(many), model(many))


@torch.no_grad()
def test_caches_that_share_memory_go_on_apart():
    model, ids = make_model(), make_tokens()
    step = lambda cache, t: model(ids[:, t : t + 1], past_key_values=cache).logits
    cache = model(ids[:, :PREFILL], use_cache=True).past_key_values
    step(cache, PREFILL)
    twin, copied = cache.detach(), copy.deepcopy(cache)
    keys = cache.layers[0].keys.clone()
    expected = step(cache, PREFILL + 1)
    step(twin, PREFILL + 5)
    for other in (copied, cache):
        if other is cache:
            cache.crop(-1)
            held = twin.layers[0].keys.clone()
        torch.testing.assert_close(step(other, PREFILL + 1), expected, rtol=0, atol=0)
    assert torch.equal(cache.layers[0].keys[:, :, :-1], keys)
    assert torch.equal(twin.layers[0].keys, held)


def test_room_is_bounded_and_copied_seldom():
    model, ids = make_model(), torch.zeros(1, 1, dtype=torch.long)
    cache, buffers = MemAttnCache(model.config), set()
    with torch.inference_mode():
        for _ in range(39):
            model(ids, past_key_values=cache)
            buffers.add(cache.layers[0].keys.untyped_storage().data_ptr())
    assert cache.layers[0].kept == 39 and len(buffers) <= 3
    with torch.no_grad():  # what was kept in inference mode is not written outside of it
        model(ids, past_key_values=cache)
    assert cache.layers[0].kept == 40


# PyTorch warns of itself when forward mode is first used
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_differentiation_runs_the_modules(monkeypatch):
    # custom operators know no tangents: theirs would be zeros
    model, ids = make_model(backend="reference"), make_tokens()
    embedded = model.get_input_embeddings()(ids).detach()

    @torch.no_grad()
    def tangent() -> Tensor:
        return torch.func.jvp(
            lambda x: model(inputs_embeds=x).logits, (embedded,), (embedded.cos(),)
        )[1]

    found = tangent()
    monkeypatch.setattr(plain_step, "AVAILABLE", False)
    assert found.count_nonzero() and torch.equal(found, tangent())
