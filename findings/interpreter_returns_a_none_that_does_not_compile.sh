#!/usr/bin/env bash
# A Triton function that returns None beside a tensor where an option is off, and a caller that does
# not use the None: the interpreter runs it and is right, and the compiler refuses it. A test that
# is green in the interpreter says nothing of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet triton==3.6.0 'numpy<2.4'
cat > "$folder/show.py" <<'EOF'
import os
import subprocess
import sys

BODY = '''
import torch
import triton
import triton.language as tl


@triton.jit
def pair(x, WITH: tl.constexpr):
    if WITH:
        return x * 2, x
    return None, x


@triton.jit
def kernel(out, WITH: tl.constexpr):
    doubled, x = pair(tl.arange(0, 16) * 1.0, WITH)
    if WITH:
        x = doubled
    tl.store(out + tl.arange(0, 16), x)
'''
INTERPRET = BODY + '''
out = torch.zeros(16)
kernel[(1,)](out, WITH=False)
print("right" if out.equal(torch.arange(16.0)) else "wrong")
'''
COMPILE = BODY + '''
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
source = ASTSource(kernel, {"out": "*fp32", "WITH": "constexpr"}, {"WITH": False})
try:
    compile(source, target=GPUTarget("cuda", 90, 32))
    print("compiled")
except Exception as error:
    print("refused:", type(error).__name__)
'''
import triton  # noqa: E402

print("triton", triton.__version__)
found = {}
for name, code, interpret in (("interpreter", INTERPRET, "1"), ("compiler", COMPILE, "0")):
    with open(f"{name}.py", "w") as file:
        file.write(code)
    done = subprocess.run([sys.executable, f"{name}.py"], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": interpret})
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    found[name] = lines[-1] if lines else f"ended with {done.returncode}"
    print(name, "->", found[name])
same = found["interpreter"] == "right" and found["compiler"].startswith("refused")
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
