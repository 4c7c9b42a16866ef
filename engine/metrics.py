"""How good are salient instances, their number and the saliency map (paper section 4.2).

Ground truth is one label map per image: 0 background, 1..254 instances, 255 void. Void pixels count for
neither intersection nor union, nor for saliency. Everything is computed image by image: what is kept of an
image is a few numbers per prediction, never a mask.

Average precision is COCO's: the interpolated precision-recall curve sampled at 101 recalls, with greedy
matching, so without void the pooled figures equal those of pycocotools' COCOeval (save that COCO drops all
but the 100 best predictions of an image, and nothing is dropped here).
"""

from dataclasses import dataclass

import numpy as np

from datasets.masks import VOID

# The very expressions of COCOeval, so that IoU and recall on a threshold fall on the same side of it.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
BETA_SQUARED = 0.3


@dataclass(frozen=True)
class ImageResult:
    """What average precision and count need of one image with n predictions that count.

    scores: float64 [n], descending. hits: bool [10, n], whether the prediction found an instance at each of
    IOU_THRESHOLDS. instances: the number of ground-truth instances.
    """

    scores: np.ndarray
    hits: np.ndarray
    instances: int


def mask_ious(masks, gt):
    """Compare predicted masks, an iterable of n bool [H, W], to a label map ``gt`` uint8 [H, W].

    Returns (ious float64 [n, g], counts bool [n]): the IoU with each of the g instances in the order of their
    labels, and whether the prediction counts. A prediction wholly inside void does not; an empty one does,
    and hits nothing.
    """
    _check_truth(gt)
    areas = np.bincount(gt.ravel(), minlength=256)
    labels = np.flatnonzero(areas[1:VOID]) + 1
    ious, counts = [], []
    for mask in masks:
        if mask.shape != gt.shape:
            raise ValueError(f"a mask of {mask.shape} cannot be compared to a ground truth of {gt.shape}")
        if mask.dtype != bool:
            raise ValueError(f"a mask of {mask.dtype} says not where an instance is; compare it to a threshold")
        inside = np.bincount(gt[mask], minlength=256)
        area = inside[:VOID].sum()
        ious.append(inside[labels] / (area + areas[labels] - inside[labels]))
        counts.append(area > 0 or inside[VOID] == 0)
    return np.array(ious, dtype=np.float64).reshape(len(ious), len(labels)), np.array(counts, dtype=bool)


def match_instances(masks, scores, gt):
    """Match the predictions of one image to its instances; returns an ImageResult.

    masks: iterable of n bool [H, W], which may overlap; scores: [n], finite; gt: uint8 [H, W]. As in COCO, at every
    threshold each prediction, by descending score (ties in the order given), takes the instance of highest IoU that is
    at least the threshold and not taken yet. Predictions wholly inside void are dropped. ValueError for another shape
    or type of array and for a score that is not finite.
    """
    scores = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite numbers")
    ious, counts = mask_ious(masks, gt)
    if len(scores) != len(ious):
        raise ValueError(f"{len(ious)} masks came with {len(scores)} scores")
    order = np.argsort(-scores, kind="stable")
    order = order[counts[order]]
    return ImageResult(scores[order], _greedy_hits(ious[order]), ious.shape[1])


def precision_at_recalls(scores, hits, instances):
    """The precision-recall curve: the interpolated precision at RECALLS, float64 [T, 101] in 0..1.

    scores: [n] in any order; hits: bool [T, n]; instances: number of ground truths. NaN where instances is 0:
    without a ground truth there is no recall.
    """
    thresholds, found = hits.shape
    if instances == 0:
        return np.full((thresholds, len(RECALLS)), np.nan)
    if found == 0:
        return np.zeros((thresholds, len(RECALLS)))
    true = np.cumsum(hits[:, np.argsort(-scores, kind="stable")], axis=1)
    precision = true / np.arange(1, found + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best from here on
    precision = np.concatenate([precision, np.zeros((thresholds, 1))], axis=1)  # recalls never reached
    reached = [np.searchsorted(row, RECALLS, side="left") for row in true / instances]
    return np.take_along_axis(precision, np.array(reached), axis=1)


def average_precision(scores, hits, instances):
    """101-point interpolated average precision, float64 [T] in 0..1; takes what ``precision_at_recalls`` takes."""
    return precision_at_recalls(scores, hits, instances).mean(axis=1)


def pooled_precision(results):
    """The precision-recall curve of all predictions of the set ranked together, float64 [10, 101].

    Predictions in images without instances are false positives. Equal scores rank in the order of the images. NaN
    without instances.
    """
    if not results:
        return np.full((len(IOU_THRESHOLDS), len(RECALLS)), np.nan)
    scores = np.concatenate([result.scores for result in results])
    hits = np.concatenate([result.hits for result in results], axis=1)
    return precision_at_recalls(scores, hits, sum(result.instances for result in results))


def pooled_ap(results):
    """The 'pooled' protocol: AP of ``pooled_precision``, as COCO computes it. float64 [10], NaN without instances."""
    return pooled_precision(results).mean(axis=1)


def per_image_ap(results):
    """The 'per-image' protocol: AP of each image, averaged. float64 [10], NaN without instances.

    AP has no meaning in an image without instances: such images are left out, and false positives in them
    cost nothing. That, and scores that are never compared between images, make these figures the higher ones.
    """
    values = [average_precision(r.scores, r.hits, r.instances) for r in results if r.instances]
    return np.mean(values, axis=0) if values else np.full(len(IOU_THRESHOLDS), np.nan)


def count_metrics(results, threshold=0.0):
    """Compare T*, the number of predictions with score >= threshold, to T, the number of instances.

    Returns {"accuracy": share of images with T* = T, "mae": mean |T* - T|}. All images count, those without
    instances too; predictions wholly inside void do not.
    """
    errors = [abs(int((result.scores >= threshold).sum()) - result.instances) for result in results]
    if not errors:
        return {"accuracy": np.nan, "mae": np.nan}
    return {"accuracy": float(np.mean([error == 0 for error in errors])), "mae": float(np.mean(errors))}


class SaliencyMetrics:
    """MAE and F-measure (beta^2 = 0.3) of saliency maps against the union of instances, void left out.

    MAE is averaged over images. Precision and recall are averaged over the images that have an instance (in
    the others recall has no meaning), then joined to F: its maximum over the 256 thresholds of an 8-bit map,
    and its value at each image's adaptive threshold, twice the mean of the map (at most 1). Where nothing
    reaches the threshold precision is 0. Maps are taken as they are, not stretched to 0..1.
    """

    def __init__(self):
        self._errors = 0.0
        self._images = 0
        self._salient_images = 0
        self._curves = np.zeros((2, 256))  # summed precision, recall at thresholds 0/255 .. 255/255
        self._adaptive = np.zeros(2)

    def add(self, saliency, gt):
        """Take in one image. saliency: float [H, W] in 0..1; gt: uint8 [H, W] label map."""
        if saliency.shape != gt.shape:
            raise ValueError(f"a saliency map of {saliency.shape} cannot be compared to {gt.shape}")
        _check_truth(gt)
        judged = gt != VOID
        values = saliency[judged].astype(np.float64)
        truth = gt[judged] > 0
        if not values.size:
            return
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("saliency must lie in 0..1")
        self._images += 1
        self._errors += np.abs(values - truth).mean()
        if not truth.any():
            return
        self._salient_images += 1
        levels = np.rint(values * 255).astype(np.uint8)  # as if saved, so that a saved map scores the same
        kept = np.cumsum(np.bincount(levels, minlength=256)[::-1])[::-1]
        right = np.cumsum(np.bincount(levels[truth], minlength=256)[::-1])[::-1]
        self._curves += right / np.maximum(kept, 1), right / truth.sum()
        chosen = (values >= min(2 * values.mean(), 1)) & (values > 0)  # a black map chooses nothing
        right = (chosen & truth).sum()
        self._adaptive += right / max(chosen.sum(), 1), right / truth.sum()

    def summary(self):
        """Return {"mae", "max_f", "max_f_threshold", "adaptive_f", "images"}; NaN: not measured."""
        result = dict.fromkeys(("mae", "max_f", "max_f_threshold", "adaptive_f"), np.nan)
        if self._images:
            result["mae"] = float(self._errors / self._images)
        if self._salient_images:
            curve = _f_measure(*(self._curves / self._salient_images))
            result["max_f"] = float(curve.max())
            result["max_f_threshold"] = float(curve.argmax() / 255)
            result["adaptive_f"] = float(_f_measure(*(self._adaptive / self._salient_images)))
        return result | {"images": self._images}


def summarize(results, saliency=None, count_threshold=0.0):
    """All numbers of a set, as fractions, in a dict ready for JSON (None where a number has no meaning).

    results: list of ImageResult; saliency: SaliencyMetrics, or None when no maps were given.
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
    return _without_nan(summary)


def _check_truth(gt):
    if gt.dtype != np.uint8:  # labels of 256 or more would be taken for background
        raise ValueError(f"a ground truth of {gt.dtype} is no label map; give uint8 with 255 where it is void")


def _greedy_hits(ious):
    """ious: [n, g], rows by descending score. Returns bool [10, n]."""
    found, instances = ious.shape
    hits = np.zeros((len(IOU_THRESHOLDS), found), dtype=bool)
    if instances == 0:
        return hits
    for hit, threshold in zip(hits, IOU_THRESHOLDS, strict=True):
        free = ious.copy()
        for row in range(found):
            best = instances - 1 - free[row, ::-1].argmax()  # of equals COCO takes the last
            if free[row, best] >= threshold:
                hit[row] = True
                free[:, best] = -1
    return hits


def _f_measure(precision, recall):
    joined = BETA_SQUARED * precision + recall
    return (1 + BETA_SQUARED) * precision * recall / np.where(joined > 0, joined, 1)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
