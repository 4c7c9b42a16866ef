"""Clusters, the salience filter and instance masks on fields whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

import ops
from engine.cam_labels import PLAIN, SPREAD, class_labels, foreground_probability, saliency_mask
from engine.crf import crf, refine_labels, refine_saliency
from models.fusion import FusionConfig, fuse, instance_masks, walk
from models.grouping import connected_components, find_clusters
from models.saliency_prior import combine_logits
from models.scoring import count_hypotheses, expected_iou, on_grid, score_of
from utils.cli import InputError

HEIGHT, WIDTH = 32, 48
POINTS = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij"))
CENTRES = [(16.0, 13.5), (16.0, 31.5)]


def scene():
    """Two touching squares of 18x18 pixels, each pointing to its own centre; the background rests."""
    saliency, boundary, offsets = torch.zeros(32, 48), torch.zeros(32, 48), torch.zeros(2, 32, 48)
    truth = []
    for y, x in CENTRES:
        inside = (POINTS[0] - y).abs().le(8.5) & (POINTS[1] - x).abs().le(8.5)  # columns 5..22 and 23..40
        truth.append(inside)
        saliency[inside] = 0.9
        offsets[:, inside] = (torch.tensor([y, x]).view(2, 1, 1) - POINTS)[:, inside]
    union = truth[0] | truth[1]
    boundary[:, 22] = union[:, 22].float() * 0.95
    rim = torch.nn.functional.max_pool2d(union[None].float(), 3, 1, 1)[0].bool() & ~union
    boundary[rim] = 0.95
    return saliency, boundary, offsets, torch.stack(truth).numpy()


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_touching_objects_are_told_apart_by_their_centroids():
    saliency, boundary, offsets, truth = scene()
    maps, centroids = fuse(saliency, boundary, offsets, FusionConfig())
    masks, scores, kept = instance_masks(maps, saliency, (128, 192), FusionConfig())
    assert len(masks) == 2 and not (masks[0] & masks[1]).any()
    truth = truth.repeat(4, 1).repeat(4, 2)
    assert min(max(iou(mask, t) for t in truth) for mask in masks) > 0.85
    assert ((0 < scores) & (scores <= 1)).all() and scores[0] >= scores[1]
    found = centroids[kept]
    for centre in CENTRES:
        assert np.abs(found - centre).sum(1).min() < 1
    components, _ = connected_components(saliency, FusionConfig())
    assert len(components) == 1, "one connected component: what the centroids are for"


@pytest.mark.parametrize("formed", [1.0, 0.5])
def test_a_number_of_objects_parts_the_region_before_the_offsets_have_formed(formed):
    """Half as long as they should be, the offsets have one sink between the two objects; their groups are two."""
    saliency, boundary, offsets, truth = scene()
    maps, centroids = fuse(saliency, boundary, formed * offsets, FusionConfig(), count=2)
    masks, _, _ = instance_masks(maps, saliency, (128, 192), FusionConfig())
    truth = truth.repeat(4, 1).repeat(4, 2)
    assert len(masks) == 2 and min(max(iou(mask, t) for t in truth) for mask in masks) > 0.85
    for centre in CENTRES:
        assert np.abs(centroids - centre).sum(1).min() < 1.5
    assert len(fuse(saliency, boundary, offsets, FusionConfig(), count=1)[0]) == 1
    assert len(fuse(saliency * 0, boundary, offsets, FusionConfig(), count=3)[0]) == 0


def test_components_are_never_joined_for_a_number():
    saliency, boundary, offsets, truth = scene()
    saliency[:, 22:24] = 0  # apart
    assert len(fuse(saliency, boundary, offsets, FusionConfig(), count=1)[0]) == 2
    parts = fuse(saliency, boundary, offsets * 0, FusionConfig(), count=3)[0]
    assert len(parts) == 3, "the larger of the two is divided"


def test_settings_by_name():
    assert FusionConfig.of([]) == FusionConfig()
    assert FusionConfig.of(["power=10", "steps=64", "centroid_region=image"]) == FusionConfig(
        power=10.0, steps=64, centroid_region="image"
    )
    for wrong in ("strength=3", "steps=many", "power", "share=half", "centroid_region="):
        with pytest.raises(InputError, match=wrong):
            FusionConfig.of([wrong])


# The outermost values of each setting, then some that are none.
ENDS = {
    "theta": ((0, 0.999), (-0.1, 1)),
    "sink": ((1e-6, 1000), (0, -1, 1e200)),
    "radius": ((1, 64), (0, 65, 2.5)),
    "power": ((0.1, 1000), (0, -3, 1e-3)),
    "steps": ((0, 10**5), (-1, 1.5, 10**9)),
    "salient": ((0, 0.999), (-0.1, 1)),
    "background": ((0, 0.999), (-0.1, 1)),
    "smallest": ((0, 0.999), (-0.1, 1)),
    "unsure": ((0, 1), (-0.1, 1.1)),
    "doubt": ((0, 100), (-1, 101)),
}


@pytest.mark.parametrize("name", ENDS)
def test_settings_out_of_their_range_are_refused_and_the_ends_of_it_work(name):
    right, wrong = ENDS[name]
    words = rf"--fusion {name}=.* does not fit; give a"
    for value in (*wrong, math.nan, math.inf, -math.inf, None, "", "much"):
        with pytest.raises(InputError, match=words):
            FusionConfig.of([f"{name}={value}"])
        with pytest.raises(InputError, match=words):
            replace(FusionConfig(), **{name: value})
    saliency, boundary, offsets = (part[..., 8:26, 10:40] for part in scene()[:3])
    for value in right:
        settings = FusionConfig.of([f"{name}={value}"])
        assert settings == FusionConfig(**{name: value}) and type(getattr(settings, name)) is type(
            getattr(FusionConfig(), name)
        )
        for count in (0, 2):
            maps, centroids = fuse(saliency, boundary, offsets, settings, count)
            assert len(maps) == len(centroids) and maps.isfinite().all()
            options = count_hypotheses(saliency.numpy(), offsets.numpy(), [0.5, 0.5], settings)
            masks, scores, _ = instance_masks(maps, saliency, (72, 120), settings, options)
            assert len(masks) == len(scores) and np.isfinite(scores).all()


def test_scores_know_an_object_from_a_part_and_from_a_blur():
    saliency = torch.zeros(32, 48)
    saliency[8:24, 8:24] = 0.9
    whole, half = np.zeros((128, 192), bool), np.zeros((128, 192), bool)
    whole[32:96, 32:96], half[32:96, 32:64] = True, True
    whole, half = (on_grid(mask, (32, 48)) for mask in (whole, half))
    sure = score_of(whole, saliency.numpy())
    assert 0.84 < sure < 0.9, "between 0.9 and a fall of nearly 0.9"
    assert score_of(half, saliency.numpy()) < 0.92 * sure
    assert score_of(whole, np.full((32, 48), 0.9, np.float32)) == pytest.approx(1e-3), "nothing falls"
    assert score_of(whole, 0.5 * saliency.numpy()) == pytest.approx(sure / 2, rel=0.01)


def test_an_instance_is_as_sure_as_the_number_that_it_needs():
    """Two objects, 24 columns apart from the next: whether there are two or three, the single one stays what it is."""
    saliency, offsets = torch.zeros(32, 64), torch.zeros(2, 32, 64)
    saliency[8:24, 4:20], saliency[8:24, 32:60] = 0.9, 0.9
    options = count_hypotheses(saliency.numpy(), offsets.numpy(), [0.001, 0.6, 0.399], FusionConfig())
    assert [(share, len(clusters)) for share, clusters in options] == [(0.6, 2), (0.399, 3)], "from 1 % on"
    single, double, half = (np.zeros((128, 256), bool) for _ in range(3))
    single[32:96, 16:80], double[32:96, 128:240], half[32:96, 128:184] = True, True, True
    alone, doubtful, part = (expected_iou(on_grid(mask, (32, 64)), options) for mask in (single, double, half))
    assert alone == pytest.approx(0.999, abs=0.01)
    assert doubtful == pytest.approx(0.6 + 0.399 / 2, abs=0.02), "the object of two; half of it agrees with three"
    assert part == pytest.approx(0.6 / 2 + 0.399, abs=0.05)


def test_a_doubtful_instance_ranks_behind_and_below_unsure_is_dropped():
    saliency, boundary, offsets, _ = scene()
    maps, _ = fuse(saliency, boundary, offsets, FusionConfig(), count=2)
    whole = [(1.0, np.broadcast_to(np.arange(48) >= 24, (1, 32, 48)))]  # the half where the second object is
    masks, scores, kept = instance_masks(maps, saliency, (128, 192), FusionConfig(), whole)
    assert kept.tolist() == [1] and len(masks) == len(scores) == 1
    sure = instance_masks(maps, saliency, (128, 192), FusionConfig())[1]
    assert scores[0] < sure.max()
    careless = instance_masks(maps, saliency, (128, 192), FusionConfig(count_aware_scores=0), whole)[1]
    assert np.array_equal(careless, sure)


def test_every_pixel_has_a_cluster():
    _, _, offsets, _ = scene()
    labels, centroids = find_clusters(offsets)
    assert labels.min() >= 1 and labels.max() == len(centroids)
    for y, x in CENTRES:
        assert (labels[int(y) - 7 : int(y) + 8, int(x) - 7 : int(x) + 8] == labels[int(y), int(x)]).all()


def test_no_sink_and_no_salience_are_valid_answers():
    saliency, boundary, offsets, _ = scene()
    empty, centroids = fuse(saliency, boundary, torch.full_like(offsets, 9.0), FusionConfig())
    assert empty.shape == (0, 32, 48) and len(centroids) == 0
    empty, _ = fuse(saliency * 0, boundary, offsets, FusionConfig())
    masks, scores, kept = instance_masks(empty, saliency, (60, 70), FusionConfig())
    assert masks.shape == (0, 60, 70) and scores.shape == kept.shape == (0,)


@pytest.mark.parametrize("share, kept", [(0.4, 0), (0.6, 1)])
def test_theta_is_the_salient_share_of_a_cluster(share, kept):
    saliency, boundary, offsets, truth = scene()
    saliency[:] = 0
    rows = np.argwhere(truth[0])
    chosen = rows[: round(share * len(rows))]
    saliency[chosen[:, 0], chosen[:, 1]] = 0.9
    assert len(fuse(saliency, boundary, offsets, FusionConfig(theta=0.5, centroid_region="image"))[0]) == kept


def test_crf_snaps_to_the_image():
    rng = np.random.default_rng(0)
    image = np.full((96, 96, 3), 40, np.uint8)
    image[24:72, 24:72] = 200
    image += rng.integers(0, 8, image.shape).astype(np.uint8)
    truth = np.zeros((96, 96), bool)
    truth[24:72, 24:72] = True
    coarse = np.full((96, 96), 0.2)
    coarse[27:75, 21:69] = 0.8
    refined = refine_saliency(image, coarse)
    assert refined.dtype == np.float32 and 0 <= refined.min() and refined.max() <= 1
    assert iou(refined > 0.5, truth) > 0.95 > 0.8 > iou(coarse > 0.5, truth)
    labels = refine_labels(image, (coarse > 0.5).astype(int), 2)
    assert iou(labels > 0, truth) > 0.95
    both = crf(image, np.stack([1 - coarse, coarse]))
    assert np.allclose(both.sum(0), 1, atol=1e-4)


def test_class_labels_ignore_what_the_thresholds_disagree_on():
    image = np.full((64, 64, 3), 90, np.uint8)
    cam = np.full((1, 64, 64), 0.01, np.float32)
    cam[0, :, 20:40] = 0.15  # between the confident thresholds .05 and .30
    cam[0, :, 40:] = 0.9
    image[:, 20:40], image[:, 40:] = 140, 200
    labels = class_labels(image, cam, (7,), PLAIN)
    assert (labels[:, 4:16] == 0).all() and (labels[:, 24:36] == 255).all() and (labels[:, 44:60] == 8).all()


def test_saliency_mask_takes_the_maximum_over_classes():
    image = np.full((32, 32, 3), 90, np.uint8)
    cams = np.zeros((2, 32, 32), np.float32)
    cams[0, :16], cams[1, 16:] = 1.0, 0.25
    plain = saliency_mask(image, cams, PLAIN, use_crf=False)
    assert np.allclose(plain[:16], 0.8) and np.allclose(plain[16:], 0.5)
    assert foreground_probability(np.array([0.0, 0.25]), PLAIN).tolist() == [0.0, 0.5]
    spread = foreground_probability(np.array([SPREAD.even / 2, SPREAD.even, 2 * SPREAD.even]), SPREAD)
    assert np.allclose(spread, [0.2, 0.5, 0.8]), "odds grow with the square"
    assert saliency_mask(image, cams[:0], PLAIN).max() == 0, "no class, nothing salient"


def test_pooled_odds_want_both_opinions():
    """The highest probability of a mask without a CRF is that of an activation's peak, odds of 25 to 9."""
    network = logit([0.95, 0.95, 0.05, 1.0, 0.0])
    first = logit([0.70, 0.10, 0.70, 0.0, 25 / 34])
    weights = 0.6, 1.9, -0.9
    assert (combine_logits(network, first, weights) > 0).tolist() == [True, False, False, False, False]
    rising = combine_logits(logit(np.linspace(0, 1, 9)), np.zeros(9), weights)
    assert (np.diff(rising[1:-1]) > 0).all() and np.isfinite(rising).all()
    alone = expit(combine_logits(network, first, (0, 1, 0)))
    assert np.allclose(alone, np.clip(expit(first), 0.01, 0.99)), "the first mask alone"
    tensors = combine_logits(torch.from_numpy(network), torch.from_numpy(first), torch.tensor(weights))
    assert np.allclose(tensors, combine_logits(network, first, weights))


def test_the_shares_are_of_what_walks_to_a_pixel():
    saliency, boundary, _, truth = scene()
    settings = FusionConfig(steps=20)
    start = np.concatenate([truth * saliency.numpy(), ((1 - saliency.numpy()) * ~truth.any(0))[None]])
    affinity = ops.boundary_affinity(boundary[None], settings.radius)
    walked = torch.from_numpy(start).float() * (1 - boundary)
    walked = ops.random_walk(walked[None], affinity, settings.radius, settings.power, 20, method="power")[0].numpy()
    parts, ground = walked[:2] / walked[:2].max((1, 2), keepdims=True), walked[2]
    shares = walk(truth, saliency, boundary, settings).numpy()
    expected = np.minimum(walked[:2] / (walked[:2] + ground), parts / parts.sum(0))
    assert np.allclose(shares, expected, atol=1e-2)
    peaks = walk(truth, saliency, boundary, replace(settings, mask_rule="peak")).numpy()
    assert np.allclose(peaks, parts, atol=1e-3)
    assert ((shares > 0.5).sum(0) <= 1).all(), "no pixel is two instances'"
    assert walk(truth[:0], saliency, boundary, settings).shape == (0, 32, 48)


def test_a_faint_object_does_not_spread_where_no_boundary_holds_it():
    saliency = torch.zeros(32, 48)
    saliency[8:24, 12:36] = 0.55
    truth = saliency.numpy() > 0
    ours, irn = (
        walk(truth[None], saliency, torch.zeros(32, 48), FusionConfig(share=share)) for share in ("rival", "peak")
    )
    assert (ours[0] > 0.5).sum() <= truth.sum() < (irn[0] > 0.5).sum()


def test_a_small_object_is_not_taken_by_a_large_one_beside_it():
    """No boundary between them, and three times the pixels."""
    saliency, boundary = torch.full((32, 48), 0.05), torch.zeros(32, 48)
    saliency[4:28, 4:44] = 0.9
    boundary[3:29, 3:45] = 0.95
    boundary[4:28, 4:44] = 0
    clusters = np.zeros((2, 32, 48), bool)
    clusters[0, 4:28, 4:34] = clusters[1, 4:28, 34:44] = True
    shares = walk(clusters, saliency, boundary, FusionConfig())
    assert all(iou(mask, cluster) > 0.6 for mask, cluster in zip(shares.numpy() > 0.5, clusters, strict=True))


def test_a_salient_pixel_of_no_cluster_is_the_background_s():
    saliency, boundary, _, truth = scene()
    saliency[1:3, 45:47] = 0.9
    maps = walk(truth, saliency, boundary, FusionConfig())
    assert (maps[:, 1:3, 45:47] < 0.5).all() and (maps > 0.5).any(2).any(1).all()
