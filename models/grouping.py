"""Salient pixels grouped to instances: by the sinks of V (Sec. 3.1.1), by connected components, by a given number.

All maps are on the stride-4 grid [H,W].
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

import ops
from datasets.labels import IGNORE
from models.fusion_config import FusionConfig


class Clusters(NamedTuple):
    """The salient pixels of n instances.

    masks: bool [n,H,W], disjoint. centroids: float [n,2], (y, x) in pixels of the grid.
    """

    masks: np.ndarray
    centroids: np.ndarray


def components(region: np.ndarray, min_size: float) -> list[np.ndarray]:
    """The 4-connected components of a bool [H,W] with at least ``min_size`` pixels: list of int [M_k,2], (y, x)."""
    found, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=4)
    return [np.argwhere(labels == k) for k in range(1, found) if stats[k, cv2.CC_STAT_AREA] >= min_size]


def split_regions(regions: Sequence[np.ndarray], count: int, offsets: np.ndarray | None = None) -> list[np.ndarray]:
    """Split the largest of ``regions`` until there are ``count``; regions are never merged.

    regions: list of int [M_k,2], the (y, x) of their pixels. Each new piece goes to the region with the most pixels per
    piece. A region is split by k-means of its pixels' positions p or, given V as ``offsets`` [2,H,W], of their points
    p + V(p). Returns a list of int [M_n,2].
    """
    pieces = [1] * len(regions)
    while regions and sum(pieces) < count:
        pieces[max(range(len(regions)), key=lambda k: len(regions[k]) / pieces[k])] += 1
    return [piece for region, k in zip(regions, pieces, strict=True) for piece in _k_means(region, k, offsets)]


def split_labels_by_count(classes: np.ndarray, count: int, min_area: float = 0.005) -> np.ndarray:
    """Pseudo instances from class labels and the count label [ours].

    Instances are the connected components of each class, so touching objects of two classes are separate. If there are
    more than T, the T largest are used; if there are fewer, the largest are split (``split_regions``).

    classes: integers [H,W], 0 background, 1..20 class, 255 undecided; count: T; min_area: fraction of the image below
    which a component is ignored. Returns int64 [H,W], 1..n in the instances, 0 elsewhere; n is T, or 0 without any
    component.
    """
    parts: list[np.ndarray] = []
    for name in np.unique(classes[(classes > 0) & (classes != IGNORE)]):
        parts += components(classes == name, min_area * classes.size)
    parts = sorted(parts, key=len, reverse=True)[:count]
    instances = np.zeros(classes.shape, np.int64)
    for number, piece in enumerate(split_regions(parts, count), 1):
        instances[piece[:, 0], piece[:, 1]] = number
    return instances


def _k_means(pixels: np.ndarray, count: int, offsets: np.ndarray | None) -> list[np.ndarray]:
    """Pixels [M,2] in ``count`` groups: at most ten iterations from starts at even steps along the principal axis."""
    if count == 1:
        return [pixels]
    points = pixels if offsets is None else pixels + offsets[:, pixels[:, 0], pixels[:, 1]].T
    points = points - points.mean(0)
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]
    order = np.argsort(points @ axis, kind="stable")
    y, x = points.T.copy()
    centres = points[order[((np.arange(count) + 0.5) / count * len(points)).astype(int)]]
    group = np.zeros(0, np.int64)
    for _ in range(10):
        before, group = group, (np.square(y - centres[:, :1]) + np.square(x - centres[:, 1:])).argmin(0)
        if np.array_equal(before, group):
            break
        size = np.bincount(group, minlength=count)[:, None]
        sums = np.stack([np.bincount(group, column, count) for column in (y, x)], 1)
        centres = np.where(size > 0, sums / np.maximum(size, 1), centres)  # an empty group keeps its centre
    return [pixels[group == k] for k in range(count) if (group == k).any()]


def find_clusters(
    offsets: Tensor, sink_thresh: float = 2.5, region: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels clustered by the sinks that they converge to (Eq. 1, 2).

    Sinks are the 4-connected components of |V| < sink_thresh. A pixel p moves along V to the point that it converges
    to, and belongs to the sink with the pixel nearest to that point.

    offsets: V [2,H,W]; sink_thresh: above 0; both in pixels of the grid. region: bool [H,W], to which sinks and
    clusters are restricted; None is the whole image. Returns (labels int64 [H,W]: k = 1..n for the k-th sink, 0 outside
    the region, and everywhere if there is no sink; centroids float [n,2], the (y, x) mean of the pixels of each sink).
    """
    at_rest = (offsets.square().sum(0) < sink_thresh**2).cpu().numpy()
    if region is not None:
        at_rest &= region
    if not at_rest.any():
        return np.zeros(at_rest.shape, np.int64), np.zeros((0, 2))
    _, sinks, _, centroids = cv2.connectedComponentsWithStats(at_rest.astype(np.uint8), connectivity=4)
    # OpenCV approximates the distance, which matters for the few points outside all sinks only. SciPy's is exact, but
    # its import takes longer than a photograph.
    moving = (~at_rest).astype(np.uint8)
    _, nearest = cv2.distanceTransformWithLabels(moving, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    sink_of = np.zeros(nearest.max() + 1, np.int64)
    sink_of[nearest[at_rest]] = sinks[at_rest]
    y, x = ops.converge_centroids(offsets[None])[0].round().long().cpu().numpy()
    labels = sink_of[nearest[y, x]]
    if region is not None:
        labels = np.where(region, labels, 0)
    return labels, centroids[1:, ::-1].copy()


def salient_clusters(
    labels: np.ndarray, saliency: np.ndarray, centroids: np.ndarray, settings: FusionConfig
) -> Clusters:
    """The clusters whose salient fraction is above theta (Sec. 3.1.1), of at least min_area of the image.

    labels, centroids: as returned by ``find_clusters``; saliency: S [H,W] in 0..1.
    """
    salient = saliency > settings.saliency_thresh
    size = np.bincount(labels.ravel(), minlength=len(centroids) + 1)
    inside = np.bincount(labels[salient], minlength=len(centroids) + 1)
    keep = np.flatnonzero((inside > settings.theta * size) & (size >= settings.min_area * labels.size))
    keep = keep[keep > 0]
    return Clusters(keep[:, None, None] == labels, centroids[keep - 1])


def masks_of(parts: Sequence[np.ndarray], grid: Sequence[int]) -> np.ndarray:
    """Lists of pixels, int [M_k,2], as bool masks [n,*grid]."""
    masks = np.zeros((len(parts), *grid), bool)
    for mask, (y, x) in zip(masks, (part.T for part in parts), strict=True):
        mask[y, x] = True
    return masks


def connected_components(saliency: np.ndarray, settings: FusionConfig) -> Clusters:
    """The 4-connected components of the salient region, a baseline without V; saliency: S [H,W] in 0..1."""
    region = np.asarray(saliency > settings.saliency_thresh)
    parts = components(region, settings.min_area * region.size)
    return Clusters(masks_of(parts, region.shape), np.array([part.mean(0) for part in parts]).reshape(-1, 2))


def group_by_sinks(saliency: np.ndarray, offsets: Tensor, settings: FusionConfig) -> Clusters:
    """The salient clusters around the sinks of V (Sec. 3.1.1).

    saliency: S [H,W] in 0..1; offsets: V [2,H,W] in pixels of the grid.
    """
    region = saliency > settings.saliency_thresh if settings.centroid_region == "salient" else None
    labels, centroids = find_clusters(offsets, settings.sink_thresh, region)
    return salient_clusters(labels, saliency, centroids, settings)


def group_by_count(saliency: np.ndarray, offsets: np.ndarray, count: int, settings: FusionConfig) -> Clusters:
    """The salient region in ``count`` groups, by k-means of the points p + V(p) [ours].

    These points draw together long before V has one sink per object. Connected components stay apart, so there may be
    more than ``count``; the largest are split.

    saliency: S [H,W] in 0..1; offsets: V [2,H,W] in pixels of the grid; count: 1 or more. A centroid is the mean of the
    points of its group.
    """
    parts = components(saliency > settings.saliency_thresh, settings.min_area * saliency.size)
    parts = split_regions(parts, count, offsets)
    centroids = [(part + offsets[:, part[:, 0], part[:, 1]].T).mean(0) for part in parts]
    return Clusters(masks_of(parts, saliency.shape), np.array(centroids).reshape(-1, 2))
