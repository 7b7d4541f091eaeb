#!/usr/bin/env bash
# Under CPU autocast a linear layer gives bfloat16, and an RMSNorm behind it keeps its float32 weight: it
# warns that its fused implementation cannot be used. A LayerNorm takes the same two dtypes without one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import sys
import warnings

import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(3, 8)
print("torch", torch.__version__)
found = {}
for kind in (nn.RMSNorm, nn.LayerNorm):
    model = nn.Sequential(nn.Linear(8, 8), kind(8))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
    messages = [str(one.message).split(".")[0] for one in caught]
    found[kind.__name__] = any("Mismatch dtype" in message for message in messages)
    print(kind.__name__, out.dtype, messages)
same = found == {"RMSNorm": True, "LayerNorm": False}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
