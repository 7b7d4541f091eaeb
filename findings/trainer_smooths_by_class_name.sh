#!/usr/bin/env bash
# The Trainer shifts labels for label smoothing only if the model's class name is in a table:
# a subclass with a name of its own trains on the token that it is given, not on the next one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0
cat > "$folder/show.py" <<'EOF'
import sys
import tempfile

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother


class MyLlama(LlamaForCausalLM):
    """The same model under another name."""


def smoothed_loss(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2,
    )
    model = kind(config).train()
    ids = torch.arange(24).view(2, 12)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir="."), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()}).item()
    outputs = model(input_ids=ids)
    smoother = LabelSmoother(0.1)
    return loss, smoother(outputs, ids, shift_labels=True).item(), smoother(outputs, ids).item()


print("transformers", transformers.__version__)
seen = []
for kind in (LlamaForCausalLM, MyLlama):
    loss, shifted, unshifted = smoothed_loss(kind)
    print(f"{kind.__name__}: loss {loss:.4f}, with shifted labels {shifted:.4f}, without {unshifted:.4f}")
    seen.append((abs(loss - shifted) < 1e-5, abs(loss - unshifted) < 1e-5))
same = seen == [(True, False), (False, True)]
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
