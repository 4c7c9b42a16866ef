"""Made clips with exact masks: objects cut from photographs move over a background, change size and cross.

The study of tracking (``experiments.video_tracking``) is made on them, because no clip with masks ships with the data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from datasets.copy_paste import CutOut, cut_out
from datasets.images import read_image
from datasets.labels import Sample
from datasets.training import resize_labels
from datasets.transforms import resize

GROWTH = 1.25  # largest factor by which an object grows or shrinks over a clip
PAN = 0.15  # fraction of the background's width by which the camera moves at most
TRIES = 200  # photographs that are tried for each object, and for the background


class MadeClip(NamedTuple):
    """images: uint8 RGB [T,S,S,3]; labels: uint8 [T,S,S], 0 background, k the visible part of the k-th object."""

    images: np.ndarray
    labels: np.ndarray


def make_clip(objects: Sequence[CutOut], background: np.ndarray, frames: int, rng: np.random.Generator) -> MadeClip:
    """A clip of ``frames`` frames of S x S pixels, in which ``objects``, of that scale, move on straight lines.

    background: uint8 RGB [S,S,3]. Later objects are in front of earlier ones. The lines pass near the centre at
    different times, so that objects cross and cover each other; objects may leave the picture in part.
    """
    size = len(background)
    wide = resize(background, round(size * (1 + PAN)))
    pan = rng.uniform(0, 1, (2, 2))  # beginning and end, as fractions of the margin
    lines, growth = [], np.exp(rng.uniform(-1, 1, len(objects)) * np.log(GROWTH))
    for number in range(len(objects)):
        angle = rng.uniform(0, 2 * np.pi) + np.pi * number  # consecutive objects come from different sides
        middle = size * (0.5 + rng.uniform(-0.12, 0.12, 2))
        reach = size * rng.uniform(0.2, 0.38) * np.array([np.sin(angle), np.cos(angle)])
        lines.append((middle - reach, middle + reach))
    images = np.zeros((frames, size, size, 3), np.uint8)
    labels = np.zeros((frames, size, size), np.uint8)
    for time in range(frames):
        part = time / max(1, frames - 1)
        top, left = np.round(((1 - part) * pan[0] + part * pan[1]) * (len(wide) - size)).astype(int)
        image = wide[top : top + size, left : left + size].astype(np.float32)
        for number, (cut, (begin, end)) in enumerate(zip(objects, lines), 1):
            centre = (1 - part) * begin + part * end
            alpha, colour = _placed(cut, centre, growth[number - 1] ** (part - 0.5), size)
            image = alpha[..., None] * colour + (1 - alpha[..., None]) * image
            labels[time][alpha > 0.5] = number
        images[time] = np.round(image)
    return MadeClip(images, labels)


def _placed(cut: CutOut, centre: np.ndarray, scale: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(alpha [S,S] in 0..1, colours [S,S,3]) of an object with its middle at ``centre`` (y, x), in pixels."""
    height, width = cut.mask.shape
    y, x = centre - scale * np.array([height, width]) / 2
    matrix = np.array([[scale, 0, x], [0, scale, y]])
    image, mask = (np.ascontiguousarray(array) for array in cut)
    colour = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.warpAffine(mask, matrix, (size, size), flags=cv2.INTER_LINEAR), colour.astype(np.float32)


def clip_of_photographs(samples: Sequence[Sample], objects: int, frames: int, size: int, seed: int) -> MadeClip:
    """A clip of random ``objects`` of photographs with instance masks, over a part of a photograph without any.

    samples: Samples with masks; size: side S in pixels; seed: of all random choices. Raises ValueError when the
    photographs do not have so many whole objects, or no part without one.
    """
    rng = np.random.default_rng(seed)
    cuts: list[CutOut] = []
    background = None
    for _ in range(TRIES):
        if len(cuts) == objects and background is not None:
            return make_clip(cuts, background, frames, rng)
        sample = samples[int(rng.integers(len(samples)))]
        assert sample.mask
        image, labels = read_image(sample.path), sample.mask.read()
        if background is None:
            background = _empty_part(image, labels, size, rng)
        elif len(cuts) < objects:
            numbers = np.setdiff1d(labels, (0, 255))
            number = rng.choice(numbers) if len(numbers) else 0
            cut = cut_out(resize(image, size), resize_labels(labels, size) == number, rng) if number else None
            cuts += [cut] if cut else []
    raise ValueError(f"{len(samples)} photographs do not have {objects} whole objects and an empty part")


def _empty_part(image: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray | None:
    """A random square of at least a third of the photograph's shorter side without objects, enlarged to [S,S,3]."""
    for _ in range(20):
        side = int(min(labels.shape) * rng.uniform(0.35, 0.8))
        top, left = (rng.integers(0, length - side + 1) for length in labels.shape)
        window = np.s_[top : top + side, left : left + side]
        if not labels[window].any():
            return resize(image[window], size)
    return None
