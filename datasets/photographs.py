"""Photographs by the names that tables and annotation tools give them, which are often not quite those of the files."""

import os
import unicodedata
from collections import Counter
from functools import cached_property
from pathlib import Path

from datasets.images import SUFFIXES
from utils.cli import InputError


class Photographs:
    """The photographs of a folder, found by the names that a file of labels uses.

    A name may have backslashes, begin with folders that are not here (``images/``, those of another machine), differ
    in the case of its letters or in how accents are composed, and lack its suffix. Folders are ignored only where the
    rest of the name is that of no other photograph.

    folder: where they lie; names: all that the labels have.
    """

    def __init__(self, folder, names):
        self.folder, self.names = Path(folder), names
        self.listed = {}  # folder: its files by name and by stem

    @cached_property
    def tails(self):
        """How many names end so."""
        return Counter(_key("/".join(tail)) for name in set(self.names) for tail in _tails(name))

    def find(self, name, where):
        """The Path of the photograph ``name``; InputError, beginning with ``where``, when it is not there."""
        exact, tails = self.folder / name, _tails(name)
        if os.path.isfile(exact):  # unlike Path.is_file, it answers names that are too long
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

    def has(self, name):
        """Whether ``find`` gives a photograph."""
        try:
            return bool(self.find(name, ""))
        except InputError:
            return False

    def _match(self, path, where):
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

    def _files(self, folder):
        """({name: Paths}, {stem: Paths}) of the pictures in a folder, names as ``_key`` makes them."""
        if folder not in self.listed:
            names, stems = self.listed[folder] = {}, {}
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if _stem(name) != name and not name.startswith("."):
                    names.setdefault(_key(name), []).append(folder / name)
                    stems.setdefault(_key(_stem(name)), []).append(folder / name)
        return self.listed[folder]


def _tails(name):
    """The parts of a path, then without the first, the first two, ..."""
    parts = [part for part in str(name).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return [parts[start:] for start in range(len(parts))]


def _stem(name):
    """A file's name without the suffix of a picture: a name may hold other dots."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _key(name):
    return unicodedata.normalize("NFC", name).casefold()
