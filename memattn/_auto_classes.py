"""Register the models with transformers' auto classes, without importing transformers.

``import memattn`` loads neither transformers nor the models. The first call of ``AutoConfig``,
which every auto class uses to find the type of a folder, loads ``memattn.models``, and that
registers the models. This works whichever package is imported first.
"""

import functools
from importlib import import_module
from typing import Any

from memattn._when_imported import when_imported

HOME = "transformers.models.auto.configuration_auto"
ASKED = ("from_pretrained", "for_model")  # methods of AutoConfig that look up a model type


def register_when_asked() -> None:
    """Register the models at the first call of ``AutoConfig``, now or after a later import."""
    when_imported(HOME, "AutoConfig", _watch)


def _watch(module: Any) -> None:
    """Replace methods of ``AutoConfig`` until their first call, which loads the models."""
    auto: Any = module.AutoConfig
    own = {name: vars(auto)[name] for name in ASKED}

    def first(name: str) -> classmethod:
        @functools.wraps(getattr(auto, name))
        def method(cls: Any, *args: Any, **kwargs: Any) -> Any:
            import_module("memattn.models")
            for other, mine in put.items():
                if (
                    vars(auto)[other] is mine
                ):  # not if someone else, or another thread, has replaced it since
                    setattr(auto, other, own[other])
            return own[name].__get__(None, cls)(*args, **kwargs)

        return classmethod(method)

    put = {name: first(name) for name in ASKED}
    for name, method in put.items():
        setattr(auto, name, method)
