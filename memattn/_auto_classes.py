"""Lets transformers' auto classes know the models of this package without loading either.

``import memattn`` loads neither transformers nor the models. Whichever of the two packages comes
first: the first call of ``AutoConfig``, by which every auto class finds out what a folder holds,
loads ``memattn.models``, which registers all there is.
"""

import functools
from importlib import import_module
from typing import Any

from memattn._when_imported import when_imported

HOME = "transformers.models.auto.configuration_auto"
ASKED = ("from_pretrained", "for_model")  # methods of AutoConfig that look for a model's type


def register_when_asked() -> None:
    """Register the models at the first call of ``AutoConfig``, once that is there."""
    when_imported(HOME, "AutoConfig", _watch)


def _watch(module: Any) -> None:
    """Put methods that load the models in place of those of ``AutoConfig``, for one call."""
    auto: Any = module.AutoConfig
    own = {name: vars(auto)[name] for name in ASKED}

    def first(name: str) -> classmethod:
        @functools.wraps(getattr(auto, name))
        def method(cls: Any, *args: Any, **kwargs: Any) -> Any:
            import_module("memattn.models")
            for other, mine in put.items():
                if vars(auto)[other] is mine:  # not what somebody put there since, or a thread did
                    setattr(auto, other, own[other])
            return own[name].__get__(None, cls)(*args, **kwargs)

        return classmethod(method)

    put = {name: first(name) for name in ASKED}
    for name, method in put.items():
        setattr(auto, name, method)
