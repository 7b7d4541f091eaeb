#!/usr/bin/env bash
# Triton's interpreter runs a loop whose variable begins as an int32 and becomes a float32; the
# compiler refuses the same kernel. A kernel that passes in the interpreter need not compile.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.6.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import os
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def halve_sum(x_ptr, out_ptr, n):
    total = 0  # an int32
    for i in range(n):
        total = total * 0.5 + tl.load(x_ptr + i)
    tl.store(out_ptr, total)


if os.environ.get("TRITON_INTERPRET") == "1":
    print("torch", torch.__version__, "triton", triton.__version__)
    x, out = torch.ones(4), torch.zeros(1)
    halve_sum[(1,)](x, out, 4)
    print("interpreted:", out.item())
    sys.exit(out.item() != 1.875)
source = triton.compiler.ASTSource(
    fn=halve_sum, signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, constexprs={}
)
try:
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
except triton.compiler.errors.CompilationError as error:
    text = str(error)
    print("compiled:", text.strip().splitlines()[-1])
    same = "total" in text and "int32" in text and "fp32" in text
    print("as found" if same else "changed")
    sys.exit(not same)
print("compiled: accepted; changed")
sys.exit(1)
EOF
cd "$folder"
TRITON_INTERPRET=1 "$folder/venv/bin/python" show.py
"$folder/venv/bin/python" show.py
