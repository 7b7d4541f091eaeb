"""Register the models with transformers' auto classes, without importing transformers.

``import memattn`` loads neither transformers nor the models. The first call of ``AutoConfig``,
which every auto class uses to find the type of a folder, loads ``memattn.models``, and that
registers the models. This works whichever package is imported first.
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
ASKED = ("from_pretrained", "for_model")  # methods of AutoConfig that look up a model type


def register_when_asked() -> None:
    """Register the models at the first call of ``AutoConfig``, now or after a later import."""
    module = sys.modules.get(HOME)
    if hasattr(module, "AutoConfig"):
        _watch(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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


class _Finder(MetaPathFinder):
    """Import hook for one module: finds it normally and calls a function after it was executed."""

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
    """Loads a module with its own loader, and restores that loader afterwards."""

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
