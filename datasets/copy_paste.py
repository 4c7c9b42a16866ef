"""Objects of photographs that show a single one, pasted into others: touching objects whose contours are known.

Class labels and counts part two touching objects only as well as the network that tells them; where an object is
pasted, its contour and the new count are certain [ours, after Ghiasi et al., Simple Copy-Paste, CVPR 2021].
"""

import cv2
import numpy as np

from datasets.labels import IGNORE

AREA = (0.02, 0.25)  # shares of the image that a pasted object takes, evenly in the logarithm
FIRST = 100  # the label of the first pasted object: no class, no instance of a count has it
TRIES = 5  # places that are tried


def cut_out(image, classes, saliency, rng):
    """The one object of a photograph, at a random size and mirrored at random.

    image: uint8 RGB [S,S,3]; classes: uint8 [S,S], its labels, 0 background and 255 unknown; saliency: uint8 [S,S],
    0..255. Returns the object's bounding box out of the image, uint8 [h,w,3], and its mask, float32 [h,w] in 0..1;
    None where it is not seen whole or has no clear contour.
    """
    size = len(image)
    parts, labels, stats, _ = cv2.connectedComponentsWithStats((saliency > 127).astype(np.uint8))
    if parts < 2:
        return None
    largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    left, top, width, height, area = stats[largest]
    mask = labels == largest
    rim = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    doubtful = (classes == IGNORE).sum()
    if rim > 0.3 * np.sqrt(area) or doubtful > 0.3 * area or not AREA[0] / 2 <= area / size**2 <= 2 * AREA[1]:
        return None
    window = np.s_[top : top + height, left : left + width]
    scale = np.sqrt(np.exp(rng.uniform(*np.log(AREA))) * size**2 / area)
    scale = min(scale, 1.5, 0.9 * size / max(width, height))
    shape = [max(2, round(scale * side)) for side in (width, height)]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(image[window], shape, interpolation=how)
    mask = cv2.resize(mask[window].astype(np.float32), shape, interpolation=how)
    return (image[:, ::-1], mask[:, ::-1]) if rng.random() < 0.5 else (image, mask)


def paste(image, classes, saliency, cut, label, rng):
    """Paste what ``cut_out`` returned on or beside the salient objects of a photograph, in place.

    image, classes, saliency: as there, of the photograph; label: what ``classes`` is there. No object is covered by
    more than half. Returns whether a place was found.
    """
    size = len(image)
    patch, mask = cut
    height, width = mask.shape
    rows, columns = np.nonzero(saliency > 127)
    if not len(rows):
        return False
    visible = np.bincount(classes.ravel(), minlength=256)
    for _ in range(TRIES):
        top = rng.integers(max(0, rows.min() - height), min(size - height, rows.max()) + 1)
        left = rng.integers(max(0, columns.min() - width), min(size - width, columns.max()) + 1)
        window = np.s_[top : top + height, left : left + width]
        covered = np.bincount(classes[window][mask > 0.5], minlength=256)
        if (covered[1:IGNORE] > visible[1:IGNORE] / 2).any():
            continue
        share = cv2.GaussianBlur(mask, (0, 0), 0.7)[..., None]  # no edge sharper than a photograph's
        image[window] = np.round(share * patch + (1 - share) * image[window]).astype(np.uint8)
        classes[window][mask > 0.5] = label
        saliency[window] = np.maximum(saliency[window], np.round(255 * mask)).astype(np.uint8)
        return True
    return False
