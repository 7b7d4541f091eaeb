#!/usr/bin/env bash
# The Trainer means to refuse models without a loss, but looks the class name up among the keys
# of a table whose keys are model types: it takes LlamaModel, and fails at the first step.
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
from transformers import LlamaConfig, LlamaModel, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, bos_token_id=1, eos_token_id=2,
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(dir="."), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
)
print("transformers", transformers.__version__)
print("LlamaModel among the keys:", "LlamaModel" in MODEL_MAPPING_NAMES)
print("LlamaModel among the values:", "LlamaModel" in MODEL_MAPPING_NAMES.values())
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
made, stage = False, "when it is made"
try:
    trainer = Trainer(model=LlamaModel(config), args=arguments, train_dataset=rows)
    made, stage = True, "at the first step"
    trainer.train()
except ValueError as error:
    print(f"ValueError {stage}:", str(error)[:75])
same = made
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
