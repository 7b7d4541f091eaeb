#!/usr/bin/env bash
# Position ids that start again mark packed documents for most decoders of transformers, which then
# keep the documents apart. GPT-OSS, whose layers are attention too, does not look, and neither do
# the recurrent layers of Qwen3-Next and Bamba: there a document reads the one before it.
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


@torch.no_grad()
def mixing(kind, **options):
    """Largest difference between two documents in one row and the same in two rows."""
    model = model_of(kind, **options)
    apart = model(ids, use_cache=False).logits
    positions = torch.arange(16).repeat(2)[None]
    packed = model(ids.view(1, 32), position_ids=positions, use_cache=False).logits
    return (packed.view(apart.shape) - apart).abs().max().item()


experts = dict(num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
kinds = {
    "qwen3": dict(head_dim=8),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "qwen3_next": experts | dict(
        num_experts=4, shared_expert_intermediate_size=16, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bamba": dict(
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2,
        mamba_chunk_size=8, attn_layer_indices=[1],
    ),
}
print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {kind: mixing(kind, **options) for kind, options in kinds.items()}
for kind, difference in seen.items():
    print(f"{kind}: packed against apart {difference:.1e}")
mixed = {kind for kind, difference in seen.items() if difference > 1e-3}
same = mixed == {"gpt_oss", "qwen3_next", "bamba"}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
