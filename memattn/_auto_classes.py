"""Lets transformers' auto classes know the models of this package without loading either.

``import memattn`` loads neither transformers nor the models. Whichever of the two packages comes
first: the first call of ``AutoConfig``, by which every auto class finds out what a folder holds,
loads ``memattn.models``, which registers all there is.
"""

import functools
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOME = "transformers.models.auto.configuration_auto"
ASKED = ("from_pretrained", "for_model")  # methods of AutoConfig that look for a model's type


def register_when_asked() -> None:
    """Register the models at the first call of ``AutoConfig``, once that is there."""
    module = sys.modules.get(HOME)
    if hasattr(module, "AutoConfig"):
        _watch(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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


class _Finder(MetaPathFinder):
    """Finds one module as everybody does, and has a look at it when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOME:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(fullname, path, target)
            if found is not None:
                if found.loader is not None:
                    found.loader = _Loader(self, found.loader)
                return found
        return None


class _Loader(Loader):
    """Loads a module by its own loader, which it then has again."""

    def __init__(self, finder: _Finder, loader: Loader) -> None:
        self.finder, self.loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _watch(module)
