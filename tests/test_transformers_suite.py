"""Our models under the test classes that transformers has for its own, where they are fetched."""

import unittest
from functools import partial, wraps
from typing import Any

import pytest
import torch
from model_factories import SIZES, SYSTEMS
from transformers_suite import is_fetched, load

from memattn.models import (
    MemAttnCache,
    MemAttnConfig,
    MemAttnForCausalLM,
    MemAttnForSequenceClassification,
    MemAttnForTokenClassification,
    MemAttnModel,
)

if not is_fetched():
    reason = "the tests of transformers are not here: make test-transformers fetches them"
    pytest.skip(reason, allow_module_level=True)

common, training = load("test_modeling_common"), load("test_training_mixin")
# their own models warn, and their tests leave files open
pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {
    **SYSTEMS,
    "shiftable": (MemAttnConfig.shiftable, dict(num_specialists=2)),
}
QUICK = ("vanilla", "titans-mac")  # those of an ordinary run, but for what takes a minute
LONG = {"titans-mac": ("test_training_overfit",)}
ENDING = ("future", "learned", "titans-lmm", "titans-mal")  # systems with a longest sequence
# their tests that ask what our models do not have: of which systems, if not of all, and why
LONGER = "it has sequences beyond the longest that the weights are made for, which are refused"
DESELECTED: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "test_model_rope_scaling_from_config_0_linear": (ENDING, LONGER),
    "test_model_rope_scaling_from_config_1_dynamic": (
        None,
        "frequencies that change with the length would not fit the keys in a cache: refused",
    ),
    "test_model_rope_scaling_from_config_2_yarn": (ENDING, LONGER),
    **dict.fromkeys(
        ("test_torch_export_dynamic", "test_torch_export_generate_dynamic"),
        (("titans-mac",), "its program has a fixed length, as it goes from segment to segment"),
    ),
    "test_problem_types": (
        None,
        "it sets a single class, which the configuration of transformers refuses where it is made, "
        "and ours wherever a model is",
    ),
}
# their tests that leave out models which return no weights of attention, and do not need them
UNLOCKED = (
    "test_left_padding_compatibility",
    "test_eager_padding_matches_padding_free_with_position_ids",
)
# rows that end ever earlier, one with holes: their tests turn it round for padding on the left
MASK = [
    [1, 1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 1, 0],
    [1, 0, 1, 0, 0, 1, 1],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1, 1],
]


class Tester:
    """What their tests ask: tiny configurations and inputs."""

    __test__ = False
    config_class = MemAttnConfig
    base_model_class = MemAttnModel
    causal_lm_class = MemAttnForCausalLM
    sequence_classification_class = MemAttnForSequenceClassification
    token_classification_class = MemAttnForTokenClassification
    is_training = True
    batch_size, seq_length = len(MASK), len(MASK[0])
    vocab_size = SIZES["vocab_size"]
    hidden_size = SIZES["hidden_size"]
    num_hidden_layers = SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]
    num_labels, type_sequence_label_size = 3, 2
    system: str

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> MemAttnConfig:
        preset, options = MODELS[self.system]
        return preset(**SIZES, **{"max_position_embeddings": 160} | options)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        input_ids = common.ids_tensor(shape, self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tensor(MASK)}


def unlock(test: Any) -> Any:
    """A test that takes our models for such as return weights of attention."""

    @wraps(test)
    def unlocked(self: Any) -> None:
        self.has_attentions = True
        test(self)

    return unlocked


def only_with_all(test: Any) -> Any:
    """A test that runs with ``--all-of-transformers``."""

    @wraps(test)
    def longer(self: Any) -> None:
        test(self)

    return pytest.mark.all_of_transformers(longer)


def make_suite(system: str) -> type:
    """Their tests of one of our models."""
    tester = type("Tester", (Tester,), {"system": system})

    def set_up(self: unittest.TestCase) -> None:
        self.model_tester = tester(self)  # pyright: ignore[reportAttributeAccessIssue]

    def check_cache(
        self: unittest.TestCase, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        """Layers hold the keys that later tokens see, which their test takes to be all."""
        assert isinstance(past_key_values, MemAttnCache)
        assert len(past_key_values) == config.num_hidden_layers
        assert past_key_values.get_seq_length() == seq_length
        for layer in past_key_values.layers:
            heads, size = config.num_key_value_heads, config.head_dim
            for kept in (layer.keys, layer.values):  # None of a memory alone
                assert kept is None or kept.shape == (batch_size, heads, layer.kept, size)

    heads = (MemAttnForSequenceClassification, MemAttnForTokenClassification)
    own = dict(
        setUp=set_up,
        _check_past_key_values_for_generate=check_cache,
        model_tester=None,
        all_model_classes=(MemAttnModel, MemAttnForCausalLM, *heads),
        has_attentions=False,
    )
    bases = (common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin)
    made = type(f"Test_{system}", (*bases, unittest.TestCase), own)
    for name, (systems, _) in DESELECTED.items():
        if hasattr(made, name) and (systems is None or system in systems):
            setattr(made, name, None)
    for name in filter(partial(hasattr, made), UNLOCKED):
        setattr(made, name, unlock(getattr(made, name)))
    for name in filter(partial(hasattr, made), LONG.get(system, ())):
        setattr(made, name, only_with_all(getattr(made, name)))
    marks = [] if system in QUICK else [pytest.mark.all_of_transformers]
    made.pytestmark = marks  # pyright: ignore[reportAttributeAccessIssue]
    return made


for _system in MODELS:
    globals()[f"Test_{_system}"] = make_suite(_system)
