"""memattn_segmented inside transformers' own Qwen2, Qwen3 and Llama."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_attention_factories import CONFIGS, EXACT, GREEDY, SIZES, make_model, make_padded
from model_factories import enable_checkpointing, make_tokens, pad_left, perturb
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    Qwen2Config,
    VaultGemmaConfig,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def dense_mask(mask, segment_len, window_size, dtype):
    """The additive mask ``[B, 1, T, T]`` of the same definition, for eager attention."""
    start = mask.argmax(1)[:, None, None]
    i, j = torch.arange(mask.shape[1])[:, None], torch.arange(mask.shape[1])
    near = torch.zeros(len(mask), *[mask.shape[1]] * 2, dtype=torch.bool)
    if segment_len is not None:
        near |= (i - start) // segment_len == (j - start) // segment_len
    if window_size is not None:
        near |= j > i - window_size
    allowed = near & (j <= i) & (mask[:, None, :] == 1)
    return torch.where(allowed, 0.0, -1e9)[:, None].to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("side", [None, "left", "right", "left and right"])
def test_logits_equal_those_of_sdpa(name, side):
    tokens, mask = make_padded(side or "")
    inputs = dict(input_ids=tokens) | (dict(attention_mask=mask) if side else {})
    actual = make_model(name)(**inputs).logits[mask == 1]
    expected = make_model(name, implementation="sdpa")(**inputs).logits[mask == 1]
    torch.testing.assert_close(actual, expected, **EXACT)
    # float32: rounding, as between two implementations of transformers' own
    results = [
        make_model(name, torch.float32, implementation)(**inputs).logits[mask == 1].double()
        for implementation in ("memattn_segmented", "sdpa", "eager")
    ]
    error, *others = ((result - expected).abs().max() for result in results)
    assert error <= 2 * max(others) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("side", ["", "left and right"])
def test_first_tokens(side):
    tokens, mask = make_padded(side)
    fields = dict(memattn_segment_len=6, memattn_window_size=3, memattn_num_sink_tokens=2)
    model = make_model("llama", **fields)
    actual = model(tokens, attention_mask=mask).logits[mask == 1]
    start = mask.argmax(1)[:, None]
    first = (torch.arange(mask.shape[1]) < start + 2) & (mask == 1)
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril() == 1
    dense = dense_mask(mask, 6, 3, torch.float64)
    dense = dense.masked_fill((first[:, None] & causal)[:, None], 0.0)
    expected = make_model("llama", implementation="sdpa")(tokens, attention_mask=dense).logits
    torch.testing.assert_close(actual, expected[mask == 1], **EXACT)
    if not side:
        steps, cache = [], None
        for token in tokens.split(1, 1):
            found = model(token, past_key_values=cache)
            steps.append(found.logits)
            cache = found.past_key_values
        torch.testing.assert_close(torch.cat(steps, 1)[mask == 1], actual, **EXACT)


CAPPED = dict(head_dim=8, query_pre_attn_scalar=2, attn_logit_softcapping=1.5)
OWN = {  # logits of sinks and windows; chunks and layers without; capped scores, also with windows
    "gpt-oss": lambda: GptOssConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=8, sliding_window=5
    ),
    "llama-4": lambda: Llama4TextConfig(
        **SIZES,
        head_dim=8,
        attention_chunk_size=6,
        num_local_experts=2,
        intermediate_size_mlp=40,
        no_rope_layers=[1, 0],
    ),
    "gemma-2": lambda: Gemma2Config(**SIZES, **CAPPED, sliding_window=5),
    "vaultgemma": lambda: VaultGemmaConfig(**SIZES, **CAPPED, sliding_window=5),
}


@pytest.fixture
def wide_softmax(monkeypatch):
    """Eager attention of some models rounds float64 to float32 in its softmax; not here."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("own", OWN)
def test_what_models_have_of_their_own(own, side, wide_softmax):
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(OWN[own](), attn_implementation="eager")
    eager.set_experts_implementation("eager")  # others have no float64
    eager = perturb(eager.double().eval())
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("memattn_segmented")
    tokens, mask = make_padded(side)
    expected, actual = (m(tokens, attention_mask=mask).logits[mask == 1] for m in (eager, ours))
    torch.testing.assert_close(actual, expected, **EXACT)
    for logits in (expected, actual):
        logits.square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, **EXACT, msg=name)
            assert "sinks" not in name or a.grad.any()
    prompts = dict(input_ids=tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(ours.generate(**prompts), eager.generate(**prompts))
    if "gemma" in own:
        for layer in ours.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = ours(tokens, attention_mask=mask).logits[mask == 1]
        assert (uncapped - actual).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("side", ["", "left", "left and right"])
@pytest.mark.parametrize("spans", [(7, None), (None, 4), (7, 4)], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_segments_and_windows(name, spans, side):
    tokens, mask = make_padded(side)
    fields = dict(memattn_segment_len=spans[0], memattn_window_size=spans[1])
    actual = make_model(name, **fields)(tokens, attention_mask=mask).logits[mask == 1]
    dense = dense_mask(mask, *spans, torch.float64)
    expected = make_model(name, implementation="sdpa")(tokens, attention_mask=dense).logits
    torch.testing.assert_close(actual, expected[mask == 1], **EXACT)
    whole = make_model(name)(tokens, attention_mask=mask).logits[mask == 1]
    assert (actual - whole).abs().max() > 1e-3


@torch.no_grad()
def test_holes_are_absent():
    """As PyTorch's attention has it; segments and windows count tokens, with a cache too."""
    tokens, mask = make_tokens(B=3), make_padded("left right")[1]
    mask[0, 3:7], mask[1, 8::3], mask[2, 2] = 0, 0, 0
    positions, there = mask.cumsum(1) - 1, mask == 1
    inputs = dict(attention_mask=mask, position_ids=positions)
    expected = make_model("llama", implementation="sdpa")(tokens, **inputs).logits
    actual = make_model("llama")(tokens, **inputs).logits
    torch.testing.assert_close(actual[there], expected[there], **EXACT)
    for fields in (dict(memattn_segment_len=4, memattn_window_size=3), dict(memattn_window_size=6)):
        model = make_model("llama", **fields)
        whole = model(tokens, **inputs).logits
        for row, ids, kept in zip(whole, tokens, there, strict=True):
            torch.testing.assert_close(row[kept], model(ids[kept][None]).logits[0], **EXACT)
        cache, pieces = None, []
        for a, b in ((0, 9), (9, 10), (10, 16), (16, 17), (17, 23)):
            piece = dict(attention_mask=mask[:, :b], position_ids=positions[:, a:b])
            out = model(tokens[:, a:b], past_key_values=cache, use_cache=True, **piece)
            cache = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1)[there], whole[there], **EXACT)


@pytest.mark.parametrize("first", [0, 1])
def test_windows_of_the_model_itself_count_columns_beside_holes(first, monkeypatch):
    """As in PyTorch's attention, gradients too, and with a cache that drops keys."""
    sliding = dict(use_sliding_window=True, sliding_window=5, max_window_layers=first)
    monkeypatch.setitem(CONFIGS, "changed", lambda: Qwen2Config(**SIZES, **sliding))
    tokens, mask = make_tokens(B=3), make_padded("left right")[1]
    mask[0, 3:7], mask[1, 8::3], mask[2, 2] = 0, 0, 0
    there = mask == 1
    inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    found = []
    for implementation in ("sdpa", "memattn_segmented"):
        model = make_model("changed", implementation=implementation)
        logits = model(tokens, **inputs).logits
        logits[there].square().sum().backward()
        found.append((logits[there], [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], **EXACT)
    unseen = model(tokens.where(there, 3), **inputs).logits  # what stands in holes
    torch.testing.assert_close(unseen[there], found[0][0], **EXACT)
    cache, pieces = None, []
    with torch.no_grad():
        for a, b in ((0, 9), (9, 10), (10, 16), (16, 17), (17, 23)):
            piece = dict(attention_mask=mask[:, :b], position_ids=inputs["position_ids"][:, a:b])
            out = model(tokens[:, a:b], past_key_values=cache, use_cache=True, **piece)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[there], found[1][0], **EXACT)


@torch.no_grad()
def test_long_segments_change_nothing(name):
    tokens, mask = make_padded("left")
    expected = make_model(name)(tokens, attention_mask=mask).logits
    for fields in (dict(memattn_segment_len=23), dict(memattn_window_size=23)):
        actual = make_model(name, **fields)(tokens, attention_mask=mask).logits
        torch.testing.assert_close(actual, expected, **EXACT)


def test_fields_are_saved_with_the_model(tmp_path):
    model = make_model("llama", torch.float32, memattn_segment_len=7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="memattn_segmented")
    tokens = make_tokens()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    loaded.config.memattn_segment_len = None
    assert not torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("kind", ["sliding", "mixed", "field"])
def test_windows_decode_in_chunks_as_in_one_pass(kind, window, side, chunk):
    """The sliding window of every layer, of one of two, and that of the field."""
    if kind == "field":
        model = make_model("qwen2", memattn_window_size=window)
    else:
        first = 0 if kind == "sliding" else 1
        sliding = dict(use_sliding_window=True, sliding_window=window, max_window_layers=first)
        CONFIGS["changed"] = lambda: Qwen2Config(**SIZES, **sliding)
        model = make_model("changed")
        del CONFIGS["changed"]
    tokens, mask = make_padded(side)
    whole = model(tokens, attention_mask=mask).logits
    cache, logits = None, []
    for part in tokens.split([7] + [chunk] * ((23 - 7) // chunk) + [(23 - 7) % chunk], 1):
        if part.shape[1]:
            seen = sum(done.shape[1] for done in logits) + part.shape[1]
            inputs = dict(attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
            outputs = model(part, **inputs)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, 1)[mask == 1], whole[mask == 1], **EXACT)
    if kind == "sliding":
        dense = dense_mask(mask, None, window, torch.float64)
        model.set_attn_implementation("sdpa")
        expected = model(tokens, attention_mask=dict(sliding_attention=dense)).logits
        torch.testing.assert_close(whole[mask == 1], expected[mask == 1], **EXACT)


def test_a_switched_model_keeps_its_window_when_it_is_saved(name, tmp_path):
    tokens = make_tokens()
    model = make_model(name, torch.float32)  # the fields are set after the switch
    model.config.memattn_segment_len, model.config.memattn_window_size = 6, 3
    folder = tmp_path / "once"
    model.save_pretrained(folder)
    for again in ("twice", "thrice"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == "memattn_segmented"
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
        folder = tmp_path / again
        loaded.save_pretrained(folder)
    chosen = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert chosen.config._attn_implementation == "sdpa"
    assert not torch.allclose(chosen(tokens).logits, model(tokens).logits, atol=1e-3)
    # without this package the window is not dropped in silence
    code = "import sys; from transformers import AutoModelForCausalLM as A"
    code += "; A.from_pretrained(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode and 'attn_implementation="memattn_segmented"` is not' in result.stderr


def test_a_configuration_without_the_fields_is_as_it_was(tmp_path):
    model = make_model("llama", torch.float32)
    assert not hasattr(model.config, "memattn_segment_len")
    model.config.memattn_window_size = 4
    model.config.memattn_window_size = None
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    given = CONFIGS["llama"]()
    given.memattn_segment_len = 5
    assert copy.deepcopy(given).memattn_segment_len == 5
    assert AutoModelForCausalLM.from_config(given).config._attn_implementation == (
        "memattn_segmented"
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_equals_eager(name, num_beams):
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = GREEDY | dict(attention_mask=mask, num_beams=num_beams)
    # in float64, padding makes eager attention NaN: its softmax is in float32
    model = make_model(name, torch.float32)
    expected = make_model(name, torch.float32, "eager").generate(tokens, **options)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=4, **options), expected)


def test_segmented_generation_equals_uncached(name):
    model = make_model(name, memattn_segment_len=6, memattn_window_size=3)
    tokens, mask = pad_left([make_tokens()[0, :9], make_tokens()[1, :4]], 9)
    options = GREEDY | dict(attention_mask=mask)
    uncached = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), uncached)
    alone = model.generate(tokens[1:, 5:], **GREEDY)
    assert torch.equal(uncached[1:, 5:], alone)


def test_training_step_and_gradient_checkpointing(name):
    tokens, mask = make_padded("left and right")
    labels = tokens.masked_fill(mask == 0, -100)
    results = []
    for implementation, checkpointing in (
        ("sdpa", False),
        ("memattn_segmented", False),
        ("memattn_segmented", True),
    ):
        model = make_model(name, implementation=implementation).train()
        if checkpointing:
            enable_checkpointing(model)
        model(tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for sdpa, ours, again in zip(*results, strict=True):
        torch.testing.assert_close(ours, sdpa, rtol=1e-6, atol=1e-8)
        assert torch.equal(ours, again)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(name):
    model = make_model(name, memattn_segment_len=6)
    lengths = [4, 1, 11, 7]
    tokens = make_tokens(B=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part).logits for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, **EXACT)
    # as collators for flash attention describe the same
    cu_seqlens = torch.tensor([0, 4, 5, 16, 23], dtype=torch.int32)
    flash = model(
        tokens,
        position_ids=positions,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=11,
        max_length_k=11,
        use_cache=False,
    ).logits
    assert torch.equal(flash, packed)
    # two rows, each with documents of its own
    rows = torch.cat([tokens, tokens.flip(1)])
    both = torch.cat([positions, torch.arange(23)[None] % 12])
    lengths = [[4, 1, 11, 7], [12, 11]]
    out = model(rows, position_ids=both, use_cache=False).logits
    for row, ids, own in zip(out, rows, lengths, strict=True):
        alone = torch.cat([model(part).logits for part in ids[None].split(own, 1)], 1)
        torch.testing.assert_close(row[None], alone, **EXACT)


@pytest.mark.usefixtures("new_programs")
@torch.no_grad()
def test_compiles():
    model = make_model("llama", torch.float32, memattn_segment_len=6)
    tokens, mask = make_padded("left")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual = compiled(tokens, attention_mask=mask, use_cache=False).logits[mask == 1]
    expected = model(tokens, attention_mask=mask, use_cache=False).logits[mask == 1]
    torch.testing.assert_close(actual, expected)
