"""The exporters of transformers: programs of a prompt and of a decoding step with our cache."""

import copy

import pytest
import torch
from model_factories import make_model, make_tokens
from torch.utils._pytree import tree_leaves, tree_map
from transformers.exporters.base import ExportedModel
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import cast_leaf_tensors, get_leaf_tensors

from memattn import MemAttnCache
from memattn.testing import assert_within_budget

# its packages are newer than those it was tried with, and torch warns of its calls
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("system", ["both", "titans-lmm"])
@torch.no_grad()
def test_generation_by_exported_programs(system, tmp_path):
    low = make_model(system, torch.float32, num_hidden_layers=1)
    high, ids = copy.deepcopy(low).double(), make_tokens(3, 19)
    made = DynamoExporter().export_for_generation(
        copy.deepcopy(low), {"input_ids": ids}, DynamoConfig(dynamic=True)
    )
    for component in made.components.values():
        component.program.example_inputs = None  # torch writes a faulty message where it loads them
    made.save_pretrained(tmp_path)
    made = ExportedModel.from_pretrained(tmp_path)
    caches = [MemAttnCache(low.config) for _ in range(3)]
    kinds, ids = ("prefill", *["decode"] * 12), make_tokens(4, 7, seed=1)
    for kind in kinds:
        place = torch.arange(ids.shape[1]).expand_as(ids) + caches[0].position
        options = [{"position_ids": place, "past_key_values": cache} for cache in caches]
        runs = (made.runners[kind], low, high)
        found = [run(input_ids=ids, **each) for run, each in zip(runs, options, strict=True)]
        assert_within_budget(kind, *(each.logits[:, -1] for each in found))
        caches = [each.past_key_values for each in found]
        ids = make_tokens(4, 1, seed=caches[0].position)


@pytest.mark.parametrize("system", ["both", "chapters", "titans-mac"])
@torch.no_grad()
def test_caches_hold_for_them_the_tensors_of_sequences_alone(system):
    model, ids = make_model(system, torch.float32), make_tokens(3, 19)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 7] = mask[2, -3:] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    state = [tensor for layer in cache.layers for tensor in layer.state.values()]
    kept = {id(tensor) for tensor in state if tensor.dtype != torch.float64}  # sums are cast
    other = copy.deepcopy(cache)
    leaves = get_leaf_tensors(cast_leaf_tensors(cache, torch.float32, torch.device("cpu")))
    assert len(leaves) == len(state)
    assert kept and kept <= {id(tensor) for tensor in leaves.values()}
    new = make_tokens(3, 1, seed=1)
    expected = model(new, past_key_values=other).logits
    torch.testing.assert_close(model(new, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("system", ["both", "titans-mac"])
@torch.no_grad()
def test_caches_of_programs_hold_for_them_what_programs_take(system):
    model, ids = make_model(system, torch.float32), make_tokens(3, 4)
    cache = model(ids, use_cache=True).past_key_values
    made = tree_map(lambda tensor: tensor, cache)  # as a program returns it
    leaves = list(get_leaf_tensors(made).values())
    assert [id(x) for x in leaves] == [id(x) for x in tree_leaves(cache)]
    new = make_tokens(3, 3, seed=1)
    expected = model(new, past_key_values=cache).logits
    torch.testing.assert_close(model(new, past_key_values=made).logits, expected)
    assert made.nbytes <= cache.nbytes and len(get_leaf_tensors(made)) == len(
        [tensor for layer in made.layers for tensor in layer.state.values()]
    )
