#!/usr/bin/env bash
# opcheck reports a failure for a right operator whose first output is an integer and whose second is
# floating: its ahead-of-time test adds up all outputs in the dtype of the first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import sys

import torch
from torch import Tensor


@torch.library.custom_op("shown::largest", mutates_args=())
def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = x.max(-1)
    return indices, values


@largest.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.long), x.new_empty(x.shape[:-1])


def remember(ctx, inputs, output):
    ctx.save_for_backward(output[0])
    ctx.width = inputs[0].shape[-1]
    ctx.mark_non_differentiable(output[0])


def differentiate(ctx, _, d_values):
    (indices,) = ctx.saved_tensors
    return torch.nn.functional.one_hot(indices, ctx.width) * d_values[..., None]


largest.register_autograd(differentiate, setup_context=remember)
x = torch.randn(3, 5, requires_grad=True)
found = torch.library.opcheck(largest, (x,), raise_exception=False)
print("torch", torch.__version__)
for name, result in found.items():
    print(f"{name}: {str(result).splitlines()[0][:120]}")
(d_x,) = torch.autograd.grad(largest(x)[1].sum(), x)
right = torch.equal(d_x.argmax(-1), x.argmax(-1)) and float(d_x.sum()) == 3
print("its gradient is right:", right)
failed = {name for name, result in found.items() if result != "SUCCESS"}
same = right and failed == {"test_aot_dispatch_dynamic"}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
