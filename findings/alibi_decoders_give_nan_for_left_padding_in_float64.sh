#!/usr/bin/env bash
# BLOOM and MPT give NaN in float64 for real tokens behind left padding, and the right values in
# float32: a row of padding sees no key, and the sum of its mask and its ALiBi bias differs between
# the two.
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
def by_padding(kind, dtype, **options):
    model = model_of(kind, **options).to(dtype)
    found = model(padded, attention_mask=mask, use_cache=False).logits[:, 5:]
    return (found - model(ids, use_cache=False).logits).abs().max().item()


print("torch", torch.__version__, "transformers", transformers.__version__)
same = True
for kind, options in (
    ("bloom", dict(n_head=4, n_layer=2)),
    ("mpt", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64)),
):
    single, double = (by_padding(kind, dtype, **options) for dtype in (torch.float32, torch.float64))
    print(f"{kind}: with padding against without, float32 {single:.1e}, float64 {double}")
    same &= single < 1e-3 and double != double
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
