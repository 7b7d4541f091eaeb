"""``torch.export`` with a cache: programs that take it and return it, saved and loaded too."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import SIZES, SYSTEMS, make_config, make_model, make_tokens, perturb
from test_export import make_mask
from torch import Tensor, nn
from torch.utils import _pytree

from memattn import neural_memory
from memattn.models import MemAttnCache, MemAttnConfig, MemAttnForCausalLM
from memattn.ops import (
    AttentionOutput,
    FutureAttentionLossOutput,
    FutureAttentionOutput,
    NeuralMemoryOutput,
    RouterOutput,
)
from memattn.testing import assert_within_budget

Dim = torch.export.Dim
ROWS, SEEN = Dim("rows", min=2, max=64), Dim("seen", min=2, max=150)


class Step(nn.Module):
    """A call of a model with a cache, as a function of trees of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None, cache: MemAttnCache | None = None):
        found = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return found.logits, found.past_key_values


def make_step(system: str, dtype: torch.dtype = torch.float32) -> Step:
    if system not in ("shiftable", "sinks"):
        return Step(make_model(system, dtype, num_hidden_layers=2 if system == "learned" else 1))
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 1}
    if system == "sinks":
        sizes |= {"segment_len": None, "window_size": 6, "num_sink_tokens": 3}
        config = MemAttnConfig.segmented(**sizes)
    else:
        config = MemAttnConfig.shiftable(**sizes, num_specialists=2)
    model: Any = MemAttnForCausalLM(config)
    return Step(perturb(model.to(dtype).eval()))


def export_step(step: Step, masked: bool) -> nn.Module:
    """A program of one token for any batch and number of columns so far."""
    ids, mask = make_tokens(3, 19), torch.ones(3, 20, dtype=torch.long)
    _, cache = step(ids, None)
    shapes = {0: ROWS}, {0: ROWS, 1: SEEN + 1} if masked else None, cache.dynamic_shapes(ROWS, SEEN)
    inputs = ids[:, :1], mask if masked else None, cache
    return torch.export.export(step, inputs, dynamic_shapes=shapes).module()


EVERY = [*SYSTEMS, "shiftable", "sinks"]


@pytest.mark.parametrize(
    "system, masked",
    [
        ("both", True),
        ("titans-lmm", False),
        *[
            pytest.param(name, name != "sinks", marks=pytest.mark.slow)
            for name in ("vanilla", "future", "chapters", "titans-mac", "shiftable", "sinks")
        ],
    ],
)
@torch.no_grad()
def test_a_decoding_step_runs_again_and_again(system, masked):
    low = make_step(system)
    high, program = copy.deepcopy(low).double(), export_step(low, masked)
    for B, T in ((2, 7), (5, 41)):
        ids = make_tokens(B, T, seed=1)
        mask = make_mask(ids) if masked else None
        runs = [program, low, high]
        caches = [step(ids, mask)[1] for step in (low, low, high)]
        logits: list[tuple[torch.Tensor, ...]] = []  # of all steps: errors of one are few numbers
        for t in range(9):  # past a segment, a window and a block of routed tokens
            new = make_tokens(B, 1, seed=t)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(new)], 1)
            found = [run(new, mask, cache) for run, cache in zip(runs, caches, strict=True)]
            logits.append(tuple(x for x, _ in found))
            caches = [cache for _, cache in found]
            if t == 6:
                runs[0] = low  # goes on with what the program returned
        assert_within_budget("logits", *(torch.cat(x) for x in zip(*logits, strict=True)))
        assert caches[0].position == T + 9 and torch.equal(caches[0].present, caches[1].present)


@pytest.mark.parametrize("system", ["both", pytest.param("sinks", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_program_of_a_prompt_returns_the_cache(system):
    step, ids = make_step(system), make_tokens(3, 19)
    shape = {0: ROWS, 1: Dim("T", min=2, max=99)}
    shapes = (shape, shape)
    program = torch.export.export(step, (ids, make_mask(ids)), dynamic_shapes=shapes).module()
    ids, new = make_tokens(4, 31, seed=1), make_tokens(4, 5, seed=2)
    mask = make_mask(ids)
    mask[3, -6:] = 0  # ends before the newest column
    logits, cache = program(ids, mask)
    expected, own = step(ids, mask)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(step(new, None, cache)[0], step(new, None, own)[0])


@pytest.mark.parametrize("system", EVERY)
@torch.no_grad()
def test_caches_are_trees_of_tensors(system):
    step, ids = make_step(system), make_tokens(3, 23)
    mask, new = make_mask(ids), make_tokens(3, 2, seed=1)
    mask[2, -5:] = 0
    _, cache = step(ids, mask)
    tensors, tree = _pytree.tree_flatten(cache)
    again, _ = _pytree.tree_flatten(cache)
    assert all(x is y for x, y in zip(tensors, again, strict=True))  # export knows them by identity
    assert {len(x) for x in tensors} == {3}
    assert len(tensors) == len(cache.dynamic_shapes(ROWS, SEEN))
    made = _pytree.tree_unflatten(tensors, tree)
    assert made.position == cache.position and made.nbytes <= cache.nbytes
    torch.testing.assert_close(step(new, None, made)[0], step(new, None, cache)[0])
    # and in rows that begin anew
    made.reset(torch.tensor([True, False, False]))
    cache.reset(torch.tensor([True, False, False]))
    torch.testing.assert_close(step(new, None, made)[0], step(new, None, cache)[0])


@torch.no_grad()
def test_what_a_program_cannot_take_is_refused():
    step, ids = make_step("titans-lmm"), make_tokens(3, 9)
    _, cache = step(ids, None)
    cache.reset(torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="past_key_values must have no rows that begin anew"):
        _pytree.tree_flatten(cache)
    cache = MemAttnCache(make_config())
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="past_key_values must not record its past"):
        _pytree.tree_flatten(cache)


RUN = """
import sys, torch
import memattn
memattn.load_operators()
inputs, expected = torch.load(sys.argv[1] + "/inputs.pt")
found = torch.export.load(sys.argv[1] + "/program.pt2").module()(*inputs)
assert type(found).__name__ == "NeuralMemoryOutput" and found.state.count.tolist() == [1, 1]
torch.testing.assert_close(torch.utils._pytree.tree_leaves(found), expected)
"""
RUN_STEPS = """
import sys, torch
import memattn
memattn.load_operators()
ids, expected = torch.load(sys.argv[1] + "/inputs.pt")
cache = memattn.MemAttnCache.load(sys.argv[1] + "/cache.safetensors")
program = torch.export.load(sys.argv[1] + "/program.pt2").module()
for t in range(cache.position, ids.shape[1]):
    logits, cache = program(ids[:, t : t + 1], None, cache)
    torch.testing.assert_close(logits[:, 0], expected[:, t])
"""


def check_runs_alone(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_step_goes_on_in_another_process(tmp_path: Path):
    step, ids = make_step("both"), make_tokens(2, 25)
    _, cache = step(ids[:, :19], None)
    shapes = {0: ROWS}, None, cache.dynamic_shapes(ROWS, SEEN)
    program = torch.export.export(step, (ids[:, :1], None, cache), dynamic_shapes=shapes)
    program.example_inputs = None
    torch.export.save(program, tmp_path / "program.pt2")
    _, cache = step(ids[:, :13], None)
    cache.save(tmp_path / "cache.safetensors")
    torch.save((ids, step(ids, None)[0]), tmp_path / "inputs.pt")
    check_runs_alone(RUN_STEPS, tmp_path)


class Remember(nn.Module):
    """An operator, of which a program returns what it returns."""

    def forward(self, *tokens: Tensor):
        query, key, value, lr, *weights = tokens
        return neural_memory(query, key, value, lr, None, None, weights, chunk_size=4)


@pytest.mark.slow
def test_a_saved_operator_runs_in_another_process(tmp_path: Path):
    inputs = (*(torch.randn(2, 2, 9, 8) for _ in range(3)), torch.rand(2, 2, 9))
    inputs += tuple(torch.randn(2, 8, 8) for _ in range(2))
    program = torch.export.export(Remember(), inputs)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((inputs, _pytree.tree_leaves(Remember()(*inputs))), tmp_path / "inputs.pt")
    check_runs_alone(RUN, tmp_path)


def test_what_operators_return_has_a_name_in_saved_programs():
    x = torch.ones(2)
    for kind, fields in {
        AttentionOutput: 2,
        FutureAttentionOutput: 3,
        FutureAttentionLossOutput: 3,
        NeuralMemoryOutput: 3,
        RouterOutput: len(RouterOutput._fields),
    }.items():
        found = kind(*[x] * fields)
        tensors, tree = _pytree.tree_flatten(found)
        again = _pytree.treespec_loads(_pytree.treespec_dumps(tree))
        assert type(_pytree.tree_unflatten(tensors, again)) is kind
