"""Photographs with instance label maps as training squares, for the student network.

Every random choice depends on (seed, epoch, index) alone, as in ``datasets.training``.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.copy_paste import cut_out, paste
from datasets.images import read_image
from datasets.labels import Sample
from datasets.masks import VOID, areas_of
from datasets.training import read_label_map, resize_labels
from datasets.transforms import expose, reduce_and_compress, resize, to_tensor
from utils.cli import InputError

CROPPED = 0.7  # fraction of the items that are cropped [ours]
MIN_VISIBLE = 0.25  # an instance of which a crop keeps a smaller fraction becomes void [ours]
MAX_PASTED = 3  # instances pasted into one photograph [ours]
EXPOSED = 0.5  # fraction of the items whose exposure is changed [ours]
REDUCED = 0.5  # fraction of the items whose resolution is reduced [ours]
QUALITY = 40, 95  # of their JPEG compression [ours]
GAMMA = 1.4  # largest exponent of the linear light of these; the smallest is its inverse [ours]


class InstanceImages(Dataset):
    """Random crops of photographs and of their instance label maps, with instances of other photographs pasted in.

    samples: Samples with counts. labels: the folder of their label maps <stem>.png, uint8 (0 background, 1..254
    instances, 255 void); a sample of count 0 needs none. size: side of the square in pixels. crop: the smallest
    fraction of each side that a random crop keeps. copy_paste: the mean number of instances pasted into a
    photograph, at most ``MAX_PASTED``. jitter: strength of random brightness, contrast and saturation. exposure:
    the largest change of the exposure in EV, for half of the items; their labels are those of the photograph as it
    is, so that a network learns to see in bad light. resolution: the smallest fraction of ``size`` to which half of the
    items are reduced, and then compressed as JPEG; 1 for none. seed: of all random choices.

    Items: dict of "image" float32 [3,size,size] in 0..1 and "labels" uint8 [size,size]. Indexing raises InputError for
    a photograph or label map that cannot be read, and where their sizes differ.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: str | Path,
        size: int,
        *,
        crop: float = 0.6,
        copy_paste: float = 0.7,
        jitter: float = 0.3,
        exposure: float = 0.0,
        resolution: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.samples, self.labels, self.size = samples, Path(labels), size
        self.crop, self.copy_paste, self.jitter = crop, copy_paste, jitter
        self.exposure, self.resolution, self.seed, self.epoch = exposure, resolution, seed, 0
        self.sources = [sample for sample in samples if sample.count]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image, labels = self._cropped(self.samples[index], rng)
        for _ in range(min(rng.poisson(self.copy_paste), MAX_PASTED) if self.sources else 0):
            self._paste_instance(image, labels, rng)
        image = jitter_colours(image, self.jitter, rng)
        if self.exposure and rng.random() < EXPOSED:
            image = expose(image, rng.uniform(-1, 1) * self.exposure, GAMMA ** rng.uniform(-1, 1))
        if self.resolution < 1 and rng.random() < REDUCED:
            side = round(self.size * rng.uniform(self.resolution, 1))
            image = resize(reduce_and_compress(image, side, int(rng.integers(*QUALITY))), self.size)
        return {"image": to_tensor(image), "labels": torch.from_numpy(labels)}

    def _cropped(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random crop of a photograph, mirrored at random: uint8 RGB [size,size,3] and its labels [size,size]."""
        image, labels = read_with_labels(sample, self.labels)
        extent = rng.uniform(self.crop, 1, 2) if rng.random() < CROPPED else np.ones(2)
        top, left = np.round(rng.uniform(0, 1 - extent) * labels.shape).astype(int)
        bottom, right = np.round((top, left) + extent * labels.shape).astype(int)
        window = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
        areas = areas_of(labels)
        image, labels = image[window], labels[window]
        lost = areas_of(labels) < MIN_VISIBLE * areas
        lost[0] = False
        labels = np.where(lost, VOID, np.arange(256)).astype(np.uint8)[labels]
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return resize(np.ascontiguousarray(image), self.size), resize_labels(np.ascontiguousarray(labels), self.size)

    def _paste_instance(self, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
        """Paste a random instance of another photograph into ``image`` and ``labels``, in place, if there is room."""
        other, found = read_with_labels(self.sources[rng.integers(len(self.sources))], self.labels)
        other, found = resize(other, self.size), resize_labels(found, self.size)
        numbers = np.flatnonzero(areas_of(found)[1:VOID]) + 1
        free = np.flatnonzero(areas_of(labels)[1:VOID] == 0) + 1
        if len(numbers) and len(free):
            cut = cut_out(other, found == numbers[rng.integers(len(numbers))], rng)
            if cut:
                paste(image, labels, cut, free[0], rng)


def read_with_labels(sample: Sample, folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A photograph, uint8 RGB [H,W,3], and its instance labels, uint8 [H,W]; all background where its count is 0.

    InputError when one of them cannot be read, or when they differ in size.
    """
    image = read_image(sample.path)
    if sample.count == 0:
        return image, np.zeros(image.shape[:2], np.uint8)
    path = Path(folder) / f"{sample.stem}.png"
    labels = read_label_map(path)
    if labels.shape != image.shape[:2]:
        raise InputError(f"{path} has another size than {sample.path}; delete it and repeat the command that made it")
    return image, labels


def jitter_colours(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB [H,W,3] with random brightness, contrast and saturation, of at most ``strength`` (0: no change)."""
    bias, gain, saturation = strength * rng.uniform(-0.5, 0.5), *(1 + strength * rng.uniform(-1, 1, 2))
    # gain * (grey + saturation * (pixel - grey) - 128) + 128 + 255 * bias, grey: the mean of the three channels
    mixing = gain * (saturation * np.eye(3) + (1 - saturation) / 3)
    return cv2.transform(image, np.column_stack([mixing, np.full(3, 128 * (1 - gain) + 255 * bias)]))
