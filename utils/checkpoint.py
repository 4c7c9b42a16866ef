"""Files that are whole or absent, never half: everything is written beside its place and renamed into it."""

import errno
import io
import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from utils.cli import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

REMEDIES = {
    errno.ENAMETOOLONG: "shorten the name it is made from",
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some space or choose another --out",
    errno.EISDIR: "remove the folder of that name or choose another --out",
}


def replace(path, write):
    """Make ``path`` what ``write(file)`` writes to a binary file, whole or, where that raises anything, not at all.

    It is written beside its place and renamed. What a process that was killed left there the next one overwrites; of
    several at once each waits for the one before. A device or a pipe is written to, not replaced. InputError when the
    system refuses.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[-60:]}.partial")  # a name may have 255 bytes
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            with open(path, "wb") as file:
                write(file)
            return
        with _own(partial) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def alone(folder):
    """Within it no other process is in here with the same folder; InputError where one is already.

    What a process that was killed had is free at once.
    """
    with open(Path(folder) / ".lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would last as long as the loader's processes
            except (BlockingIOError, PermissionError) as error:
                raise InputError(f"another process is at work in {folder}; wait for it or stop it") from error
            except OSError:
                pass  # a file system without locks
        yield


def _own(partial):
    """``partial``, empty and open for this process and thread alone."""
    while True:
        file = open(partial, "a+b")
        if fcntl is None:
            break
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                break
        file.close()  # whoever had it has renamed it meanwhile
    file.truncate(0)
    return file


def cannot_write(path, error):
    """The InputError for an OSError in writing ``path``."""
    remedy = REMEDIES.get(error.errno, "check the rights of its folder or choose another --out")
    return InputError(f"cannot write {path} ({error.strerror}); {remedy}")


def save(state, path):
    """torch.save ``state`` to ``path`` atomically."""
    whole = io.BytesIO()  # to a disk that is full, torch itself fails with errors that do not say so
    torch.save(state, whole)
    replace(path, lambda file: file.write(whole.getbuffer()))


def load(path, device="cpu"):
    """What ``save`` wrote; InputError when the file is missing, damaged or holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no weights at {path}; check the path") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"cannot read the weights {path} ({error.strerror}); check the path and its rights") from error
    except Exception as error:  # a damaged file shows as any of pickle's, zipfile's and torch's errors
        raise InputError(f"{path} is not a readable weights file; train or copy it again") from error


def is_finite(state):
    """Whether all numbers in the tensors of ``state``, dicts and lists of whatever depth, are finite."""
    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or state.isfinite().all().item()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(map(is_finite, values))


def save_newest(state, path):
    """``save``, keeping what was at ``path`` beside it as <stem>_before.pt."""
    if path.exists():
        os.replace(path, _before(path))
    save(state, path)


def load_newest(path, device="cpu"):
    """What ``save_newest`` wrote last, or before that when the newest file is missing, damaged or not finite; None
    without one.

    InputError when none can be read.
    """
    there = [candidate for candidate in (path, _before(path)) if candidate.exists()]
    for candidate in there:
        try:
            state = load(candidate, device)
            if not is_finite(state):
                raise InputError(f"{candidate} holds numbers that are not finite; delete its folder to start anew")
        except InputError as error:
            if candidate is there[-1]:
                raise
            print(f"{error}; going on from the one before it", file=sys.stderr)
            continue
        if candidate != path:
            path.unlink(missing_ok=True)  # the next save would keep it in the place of this one
        return state
    return None


def _before(path):
    return path.with_name(f"{path.stem}_before{path.suffix}")


def save_json(value, path):
    """Write ``value`` as JSON to ``path`` atomically."""
    replace(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_png(array, path):
    """Write uint8 [H,W] or RGB [H,W,3] as a PNG to ``path`` atomically."""
    bgr = array if array.ndim == 2 else array[..., ::-1]
    replace(path, lambda file: file.write(cv2.imencode(".png", bgr)[1].tobytes()))


def save_labels(labels, path):
    """Write a label map, uint8 [H,W], as a PNG of palette indices: pictures for viewers, labels for those who read the
    indices (Pillow, datasets.masks.read_instance_mask)."""
    picture = Image.fromarray(labels)
    picture.putpalette(_palette().tobytes())
    replace(path, lambda file: picture.save(file, "PNG", compress_level=1))


def _palette():
    """VOC's colours, uint8 [256,3]: 0 is black, and numbers that follow each other are far apart."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1  # [256,8], the lowest first
    # Bits 0, 3, 6 make red, 1, 4, 7 green, 2 and 5 blue; the lowest bit of a number is the highest of a colour.
    channels = [sum(bits[:, 3 * k + c] << 7 - k for k in range(3) if 3 * k + c < 8) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8)
