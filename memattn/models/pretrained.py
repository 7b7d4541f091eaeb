"""Base class of the models: initialisation, saving and loading, roles of parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from memattn.models.block import MemAttnBlock
from memattn.models.config import MemAttnConfig
from memattn.models.parallel_plans import check_devices
from memattn.models.served import check_attention
from memattn.nn import ContinuousAxialPositions
from memattn.parts import PARTS, PartConfig, Role
from memattn.parts.chapters import FILE
from memattn.parts.together import roles_of

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MemAttnPreTrainedModel(PreTrainedModel):
    """Base class of the models: configuration, initialisation, saving and loading."""

    config: MemAttnConfig
    config_class = MemAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True  # where check_attention does not refuse it
    _no_split_modules = ["MemAttnBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def __init__(self, config: MemAttnConfig, *inputs: Any, **kwargs: Any) -> None:
        if isinstance(config, MemAttnConfig):
            config.check()  # fields may have been set after construction
            check_attention(config)
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContinuousAxialPositions):
            module.reset_parameters(self.config.initializer_range)
        for init_weights in dict.fromkeys(part.init_weights for part in PARTS.values()):
            init_weights(module, self.config.initializer_range)

    def initialize_weights(self) -> None:
        """As in transformers; then parts copy weights from attention (``PartConfig.begin``)."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, MemAttnBlock):
                for name, part in module.part_configs.items():
                    if part.resolved_place == "beside_attention":
                        part.begin(module.parts[name], module.attention)

    def parameter_roles(self) -> dict[str, Role]:
        """Roles of the parameters for which parts define one, by name."""
        found: list[tuple[str, PartConfig, nn.Module]] = []  # prefix, part, its module
        for prefix, module in self.named_modules():
            if isinstance(module, MemAttnPreTrainedModel) and "shared_parts" in module._modules:
                named, shared_parts = (
                    self.config.named_parts(),
                    module.get_submodule("shared_parts"),
                )
                for name, shared in shared_parts.named_children():
                    found.append(
                        (f"{prefix}{'.' * bool(prefix)}shared_parts.{name}.", named[name], shared)
                    )
            if isinstance(module, MemAttnBlock):
                for name, part in module.part_configs.items():
                    inside = name if name == "attention" else f"parts.{name}"
                    found.append((f"{prefix}.{inside}.", part, module.module_of(name)))
        return roles_of(found)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers; chapters are saved next to the weights."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.base_model.chapters.write(Path(save_directory) / FILE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; chapters are loaded as they were, open or closed."""
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is not None:
            where = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            absent = ("missing_entries", "connection_errors")
            silent = {f"_raise_exceptions_for_{what}": False for what in absent}
            file = cached_file(pretrained_model_name_or_path, FILE, **where, **silent)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if file is not None:
                model.base_model.chapters.load(file)
        return loaded

    def _resolve_parallel_plans(self, distributed_config: Any) -> Any:
        """As in transformers, if the model can be split in that way."""
        plans: Any = super()._resolve_parallel_plans(distributed_config)
        sizes = distributed_config.tp_size, distributed_config.pp_size
        check_devices(self.config, plans[0], *sizes)
        return plans

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """As in transformers, except for this package's classes, which folders name anyway."""
        if not cls.__module__.startswith("memattn."):
            super().register_for_auto_class(auto_class)

    def replace_parts(self, change: Callable[[PartConfig], PartConfig]) -> None:
        """Replace the configurations of the parts; their modules are kept."""
        self.config.parts = [change(part) for part in self.config.parts]
        for module in self.modules():
            if isinstance(module, MemAttnBlock):
                module.part_configs = {n: change(p) for n, p in module.part_configs.items()}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # attention is chosen by config.attention, not by transformers' registry
        return False
