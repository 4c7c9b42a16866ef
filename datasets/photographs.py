"""Finding photographs by the names in tables and annotations, which often differ slightly from the file names."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from datasets.listing import SUFFIXES
from utils.cli import InputError

Index = dict[str, list[Path]]  # files by a normalized name


class Photographs:
    """The photographs of a folder, found by the names in a file of labels.

    A name may contain backslashes, begin with folders that do not exist here (``images/``, those of another machine),
    differ in upper and lower case or in the composition of accents, and lack its suffix. Folders are ignored only when
    the rest of the name belongs to no other photograph.

    folder: of the photographs; names: all names in the labels.
    """

    def __init__(self, folder: str | Path, names: Iterable[str]) -> None:
        self.folder, self.names = Path(folder), list(names)
        self.listed: dict[Path, tuple[Index, Index]] = {}

    @cached_property
    def tails(self) -> Counter[str]:
        """{normalized end of a path: how many names have it}."""
        return Counter(_key("/".join(tail)) for name in set(self.names) for tail in _tails(name))

    def find(self, name: str, where: str) -> Path:
        """The Path of the photograph ``name``; InputError, beginning with ``where``, when missing or ambiguous."""
        exact, tails = self.folder / name, _tails(name)
        if os.path.isfile(exact):  # unlike Path.is_file, it returns False for names that are too long
            return exact
        for tail in tails:
            if len(tail) < len(tails[0]) and self.tails[_key("/".join(tail))] > 1:
                break
            path = self._match(self.folder.joinpath(*tail), where)
            if path is not None:
                return path
        like = self._files(self.folder)[1].get(_key(_stem(tails[-1][-1]))) if tails else None
        hint = f" (there is {', '.join(path.name for path in like)})" if like else ""
        raise InputError(f"{where} names the image {exact}, which is missing{hint}; add the file or remove its label")

    def has(self, name: str) -> bool:
        """Whether ``find`` returns a photograph."""
        try:
            return bool(self.find(name, ""))
        except InputError:
            return False

    def _match(self, path: Path, where: str) -> Path | None:
        if os.path.isfile(path):
            return path
        names, stems = self._files(path.parent)
        found = names.get(_key(path.name)) or (stems.get(_key(path.name)) if _stem(path.name) == path.name else None)
        if found and len(found) > 1:
            raise InputError(
                f"{where} names {path.name}, which may be {' or '.join(file.name for file in found)}; "
                "write the whole name"
            )
        return found[0] if found else None

    def _files(self, folder: Path) -> tuple[Index, Index]:
        """The pictures in a folder by name and by stem, normalized by ``_key``."""
        if folder not in self.listed:
            names: Index = {}
            stems: Index = {}
            self.listed[folder] = names, stems
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if _stem(name) != name and not name.startswith("."):
                    names.setdefault(_key(name), []).append(folder / name)
                    stems.setdefault(_key(_stem(name)), []).append(folder / name)
        return self.listed[folder]


def _tails(name: str) -> list[list[str]]:
    """The parts of a path, then those without the first, without the first two, ..."""
    parts = [part for part in str(name).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return [parts[start:] for start in range(len(parts))]


def _stem(name: str) -> str:
    """A file name without its picture suffix; other dots stay."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
