"""FusionConfig: saliency, boundary and offsets to one soft map per salient instance (Sec. 3.1.1, 4.2; Fig. 2)."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

import ops
from models.grouping import (
    find_clusters,
    group_by_count,
    salient_clusters,
)
from models.scoring import expected_iou, on_grid, score_of
from utils.cli import InputError, integer, number


def _one_of(*choices):
    """As ``utils.cli.number``, for one of several words."""

    def parse(text):
        if text not in choices:
            raise ArgumentTypeError(f"{text!r} does not fit; give {' or '.join(choices)}")
        return text

    return parse


def _switch(text):
    """``1`` or ``true``, ``0`` or ``false`` as a bool."""
    if text.lower() not in ("0", "1", "true", "false"):
        raise ArgumentTypeError(f"{text!r} does not fit; give 1 or 0")
    return text.lower() in ("1", "true")


# What each setting may be. Ends that are left out would find nothing in any photograph, or overflow.
ALLOWED = {
    "grouping": _one_of("sinks", "count"),
    "theta": number(0, below=1),
    "sink_thresh": number(None, 1000, above=0),
    "centroid_region": _one_of("salient", "image"),
    "radius": integer(1, 64),
    "power": number(0.1, 1000),
    "steps": integer(0, 10**5),
    "saliency_thresh": number(0, below=1),
    "mask_rule": _one_of("relative", "peak"),
    "mask_thresh": number(0, below=1),
    "min_area": number(0, below=1),
    "min_score": number(0, 1),
    "count_aware_scores": _switch,
}


@dataclass(frozen=True)
class FusionConfig:
    """The settings of the fusion; lengths in pixels of the stride-4 grid.

    grouping: how salient pixels are divided into instances: "sinks", by the sinks of V (Sec. 3.1.1), or "count", by
    k-means of the places they point to, with the expected number of objects as k [ours].
    theta: minimal salient fraction of a cluster (Sec. 3.1.1). sink_thresh: |V| below which a pixel belongs to a sink.
    centroid_region: where sinks are searched for, among the "salient" pixels or in the whole "image".
    radius, power, steps: of the random walk (Eq. 9, 10). saliency_thresh: S above which a pixel is salient.
    mask_rule: what the masks are thresholded on: the walk's response "relative" to those of other instances and of the
    background [ours], or to its own "peak" [IRN]. mask_thresh: response below which a pixel is background.
    min_area: fraction of the image below which an instance is dropped; min_score: score below which it is.
    count_aware_scores: whether scores are multiplied by the expected IoU under the count distribution [ours].
    Raises InputError for a value that ``ALLOWED`` does not admit.
    """

    grouping: str = "sinks"
    theta: float = 0.5
    sink_thresh: float = 2.5
    centroid_region: str = "salient"
    radius: int = 5
    power: float = 5.0
    steps: int = 256
    saliency_thresh: float = 0.5
    mask_rule: str = "relative"
    mask_thresh: float = 0.4
    min_area: float = 0.01
    min_score: float = 0.1
    count_aware_scores: bool = True

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


def fuse(saliency, boundary, offsets, settings, count=0):
    """One soft map per salient instance (Sec. 4.2): clusters of the salient region, and the walk from each.

    saliency S and boundary B: [H,W] in 0..1; offsets V: [2,H,W]; all on the stride-4 grid. count: the number of
    objects, for ``group_by_count``; 0 takes the sinks of V for centroids, as the paper does. Returns (maps [n,H,W] of
    ``walk``, centroids float [n,2]); n may be 0.
    """
    seen = saliency.cpu().numpy()
    if count:
        clusters, centroids = group_by_count(seen, offsets.cpu().numpy(), count, settings)
    else:
        region = seen > settings.saliency_thresh if settings.centroid_region == "salient" else None
        labels, centroids = find_clusters(offsets, settings.sink_thresh, region)
        clusters, centroids = salient_clusters(labels, seen, centroids, settings)
    return walk(clusters, saliency, boundary, settings), centroids


def walk(clusters, saliency, boundary, settings):
    """SI_n = M^t vec(SI*_n (1 - B)), SI*_n = S on cluster n (Eq. 10), and how much of a pixel each has.

    By a share of its own peak [IRN] a faint instance spreads, and one with a sure part loses the others. So the
    background walks too, from SI*_0 = 1 - S on all that is not salient or in no cluster, and what comes from an
    instance is set beside what comes from there. Beside each other instances are still compared by shares of their
    peaks, or the larger would take the smaller. The lesser of the two shares counts; above one half, both hold [ours].
    clusters: bool [n,H,W]; saliency S and boundary B: [H,W] in 0..1, all on the stride-4 grid. Returns the shares
    [n,H,W] in 0..1, of what ``settings.mask_rule`` says, on the device of S.
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
    maps = maps.clamp(min=1e-9)  # the series of the walk may end a hair below 0
    maps, background = maps[:-1], maps[-1]
    parts = maps / maps.amax((1, 2), keepdim=True)
    first, second = torch.cat([parts, torch.zeros_like(background)[None]]).topk(2, 0).values
    rival = torch.where(parts == first, second, first)
    return torch.minimum(maps / (maps + background), parts / (parts + rival))


def instance_masks(maps, saliency, size, settings, alternatives=()):
    """Soft maps to masks at the photograph's size: bilinear upsampling, background threshold, argmax, score.

    maps: the shares of ``walk``, [n,h,w] in 0..1; saliency: S [h,w]; size: (H, W). An instance's score is that of
    ``score_of``, and given the ``count_hypotheses``, times ``expected_iou``. Returns
    (masks bool [n',H,W], scores float32 [n'], kept int [n'], the index of each into maps), best first; those under
    ``smallest`` and ``unsure`` are dropped.
    """
    empty = np.zeros((0, *size), bool), np.zeros(0, np.float32), np.zeros(0, np.int64)
    if not len(maps):
        return empty
    maps = torch.as_tensor(maps, dtype=saliency.dtype, device=saliency.device)

    # One full-size map at a time, however many instances there are.
    value = saliency.new_full(size, settings.mask_thresh)
    winner = torch.full(size, -1, dtype=torch.int32, device=saliency.device)
    for index, small in enumerate(maps):
        full = F.interpolate(small[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        winner[full > value] = index
        value = torch.maximum(value, full)
    winner, saliency = winner.cpu().numpy(), saliency.cpu().numpy()
    found = []
    for index in range(len(maps)):
        mask = winner == index
        if mask.sum() <= settings.min_area * mask.size:
            continue
        inside = on_grid(mask, saliency.shape)
        score = score_of(inside, saliency)
        if alternatives:
            score *= expected_iou(inside, alternatives)
        if score >= settings.min_score:
            found.append((score, index, mask))
    if not found:
        return empty
    found.sort(key=lambda entry: -entry[0])
    scores, kept, masks = zip(*found, strict=True)
    return np.stack(masks), np.array(scores, np.float32), np.array(kept)
