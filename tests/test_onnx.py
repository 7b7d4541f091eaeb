"""``torch.onnx.export``: programs of the reference in ONNX Runtime, and no others."""

import pytest
import torch
from torch import Tensor, nn

from memattn import segmented_attention

INPUTS = tuple(torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0)))


class Attend(nn.Module):
    """An operator with a backend."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return segmented_attention(query, key, value, window_size=3, backend=self.backend).out


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    torch.export.export(Attend("reference"), INPUTS)
    with pytest.raises(NotImplementedError, match='backend must be "reference" in torch.onnx'):
        torch.export.export(Attend("cpp"), INPUTS)


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_what_torch_does():
    needs = "pip install onnx onnxscript onnxruntime"
    pytest.importorskip("onnxscript", reason=needs)
    onnxruntime = pytest.importorskip("onnxruntime", reason=needs)
    module = Attend("reference")
    program = torch.onnx.export(module, INPUTS, dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, INPUTS, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), module(*INPUTS))
    with pytest.raises(Exception, match='backend must be "reference" in torch.onnx.export'):
        torch.onnx.export(Attend("cpp"), INPUTS, dynamo=True, verbose=False)
