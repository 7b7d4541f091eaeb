"""What chooses memattn_segmented for a model: its name, or fields of a configuration.

A model that would attend by itself, or works on the mask that it is given, is refused.
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
# a mask that is indexed, asked for its shape or dtype, or put beside others
WORKED_ON = re.compile(r"\battention_mask(\[|\.\w)|cat\(\[attention_mask\b")


def register_choice() -> None:
    """Give configurations the fields, and models the checks."""
    for name in FIELDS:
        setattr(PreTrainedConfig, name, _config_field(name))
    for method in ("set_attn_implementation", "get_correct_attn_implementation"):
        if not hasattr(getattr(PreTrainedModel, method), "_memattn_guards"):
            setattr(PreTrainedModel, method, _guarded(getattr(PreTrainedModel, method)))
    if not hasattr(PreTrainedModel.post_init, "_memattn_guards"):
        PreTrainedModel.post_init = _checked(PreTrainedModel.post_init)


def _guarded(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A method that chooses the implementation, for models that would use it.

    transformers warns about others, or lets them attend without any mask.
    """

    @functools.wraps(choose)
    def guarded(model: PreTrainedModel, requested: Any, *args: Any, **kwargs: Any) -> Any:
        if _names_it(requested):
            _refuse_own_attention(model, _text_config(model.config))
        elif requested is None and _has_spans(model.config):
            # the configuration around that of a text model has reset what that one chose
            requested = NAME
        return choose(model, requested, *args, **kwargs)

    guarded._memattn_guards = choose  # pyright: ignore[reportAttributeAccessIssue]
    return guarded


def _checked(post_init: Callable[..., None]) -> Callable[..., None]:
    """The end of making a model, for which an implementation may be chosen before its parts are."""

    @functools.wraps(post_init)
    def checked(model: PreTrainedModel) -> None:
        post_init(model)
        text = _text_config(model.config)
        if text._attn_implementation == NAME:
            _refuse_own_attention(model, text)

    checked._memattn_guards = post_init  # pyright: ignore[reportAttributeAccessIssue]
    return checked


def _has_spans(config: PreTrainedConfig) -> bool:
    """Whether a configuration itself has a segment length or a window."""
    return any(vars(config).get(field) is not None for field in FIELDS)


def _names_it(requested: Any) -> bool:
    """Whether an implementation, or that of some part of a model, is this one."""
    if isinstance(requested, dict):
        return any(map(_names_it, requested.values()))
    return requested == NAME


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model among several; else the same."""
    text = config.get_text_config(decoder=True)
    return text if any(text is value for value in vars(config).values()) else config


def _config_field(name: str) -> property:
    """A field of every configuration that chooses this implementation once it has a value.

    transformers does not save the implementation of a model, but reads one from ``config.json``.
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
                vars(config)["_attn_implementation_internal"] = NAME  # at loading, if none is named
        else:
            vars(config).pop("attn_implementation", None)
        if config is not whole:  # a process without memattn reads this one
            names = (key for key, inner in vars(whole).items() if inner is config)
            vars(whole)["attn_implementation"] = {next(names): NAME}
            if not _has_spans(config):
                del vars(whole)["attn_implementation"]

    return property(get, put)


def _refuse_own_attention(model: nn.Module, text: PreTrainedConfig) -> None:
    """Raise NotImplementedError if the model of a configuration would not do with it."""
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
    """The name of a class of a model that needs a mask of all pairs, or None.

    transformers looks into the file of a model, where the attention of another part may ask for an
    implementation: in GIT that of the part that sees pictures.
    """
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if "Attention" in kind.__name__ and _needs_mask(kind):
            return kind.__name__
    return None


@functools.cache
def _needs_mask(kind: type[nn.Module]) -> bool:
    """Whether a class has a softmax and asks for no implementation, or makes a mask of its mask.

    So do choices of keys by their values (sparse attention with an indexer).
    """
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # made where there is no file
        return False
    if "get_interface(" not in code:
        return "softmax(" in code
    return WORKED_ON.search(code) is not None
