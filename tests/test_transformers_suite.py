"""Our models under the test classes that transformers has for its own, where they are fetched."""

import unittest

import pytest
from model_factories import SIZES, SYSTEMS
from transformers_suite import is_fetched, load

from memattn.models import (
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
QUICK = ("vanilla", "titans-mac")  # those of an ordinary run
# their tests that ask what our models do not have: why
DESELECTED = {
    "test_model_rope_scaling_from_config_1_dynamic": "frequencies that change with the length "
    "would not fit the keys in a cache, and are refused",
    "test_problem_types": "it sets a single class, which the configuration of transformers refuses "
    "where it is made, and ours wherever a model is",
    "test_causal_lm_loss_honors_shift_labels": "shift_labels is refused by its name",
}


class Tester:
    """What their tests ask: tiny configurations and inputs."""

    __test__ = False
    config_class = MemAttnConfig
    base_model_class = MemAttnModel
    causal_lm_class = MemAttnForCausalLM
    sequence_classification_class = MemAttnForSequenceClassification
    token_classification_class = MemAttnForTokenClassification
    is_training = True
    batch_size, seq_length = 5, 7
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
        return preset(**SIZES, **options)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        input_ids = common.ids_tensor(shape, self.vocab_size)
        mask = input_ids.new_ones(shape).triu()  # rows begin ever later
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


def make_suite(system: str) -> type:
    """Their tests of one of our models."""
    tester = type("Tester", (Tester,), {"system": system})

    def set_up(self: unittest.TestCase) -> None:
        self.model_tester = tester(self)  # pyright: ignore[reportAttributeAccessIssue]

    heads = (MemAttnForSequenceClassification, MemAttnForTokenClassification)
    own = dict(
        setUp=set_up,
        model_tester=None,
        all_model_classes=(MemAttnModel, MemAttnForCausalLM, *heads),
        has_attentions=False,
    )
    bases = (common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin)
    made = type(f"Test_{system}", (*bases, unittest.TestCase), own)
    for name in DESELECTED.keys() & set(dir(made)):
        setattr(made, name, None)
    marks = [] if system in QUICK else [pytest.mark.all_of_transformers]
    made.pytestmark = marks  # pyright: ignore[reportAttributeAccessIssue]
    return made


for _system in MODELS:
    globals()[f"Test_{_system}"] = make_suite(_system)
