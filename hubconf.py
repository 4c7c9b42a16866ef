"""The predictor for torch.hub, from this folder or from its repository:

    found = torch.hub.load("path/to/this/folder", "wsid_net", source="local").predict(array)

Packages of other projects named datasets, models, utils, engine or ops may be loaded or not: they are left as they are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.predictor import Predictor

dependencies = ["torch", "torchvision", "timm", "numpy", "scipy", "cv2", "PIL", "pycocotools"]

_ROOT = Path(__file__).resolve().parent
_PACKAGES = ("datasets", "engine", "models", "ops", "utils")
# torch.hub imports this file anew in every call. What it keeps is in a module that stays: the modules of this
# repository, once they are loaded, and a lock for all calls.
_kept = vars(sys.modules.setdefault("_wsid_net", ModuleType("_wsid_net")))
_own: dict[str, ModuleType] = _kept.setdefault("own", {})
_lock = _kept.setdefault("lock", RLock())


def wsid_net(weights: Any = None, device: Any = "cpu", **options: Any) -> "Predictor":
    """A Predictor: ``.predict(array)`` gives the salient instances of a photograph, uint8 RGB [H,W,3].

    weights: a file; None takes the bundled student. device, options (count, amp, method, settings ...): as of
    engine.predictor.Predictor. The predictor cannot be pickled, because its modules are not importable by their names.
    Raises InputError (utils.cli) as Predictor does.
    """
    with _own_packages():
        import numpy as np

        from engine.predictor import BUNDLED_STUDENT, Predictor

        predictor = Predictor(weights or BUNDLED_STUDENT, device, **options)
        predictor.predict(np.zeros((32, 32, 3), np.uint8))  # whatever is imported on first use is imported here
    return predictor


@contextmanager
def _own_packages() -> Iterator[None]:
    """``import datasets`` and so on import those of this repository; afterwards what they imported before."""
    with _lock:
        others = {name: sys.modules.pop(name) for name in _loaded()}
        # If this repository is what is imported already, as in infer.py, its modules stay: operators load only once.
        _own.update({name: module for name, module in others.items() if _is_own(others, name)})
        sys.modules.update(_own)
        sys.path.insert(0, str(_ROOT))
        try:
            yield
        finally:
            sys.path.remove(str(_ROOT))
            _own.update({name: sys.modules.pop(name) for name in _loaded()})
            sys.modules.update(others)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]


def _is_own(modules: dict[str, ModuleType], name: str) -> bool:
    folders = getattr(modules.get(name.partition(".")[0]), "__path__", [])
    return any(Path(folder).parent == _ROOT for folder in folders)
