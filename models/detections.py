"""From the overlapping hypotheses of the student network to a ranking of masks, or to disjoint instances [ours].

COCO's protocol measures all hypotheses as they are ranked. For a label map each object may appear only once: of all
sets of hypotheses that do not cover each other the best one is taken, by scores and by the probabilities of the count
head. So two good masks of two objects are preferred to one mask of both.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

from models.count_head import MAX_COUNT
from models.crf import refine_mask

MAX_DETECTIONS = 12  # hypotheses for a photograph
MASK_THRESH = 0.5  # probability above which a pixel belongs to a mask [Mask R-CNN]
MAX_COVERED = 0.5  # fraction of the smaller of two masks of a set that the other may cover
# Chosen on val and its mild perturbations, by the mean of four APs; smaller costs give more instances than objects.
INSTANCE_COST, COUNT_WEIGHT = 0.25, 0.1
GRID = 160  # side of the square on which hypotheses are compared, pixels
WINDOW, MARGIN = 56, 0.1  # side of the grid on which a mask is refined; around its box, a fraction of the box's sides

Place = tuple[slice, slice]  # rows and columns of a photograph


class Detections(NamedTuple):
    """The hypotheses of the student network for one photograph, by descending score; n is at most MAX_DETECTIONS.

    boxes: float32 [n,4], (x0, y0, x1, y1) in pixels of the input square. scores: float32 [n] in 0..1. masks: float32
    [n,28,28], mask probabilities inside the boxes. count_probs: float32 [MAX_COUNT + 1], the probabilities of 0, 1, ...
    objects, the last one of MAX_COUNT or more. image: the photograph as the network saw it, uint8 RGB [3,size,size],
    where ``refined`` is to align the masks with it; else None. The network returns tensors; the functions of this
    module take arrays.
    """

    boxes: Any
    scores: Any
    masks: Any
    count_probs: Any
    image: Any = None


class Instances(NamedTuple):
    """Disjoint instances of a photograph, by descending score: masks bool [n,H,W]; scores float32 [n] in 0..1."""

    masks: np.ndarray
    scores: np.ndarray


def pasted(found: Detections, side: int, size: tuple[int, int]) -> np.ndarray:
    """The masks of Detections in a square of ``side`` pixels as probabilities, float32 [n,H,W], of a photograph of
    ``size`` (H, W)."""
    probabilities = np.zeros((len(found.boxes), *size), np.float32)
    for index, whole in enumerate(probabilities):
        place, probability = _placed(found, index, side, size)
        whole[place] = probability
    return probabilities


def _placed(found: Detections, index: int, side: int, size: tuple[int, int]) -> tuple[Place, np.ndarray]:
    """Where one mask of ``pasted`` is above 0, and its values there, float32 [h,w].

    It computes what torchvision's ``paste_masks_in_image`` does, without the rest of the photograph.
    """
    height, width = size
    mask = cv2.copyMakeBorder(found.masks[index], 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    box = found.boxes[index] * (np.array([width, height, width, height], np.float32) / side)
    half = (box[2:] - box[:2]) * np.float32(0.5) * np.float32(len(mask) / (len(mask) - 2))
    centre = (box[2:] + box[:2]) * np.float32(0.5)
    (x0, y0), (x1, y1) = ((centre + sign * half).astype(int) for sign in (-1, 1))
    probability = cv2.resize(mask, (max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)), interpolation=cv2.INTER_LINEAR)
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1 + 1, height), min(x1 + 1, width)
    return np.s_[top:bottom, left:right], probability[top - y0 : bottom - y0, left - x0 : right - x0]


def refined(found: Detections, side: int) -> Detections:
    """Detections with masks aligned with their image by a dense CRF, each on a grid of WINDOW x WINDOW that is a little
    larger than its box; unchanged where they have no image, as those that are aligned [ours].

    The mask head decides in cells of a 28th of the box, and not beyond the box, whose sides are estimates themselves.
    side: of the input square of the network.
    """
    if found.image is None or not len(found.boxes):
        return found
    image = np.ascontiguousarray(found.image.transpose(1, 2, 0))
    windows, masks = [], []
    for box, mask in zip(found.boxes, pasted(found, side, (side, side)), strict=True):
        margin = MARGIN * (box[2:] - box[:2])
        (x0, y0), (x1, y1) = np.floor(box[:2] - margin).astype(int), np.ceil(box[2:] + margin).astype(int)
        window = x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, side), min(y1, side)
        colours, probability = (_resized(part[y0:y1, x0:x1]) for part in (image, mask))
        aligned = refine_mask(colours, probability)
        masks.append(aligned if aligned.max() >= MASK_THRESH else probability)  # no instance is lost
        windows.append(window)
    return found._replace(boxes=np.array(windows, np.float32), masks=np.stack(masks), image=None)


def _resized(part: np.ndarray) -> np.ndarray:
    shrinks = min(part.shape[:2]) >= WINDOW
    return cv2.resize(part, (WINDOW, WINDOW), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def ranked(found: Detections, side: int, size: tuple[int, int]) -> Instances:
    """All hypotheses of a photograph of ``size`` (H, W), overlapping."""
    found = refined(found, side)
    masks = np.zeros((len(found.boxes), *size), bool)
    for index, mask in enumerate(masks):
        place, probability = _placed(found, index, side, size)
        mask[place] = probability >= MASK_THRESH
    return Instances(masks, found.scores)


def best_set(scores: np.ndarray, masks: np.ndarray, count_probs: np.ndarray, count: int = 0) -> list[int]:
    """The indices of the best set of hypotheses in which no mask covers more than MAX_COVERED of another, by descending
    score.

    It has the largest sum of score - INSTANCE_COST over its hypotheses plus COUNT_WEIGHT log p(number of them).

    scores: [n] in 0..1, n at most MAX_DETECTIONS. masks: bool [n,h,w]. count_probs: [MAX_COUNT + 1], those of 0, 1, ...
    objects, the last one of MAX_COUNT or more. count: the number of objects where it is known: of sets with so many, or
    as many as there can be, the one with the largest sum of scores. Empty where no mask has a pixel.
    """
    places = np.flatnonzero(masks.any((1, 2)))
    if not len(places):
        return []
    flat, scores = masks[places].reshape(len(places), -1).astype(np.float32), scores[places]
    areas, common = flat.sum(1), flat @ flat.T
    conflicts = common > MAX_COVERED * np.minimum(areas, areas[:, None])
    np.fill_diagonal(conflicts, False)
    sets = (np.arange(1, 2 ** len(places))[:, None] >> np.arange(len(places)) & 1).astype(np.float32)  # one a row
    sets = sets[~((sets @ conflicts) * sets).any(1)]
    numbers = sets.sum(1).astype(int)
    if count:
        sets = sets[numbers == min(count, numbers.max())]
        values = sets @ scores
    else:
        prior = np.log(count_probs[np.minimum(numbers, MAX_COUNT)] + 0.01)
        values = sets @ (scores - INSTANCE_COST) + COUNT_WEIGHT * prior
    chosen = np.flatnonzero(sets[values.argmax()])
    return [int(place) for place in places[chosen[np.argsort(-scores[chosen], kind="stable")]]]


def disjoint(found: Detections, small: np.ndarray, side: int, size: tuple[int, int], count: int = 0) -> Instances:
    """The disjoint instances of a photograph of ``size`` (H, W).

    small: its hypotheses ``pasted`` at GRID x GRID, on which they are compared. count: the number of instances where it
    is known, else 0. A pixel goes to the instance of the highest mask probability there.
    """
    kept = best_set(found.scores, small >= MASK_THRESH, found.count_probs, count)
    chosen = refined(found._replace(boxes=found.boxes[kept], masks=found.masks[kept]), side)
    best, owner = np.full(size, np.float32(MASK_THRESH)), np.zeros(size, np.uint8)
    for number in range(len(kept)):
        place, probability = _placed(chosen, number, side, size)
        owner[place][probability >= best[place]] = number + 1
        np.maximum(best[place], probability, out=best[place])
    masks = owner == np.arange(1, len(kept) + 1, dtype=np.uint8)[:, None, None]
    present = masks.any((1, 2))
    return Instances(masks[present], found.scores[kept][present])


def saliency_of(found: Detections, small: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Saliency float32 [H,W] in 0..1: for each pixel the highest product of score and mask probability.

    small: as for ``disjoint``.
    """
    saliency = (small * found.scores[:, None, None]).max(0, initial=0)
    return np.clip(cv2.resize(saliency, size[::-1], interpolation=cv2.INTER_LINEAR), 0, 1)
