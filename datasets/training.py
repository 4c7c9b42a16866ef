"""Photographs and their pseudo labels as square training tensors.

Every random choice depends on (seed, epoch, index) alone, so that a training that was killed and resumed gets the same
images.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_image
from datasets.labels import Sample
from datasets.sources import merge, read_source
from datasets.transforms import resize, to_tensor
from utils.cli import InputError

cv2.setNumThreads(0)  # the loader's processes are the parallelism


def read_samples(sources: Iterable[str | Path]) -> list[Sample]:
    """The merged Samples of one or several sources (see datasets.sources).

    Raises InputError for what cannot be read, for different photographs of one name, and for labels that conflict.
    """
    return merge({str(source): read_source(source) for source in sources})


def supports_cam(sample: Sample) -> bool:
    """Whether class activation maps cover all objects of the photograph: it has a VOC class, or no object at all."""
    return bool(sample.classes) or (sample.classes == () and sample.count == 0)


def select_cam_samples(samples: Iterable[Sample]) -> list[Sample]:
    """The samples from whose class activation maps pseudo labels can be made; InputError when none has a class.

    Samples with unknown classes are left out, and those without a VOC class unless their count is 0: in their pseudo
    masks the objects would be background.
    """
    chosen = [sample for sample in samples if supports_cam(sample)]
    if not any(sample.classes for sample in chosen):
        raise InputError("no photograph has classes; name a source in --data that has them, such as labels.csv")
    return chosen


class TrainingImages(Dataset):
    """Square crops of photographs with their label maps, flipped at random.

    samples: Samples. size: side of the square in pixels. crop: the smallest fraction of each side that a random crop
    keeps (1: no cropping, which would invalidate the count label). maps: {name: folder} of 8-bit label maps named
    ``<stem>.png``; a map whose name ends in ``_classes`` is resized by nearest neighbour, others are resized smoothly
    and scaled to 0..1. jitter: relative strength of random brightness and contrast. derive(image, maps, count):
    computes further arrays, a dict, in the loader's processes from the augmented image (uint8 RGB [size,size,3]), the
    maps as in the items, and the count. seed: of all random choices.

    Items: dict of "image" float32 [3,size,size] in 0..1, "classes" float32 [20] and "count" float32 scalar (both 0
    where unknown: the losses of the count ignore 0), each map as float32 (smooth) or int64 (classes) [size/4,size/4],
    the stride-4 grid of the losses, and the arrays of ``derive``. Indexing raises InputError for an unreadable file.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        *,
        crop: float = 1.0,
        jitter: float = 0.0,
        maps: Mapping[str, str | Path] | None = None,
        derive: Callable[[np.ndarray, dict[str, np.ndarray], int], dict[str, np.ndarray]] | None = None,
        seed: int = 0,
    ) -> None:
        self.samples, self.size, self.crop, self.jitter, self.seed = samples, size, crop, jitter, seed
        self.derive = derive
        self.maps = {name: Path(folder) for name, folder in (maps or {}).items()}
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        extent = rng.uniform(self.crop, 1.0, 2)  # height and width of the crop, as fractions
        corner = rng.uniform(0, 1 - extent)
        flip = rng.random() < 0.5
        gain, bias = 1 + self.jitter * rng.uniform(-1, 1), 255 * self.jitter * rng.uniform(-0.5, 0.5)

        def window(array: np.ndarray) -> np.ndarray:
            (top, left), (bottom, right) = (
                np.round(corner * array.shape[:2]).astype(int),
                np.round((corner + extent) * array.shape[:2]).astype(int),
            )
            array = array[top : max(bottom, top + 1), left : max(right, left + 1)]
            return array[:, ::-1] if flip else array

        image = resize(np.ascontiguousarray(window(read_image(sample.path))), self.size)
        maps = {name: self._augmented_map(name, sample, window) for name in self.maps}
        count = sample.count or 0
        if self.jitter:
            image = cv2.LUT(image, np.clip(np.arange(256) * gain + bias, 0, 255).astype(np.uint8))
        classes = torch.zeros(20)
        classes[list(sample.classes or ())] = 1
        item = {"image": to_tensor(image), "classes": classes, "count": torch.tensor(float(count))}
        arrays = {name: on_grid(name, labels) for name, labels in maps.items()}
        if self.derive:
            arrays |= self.derive(image, arrays, count)
        return item | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _augmented_map(self, name: str, sample: Sample, window: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The ``window`` of one of the maps of a photograph, uint8 [size,size]."""
        labels = np.ascontiguousarray(window(read_label_map(self.maps[name] / f"{sample.stem}.png")))
        return resize_labels(labels, self.size) if name.endswith("_classes") else resize(labels, self.size)


def on_grid(name: str, labels: np.ndarray) -> np.ndarray:
    """A uint8 map [H,W] on the stride-4 grid [H/4,W/4]: int64, of every fourth pixel, when ``name`` ends in
    ``_classes``; else float32 in 0..1, by area averaging."""
    if name.endswith("_classes"):
        return labels[::4, ::4].astype(np.int64)
    return cv2.resize(labels / np.float32(255), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)


def read_label_map(path: str | Path, size: int | None = None) -> np.ndarray:
    """An 8-bit label map as uint8 [H,W], or [size,size] by nearest neighbour; InputError when missing or broken."""
    labels: Any
    try:  # not cv2.imread, which crashes on names that are not UTF-8
        labels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    except (OSError, cv2.error):  # the latter for an empty file
        labels = None
    if labels is None:
        raise InputError(f"the label map {path} is missing or broken; delete it and run the script that made it again")
    return labels if size is None else resize_labels(labels, size)


def resize_labels(labels: np.ndarray, size: int) -> np.ndarray:
    """A label map [H,W] as [size,size], by nearest neighbour."""
    return cv2.resize(labels, (size, size), interpolation=cv2.INTER_NEAREST)
