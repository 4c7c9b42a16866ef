"""The losses of the branches written out pair by pair and pixel by pixel, on small maps of every kind of pair."""

import math

import numpy as np
import pytest
import torch

import ops
from models.losses import boundary_loss, centroid_loss, counted_centroid_loss, subitizing_loss

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


def test_l_su_teaches_256_pixels_of_each_region():
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


def test_an_instance_of_one_pixel_points_to_itself():
    instances = torch.zeros(1, 4, 5).long()
    instances[0, 1, 2] = 255
    offsets = torch.zeros(1, 2, 4, 5)
    offsets[0, :, 1, 2] = torch.tensor([3.0, -1.5])
    assert counted_centroid_loss(offsets, instances).item() == pytest.approx(4.5)
