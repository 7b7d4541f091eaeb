"""Small pretrained decoders of transformers under memattn_segmented, for tests."""

import torch
from model_factories import SIZES, make_tokens, perturb
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

MIXED = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-sliding": lambda: Qwen2Config(**SIZES, **MIXED),  # the second of two layers
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "llama": lambda: LlamaConfig(**SIZES),
}
GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
EXACT = dict(rtol=0, atol=1e-10)


def make_model(name, dtype=torch.float64, implementation="memattn_segmented", **fields):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for field, value in fields.items():
        setattr(config, field, value)
    model = perturb(AutoModelForCausalLM.from_config(config).to(dtype).eval())
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def make_padded(side, T=23):
    tokens = make_tokens(B=3, T=T)
    columns = torch.arange(T)
    begin = torch.tensor([0, 6, 1] if "left" in side else [0, 0, 0])[:, None]
    end = torch.tensor([T, T - 5, T - 1] if "right" in side else [T, T, T])[:, None]
    mask = ((columns >= begin) & (columns < end)).long()
    return tokens * mask, mask
