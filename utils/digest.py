"""Digests: short names of contents, by which a result knows what it was made from.

They depend on contents alone, so that a run that is moved, or data that is named by another path, keeps them.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from utils.cli import InputError


def of_bytes(*parts):
    """The digest of byte strings one after another, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def of_value(value):
    """The digest of a plain value: what JSON can hold, the keys of dictionaries in any order."""
    return of_bytes(json.dumps(value, sort_keys=True).encode())


def of_file(path):
    """The digest of a file's content; InputError when it cannot be read.

    Within a process a file is read again only when its size or its time has changed.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _of_content(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error


def of_files(paths):
    """The digests of files, as a list in their order; InputError as in ``of_file``."""
    with ThreadPoolExecutor() as pool:  # hashing leaves Python: as fast as the disk and the cores allow
        return list(pool.map(of_file, paths))


def of_state(state):
    """The digest of a state dict: names, types, shapes and values of its tensors, on whatever device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@cache
def _of_content(path, size, time):
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=8)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
