#!/usr/bin/env bash
# GPT-Neo that generates with cache_implementation static gives other logits than with its default
# cache or with none, and no warning, where it has local layers: their window is counted from the
# last key that the cache has room for. Only the last token, where the cache is full, is right.
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
def by_step(kind, cache, **options):
    """Differences of generated logits to one pass over the same tokens."""
    model = model_of(kind, **options)
    out = model.generate(
        ids, max_new_tokens=8, do_sample=False, cache_implementation=cache, suppress_tokens=[0, 2],
        return_dict_in_generate=True, output_logits=True,
    )
    whole = model(out.sequences[:, :-1], use_cache=False).logits[:, 19:]
    return (torch.stack(out.logits, 1) - whole).abs().amax((0, 2)).tolist()


neo = dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=8)
print("torch", torch.__version__, "transformers", transformers.__version__)
seen = []
for kind, options in (
    ("gpt_neo", neo),
    ("gpt_neo", neo | dict(attention_types=[[["global"], 2]])),
    ("gptj", dict(n_embd=32, n_head=4, n_layer=2, rotary_dim=4)),
):
    for cache in ("dynamic", "static"):
        found = by_step(kind, cache, **options)
        print(kind, options.get("attention_types", ""), cache, [f"{x:.0e}" for x in found])
        seen.append([x < 1e-3 for x in found])
right, wrong = [True] * 8, [False] * 7 + [True]
same = seen == [right, wrong, right, right, right, right]
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
