#!/usr/bin/env bash
# With padding on the left, eager attention of transformers gives NaN in float64, for tokens too, and
# numbers in float32; SDPA gives numbers in both. A padding column sees no key: its mask is the lowest
# float64 everywhere, and the softmax, which is computed in float32, gets minus infinity everywhere.
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
ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def look(attention, dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", attn_implementation=attention, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    padding, tokens = logits[mask == 0].isnan().all(), logits[mask == 1].isnan().any()
    return bool(padding), bool(tokens)


print("torch", torch.__version__, "transformers", transformers.__version__)
found = {}
for attention in ("eager", "sdpa"):
    for dtype in (torch.float32, torch.float64):
        found[attention, dtype] = look(attention, dtype)
        print(attention, dtype, "NaN in (padding, tokens):", found[attention, dtype])
nothing, everything = (False, False), (True, True)
same = found.pop(("eager", torch.float64)) == everything and set(found.values()) == {nothing}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
