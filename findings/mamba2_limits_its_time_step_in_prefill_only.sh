#!/usr/bin/env bash
# Mamba-2 of transformers keeps the time step within time_step_limit where it reads several tokens,
# and not where it decodes one. Zamba2 and Nemotron-H have a lower limit by default, so there
# decoding differs from prefill without any option; Nemotron-H does not read the time_step_limit of
# its configuration.
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
def last_tokens(kind, pieces, **options):
    """Largest difference to one pass, where the last two tokens come in pieces."""
    model = model_of(kind, **options)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :14], use_cache=True)
    name = "past_key_values" if first.get("past_key_values") is not None else "cache_params"
    cache, found = first[name], []
    for piece in ids[:, 14:].split(pieces, 1):
        found.append(model(piece, use_cache=True, **{name: cache}).logits)
    return (torch.cat(found, 1) - whole[:, 14:]).abs().max().item()


@torch.no_grad()
def logits(kind, **options):
    return model_of(kind, **options)(ids, use_cache=False).logits


mamba2 = dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8)
zamba2 = dict(
    num_hidden_layers=3, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1,
    chunk_size=8, layers_block_type=["mamba", "hybrid", "mamba"],
)
nemotron = dict(
    hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8,
    n_groups=1, chunk_size=8, head_dim=8,
)
print("torch", torch.__version__, "transformers", transformers.__version__)
seen = []
for name, kind, options in (
    ("Mamba-2, no limit", "mamba2", mamba2),
    ("Mamba-2, time_step_limit (0.2, 0.3)", "mamba2", mamba2 | dict(time_step_limit=(0.2, 0.3))),
    ("Zamba2", "zamba2", zamba2),
    ("Nemotron-H", "nemotron_h", nemotron),
):
    two, one = (last_tokens(kind, pieces, **options) for pieces in (2, 1))
    print(f"{name}: both tokens in one call {two:.1e}, one by one {one:.1e}")
    seen.append((two < 2e-5, one < 2e-5))
limited = logits("nemotron_h", **nemotron, time_step_limit=(0.2, 0.3))
is_read = not torch.equal(limited, logits("nemotron_h", **nemotron))
print("Nemotron-H reads time_step_limit:", is_read)
same = seen == [(True, True), (True, False), (True, False), (True, False)] and not is_read
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
