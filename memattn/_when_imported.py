"""Import hook: changes a module of another package after it was executed, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, needs: str, change: Callable[[Any], None]) -> None:
    """Call ``change`` with a module, now if it is imported already, or after a later import.

    Args:
        name: Full name of the module.
        needs: An attribute that the module has once it was executed.
        change: Function of the module, called once.
    """
    module = sys.modules.get(name)
    if hasattr(module, needs):
        change(module)
    elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, change))


class _Finder(MetaPathFinder):
    """Import hook for one module: finds it normally and calls a function after it was executed."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
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
        self.finder.change(module)
