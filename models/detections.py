"""From the overlapping hypotheses of the student network to a ranking of masks, or to disjoint instances [ours].

COCO's protocol measures all hypotheses as they are ranked. For a label map each object may appear only once: of all
sets of hypotheses that do not cover each other the best one is taken, by scores and by the probabilities of the count
head. So two good masks of two objects are preferred to one mask of both.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from models.count_head import MAX_COUNT
from models.crf import refine_mask
from models.mask_rcnn import Detections

MASK_THRESH = 0.5  # probability above which a pixel belongs to a mask [Mask R-CNN]
MAX_COVERED = 0.5  # fraction of the smaller of two masks of a set that the other may cover
# Chosen on val and its mild perturbations, by the mean of four APs; smaller costs give more instances than objects.
INSTANCE_COST, COUNT_WEIGHT = 0.25, 0.1
GRID = 160  # side of the square on which hypotheses are compared, pixels
WINDOW, MARGIN = 56, 0.1  # side of the grid on which a mask is refined; around its box, a fraction of the box's sides


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


def refined(found: Detections, side: int) -> Detections:
    """Detections with masks aligned with their image by a dense CRF, each on a grid of WINDOW x WINDOW that is a little
    larger than its box; unchanged where they have no image, as those that are aligned [ours].

    The mask head decides in cells of a 28th of the box, and not beyond the box, whose sides are estimates themselves.
    side: of the input square of the network.
    """
    if found.image is None or not len(found.boxes):
        return found
    image = found.image.permute(1, 2, 0).contiguous().numpy()
    windows, masks = [], []
    for index, box in enumerate(found.boxes.cpu().numpy()):
        margin = MARGIN * (box[2:] - box[:2])
        (x0, y0), (x1, y1) = np.floor(box[:2] - margin).astype(int), np.ceil(box[2:] + margin).astype(int)
        window = x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, side), min(y1, side)
        mask = _pasted_one(found, index, side, (side, side))
        colours, probability = (_resized(part[y0:y1, x0:x1]) for part in (image, mask))
        aligned = refine_mask(colours, probability)
        masks.append(aligned if aligned.max() >= MASK_THRESH else probability)  # no instance is lost
        windows.append(window)
    return found._replace(boxes=found.boxes.new_tensor(windows), masks=torch.from_numpy(np.stack(masks)), image=None)


def _resized(part: np.ndarray) -> np.ndarray:
    shrinks = min(part.shape[:2]) >= WINDOW
    return cv2.resize(part, (WINDOW, WINDOW), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def ranked(found: Detections, side: int, size: tuple[int, int]) -> Instances:
    """All hypotheses of a photograph of ``size`` (H, W), overlapping."""
    found = refined(found, side)
    masks = [_pasted_one(found, index, side, size) >= MASK_THRESH for index in range(len(found.boxes))]
    return Instances(np.stack(masks) if masks else np.zeros((0, *size), bool), found.scores.cpu().numpy())


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


def disjoint(found: Detections, small: Tensor, side: int, size: tuple[int, int], count: int = 0) -> Instances:
    """The disjoint instances of a photograph of ``size`` (H, W).

    small: its hypotheses ``pasted`` at GRID x GRID, on which they are compared. count: the number of instances where it
    is known, else 0. A pixel goes to the instance of the highest mask probability there.
    """
    scores = found.scores.cpu().numpy()
    kept = best_set(scores, (small >= MASK_THRESH).cpu().numpy(), found.count_probs.cpu().numpy(), count)
    chosen = refined(found._replace(boxes=found.boxes[kept], masks=found.masks[kept]), side)
    best, owner = np.full(size, np.float32(MASK_THRESH)), np.full(size, -1)
    for number in range(len(kept)):
        probability = _pasted_one(chosen, number, side, size)
        owner[probability >= best] = number
        best = np.maximum(best, probability)
    masks = owner == np.arange(len(kept))[:, None, None]
    present = masks.any((1, 2))
    return Instances(masks[present], scores[kept][present])


def saliency_of(found: Detections, small: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Saliency float32 [H,W] in 0..1: for each pixel the highest product of score and mask probability.

    small: as for ``disjoint``.
    """
    products = small * found.scores[:, None, None]
    saliency = products.amax(0).cpu().numpy() if len(products) else np.zeros((GRID, GRID), np.float32)
    return np.clip(cv2.resize(saliency, size[::-1], interpolation=cv2.INTER_LINEAR), 0, 1)
