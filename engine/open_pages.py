"""The photographs of the pages that app.py has open: their instances for any count, and the files a page shows."""

import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import cv2
import numpy as np
from PIL import Image

from datasets.images import MAX_PIXELS, read_image
from engine import results
from engine.predictor import Predictor, lacks_memory
from utils import files
from utils.cli import InputError

KEPT = 3600.0  # seconds after which a page that was not used, and any file, is removed
MAX_PAGES = 100  # photographs in memory: so many, with as many pixels together as one photograph may have
SIDE, THUMBNAIL_SIDE = 1600, 480  # pixels: the longer side of pictures shown on the page; of cut-outs shown there
KINDS = ("instances", results.CUTOUTS)


class Shown(NamedTuple):
    """What a page shows and offers of one photograph; all are files that exist until its next result.

    message: one sentence. photograph, overlay: JPEGs of at most SIDE pixels a side. instances: (PNG of the cut-out, of
    at most THUMBNAIL_SIDE pixels a side; caption with its score), by descending score. cutouts: a zip of what infer.py
    writes with --cutouts; predictions: its predictions.json.
    """

    message: str
    photograph: Path
    overlay: Path
    instances: list[tuple[Path, str]]
    cutouts: Path
    predictions: Path


@dataclass
class _Held:
    """The photograph of a page. output: of the network, so that another count needs no second pass."""

    upload: Path
    image: np.ndarray
    output: Any
    folder: Path
    used: float


class OpenPages:
    """The photographs of all open pages, each with the output of the network, and their files in ``folder``.

    folder: an existing folder, which the caller removes; uploaded files lie in it too. Pages are named by any string.
    The methods may be called from several threads; one at a time computes.
    """

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        self.predictor, self.folder = predictor, folder
        self.held: OrderedDict[str, _Held] = OrderedDict()  # the page used last is the last
        self.lock = threading.Lock()

    def open(self, page: str, path: Path) -> Shown:
        """Read the photograph ``path``, which takes the place of the one before, and find its instances.

        Raises the InputError of ``read_image`` with the file's name in place of its path; the page then has no
        photograph.
        """
        with self.lock:
            self._close(page)
            try:
                image = read_image(path)
                output = self.predictor.network([self.predictor.prepare(image)])[0]
            except InputError as error:
                self._remove_upload(path)
                raise InputError(str(error).replace(str(path), path.name)) from error
            except Exception as error:
                if not lacks_memory(error):
                    raise
                self._remove_upload(path)
                raise _too_large(path) from error
            self.held[page] = _Held(path, image, output, Path(tempfile.mkdtemp(dir=self.folder)), time.time())
            self._limit()
            return self._show(page, 0)

    def recount(self, page: str, count: int) -> Shown:
        """The instances of the page's photograph with another ``count``, 0 where it is not known.

        The network does not run. Raises InputError when the page has no photograph, or when it takes too much memory.
        """
        with self.lock:
            if page not in self.held:
                raise InputError(
                    f"the page has no photograph, or it was not used for {KEPT / 60:.0f} minutes; drop it here first"
                )
            return self._show(page, count)

    def close(self, page: str) -> None:
        """Forget the photograph of ``page`` and delete its files, the uploaded one too."""
        with self.lock:
            self._close(page)

    def sweep(self, age: float = KEPT) -> None:
        """Close the pages that were not used for ``age`` seconds and delete all files of ``folder`` that are older."""
        with self.lock:
            oldest = time.time() - age
            for page in [page for page, held in self.held.items() if held.used <= oldest]:
                self._close(page)
            # A result is written anew whenever its page is used, so what is older belongs to no page. Deepest first.
            for path in sorted(self.folder.rglob("*"), reverse=True):
                with suppress(OSError):  # in use, or no empty folder
                    if path.lstat().st_mtime <= oldest:
                        path.rmdir() if path.is_dir() else path.unlink()

    def _show(self, page: str, count: int) -> Shown:
        held = self.held[page]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            prediction = self.predictor.instances(held.output, held.image.shape[:2], count=count)
            shown = write(folder, held.upload, held.image, prediction, count)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._close(page)
            if lacks_memory(error):
                raise _too_large(held.upload) from error
            raise
        shutil.rmtree(held.folder, ignore_errors=True)
        held.folder, held.used = folder, time.time()
        self.held.move_to_end(page)
        return shown

    def _close(self, page: str) -> None:
        held = self.held.pop(page, None)
        if held:
            shutil.rmtree(held.folder, ignore_errors=True)
            self._remove_upload(held.upload)

    def _remove_upload(self, path: Path) -> None:
        """Delete an uploaded file, unless it is that of another page too: equal files are stored once."""
        if self.folder in path.parents and all(held.upload != path for held in self.held.values()):
            path.unlink(missing_ok=True)

    def _limit(self) -> None:
        """Close the pages that were used least recently, until the rest are few and small enough."""
        while len(self.held) > 1 and (
            len(self.held) > MAX_PAGES or sum(held.image.size // 3 for held in self.held.values()) > MAX_PIXELS
        ):
            self._close(next(iter(self.held)))


def write(folder: Path, photograph: Path, image: np.ndarray, prediction: Any, count: int) -> Shown:
    """Write the files of ``Shown`` to the empty ``folder``, those to be downloaded as infer.py does.

    photograph: a path, of which the name is used; image: uint8 RGB [H,W,3]; prediction: its Prediction; count: the one
    it was made for, 0 where none was given. Raises InputError when a file cannot be written.
    """
    photograph = Path(photograph.name)
    written = results.Results(folder, "page", KINDS)
    written.add(photograph, image, prediction)
    predictions, places = written.save([photograph])
    number = len(prediction.masks)
    cutouts = results.paths_of(folder, photograph.stem, results.CUTOUTS, number)
    archive = folder / f"{photograph.stem}_cutouts.zip"
    with ZipFile(archive, "w") as file:  # PNGs are compressed already
        for path in (*cutouts, places):
            file.write(path, path.name)

    shown = folder / "shown"
    shown.mkdir()
    files.save_jpeg(_reduced(image), shown / "photograph.jpg")
    files.save_jpeg(_reduced(results.draw("overlay", image, prediction)), shown / "overlay.jpg")
    instances = []
    for path, score in zip(cutouts, prediction.scores, strict=True):
        with Image.open(path) as picture:
            picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            picture.save(shown / path.name)
        instances.append((shown / path.name, f"score {score:.2f}"))
    height, width = image.shape[:2]
    message = f"{number or 'no'} instance{'s' * (number != 1)} in {photograph.name}, {width} x {height} pixels"
    if count and count != number:
        message += f"; {count} {'was' if count == 1 else 'were'} asked for"
    return Shown(message, shown / "photograph.jpg", shown / "overlay.jpg", instances, archive, predictions)


def _reduced(picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H,W,3], with no side longer than SIDE."""
    longest = max(picture.shape[:2])
    if longest <= SIDE:
        return picture
    height, width = (max(1, side * SIDE // longest) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _too_large(path: Path) -> InputError:
    return InputError(f"{path.name} needs more memory than there is; reduce it")
