#!/usr/bin/env bash
# torch.func.jvp through a custom operator whose backward is registered gives a tangent of zeros and
# no error, with and without required gradients; forward_ad on its own gives none, or raises where
# a gradient is required. An autograd.Function without a forward-mode rule raises in the same place.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import sys
import warnings

warnings.simplefilter("ignore")
import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.library.custom_op("shown::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.register_autograd(lambda ctx, g: 2 * g)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def attempt(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return type(error).__name__


def dual(x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(twice(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


x = torch.randn(3)
needs = x.clone().requires_grad_()
print("torch", torch.__version__)
found = {
    "jvp": attempt(lambda: torch.func.jvp(twice, (x,), (torch.ones_like(x),))[1]),
    "jvp, gradient required": attempt(lambda: torch.func.jvp(twice, (needs,), (torch.ones(3),))[1]),
    "forward_ad": attempt(dual, x),
    "forward_ad, gradient required": attempt(dual, needs),
    "jvp of the same autograd.Function": attempt(
        lambda: torch.func.jvp(Twice.apply, (x,), (torch.ones_like(x),))[1]
    ),
}
for name, result in found.items():
    print(f"{name}: {result.tolist() if isinstance(result, Tensor) else result}; right is [2, 2, 2]")
kinds = ["zeros" if isinstance(v, Tensor) and not v.any() else str(v) for v in found.values()]
same = kinds == ["zeros", "zeros", "None", "NotImplementedError", "NotImplementedError"]
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
