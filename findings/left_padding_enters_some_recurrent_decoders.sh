#!/usr/bin/env bash
# RecurrentGemma and RWKV let padding on the left into their state, although attention_mask marks
# it: the real tokens get other logits than without padding. Mamba-2 and Qwen3-Next leave it out.
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


ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
mask = (torch.arange(21) >= 5).long().expand(2, 21)


@torch.no_grad()
def by_padding(kind, **options):
    model = model_of(kind, **options)
    found = model(padded, attention_mask=mask, use_cache=False).logits[:, 5:]
    return (found - model(ids, use_cache=False).logits).abs().max().item()


kinds = {
    "recurrent_gemma": dict(
        lru_width=32, attention_window_size=32, block_types=["recurrent", "recurrent"], head_dim=8
    ),
    "rwkv": dict(attention_hidden_size=32),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "qwen3_next": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention"],
    ),
}
print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {kind: by_padding(kind, **options) for kind, options in kinds.items()}
for kind, difference in seen.items():
    print(f"{kind}: with padding against without {difference:.1e}")
leaky = {kind for kind, difference in seen.items() if difference > 1e-3}
same = leaky == {"recurrent_gemma", "rwkv"}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
