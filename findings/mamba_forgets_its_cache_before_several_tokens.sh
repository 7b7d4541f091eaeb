#!/usr/bin/env bash
# Mamba, FalconMamba and Jamba start from an empty state where a call behind a cache has more than
# one token, and say nothing; Mamba-2 goes on from its state. So a prompt read in two pieces, and
# assisted decoding, give other logits than one pass.
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


ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def behind_a_cache(kind, piece, **options):
    """Largest difference to one pass, where tokens 12 ... come in pieces."""
    model = model_of(kind, **options)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :12], use_cache=True)
    name = "past_key_values" if first.get("past_key_values") is not None else "cache_params"
    cache, found = first[name], [first.logits]
    for start in range(12, 20, piece):
        out = model(ids[:, start : start + piece], use_cache=True, **{name: cache})
        found.append(out.logits)
    return (torch.cat(found, 1) - whole).abs().max().item()


kinds = {
    "mamba": dict(state_size=8),
    "falcon_mamba": dict(state_size=8),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        mamba_d_state=8, mamba_dt_rank=4,
    ),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
}
print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {}
for kind, options in kinds.items():
    one, four = (behind_a_cache(kind, piece, **options) for piece in (1, 4))
    print(f"{kind}: token by token {one:.1e}, four tokens a call {four:.1e}")
    seen[kind] = one < 1e-3, four < 1e-3
same = seen.pop("mamba2") == (True, True) and set(seen.values()) == {(True, False)}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
