"""The folder of infer.py's results: pictures, COCO records, and the journal that a stopped run continues from."""

import json
import os
import threading
from contextlib import suppress

import cv2
import numpy as np

from datasets.masks import prediction_records
from engine import visualize
from models import MAX_INSTANCES
from utils import digest, files
from utils.cli import InputError

PICTURES = ("instances", "overlay")
MAPS = ("saliency", "boundary", "offsets")


class Results:
    """Results of one setting in a folder.

    folder: an existing folder. identity: a plain value, whatever the results depend on beside the photographs.
    everything: whether S, B and V become pictures too. saliency_dir: the folder of maps in place of S, or None.
    ids: a function of stems that gives {stem: image_id}, None for the stems themselves.

    Every finished photograph is a line of ``journal``, which is named by the identity: predictions.json is made of it,
    and a run of the same identity skips what it holds. Runs of several processes or times that share the identity add
    to one journal; the first result of another identity removes the journal and the predictions.json before it. The
    methods may be called from several threads.
    """

    def __init__(self, folder, identity, everything=False, saliency_dir=None, ids=None):
        self.folder, self.saliency_dir, self.ids = folder, saliency_dir, ids
        self.kinds = PICTURES + MAPS * everything
        identity = digest.of_value([identity, self.kinds, bool(saliency_dir)])
        self.journal = folder / f"finished-{identity}.jsonl"
        self.lock, self.file = threading.Lock(), None

    def pictures(self, stem):
        """The files that are written for the photograph ``stem``."""
        return [self.folder / f"{stem}_{kind}.png" for kind in self.kinds]

    def without_clashes(self, paths):
        """(those of ``paths`` that are photographs with results of their own, the InputErrors of the others).

        Left out without a word are pictures that this folder's journals say are results.
        """
        place = {(os.path.realpath(path), path.stem): path for path in paths}  # a link of another stem is another
        home = os.path.realpath(self.folder)
        journals = list(self.folder.glob("finished-*.jsonl"))
        stems = {stem for journal in journals for stem in _read(journal)}
        own = {f"{stem}_{kind}.png" for stem in stems for kind in PICTURES + MAPS}
        own |= {"predictions.json", *(journal.name for journal in journals)} if journals else set()
        own = {os.path.join(home, name) for name in own}
        photographs = {real for real, _ in place} - own
        kept, errors = {}, []
        for (real, _), path in place.items():
            if real in own and len(place) > 1:
                continue
            over = [p for p in self.pictures(path.stem) if os.path.join(home, p.name) in photographs]
            if path.stem in kept:
                errors.append(
                    InputError(
                        f"{path} and {kept[path.stem]} would write the same files, and it was left "
                        "out; rename it or give it another --out"
                    )
                )
            elif over:
                errors.append(
                    InputError(
                        f"the result {over[0]} would replace a photograph, so {path} was left out; choose another --out"
                    )
                )
            else:
                kept[path.stem] = path
        return list(kept.values()), errors

    def unfinished(self, paths):
        """Those of ``paths`` whose results are not there, or are those of other contents."""
        done = _read(self.journal)
        return [
            path
            for path in paths
            if path.stem not in done
            or done[path.stem]["made_from"] != self._made_from(path)
            or not all(map(os.path.exists, self.pictures(path.stem)))
        ]

    def add(self, path, image, prediction):
        """Write the results of the photograph ``path``, uint8 RGB [H,W,3]; returns its pictures.

        InputError when they cannot be written.
        """
        self._begin()
        entry = {
            "image_id": path.stem,
            "made_from": self._made_from(path),
            "records": write_results(self.pictures(path.stem), path.stem, image, prediction),
        }
        try:
            # One write, which the system keeps apart from those of others; a line that a kill cuts short ends here.
            self.file.write(b"\n" + json.dumps(entry).encode())
        except OSError as error:
            raise files.write_error(self.journal, error) from error
        return self.pictures(path.stem)

    def save(self, paths=()):
        """Write predictions.json, the records of ``paths`` first and in their order; returns its path.

        It holds those of all photographs in the journal whose pictures are there. Without any, nothing is written and
        None returned. InputError when it cannot be written, or when meanwhile results of another identity were.
        """
        if self.file and not self.journal.exists():
            raise InputError(
                f"another run with other settings wrote to {self.folder} meanwhile; give the command "
                "again with an --out of its own"
            )
        if not _read(self.journal):
            return None
        order = {path.stem: place for place, path in enumerate(paths)}
        now = {path.stem: self._made_from(path) for path in paths}

        def holds(entry):  # of what is there, and not of what was at a photograph's place before
            stem = entry["image_id"]
            return self.pictures(stem)[0].exists() and now.get(stem, entry["made_from"]) == entry["made_from"]

        def write(file):  # reads when it is its turn to write: of several processes the last one knows of all
            entries = list(filter(holds, _read(self.journal).values()))
            entries.sort(key=lambda entry: order.get(entry["image_id"], len(order)))
            records = [record for entry in entries for record in entry["records"]]
            if self.ids:
                ids = self.ids([entry["image_id"] for entry in entries])
                records = [record | {"image_id": ids[record["image_id"]]} for record in records]
            file.write((json.dumps(records, indent=1) + "\n").encode())

        files.write_atomically(self.folder / "predictions.json", write)
        return self.folder / "predictions.json"

    def _made_from(self, path):
        """What tells a file from another that comes to its place: size and time, of the map in place of S too."""
        files = [path, *([self.saliency_dir / f"{path.stem}.png"] if self.saliency_dir else [])]
        try:
            return [[status.st_size, status.st_mtime_ns] for status in map(os.stat, files)]
        except OSError:
            return None  # whoever reads it will say why

    def _begin(self):
        """Before the first result: what others left that it does not go with is removed."""
        with self.lock:
            if self.file:
                return
            try:
                (self.folder / "predictions.json").unlink(missing_ok=True)
                for other in self.folder.glob("finished-*.jsonl"):
                    if other != self.journal:
                        print(
                            f"{self.folder} holds results of other settings or weights: their records are removed, "
                            "pictures of photographs that are not done again stay"
                        )
                        other.unlink(missing_ok=True)
                self.file = open(self.journal, "ab", buffering=0)
            except OSError as error:
                raise files.write_error(self.journal, error) from error


def write_results(pictures, stem, image, prediction):
    """Write a Prediction as ``pictures``, paths that end in _<kind>.png; returns its COCO records."""
    for path in pictures:
        kind = path.stem.rpartition("_")[2]
        if kind == "instances":
            files.save_label_png(label_map(prediction.masks), path)
        else:
            files.save_png(draw(kind, image, prediction), path)
    return prediction_records(stem, prediction.masks, prediction.scores)


def label_map(masks):
    """Disjoint bool masks [n,H,W] as uint8 [H,W]: 0 background, 1..n; those beyond the 254th are left out."""
    labels = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in enumerate(masks[:MAX_INSTANCES], 1):
        labels[mask] = number
    return labels


def draw(kind, image, prediction):
    """What a Prediction holds, as a picture for people: uint8 RGB [H,W,3] of the photograph's size."""
    if kind == "overlay":
        return visualize.overlay(image, prediction.masks, prediction.scores, prediction.centroids)
    if kind != "offsets":
        return visualize.grey(getattr(prediction, kind))
    wheel, (height, width) = visualize.colour_wheel(prediction.offsets), image.shape[:2]
    wheel = cv2.resize(wheel, (width, height), interpolation=cv2.INTER_CUBIC)
    return visualize.mark(wheel, prediction.centroids)


def _read(journal):
    """{stem: entry} of a journal, the last of each; a line that was cut short is passed over."""
    entries = {}
    with suppress(FileNotFoundError), open(journal, "rb") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                entries[entry["image_id"]] = {key: entry[key] for key in ("image_id", "made_from", "records")}
    return entries
