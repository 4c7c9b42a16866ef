"""The metrics against pycocotools and against tables computed by hand."""

import tracemalloc

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.masks import encode_rle
from engine import bootstrap
from engine.metrics import (
    IOU_THRESHOLDS,
    SaliencyMetrics,
    average_precision,
    count_metrics,
    mask_ious,
    match_instances,
    per_image_ap,
    pooled_ap,
    summarize,
)

IOU_50, IOU_70 = 0, 4  # columns of IOU_THRESHOLDS


def strip(*ranges, length=20):
    """A bool mask [1, length] that is True in the half-open ranges."""
    mask = np.zeros((1, length), dtype=bool)
    for start, stop in ranges:
        mask[0, start:stop] = True
    return mask


def labels(*runs):
    """A label map [1, sum] from (label, length) runs."""
    return np.concatenate([np.full((1, length), label, np.uint8) for label, length in runs], axis=1)


# ---- pycocotools


def random_set(seed, images=25, height=14, width=18):
    """Void-free random images as (gt, masks, scores): some without instances, some without predictions,
    coarse masks so that IoUs tie and fall on thresholds, coarse scores so that they tie."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(images):
        gt = np.zeros((height, width), np.uint8)
        for label in range(1, rng.integers(0, 6)):
            y, x = rng.integers(0, height - 3), rng.integers(0, width - 3)
            gt[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = label
        masks = []
        for label in np.unique(gt[gt > 0]):
            for _ in range(rng.integers(0, 3)):
                mask = np.roll(gt == label, rng.choice([0, 0, 0, 1]), axis=rng.integers(2))
                masks.append(mask & (rng.random(gt.shape) < rng.choice([0.8, 1.0])))
        for _ in range(rng.integers(0, 3)):
            mask = np.zeros_like(gt, dtype=bool)
            y, x = rng.integers(0, height - 3), rng.integers(0, width - 3)
            mask[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = True
            masks.append(mask)
        data.append((gt, masks, np.round(rng.random(len(masks)), 1)))
    return data


def coco_ap(data):
    """AP float64 [10] by COCOeval; NaN without ground truth."""
    truths, found = [], []
    for image, (gt, masks, scores) in enumerate(data):
        for label in np.unique(gt[gt > 0]):
            rle = encode_rle(gt == label)
            area = int((gt == label).sum())
            truth = dict(image_id=image, category_id=1, segmentation=rle, area=area, iscrowd=0)
            truths.append(truth | {"id": len(truths) + 1})
        for mask, score in zip(masks, scores, strict=True):
            rle = encode_rle(mask)
            found.append(dict(image_id=image, category_id=1, segmentation=rle, score=float(score)))
    coco = COCO()
    height, width = data[0][0].shape
    coco.dataset = {
        "info": {},
        "images": [dict(id=image, height=height, width=width) for image in range(len(data))],
        "categories": [dict(id=1, name="salient")],
        "annotations": truths,
    }
    coco.createIndex()
    if not truths or not found:
        return np.full(10, np.nan) if not truths else np.zeros(10)
    evaluation = COCOeval(coco, coco.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, 0, 2].mean(axis=1)  # all areas, 100 predictions an image


@pytest.mark.parametrize("seed", range(6))
def test_pooled_equals_cocoeval(seed):
    data = random_set(seed)
    assert any(not gt.any() and masks for gt, masks, _ in data)  # false positives in images without instances
    ours = pooled_ap([match_instances(masks, scores, gt) for gt, masks, scores in data])
    expected = coco_ap(data)
    assert 0.05 < expected[IOU_70] < expected[IOU_50] < 0.95  # not a trivial case
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_per_image_equals_cocoeval_of_each_image():
    data = random_set(7)
    ours = per_image_ap([match_instances(masks, scores, gt) for gt, masks, scores in data])
    each = np.array([coco_ap([image]) for image in data])
    assert 0 < np.isnan(each[:, 0]).sum() < len(data)  # images without instances take no part
    np.testing.assert_allclose(ours, np.nanmean(each, axis=0), rtol=0, atol=1e-12)
    assert not np.allclose(ours, coco_ap(data), atol=1e-2)  # the protocols differ


# ---- average precision by hand


@pytest.fixture
def two_images():
    """IoU, score: image A has two instances and finds 0.9 of the first and 0.6 of the second; image B has one
    instance, a better scored false positive, and finds 0.8 of the instance."""
    a = match_instances([strip((0, 9)), strip((10, 16))], [0.9, 0.6], labels((1, 10), (2, 10)))
    b = match_instances([strip((10, 20)), strip((2, 10))], [0.8, 0.7], labels((1, 10), (0, 10)))
    return [a, b]


def test_pooled_by_hand(two_images):
    # Ranking    0.9 (A)  0.8 (B)  0.7 (B)  0.6 (A);  3 instances
    # IoU        0.9      0        0.8      0.6
    # at 0.5     hit      miss     hit      hit
    #   precision 1       1/2      2/3      3/4       best from here on: 1 3/4 3/4 3/4
    #   recall    1/3     1/3      2/3      1
    #   recalls 0, .01 .. .33 (34 of them) read 1, the other 67 read 3/4: (34 + 67 * 3/4) / 101
    # at 0.7     hit      miss     hit      miss
    #   precision 1       1/2      2/3      1/2       best from here on: 1 2/3 2/3 1/2
    #   recall    1/3     1/3      2/3      2/3
    #   34 recalls read 1, .34 .. .66 (33) read 2/3, the rest is never reached: (34 + 33 * 2/3) / 101
    ap = pooled_ap(two_images)
    assert ap[IOU_50] == pytest.approx((34 + 67 * 3 / 4) / 101, abs=1e-12)
    assert ap[IOU_70] == pytest.approx((34 + 22) / 101, abs=1e-12)


def test_per_image_by_hand(two_images):
    # at 0.5  A: hit hit, AP 1.  B: miss hit, precision 1/2 at recall 1, AP 1/2.  Mean 3/4.
    # at 0.7  A: hit miss, recall 1/2: 0 .. .50 (51 recalls) read 1, AP 51/101.  B: AP 1/2.
    ap = per_image_ap(two_images)
    assert ap[IOU_50] == pytest.approx(0.75, abs=1e-12)
    assert ap[IOU_70] == pytest.approx((51 / 101 + 1 / 2) / 2, abs=1e-12)


def test_mean_over_thresholds_by_hand():
    # IoU 74/100 reaches .5 .55 .6 .65 .7 and none of the other five thresholds: 5/10.
    result = match_instances([strip((0, 74), length=100)], [1], labels((1, 100)))
    summary = summarize([result])
    assert summary["mAP"]["pooled"] == {"0.5": 1.0, "0.7": 1.0, "0.5:0.95": 0.5}
    assert summary["mAP"]["per-image"] == summary["mAP"]["pooled"]


def test_every_instance_is_matched_once_and_the_best_prediction_goes_first():
    gt = labels((1, 10), (2, 10))
    # Both overlap instance 1 more; the better scored takes it and the other, at 0 with instance 2, misses.
    twice = match_instances([strip((0, 9)), strip((0, 10))], [0.5, 0.8], gt)
    assert twice.hits[IOU_50].tolist() == [True, False]
    assert twice.scores.tolist() == [0.8, 0.5]
    # With 1 taken, a prediction over both takes 2: 10 / 20 of the union is exactly 0.5.
    other = match_instances([strip((0, 10)), strip((0, 20))], [0.8, 0.5], gt)
    assert other.hits[IOU_50].tolist() == [True, True]
    assert other.hits[IOU_50 + 1].tolist() == [True, False]


def test_of_equal_instances_the_last_is_taken_as_in_coco():
    # The first prediction is at exactly 0.5 with both; COCO gives it the second, which the other then misses.
    case = labels((1, 10), (2, 10)), [strip((0, 20)), strip((10, 20))], [0.9, 0.8]
    result = match_instances(case[1], case[2], case[0])
    assert result.hits[IOU_50].tolist() == [True, False]
    np.testing.assert_allclose(pooled_ap([result]), coco_ap([case]), rtol=0, atol=1e-12)


def test_labels_may_have_gaps():
    result = match_instances([strip((10, 20))], [1], labels((7, 10), (254, 10)))
    assert result.instances == 2
    assert result.hits[:, 0].all()


# ---- void


def test_void_counts_for_neither_intersection_nor_union():
    gt = labels((1, 10), (255, 5), (0, 5))
    ious, counts = mask_ious([strip((0, 15)), strip((5, 16))], gt)
    # 0..14 without void is the instance itself; 5..15 without void is 5 inside, 1 outside: 5 / (10 + 6 - 5).
    np.testing.assert_allclose(ious, [[1], [5 / 11]])
    assert counts.all()


def test_void_is_as_if_its_pixels_did_not_exist():
    rng = np.random.default_rng(0)
    gt = rng.choice(np.array([0, 1, 2, 255], np.uint8), (1, 400))
    masks = rng.random((5, 1, 400)) < 0.5
    valid = gt[0] != 255
    np.testing.assert_array_equal(mask_ious(masks, gt)[0], mask_ious(masks[..., valid], gt[:, valid])[0])


def test_prediction_wholly_in_void_is_neither_right_nor_wrong():
    gt = labels((1, 10), (255, 5), (0, 5))
    right, in_void, empty = strip((0, 10)), strip((11, 15)), strip()
    results = [match_instances([in_void, right], [0.9, 0.8], gt)]
    assert results[0].scores.tolist() == [0.8]
    assert pooled_ap(results)[IOU_50] == 1
    assert count_metrics(results) == {"accuracy": 1.0, "mae": 0.0}
    # An empty prediction is wrong: precision 1/2 at recall 1. So is one that leaves void by a pixel.
    for wrong in (empty, strip((11, 16))):
        assert pooled_ap([match_instances([wrong, right], [0.9, 0.8], gt)])[IOU_50] == 0.5


# ---- nothing there


def test_without_predictions():
    results = [match_instances([], [], labels((1, 10), (0, 10)))]
    assert pooled_ap(results).tolist() == per_image_ap(results).tolist() == [0] * 10
    assert count_metrics(results) == {"accuracy": 0.0, "mae": 1.0}


def test_image_without_instances_lowers_pooled_precision_only():
    found = match_instances([strip((0, 10))], [0.5], labels((1, 10), (0, 10)))
    false = match_instances([strip((0, 10))], [0.9], labels((0, 20)))
    # Pooled: miss, hit: precision 1/2 at recall 1. Per image: only the first image has an AP, 1.
    assert pooled_ap([found, false])[IOU_50] == 0.5
    assert per_image_ap([found, false])[IOU_50] == 1


def test_set_without_instances_has_no_ap():
    results = [match_instances([strip((0, 10))], [0.9], labels((0, 15), (255, 5)))]
    assert np.isnan(pooled_ap(results)).all() and np.isnan(per_image_ap(results)).all()
    summary = summarize(results)
    assert summary["mAP"]["pooled"] == {"0.5": None, "0.7": None, "0.5:0.95": None}
    assert summary["count"] == {"accuracy": 0.0, "mae": 1.0, "threshold": 0.0}


def test_wrong_shapes_are_errors():
    gt = labels((1, 20))
    with pytest.raises(ValueError, match="compared"):
        match_instances([strip(length=19)], [1], gt)
    with pytest.raises(ValueError, match="1 masks came with 2 scores"):
        match_instances([strip()], [1, 2], gt)
    for score in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            match_instances([strip()], [score], gt)
    with pytest.raises(ValueError, match="a mask of float64"):
        match_instances([np.full((1, 20), 0.2)], [1], gt)
    for wrong in (gt.astype(np.int64) + 300, gt.astype(np.float32)):
        with pytest.raises(ValueError, match="no label map"):
            match_instances([], [], wrong)
        with pytest.raises(ValueError, match="no label map"):
            SaliencyMetrics().add(np.zeros((1, 20)), wrong)
    with pytest.raises(ValueError, match="compared"):
        SaliencyMetrics().add(np.zeros((2, 2)), gt)
    with pytest.raises(ValueError, match="0..1"):
        SaliencyMetrics().add(np.full((1, 20), np.nan), gt)


def test_average_precision_of_hits_in_any_order():
    hits = np.array([[False, True, True]])
    # By score: hit .9, hit .5, miss .1; of 4 instances recall reaches 1/2 at precision 1: 51 recalls.
    assert average_precision(np.array([0.1, 0.9, 0.5]), hits, 4)[0] == pytest.approx(51 / 101)


# ---- bootstrap


def test_draws_equal_lists_with_repetitions():
    rng = np.random.default_rng(0)
    data = [(gt, masks, rng.random(len(masks))) for gt, masks, _ in random_set(8)]  # scores that do not tie
    results = [match_instances(masks, scores, gt) for gt, masks, scores in data]
    draws = bootstrap.draw_images(len(results), 250)
    assert (draws.sum(1) == len(results)).all() and (draws > 1).any() and (draws == 0).any()
    samples = bootstrap.ap_of_draws(results, draws)
    for number in (0, 99, 100, 249):  # in all chunks
        drawn = [result for result, times in zip(results, draws[number]) for _ in range(times)]
        for protocol, ap in (("pooled", pooled_ap(drawn)), ("per-image", per_image_ap(drawn))):
            values = [samples[protocol][iou][number] for iou in ("0.5", "0.7")]
            np.testing.assert_allclose(values, ap[[IOU_50, IOU_70]], rtol=0, atol=1e-12)


def test_intervals_and_standard_errors_by_hand():
    """AP of an image is 1 in 30 of 100 images and 0 in the others, so its mean is binomial."""
    right = match_instances([strip((0, 10))], [0.5], labels((1, 10), (0, 10)))
    wrong = match_instances([], [], labels((1, 10), (0, 10)))
    draws = bootstrap.draw_images(100)
    samples = bootstrap.ap_of_draws([right] * 30 + [wrong] * 70, draws)
    low, high = bootstrap.intervals(samples)["per-image"]["0.5"]
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458), abs=0.015)
    ramp = {"pooled": {"0.5": np.linspace(0, 1, 1001)}}
    assert bootstrap.intervals(ramp)["pooled"]["0.5"] == pytest.approx([0.025, 0.975])
    better = bootstrap.ap_of_draws([right] * 40 + [wrong] * 60, draws)
    # In pairs, 10 of 100 images differ by 1: sqrt(.1 * .9 / 100) = .03; unpaired it would be .067.
    assert bootstrap.standard_errors(samples, better)["per-image"]["0.5"] == pytest.approx(0.03, rel=0.1)


def test_bootstrap_without_instances_or_predictions():
    empty = match_instances([strip((0, 10))], [0.9], labels((0, 20)))
    nothing_found = match_instances([], [], labels((1, 10), (0, 10)))
    draws = bootstrap.draw_images(2)
    undefined = bootstrap.ap_of_draws([empty, empty], draws)
    assert np.isnan(bootstrap.intervals(undefined)["pooled"]["0.5"]).all()
    assert np.isnan(bootstrap.standard_errors(undefined, undefined)["per-image"]["0.7"])
    assert bootstrap.intervals(bootstrap.ap_of_draws([nothing_found, empty], draws))["pooled"]["0.5"] == [0, 0]


# ---- count


def test_count_by_hand():
    one, two, none = labels((1, 20)), labels((1, 10), (2, 10)), labels((0, 20))
    mask = strip((0, 5))
    results = [
        match_instances([mask] * 3, [0.9, 0.5, 0.2], one),
        match_instances([mask] * 2, [0.9, 0.4], two),
        match_instances([], [], none),
        match_instances([], [], two),
    ]
    # T   1 2 0 2;  T* at 0: 3 2 0 0, errors 2 0 0 2;  T* at 0.5: 2 1 0 0, errors 1 1 0 2
    assert count_metrics(results) == {"accuracy": 2 / 4, "mae": 4 / 4}
    assert count_metrics(results, 0.5) == {"accuracy": 1 / 4, "mae": 4 / 4}
    # T* at 0.95: 0 0 0 0, errors 1 2 0 2
    assert count_metrics(results, 0.95) == {"accuracy": 1 / 4, "mae": 5 / 4}


# ---- saliency


def test_saliency_by_hand():
    metrics = SaliencyMetrics()
    metrics.add(np.array([[0.8, 0.2, 0.6, 1.0]]), labels((1, 1), (2, 1), (0, 1), (255, 1)))
    metrics.add(np.array([[0.8, 0.7, 0.0, 0.0]]), labels((1, 1), (0, 3)))
    metrics.add(np.array([[0.1, 0.1, 0.1, 0.1]]), labels((0, 4)))
    metrics.add(np.array([[0.1, 0.1, 0.1, 0.1]]), labels((255, 4)))
    summary = metrics.summary()
    # MAE of the images: (.2 + .8 + .6) / 3, (.2 + .7) / 4, .1; the wholly void image does not count.
    assert summary["images"] == 3
    assert summary["mae"] == pytest.approx((1.6 / 3 + 0.9 / 4 + 0.1) / 3)
    # Precision, recall of the two images with instances, and their means:
    #   threshold     first      second      mean P, R       F = 1.3 PR / (.3 P + R)
    #   0             2/3, 1     1/4, 1      11/24, 1        .524
    #   (0, .2]       2/3, 1     1/2, 1      7/12, 1         .645
    #   (.2, .6]      1/2, 1/2   1/2, 1      1/2, 3/4        .542
    #   (.6, .7]      1, 1/2     1/2, 1      3/4, 3/4        .75
    #   (.7, .8]      1, 1/2     1, 1        1, 3/4          .975 / 1.05 = .929  the maximum
    assert summary["max_f"] == pytest.approx(0.975 / 1.05)
    assert 0.7 < summary["max_f_threshold"] <= 0.8
    # Adaptive: the first map has mean 1.6 / 3, threshold min(2 * .533, 1) = 1, nothing reaches it: 0, 0.
    # The second has mean .375, threshold .75: 1, 1. Mean P, R = 1/2, 1/2: F = 1/2.
    assert summary["adaptive_f"] == pytest.approx(0.5)


def test_black_map_finds_nothing_at_the_adaptive_threshold():
    metrics = SaliencyMetrics()
    metrics.add(np.zeros((1, 4)), labels((1, 3), (0, 1)))
    assert metrics.summary()["adaptive_f"] == 0


def test_perfect_map():
    metrics = SaliencyMetrics()
    # Twice the mean is 1.5: were it not held to 1, nothing could reach it.
    metrics.add(np.array([[1.0, 1.0, 1.0, 0.0, 0.0]]), labels((1, 2), (2, 1), (0, 1), (255, 1)))
    summary = metrics.summary()
    assert (summary["mae"], summary["max_f"], summary["adaptive_f"]) == (0, 1, 1)


def test_saved_map_scores_the_same_f():
    rng = np.random.default_rng(0)
    gt = rng.choice(np.array([0, 1, 255], np.uint8), (30, 40))
    saliency = np.clip(rng.random((30, 40)) * 0.7 + 0.3 * (gt == 1), 0, 1).astype(np.float32)
    direct, saved = SaliencyMetrics(), SaliencyMetrics()
    direct.add(saliency, gt)
    saved.add(np.rint(saliency * 255).astype(np.uint8).astype(np.float32) / 255, gt)
    assert direct.summary()["max_f"] == saved.summary()["max_f"]


def test_saliency_of_nothing():
    assert SaliencyMetrics().summary() == pytest.approx(
        {"mae": np.nan, "max_f": np.nan, "max_f_threshold": np.nan, "adaptive_f": np.nan, "images": 0},
        nan_ok=True,
    )


# ---- memory


def test_memory_is_that_of_one_mask():
    gt = np.ones((400, 400), np.uint8)  # 160 kB; the same as one mask

    def masks():
        for _ in range(100):
            yield np.ones((400, 400), dtype=bool)

    tracemalloc.start()
    match_instances(masks(), np.arange(100), gt)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * gt.nbytes  # bincount alone takes 8 bytes a pixel; a hundred masks would be 100


def test_thresholds():
    np.testing.assert_allclose(IOU_THRESHOLDS[[IOU_50, IOU_70, 9]], [0.5, 0.7, 0.95])
