"""``memattn_segmented`` in models of several modalities, and in those that would ignore it."""

import copy
import functools

import pytest
import torch
import transformers
from tiny_configs import tiny_config

import memattn.models  # registers it

NAME = "memattn_segmented"
SIZES = dict(vocab_size=99, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
GPT = dict(vocab_size=99, n_embd=32, n_layer=1, n_head=4)
# they choose their attention themselves, or attend to everything where they get no mask
OTHERS = {
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4, n_positions=64),
    "codegen": lambda: transformers.CodeGenConfig(**GPT, rotary_dim=4, n_positions=64),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "bloom": lambda: transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=4),
    # they choose keys by their values, or see compressed ones beside those of a window
    **{name: functools.partial(tiny_config, name) for name in ("deepseek_v32", "deepseek_v4")},
    "doge": lambda: transformers.DogeConfig(**SIZES, intermediate_size=40),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["local"], 1]]
    ),
}
assert memattn.models


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_ignore_the_choice_are_refused(name):
    make = transformers.AutoModelForCausalLM.from_config
    model = make(OTHERS[name]())
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"model must be .*{type(model).__name__}"):
        model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == before
    with pytest.raises(NotImplementedError, match="whose attention transformers can choose"):
        make(OTHERS[name](), attn_implementation=NAME)
    config = OTHERS[name]()
    config.memattn_window_size = 3
    with pytest.raises(NotImplementedError, match="whose attention transformers can choose"):
        make(config)


def test_text_that_ignores_the_choice_beside_pictures_that_take_it_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("git"))
    assert model._can_set_attn_implementation()
    with pytest.raises(NotImplementedError, match="got GitForCausalLM with GitSelfAttention"):
        model.set_attn_implementation(NAME)


def make_pictures(where):
    """A model of pictures and text with a window, which is set in one of its configurations."""
    sizes = dict(intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES, intermediate_size=40),
        image_token_index=98,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    whole = copy.deepcopy(model)
    model.set_attn_implementation({"text_config": NAME})
    (model.config if where == "whole" else model.config.text_config).memattn_window_size = 3
    return model, whole


@torch.no_grad()
@pytest.mark.parametrize("where", ["whole", "text"])
def test_a_text_model_among_others_has_its_window_and_keeps_it(where, tmp_path):
    model, whole = make_pictures(where)
    assert model.config.memattn_window_size == model.config.text_config.memattn_window_size == 3
    ids = torch.randint(90, (2, 17), generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(17)[:, None], torch.arange(17)
    mask = torch.where((j <= i) & (j > i - 3), 0.0, -1e9).expand(2, 1, 17, 17)
    expected = whole(ids, attention_mask=mask).logits
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, whole(ids).logits, atol=1e-3)
    picture = {"pixel_values": torch.randn(1, 3, 8, 8)}
    words = torch.tensor([[98] * 4 + [5, 6, 7]])
    shown = model(words, **picture).logits  # the part that sees is as it was
    model.save_pretrained(tmp_path)
    for _ in range(2):
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert loaded.config.vision_config._attn_implementation != NAME
        torch.testing.assert_close(loaded(ids).logits, logits)
        torch.testing.assert_close(loaded(words, **picture).logits, shown)
        loaded.save_pretrained(tmp_path)
    loaded.config.memattn_window_size = None
    assert "attn_implementation" not in loaded.config.to_dict()
    torch.testing.assert_close(loaded(ids).logits, whole(ids).logits)
