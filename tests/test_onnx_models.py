"""Whole models in ONNX Runtime: one program for any batch and length, with and without a mask."""

import copy

import pytest
import torch
from model_factories import make_tokens
from test_export import ROWS, make_logits, make_mask

from memattn.parts.causal import CausalConfig
from memattn.testing import assert_within_budget

needs = "pip install onnx onnxscript onnxruntime"
pytest.importorskip("onnxscript", reason=needs)
onnxruntime = pytest.importorskip("onnxruntime", reason=needs)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "system, masked",
    [
        ("both", True),
        *[
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("vanilla", "future", "learned", "shiftable")
        ],
    ],
)
@torch.no_grad()
def test_models_in_onnx_runtime(system, masked):
    beside = {"attention": CausalConfig(backend="reference")}  # of a preset that adds a part to it
    low = make_logits(system, backend="reference", **(beside if system == "shiftable" else {}))
    high = copy.deepcopy(low).double()
    axes = {0: ROWS, 1: torch.export.Dim("T", min=5, max=99)}
    ids = make_tokens(3, 19)
    inputs = (ids, make_mask(ids)) if masked else (ids,)
    shapes = (axes,) * len(inputs)
    program = torch.onnx.export(low, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    for B, T in ((3, 19), (5, 41), (2, 8)):
        ids = make_tokens(B, T, seed=1)
        inputs = (ids, make_mask(ids)) if masked else (ids,)
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        (found,) = session.run(None, given)
        assert_within_budget("logits", torch.from_numpy(found), low(*inputs), high(*inputs))
