#!/usr/bin/env bash
# A TransformerEncoderLayer with GELU's tanh approximation computes the exact GELU once it is
# evaluated without gradients: training and evaluation are two functions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import sys

import torch
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation=nn.GELU("tanh"), batch_first=True)
layer.eval()
with torch.no_grad():
    for name in ("linear1", "linear2"):
        getattr(layer, name).weight.mul_(4)
x = torch.randn(2, 5, 16)
with_gradients = layer(x).detach()
with torch.no_grad():
    without = layer(x)
    torch.backends.mha.set_fastpath_enabled(False)
    slow = layer(x)
    layer.activation = nn.GELU()
    exact = layer(x)
print("torch", torch.__version__)
far, near = (without - with_gradients).abs().max().item(), (without - exact).abs().max().item()
print(f"without gradients against with: {far:.1e}")
print(f"without gradients against the exact GELU: {near:.1e}")
print("with the fast path off, without gradients against with:", (slow - with_gradients).abs().max().item())
same = far > 1e-4 > 1e-5 > near
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
