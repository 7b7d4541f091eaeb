"""audit: passes exact models, and names each kind of leak that was planted."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from memattn import ChapterMemoryConfig, attach_memory
from memattn.evaluate import AuditReport, AuditRow, audit

SIZES = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def make_llama(model_class=LlamaForCausalLM, **sizes):
    torch.manual_seed(0)
    return model_class(LlamaConfig(**SIZES | sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def make_qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=0)
    )


def make_gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


class Planted(nn.Module):
    """A leak after a gate that starts at zero, around a module that keeps shapes."""

    def __init__(self, inner, leak):
        super().__init__()
        self.inner = inner
        self.leak = leak
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden):
        return self.inner(hidden) + self.gate * self.leak(hidden)


def next_token(hidden):
    return torch.cat([hidden[:, 1:], torch.zeros_like(hidden[:, :1])], 1)


def batch_mean(hidden):
    return hidden.mean(0, keepdim=True)


def batch_scale_when_low(hidden):
    """What int8 quantisation with one scale for the batch does, but not in float64."""
    if hidden.dtype == torch.float64:
        return torch.zeros_like(hidden)
    return hidden.abs().amax() * torch.ones_like(hidden)


class DrawsNoise(nn.Module):
    def forward(self, hidden):
        return hidden + 0.01 * torch.rand_like(hidden)


class ReadsPadding(LlamaForCausalLM):
    """Padding keys weigh ``gate`` instead of 0."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask=None, position_ids=None, **inputs):
        if attention_mask is not None:
            T, S = input_ids.shape[1], attention_mask.shape[1]
            low = torch.finfo(self.gate.dtype).min
            weight = self.gate.abs().log().clamp(min=low)
            padding = torch.where(attention_mask.bool(), 0.0, weight)[:, None, None]
            later = torch.full((T, S), low, dtype=padding.dtype).triu(S - T + 1)
            attention_mask = torch.maximum(padding + later, torch.full_like(later, low))
        return super().forward(input_ids, attention_mask, position_ids, **inputs)


class ForgetsOldestKey(LlamaForCausalLM):
    """Each decoded token loses the oldest key of the first layer."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **inputs):
        if past_key_values is not None and input_ids.shape[1] == 1:
            past_key_values.layers[0].values[:, :, 0] = 0.0
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **inputs)


class LosesStateAtSplit(LlamaForCausalLM):
    """A second piece of a prompt starts without what the first one stored."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **inputs):
        if past_key_values is not None and input_ids.shape[1] > 1:
            past_key_values.layers[1].values[:] = 0.0
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **inputs)


class LacksAll(nn.Module):
    """Embedding and head: neither cache nor padding."""

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(**SIZES)
        self.embed = nn.Embedding(61, 8)
        self.head = nn.Linear(8, 61)

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.head(self.embed(input_ids)))


@pytest.mark.parametrize("make", [make_llama, make_qwen2, make_gpt2])
def test_passes_exact_models(make):
    report = audit(make())
    assert report.passed and report.failed == () and report.notes == ()
    checks = dict.fromkeys(row.check for row in report.rows if row.passed)
    assert list(checks) == [
        *("repeatability", "future leak", "batch coupling", "pad sensitivity"),
        *("holes", "decode vs prefill", "split vs whole"),
    ]
    exact = [row.value for row in report.rows if row.passed and row.bound == 0.0]
    assert len(exact) >= 12 and set(exact) == {0.0}
    # all dtypes between input and logits are float64: else a norm in float32 shows here
    close = [row.value for row in report.rows if row.passed and row.bound == 1e-10]
    assert len(close) >= 8 and max(close) < 1e-13
    # the window of Qwen2 counts columns, with and without tokens
    lacking = "holes, packed documents" if make is make_qwen2 else "packed documents"
    assert report.verdict == f"all 0 (not applicable: {lacking})"


@pytest.mark.parametrize(
    ("leak", "check"), [(next_token, "future leak"), (batch_mean, "batch coupling")]
)
def test_finds_the_planted_leak_and_its_module(leak, check):
    model = make_llama()
    model.model.layers[1].mlp = Planted(model.model.layers[1].mlp, leak)
    report = audit(model)
    if check == "batch coupling":
        assert report.failed == ("batch coupling",)
    else:
        # a model that sees the next token can also see padding on the right, and cannot decode
        assert report.failed[0] == "future leak"
        assert "batch coupling" not in report.failed and "repeatability" not in report.failed
    found = [row for row in report.rows if row.check == check and row.passed is False]
    assert {row.dtype for row in found} == {"float64", "float32"}
    assert all("in model.layers.1.mlp" in row.where for row in found)


def test_names_the_position_that_saw_the_future():
    model = make_llama()
    model.model.layers[0].mlp = Planted(model.model.layers[0].mlp, next_token)
    row = next(row for row in audit(model, seq_len=12).rows if row.check == "future leak")
    assert row.passed is False and row.where == "row 0, position 0, in model.layers.0.mlp"


def test_a_zero_gate_would_hide_the_leak_without_noise():
    model = make_llama()
    model.model.layers[1].mlp = Planted(model.model.layers[1].mlp, batch_mean)
    assert audit(model, noise=1e-300, seq_len=12).passed
    assert not audit(model, seq_len=12).passed


@pytest.mark.parametrize(
    ("model_class", "checks"),
    [
        (ReadsPadding, ("pad sensitivity", "holes")),
        (ForgetsOldestKey, ("decode vs prefill",)),
        (LosesStateAtSplit, ("split vs whole",)),
    ],
)
def test_finds_exactly_the_planted_fault(model_class, checks):
    report = audit(make_llama(model_class))
    assert report.failed == checks
    row = next(row for row in report.rows if row.passed is False)
    assert row.dtype == "float64" and "position" in row.where and row.value > row.bound


def test_finds_a_coupling_that_only_the_own_dtype_has():
    model = make_llama()
    model.model.layers[0].mlp = Planted(model.model.layers[0].mlp, batch_scale_when_low)
    report = audit(model.to(torch.bfloat16))
    found = [row for row in report.rows if row.passed is False and row.check == "batch coupling"]
    assert found and {row.dtype for row in found} == {"bfloat16"}


def test_finds_randomness_in_evaluation():
    model = make_llama()
    model.model.norm = nn.Sequential(model.model.norm, DrawsNoise())
    assert audit(model).failed[0] == "repeatability"


def test_finds_the_state_that_mamba_loses_at_a_split():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    report = audit(MambaForCausalLM(MambaConfig(**sizes)), seq_len=16)
    assert "split vs whole" in report.failed and "future leak" not in report.failed


def test_says_what_does_not_apply():
    report = audit(LacksAll())
    assert report.passed
    lacking = {row.check: row.where for row in report.rows if row.passed is None}
    assert lacking == {
        "batch coupling": "forward takes no attention_mask",
        "pad sensitivity": "forward takes no attention_mask",
        "holes": "forward takes no attention_mask",
        "decode vs prefill": "forward takes no cache",
        "split vs whole": "forward takes no cache",
        "packed documents": "forward takes no cu_seqlens",
    }
    assert "not applicable: batch coupling, pad sensitivity" in report.verdict


def test_a_model_that_raises_has_failed_and_one_that_lacks_has_not():
    class Raises(LlamaForCausalLM):
        error = RuntimeError

        def forward(self, input_ids, attention_mask=None, past_key_values=None, **inputs):
            if past_key_values is not None:
                raise self.error("no second piece")
            return super().forward(input_ids, attention_mask, **inputs)

    report = audit(make_llama(Raises))
    assert report.failed == ("decode vs prefill", "split vs whole")
    assert any(row.where == "RuntimeError: no second piece" for row in report.rows)
    json.dumps(report.to_dict(), allow_nan=False)
    Raises.error = NotImplementedError
    assert audit(make_llama(Raises)).passed


def test_leaves_the_model_as_it_was():
    model = make_llama().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    audit(model)
    assert model.training and torch.get_default_dtype() == torch.float32
    assert torch.equal(state, torch.random.get_rng_state())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module._forward_hooks for module in model.modules())


def test_same_seed_same_report():
    model = make_llama()
    one, other = (audit(model, seed=3, seq_len=12).to_dict() for _ in range(2))
    assert one == other


def test_notes_a_window_that_was_not_crossed():
    (note,) = audit(make_llama(sliding_window=30), seq_len=16).notes
    assert note.startswith("16 tokens do not cross the model's window or segment of 30; seq_len=73")


def test_notes_that_a_tiny_difference_is_rounding():
    class AddsInAnotherOrder(nn.Module):
        def forward(self, hidden):
            # a sum over the batch in float64 that is off by its last bit
            return hidden + 1e-17 * hidden.mean(0, keepdim=True)

    model = make_llama()
    model.lm_head = nn.Sequential(model.lm_head, AddsInAnotherOrder())
    report = audit(model, seq_len=16)
    assert report.failed == ("batch coupling",)
    assert "in float64 are rounding" in report.notes[0]


def test_experts_are_exact_where_each_token_is_a_product_of_its_own():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    with torch.no_grad():  # so that tokens go to different experts
        model.model.layers[0].mlp.gate.weight.normal_()
    report = audit(model, seq_len=24)
    float64 = [row for row in report.rows if row.dtype == "float64"]
    assert all(row.passed for row in float64 if row.value is not None)
    assert [note.split(",")[0] for note in report.notes] == [
        "experts run as batched_mm in float64 and as grouped_mm in float32"
    ]
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("batched_mm")
    attach_memory(model, ChapterMemoryConfig(num_memory_tokens=16, num_chapters=4))
    report = audit(model, seq_len=24)
    assert report.verdict.startswith("all 0") and not report.notes


def test_report_prints_and_converts():
    rows = (
        AuditRow(check="a", case="x", dtype="float64", value=0.0, bound=0.0),
        AuditRow(check="b", case="y", dtype="float64", value=float("inf"), bound=0.0, where="here"),
        AuditRow(check="c", case="z", dtype="float64", value=None, bound=0.0, where="no cache"),
    )
    report = AuditReport(model="M", rows=rows, notes=("short",))
    assert report.verdict == "failed: b" and not report.passed
    console = Console(file=io.StringIO(), width=120)
    report.print(console)
    text = console.file.getvalue()
    assert all(word in text for word in ("FAIL", "not applicable", "no cache", "note: short"))
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["passed"] for row in values["rows"]] == [True, False, None]
    assert AuditRow(check="", case="", dtype="", value=float("nan"), bound=1.0).passed is False


def test_rejects_what_it_cannot_audit():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        audit("llama")
    with pytest.raises(TypeError, match=r"model must have config.vocab_size, got Linear"):
        audit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"seq_len must be between 12 and 64, got 65"):
        audit(make_llama(), seq_len=65)
    with pytest.raises(ValueError, match=r"noise must be positive, got 0"):
        audit(make_llama(), noise=0)
