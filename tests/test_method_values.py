"""Formulas of the method written out on small maps: losses pair by pair, pseudo labels and scores pixel by pixel."""

import math

import numpy as np
import pytest
import torch

import ops
from engine import instance_labels
from engine.instance_labels import Maps, instance_label, pseudo_mask
from models.fusion_config import FusionConfig
from models.losses import boundary_loss, centroid_loss, centroid_target_loss, subitizing_loss
from models.scoring import score_of

HEIGHT, WIDTH, RADIUS = 9, 11, 4


def small_maps():
    """Labels of three classes, background and undecided pixels, a boundary map and offsets, of two photographs."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, HEIGHT, WIDTH).long()
    labels[0, 2:6, 1:5], labels[0, 2:6, 5:9], labels[0, 7:] = 3, 8, 255
    labels[1, 4:, 4:] = 20
    boundary = torch.rand(2, HEIGHT, WIDTH, generator=generator)
    offsets = 3 * torch.randn(2, 2, HEIGHT, WIDTH, generator=generator)
    return labels, boundary, offsets


def pairs(labels):
    """(photograph, p, q, the path from p to q) of all pairs nearer than RADIUS whose labels are both decided."""
    offsets, paths = ops.path_offsets(RADIUS)
    for n, y, x in np.ndindex(*labels.shape):
        for (dy, dx), path in zip(offsets.tolist(), paths, strict=True):
            p, q = (y, x), (y + dy, x + dx)
            if q[0] < HEIGHT and 0 <= q[1] < WIDTH and 255 not in (labels[n][p], labels[n][q]):
                yield n, p, q, [(y + a, x + b) for a, b in path.tolist()]


def test_l_b_is_the_mean_over_three_kinds_of_pairs():
    """L+ = 1/2 mean_bg[-log(a + 1e-5)] + 1/2 mean_fg[-log(a + 1e-5)], L- = mean[-log(1 + 1e-5 - a)] [IRN]."""
    labels, boundary, _ = small_maps()
    kinds = {"background": [], "foreground": [], "different": []}
    for n, p, q, path in pairs(labels.numpy()):
        a = 1 - max(boundary[n][place].item() for place in path)
        if labels[n][p] != labels[n][q]:
            kinds["different"].append(-math.log(1 + 1e-5 - a))
        else:
            kinds["foreground" if labels[n][p] else "background"].append(-math.log(a + 1e-5))
    background, foreground, different = (np.mean(kind) for kind in kinds.values())
    expected = ((background + foreground) / 2 + different) / 2
    assert boundary_loss(boundary[:, None], labels, RADIUS).item() == pytest.approx(expected, rel=1e-4)


def test_l_v_is_the_mean_over_two_kinds_of_pairs():
    """Mean |V(p) - V(q) - (q - p)| / 2 in the foreground, mean |V(p) - V(q)| / 2 beside it; half of both [IRN]."""
    labels, _, offsets = small_maps()
    field, background, foreground = offsets.numpy(), [], []
    for n, p, q, _ in pairs(labels.numpy()):
        delta = field[n][(slice(None), *p)] - field[n][(slice(None), *q)]
        if labels[n][p] == labels[n][q] == 0:
            background.append(np.abs(delta).sum() / 2)
        elif labels[n][p] == labels[n][q]:
            foreground.append(np.abs(delta - np.subtract(q, p)).sum() / 2)
    expected = (np.mean(background) + np.mean(foreground)) / 2
    assert centroid_loss(offsets, labels, RADIUS).item() == pytest.approx(expected, rel=1e-4)


def test_l_su_trains_256_pixels_of_each_region():
    offsets = torch.randn(1, 2, 20, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    region = torch.zeros(1, 20, 30, dtype=torch.bool)
    region[:, :15, :20] = True
    subitizing_loss(offsets, region, torch.tensor([3.0]), 2.0).backward()
    touched = offsets.grad[0].abs().sum(0) > 0
    assert touched.sum() == 256 and not (touched & ~region[0]).any()


@pytest.mark.parametrize("count, expected", [(1, 0.5**2), (2, 0.5**2), (4, 2 * 2.5 - 1), (0, 0)])
def test_l_su_is_square_up_to_one_and_twice_the_distance_beyond(count, expected):
    """Points that are exp(-d^2 / 2 h^2) = 1/3 near to each other, two of them: T~ = 2 / (1 + 1/3) = 3/2."""
    offsets = torch.zeros(1, 2, 1, 9)
    region = torch.zeros(1, 1, 9, dtype=torch.bool)
    region[..., 1] = region[..., 7] = True
    bandwidth = 6 / math.sqrt(2 * math.log(3))
    loss = subitizing_loss(offsets, region, torch.tensor([float(count)]), bandwidth).item()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_l_su_of_the_paper_is_the_squared_error_with_a_gradient_over_k(count):
    """Eq. 3 and 4, for the two points of the test above: K is 2, and T~ = 2 / (1 + e) with e = exp(-d^2 / 2 h^2)."""
    offsets = torch.zeros(1, 2, 1, 9, requires_grad=True)
    region = torch.zeros(1, 1, 9, dtype=torch.bool)
    region[..., 1] = region[..., 7] = True
    bandwidth = 6 / math.sqrt(2 * math.log(3))
    loss = subitizing_loss(offsets, region, torch.tensor([float(count)]), bandwidth, form="mse")
    assert loss.item() == pytest.approx((1.5 - count) ** 2, rel=1e-5)
    loss.backward()
    slope = -2 / (1 + 1 / 3) ** 2 * (1 / 3) * -6 / bandwidth**2  # of T~ by the right point's place
    assert offsets.grad[0, 1, 0, 7].item() == pytest.approx(2 * (1.5 - count) * slope / 2, rel=1e-4)
    assert offsets.grad[0, 1, 0, 1].item() == pytest.approx(-2 * (1.5 - count) * slope / 2, rel=1e-4)


def test_an_instance_of_one_pixel_points_to_itself():
    instances = torch.zeros(1, 4, 5).long()
    instances[0, 1, 2] = 255
    offsets = torch.zeros(1, 2, 4, 5)
    offsets[0, :, 1, 2] = torch.tensor([3.0, -1.5])
    assert centroid_target_loss(offsets, instances).item() == pytest.approx(4.5)


# ---- pseudo labels of PTS, and scores


def one_object():
    """A photograph of one object, as maps of the stride-4 grid, and its mask at the photograph's size."""
    yy, xx = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    inside = (yy >= 4) & (yy < 12) & (xx >= 4) & (xx < 12)
    saliency, boundary = torch.where(inside, 0.7, 0.1), torch.zeros(16, 16)
    boundary[3:13, 3:13] = 1
    boundary[inside] = 0
    offsets = torch.stack([7.5 - yy, 7.5 - xx]) * inside
    return Maps(saliency, boundary, offsets), np.repeat(np.repeat(inside.numpy(), 4, 0), 4, 1)


IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize("of_saliency, of_initial", [(0, 0), (0.5, 0), (0.5, 1 / 3), (0, 1 / 3)])
def test_the_crf_of_pts_starts_from_the_union_of_s_and_of_the_initial_mask(monkeypatch, of_saliency, of_initial):
    """Algorithm 1 with both weights 0; away from the contour, where S is one number."""
    monkeypatch.setattr(instance_labels, "refine_saliency", lambda image, foreground: foreground)
    maps, inside = one_object()
    initial = np.where(inside, 0.4, 0.6).astype(np.float32)
    for grouping in ("sinks", "count"):
        settings = FusionConfig(grouping=grouping)
        found = pseudo_mask(IMAGE, maps, 1, settings, of_saliency, initial, of_initial)
        mean = 1 - of_saliency + of_saliency * 0.7
        assert found[24:40, 24:40] == pytest.approx((1 - of_initial) * mean + of_initial * 0.4, abs=1e-5)
        assert found[:8] == pytest.approx((1 - of_initial) * of_saliency * 0.1 + of_initial * 0.6, abs=1e-5)
        assert pseudo_mask(IMAGE, maps, 1, settings, of_saliency)[:8] == pytest.approx(of_saliency * 0.1, abs=1e-5)


def test_only_known_classes_contradict_an_instance():
    """Most of it is of no known class: the rest keeps its label."""
    maps, inside = one_object()
    classes = np.zeros((64, 64), np.uint8)
    classes[16:28, 16:48], classes[28:32, 16:48] = 1, 5
    found = instance_label(np.where(inside, 0.9, 0.1).astype(np.float32), maps, 1, FusionConfig(), classes)
    assert (found[18:26, 18:46] == 1).all() and (found[29:31, 18:46] == 255).all() and (found[34:46, 18:46] == 1).all()


def test_a_score_sets_s_inside_beside_a_band_of_a_25th_of_the_side():
    """Of a square of 20 in 100 pixels the band is 4 wide; S in it is 0, but .5 in its outermost row of pixels."""
    saliency, inside = np.ones((100, 100), np.float32), np.zeros((100, 100), np.float32)
    for reach, value in ((4, 0.5), (3, 0), (0, 0.9)):
        saliency[40 - reach : 60 + reach, 40 - reach : 60 + reach] = value
    inside[40:60, 40:60] = 1
    beside = 0.5 * (28**2 - 26**2) / (28**2 - 20**2)
    assert score_of(inside, saliency) == pytest.approx(math.sqrt(0.9 * (0.9 - beside)), rel=1e-5)
