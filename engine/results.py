"""The output folder of infer.py: pictures, annotations, and the journal from which a stopped run continues."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import cv2
import numpy as np

from datasets.listing import stem_of_result
from datasets.masks import bounding_box, prediction_records
from engine import annotations, visualize
from models import MAX_INSTANCES
from utils import digest, distributed, files
from utils.cli import InputError

if TYPE_CHECKING:
    from engine.post_processing import Prediction

PICTURES = ("instances", "overlay")
MAPS = ("saliency", "boundary", "offsets")
CUTOUTS, LABELME = "cutouts", "labelme"
MARGIN = 2  # pixels around the mask in a cut-out, for its soft rim
Records = list[dict[str, Any]]


class Results:
    """The results of one setting in a folder.

    folder: an existing folder. identity: a plain value of all that the results depend on besides the photographs.
    kinds: what is written for every photograph: those of ``PICTURES``, ``MAPS``, ``CUTOUTS`` and ``LABELME``, with
    "instances" the first. saliency_dir: the folder of maps that replace S, or None. ids: a function from stems to
    {stem: image_id}, or None where the stem is the image_id. coco: a file for a COCO data set, or None; polygons:
    whether it has outlines in place of RLE.

    Every finished photograph is a line of ``journal``, a file named by the identity. predictions.json, cutouts.json and
    the COCO data set are made from it, and a run of the same identity skips the photographs in it. Several runs or
    processes of one machine with one identity append to one journal; each process of torchrun has a journal of its own,
    since they may be on several machines, whose appends to one file of a shared folder would overwrite each other. The
    first result of another identity deletes the journals, the predictions.json and the cutouts.json before it. The
    methods may be called from several threads.
    """

    def __init__(
        self,
        folder: Path,
        identity: Any,
        kinds: Sequence[str] = PICTURES,
        saliency_dir: Path | None = None,
        ids: Callable[[Sequence[str]], dict[str, Any]] | None = None,
        coco: Path | None = None,
        polygons: bool = False,
    ) -> None:
        self.folder, self.saliency_dir, self.ids, self.coco, self.polygons = folder, saliency_dir, ids, coco, polygons
        self.kinds = tuple(kinds)
        self.lists = [folder / "predictions.json", *([folder / "cutouts.json"] if CUTOUTS in kinds else [])]
        identity = digest.of_value([identity, self.kinds, bool(saliency_dir)])
        self.name = f"finished-{identity}"
        self.journal = folder / f"{self.name}{f'-{distributed.rank()}' if distributed.rank() else ''}.jsonl"
        self.lock = threading.Lock()
        self.file: BinaryIO | None = None
        self.written = False  # whether this run, in any of its processes, has written a result
        self.states: dict[Path, Any] = {}  # of photographs before they are read (``_made_from``)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lock": None, "file": None}  # another process opens the journal anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"lock": threading.Lock()}

    def files(self, stem: str, count: int) -> list[Path]:
        """The files of the photograph ``stem`` with ``count`` instances, whether they are written yet or not."""
        return [path for kind in self.kinds for path in paths_of(self.folder, stem, kind, count)]

    def without_clashes(self, paths: Sequence[Path]) -> tuple[list[Path], list[InputError]]:
        """``paths`` without the photographs whose results would overwrite others, and an InputError for each of those.

        Among several paths, files that are results according to the journals of this folder are dropped silently.
        """
        unique = {(os.path.realpath(path), path.stem): path for path in paths}  # a link may have a stem of its own
        home = os.path.realpath(self.folder)
        journals = list(self.folder.glob("finished-*.jsonl"))
        stems = _read(journals).keys()
        names = {"predictions.json", "cutouts.json", *(f"{stem}.json" for stem in stems)} if journals else set()
        names |= {journal.name for journal in journals}
        lists = {os.path.realpath(path) for path in (*self.lists, *([self.coco] if self.coco else []))}

        def is_result(real: str) -> bool:
            folder, name = os.path.split(real)
            return real in lists or (folder == home and (name in names or stem_of_result(name) in stems))

        results = {real for real, _ in unique if is_result(real)}
        in_the_way: dict[str | None, list[str]] = {}  # {stem: photographs with the name of one of its results}
        for real in {real for real, _ in unique} - results:
            if os.path.dirname(real) == home:
                in_the_way.setdefault(stem_of_result(os.path.basename(real)), []).append(real)
        kept: dict[str, Path] = {}
        errors = []
        for (real, _), path in unique.items():
            if real in results and len(unique) > 1:
                continue
            overwritten = list(filter(partial(self._is_written, path.stem), in_the_way.get(path.stem, ())))
            if LABELME in self.kinds and os.path.join(home, f"{path.stem}.json") in lists:
                overwritten.append(os.path.join(home, f"{path.stem}.json"))
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
                        f"the result {overwritten[0]} would replace a photograph or another result, so {path} was left "
                        "out; rename it or choose another --out"
                    )
                )
            else:
                kept[path.stem] = path
        return list(kept.values()), errors

    def unfinished(self, paths: Sequence[Path]) -> list[Path]:
        """The ``paths`` that have no results, or results of a file that has changed since; to be called before they are
        read."""
        done = _read(self._journals())
        self.states = {path: self._made_from(path) for path in paths}
        return [
            path
            for path in paths
            if path.stem not in done
            or done[path.stem]["made_from"] != self.states[path]
            or not all(map(files.is_complete, self.files(path.stem, len(done[path.stem]["records"]))))
        ]

    def add(self, path: Path, image: np.ndarray, prediction: "Prediction") -> list[Path]:
        """Write the results of the photograph ``path``, uint8 RGB [H,W,3]; returns its files.

        Raises InputError when they cannot be written, or when a run of another identity has written to the folder
        meanwhile.
        """
        file = self._open()
        if not self.journal.exists():
            raise self._of_another_run()
        entry = {
            "image_id": path.stem,
            "made_from": self.states.get(path) or self._made_from(path),
            "time": time.time(),
            "size": list(image.shape[:2]),
            "records": write_results(self.folder, path, self.kinds, image, prediction),
        }
        try:
            # A single write, so that lines of several processes do not mix. The newline comes first: it ends a line
            # that a killed process left incomplete.
            line = b"\n" + json.dumps(entry).encode()
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise files.write_error(self.journal, error) from error
        self.written = True
        return self.files(path.stem, len(prediction.masks))

    def save(self, paths: Sequence[Path] = ()) -> list[Path]:
        """Write predictions.json and what else is asked for of cutouts.json and the COCO data set; returns their paths.

        predictions.json and cutouts.json hold all photographs in the journal whose pictures exist, ``paths`` first and
        in their order; the COCO data set holds those of ``paths``. With an empty journal nothing is written. Raises
        InputError when a file cannot be written, or when a run of another identity has written to the folder meanwhile.
        """
        if self.written and not self._journals():
            raise self._of_another_run()
        if not _read(self._journals()):
            return []
        order = {path.stem: place for place, path in enumerate(paths)}
        made_from = {path.stem: self._made_from(path) for path in paths}

        def is_current(entry: dict[str, Any]) -> bool:
            stem = entry["image_id"]
            unchanged = made_from.get(stem, entry["made_from"]) == entry["made_from"]
            return files.is_complete(self.files(stem, 0)[0]) and unchanged

        def write(content: Callable[[list[dict[str, Any]]], Any], indent: int | None, file: BinaryIO) -> None:
            # The journals are read while the file is held, so the last of several runs writes all photographs.
            entries = list(filter(is_current, _read(self._journals()).values()))
            entries.sort(key=lambda entry: order.get(entry["image_id"], len(order)))
            file.write((json.dumps(content(entries), indent=indent) + "\n").encode())

        for path, content in zip(self.lists, (self._records, self._cutouts), strict=False):
            files.write_atomically(path, partial(write, content, 1))
        if self.coco:
            files.write_atomically(self.coco, partial(write, partial(self._data_set, paths), None))
        return self.lists + ([self.coco] if self.coco else [])

    def _of_another_run(self) -> InputError:
        return InputError(
            f"another run with other settings wrote to {self.folder} meanwhile; run the command with an --out of its "
            "own"
        )

    def _records(self, entries: list[dict[str, Any]]) -> Records:
        """The content of predictions.json."""
        records = [record for entry in entries for record in entry["records"]]
        if self.ids:
            ids = self.ids([entry["image_id"] for entry in entries])
            records = [record | {"image_id": ids[record["image_id"]]} for record in records]
        return records

    def _cutouts(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The content of cutouts.json: the place of every cut-out in its photograph."""
        found = []
        for entry in entries:
            for number, record in enumerate(self._records([entry]), 1):
                name = paths_of(self.folder, entry["image_id"], CUTOUTS, number)[-1].name
                box = bounding_box(record["segmentation"], MARGIN)
                found.append({"file_name": name, "image_id": record["image_id"], "bbox": box, "score": record["score"]})
        return found

    def _data_set(self, paths: Sequence[Path], entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of the COCO data set of ``paths``."""
        names = annotations.file_names(paths)
        entries = [entry for entry in entries if entry["image_id"] in names]
        stems = [entry["image_id"] for entry in entries]
        ids = self.ids(stems) if self.ids else {stem: number for number, stem in enumerate(stems, 1)}
        return annotations.coco_dataset(entries, names, ids, self.polygons)

    def _is_written(self, stem: str, path: str) -> bool:
        """Whether ``path``, which has the name of a result of ``stem``, is one that these settings write."""
        name = os.path.basename(path)
        is_cutout = name.startswith(f"{stem}_cutout")
        return CUTOUTS in self.kinds if is_cutout else name in {file.name for file in self.files(stem, 0)}

    def _made_from(self, path: Path) -> list[list[int]] | None:
        """Size and time of the photograph and of the map that replaces S: they change when the file does."""
        files = [path, *([self.saliency_dir / f"{path.stem}.png"] if self.saliency_dir else [])]
        try:
            return [[status.st_size, status.st_mtime_ns] for status in map(os.stat, files)]
        except OSError:
            return None  # reading the file raises the error

    def _journals(self) -> list[Path]:
        """The journals of all processes with this identity."""
        return sorted(self.folder.glob(f"{self.name}*.jsonl"))

    def close(self) -> None:
        """Close the journal: on a network file system other machines read then what was written to it."""
        with self.lock:
            if self.file:
                self.file.close()
                self.file = None

    def _open(self) -> BinaryIO:
        """The journal, open for appending; before the first result, those of another identity are deleted."""
        with self.lock:
            if self.file is None:
                try:
                    for name in ("predictions.json", "cutouts.json"):
                        (self.folder / name).unlink(missing_ok=True)
                    for other in {*self.folder.glob("finished-*.jsonl")} - {*self._journals()}:
                        with suppress(FileNotFoundError):  # another process was first
                            other.unlink()
                            print(
                                f"{self.folder} holds results of other settings or weights: their records are removed, "
                                "their pictures stay unless the photograph is processed anew"
                            )
                    self.file = open(self.journal, "ab", buffering=0)
                except OSError as error:
                    raise files.write_error(self.journal, error) from error
            return self.file


def paths_of(folder: Path, stem: str, kind: str, count: int) -> list[Path]:
    """The files of one kind that ``folder`` has for the photograph ``stem`` with ``count`` instances.

    What follows the last _ of a name is never part of the stem, so the names of two photographs differ.
    """
    if kind == CUTOUTS:
        return [folder / f"{stem}_cutout{number}.png" for number in range(1, count + 1)]
    return [folder / (f"{stem}.json" if kind == LABELME else f"{stem}_{kind}{'.jpg' if kind == 'overlay' else '.png'}")]


def write_results(
    folder: Path, photograph: Path, kinds: Sequence[str], image: np.ndarray, prediction: "Prediction"
) -> Records:
    """Write the files of all ``kinds`` of a Prediction to ``folder``; returns its COCO records.

    photograph: the path, whose stem is the image_id of the records; image: its pixels, uint8 RGB [H,W,3].
    Raises InputError when a file cannot be written, or when a LabelMe file there was not written by infer.py, or was
    edited since.
    """
    # sync=False: a picture that a power failure cuts is made again (``Results.unfinished``).
    records = prediction_records(photograph.stem, prediction.masks, prediction.scores)
    for kind in kinds:
        paths = paths_of(folder, photograph.stem, kind, len(records))
        if kind == "instances":
            files.save_label_png(label_map(prediction.masks), paths[0], sync=False)
        elif kind == "overlay":
            files.save_jpeg(draw(kind, image, prediction), paths[0], sync=False)
        elif kind == LABELME:
            _write_labelme(photograph, paths[0], prediction)
        elif kind == CUTOUTS:
            for path, mask, record in zip(paths, prediction.masks, records, strict=True):
                x, y, width, height = bounding_box(record["segmentation"], MARGIN)
                place = np.s_[y : y + height, x : x + width]
                files.save_png(visualize.cutout(image[place], mask[place]), path, sync=False)
            _remove_cutouts(folder, photograph.stem, len(records) + 1)
        else:
            files.save_png(draw(kind, image, prediction), paths[0], sync=False)
    return records


def _write_labelme(photograph: Path, path: Path, prediction: "Prediction") -> None:
    try:
        replaceable = not path.exists() or annotations.is_unedited_labelme(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        replaceable = False
    if not replaceable:
        raise InputError(
            f"{path} was not written by infer.py or was edited since, and is kept; move it or choose another --out"
        )
    shapes = annotations.labelme(prediction.masks, prediction.scores, photograph, path.parent)
    files.write_atomically(path, lambda file: file.write((json.dumps(shapes) + "\n").encode()))


def _remove_cutouts(folder: Path, stem: str, first: int) -> None:
    """Remove the cut-outs from number ``first`` on, of an earlier result that had more instances."""
    while (path := paths_of(folder, stem, CUTOUTS, first)[-1]).is_file():
        path.unlink()
        first += 1


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


def _read(journals: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{stem: entry} of journals, the latest entry of each stem: the last one of a journal, and of those of several
    journals by their time. Incomplete lines are skipped."""
    entries: dict[str, dict[str, Any]] = {}
    for journal in journals:
        own: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError), open(journal, "rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):
                    read = json.loads(line)
                    entry = {key: read[key] for key in ("image_id", "made_from", "time", "size", "records")}
                    own[entry["image_id"]] = entry
        for stem, entry in own.items():
            if stem not in entries or entries[stem]["time"] <= entry["time"]:
                entries[stem] = entry
    return entries
