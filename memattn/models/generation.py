"""Changes of transformers' ``generate`` for the decoder: its cache and its masks."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from memattn.checks import must
from memattn.models.cache import MemAttnCache
from memattn.models.config import MemAttnConfig
from memattn.parts.packing import refuse_continuous_batching
from memattn.parts.together import for_all_samples


class MemAttnGenerationMixin(GenerationMixin):
    """``GenerationMixin`` for models whose state is a ``MemAttnCache``."""

    config: MemAttnConfig

    @property
    def part_inputs(self) -> set[str]:
        """Names of extra inputs for the model's parts."""
        return {name for part in self.config.named_parts().values() for name in part.inputs}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in transformers, but accepts the inputs of parts."""
        known = self.part_inputs
        rest = {name: value for name, value in model_kwargs.items() if name not in known}
        super()._validate_model_kwargs(rest)  # pyright: ignore[reportAttributeAccessIssue]

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; inputs for all samples are not repeated for beams."""
        whole = for_all_samples(self.config.named_parts().values(), kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in whole}
        parent: Any = super()
        ids, expanded = parent._expand_inputs_for_generation(*args, **rest)
        return ids, {**expanded, **whole}

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Any, generation_config: GenerationConfig, model_kwargs: Any
    ) -> Any:
        """As in transformers, which masks pad tokens; cached columns keep the mask they had.

        An assistant gets the mask of its model unless that is all ones, so it finds no padding.
        """
        parent: Any = super()
        mask: Tensor = parent._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        if generation_config.is_assistant:
            mask = torch.ones_like(mask)
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, MemAttnCache) or not cache.position:
            return mask
        seen, new = cache.present.to(mask), mask[:, cache.position :]
        if len(seen) != len(mask) or seen.shape[1] > mask.shape[1]:
            return mask
        return torch.cat([seen, new], 1)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: Any
    ) -> Tensor:
        """As in transformers, but padding after a row's tokens gets the row's last position.

        transformers gives it position 0, and counts generated tokens from there.
        """
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            return mask.long().cumsum(-1) - 1
        parent: Any = super()
        return parent._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: a paged cache has no states of parts.

        ``generate_batch`` and the manager of continuous batching call it first.
        """
        refuse_continuous_batching(self)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Make ``generate()`` create a ``MemAttnCache`` instead of a ``DynamicCache``."""
        kind = generation_config.cache_implementation
        if kind is not None:
            must("cache_implementation", "be None", repr(kind))
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = cache = MemAttnCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
