"""The output folder of infer.py: pictures, COCO records, and the journal from which a stopped run continues."""

import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import cv2
import numpy as np

from datasets.masks import prediction_records
from engine import visualize
from models import MAX_INSTANCES
from utils import digest, files
from utils.cli import InputError

if TYPE_CHECKING:
    from engine.predictor import Prediction

PICTURES = ("instances", "overlay")
MAPS = ("saliency", "boundary", "offsets")
Records = list[dict[str, Any]]


class Results:
    """The results of one setting in a folder.

    folder: an existing folder. identity: a plain value of all that the results depend on besides the photographs.
    maps: those of ``MAPS`` that are written as pictures too. saliency_dir: the folder of maps that replace S, or None.
    ids: a function from stems to {stem: image_id}, or None where the stem is the image_id.

    Every finished photograph is a line of ``journal``, a file named by the identity. predictions.json is made from it,
    and a run of the same identity skips the photographs in it. Several runs or processes with one identity append to
    one journal; the first result of another identity deletes the journals and the predictions.json before it. The
    methods may be called from several threads.
    """

    def __init__(
        self,
        folder: Path,
        identity: Any,
        maps: Sequence[str] = (),
        saliency_dir: Path | None = None,
        ids: Callable[[Sequence[str]], dict[str, Any]] | None = None,
    ) -> None:
        self.folder, self.saliency_dir, self.ids = folder, saliency_dir, ids
        self.kinds = PICTURES + tuple(maps)
        identity = digest.of_value([identity, self.kinds, bool(saliency_dir)])
        self.journal = folder / f"finished-{identity}.jsonl"
        self.lock = threading.Lock()
        self.file: BinaryIO | None = None

    def pictures(self, stem: str) -> list[Path]:
        """The pictures of the photograph ``stem``, whether they are written yet or not."""
        return [self.folder / f"{stem}_{kind}.png" for kind in self.kinds]

    def without_clashes(self, paths: Sequence[Path]) -> tuple[list[Path], list[InputError]]:
        """``paths`` without the photographs whose results would overwrite others, and an InputError for each of those.

        Among several paths, pictures that are results according to the journals of this folder are dropped silently.
        """
        unique = {(os.path.realpath(path), path.stem): path for path in paths}  # a link may have a stem of its own
        home = os.path.realpath(self.folder)
        journals = list(self.folder.glob("finished-*.jsonl"))
        stems = {stem for journal in journals for stem in _read(journal)}
        names = {f"{stem}_{kind}.png" for stem in stems for kind in PICTURES + MAPS}
        names |= {"predictions.json", *(journal.name for journal in journals)} if journals else set()
        results = {os.path.join(home, name) for name in names}
        photographs = {real for real, _ in unique} - results
        kept: dict[str, Path] = {}
        errors = []
        for (real, _), path in unique.items():
            if real in results and len(unique) > 1:
                continue
            overwritten = [p for p in self.pictures(path.stem) if os.path.join(home, p.name) in photographs]
            if path.stem in kept:
                errors.append(
                    InputError(
                        f"{path} and {kept[path.stem]} would write the same files, and it was left "
                        "out; rename it or give it another --out"
                    )
                )
            elif overwritten:
                errors.append(
                    InputError(
                        f"the result {overwritten[0]} would replace a photograph, so {path} was left out; choose "
                        "another --out"
                    )
                )
            else:
                kept[path.stem] = path
        return list(kept.values()), errors

    def unfinished(self, paths: Sequence[Path]) -> list[Path]:
        """The ``paths`` that have no results, or results of a file that has changed since."""
        done = _read(self.journal)
        return [
            path
            for path in paths
            if path.stem not in done
            or done[path.stem]["made_from"] != self._made_from(path)
            or not all(map(os.path.exists, self.pictures(path.stem)))
        ]

    def add(self, path: Path, image: np.ndarray, prediction: "Prediction") -> list[Path]:
        """Write the results of the photograph ``path``, uint8 RGB [H,W,3]; returns its pictures.

        Raises InputError when they cannot be written.
        """
        file = self._open()
        entry = {
            "image_id": path.stem,
            "made_from": self._made_from(path),
            "records": write_results(self.pictures(path.stem), path.stem, image, prediction),
        }
        try:
            # A single write, so that lines of several processes do not mix. The newline comes first: it ends a line
            # that a killed process left incomplete.
            file.write(b"\n" + json.dumps(entry).encode())
        except OSError as error:
            raise files.write_error(self.journal, error) from error
        return self.pictures(path.stem)

    def save(self, paths: Sequence[Path] = ()) -> Path | None:
        """Write predictions.json, the records of ``paths`` first and in their order; returns its path.

        It holds the records of all photographs in the journal whose pictures exist. With an empty journal nothing is
        written, and None is returned. Raises InputError when the file cannot be written, or when a run of another
        identity has written to the folder meanwhile.
        """
        if self.file and not self.journal.exists():
            raise InputError(
                f"another run with other settings wrote to {self.folder} meanwhile; run the command "
                "with an --out of its own"
            )
        if not _read(self.journal):
            return None
        order = {path.stem: place for place, path in enumerate(paths)}
        made_from = {path.stem: self._made_from(path) for path in paths}

        def is_current(entry: dict[str, Any]) -> bool:
            stem = entry["image_id"]
            unchanged = made_from.get(stem, entry["made_from"]) == entry["made_from"]
            return self.pictures(stem)[0].exists() and unchanged

        def write(file: BinaryIO) -> None:
            # The journal is read while the file is held, so the last of several processes writes all records.
            entries = list(filter(is_current, _read(self.journal).values()))
            entries.sort(key=lambda entry: order.get(entry["image_id"], len(order)))
            records = [record for entry in entries for record in entry["records"]]
            if self.ids:
                ids = self.ids([entry["image_id"] for entry in entries])
                records = [record | {"image_id": ids[record["image_id"]]} for record in records]
            file.write((json.dumps(records, indent=1) + "\n").encode())

        files.write_atomically(self.folder / "predictions.json", write)
        return self.folder / "predictions.json"

    def _made_from(self, path: Path) -> list[list[int]] | None:
        """Size and time of the photograph and of the map that replaces S: they change when the file does."""
        files = [path, *([self.saliency_dir / f"{path.stem}.png"] if self.saliency_dir else [])]
        try:
            return [[status.st_size, status.st_mtime_ns] for status in map(os.stat, files)]
        except OSError:
            return None  # reading the file raises the error

    def _open(self) -> BinaryIO:
        """The journal, open for appending; before the first result, those of another identity are deleted."""
        with self.lock:
            if self.file is None:
                try:
                    (self.folder / "predictions.json").unlink(missing_ok=True)
                    for other in self.folder.glob("finished-*.jsonl"):
                        if other != self.journal:
                            print(
                                f"{self.folder} holds results of other settings or weights: their records are removed, "
                                "their pictures stay unless the photograph is processed anew"
                            )
                            other.unlink(missing_ok=True)
                    self.file = open(self.journal, "ab", buffering=0)
                except OSError as error:
                    raise files.write_error(self.journal, error) from error
            return self.file


def write_results(pictures: Sequence[Path], stem: str, image: np.ndarray, prediction: "Prediction") -> Records:
    """Write a Prediction as ``pictures``, paths that end in _<kind>.png; returns its COCO records.

    image: the photograph, uint8 RGB [H,W,3]; stem: the image_id of the records.
    """
    for path in pictures:
        kind = path.stem.rpartition("_")[2]
        if kind == "instances":
            files.save_label_png(label_map(prediction.masks), path)
        else:
            files.save_png(draw(kind, image, prediction), path)
    return prediction_records(stem, prediction.masks, prediction.scores)


def label_map(masks: np.ndarray) -> np.ndarray:
    """Disjoint bool masks [n,H,W] as uint8 [H,W]: 0 background, 1..n; those after the 254th are left out."""
    labels = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in enumerate(masks[:MAX_INSTANCES], 1):
        labels[mask] = number
    return labels


def draw(kind: str, image: np.ndarray, prediction: "Prediction") -> np.ndarray:
    """A Prediction as a picture, uint8 RGB [H,W,3] of the photograph's size.

    kind: "overlay", or one of ``MAPS`` that the Prediction has; image: the photograph, uint8 RGB [H,W,3].
    """
    if kind == "overlay":
        return visualize.overlay(image, prediction.masks, prediction.scores, prediction.centroids)
    if kind != "offsets":
        return visualize.grey(getattr(prediction, kind))
    assert prediction.offsets is not None
    wheel, (height, width) = visualize.colour_wheel(prediction.offsets), image.shape[:2]
    wheel = cv2.resize(wheel, (width, height), interpolation=cv2.INTER_CUBIC)
    return visualize.mark(wheel, prediction.centroids)


def _read(journal: Path) -> dict[str, dict[str, Any]]:
    """{stem: entry} of a journal, the last entry of each stem; incomplete lines are skipped."""
    entries = {}
    with suppress(FileNotFoundError), open(journal, "rb") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                entries[entry["image_id"]] = {key: entry[key] for key in ("image_id", "made_from", "records")}
    return entries
