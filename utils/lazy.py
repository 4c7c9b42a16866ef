"""Large packages imported in part: what a script never asks them for is imported when it is first asked for."""

import gc
import importlib.util
import sys
import types
from contextlib import contextmanager


class _Package(types.ModuleType):
    """A package whose __init__ has not run: it does when a name is asked for that is no submodule already imported."""

    def __getattr__(self, name):
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        self.__class__ = types.ModuleType
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


class _Functions(types.ModuleType):
    """Stands for a module of functions; each imports the module when it is called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        return lambda *args, **options: getattr(importlib.import_module(self.__name__), name)(*args, **options)


def package(name):
    """Import the package ``name`` without running its __init__, so that one submodule can be had without the others.

    To everyone else it is as if it were imported: the rest follows when it is asked for. One that is imported already
    stays as it is. Returns it.
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
def without_collection():
    """Within it Python does not look for garbage, which takes a tenth of a start: nearly all that is imported stays."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def functions_of(*names):
    """Within it, whoever imports functions from the modules ``names`` gets them without the modules being imported."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update({name: _Functions(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
