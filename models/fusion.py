"""S, B and V to one soft map per salient instance, and these to masks with scores (Sec. 3.1.1, 4.2; Fig. 2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from models.fusion_config import FusionConfig
from models.grouping import group_by_counts, group_by_sinks
from models.scoring import CountHypothesis, expected_iou, on_grid, score_of


class SoftInstances(NamedTuple):
    """The result of ``fuse`` for one image.

    maps: [n,H,W] in 0..1, as returned by ``walk``; centroids: float [n,2], (y, x) in pixels of the grid.
    """

    maps: Tensor
    centroids: np.ndarray


class InstanceMasks(NamedTuple):
    """The instances of one image, best first.

    masks: bool [n,H,W] at its size, disjoint; scores: float32 [n] in (0, 1]; kept: int [n], the soft map of each.
    """

    masks: np.ndarray
    scores: np.ndarray
    kept: np.ndarray


def fuse(
    saliency: Tensor,
    boundary: Tensor,
    offsets: Tensor,
    settings: FusionConfig,
    count: int = 0,
    hypotheses: Sequence[CountHypothesis] = (),
) -> SoftInstances:
    """One soft map per salient instance (Sec. 4.2): clusters of the salient region, and a random walk from each.

    saliency: S [H,W] and boundary: B [H,W], both in 0..1; offsets: V [2,H,W]; all on the stride-4 grid. count: the
    number of objects by which pixels are grouped (``group_by_counts``); with 0 they are grouped by the sinks of V, as
    in the paper. hypotheses: of ``count_hypotheses`` for the same maps; the one of ``count`` is used where it is
    there. n may be 0.
    """
    precomputed = {hypothesis.number: hypothesis.clusters for hypothesis in hypotheses}
    if count in precomputed:
        clusters = precomputed[count]
    elif count:
        (clusters,) = group_by_counts(saliency.cpu().numpy(), offsets.cpu().numpy(), [count], settings)
    else:
        clusters = group_by_sinks(saliency.cpu().numpy(), offsets, settings)
    return SoftInstances(walk(clusters.masks, saliency, boundary, settings), clusters.centroids)


def walk(clusters: np.ndarray, saliency: Tensor, boundary: Tensor, settings: FusionConfig) -> Tensor:
    """SI_n = M^t vec(SI*_n (1 - B)) with SI*_n = S on cluster n (Eq. 10), normalised by ``settings.mask_rule``.

    "peak": each map is divided by its maximum [IRN]. A faint instance then spreads, and one with a dominant peak is
    truncated.
    "relative" [ours]: the walk also starts from the background, from every pixel that is not salient or belongs to no
    cluster, with strength 1 - S. The value of a pixel is the smaller of two fractions: inst / (inst + background), and
    the same against the strongest other instance after division by the peaks, without which the larger instance would
    take the smaller.

    clusters: bool [n,H,W]; saliency: S [H,W] and boundary: B [H,W] in 0..1, on the stride-4 grid. Returns [n,H,W] in
    0..1 on the device of S.
    """
    if not len(clusters):
        return saliency.new_zeros(0, *saliency.shape)
    inside = torch.from_numpy(clusters).to(saliency.device)
    start = inside * saliency
    if settings.mask_rule == "relative":
        outside = ~(inside.any(0) & (saliency > settings.saliency_thresh))
        start = torch.cat([start, (outside * (1 - saliency))[None]])
    affinity = ops.boundary_affinity(boundary[None], settings.radius)
    maps = ops.random_walk((start * (1 - boundary))[None], affinity, settings.radius, settings.power, settings.steps)[0]
    if settings.mask_rule == "peak":
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6)
    maps = maps.clamp(min=1e-9)  # the Chebyshev series may be slightly negative
    maps, background = maps[:-1], maps[-1]
    parts = maps / maps.amax((1, 2), keepdim=True)
    first, second = torch.cat([parts, torch.zeros_like(background)[None]]).topk(2, 0).values
    strongest_other = torch.where(parts == first, second, first)
    return torch.minimum(maps / (maps + background), parts / (parts + strongest_other))


def instance_masks(
    maps: Tensor | np.ndarray,
    saliency: Tensor,
    size: tuple[int, int],
    settings: FusionConfig,
    hypotheses: Sequence[CountHypothesis] = (),
) -> InstanceMasks:
    """Soft maps to masks at the image's size: bilinear upsampling, background threshold, argmax, score.

    maps: as returned by ``walk``, [n,h,w] in 0..1, or bool masks of clusters; saliency: S [h,w] in 0..1; size: (H, W).
    The score is ``score_of``, multiplied by ``expected_iou`` where there are ``hypotheses``. Instances of at most
    ``settings.min_area`` of the image, or with a score below ``settings.min_score``, are dropped.
    """
    empty = InstanceMasks(np.zeros((0, *size), bool), np.zeros(0, np.float32), np.zeros(0, np.int64))
    if not len(maps):
        return empty
    maps = torch.as_tensor(maps, dtype=saliency.dtype, device=saliency.device)

    # One full-size map at a time, which bounds the memory.
    value = saliency.new_full(size, settings.mask_thresh)
    owner = torch.full(size, -1, dtype=torch.int32, device=saliency.device)
    for index, small in enumerate(maps):
        full = F.interpolate(small[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        owner[full > value] = index
        value = torch.maximum(value, full)
    owners, grid_saliency = owner.cpu().numpy(), saliency.cpu().numpy()
    found = []
    for index in range(len(maps)):
        mask = owners == index
        if mask.sum() <= settings.min_area * mask.size:
            continue
        inside = on_grid(mask, grid_saliency.shape)
        score = score_of(inside, grid_saliency)
        if hypotheses:
            score *= expected_iou(inside, hypotheses)
        if score >= settings.min_score:
            found.append((score, index, mask))
    if not found:
        return empty
    found.sort(key=lambda entry: -entry[0])
    scores, kept, masks = zip(*found, strict=True)
    return InstanceMasks(np.stack(masks), np.array(scores, np.float32), np.array(kept))
