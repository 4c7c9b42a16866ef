"""Files that are whole or absent, never half: everything is written beside its place and renamed into it."""

import json
import os
import sys
from pathlib import Path

import cv2
import torch

from utils.cli import InputError


def _replace(path, write):
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); free some space or choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)


def save(state, path):
    """torch.save ``state`` to ``path`` atomically."""
    _replace(path, lambda file: torch.save(state, file))


def load(path, device="cpu"):
    """What ``save`` wrote; InputError when the file is missing, damaged or holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no weights at {path}; check the path") from error
    except Exception as error:  # a damaged file shows as any of pickle's, zipfile's and torch's errors
        raise InputError(f"{path} is not a readable weights file; train or copy it again") from error


def save_newest(state, path):
    """``save``, keeping what was at ``path`` beside it as <stem>_before.pt."""
    if path.exists():
        os.replace(path, _before(path))
    save(state, path)


def load_newest(path, device="cpu"):
    """What ``save_newest`` wrote last, or before that when the newest file is damaged or missing; None without one.

    InputError when none can be read.
    """
    there = [candidate for candidate in (path, _before(path)) if candidate.exists()]
    for candidate in there:
        try:
            return load(candidate, device)
        except InputError as error:
            if candidate is there[-1]:
                raise
            print(f"{error}; going on from the one before it", file=sys.stderr)
    return None


def _before(path):
    return path.with_name(f"{path.stem}_before{path.suffix}")


def save_json(value, path):
    """Write ``value`` as JSON to ``path`` atomically."""
    _replace(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_png(array, path):
    """Write uint8 [H,W] or RGB [H,W,3] as a PNG to ``path`` atomically."""
    bgr = array if array.ndim == 2 else array[..., ::-1]
    _replace(path, lambda file: file.write(cv2.imencode(".png", bgr)[1].tobytes()))
