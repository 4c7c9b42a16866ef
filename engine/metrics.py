"""Metrics of salient instances, of their number and of the saliency map (Sec. 4.2).

Ground truth is one label map per image: 0 background, 1..254 instances, 255 void. Void pixels count for neither
intersection nor union, nor for saliency. Each image is reduced to an ImageResult, so no mask is kept.

Average precision is COCO's: the interpolated precision-recall curve sampled at 101 recalls, with greedy matching.
Without void the pooled figures equal those of pycocotools' COCOeval, except that COCO drops all but the 100 best
predictions of an image.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.masks import VOID, areas_of

# The expressions of COCOeval, so that values equal to a threshold round to the same side of it.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
BETA_SQUARED = 0.3


@dataclass(frozen=True)
class ImageResult:
    """The matched predictions of one image: what average precision and count are computed from.

    scores: float64 [n], descending. hits: bool [10, n], whether the prediction matches an instance at each of
    IOU_THRESHOLDS. instances: the number of ground-truth instances. Predictions wholly inside void are left out.
    """

    scores: np.ndarray
    hits: np.ndarray
    instances: int


def mask_ious(masks: Iterable[np.ndarray], gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU of predicted masks with the instances of an image.

    masks: n bool [H, W]; gt: label map uint8 [H, W]. Returns (ious float64 [n, g], counts bool [n]): the IoU with each
    of the g instances in the order of their labels, and whether the prediction counts. One wholly inside void does not;
    an empty one does, with IoU 0. Raises ValueError for arrays of another type or shape.
    """
    _check_gt(gt)
    areas = areas_of(gt)
    labels = np.flatnonzero(areas[1:VOID]) + 1
    ious, counts = [], []
    for mask in masks:
        if mask.shape != gt.shape:
            raise ValueError(f"a mask of {mask.shape} cannot be compared to a ground truth of {gt.shape}")
        if mask.dtype != bool:
            raise ValueError(f"a mask of {mask.dtype} is not binary; compare it to a threshold")
        inside = areas_of(gt[mask])
        area = inside[:VOID].sum()
        ious.append(inside[labels] / (area + areas[labels] - inside[labels]))
        counts.append(area > 0 or inside[VOID] == 0)
    return np.array(ious, dtype=np.float64).reshape(len(ious), len(labels)), np.array(counts, dtype=bool)


def match_instances(masks: Iterable[np.ndarray], scores: Sequence[float] | np.ndarray, gt: np.ndarray) -> ImageResult:
    """Match the predictions of one image to its instances, as COCO does.

    masks: n bool [H, W], which may overlap; scores: [n], finite, of any scale; gt: uint8 [H, W]. At every threshold
    each prediction, by descending score (ties in the order given), takes the instance of highest IoU that is at least
    the threshold and not taken yet. Raises ValueError for arrays of another type or shape and for scores that are not
    finite.
    """
    scores = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite numbers")
    ious, counts = mask_ious(masks, gt)
    if len(scores) != len(ious):
        raise ValueError(f"{len(ious)} masks came with {len(scores)} scores")
    return match_ious(ious[counts], scores[counts])


def match_ious(ious: np.ndarray, scores: np.ndarray) -> ImageResult:
    """``match_instances`` for IoUs [n, g] in 0..1 of n predictions of scores [n] with g instances."""
    order = np.argsort(-scores, kind="stable")
    return ImageResult(scores[order], _greedy_hits(ious[order]), ious.shape[1])


def precision_at_recalls(scores: np.ndarray, hits: np.ndarray, instances: int) -> np.ndarray:
    """The interpolated precision-recall curve: the highest precision at a recall of at least each of RECALLS.

    scores: [n] in any order; hits: bool [T, n]; instances: number of ground truths. Returns float64 [T, 101] in 0..1;
    NaN where instances is 0.
    """
    thresholds, found = hits.shape
    if instances == 0:
        return np.full((thresholds, len(RECALLS)), np.nan)
    if found == 0:
        return np.zeros((thresholds, len(RECALLS)))
    true = np.cumsum(hits[:, np.argsort(-scores, kind="stable")], axis=1)
    return interpolated_precision(true, np.arange(1, found + 1), true / instances)


def interpolated_precision(true: np.ndarray, ranked: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Precision at RECALLS of R ranked lists of n predictions.

    true: [R, n], the true positives among the first 1..n predictions; ranked: [n] or [R, n], the number of these
    predictions; recall: [R, n] in 0..1. Returns float64 [R, 101] in 0..1, 0 at recalls that are not reached.
    """
    precision = true / np.maximum(ranked, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(true), 1))], axis=1)
    reached = [np.searchsorted(row, RECALLS, side="left") for row in recall]
    return np.take_along_axis(precision, np.array(reached), axis=1)


def average_precision(scores: np.ndarray, hits: np.ndarray, instances: int) -> np.ndarray:
    """101-point interpolated average precision, float64 [T] in 0..1; the arguments of ``precision_at_recalls``."""
    return precision_at_recalls(scores, hits, instances).mean(axis=1)


def pooled_precision(results: Sequence[ImageResult]) -> np.ndarray:
    """The precision-recall curve of the predictions of all images in one ranking, float64 [10, 101] in 0..1.

    Predictions in images without instances are false positives. Equal scores rank in the order of the images. NaN
    without instances.
    """
    if not results:
        return np.full((len(IOU_THRESHOLDS), len(RECALLS)), np.nan)
    scores = np.concatenate([result.scores for result in results])
    hits = np.concatenate([result.hits for result in results], axis=1)
    return precision_at_recalls(scores, hits, sum(result.instances for result in results))


def pooled_ap(results: Sequence[ImageResult]) -> np.ndarray:
    """The 'pooled' protocol, COCO's: AP of ``pooled_precision``. float64 [10] in 0..1, NaN without instances."""
    return pooled_precision(results).mean(axis=1)


def per_image_ap(results: Sequence[ImageResult]) -> np.ndarray:
    """The 'per-image' protocol: the mean of each image's AP. float64 [10] in 0..1, NaN without instances.

    AP is undefined in an image without instances: such images are left out, and their false positives cost nothing.
    Scores are not compared between images. Both make these figures higher than the pooled ones.
    """
    values = [average_precision(r.scores, r.hits, r.instances) for r in results if r.instances]
    return np.mean(values, axis=0) if values else np.full(len(IOU_THRESHOLDS), np.nan)


def count_metrics(results: Sequence[ImageResult], threshold: float = 0.0) -> dict[str, float]:
    """Compare T*, the number of predictions with score >= threshold, to T, the number of instances.

    Returns {"accuracy": fraction of images with T* = T, "mae": mean |T* - T|}. Images without instances are included.
    """
    errors = [abs(int((result.scores >= threshold).sum()) - result.instances) for result in results]
    if not errors:
        return {"accuracy": np.nan, "mae": np.nan}
    return {"accuracy": float(np.mean([error == 0 for error in errors])), "mae": float(np.mean(errors))}


class SaliencyMetrics:
    """MAE and F-measure (beta^2 = 0.3) of saliency maps against the union of instances, without void.

    MAE is averaged over images. Precision and recall are averaged over the images that have an instance (in the others
    recall is undefined), then combined to F: its maximum over the 256 thresholds of an 8-bit map, and its value at each
    image's adaptive threshold, twice the mean of the map (at most 1). Precision is 0 where no pixel reaches the
    threshold. Maps are not stretched to 0..1.
    """

    def __init__(self) -> None:
        self._errors = 0.0
        self._images = 0
        self._salient_images = 0
        self._curves = np.zeros((2, 256))  # sums of precision and recall at thresholds 0/255 .. 255/255
        self._adaptive = np.zeros(2)

    def add(self, saliency: np.ndarray, gt: np.ndarray) -> None:
        """Add one image. saliency: float [H, W] in 0..1; gt: label map uint8 [H, W].

        Raises ValueError for arrays of another type, shape or range.
        """
        if saliency.shape != gt.shape:
            raise ValueError(f"a saliency map of {saliency.shape} cannot be compared to {gt.shape}")
        _check_gt(gt)
        valid = gt != VOID
        values = saliency[valid].astype(np.float64)
        truth = gt[valid] > 0
        if not values.size:
            return
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("saliency must lie in 0..1")
        self._images += 1
        self._errors += np.abs(values - truth).mean()
        if not truth.any():
            return
        self._salient_images += 1
        levels = np.rint(values * 255).astype(np.uint8)  # those of an 8-bit file, so that a saved map scores the same
        positive = np.cumsum(np.bincount(levels, minlength=256)[::-1])[::-1]
        true = np.cumsum(np.bincount(levels[truth], minlength=256)[::-1])[::-1]
        self._curves += true / np.maximum(positive, 1), true / truth.sum()
        chosen = (values >= min(2 * values.mean(), 1)) & (values > 0)  # nothing in a black map, whose threshold is 0
        hits = (chosen & truth).sum()
        self._adaptive += hits / max(chosen.sum(), 1), hits / truth.sum()

    def summary(self) -> dict[str, Any]:
        """Returns {"mae", "max_f", "max_f_threshold", "adaptive_f", "images"}; NaN where nothing was measured."""
        result: dict[str, Any] = dict.fromkeys(("mae", "max_f", "max_f_threshold", "adaptive_f"), np.nan)
        if self._images:
            result["mae"] = float(self._errors / self._images)
        if self._salient_images:
            curve = _f_measure(*(self._curves / self._salient_images))
            result["max_f"] = float(curve.max())
            result["max_f_threshold"] = float(curve.argmax() / 255)
            result["adaptive_f"] = float(_f_measure(*(self._adaptive / self._salient_images)))
        return result | {"images": self._images}


def summarize(
    results: Sequence[ImageResult], saliency: SaliencyMetrics | None = None, count_threshold: float = 0.0
) -> dict[str, Any]:
    """All figures of a data set, as fractions, in a dict ready for JSON (None where one is undefined).

    saliency: None where there are no saliency maps. count_threshold: that of ``count_metrics``.
    """
    protocols = {"pooled": pooled_ap(results), "per-image": per_image_ap(results)}
    summary = {
        "images": len(results),
        "images_with_instances": sum(result.instances > 0 for result in results),
        "instances": sum(result.instances for result in results),
        "predictions": sum(len(result.scores) for result in results),
        "mAP": {
            name: {"0.5": float(ap[0]), "0.7": float(ap[4]), "0.5:0.95": float(ap.mean())}
            for name, ap in protocols.items()
        },
        "count": count_metrics(results, count_threshold) | {"threshold": count_threshold},
        "saliency": saliency.summary() if saliency else None,
    }
    return without_nan(summary)


def without_nan(value: Any) -> Any:
    """A nested dict or list with None for every NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _check_gt(gt: np.ndarray) -> None:
    if gt.dtype != np.uint8:  # as uint8, a label of 256 would become background
        raise ValueError(f"a ground truth of {gt.dtype} is no label map; give uint8 with 255 where it is void")


def _greedy_hits(ious: np.ndarray) -> np.ndarray:
    """ious: [n, g], rows by descending score. Returns bool [10, n]."""
    found, instances = ious.shape
    hits = np.zeros((len(IOU_THRESHOLDS), found), dtype=bool)
    if instances == 0:
        return hits
    for hit, threshold in zip(hits, IOU_THRESHOLDS, strict=True):
        free = ious.copy()
        for row in range(found):
            best = instances - 1 - free[row, ::-1].argmax()  # of equal IoUs COCO takes the last
            if free[row, best] >= threshold:
                hit[row] = True
                free[:, best] = -1
    return hits


def _f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    combined = BETA_SQUARED * precision + recall
    return (1 + BETA_SQUARED) * precision * recall / np.where(combined > 0, combined, 1)
