"""Sampling error of average precision: bootstrap over photographs (Efron and Tibshirani, 1993).

The photographs of a data set are drawn with replacement, as many as there are, and AP is computed for every such draw.
Methods measured on the same photographs are compared on the same draws, so that photographs which are hard for both do
not enter the error of their difference.
"""

from collections.abc import Sequence

import numpy as np

from engine.metrics import ImageResult, average_precision, interpolated_precision

IOUS = {"0.5": 0, "0.7": 4}  # the name of an IoU threshold and its row in ImageResult.hits
DRAWS, SEED = 1000, 0
CHUNK = 100  # draws computed at a time, which bounds the memory

Samples = dict[str, dict[str, np.ndarray]]  # {protocol: {IoU: float64 [B], the AP of every draw}}


def draw_images(images: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each image is in each draw with replacement: int [draws, images], each row of the sum ``images``."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws)


def ap_of_draws(results: Sequence[ImageResult], draws: np.ndarray) -> Samples:
    """AP of every draw under both protocols, in 0..1; NaN for a draw without instances.

    results: of I images; draws: int [B, I] of ``draw_images``.
    """
    chunks = np.split(draws, range(CHUNK, len(draws), CHUNK))
    protocols = {
        "pooled": np.concatenate([_pooled_ap(results, chunk) for chunk in chunks], axis=1),
        "per-image": _per_image_ap(results, draws),
    }
    return {name: dict(zip(IOUS, aps, strict=True)) for name, aps in protocols.items()}


def intervals(samples: Samples) -> dict[str, dict[str, list[float]]]:
    """The 95 % interval of each AP, {protocol: {IoU: [2.5th, 97.5th percentile]}} in 0..1; NaN without instances."""
    return {
        protocol: {iou: np.percentile(_defined(aps), [2.5, 97.5]).tolist() for iou, aps in by_iou.items()}
        for protocol, by_iou in samples.items()
    }


def standard_errors(first: Samples, second: Samples) -> dict[str, dict[str, float]]:
    """The standard error of the difference between two methods, from the AP of both on the same draws.

    Returns {protocol: {IoU: standard deviation over the draws}}, as fractions; NaN without instances.
    """
    return {
        protocol: {iou: float(_defined(second[protocol][iou] - aps).std(ddof=1)) for iou, aps in by_iou.items()}
        for protocol, by_iou in first.items()
    }


def _defined(values: np.ndarray) -> np.ndarray:
    """``values`` without NaN, at least two of them."""
    defined = values[~np.isnan(values)]
    return defined if len(defined) > 1 else np.full(2, np.nan)


def _pooled_ap(results: Sequence[ImageResult], draws: np.ndarray) -> np.ndarray:
    """float64 [len(IOUS), B]. All images are ranked once; in a draw, a prediction counts as often as its image.

    Unless scores tie this equals ranking the copies one by one: after the last copy of a true positive both precision
    and recall are at least as high as after the first, and interpolation takes the highest precision from a recall on.
    """
    scores = np.concatenate([result.scores for result in results])
    order = np.argsort(-scores, kind="stable")
    hits = np.concatenate([result.hits for result in results], axis=1)[:, order]
    weights = draws[:, np.repeat(np.arange(len(results)), [len(result.scores) for result in results])[order]]
    instances = draws @ np.array([result.instances for result in results])
    ranked = weights.cumsum(1)
    aps = []
    for row in IOUS.values():
        true = (weights * hits[row]).cumsum(1)
        precision = interpolated_precision(true, ranked, true / np.maximum(instances, 1)[:, None])
        aps.append(np.where(instances > 0, precision.mean(1), np.nan))
    return np.array(aps)


def _per_image_ap(results: Sequence[ImageResult], draws: np.ndarray) -> np.ndarray:
    """float64 [len(IOUS), B]."""
    measured = [index for index, result in enumerate(results) if result.instances]
    each = [average_precision(r.scores, r.hits, r.instances) for r in (results[index] for index in measured)]
    values = np.array(each).reshape(len(measured), -1)[:, list(IOUS.values())] if measured else np.zeros((0, len(IOUS)))
    weights = draws[:, measured]
    total = weights.sum(1)
    return np.where(total > 0, (weights @ values).T / np.maximum(total, 1), np.nan)
