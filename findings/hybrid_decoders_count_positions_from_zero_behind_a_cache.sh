#!/usr/bin/env bash
# A token that is given to Bamba with its cache but without position_ids gets position 0, as in
# MiniMax where the first layer is a linear attention, whose cache has length 0; other decoders
# count on from what the cache has seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
cat > "$folder/show.py" <<'EOF'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)


def model_of(kind, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | options)).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data += 0.2 * noise if parameter.dim() > 1 else 0.05 * noise
    return model


ids = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def next_token(kind, positions, **options):
    """Difference to one pass of the token behind 13 that a cache holds."""
    model = model_of(kind, **options)
    whole = model(ids, use_cache=False).logits
    cache = model(ids[:, :13], use_cache=True).past_key_values
    out = model(ids[:, 13:], past_key_values=cache, use_cache=True, position_ids=positions)
    return (out.logits[:, 0] - whole[:, 13]).abs().max().item()


mamba = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2,
    mamba_chunk_size=8, attn_layer_indices=[1],
)
experts = dict(num_local_experts=2, num_experts_per_tok=1, block_size=8, head_dim=8)
linear_first = experts | dict(layer_types=["linear_attention", "full_attention"])
linear_last = experts | dict(layer_types=["full_attention", "linear_attention"])
print("torch", torch.__version__, "transformers", transformers.__version__)
seen = []
for name, kind, options in (
    ("Bamba", "bamba", mamba),
    ("MiniMax, linear attention first", "minimax", linear_first),
    ("MiniMax, linear attention last", "minimax", linear_last),
    ("Qwen3", "qwen3", dict(head_dim=8)),
):
    without = next_token(kind, None, **options)
    given = next_token(kind, torch.full((2, 1), 13), **options)
    print(f"{name}: without position_ids {without:.1e}, with them {given:.1e}")
    seen.append((without < 1e-3, given < 1e-3))
same = seen == [(False, True), (False, True), (True, True), (True, True)]
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
