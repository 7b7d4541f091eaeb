"""Weights that two processes share, by transformers: as one process has them."""

import copy

import pytest
import torch
from forked_processes import results_of
from model_factories import make_config, make_model
from tensor_parallel_cases import SYSTEMS, WORLD, make, results
from transformers.distributed.configuration_utils import DistributedConfig

from memattn.models import MemAttnForCausalLM
from memattn.testing import assert_within_budget

HEADS = {f"attention.{name}_proj.weight" for name in "qkvo"}
PERSISTENT = {"attention.persistent_key", "attention.persistent_value"}
MLP = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    """What each of the processes computed."""
    return results_of("tensor_parallel_cases.py", folder, WORLD)


@pytest.mark.parametrize("system", SYSTEMS)
def test_values_and_gradients_are_those_of_one_process(found, system):
    exact, plain = results(make(system)), results(make(system, backend="reference").float())
    for rank in range(WORLD):
        assert found[rank][system].keys() == exact.keys()
        for name, high in exact.items():
            actual = found[rank][system][name]
            if actual.dtype == torch.float64:
                torch.testing.assert_close(actual, high)
            else:
                assert_within_budget(name, actual, plain[name], high)


def test_a_folder_that_is_saved_again_is_whole(found, folder):
    system = list(SYSTEMS)[-1]
    before, after = (
        MemAttnForCausalLM.from_pretrained(folder / name) for name in (system, "again")
    )
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_heads_and_mlps_are_shared(found, system):
    wanted = set(MLP)
    if system == "learned":
        wanted = MLP - {"mlp.gate_proj.weight"}
    if system in ("vanilla", "both", "chapters"):
        wanted |= HEADS
    if system == "both":
        wanted |= PERSISTENT
    inner = {n.partition("layers.0.")[2] for n in found[0][system, "shared"] if "layers.0." in n}
    assert inner == wanted
    assert {"model.embed_tokens.weight"} <= found[0][system, "shared"]
    assert found[0][system, "shared"] == found[1][system, "shared"]


def test_heads_that_do_not_fit_the_devices_are_refused():
    model = make_model("vanilla", num_key_value_heads=1)
    with pytest.raises(ValueError, match="num_key_value_heads must be divisible by tp_size=2, got"):
        model._resolve_parallel_plans(DistributedConfig(tp_size=2, tp_plan="auto"))
    whole = {f"model.layers.*.attention.{name}_proj": "replicate" for name in "qkvo"}
    kept = copy.deepcopy(model)._resolve_parallel_plans(DistributedConfig(tp_size=2, tp_plan=whole))
    assert kept[0]["model.layers.0.mlp.down_proj"] == "rowwise"
    # attention that is computed as a whole has any number of heads
    config = make_config("learned", num_key_value_heads=1)
    MemAttnForCausalLM(config)._resolve_parallel_plans(DistributedConfig(tp_size=2))
    with pytest.raises(NotImplementedError, match="pp_size must be 1 .tp_size shares any model"):
        model._resolve_parallel_plans(DistributedConfig(pp_size=2))
