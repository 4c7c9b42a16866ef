"""Digests of contents, by which a result records what it was made from.

They depend on contents alone, so that a run that is moved, or data that is named by another path, keeps them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from utils.cli import InputError


def of_bytes(*parts: bytes) -> str:
    """The digest of the concatenated byte strings, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def of_value(value: Any) -> str:
    """The digest of a JSON value; the order of the keys of dictionaries does not matter."""
    return of_bytes(json.dumps(value, sort_keys=True).encode())


def of_file(path: str | Path) -> str:
    """The digest of a file's content; InputError when it cannot be read.

    A process reads a file once, and again only when its size or modification time has changed.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _of_content(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error


def of_files(paths: Iterable[str | Path]) -> list[str]:
    """The digests of files in their order; InputError as in ``of_file``."""
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        return list(pool.map(of_file, paths))


def of_state(state: Mapping[str, torch.Tensor]) -> str:
    """The digest of a state dict: names, types, shapes and values of its tensors, whatever their device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def _of_content(path: Path, size: int, modified: int) -> str:
    """size in bytes and modified in nanoseconds are part of the cache's key."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=8)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
