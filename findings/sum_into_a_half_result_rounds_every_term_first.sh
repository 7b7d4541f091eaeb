#!/usr/bin/env bash
# A sum of float32 values into a half-precision result rounds every term to half precision before it
# adds them, not the sum once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import sys

import torch

torch.manual_seed(0)
terms = torch.rand(64, 1000) + 0.0001
out = torch.empty(1000, dtype=torch.float16)
torch.sum(terms, 0, out=out)
once, early = terms.sum(0).half(), terms.half().sum(0)
print("torch", torch.__version__)
print("of 1000 sums, those that differ from the sum rounded once:", int((out != once).sum()))
print("and from sums of terms that were rounded first:", int((out != early).sum()))
same = torch.equal(out, early) and not torch.equal(out, once)
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
