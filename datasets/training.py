"""Photographs and their pseudo labels as square training tensors.

Every random choice comes from (seed, epoch, index), never from a generator that runs along: a training that
was killed and started again sees exactly the images it would have seen.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_image
from datasets.sources import merge, read_source
from datasets.transforms import resize, to_tensor
from utils.cli import InputError

cv2.setNumThreads(0)  # the loader's processes are the parallelism


def read_samples(sources):
    """The Samples of one or several sources (see datasets.sources), those of one photograph merged.

    InputError for what cannot be read and for photographs that share a name but are not one, or that two sources
    know differently.
    """
    return merge({str(source): read_source(source) for source in sources})


def pseudo_maps_can_be_made(sample):
    """Whether activation maps say what the photograph shows: it has a class of the 20, or is known to show nothing."""
    return bool(sample.classes) or (sample.classes == () and sample.count == 0)


def with_classes(samples):
    """The samples that activation maps can be made of; InputError when there are none.

    Left out are those whose classes are not known, and those of no known class unless their count is 0: their pseudo
    mask would call what they show background.
    """
    chosen = [sample for sample in samples if pseudo_maps_can_be_made(sample)]
    if not any(sample.classes for sample in chosen):
        raise InputError("no photograph has classes; name a source in --data that has them, such as labels.csv")
    return chosen


class TrainingImages(Dataset):
    """Square crops of photographs, mirrored at random, together with whatever label maps go with them.

    samples: Samples. size: pixels of the square. crop: the smallest share of each side that a random crop
    keeps (1 = no cropping, which the count label needs). maps: {name: folder} of 8-bit label maps named
    ``<stem>.png``; a name ending in ``_classes`` is resized by nearest neighbour, others are resized
    smoothly and scaled to 0..1. jitter: relative strength of random brightness and contrast. derive: a function of
    what all this has made, the image as uint8 RGB [size,size,3], the maps as they are in items and the count: a dict of
    arrays more, found by the loader's processes and not by that which trains.

    Items: dict of "image" float32 [3,size,size] in 0..1, "classes" float32 [20] and "count" float32 scalar (both 0
    where not known: the losses of the count leave 0 out), per map float32 (smooth) or int64 (classes) [size/4,size/4],
    the stride-4 grid that losses compare on, and what ``derive`` makes.
    """

    def __init__(self, samples, size, *, crop=1.0, jitter=0.0, maps=None, derive=None, seed=0):
        self.samples, self.size, self.crop, self.jitter, self.seed = samples, size, crop, jitter, seed
        self.derive = derive
        self.maps = {name: Path(folder) for name, folder in (maps or {}).items()}
        self.epoch = 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        share = rng.uniform(self.crop, 1.0, 2)
        corner = rng.uniform(0, 1 - share)
        mirror = rng.random() < 0.5
        gain, bias = 1 + self.jitter * rng.uniform(-1, 1), 255 * self.jitter * rng.uniform(-0.5, 0.5)

        def window(array):
            (top, left), (bottom, right) = (
                np.round(corner * array.shape[:2]).astype(int),
                np.round((corner + share) * array.shape[:2]).astype(int),
            )
            array = array[top : max(bottom, top + 1), left : max(right, left + 1)]
            return array[:, ::-1] if mirror else array

        image = resize(np.ascontiguousarray(window(read_image(sample.path))), self.size)
        maps = {name: self.read_map(name, sample, window) for name in self.maps}
        count = sample.count or 0
        if self.jitter:
            image = np.clip(image * gain + bias, 0, 255).astype(np.uint8)
        classes = torch.zeros(20)
        classes[list(sample.classes or ())] = 1
        item = {"image": to_tensor(image), "classes": classes, "count": torch.tensor(float(count))}
        arrays = {name: on_grid(name, labels) for name, labels in maps.items()}
        if self.derive:
            arrays |= self.derive(image, arrays, count)
        return item | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def read_map(self, name, sample, window):
        """What ``window`` leaves of one of the maps of a photograph, as uint8 [size,size]."""
        labels = np.ascontiguousarray(window(read_map(self.maps[name] / f"{sample.stem}.png")))
        return _nearest(labels, self.size) if name.endswith("_classes") else resize(labels, self.size)


def on_grid(name, labels):
    """A uint8 map [H,W] on the stride-4 grid, its sides over 4: int64 where ``name`` ends in ``_classes``, of every
    fourth pixel; else float32 in 0..1, by area averaging."""
    if name.endswith("_classes"):
        return labels[::4, ::4].astype(np.int64)
    return cv2.resize(labels / np.float32(255), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)


def read_map(path):
    """An 8-bit label map as uint8 [H,W]; InputError when it is missing or broken."""
    try:  # not cv2.imread, which crashes on names that are not UTF-8
        labels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    except (OSError, cv2.error):  # the latter for an empty file
        labels = None
    if labels is None:
        raise InputError(f"the label map {path} is missing or broken; delete it and run what made it again")
    return labels


def read_classes(path, size):
    """A map of class or instance labels as uint8 [size,size]; InputError when it is missing or broken."""
    return _nearest(read_map(path), size)


def _nearest(labels, size):
    return cv2.resize(labels, (size, size), interpolation=cv2.INTER_NEAREST)
