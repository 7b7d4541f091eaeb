#!/usr/bin/env bash
# A mixture of experts of transformers raises in float64, since its default, one grouped product of
# all experts, takes float32 and half precision only; with experts_implementation batched_mm or
# eager the same model runs, so exact comparisons need that option.
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
def run(how):
    model = model_of("mixtral", num_local_experts=4, num_experts_per_tok=2).double()
    if how is not None:
        model.set_experts_implementation(how)
    try:
        return str(model(ids, use_cache=False).logits.dtype)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {how: run(how) for how in (None, "grouped_mm", "batched_mm", "eager")}
for how, result in seen.items():
    print(f"{how or 'default'}: {result}")
raised = [how for how, result in seen.items() if "Float32" in result]
same = raised == [None, "grouped_mm"] and seen["eager"] == seen["batched_mm"] == "torch.float64"
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
