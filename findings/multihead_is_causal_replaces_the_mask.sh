#!/usr/bin/env bash
# nn.MultiheadAttention with is_causal=True: the mask that is given counts if weights are asked
# for, and is ignored if they are not.
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
attention = nn.MultiheadAttention(16, 2, batch_first=True)
x = torch.randn(1, 6, 16)
causal = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)  # True is hidden
window = causal | torch.tril(torch.ones(6, 6, dtype=torch.bool), -2)  # two keys a query


def out(mask, weights, is_causal=True):
    options = dict(attn_mask=mask, need_weights=weights, is_causal=is_causal)
    return attention(x, x, x, **options)[0]


print("torch", torch.__version__)
seen = []
for weights in (True, False):
    given = out(window, weights)
    to_window = (given - out(window, weights, False)).abs().max().item()
    to_causal = (given - out(causal, weights, False)).abs().max().item()
    print(f"need_weights={weights}: from the mask {to_window:.1e}, from the causal mask {to_causal:.1e}")
    seen.append((to_window < 1e-5, to_causal < 1e-5))
same = seen == [(True, False), (False, True)]
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
