#!/usr/bin/env bash
# torch.onnx.export traces a module without Dynamo; where that raises, it says nothing and traces
# again with Dynamo, for which torch.onnx.is_in_onnx_export() is False. So a module that refuses to
# be exported to ONNX is exported, and one that asks takes another branch in the second attempt.
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

warnings.simplefilter("ignore")
import onnxscript
import torch

said = []


class Refuses(torch.nn.Module):
    def forward(self, x):
        if torch.onnx.is_in_onnx_export():
            said.append("refused")
            raise NotImplementedError("not in ONNX")
        return x + 1


class Twice(torch.nn.Module):
    """Halves where it is asked for ONNX, but the first attempt fails later."""

    def forward(self, x):
        x = x / 2 if torch.onnx.is_in_onnx_export() else x * 2
        if not torch.compiler.is_dynamo_compiling():
            raise ValueError("something that Dynamo does not meet")
        return x


def operators(module):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        program = torch.onnx.export(module, (torch.ones(3),), dynamo=True, verbose=False)
    return [node.op_type for node in program.model_proto.graph.node], printed.getvalue()


print("torch", torch.__version__, "onnxscript", onnxscript.__version__)
first, printed = operators(Refuses())
print("it refused", len(said), "time; the program:", first, "printed:", repr(printed))
second, _ = operators(Twice())
print("a module that halves in ONNX and doubles elsewhere became:", second)
same = said == ["refused"] and first == ["Add"] and second == ["Mul"] and "refused" not in printed
print("as found" if same else "changed")
sys.exit(not same)
EOF
cd "$folder"
"$folder/venv/bin/python" show.py
