#!/usr/bin/env bash
# F.linear of a strided input of three axes: its bits depend on whether the weight wants a gradient,
# without a gradient being computed. So a frozen nn.MultiheadAttention that is batch first, which
# transposes its input, differs from the same one before it was frozen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import copy
import sys

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
weight, bias = torch.randn(24, 8), torch.randn(24)
wanted = weight.clone().requires_grad_()
x = torch.randn(2, 6, 8)
print("torch", torch.__version__)
seen = []
for name, given in (("contiguous", x), ("strided", x.transpose(0, 1))):
    with torch.no_grad():
        error = (F.linear(given, weight, bias) - F.linear(given, wanted, bias)).abs().max().item()
    print(f"{name} input: frozen and trainable weight differ by {error:.1e}")
    seen.append(error > 0)
attention = nn.MultiheadAttention(8, 2, batch_first=True)
frozen = copy.deepcopy(attention).requires_grad_(False)
given = x.requires_grad_()
call = lambda module: module(given, given, given, need_weights=False)[0]
error = (call(attention) - call(frozen)).abs().max().item()
print(f"nn.MultiheadAttention, trainable and frozen, differ by {error:.1e}")
same = seen == [False, True] and error > 0
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
