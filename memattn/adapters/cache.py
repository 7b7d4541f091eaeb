"""The state of parts inside the model's own cache, which crops and reorders it like its keys."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from memattn.adapters.swap import Swapped, swap
from memattn.checks import must
from memattn.parts import SequenceStates
from memattn.parts.layer_states import same_layers


class CarriesStates(Swapped):
    """Methods of a cache with the state of parts; each also acts on that state."""

    part_states: SequenceStates

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.part_states.reorder_cache(beam_idx)

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.part_states.batch_select_indices(indices)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.part_states.batch_repeat_interleave(repeats)

    def activate_past_recording(self: Any) -> None:
        super().activate_past_recording()
        self.part_states.activate_past_recording()

    def crop(self: Any, tokens_to_remove: int) -> None:
        self.part_states.crop(tokens_to_remove)  # first: it may refuse
        super().crop(tokens_to_remove)

    def reset(self: Any) -> None:
        super().reset()
        self.part_states.reset()


def carry_states(
    cache: Any, wanted: list[Any], needed: bool, layer: int = 0
) -> SequenceStates | None:
    """The states of parts in a cache; an empty cache gets them here.

    Args:
        cache: A cache of transformers.
        wanted: Empty states of the parts of each layer, by name.
        needed: Whether the parts need a state for their results; otherwise it only saves work.
        layer: Number of a layer whose keys are not yet extended in this call.

    Returns:
        The states, up to date with the cache. None if they are not needed and the cache cannot
        carry them or was filled without these parts.

    Raises:
        TypeError: If the cache is of a kind that cannot carry them.
        ValueError: If it was filled without these parts.
    """
    if not needed and torch.compiler.is_compiling():
        return None  # one graph instead
    if not isinstance(cache, DynamicCache | QuantizedCache):
        if not needed:
            return None
        allowed = "be a DynamicCache or a QuantizedCache, which carries the state of attached parts"
        must("past_key_values", allowed, type(cache).__name__, TypeError)
    length = cache.get_seq_length(layer)
    if length and not isinstance(cache, CarriesStates):
        if not needed:
            return None
        filled = f"{length} tokens that they did not see"
        must("past_key_values", "be filled with the attached parts in the model", filled)
    carrying: Any = cache
    if not isinstance(cache, CarriesStates):
        swap(carrying, CarriesStates)
        carrying.part_states = _fresh(wanted)
    states: SequenceStates = carrying.part_states
    if length == 0 and states.position == 0:
        states = carrying.part_states = _fresh(wanted, records_past=states.records_past)
    if not needed and (states.position != length or not same_layers(states.layers, wanted)):
        return None
    states.check_layers(wanted)
    if states.position != length:
        filled = f"{states.position} of its {length} tokens seen by the attached parts"
        must("past_key_values", "have all tokens seen by them", filled)
    return states


def _fresh(wanted: list[Any], records_past: bool = False) -> SequenceStates:
    """Empty states of these parts."""
    states = SequenceStates([{n: state.fresh() for n, state in layer.items()} for layer in wanted])
    if records_past:
        states.activate_past_recording()
    return states


def new_cache(model: Any) -> Cache:
    """An empty cache of the kind that transformers would make for a model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))
