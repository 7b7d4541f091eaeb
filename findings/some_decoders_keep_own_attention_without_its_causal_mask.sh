#!/usr/bin/env bash
# Bloom and CodeGen, built with the name of a registered attention function, never call it: they
# keep their own attention, which then gets no causal mask, so logits depend on later tokens. There
# is no error. GPT-Neo refuses the name; GPT-2, which calls the function, is causal with the same one.
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
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

transformers.logging.set_verbosity_error()
calls = []


def counted(*args, **kwargs):
    """PyTorch's attention as transformers calls it, and a note that it was called."""
    calls.append(1)
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register("counted", counted)
KINDS = {
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "codegen": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, n_ctx=64),
    "gpt_neo": dict(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        max_position_embeddings=64,
    ),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip
ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))
other = torch.cat([ids[:, :6], (ids[:, 6:] + 1) % 64], 1)


@torch.no_grad()
def leak(kind, attention):
    """By how much the first six logits differ where the last six tokens do, or the error."""
    config = AutoConfig.for_model(
        kind, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **KINDS[kind]
    )
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:
        return type(error).__name__
    model = model.double().eval()
    return (model(ids).logits[:, :6] - model(other).logits[:, :6]).abs().max().item()


print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {}
for kind in KINDS:
    calls.clear()
    found, eager = leak(kind, "counted"), leak(kind, "eager")
    print(f"{kind}: {found} with the registered function, {len(calls)} calls of it; eager {eager}")
    assert eager == 0.0
    seen[kind] = (found if isinstance(found, str) else found > 1e-6, len(calls) > 0)
same = seen == {
    "bloom": (True, False), "codegen": (True, False),
    "gpt_neo": ("KeyError", False), "gpt2": (False, True),
}  # fmt: skip
print("as found" if same else f"changed: {seen}")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
