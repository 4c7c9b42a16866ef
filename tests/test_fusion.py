"""Clusters, the salience filter, the walk, masks and scores on fields with a known result."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ops
from engine.cam_labels import PLAIN, SPREAD, class_labels, foreground_probability, saliency_mask
from models import fusion, grouping
from models.crf import crf, refine_labels, refine_saliency
from models.fusion import fuse, instance_masks, walk, walks
from models.fusion_config import FusionConfig
from models.grouping import Clusters, connected_components, find_clusters
from models.scoring import CountHypothesis, count_hypotheses, expected_iou, on_grid, score_of
from utils.cli import InputError

HEIGHT, WIDTH = 32, 48
POINTS = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij"))
CENTRES = [(16.0, 13.5), (16.0, 31.5)]


def scene():
    """Two touching squares of 18x18 pixels, each pointing to its own centre; V is 0 in the background."""
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


def test_touching_objects_are_separated_by_their_centroids():
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
    components = connected_components(saliency.numpy(), FusionConfig())
    assert len(components.masks) == 1, "one connected component"


@pytest.mark.parametrize("formed", [1.0, 0.5])
def test_grouping_by_count_separates_objects_before_the_offsets_have_converged(formed):
    """At half of their length the offsets have one sink between the two objects, but still form two groups."""
    saliency, boundary, offsets, truth = scene()
    maps, centroids = fuse(saliency, boundary, formed * offsets, FusionConfig(), count=2)
    masks, _, _ = instance_masks(maps, saliency, (128, 192), FusionConfig())
    truth = truth.repeat(4, 1).repeat(4, 2)
    assert len(masks) == 2 and min(max(iou(mask, t) for t in truth) for mask in masks) > 0.85
    for centre in CENTRES:
        assert np.abs(centroids - centre).sum(1).min() < 1.5
    assert len(fuse(saliency, boundary, offsets, FusionConfig(), count=1)[0]) == 1
    assert len(fuse(saliency * 0, boundary, offsets, FusionConfig(), count=3)[0]) == 0


def test_components_are_never_merged_for_a_count():
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
    assert not FusionConfig.of(["count_aware_scores=false"]).count_aware_scores
    assert FusionConfig.of(["steps=64"], FusionConfig(power=7.0)) == FusionConfig(power=7.0, steps=64)
    for wrong in (
        "strength=3",
        "steps=many",
        "power",
        "share=half",
        "mask_rule=half",
        "grouping=",
        "count_aware_scores=2",
    ):
        with pytest.raises(InputError, match=wrong):
            FusionConfig.of([wrong])


# The limits of each setting, then some values beyond them.
ENDS = {
    "theta": ((0, 0.999), (-0.1, 1)),
    "sink_thresh": ((1e-6, 1000), (0, -1, 1e200)),
    "radius": ((1, 64), (0, 65, 2.5)),
    "power": ((0.1, 1000), (0, -3, 1e-3)),
    "steps": ((0, 10**5), (-1, 1.5, 10**9)),
    "saliency_thresh": ((0, 0.999), (-0.1, 1)),
    "mask_thresh": ((0, 0.999), (-0.1, 1)),
    "min_area": ((0, 0.999), (-0.1, 1)),
    "min_score": ((0, 1), (-0.1, 1.1)),
    "count_aware_scores": ((False, True), (-1, 2)),
    "grouping": (("sinks", "count"), ("components",)),
    "centroid_region": (("salient", "image"), ("region",)),
    "mask_rule": (("relative", "peak"), ("rival",)),
}


@pytest.mark.parametrize("name", ENDS)
def test_settings_out_of_their_range_are_refused_and_the_ends_of_it_work(name):
    right, wrong = ENDS[name]
    words = rf"--fusion {name}=.* does not fit; give "
    for value in (*wrong, math.nan, math.inf, -math.inf, None, "", "much"):
        with pytest.raises(InputError, match=words):
            FusionConfig.of([f"{name}={value}"])
        with pytest.raises(InputError, match=words):
            replace(FusionConfig(), **{name: value})
    saliency, boundary, offsets = (part[..., 8:26, 10:40] for part in scene()[:3])
    for value in right:
        settings = FusionConfig.of([f"{name}={value}"])
        assert settings == FusionConfig(**{name: value})
        assert type(getattr(settings, name)) is type(getattr(FusionConfig(), name))
        hypotheses = count_hypotheses(saliency.numpy(), offsets.numpy(), [0.5, 0.5], settings)
        assert len(hypotheses) == (2 if settings.count_aware_scores else 0)
        for count in (0, 2):
            maps, centroids = fuse(saliency, boundary, offsets, settings, count)
            assert len(maps) == len(centroids) and maps.isfinite().all()
            masks, scores, _ = instance_masks(maps, saliency, (72, 120), settings, hypotheses)
            assert len(masks) == len(scores) and np.isfinite(scores).all()


def test_scores_separate_an_object_from_a_part_and_from_a_blur():
    saliency = torch.zeros(32, 48)
    saliency[8:24, 8:24] = 0.9
    whole, half = np.zeros((128, 192), bool), np.zeros((128, 192), bool)
    whole[32:96, 32:96], half[32:96, 32:64] = True, True
    whole, half = (on_grid(mask, (32, 48)) for mask in (whole, half))
    score = score_of(whole, saliency.numpy())
    assert 0.84 < score < 0.9, "between 0.9 and a drop of nearly 0.9"
    assert score_of(half, saliency.numpy()) < 0.92 * score
    assert score_of(whole, np.full((32, 48), 0.9, np.float32)) == pytest.approx(1e-3), "no drop"
    assert score_of(whole, 0.5 * saliency.numpy()) == pytest.approx(score / 2, rel=0.01)


def test_expected_iou_is_low_for_an_instance_of_an_improbable_number():
    """Two regions; whether there are two or three objects, the smaller one is the same, and the larger one is split."""
    saliency, offsets = torch.zeros(32, 64), torch.zeros(2, 32, 64)
    saliency[8:24, 4:20], saliency[8:24, 32:60] = 0.9, 0.9
    hypotheses = count_hypotheses(saliency.numpy(), offsets.numpy(), [0.001, 0.6, 0.399], FusionConfig())
    found = [(each.number, each.probability, len(each.clusters.masks)) for each in hypotheses]
    assert found == [(2, 0.6, 2), (3, 0.399, 3)], "from 1 % on"
    single, double, half = (np.zeros((128, 256), bool) for _ in range(3))
    single[32:96, 16:80], double[32:96, 128:240], half[32:96, 128:184] = True, True, True
    small, large, part = (expected_iou(on_grid(mask, (32, 64)), hypotheses) for mask in (single, double, half))
    assert small == pytest.approx(0.999, abs=0.01)
    assert large == pytest.approx(0.6 + 0.399 / 2, abs=0.02), "of three, a half has IoU 1/2 with it"
    assert part == pytest.approx(0.6 / 2 + 0.399, abs=0.05)


def test_an_improbable_instance_ranks_lower_and_below_min_score_is_dropped():
    saliency, boundary, offsets, _ = scene()
    maps, _ = fuse(saliency, boundary, offsets, FusionConfig(), count=2)
    half = np.broadcast_to(np.arange(48) >= 24, (1, 32, 48))  # where the second object is
    hypotheses = [CountHypothesis(1, 1.0, Clusters(half, np.zeros((1, 2))))]
    masks, scores, kept = instance_masks(maps, saliency, (128, 192), FusionConfig(), hypotheses)
    assert kept.tolist() == [1] and len(masks) == len(scores) == 1
    by_saliency = instance_masks(maps, saliency, (128, 192), FusionConfig()).scores
    assert scores[0] < by_saliency.max()


def test_clusters_of_a_hypothesis_are_not_computed_twice(monkeypatch):
    saliency, boundary, offsets, _ = scene()
    hypotheses = count_hypotheses(saliency.numpy(), offsets.numpy(), [0.3, 0.7], FusionConfig())
    calls = []
    plain = fuse(saliency, boundary, offsets, FusionConfig(), count=2)
    monkeypatch.setattr(fusion, "group_by_counts", lambda *args: calls.append(args) or grouping.group_by_counts(*args))
    reused = fuse(saliency, boundary, offsets, FusionConfig(), count=2, hypotheses=hypotheses)
    assert not calls and torch.equal(plain.maps, reused.maps) and np.array_equal(plain.centroids, reused.centroids)
    fuse(saliency, boundary, offsets, FusionConfig(), count=3, hypotheses=hypotheses)
    assert len(calls) == 1, "no hypothesis of three"


def test_every_pixel_has_a_cluster():
    _, _, offsets, _ = scene()
    labels, centroids = find_clusters(offsets)
    assert labels.min() >= 1 and labels.max() == len(centroids)
    for y, x in CENTRES:
        assert (labels[int(y) - 7 : int(y) + 8, int(x) - 7 : int(x) + 8] == labels[int(y), int(x)]).all()


def test_without_sinks_or_salient_pixels_there_are_no_instances():
    saliency, boundary, offsets, _ = scene()
    empty, centroids = fuse(saliency, boundary, torch.full_like(offsets, 9.0), FusionConfig())
    assert empty.shape == (0, 32, 48) and len(centroids) == 0
    empty, _ = fuse(saliency * 0, boundary, offsets, FusionConfig())
    masks, scores, kept = instance_masks(empty, saliency, (60, 70), FusionConfig())
    assert masks.shape == (0, 60, 70) and scores.shape == kept.shape == (0,)


@pytest.mark.parametrize("fraction, kept", [(0.4, 0), (0.6, 1)])
def test_theta_is_the_salient_fraction_of_a_cluster(fraction, kept):
    saliency, boundary, offsets, truth = scene()
    saliency[:] = 0
    rows = np.argwhere(truth[0])
    chosen = rows[: round(fraction * len(rows))]
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


def test_relative_masks_are_fractions_of_the_responses_of_the_walk():
    saliency, boundary, _, truth = scene()
    settings = FusionConfig(steps=20)
    start = np.concatenate([truth * saliency.numpy(), ((1 - saliency.numpy()) * ~truth.any(0))[None]])
    affinity = ops.boundary_affinity(boundary[None], settings.radius)
    walked = torch.from_numpy(start).float() * (1 - boundary)
    walked = ops.random_walk(walked[None], affinity, settings.radius, settings.power, 20, method="power")[0].numpy()
    parts, ground = walked[:2] / walked[:2].max((1, 2), keepdims=True), walked[2]
    found = walk(truth, saliency, boundary, settings).numpy()
    expected = np.minimum(walked[:2] / (walked[:2] + ground), parts / parts.sum(0))
    assert np.allclose(found, expected, atol=1e-2)
    peaks = walk(truth, saliency, boundary, replace(settings, mask_rule="peak")).numpy()
    assert np.allclose(peaks, parts, atol=1e-3)
    assert ((found > 0.5).sum(0) <= 1).all(), "no pixel belongs to two instances"
    assert walk(truth[:0], saliency, boundary, settings).shape == (0, 32, 48)


@pytest.mark.parametrize("rule", ["relative", "peak"])
def test_walks_of_several_photographs_equal_those_of_each(rule):
    saliency, boundary, _, truth = scene()
    settings = FusionConfig(steps=20, mask_rule=rule)
    clusters = [truth, truth[:0], truth[1:], truth[::-1]]
    maps = torch.stack([saliency, saliency, 0.7 * saliency, saliency.sqrt()]), torch.stack([boundary] * 4) * 0.9
    together = walks(clusters, *maps, settings)
    for found, masks, s, b in zip(together, clusters, *maps, strict=True):
        assert len(found) == len(masks) and torch.allclose(found, walk(masks, s, b, settings), atol=1e-6)
    assert [len(found) for found in walks([truth[:0]] * 2, *(m[:2] for m in maps), settings)] == [0, 0]


def test_a_faint_object_does_not_spread_without_a_boundary():
    saliency = torch.zeros(32, 48)
    saliency[8:24, 12:36] = 0.55
    truth = saliency.numpy() > 0
    ours, irn = (
        walk(truth[None], saliency, torch.zeros(32, 48), FusionConfig(mask_rule=rule)) for rule in ("relative", "peak")
    )
    assert (ours[0] > 0.5).sum() <= truth.sum() < (irn[0] > 0.5).sum()


def test_a_small_object_is_not_absorbed_by_a_large_neighbour():
    """No boundary between them, and three times the pixels."""
    saliency, boundary = torch.full((32, 48), 0.05), torch.zeros(32, 48)
    saliency[4:28, 4:44] = 0.9
    boundary[3:29, 3:45] = 0.95
    boundary[4:28, 4:44] = 0
    clusters = np.zeros((2, 32, 48), bool)
    clusters[0, 4:28, 4:34] = clusters[1, 4:28, 34:44] = True
    maps = walk(clusters, saliency, boundary, FusionConfig())
    assert all(iou(mask, cluster) > 0.6 for mask, cluster in zip(maps.numpy() > 0.5, clusters, strict=True))


def test_a_salient_pixel_of_no_cluster_is_background():
    saliency, boundary, _, truth = scene()
    saliency[1:3, 45:47] = 0.9
    maps = walk(truth, saliency, boundary, FusionConfig())
    assert (maps[:, 1:3, 45:47] < 0.5).all() and (maps > 0.5).any(2).any(1).all()
