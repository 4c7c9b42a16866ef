"""Pseudo labels from the whole network: the masks of PTS (Sec. 3.4.1), and instances for a self-training round."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from datasets.labels import IGNORE
from models.crf import refine_saliency
from models.fusion import fuse, instance_masks, walk
from models.fusion_config import FusionConfig
from models.grouping import Region, components, masks_of, split_regions

# Value of the pseudo mask above which a pixel belongs to an instance, and below which to the background [ours].
FG_THRESH, BG_THRESH = 0.6, 0.3


class Maps(NamedTuple):
    """What the network predicts for one photograph, on the stride-4 grid [h,w] of its input square.

    saliency: S [h,w] and boundary: B [h,w], both in 0..1; offsets: V [2,h,w] in pixels of the grid.
    """

    saliency: torch.Tensor
    boundary: torch.Tensor
    offsets: torch.Tensor


def pseudo_mask(
    image: np.ndarray,
    maps: Maps,
    count: int,
    settings: FusionConfig,
    saliency_weight: float = 0.0,
    initial: np.ndarray | None = None,
    init_mask_weight: float = 0.0,
) -> np.ndarray | None:
    """The next pseudo label rho of one photograph: the union of its salient instances, refined by the CRF (Alg. 1).

    image: uint8 RGB [S,S,3]; count: number of objects, by which instances are grouped where ``settings`` say so.
    saliency_weight: of S in its mean with the union [ours]. initial: float [S,S] in 0..1, the pseudo mask that was made
    from the class labels; init_mask_weight: its weight in the mean of both [ours].
    Returns float32 [S,S] in 0..1, or None where no instance is found: the photograph then has no new label.
    """
    grouped_by = count if settings.grouping == "count" else 0
    responses, _ = fuse(maps.saliency, maps.boundary, maps.offsets, settings, grouped_by)
    masks, _, _ = instance_masks(responses, maps.saliency, image.shape[:2], settings)
    if not len(masks):
        return None
    foreground: np.ndarray = np.asarray(masks.any(0), np.float32)
    if saliency_weight:
        soft = F.interpolate(maps.saliency[None, None], image.shape[:2], mode="bilinear")[0, 0].numpy()
        foreground = (1 - saliency_weight) * foreground + saliency_weight * np.clip(soft, 0, 1)
    if initial is not None and init_mask_weight:
        foreground = (1 - init_mask_weight) * foreground + init_mask_weight * initial
    return refine_saliency(image, foreground)


def instance_label(
    label: np.ndarray,
    maps: Maps,
    count: int,
    settings: FusionConfig,
    classes: np.ndarray | None = None,
) -> np.ndarray | None:
    """The salient region of a pseudo label divided into as many instances as its count label, to train the branches on
    [ours].

    The class labels that the branches are first trained on merge touching objects of one class. These labels separate
    them, by the V and B of the network, and their contours are those of the CRF.
    label: float32 [S,S] in 0..1, as returned by ``pseudo_mask``, in place of S; count: the count label, 1 or more;
    classes: uint8 [S,S], the photograph's class labels (0 background, 1..20, 255 undecided) or None: pixels of an
    instance whose label differs from its most frequent class are undecided.
    Returns uint8 [S,S]: 0 background, 1..count instance, 255 undecided; None where not exactly ``count`` instances
    result, each at least ``settings.min_area`` of the image.
    """
    grid = (maps.boundary.shape[0], maps.boundary.shape[1])
    saliency = F.adaptive_avg_pool2d(torch.from_numpy(label)[None], grid)[0]
    region, least = saliency.numpy() > settings.saliency_thresh, settings.min_area * saliency.numel()
    offsets = maps.offsets.numpy()
    pieces = split_regions([Region.at(part, offsets) for part in components(region, least)], count)
    if len(pieces) != count:
        return None
    # The label fixes the region, so the walk only divides it, by responses relative to each part's own peak.
    peaks = replace(settings, mask_rule="peak")
    responses = walk(masks_of([piece.pixels for piece in pieces], grid), saliency, maps.boundary, peaks)
    responses = F.interpolate(responses[None], label.shape, mode="bilinear")[0]
    nearest = responses.argmax(0).numpy().astype(np.uint8) + 1
    result = np.where(label > FG_THRESH, nearest, np.where(label < BG_THRESH, 0, IGNORE)).astype(np.uint8)
    if classes is not None:
        decided = (classes > 0) & (classes != IGNORE)
        for number in range(1, count + 1):
            inside = decided & (result == number)
            if inside.any():
                result[inside & (classes != np.bincount(classes[inside]).argmax())] = IGNORE
    size = np.bincount(result.ravel(), minlength=count + 1)[1 : count + 1]
    return result if size.min() >= settings.min_area * result.size else None
