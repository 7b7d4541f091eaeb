"""Methods of an attached model: its forward opens a ``Call`` and returns the losses of parts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from memattn.adapters.attachment import Attachment
from memattn.adapters.cache import carry_states, new_cache
from memattn.adapters.call import AdapterLayer, Call
from memattn.adapters.files import INSIDE, save_adapter
from memattn.adapters.swap import Swapped
from memattn.checks import must
from memattn.parts import PartConfig, Role
from memattn.parts.chapters import Chapters
from memattn.parts.packing import find_keywords, refuse_continuous_batching
from memattn.parts.specialist_set import call_with_gates
from memattn.parts.together import for_all_samples, roles_of


class AttachedModel(Swapped):
    """Methods of a model with attached parts."""

    _memattn: Attachment

    def forward(
        self: Any,
        *args: Any,
        output_losses: bool | None = None,
        padding_mask: Tensor | None = None,
        return_gates: bool | str | None = None,
        **kwargs: Any,
    ) -> Any:
        options = dict(output_losses=output_losses, padding_mask=padding_mask, **kwargs)
        return call_with_gates(self, self._forward, return_gates, *args, **options)

    def _forward(
        self: Any,
        *args: Any,
        output_losses: bool | None,
        padding_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """The output of a forward call with the active parts."""
        attachment = self._memattn
        inputs = attachment.take_inputs(kwargs)
        if not attachment.is_running:
            return super().forward(*args, **kwargs)
        if getattr(self, "_is_replica", False):
            raise NotImplementedError(
                "model must not run under torch.nn.DataParallel with attached parts; "
                "DistributedDataParallel takes it"
            )
        given = {**dict(zip(attachment.arguments, args, strict=False)), **kwargs}
        if given.get("cache") is not None:
            raise NotImplementedError("cache must be None with attached parts, use past_key_values")
        self._prepare_cache(given, kwargs)
        return_dict = kwargs.pop("return_dict", None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        measured = self.training if output_losses is None else output_losses
        call = Call(
            attachment,
            given.get("attention_mask") if padding_mask is None else padding_mask,
            given.get("position_ids"),
            find_keywords(given),
            measured and bool(attachment.losses),
            inputs,
        )
        attachment.call = call
        try:
            output = super().forward(*args, **kwargs, return_dict=True)
        finally:
            attachment.call = None
            call.close()
        output = self._with_losses(output, call, given)
        return output if return_dict else output.to_tuple()

    def _prepare_cache(self: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Replace the cache that the model would make by one that carries states."""
        attachment = self._memattn
        if given.get("past_key_values") is not None or "use_cache" not in attachment.arguments:
            return
        wanted = given.get("use_cache")
        if wanted is None and self.training:
            kwargs["use_cache"] = False
            return
        if wanted is None:
            wanted = getattr(self.config.get_text_config(decoder=True), "use_cache", False)
        checkpointing = self.training and any(
            getattr(layer, "gradient_checkpointing", False) for layer in attachment.layers
        )
        if wanted and attachment.needs_state and not checkpointing:
            kwargs["past_key_values"] = cache = new_cache(self)
            carry_states(cache, attachment.empty_states, needed=True)

    def _with_losses(self: Any, output: Any, call: Call, given: Mapping[str, Any]) -> Any:
        """The output with the losses of parts; in training mode its ``loss`` includes them."""
        values = dict(output.items())
        means, counts = call.losses.means()
        lm_loss, labels = values.get("loss"), given.get("labels")
        if means:
            values |= {"lm_loss": lm_loss, "losses": means, "loss_counts": counts}
        if lm_loss is not None and self.training:
            share: Any = 1.0  # of the labels that are here
            if given.get("num_items_in_batch") is not None and labels is not None:
                share = (labels[:, 1:] != -100).sum() / given["num_items_in_batch"]
            for name, mean in means.items():
                coefficient = call.attachment.losses[name] * share
                values["loss"] = values["loss"] + (coefficient * mean).to(lm_loss.device)
        return call.attachment.output_type(**values)

    @property
    def part_inputs(self: Any) -> set[str]:
        """Names of the tensors that a caller may give to active parts, or to those of the model."""
        own = {name for part in self._memattn.running.values() for name in part.inputs}
        return own | getattr(super(), "part_inputs", set())

    def parameter_roles(self: Any) -> dict[str, Role]:
        """Roles of the attached parameters that a part declares, by name."""
        found = []  # prefix, part, its module
        for prefix, module in self.named_modules():
            if isinstance(module, AdapterLayer):
                for name, part in module.configs.items():
                    found.append((f"{prefix}.parts.{name}.", part, module.parts[name]))
        for name, adapter in self._memattn.adapters.items():
            for part, module in adapter.shared.items():
                prefix = f"memory_adapters.{name}.{part}."
                found.append((prefix, adapter.parts[part], module))
        return roles_of(found)

    def replace_parts(self: Any, change: Callable[[PartConfig], PartConfig]) -> None:
        """Replace the configurations of the attached parts; their modules stay."""
        if hasattr(super(), "replace_parts"):
            super().replace_parts(change)
        for adapter in self._memattn.adapters.values():
            adapter.parts = {name: change(part) for name, part in adapter.parts.items()}
            for module in adapter.modules.values():
                module.configs = {name: change(part) for name, part in module.configs.items()}
            left = set(adapter.parameters())  # what a module does not hold any more does not learn
            adapter.trainable = [p for p in adapter.trainable if p in left]

    @property
    def chapters(self: Any) -> Chapters:
        """The chapters of texts of the active adapter.

        Raises:
            ValueError: Unless exactly one is active.
        """
        running = self._memattn.active if self._memattn.is_running else ()
        if len(running) != 1:
            allowed = "run exactly one adapter (see set_adapter)"
            must("model", allowed, ", ".join(running) or "none")
        return self._memattn.adapters[running[0]].chapters

    @property
    def losses(self: Any) -> dict[str, float]:
        """Losses that active parts return beside the cross-entropy, with their coefficients."""
        return dict(self._memattn.losses) if self._memattn.is_running else {}

    @property
    def reach(self: Any) -> int:
        """Tokens in the longest window or segment of an active part; 0 if none has one."""
        attachment = self._memattn
        names = attachment.active if attachment.is_running else ()
        parts = (part for name in names for part in attachment.adapters[name].parts.values())
        return max((part.reach for part in parts), default=0)

    def save_pretrained(
        self: Any,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's method, with the attached weights; each adapter also gets a folder."""
        result = super().save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        for name, adapter in self._memattn.adapters.items():
            folder = Path(save_directory) / INSIDE / name
            save_adapter(
                folder, self, adapter, state_dict=state_dict, is_main_process=is_main_process
            )
        return result

    def prepare_inputs_for_generation(
        self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """As the model's method; also keeps the padding, which the mask for some caches lacks."""
        inputs = super().prepare_inputs_for_generation(
            *args, attention_mask=attention_mask, **kwargs
        )
        made = inputs.get("attention_mask")
        is_padding = isinstance(made, Tensor) and made.dim() == 2
        if attention_mask is not None and self._memattn.is_running and not is_padding:
            inputs["padding_mask"] = attention_mask
        return inputs

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        """As the model's method, without the inputs of parts, which it does not know."""
        rest = dict(model_kwargs)
        self._memattn.take_inputs(rest)
        super()._validate_model_kwargs(rest)

    def _expand_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's method; inputs that all samples share have no rows to repeat for beams."""
        whole = for_all_samples(self._memattn.running.values(), kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in whole}
        ids, expanded = super()._expand_inputs_for_generation(*args, **rest)
        return ids, {**expanded, **whole}

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's method, but refused with active parts: a paged cache lacks their state."""
        if self._memattn.is_running:
            refuse_continuous_batching(self)
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Start ``generate()`` with a cache that carries states."""
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        cache, attachment = model_kwargs.get("past_key_values"), self._memattn
        if isinstance(cache, Cache) and attachment.is_running:
            states = carry_states(cache, attachment.empty_states, attachment.needs_state)
            if states is not None and generation_config.is_assistant:
                cache.activate_past_recording()
        return result
