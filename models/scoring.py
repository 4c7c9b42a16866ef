"""Scores of instances, for average precision [ours]."""

import cv2
import numpy as np

from models.grouping import group_by_count


def count_hypotheses(saliency, offsets, shares, settings):
    """What the salient region would come apart into, were there 1, 2, ... objects [ours].

    saliency: [H,W] in 0..1; offsets: V [2,H,W], both arrays; shares: float [M], the probability of each number. Returns
    a list of (probability, bool [n,H,W]); those of less than 1 % are left out, and all where ``doubt`` is 0.
    """
    if not settings.count_aware_scores:
        return []
    likely = [(float(share), count) for count, share in enumerate(shares, 1) if share > 0.01]
    return [(share, group_by_count(saliency, offsets, count, settings)[0]) for share, count in likely]


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
    inside: of ``on_grid``, on the grid of S; alternatives: those of ``count_hypotheses``, one or more.
    """
    expected = 0.0
    for share, clusters in alternatives:
        common = (clusters * inside).sum((1, 2))
        united = clusters.sum((1, 2)) + inside.sum() - common
        expected += share * (common / np.maximum(united, 1e-6)).max(initial=0)
    return float(expected)
