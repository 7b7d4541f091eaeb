#!/usr/bin/env bash
# A model whose forward has an optional argument with "label" in its name, such as label_smoothing
# beside labels: Trainer takes both for labels, finds one of them missing in every batch, and
# evaluation reports no loss, without a word. Training goes on with a loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0
cat > "$folder/show.py" <<'EOF'
import sys
import tempfile
import warnings

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class WithOption(Plain):
    def forward(self, x, labels=None, label_smoothing=0.0):
        logits = self.layer(x)
        smooth = dict(label_smoothing=label_smoothing)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels, **smooth)
        return {"loss": loss, "logits": logits}


print("torch", torch.__version__, "transformers", transformers.__version__)
rows = [{"x": torch.randn(3), "labels": torch.tensor(i % 2)} for i in range(8)]
reported = {}
for kind in (Plain, WithOption):
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, report_to=[], disable_tqdm=True, use_cpu=True)
        trainer = Trainer(kind(), arguments, train_dataset=rows, eval_dataset=rows)
        reported[kind.__name__] = "eval_loss" in trainer.evaluate()
    print(f"{kind.__name__}: labels by name {trainer.label_names}, eval_loss reported: "
          f"{reported[kind.__name__]}")
same = reported == {"Plain": True, "WithOption": False}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
