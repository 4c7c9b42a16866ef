"""Weights and training states on disk."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils import files
from utils.cli import InputError


def save(state: Any, path: str | Path) -> None:
    """torch.save ``state`` to ``path`` atomically; InputError when the system refuses to write."""
    content = io.BytesIO()  # on a full disk torch's own writer fails with errors that do not name the cause
    torch.save(state, content)
    files.write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """What ``save`` wrote; InputError when the file is missing, damaged or holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no weights at {path}; check the path") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"cannot read the weights {path} ({error.strerror}); check the path and its rights") from error
    except Exception as error:  # a damaged file raises any of pickle's, zipfile's and torch's errors
        raise InputError(f"{path} is not a readable weights file; train or copy it again") from error


def require_own(path: Path, is_own: Callable[[dict[str, Any]], bool], source: Path | None = None) -> None:
    """InputError when a training would overwrite ``path`` with its result though it holds something else.

    is_own: whether the content of the file is such a result. source: the file that the training starts from, which it
    may not replace either. A damaged file is no loss.
    """
    if not path.exists():
        return
    try:
        saved = load(path)
    except InputError:
        return
    is_source = source is not None and source.exists() and path.samefile(source)
    if is_source or not (isinstance(saved, dict) and is_own(saved)):
        raise InputError(f"{path} would be overwritten, which this training has not made; give another --out")


def is_finite(state: Any) -> bool:
    """Whether all numbers in the tensors of ``state``, nested dicts and lists of any depth, are finite."""
    if isinstance(state, torch.Tensor):
        # Its sum, which is the quickest way to read every value.
        return not state.is_floating_point() or bool(state.sum(dtype=torch.float32).isfinite())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(map(is_finite, values))


def save_newest(state: Any, path: Path) -> None:
    """``save``, keeping the previous file as <stem>_before.pt."""
    if path.exists():
        os.replace(path, _previous(path))
    save(state, path)


def load_newest(path: Path, device: str | torch.device = "cpu") -> Any:
    """The last state of ``save_newest``, or the previous one when the last is missing, damaged or not finite; None when
    there is no file.

    Raises InputError when no file can be read.
    """
    candidates = [candidate for candidate in (path, _previous(path)) if candidate.exists()]
    for candidate in candidates:
        try:
            state = load(candidate, device)
            if not is_finite(state):
                raise InputError(f"{candidate} holds numbers that are not finite; delete its folder to start anew")
        except InputError as error:
            if candidate is candidates[-1]:
                raise
            print(f"{error}; going on from the one before it", file=sys.stderr)
            continue
        if candidate != path:
            path.unlink(missing_ok=True)  # else the next save would keep the damaged file instead of this one
        return state
    return None


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}_before{path.suffix}")
