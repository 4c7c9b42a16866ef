"""From the overlapping hypotheses of the student network to a ranking of masks, or to disjoint instances [ours].

COCO's protocol measures all hypotheses as they are ranked. For a label map each object may appear only once: hypotheses
are taken by descending score, except those that are mostly covered by others before them, up to the number of objects
that is most probable given the scores and the count head.
"""

from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from models.count_head import MAX_COUNT
from models.mask_rcnn import Detections

MASK_THRESH = 0.5  # probability above which a pixel belongs to a mask [Mask R-CNN]
MIN_VISIBLE = 0.7  # fraction of its mask that an instance keeps beside those before it
GRID = 160  # side of the square on which hypotheses are compared, pixels


class Instances(NamedTuple):
    """Disjoint instances of a photograph, by descending score: masks bool [n,H,W]; scores float32 [n] in 0..1."""

    masks: np.ndarray
    scores: np.ndarray


def pasted(found: Detections, side: int, size: tuple[int, int]) -> Tensor:
    """The masks of Detections in a square of ``side`` pixels as probabilities, float32 [n,H,W], of a photograph of
    ``size`` (H, W)."""
    height, width = size
    if not len(found.boxes):
        return found.masks.new_zeros((0, height, width))
    scale = found.boxes.new_tensor([width, height, width, height]) / side
    return paste_masks_in_image(found.masks[:, None], found.boxes * scale, (height, width))[:, 0]


def _pasted_one(found: Detections, index: int, side: int, size: tuple[int, int]) -> np.ndarray:
    """One mask of ``pasted``, [H,W]: all of them at the size of a large photograph would take much memory."""
    one = found._replace(boxes=found.boxes[index, None], masks=found.masks[index, None])
    return pasted(one, side, size)[0].cpu().numpy()


def ranked(found: Detections, side: int, size: tuple[int, int]) -> Instances:
    """All hypotheses of a photograph of ``size`` (H, W), overlapping."""
    masks = [_pasted_one(found, index, side, size) >= MASK_THRESH for index in range(len(found.boxes))]
    return Instances(np.stack(masks) if masks else np.zeros((0, *size), bool), found.scores.cpu().numpy())


def visible(found: Detections, side: int) -> list[int]:
    """The indices of the hypotheses that keep MIN_VISIBLE of their mask beside those kept before them."""
    masks = (pasted(found, side, (GRID, GRID)) >= MASK_THRESH).cpu().numpy()
    covered, kept = np.zeros((GRID, GRID), bool), []
    for index, mask in enumerate(masks):
        if mask.any() and (mask & ~covered).sum() >= MIN_VISIBLE * mask.sum():
            kept.append(index)
            covered |= mask
    return kept


def disjoint(found: Detections, side: int, size: tuple[int, int], count: int = 0) -> Instances:
    """The disjoint instances of a photograph of ``size`` (H, W).

    count: their number where it is known, else 0. A pixel goes to the instance of the highest mask probability there.
    """
    kept = visible(found, side)
    scores = found.scores.cpu().numpy()[kept]
    kept = kept[: count or most_probable_count(scores, found.count_probs.cpu().numpy())]
    best, owner = np.full(size, np.float32(MASK_THRESH)), np.full(size, -1)
    for number, index in enumerate(kept):
        probability = _pasted_one(found, index, side, size)
        owner[probability >= best] = number
        best = np.maximum(best, probability)
    masks = owner == np.arange(len(kept))[:, None, None]
    present = masks.any((1, 2))
    return Instances(masks[present], scores[: len(kept)][present])


def most_probable_count(scores: np.ndarray, count_probs: np.ndarray) -> int:
    """The most probable number of objects, at least 1 where there is a hypothesis.

    scores: [n] in 0..1, descending, of hypotheses that do not cover each other; count_probs: [MAX_COUNT + 1], those of
    0, 1, ... objects. It maximises p(k) prod_{i <= k} s_i prod_{i > k} (1 - s_i) over k; the last of the count_probs is
    halved for each number above MAX_COUNT - 1.
    """
    scores, numbers = np.clip(scores, 1e-3, 1 - 1e-3), np.arange(len(scores) + 1)
    prior = np.log(count_probs[np.minimum(numbers, MAX_COUNT)] + 1e-4)
    prior -= np.log(2) * np.maximum(numbers - MAX_COUNT + 1, 0)
    inside = np.concatenate([[0], np.cumsum(np.log(scores))])
    outside = np.concatenate([np.cumsum(np.log(1 - scores)[::-1])[::-1], [0]])
    return max(min(1, len(scores)), int((prior + inside + outside).argmax()))


def saliency_of(found: Detections, side: int, size: tuple[int, int]) -> np.ndarray:
    """Saliency float32 [H,W] in 0..1: for each pixel the highest product of score and mask probability."""
    products = pasted(found, side, (GRID, GRID)) * found.scores[:, None, None]
    saliency = products.amax(0).cpu().numpy() if len(products) else np.zeros((GRID, GRID), np.float32)
    return np.clip(cv2.resize(saliency, size[::-1], interpolation=cv2.INTER_LINEAR), 0, 1)


def centroids_of(masks: np.ndarray) -> np.ndarray:
    """The centres of mass (y, x) of bool masks [n,H,W], in pixels: float [n,2]."""
    return np.array([np.argwhere(mask).mean(0) for mask in masks]).reshape(-1, 2)
