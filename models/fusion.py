"""S, B and V to one soft map per salient instance, and these to masks with scores (Sec. 3.1.1, 4.2; Fig. 2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from models.fusion_config import FusionConfig
from models.grouping import Clusters, group_by_counts, group_by_sinks
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

    saliency: S [H,W] and boundary: B [H,W], both in 0..1; offsets: V [2,H,W]; all on the stride-4 grid. count,
    hypotheses: as for ``group``. n may be 0.
    """
    clusters = group(saliency.cpu().numpy(), offsets, settings, count, hypotheses)
    return SoftInstances(walk(clusters.masks, saliency, boundary, settings), clusters.centroids)


def group(
    saliency: np.ndarray,
    offsets: Tensor,
    settings: FusionConfig,
    count: int = 0,
    hypotheses: Sequence[CountHypothesis] = (),
) -> Clusters:
    """The clusters of the salient region, one for each instance (Sec. 3.1.1).

    saliency: S [H,W] in 0..1; offsets: V [2,H,W], on the stride-4 grid. count: the number of objects by which pixels
    are grouped (``group_by_counts``); with 0 they are grouped by the sinks of V, as in the paper. hypotheses: of
    ``count_hypotheses`` for the same maps; the one of ``count`` is used where it is there.
    """
    precomputed = {hypothesis.number: hypothesis.clusters for hypothesis in hypotheses}
    if count in precomputed:
        return precomputed[count]
    if count:
        return group_by_counts(saliency, offsets.cpu().numpy(), [count], settings)[0]
    return group_by_sinks(saliency, offsets, settings)


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
    return walks([clusters], saliency[None], boundary[None], settings)[0]


def walks(clusters: Sequence[np.ndarray], saliency: Tensor, boundary: Tensor, settings: FusionConfig) -> list[Tensor]:
    """``walk`` for N photographs in one call of the operators, for a GPU: saliency [N,H,W], boundary [N,H,W]."""
    numbers = [len(masks) for masks in clusters]
    if not any(numbers):
        return [saliency.new_zeros(0, *saliency.shape[1:])] * len(numbers)
    padded = np.zeros((len(numbers), max(numbers), *saliency.shape[1:]), bool)
    for place, masks in zip(padded, clusters, strict=True):
        place[: len(masks)] = masks
    inside = torch.from_numpy(padded).to(saliency.device)
    start = inside * saliency[:, None]
    if settings.mask_rule == "relative":
        outside = ~(inside.any(1) & (saliency > settings.saliency_thresh))
        start = torch.cat([start, (outside * (1 - saliency))[:, None]], 1)
    start *= 1 - boundary[:, None]
    affinity = ops.boundary_affinity(boundary, settings.radius)
    maps = ops.random_walk(start, affinity, settings.radius, settings.power, settings.steps)
    normalise = _by_peaks if settings.mask_rule == "peak" else _against_others
    found = zip(maps, numbers, strict=True)
    return [normalise(of_one[:number], of_one[-1]) if number else of_one[:0] for of_one, number in found]


def _by_peaks(maps: Tensor, _: Tensor) -> Tensor:
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6)


def _against_others(maps: Tensor, background: Tensor) -> Tensor:
    maps, background = maps.clamp(min=1e-9), background.clamp(min=1e-9)  # the series may be slightly negative
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
