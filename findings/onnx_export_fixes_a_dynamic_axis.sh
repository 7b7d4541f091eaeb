#!/usr/bin/env bash
# A module whose loop runs over an axis has one length. With that axis declared dynamic,
# torch.export raises and says so; torch.onnx.export takes torch.export's suggestion to fix the axis,
# without a warning, and writes a program for the length of the example only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxscript==0.7.2
cat > "$folder/show.py" <<'EOF'
import contextlib
import io
import sys
import warnings

import onnxscript
import torch


class Decayed(torch.nn.Module):
    def forward(self, x):
        total = torch.zeros_like(x[:, 0])
        for i in range(int(x.shape[1])):
            total = total * 0.5 + x[:, i]
        return total


example = (torch.randn(2, 5, 3),)
sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)},)
print("torch", torch.__version__, "onnxscript", onnxscript.__version__)
try:
    torch.export.export(Decayed(), example, dynamic_shapes=sizes)
    raised = False
except Exception as error:
    raised = "length" in str(error)
    print("torch.export:", type(error).__name__, str(error).splitlines()[0][:40])
printed = io.StringIO()
with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
    warnings.simplefilter("always")
    program = torch.onnx.export(
        Decayed(), example, dynamo=True, dynamic_shapes=sizes, verbose=False
    )
said = [str(w.message) for w in caught] + [printed.getvalue()]
shape = [str(size) for size in program.model.graph.inputs[0].shape]
warned = any("length" in text for text in said)
print("torch.onnx.export: input", shape, "; a warning names the axis:", warned)
same = raised and shape == ["batch", "5", "3"] and not warned
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
