"""Deferred imports: large packages are imported in part, which shortens the start of a script."""

import gc
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Package(types.ModuleType):
    """A package whose __init__ runs at the first access to a name other than an imported submodule."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


class _Functions(types.ModuleType):
    """Placeholder for a module of functions; each imports the module when it is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        return lambda *args, **options: getattr(importlib.import_module(self.__name__), name)(*args, **options)


def package(name: str) -> types.ModuleType:
    """Import the package ``name`` without running its __init__, so that one submodule can be imported without the rest.

    Other code sees an imported package: its __init__ runs when one of its names is used. A package that is already
    imported is returned as it is. Raises ModuleNotFoundError when it is not installed.
    """
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _Package
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return sys.modules[name]


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Context without garbage collection, which takes a tenth of a script's start: imported objects stay anyway."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def functions_of(*names: str) -> Iterator[None]:
    """Context in which functions imported from the modules ``names`` import those modules when they are called."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update({name: _Functions(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
