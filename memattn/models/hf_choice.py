"""How memattn_segmented is selected for a model: by name, or by fields of a configuration.

Models with their own attention code, or that process the mask themselves, are refused.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

NAME = "memattn_segmented"
FIELDS = ("memattn_segment_len", "memattn_window_size", "memattn_num_sink_tokens")
# code that indexes a mask, reads its shape or dtype, or combines it with others
WORKED_ON = re.compile(r"\battention_mask(\[|\.\w)|cat\(\[attention_mask\b")


def register_choice() -> None:
    """Add the fields to configurations, and the checks to models."""
    for name in FIELDS:
        setattr(PreTrainedConfig, name, _config_field(name))
    for method in ("set_attn_implementation", "get_correct_attn_implementation"):
        if not hasattr(getattr(PreTrainedModel, method), "_memattn_guards"):
            setattr(PreTrainedModel, method, _guarded(getattr(PreTrainedModel, method)))
    if not hasattr(PreTrainedModel.post_init, "_memattn_guards"):
        PreTrainedModel.post_init = _checked(PreTrainedModel.post_init)


def _guarded(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that selects the implementation, for models that would use this one.

    For others transformers only warns, or attends without any mask.
    """

    @functools.wraps(choose)
    def guarded(model: PreTrainedModel, requested: Any, *args: Any, **kwargs: Any) -> Any:
        if _names_it(requested):
            _refuse_own_attention(model, _text_config(model.config))
        elif requested is None and _has_spans(model.config):
            # the outer configuration has reset the choice of the text model's configuration
            requested = NAME
        return choose(model, requested, *args, **kwargs)

    guarded._memattn_guards = choose  # pyright: ignore[reportAttributeAccessIssue]
    return guarded


def _checked(post_init: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``post_init``, as an implementation may be selected before a model is built."""

    @functools.wraps(post_init)
    def checked(model: PreTrainedModel) -> None:
        post_init(model)
        text = _text_config(model.config)
        if text._attn_implementation == NAME:
            _refuse_own_attention(model, text)

    checked._memattn_guards = post_init  # pyright: ignore[reportAttributeAccessIssue]
    return checked


def _has_spans(config: PreTrainedConfig) -> bool:
    """Whether a configuration has its own segment length or window."""
    return any(vars(config).get(field) is not None for field in FIELDS)


def _names_it(requested: Any) -> bool:
    """Whether an implementation, or that of a sub-model, is this one."""
    if isinstance(requested, dict):
        return any(map(_names_it, requested.values()))
    return requested == NAME


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text model's configuration in a multimodal one; else the configuration itself."""
    text = config.get_text_config(decoder=True)
    return text if any(text is value for value in vars(config).values()) else config


def _config_field(name: str) -> property:
    """A field of every configuration that selects this implementation when set.

    transformers does not save a model's implementation, but reads one from ``config.json``.
    """

    def get(config: PreTrainedConfig) -> Any:
        config = _text_config(config)
        if name not in vars(config):
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")
        return vars(config)[name]

    def put(config: PreTrainedConfig, value: int | None) -> None:
        whole, config = config, _text_config(config)
        vars(config)[name] = value
        if _has_spans(config):
            vars(config)["attn_implementation"] = NAME
            if vars(config).get("_attn_implementation_internal") is None:
                vars(config)["_attn_implementation_internal"] = (
                    NAME  # at loading, unless another is given
                )
        else:
            vars(config).pop("attn_implementation", None)
        if config is not whole:  # read by a process without memattn
            names = (key for key, inner in vars(whole).items() if inner is config)
            vars(whole)["attn_implementation"] = {next(names): NAME}
            if not _has_spans(config):
                del vars(whole)["attn_implementation"]

    return property(get, put)


def _refuse_own_attention(model: nn.Module, text: PreTrainedConfig) -> None:
    """Raise NotImplementedError if a configuration's model cannot use this implementation."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module.config is not text:
            continue
        own = _own_attention(module)
        if own is None and module._can_set_attn_implementation():
            continue
        detail = "" if own is None else f" with {own}"
        raise NotImplementedError(
            f"model must be one whose attention transformers can choose, for "
            f'attn_implementation="{NAME}", got {type(module).__name__}{detail}; take a model of '
            "another family, such as Llama, Qwen or Mistral"
        )


def _own_attention(model: nn.Module) -> str | None:
    """The name of a model's class that needs a full mask, or None.

    transformers only checks the model's file, in which another sub-model may use the attention
    interface (in GIT the image encoder).
    """
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if "Attention" in kind.__name__ and _needs_mask(kind):
            return kind.__name__
    return None


@functools.cache
def _needs_mask(kind: type[nn.Module]) -> bool:
    """Whether a class computes a softmax without the attention interface, or changes its mask.

    Also sparse attention that selects keys by their values (with an indexer).
    """
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # a class without a source file
        return False
    if "get_interface(" not in code:
        return "softmax(" in code
    return WORKED_ON.search(code) is not None
