"""Salient pixels grouped to instances: by the sinks of V (Sec. 3.1.1), by connected components, by a given number.

All maps are on the stride-4 grid [H,W].
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

import ops
from datasets.labels import IGNORE
from models.fusion_config import FusionConfig

SAMPLED = 1000  # points of a region that k-means iterates on


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


class Region:
    """Pixels, which k-means divides into any number of groups, each number once.

    pixels: int [M,2], (y, x). points: float [2,M], by which they are grouped.
    """

    def __init__(self, pixels: np.ndarray, points: np.ndarray) -> None:
        self.pixels = pixels
        self.points = points
        self._groups: dict[int, list[Region]] = {}

    @classmethod
    def at(cls, pixels: np.ndarray, offsets: np.ndarray | None = None) -> "Region":
        """Grouped by the positions p of the pixels or, given V as ``offsets`` [2,H,W], by p + V(p)."""
        y, x = pixels.T
        return cls(pixels, np.ascontiguousarray(pixels.T, float) if offsets is None else pixels.T + offsets[:, y, x])

    def groups(self, count: int) -> list["Region"]:
        """Up to ``count`` groups, none of them empty."""
        if count == 1:
            return [self]
        if count not in self._groups:
            group = self._k_means(count)
            indices = (np.flatnonzero(group == k) for k in range(count))
            self._groups[count] = [Region(self.pixels[i], self.points[:, i]) for i in indices if len(i)]
        return self._groups[count]

    @cached_property
    def _along_axis(self) -> np.ndarray:
        """The points [2,M] by their position along the principal axis."""
        around = self.points - self.points.mean(1, keepdims=True)
        axis = np.linalg.eigh(around @ around.T)[1][:, -1]
        return self.points[:, np.argsort(axis @ around, kind="stable")]

    def _k_means(self, count: int) -> np.ndarray:
        """The group of each pixel [M]: at most ten iterations, from starts at even steps along the principal axis, on
        every n-th point, about SAMPLED."""
        total = self.points.shape[1]
        centres = self._along_axis[:, ((np.arange(count) + 0.5) / count * total).astype(int)]
        sample = self.points[:, :: max(1, total // SAMPLED)].copy()
        group = np.zeros(0, np.int64)
        for _ in range(10):
            before, group = group, _nearest(sample, centres)
            if np.array_equal(before, group):
                break
            size = np.bincount(group, minlength=count)
            sums = np.stack([np.bincount(group, column, count) for column in sample])
            centres = np.where(size > 0, sums / np.maximum(size, 1), centres)  # an empty group keeps its centre
        return _nearest(self.points, centres)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest of ``centres`` [2,K] to each of ``points`` [2,M]: int [M]."""
    (y, x), (cy, cx) = points, centres[:, :, None]
    return (np.square(y - cy) + np.square(x - cx)).argmin(0)


def split_regions(regions: Sequence[Region], count: int) -> list[Region]:
    """The largest of ``regions`` divided until there are ``count`` pieces; regions are never merged.

    Each new piece goes to the region with the most pixels per piece.
    """
    pieces = [1] * len(regions)
    while regions and sum(pieces) < count:
        pieces[max(range(len(regions)), key=lambda k: len(regions[k].pixels) / pieces[k])] += 1
    return [group for region, k in zip(regions, pieces, strict=True) for group in region.groups(k)]


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
    for number, piece in enumerate(split_regions([Region.at(part) for part in parts], count), 1):
        instances[tuple(piece.pixels.T)] = number
    return instances


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


def group_by_counts(
    saliency: np.ndarray, offsets: np.ndarray, counts: Iterable[int], settings: FusionConfig
) -> list[Clusters]:
    """The salient region in as many groups as each of ``counts``, by k-means of the points p + V(p) [ours].

    These points draw together long before V has one sink per object. Connected components stay apart, so there may be
    more than asked for; the largest are split.

    saliency: S [H,W] in 0..1; offsets: V [2,H,W] in pixels of the grid; counts: each 1 or more. A centroid is the mean
    of the points of its group.
    """
    parts = components(saliency > settings.saliency_thresh, settings.min_area * saliency.size)
    regions = [Region.at(part, offsets) for part in parts]
    found = []
    for count in counts:
        pieces = split_regions(regions, count)
        masks = masks_of([piece.pixels for piece in pieces], saliency.shape)
        centroids = [piece.points.mean(1) for piece in pieces]
        found.append(Clusters(masks, np.array(centroids).reshape(-1, 2)))
    return found
