"""Fusion: saliency, boundary and offsets to one soft map per salient instance (Sec. 3.1.1, 4.2; Fig. 2)."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import ops
from models.counting import components, divide
from utils.cli import InputError, integer, number


def _one_of(*choices):
    """As ``utils.cli.number``, for one of several words."""

    def parse(text):
        if text not in choices:
            raise ArgumentTypeError(f"{text!r} does not fit; give {' or '.join(choices)}")
        return text

    return parse


# What each setting may be. Ends that are left out would find nothing in any photograph, or overflow.
ALLOWED = {
    "theta": number(0, below=1),
    "sink": number(None, 1000, above=0),
    "region": _one_of("salient", "image"),
    "radius": integer(1, 64),
    "power": number(0.1, 1000),
    "steps": integer(0, 10**5),
    "salient": number(0, below=1),
    "share": _one_of("rival", "peak"),
    "background": number(0, below=1),
    "smallest": number(0, below=1),
    "unsure": number(0, 1),
    "doubt": number(0, 100),
}


@dataclass(frozen=True)
class Fusion:
    """The settings of the fusion; lengths in pixels of the stride-4 grid.

    theta: share of a cluster that must be salient (Sec. 3.1.1). sink: |V| below which a pixel is at rest.
    region: "salient" looks for centroids among the salient pixels, "image" everywhere.
    radius, power, steps: of the random walk (Eq. 9, 10). salient: S above which a pixel is salient.
    share: what the masks are cut by: an instance's share beside its strongest "rival", another or the background
    [ours], or of its own "peak" [IRN]. background: share below which a pixel is background. smallest: share of the
    image under which an instance is dropped; unsure: score under which it is. doubt: how much doubt about the number of
    objects lowers a score, a power of ``expected_iou``; 0 not at all. InputError for a value that ``ALLOWED`` has not.
    """

    theta: float = 0.5
    sink: float = 2.5
    region: str = "salient"
    radius: int = 5
    power: float = 5.0
    steps: int = 256
    salient: float = 0.5
    share: str = "rival"
    background: float = 0.4
    smallest: float = 0.01
    unsure: float = 0.1
    doubt: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            value = str(getattr(self, field.name))  # a text from the command line, or a number
            try:
                object.__setattr__(self, field.name, ALLOWED[field.name](value))
            except ArgumentTypeError as error:
                raise InputError(f"--fusion {field.name}={value}: {error}") from error

    @classmethod
    def of(cls, arguments, start=None):
        """The settings in ``start``, by default those above, with those of --fusion NAME=VALUE ... changed; InputError
        for what is none."""
        given = {}
        for argument in arguments:
            name, _, given[name] = argument.partition("=")
            if name not in ALLOWED:
                raise InputError(f"--fusion {argument}: there is no such setting; there are {', '.join(ALLOWED)}")
        return replace(start or cls(), **given)


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
    salient = saliency > settings.salient
    size = np.bincount(labels.ravel(), minlength=len(centroids) + 1)
    inside = np.bincount(labels[salient], minlength=len(centroids) + 1)
    keep = np.flatnonzero((inside > settings.theta * size) & (size >= settings.smallest * labels.size))
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
    region = np.asarray(saliency > settings.salient)
    parts = components(region, settings.smallest * region.size)
    return masks_of(parts, region.shape), np.array([part.mean(0) for part in parts]).reshape(-1, 2)


def counted_clusters(saliency, offsets, count, settings):
    """The salient region in ``count`` parts, by where its pixels point to [ours].

    Where the field has formed, its sinks are the centroids (``find_clusters``). Long before that the places p + V(p)
    draw together, and knowing their number, k-means finds the groups. Components stay apart; the largest are divided.
    saliency: [H,W] in 0..1; offsets: V [2,H,W], both arrays; count: 1 or more. Returns as ``salient_clusters``; a
    centroid is the mean place that a cluster points to.
    """
    parts = components(saliency > settings.salient, settings.smallest * saliency.size)
    parts = divide(parts, count, offsets)
    centroids = [(part + offsets[:, part[:, 0], part[:, 1]].T).mean(0) for part in parts]
    return masks_of(parts, saliency.shape), np.array(centroids).reshape(-1, 2)


def fuse(saliency, boundary, offsets, settings, count=0):
    """One soft map per salient instance (Sec. 4.2): clusters of the salient region, and the walk from each.

    saliency S and boundary B: [H,W] in 0..1; offsets V: [2,H,W]; all on the stride-4 grid. count: the number of
    objects, for ``counted_clusters``; 0 takes the sinks of V for centroids, as the paper does. Returns (maps [n,H,W] of
    ``walk``, centroids float [n,2]); n may be 0.
    """
    seen = saliency.cpu().numpy()
    if count:
        clusters, centroids = counted_clusters(seen, offsets.cpu().numpy(), count, settings)
    else:
        region = seen > settings.salient if settings.region == "salient" else None
        labels, centroids = find_clusters(offsets, settings.sink, region)
        clusters, centroids = salient_clusters(labels, seen, centroids, settings)
    return walk(clusters, saliency, boundary, settings), centroids


def walk(clusters, saliency, boundary, settings):
    """SI_n = M^t vec(SI*_n (1 - B)), SI*_n = S on cluster n (Eq. 10), and how much of a pixel each has.

    By a share of its own peak [IRN] a faint instance spreads, and one with a sure part loses the others. So the
    background walks too, from SI*_0 = 1 - S on all that is not salient or in no cluster, and what comes from an
    instance is set beside what comes from there. Beside each other instances are still compared by shares of their
    peaks, or the larger would take the smaller. The lesser of the two shares counts; above one half, both hold [ours].
    clusters: bool [n,H,W]; saliency S and boundary B: [H,W] in 0..1, all on the stride-4 grid. Returns the shares
    [n,H,W] in 0..1, of what ``settings.share`` says, on the device of S.
    """
    if not len(clusters):
        return saliency.new_zeros(0, *saliency.shape)
    inside = torch.from_numpy(clusters).to(saliency.device)
    start = inside * saliency
    if settings.share == "rival":
        outside = ~(inside.any(0) & (saliency > settings.salient))
        start = torch.cat([start, (outside * (1 - saliency))[None]])
    affinity = ops.boundary_affinity(boundary[None], settings.radius)
    maps = ops.random_walk((start * (1 - boundary))[None], affinity, settings.radius, settings.power, settings.steps)[0]
    if settings.share == "peak":
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-6)
    maps = maps.clamp(min=1e-9)  # the series of the walk may end a hair below 0
    maps, background = maps[:-1], maps[-1]
    parts = maps / maps.amax((1, 2), keepdim=True)
    first, second = torch.cat([parts, torch.zeros_like(background)[None]]).topk(2, 0).values
    rival = torch.where(parts == first, second, first)
    return torch.minimum(maps / (maps + background), parts / (parts + rival))


def guesses(saliency, offsets, shares, settings):
    """What the salient region would come apart into, were there 1, 2, ... objects [ours].

    saliency: [H,W] in 0..1; offsets: V [2,H,W], both arrays; shares: float [M], the probability of each number. Returns
    a list of (probability, bool [n,H,W]); those of less than 1 % are left out, and all where ``doubt`` is 0.
    """
    if not settings.doubt:
        return []
    likely = [(float(share), count) for count, share in enumerate(shares, 1) if share > 0.01]
    return [(share, counted_clusters(saliency, offsets, count, settings)[0]) for share, count in likely]


def instance_masks(maps, saliency, size, settings, alternatives=()):
    """Soft maps to masks at the photograph's size: bilinear upsampling, background threshold, argmax, score.

    maps: the shares of ``walk``, [n,h,w] in 0..1; saliency: S [h,w]; size: (H, W). An instance's score is that of
    ``score_of``, and given the alternatives of ``guesses``, times ``expected_iou`` to the power ``doubt``. Returns
    (masks bool [n',H,W], scores float32 [n'], kept int [n'], the index of each into maps), best first; those under
    ``smallest`` and ``unsure`` are dropped.
    """
    empty = np.zeros((0, *size), bool), np.zeros(0, np.float32), np.zeros(0, np.int64)
    if not len(maps):
        return empty
    maps = torch.as_tensor(maps, dtype=saliency.dtype, device=saliency.device)

    # One full-size map at a time, however many instances there are.
    value = saliency.new_full(size, settings.background)
    winner = torch.full(size, -1, dtype=torch.int32, device=saliency.device)
    for index, small in enumerate(maps):
        full = F.interpolate(small[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        winner[full > value] = index
        value = torch.maximum(value, full)
    winner, saliency = winner.cpu().numpy(), saliency.cpu().numpy()
    found = []
    for index in range(len(maps)):
        mask = winner == index
        if mask.sum() <= settings.smallest * mask.size:
            continue
        inside = on_grid(mask, saliency.shape)
        score = score_of(inside, saliency)
        if alternatives:
            score *= expected_iou(inside, alternatives) ** settings.doubt
        if score >= settings.unsure:
            found.append((score, index, mask))
    if not found:
        return empty
    found.sort(key=lambda entry: -entry[0])
    scores, kept, masks = zip(*found, strict=True)
    return np.stack(masks), np.array(scores, np.float32), np.array(kept)


def on_grid(mask, grid):
    """A mask bool [H,W] on a coarser grid (h, w) over the same photograph: the share of each cell, float32 in 0..1."""
    return cv2.resize(mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)


def score_of(inside, saliency):
    """How sure an instance is, in (0, 1]: the geometric mean of S inside and of how far S falls around it [ours].

    A wrong instance is weakly salient, or it is a part of something or a blur: then S hardly falls at its contour.
    inside: of ``on_grid``, on the grid of S; saliency: float32 [h,w] in 0..1. Around is a band of a 25th of S's side.
    """
    reach = 2 * max(1, round(max(saliency.shape) / 25)) + 1
    around = cv2.dilate(inside, np.ones((reach, reach), np.uint8)) - inside
    within, beside = ((saliency * share).sum() / max(share.sum(), 1e-6) for share in (inside, around))
    return float(np.sqrt(np.clip(within * (within - beside), 1e-6, 1)))


def expected_iou(inside, alternatives):
    """How far an instance is there whatever the number of objects: its expected IoU with its like, in 0..1 [ours].

    One that only this number brings forth is as sure as the number is.
    inside: of ``on_grid``, on the grid of S; alternatives: those of ``guesses``, one or more.
    """
    expected = 0.0
    for share, clusters in alternatives:
        common = (clusters * inside).sum((1, 2))
        united = clusters.sum((1, 2)) + inside.sum() - common
        expected += share * (common / np.maximum(united, 1e-6)).max(initial=0)
    return float(expected)
