"""Adapters of PEFT on every preset: none of our fused paths passes them by."""

import copy
from typing import Any

import pytest
import torch
from model_factories import make_tokens
from torch import Tensor, nn

from memattn.models import PRESETS, MemAttnForCausalLM
from memattn.models.peft_targets import register_peft_targets

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

SIZES = dict(
    vocab_size=53,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "segmented": {"segment_len": 8, "window_size": 5, "num_persistent_tokens": 2},
    "future": {"future_dim": 4},
    "shiftable": {"num_specialists": 2, "rank": 3},
}


def make_model(preset: str) -> MemAttnForCausalLM:
    torch.manual_seed(0)
    return MemAttnForCausalLM(PRESETS[preset](**SIZES, **OPTIONS.get(preset, {})))


def adapt(model: nn.Module, config: Any) -> Any:
    """The model with adapters that do something, all random."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.3 * noise)
    return adapted


@torch.no_grad()
def decode(model: Any, ids: Tensor, prefill: int) -> Tensor:
    cache = model(input_ids=ids[:, :prefill], use_cache=True).past_key_values
    steps = [
        model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
        for t in range(prefill, ids.shape[1])
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_lora_of_all_linear_layers_is_what_merging_makes_of_it(preset):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    base, ids = make_model(preset).eval(), make_tokens(T=13)
    with torch.no_grad():
        plain = base(ids, use_cache=False).logits
    model = adapt(base, config)
    merged = copy.deepcopy(model).merge_and_unload()
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, unused
    torch.testing.assert_close(merged.train()(ids, labels=ids).loss, loss, rtol=1e-5, atol=1e-5)

    model.eval()
    merged.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
        whole = merged(ids, use_cache=False).logits
        assert (adapted - plain).abs().max() > 0.1
        torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decode(model, ids, 5), whole[:, 5:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decode(merged, ids, 5), whole[:, 5:], rtol=1e-4, atol=1e-4)
        options = dict(max_new_tokens=5, do_sample=False)
        generated = model.generate(input_ids=ids, **options)
        assert generated.equal(merged.generate(ids, **options))
        with model.disable_adapter():
            off = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(off, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_know_where_they_belong(preset):
    ids = make_tokens(T=9)
    placed = {
        "lora": (peft.LoraConfig(task_type="CAUSAL_LM", r=2), {"q_proj", "v_proj"}),
        "ia3": (peft.IA3Config(task_type="CAUSAL_LM"), {"k_proj", "v_proj", "down_proj"}),
        "norms": (peft.LNTuningConfig(task_type="CAUSAL_LM"), {"attention_norm", "mlp_norm"}),
    }
    for kind, (config, targets) in placed.items():
        model = adapt(make_model(preset), config)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for block in range(2):
            found = {t for t in targets for n in trained if f"layers.{block}." in n and t in n}
            assert found == targets, (kind, list(trained))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in trained.values()), kind
        merged = copy.deepcopy(model).merge_and_unload().eval()
        with torch.no_grad():
            logits, whole = (m.eval()(input_ids=ids).logits for m in (model, merged))
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_tables_of_peft_that_are_there_are_filled():
    tables: Any = peft.utils.constants
    table = tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    del table["memattn"]
    register_peft_targets()
    assert table["memattn"] == table["llama"]
    table["memattn"] = ["o_proj"]
    register_peft_targets()
    assert table.pop("memattn") == ["o_proj"]  # what somebody else has entered stays
    register_peft_targets()


@pytest.mark.parametrize("preset", PRESETS)
def test_prompt_tuning_and_ia3_train_and_generate(preset):
    ids = make_tokens(T=9)
    projections = ["k_proj", "v_proj", "down_proj"]
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=projections, feedforward_modules=["down_proj"]
        ),
    ):
        model = adapt(make_model(preset), config)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.eval()
        expected = ids
        with torch.no_grad():
            for _ in range(4):
                logits = model(input_ids=expected).logits[:, -1:]
                expected = torch.cat([expected, logits.argmax(-1)], 1)
        generated = model.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        assert generated.equal(expected)


def test_prefix_tuning_is_refused_by_name():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model("vanilla"), config)
    with pytest.raises(
        TypeError, match="past_key_values must be .*prefix tuning.*got DynamicCache"
    ):
        model(input_ids=make_tokens(T=5))
