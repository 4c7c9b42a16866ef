"""Scores of instances, for average precision [ours]. All maps are on the stride-4 grid [h,w]."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from models.fusion_config import FusionConfig
from models.grouping import Clusters, group_by_counts


class CountHypothesis(NamedTuple):
    """A possible number of objects in an image.

    number: 1 or more; probability: of that number, in 0..1; clusters: the salient region with the instances grouped for
    that number.
    """

    number: int
    probability: float
    clusters: Clusters


def count_hypotheses(
    saliency: np.ndarray, offsets: np.ndarray, count_probs: Sequence[float] | Tensor, settings: FusionConfig
) -> list[CountHypothesis]:
    """The salient region grouped by every probable number of objects, for ``expected_iou``.

    saliency: S [h,w] in 0..1; offsets: V [2,h,w]; count_probs: [M], the probabilities of 1..M objects. Numbers with a
    probability of at most 1 % are left out; the list is empty where ``count_aware_scores`` is off.
    """
    if not settings.count_aware_scores:
        return []
    probable = [(number, float(probability)) for number, probability in enumerate(count_probs, 1) if probability > 0.01]
    clusters = group_by_counts(saliency, offsets, [number for number, _ in probable], settings)
    return [CountHypothesis(*each, found) for each, found in zip(probable, clusters, strict=True)]


def on_grid(mask: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """A mask bool [H,W] on a coarser grid (h, w) of the same image: the covered fraction of each cell, float32."""
    return cv2.resize(mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)


def score_of(inside: np.ndarray, saliency: np.ndarray) -> float:
    """The score of an instance, in (0, 1]: the geometric mean of S inside it and of the drop of S across its contour.

    A false instance has low saliency, or it is a part of an object or a blurred region: S then hardly drops around it.
    inside: as returned by ``on_grid``; saliency: S float32 [h,w] in 0..1. Around it is a band of 1/25 of the longer
    side of S.
    """
    reach = 2 * max(1, round(max(saliency.shape) / 25)) + 1
    around = cv2.dilate(inside, np.ones((reach, reach), np.uint8)) - inside
    within, beside = ((saliency * weight).sum() / max(weight.sum(), 1e-6) for weight in (inside, around))
    return float(np.sqrt(np.clip(within * (within - beside), 1e-6, 1)))


def expected_iou(inside: np.ndarray, hypotheses: Sequence[CountHypothesis]) -> float:
    """The largest IoU of an instance with the instances grouped for a number of objects, in expectation over it, 0..1.

    It is low for an instance that appears for improbable numbers only. inside: as returned by ``on_grid``.
    """
    expected = 0.0
    for _, probability, clusters in hypotheses:
        common = (clusters.masks * inside).sum((1, 2))
        union = clusters.masks.sum((1, 2)) + inside.sum() - common
        expected += probability * (common / np.maximum(union, 1e-6)).max(initial=0)
    return float(expected)
