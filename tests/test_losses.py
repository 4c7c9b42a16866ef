"""L_B, L_V and L_su against their formulas, and the effect of the subitizing loss on a free offset field."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ops
from models.grouping import split_labels_by_count
from models.losses import (
    boundary_loss,
    centroid_count,
    centroid_loss,
    centroid_target_loss,
    divisors,
    subitizing_loss,
)

POINTS = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij"))


def test_boundary_loss_by_hand():
    # Radius 2 on 1x3: the pairs (0,1) and (1,2) only. Labels 1 1 0: one foreground pair, one different pair.
    labels = torch.tensor([[[1, 1, 0]]])
    boundary = torch.tensor([[[[0.1, 0.2, 0.7]]]])
    same, different = -math.log(0.8 + 1e-5), -math.log(1 + 1e-5 - 0.3)
    expected = (same / 2 + different) / 2
    assert boundary_loss(boundary, labels, 2).item() == pytest.approx(expected, rel=1e-3)


def test_centroid_loss_vanishes_on_the_ideal_field_only():
    labels = torch.zeros(1, 32, 40, dtype=torch.long)
    labels[0, 8:20, 10:30] = 3
    ideal = torch.where(labels[:, None] > 0, torch.tensor([14.0, 20.0]).view(1, 2, 1, 1) - POINTS, 0)
    assert centroid_loss(ideal, labels, 5).item() < 1e-6
    assert centroid_loss(ideal + 3.0, labels, 5).item() < 1e-4, "V is determined only up to a constant"
    # V = 0: |delta - (q - p)| = |q - p|, averaged over foreground pairs; nothing in the background.
    of_step = [(abs(dy) + abs(dx), (12 - abs(dy)) * (20 - abs(dx))) for dy, dx in ops.path_offsets(5)[0].tolist()]
    expected = sum(length * pairs for length, pairs in of_step) / (2 * sum(pairs for _, pairs in of_step)) / 2
    assert centroid_loss(torch.zeros(1, 2, 32, 40), labels, 5).item() == pytest.approx(expected, rel=1e-4)


def test_pair_losses_ignore_undecided_pixels():
    labels = torch.full((1, 8, 8), 255)
    assert centroid_loss(torch.randn(1, 2, 8, 8), labels, 3).item() == 0
    assert boundary_loss(torch.rand(1, 1, 8, 8), labels, 3).item() == 0


@pytest.mark.parametrize("centres", [[(16, 20)], [(8, 10), (22, 28)], [(6, 8), (6, 32), (26, 20)]])
def test_soft_count_is_the_number_of_centroids_on_ideal_fields(centres):
    centres = torch.tensor(centres, dtype=torch.float)
    nearest = (POINTS.flatten(1).t()[:, None] - centres).square().sum(2).argmin(1)
    points = centres[nearest] + 0.2 * torch.randn(len(nearest), 2, generator=torch.Generator().manual_seed(0))
    assert centroid_count(points, 3.0).item() == pytest.approx(len(centres), rel=0.05)


def test_subitizing_loss_has_a_gradient_in_the_salient_region_only():
    torch.manual_seed(0)
    field = torch.randn(2, 2, 32, 40, requires_grad=True)
    region = torch.zeros(2, 32, 40, dtype=torch.bool)
    region[0, 5:15, 5:15] = True
    subitizing_loss(field, region, torch.tensor([2.0, 1.0]), 3.0).backward()
    touched = field.grad.abs().sum(1) > 0
    assert touched[0].any() and not touched[0][~region[0]].any()
    assert not touched[1].any(), "no gradient without a salient region"


def test_subitizing_loss_is_the_mean_over_images_with_region_and_count():
    torch.manual_seed(0)
    field, region = 3 * torch.randn(5, 2, 32, 40), torch.zeros(5, 32, 40, dtype=torch.bool)
    region[0, 5:15, 5:35] = region[1, 3, 3] = region[2, :20] = region[4] = True
    counts = torch.tensor([2.0, 3.0, 4.0, 1.0, 0.0])
    alone = [subitizing_loss(field[i, None], region[i, None], counts[i, None], 2.0, seed=7) for i in range(5)]
    assert alone[3] == alone[4] == 0 and alone[1] == pytest.approx(2 * (3 - 1 - 0.5))
    assert subitizing_loss(field, region, counts, 2.0, seed=7) == pytest.approx(sum(alone) / 3)
    points = (POINTS + field[0])[:, region[0]].t()
    found = subitizing_loss(field[:1], region[:1], counts[:1], 2.0, subset=300)
    assert found == pytest.approx(2 * F.smooth_l1_loss(centroid_count(points, 2.0), counts[0]).item(), rel=1e-4)


def test_pseudo_instances_are_as_many_as_the_count():
    classes = np.zeros((32, 40), np.uint8)
    classes[4:14, 4:14] = 3  # touches the next, of another class
    classes[4:14, 14:18] = 8
    classes[20:30, 10:38] = 3
    classes[0, 39] = 5  # too small
    classes[18, :] = 255
    three = split_labels_by_count(classes, 3)
    assert three.max() == 3 and three[0, 39] == 0 and (three[18] == 0).all()
    assert len({three[5, 5].item(), three[5, 15].item(), three[25, 20].item()}) == 3
    one = split_labels_by_count(classes, 1)
    assert (one > 0).sum() == 10 * 28, "of too many components, the largest"
    four = split_labels_by_count(classes, 4)
    assert four.max() == 4 and (four[20:30, 10:22] == four[25, 12]).all() and (four[20:30, 26:38] == four[25, 30]).all()
    assert four[25, 12] != four[25, 30], "of too few, the largest is split in two"
    assert split_labels_by_count(classes * 0, 2).max() == 0
    assert split_labels_by_count(classes, 0).max() == 0


def test_centroid_target_loss_is_the_distance_to_the_centres():
    classes = np.zeros((32, 40), np.uint8)
    classes[4:14, 4:14] = classes[20:30, 24:38] = 3
    instances = torch.from_numpy(split_labels_by_count(classes, 2))
    ideal = torch.zeros(2, 2, 32, 40)
    for number in (1, 2):
        place = instances == number
        ideal[:, :, place] = (POINTS[:, place].mean(1, keepdim=True) - POINTS[:, place])[None]
    instances = torch.stack([instances, torch.zeros_like(instances)])
    assert centroid_target_loss(ideal, instances).item() < 1e-5
    # Off by (3, -1) in one of the two: half of |3| + |-1|; the image without instances does not count.
    off = ideal + (instances == 1)[:, None] * torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    off.requires_grad_()
    loss = centroid_target_loss(off, instances)
    loss.backward()
    assert loss.item() == pytest.approx(2.0, rel=1e-5), "instances weigh the same, whatever their size"
    assert off.grad[1].abs().max() == 0 and (off.grad[0].abs().sum(0) > 0)[instances[0] == 1].all()
    assert not off.grad[0][:, instances[0] == 0].any()
    assert centroid_target_loss(off, instances * 0).item() == 0


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(parts):
    """For every loss, also where the parts differ in size and in their labels, or have none."""
    torch.manual_seed(0)
    boundary, offsets = torch.rand(5, 1, 16, 20, dtype=torch.double), 3 * torch.randn(5, 2, 16, 20, dtype=torch.double)
    labels = torch.randint(0, 3, (5, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[1], labels[2, :8], labels[4] = 0, 255, 255
    salient, counts = labels == 1, torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0])
    instances = torch.where(labels < 3, labels, 0)
    by = divisors(labels, salient, counts, instances, 3)
    assert by[:, 3].tolist() == [1, 0, 0, 1, 0] and by[:, 4].tolist() == [2, 0, 2, 2, 0] and not by[4].any()

    whole = boundary, offsets, labels, salient, counts, instances

    def gradients(parts, means):
        for maps in (boundary, offsets):
            maps.grad = None
            maps.requires_grad_()
        total = torch.zeros(4, dtype=torch.double)
        for b, v, y, s, t, k in zip(*(tensor.tensor_split(parts) for tensor in whole), strict=True):
            terms = (
                boundary_loss(b, y, 3, means and by.mean(0)[:3]),
                centroid_loss(v, y, 3, means and by.mean(0)[:3]),
                subitizing_loss(v, s, t, 2.0, subset=99, valid_fraction=means and by.mean(0)[3]),
                centroid_target_loss(v, k, means and by.mean(0)[4]),
            )
            weighted = torch.stack(terms) * len(y) / 5
            weighted.sum().backward()
            total += weighted.detach()
        return total, boundary.grad, offsets.grad

    for one, divided in zip(gradients(1, None), gradients(parts, True), strict=True):
        assert one.any() and torch.allclose(one, divided, rtol=1e-5, atol=1e-9)


def two_discs():
    discs = [((POINTS - torch.tensor([16.0, x]).view(2, 1, 1)).square().sum(0) <= 36) for x in (14.0, 26.0)]
    return discs[0] | discs[1]


def field_towards(*columns):
    """Every pixel points to the nearest of the centres (16, column)."""
    columns = torch.tensor(columns)
    nearest = columns[(POINTS[1][..., None] - columns).abs().argmin(-1)]
    return torch.stack([torch.full_like(nearest, 16.0), nearest]) - POINTS


@pytest.mark.parametrize("start, count", [((20.0,), 2), ((14.0, 26.0), 1), ((20.0,), 1), ((14.0, 26.0), 2)])
def test_subitizing_loss_splits_and_merges_touching_discs(start, count):
    """A free field over two touching discs reaches the given number of centroids from merged and split starts.

    A mean-shift term keeps clusters tight, as L_V does in training.
    """
    torch.manual_seed(0)
    region = two_discs()
    field = (field_towards(*start) + 0.3 * torch.randn(2, 32, 40)).requires_grad_()
    optimizer = torch.optim.Adam([field], lr=0.05)
    for step in range(400):
        bandwidth = 6.0 if step < 200 else 3.0
        points = (POINTS + field)[:, region].t()
        kernel = torch.exp(-(points[:, None] - points).square().sum(2) / (2 * bandwidth**2)).detach()
        means = kernel @ points.detach() / kernel.sum(1, keepdim=True)
        tight = (points - means).square().sum(1).mean()
        loss = subitizing_loss(field[None], region[None], torch.tensor([float(count)]), bandwidth, subset=1000)
        optimizer.zero_grad()
        (loss + 0.05 * tight).backward()
        optimizer.step()
    points = (POINTS + field.detach())[:, region].t()
    assert centroid_count(points, 3.0).item() == pytest.approx(count, rel=0.05)
    # Counted plainly: groups of points more than 3 pixels apart.
    groups = []
    for point in points:
        if all((point - other).norm() > 3 for other in groups):
            groups.append(point)
    assert len(groups) == count


def test_each_of_k_pixels_has_one_kth_of_the_gradient():
    """The 1/K of Eq. 4: of twice as many pixels with the same centroids, each has half the gradient."""

    def gradients(copies):
        offsets = torch.zeros(1, 2, 8, 8 * copies, dtype=torch.float64)
        columns = torch.arange(8 * copies)
        target = torch.where(columns // copies < 4, 2.0, 5.0)  # two groups of columns, each with its centroid
        offsets[0, 1] = target - columns
        offsets[0, 0] = 3.0 - torch.arange(8)[:, None]
        offsets.requires_grad_()
        salient = torch.ones(1, 8, 8 * copies, dtype=torch.bool)
        loss = subitizing_loss(offsets, salient, torch.tensor([1.0]), 2.0, subset=10**6)
        return torch.autograd.grad(loss, offsets)[0][0, 1, :, ::copies]

    one, two = gradients(1), gradients(2)
    assert one.abs().min() > 0 and torch.allclose(two, one / 2)
