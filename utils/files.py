"""Atomic files: each is written beside its place and renamed, so that it is either complete or absent."""

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image

from utils.cli import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_JPEG_SIDE = 65_500
ENDS = {".png": b"IEND", ".jpg": b"\xff\xd9"}
REMEDIES = {
    errno.ENAMETOOLONG: "shorten the name it is made from",
    errno.ENOSPC: "free some space or choose another --out",
    errno.EDQUOT: "free some space or choose another --out",
    errno.EISDIR: "remove the folder of that name or choose another --out",
}


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Replace the file ``path`` by what ``write(file)`` writes; when that raises, the old file stays.

    The data go to a hidden file in the same folder, which is renamed at the end. A hidden file that a killed process
    left is overwritten; processes that write the same path at once wait for each other. To a device or a pipe the data
    are written directly. sync: whether the data are on the disk before the file is renamed; without, which is faster,
    the file may lack data after a power failure (``is_complete``).

    Raises InputError when the system refuses to write.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[-60:]}.partial")  # a file name is limited to 255 bytes
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            with open(path, "wb") as file:
                write(file)
            return
        with _open_exclusively(partial) as file:
            try:
                write(file)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames no open file
                os.replace(partial, path)
            except BaseException:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise write_error(path, error) from error


def is_complete(path: str | Path) -> bool:
    """Whether the file ``path`` is there and has an end, which a power failure may take from one that was not synced:
    that of its format for PNG and JPEG, else any byte but 0."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(64, os.stat(path).st_size), os.SEEK_END)
            end = file.read()
    except OSError:
        return False
    mark = ENDS.get(Path(path).suffix)
    return mark in end if mark else end.strip(b"\0") != b""


def write_error(path: str | Path, error: OSError) -> InputError:
    """The InputError for an OSError that was raised while ``path`` was written."""
    remedy = REMEDIES.get(error.errno or 0, "check the rights of its folder or choose another --out")
    return InputError(f"cannot write {path} ({error.strerror}); {remedy}")


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Context in which no other process holds the lock of ``folder``; InputError when one holds it already.

    The system releases the lock of a process that is killed.
    """
    with open(Path(folder) / ".lock", "w") as file:
        if fcntl is not None:
            try:
                # Not flock, whose lock lives on in the data loader's processes.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise InputError(f"another process is at work in {folder}; wait for it or stop it") from error
            except OSError:
                pass  # a file system without locks
        yield


def save_json(value: Any, path: str | Path) -> None:
    """Write ``value`` as JSON to ``path`` atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_png(array: np.ndarray, path: str | Path, sync: bool = True) -> None:
    """Write uint8 [H,W], RGB [H,W,3] or RGBA [H,W,4] as a PNG to ``path``; sync: as of ``write_atomically``."""
    bgr = array if array.ndim == 2 else np.dstack([array[..., 2::-1], array[..., 3:]])
    write_atomically(path, lambda file: file.write(cv2.imencode(".png", bgr)[1].tobytes()), sync)


def save_jpeg(array: np.ndarray, path: str | Path, sync: bool = True) -> None:
    """Write uint8 RGB [H,W,3] as a JPEG of quality 90 to ``path``, reduced to the 65,500 pixels a side that the format
    can have; sync: as of ``write_atomically``."""
    if (longest := max(array.shape)) > MAX_JPEG_SIDE:
        height, width = (max(1, side * MAX_JPEG_SIDE // longest) for side in array.shape[:2])
        array = cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    write_atomically(path, lambda file: file.write(encoded.tobytes()), sync)


def save_label_png(labels: np.ndarray, path: str | Path, sync: bool = True) -> None:
    """Write a label map, uint8 [H,W], as a palette PNG: viewers show colours, readers of the indices get the labels
    (Pillow, ``datasets.masks.read_instance_mask``). sync: as of ``write_atomically``."""
    picture = Image.fromarray(labels)
    picture.putpalette(_voc_palette().tobytes())
    # Runs of equal labels: on label maps as fast as the default strategy of zlib, and files of half the size.
    write_atomically(path, lambda file: picture.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE), sync)


def _open_exclusively(partial: Path) -> BinaryIO:
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
        file.close()  # the process that held the lock has renamed the file meanwhile
    file.truncate(0)
    return file


def _voc_palette() -> np.ndarray:
    """VOC's colours, uint8 [256,3]: 0 is black, and consecutive numbers have very different colours."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1  # [256,8], the lowest first
    # Bits 0, 3, 6 make red, 1, 4, 7 green, 2 and 5 blue; the lowest bit of a number is the highest of a colour.
    channels = [sum(bits[:, 3 * k + c] << 7 - k for k in range(3) if 3 * k + c < 8) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8)
