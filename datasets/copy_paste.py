"""Copy-paste augmentation: instances of photographs pasted into others (Ghiasi et al., CVPR 2021).

The contour of a pasted instance is known, where it touches other instances too.
"""

from typing import NamedTuple

import cv2
import numpy as np

from datasets.masks import VOID, areas_of

AREA = (0.02, 0.25)  # fractions of the image that a pasted instance covers, uniform in the logarithm [ours]
TRIES = 5  # places that are tried [ours]


class CutOut(NamedTuple):
    """An instance without its photograph: uint8 RGB [h,w,3], and its soft mask, float32 [h,w] in 0..1."""

    image: np.ndarray
    mask: np.ndarray


def cut_out(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> CutOut | None:
    """The largest connected part of an instance, at a random size and mirrored at random.

    image: uint8 RGB [S,S,3]; mask: bool [S,S]. None where the border of the image cuts it off, and where it is much
    smaller or larger than ``AREA``.
    """
    size = len(image)
    parts, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if parts < 2:
        return None
    largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    left, top, width, height, area = stats[largest]
    mask = labels == largest
    at_border = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    if at_border > 0.3 * np.sqrt(area) or not AREA[0] / 2 <= area / size**2 <= 2 * AREA[1]:
        return None
    window = np.s_[top : top + height, left : left + width]
    scale = np.sqrt(np.exp(rng.uniform(*np.log(AREA))) * size**2 / area)
    scale = min(scale, 1.5, 0.9 * size / max(width, height))
    shape = [max(2, round(scale * side)) for side in (width, height)]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    patch = cv2.resize(image[window], shape, interpolation=interpolation)
    soft = cv2.resize(mask[window].astype(np.float32), shape, interpolation=interpolation)
    return CutOut(patch[:, ::-1], soft[:, ::-1]) if rng.random() < 0.5 else CutOut(patch, soft)


def paste(image: np.ndarray, labels: np.ndarray, cut: CutOut, number: int, rng: np.random.Generator) -> bool:
    """Paste a CutOut on or beside the instances of a photograph, in place; anywhere where there are none.

    image: uint8 RGB [S,S,3]; labels: uint8 [S,S], 0 background, 1..254 instances, 255 void; number: the label of the
    pasted instance. No instance is covered by more than half. Returns whether a place was found.
    """
    size = len(image)
    height, width = cut.mask.shape
    instances = (labels > 0) & (labels < VOID)
    rows, columns = np.nonzero(instances if instances.any() else np.ones_like(instances))
    before = areas_of(labels)
    for _ in range(TRIES):
        top = rng.integers(max(0, rows.min() - height), min(size - height, rows.max()) + 1)
        left = rng.integers(max(0, columns.min() - width), min(size - width, columns.max()) + 1)
        window = np.s_[top : top + height, left : left + width]
        covered = areas_of(labels[window][cut.mask > 0.5])
        if (covered[1:VOID] > before[1:VOID] / 2).any():
            continue
        alpha = cv2.GaussianBlur(cut.mask, (0, 0), 0.7)[..., None]  # no edge sharper than a photograph's
        image[window] = np.round(alpha * cut.image + (1 - alpha) * image[window]).astype(np.uint8)
        labels[window][cut.mask > 0.5] = number
        return True
    return False
