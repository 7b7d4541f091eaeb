#!/usr/bin/env bash
# The sum of a grouped product has no gradient on the CPU: the backward pass refuses the expanded tensor
# that a sum gives back. The mean, and the sum of a multiple, work.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/show.py" <<'EOF'
import sys

import torch
from torch.nn import functional as F

torch.manual_seed(0)
rows = torch.randn(8, 16, requires_grad=True)
weights = torch.randn(2, 16, 32, requires_grad=True)
ends = torch.tensor([4, 8], dtype=torch.int32)


def differentiate(reduce):
    product = F.grouped_mm(rows, weights, offs=ends)
    try:
        reduce(product).backward()
        return "a gradient"
    except RuntimeError as error:
        return f"RuntimeError: {error}"


print("torch", torch.__version__)
seen = {
    "sum": differentiate(lambda product: product.sum()),
    "mean": differentiate(lambda product: product.mean()),
    "sum of a multiple": differentiate(lambda product: (3.0 * product).sum()),
}
for name, result in seen.items():
    print(f"{name}: {result}")
refused = [name for name, result in seen.items() if "strides" in result]
same = refused == ["sum"] and seen["mean"] == seen["sum of a multiple"] == "a gradient"
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
