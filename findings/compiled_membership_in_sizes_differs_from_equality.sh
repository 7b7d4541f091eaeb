#!/usr/bin/env bash
# In a compiled function, a size that equals a dynamic size is not found in a tuple of expressions of
# that size, although `==` with it holds: eager and compiled code take different branches.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/show.py" <<'EOF'
import sys

import torch


def is_member(a, b):
    n = a.shape[1]
    return a.sum() * 0 + float(b.shape[1] in (n, 0 + n))


def is_equal(a, b):
    n = a.shape[1]
    return a.sum() * 0 + float(b.shape[1] == n)


print("torch", torch.__version__)
found = {}
for function in (is_member, is_equal):
    torch._dynamo.reset()
    a, b = torch.ones(2, 5), torch.ones(2, 5)
    torch._dynamo.maybe_mark_dynamic(a, 1)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    found[function.__name__] = float(function(a, b)), float(compiled(a, b))
    print(function.__name__, "eager and compiled:", found[function.__name__])
same = found == {"is_member": (1.0, 0.0), "is_equal": (1.0, 1.0)}
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
