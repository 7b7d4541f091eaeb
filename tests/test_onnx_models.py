"""Whole models in ONNX Runtime: programs for any batch and length, of a token with a cache, too."""

import copy

import pytest
import torch
from model_factories import make_model, make_tokens
from test_export import ROWS, make_logits, make_mask
from test_export_cache import SEEN, Step
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers.exporters.base import ExportedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from memattn import MemAttnCache
from memattn.parts.causal import CausalConfig
from memattn.testing import assert_within_budget

needs = "pip install onnx onnxscript onnxruntime"
pytest.importorskip("onnxscript", reason=needs)
onnxruntime = pytest.importorskip("onnxruntime", reason=needs)
pytestmark = pytest.mark.filterwarnings("ignore")
TITANS = ("titans-lmm", "titans-mag", "titans-mal", "titans-mac_parallel")


@pytest.mark.parametrize(
    "system, masked",
    [
        ("both", True),
        *[
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("vanilla", "future", "learned", "shiftable", *TITANS)
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


@pytest.mark.slow
@torch.no_grad()
def test_segments_that_follow_from_each_other_in_onnx_runtime():
    model, ids = (
        make_logits("titans-mac", num_hidden_layers=1, backend="reference"),
        make_tokens(3, 19),
    )
    program = torch.onnx.export(
        model, (ids,), dynamo=True, dynamic_shapes=({0: ROWS},), verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    ids = make_tokens(5, 19, seed=1)
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    high = copy.deepcopy(model).double()
    assert_within_budget("logits", torch.from_numpy(found), model(ids), high(ids))


@pytest.mark.parametrize("system", ["both", pytest.param("titans-lmm", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_decoding_step_in_onnx_runtime(system):
    low = Step(make_model(system, torch.float32, num_hidden_layers=1, backend="reference"))
    high = copy.deepcopy(low).double()
    ids, (_, cache) = make_tokens(3, 1), low(make_tokens(3, 19), None)
    shapes = {0: ROWS}, None, cache.dynamic_shapes(ROWS, SEEN)
    program = torch.onnx.export(
        low, (ids, None, cache), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    _, tree = tree_flatten(cache)

    def run(ids, mask, cache):
        tensors = (ids, *tree_leaves(cache))
        given = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
        logits, *tensors = map(torch.from_numpy, session.run(None, given))
        return logits, tree_unflatten(tensors, tree)

    for B, T in ((2, 7), (5, 41)):
        ids = make_tokens(B, T, seed=1)
        caches = [step(ids, None)[1] for step in (low, low, high)]
        logits = []
        for t in range(9):  # past a segment, a window and a chunk
            pairs = zip((run, low, high), caches, strict=True)
            found = [step(make_tokens(B, 1, seed=t), None, cache) for step, cache in pairs]
            logits.append([x for x, _ in found])
            caches = [cache for _, cache in found]
        assert_within_budget("logits", *(torch.cat(x) for x in zip(*logits, strict=True)))


@pytest.mark.parametrize("system", ["both", pytest.param("titans-lmm", marks=pytest.mark.slow)])
@torch.no_grad()
def test_generation_by_the_exporter_of_transformers(system, tmp_path):
    low = make_model(system, torch.float32, num_hidden_layers=1, backend="reference")
    high, inputs = copy.deepcopy(low).double(), {"input_ids": make_tokens(3, 19)}
    made = OnnxExporter().export_for_generation(
        copy.deepcopy(low), inputs, OnnxConfig(dynamic=True)
    )
    made.save_pretrained(tmp_path)
    made = ExportedModel.from_pretrained(tmp_path)
    caches, ids = [MemAttnCache(low.config) for _ in range(3)], make_tokens(4, 7, seed=1)
    logits = []
    for kind in ("prefill", *["decode"] * 9):
        place = torch.arange(ids.shape[1]).expand_as(ids) + caches[0].position
        pairs = zip((made.runners[kind], low, high), caches, strict=True)
        found = [
            run(input_ids=ids, position_ids=place, past_key_values=cache) for run, cache in pairs
        ]
        logits.append([each.logits for each in found])
        caches = [each.past_key_values for each in found]
        ids = make_tokens(4, 1, seed=caches[0].position)
    assert_within_budget("logits", *(torch.cat(x, 1) for x in zip(*logits, strict=True)))
