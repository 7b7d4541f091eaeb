#!/usr/bin/env bash
# While a new model gets its weights, `_init_weights` is not called for a module that only holds other
# modules, so that a parent's rule for one of its children never takes effect.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.23.0
cat > "$folder/show.py" <<'EOF'
import sys

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

seen = []


class Pair(nn.Module):
    """Holds two layers, and no parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class Config(PreTrainedConfig):
    model_type = "shown"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.pair = Pair()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        seen.append(type(module).__name__)
        if isinstance(module, Pair):
            module.second.weight.zero_()


model = Model(Config())
print("transformers", transformers.__version__)
print("_init_weights was called for", sorted(set(seen)))
print("the parent's rule for its child took effect:", not model.pair.second.weight.any())
same = "Pair" not in seen and bool(model.pair.second.weight.any())
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
