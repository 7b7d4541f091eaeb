"""What memattn_segmented refuses in models of transformers; the losses that windows cost."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_attention_factories import make_model
from model_factories import make_tokens
from transformers import StaticCache

from memattn.models import hf_attention
from memattn.models.hf_attention import hf_segmented_attention, hf_sequence_bounds

WINDOW_LOSSES = Path(__file__).parent.parent / "examples" / "window_losses.py"


def run_with_dropout():
    make_model("llama", attention_dropout=0.1).train()(make_tokens())


def run_with_static_cache():
    model = make_model("llama", torch.float32)
    model(make_tokens(), past_key_values=StaticCache(model.config, max_cache_len=32))


def run_dense_mask():
    mask, model = torch.ones(2, 1, 4, 4), make_model("llama")
    with pytest.raises(NotImplementedError, match="got torch.float64"):
        model(make_tokens(T=4), attention_mask=mask.double())
    model(make_tokens(T=4), attention_mask=mask.bool())


def call_with_hole(**options):
    states = torch.zeros(1, 2, 3, 8)
    hole = torch.tensor([[1, 0, 1]])
    seen = hf_sequence_bounds(1, 3, 3, attention_mask=hole, **{"local_size": 2, **options})
    with pytest.raises(NotImplementedError, match="have one block .* without a window but with"):
        hf_segmented_attention(torch.nn.Module(), states, states, states, seen)
    capped = dict(softcap=5.0, sliding_window=2)
    hf_segmented_attention(torch.nn.Module(), states, states, states, seen, **capped)


def run_chunks_with_hole():
    kinds = dict(attention_chunk_size=2, layer_types=["chunked_attention"])
    call_with_hole(config=SimpleNamespace(**kinds))


def test_holes_beside_a_window_at_the_largest_head_dimension(monkeypatch):
    states, hole = torch.zeros(1, 2, 3, 256), torch.tensor([[1, 0, 1]])
    seen = hf_sequence_bounds(1, 3, 3, attention_mask=hole, local_size=2)
    inputs = torch.nn.Module(), states, states, states, seen
    assert hf_segmented_attention(*inputs, sliding_window=2)[0].shape == (1, 3, 2, 256)
    monkeypatch.setattr(hf_attention, "resolve_backend", lambda *_: "triton")
    with pytest.raises(NotImplementedError, match="window, at a head dimension of 256 on a GPU"):
        hf_segmented_attention(*inputs, sliding_window=2)


def run_other_bounds():
    bounds = dict(cu_seq_lens_q=torch.tensor([0, 2, 4]).int())
    bounds["cu_seq_lens_k"] = torch.tensor([0, 3, 4]).int()
    make_model("llama")(make_tokens(B=1, T=4), use_cache=False, **bounds)


def run_short_mask():
    model = make_model("llama")
    cache = model(make_tokens(T=4)).past_key_values
    model(make_tokens(T=1), past_key_values=cache, attention_mask=torch.ones(2, 1))


def run_bidirectional():
    make_model("llama", is_causal=False)(make_tokens())


def call(mask=None, **options):
    states = torch.zeros(1, 2, 3, 8)
    hf_segmented_attention(torch.nn.Module(), states, states, states, mask, **options)


def bounds(**options):
    return hf_sequence_bounds(1, 3, 3, **options)


class Chunked:
    attention_chunk_size = 8


@pytest.mark.parametrize(
    "use, error, message",
    [
        (run_with_dropout, NotImplementedError, "attention_dropout must be 0 in training"),
        (run_with_static_cache, NotImplementedError, "past_key_values must be a dynamic cache"),
        (run_dense_mask, NotImplementedError, r"attention_mask must be a padding mask \[B, S\]"),
        (
            call_with_hole,
            NotImplementedError,
            "mask must have one block .* for a layer of capped scores",
        ),
        (run_chunks_with_hole, NotImplementedError, "attention_mask must have one block of ones"),
        (run_other_bounds, ValueError, "cu_seq_lens_k must be cu_seq_lens_q"),
        (run_short_mask, ValueError, r"attention_mask must have shape \[B=2, 5\], got \[2, 1\]"),
        (
            lambda: call(block_indices=torch.zeros(1, 2, 3, 1).long()),
            NotImplementedError,
            "block_indices must be None",
        ),
        (run_bidirectional, NotImplementedError, "is_causal must be True"),
        (
            lambda: make_model("llama", memattn_segment_len=0)(make_tokens()),
            ValueError,
            "config.memattn_segment_len must be at least 1, got 0",
        ),
        (
            lambda: make_model("llama", memattn_window_size=2.5)(make_tokens()),
            TypeError,
            "config.memattn_window_size must be an integer, got float",
        ),
        (lambda: call(position_bias=0.0), NotImplementedError, "position_bias must be None"),
        (lambda: call(softcap=0.0), ValueError, "softcap must be positive and finite, got 0.0"),
        (lambda: call(is_causal=False), NotImplementedError, "is_causal must be True"),
        (lambda: bounds(use_vmap=True), NotImplementedError, "mask_function must be causal"),
        (
            lambda: bounds(config=Chunked()),
            NotImplementedError,
            "config.attention_chunk_size must be None .* set memattn_segment_len instead",
        ),
        (
            lambda: call(
                mask=bounds(
                    mask_function=lambda b, h, q, kv: (kv <= q) | (b >= 0),
                    allow_is_causal_skip=False,
                )
            ),  # fmt: skip
            NotImplementedError,
            "mask_function must be causal, without blocks that see ahead",
        ),
    ],
)
def test_unsupported_uses_are_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_losses_by_window():
    loss = runpy.run_path(str(WINDOW_LOSSES))["second_half_loss"]
    model, pieces = make_model("llama"), make_tokens(B=3, T=20)
    full = loss(model, pieces)
    logits = model(pieces).logits[:, 9:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits.float(), pieces[:, 10:].flatten()).item()
    assert full == pytest.approx(expected)
    assert loss(model, pieces, window=4, sinks=20) == pytest.approx(full)
    assert abs(loss(model, pieces, window=4) - full) > abs(loss(model, pieces, 20) - full)


def test_a_page_without_markers_is_refused_before_anything_is_measured(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    main = runpy.run_path(str(WINDOW_LOSSES))["main"]
    assert main(["none", "--data_dir", "none", "--update", str(page)]) == 2
    assert "update must be a page with" in capsys.readouterr().err
