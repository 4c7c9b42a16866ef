"""The salient region divided into instances: by the sinks of V (Sec. 3.1.1), by components, by a known number."""

import cv2
import numpy as np

import ops
from datasets.labels import IGNORE


def components(region, least):
    """The 4-connected components of a bool [H,W] of at least ``least`` pixels: list of int [M_k,2], their (y, x)."""
    found, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=4)
    return [np.argwhere(labels == k) for k in range(1, found) if stats[k, cv2.CC_STAT_AREA] >= least]


def split_regions(parts, count, offsets=None):
    """Divide the largest of ``parts`` until there are ``count``; what is more stays.

    parts: list of int [M_k,2], the (y, x) pixels of regions. The parts with the most pixels per object are divided, by
    k-means of their pixels' places p, so that each piece holds about as much as another; or, given V as ``offsets``
    [2,H,W] in the same pixels, of where they point to, p + V(p). Returns a list of int [M_n,2].
    """
    shares = [1] * len(parts)
    while parts and sum(shares) < count:
        shares[max(range(len(parts)), key=lambda k: len(parts[k]) / shares[k])] += 1
    return [piece for part, share in zip(parts, shares, strict=True) for piece in _k_means(part, share, offsets)]


def split_labels_by_count(classes, count, min_area=0.005):
    """The photograph's objects in as many parts as the count label says [ours].

    Parts are the connected components of each class: touching objects of two classes are two. Where there are too
    many, the largest T stay; where there are too few, they are divided.

    classes: integers [H,W], 0 background, 1..20 class, 255 undecided; count: T; smallest: share of the image below
    which a component is noise. Returns int64 [H,W], 0 elsewhere and 1..n in the parts; n is T, or 0 without any
    component.
    """
    parts = []
    for name in np.unique(classes[(classes > 0) & (classes != IGNORE)]):
        parts += components(classes == name, min_area * classes.size)
    parts = sorted(parts, key=len, reverse=True)[:count]
    instances = np.zeros(classes.shape, np.int64)
    for number, piece in enumerate(split_regions(parts, count), 1):
        instances[piece[:, 0], piece[:, 1]] = number
    return instances


def _k_means(place, share, offsets):
    """Pixels [M,2] in ``share`` compact groups: k-means, ten steps at most, from even steps along the longest axis."""
    if share == 1:
        return [place]
    points = place if offsets is None else place + offsets[:, place[:, 0], place[:, 1]].T
    points = points - points.mean(0)
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]
    order = np.argsort(points @ axis, kind="stable")
    y, x = points.T.copy()
    centres = points[order[((np.arange(share) + 0.5) / share * len(points)).astype(int)]]
    group = None
    for _ in range(10):
        before, group = group, (np.square(y - centres[:, :1]) + np.square(x - centres[:, 1:])).argmin(0)
        if np.array_equal(before, group):
            break
        size = np.bincount(group, minlength=share)[:, None]
        sums = np.stack([np.bincount(group, column, share) for column in (y, x)], 1)
        centres = np.where(size > 0, sums / np.maximum(size, 1), centres)  # an empty group stays where it is
    return [place[group == k] for k in range(share) if (group == k).any()]


def find_clusters(offsets, sink=2.5, region=None):
    """Pixels grouped by where their offsets lead them (Eq. 1, 2).

    offsets: V [2,H,W] in stride-4 pixels. Sinks are the 4-connected components of |V| < sink; a pixel belongs
    to the sink nearest the point it converges to. region: bool [H,W], where sinks may lie and pixels are
    grouped; default everywhere. Returns (labels int [H,W] in 0..n, 0 outside the region and where there is no
    sink at all; centroids float [n,2], the (y, x) centres of the sinks).
    """
    from scipy import ndimage  # here, because it is slow to import and the count's way to group does without

    at_rest = (offsets.square().sum(0) < sink**2).cpu().numpy()
    if region is not None:
        at_rest &= region
    sinks, count = ndimage.label(at_rest)
    if not count:
        return np.zeros(at_rest.shape, np.int64), np.zeros((0, 2))
    nearest = ndimage.distance_transform_edt(sinks == 0, return_distances=False, return_indices=True)
    y, x = ops.converge_centroids(offsets[None])[0].round().long().cpu().numpy()
    labels = sinks[nearest[0], nearest[1]][y, x]
    if region is not None:
        labels = np.where(region, labels, 0)
    return labels, np.array(ndimage.center_of_mass(at_rest, sinks, range(1, count + 1))).reshape(-1, 2)


def salient_clusters(labels, saliency, centroids, settings):
    """The clusters of which more than theta is salient (Sec. 3.1.1): (bool masks [n,H,W], centroids [n,2])."""
    salient = saliency > settings.saliency_thresh
    size = np.bincount(labels.ravel(), minlength=len(centroids) + 1)
    inside = np.bincount(labels[salient], minlength=len(centroids) + 1)
    keep = np.flatnonzero((inside > settings.theta * size) & (size >= settings.min_area * labels.size))
    keep = keep[keep > 0]
    return keep[:, None, None] == labels, centroids[keep - 1]


def masks_of(parts, grid):
    """Lists of pixels, int [M_k,2], as bool masks [n,*grid]."""
    masks = np.zeros((len(parts), *grid), bool)
    for mask, (y, x) in zip(masks, (part.T for part in parts), strict=True):
        mask[y, x] = True
    return masks


def connected_components(saliency, settings):
    """The naive alternative to centroids: 4-connected components of the salient region, as ``salient_clusters``."""
    region = np.asarray(saliency > settings.saliency_thresh)
    parts = components(region, settings.min_area * region.size)
    return masks_of(parts, region.shape), np.array([part.mean(0) for part in parts]).reshape(-1, 2)


def group_by_count(saliency, offsets, count, settings):
    """The salient region in ``count`` parts, by where its pixels point to [ours].

    Where the field has formed, its sinks are the centroids (``find_clusters``). Long before that the places p + V(p)
    draw together, and knowing their number, k-means finds the groups. Components stay apart; the largest are divided.
    saliency: [H,W] in 0..1; offsets: V [2,H,W], both arrays; count: 1 or more. Returns as ``salient_clusters``; a
    centroid is the mean place that a cluster points to.
    """
    parts = components(saliency > settings.saliency_thresh, settings.min_area * saliency.size)
    parts = split_regions(parts, count, offsets)
    centroids = [(part + offsets[:, part[:, 0], part[:, 1]].T).mean(0) for part in parts]
    return masks_of(parts, saliency.shape), np.array(centroids).reshape(-1, 2)
