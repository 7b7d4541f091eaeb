"""``torch.export``: programs for any batch and length, saved and loaded; and ``torch.vmap``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_factories import SIZES, make_model, make_tokens, perturb
from neural_memory_factories import make_inputs
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.utils import _pytree

from memattn import neural_memory, segmented_attention
from memattn.models import MemAttnConfig, MemAttnForCausalLM
from memattn.testing import assert_within_budget

ROWS = torch.export.Dim("rows", min=2, max=64)


class Logits(nn.Module):
    """A model as a function of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def make_logits(system: str, **sizes) -> Logits:
    if system == "shiftable":
        torch.manual_seed(0)
        sizes = SIZES | {"num_hidden_layers": 1, "num_specialists": 2} | sizes
        return Logits(perturb(MemAttnForCausalLM(MemAttnConfig.shiftable(**sizes)).eval()))
    return Logits(make_model(system, torch.float32, **sizes))


def export(model: nn.Module, *inputs: Tensor, least: int = 2) -> torch.export.ExportedProgram:
    """A program for any batch and length."""
    axes = {0: ROWS, 1: torch.export.Dim("T", min=least, max=99)}
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=(axes,) * len(inputs))


def make_mask(ids: Tensor) -> Tensor:
    """Padding on the left, and a hole."""
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 5:7] = 0
    return mask


@pytest.mark.parametrize(
    "system, masked",
    [
        ("vanilla", False),
        ("both", True),
        ("future", True),
        ("chapters", False),
        ("titans-lmm", True),
        pytest.param("titans-mac_parallel", False, marks=pytest.mark.slow),
        ("shiftable", True),
    ],
)
@torch.no_grad()
def test_programs_take_any_batch_and_length(system, masked):
    model, ids = make_logits(system, num_hidden_layers=1), make_tokens(3, 19)
    inputs = lambda ids: (ids, make_mask(ids)) if masked else (ids,)
    # tokens are routed in blocks of 4, of which one and several would be two programs
    program = export(model, *inputs(ids), least=5 if system == "chapters" else 2).module()
    for B, T in ((2, 8), (5, 41)):
        other = inputs(make_tokens(B, T, seed=1))
        real = make_mask(other[0]) == 1 if masked else slice(None)
        torch.testing.assert_close(program(*other)[real], model(*other)[real])


@torch.no_grad()
def test_segments_that_follow_from_each_other_have_a_fixed_length():
    model, ids = make_logits("titans-mac", num_hidden_layers=1), make_tokens(3, 19)
    refused = 'input_ids must have a fixed length.*"mac".*"mac_parallel" takes any'
    with pytest.raises(NotImplementedError, match=refused):
        export(model, ids)
    shapes = ({1: torch.export.Dim("T", min=2, max=99)},)
    with pytest.raises(Exception, match=refused):  # as ONNX tries it the second time
        torch.export.export(model, (ids,), dynamic_shapes=shapes, strict=True)
    program = torch.export.export(model, (ids,)).module()
    other = make_tokens(3, 19, seed=1)
    torch.testing.assert_close(program(other), model(other))


class Remember(nn.Module):
    """A neural memory's definition, of a token and then of the others."""

    def forward(self, tokens: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        options = dict(chunk_size=2, skip_nonfinite=True, backend="reference")
        state = neural_memory(*(x[:, :, :1] for x in tokens), weights, **options).state
        found = neural_memory(*(x[:, :, 1:] for x in tokens), weights, state=state, **options)
        return [found.out, *_pytree.tree_leaves(found.state)]


@torch.no_grad()
def test_the_definition_of_the_memory_takes_any_number_of_chunks():
    def inputs(B: int, T: int) -> tuple[list[Tensor], list[Tensor]]:
        tensors = list(make_inputs(B=B, T=T, seed=B, hidden=()).values())
        return tensors[:6], tensors[6:]

    axes, given = {0: ROWS, 2: torch.export.Dim("T", min=3, max=99)}, inputs(3, 6)
    shapes = ([axes] * len(given[0]), [{}] * len(given[1]))
    with _config.patch(backed_size_oblivious=True):  # as torch.onnx.export does
        program = torch.export.export(Remember(), given, dynamic_shapes=shapes).module()
    for B, T in ((2, 3), (3, 12)):
        other = inputs(B, T)
        torch.testing.assert_close(program(*other), Remember()(*other))


@pytest.mark.slow
@torch.no_grad()
def test_saved_programs_run_where_operators_are_loaded(tmp_path: Path):
    model, ids = make_logits("vanilla", num_hidden_layers=1), make_tokens(3, 19)
    torch.export.save(export(model, ids), tmp_path / "model.pt2")
    other = make_tokens(2, 31, seed=1)
    torch.save((other, model(other)), tmp_path / "expected.pt")
    run = """
import sys, torch
other, expected = torch.load(sys.argv[1] + "/expected.pt")
program = torch.export.load(sys.argv[1] + "/model.pt2")
torch.testing.assert_close(program.module()(other), expected)
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", first + run, str(tmp_path)],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        for first in ("import memattn; memattn.load_operators()", "")
    ]
    assert found[0].returncode == 0, found[0].stderr
    assert found[1].returncode and "memattn_cpp" in found[1].stderr


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps_operators_one_by_one_in_every_backend():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, 2, 7, 8, generator=generator) for _ in range(3)]

    def gradients(backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        own = [x.detach().to(dtype).requires_grad_() for x in inputs]
        call = lambda q, k, v: segmented_attention(q, k, v, window_size=3, backend=backend).out
        out = torch.vmap(call)(*own)
        return [out, *torch.autograd.grad(out.square().sum(), own)]

    results = gradients("cpp"), gradients("reference"), gradients("reference", torch.float64)
    for n, each in enumerate(zip(*results, strict=True)):
        assert_within_budget(str(n), *each)
    call = lambda q, k, v: segmented_attention(q, k, v, backend="cpp").out.sum()
    with pytest.raises(NotImplementedError, match='backend must be "reference" in torch.func.grad'):
        torch.vmap(torch.func.grad(call))(*inputs)
