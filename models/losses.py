"""The losses of the boundary and the centroid branch, on the stride-4 grid (Sec. 3.1, 4.2), and of the count network.

All take a batch of N images, with maps [N,...,H,W] on that grid, and return a scalar.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from datasets.labels import IGNORE


def divisors(labels: Tensor, salient: Tensor, counts: Tensor, instances: Tensor, radius: int) -> Tensor:
    """What the losses of the branches divide their sums by; it depends on the labels alone.

    labels, radius: as for ``boundary_loss``; salient, counts: as for ``subitizing_loss``; instances: as for
    ``centroid_target_loss``. Returns float32 [N,5], of each image: the number of background pairs, of foreground pairs,
    of pairs of different labels; 1 where L_su is defined, else 0; the number of instances.

    A batch that is computed in parts, or by several processes, has the gradient of the whole where every part divides
    by the mean of these over the images of all parts. The losses take that mean, [3], [] or [], as an argument; by
    default they use the mean over the images that they are given.
    """
    has_count, sizes = _has_count(salient, counts), _instance_sizes(instances)[:, 1:]
    return torch.cat((_pairs(labels, radius), has_count[:, None], (sizes > 0).sum(1, keepdim=True)), 1).float()


def _pairs(labels: Tensor, radius: int) -> Tensor:
    """int64 [N,3]: pairs in the background, in the foreground with the same label, with different labels."""
    same, different = ops.pair_counts(labels, radius, IGNORE).unbind(1)
    return torch.stack([x.flatten(1).sum(1) for x in (same * (labels == 0), same * (labels > 0), different)], 1)


def _has_count(salient: Tensor, counts: Tensor) -> Tensor:
    return salient.flatten(1).any(1) & (counts >= 1)


def _instance_sizes(instances: Tensor) -> Tensor:
    """Pixels of each number 0..255 in int64 [N,H,W]: int64 [N,256]."""
    index = (instances + 256 * torch.arange(len(instances), device=instances.device).view(-1, 1, 1)).flatten()
    sizes = index.new_zeros(256 * len(instances)).index_add_(0, index, torch.ones_like(index))
    return sizes.unflatten(0, (-1, 256))


def boundary_loss(boundary: Tensor, labels: Tensor, radius: int, mean_pairs: Tensor | None = None) -> Tensor:
    """L_B, the cross entropy of pixel affinities: 1 for pairs with the same label, 0 for different labels [IRN].

    L_B = (L+ + L-) / 2 with L+ = 1/2 mean_bg -log(a + 1e-5) + 1/2 mean_fg -log(a + 1e-5) and
    L- = mean_neg -log(1 + 1e-5 - a), where a(p, q) = 1 - max of B on the path from p to q (Sec. 3.2, 4.2).

    boundary: B [N,1,H,W] in 0..1; labels: int64 [N,H,W], 0 background, 1..20 class (or 1..n instance), 255 undecided,
    whose pairs are left out; radius: of the pairs, in pixels of the grid; mean_pairs: [3], the mean over images of the
    first three ``divisors``.
    """
    same, different = ops.boundary_pair_loss(boundary[:, 0], labels, radius, IGNORE).unbind(1)
    mean_pairs = _pairs(labels, radius).float().mean(0) if mean_pairs is None else mean_pairs
    n_background, n_foreground, n_different = len(labels) * mean_pairs + 1e-5
    positive = (same * (labels == 0)).sum() / n_background + (same * (labels > 0)).sum() / n_foreground
    return (positive / 2 + different.sum() / n_different) / 2


def centroid_loss(offsets: Tensor, labels: Tensor, radius: int, mean_pairs: Tensor | None = None) -> Tensor:
    """L_V: pixels of one object point to one centroid, background pixels have equal offsets [IRN].

    With delta = V(p) - V(q), which should be q - p in the foreground and 0 in the background:
    L_V = (sum_fg |delta - (q - p)| / 2 #fg + sum_bg |delta| / 2 #bg) / 2 (Sec. 3.1, 4.2).

    offsets: V [N,2,H,W] in pixels of the grid; labels, radius, mean_pairs: as for ``boundary_loss``.
    """
    errors = ops.displacement_pair_loss(offsets, labels, radius, IGNORE)
    mean_pairs = _pairs(labels, radius).float().mean(0) if mean_pairs is None else mean_pairs
    n_background, n_foreground, _ = 2 * len(labels) * mean_pairs + 1e-5
    return ((errors * (labels > 0)).sum() / n_foreground + (errors * (labels == 0)).sum() / n_background) / 2


def centroid_count(points: Tensor, bandwidth: float, valid: Tensor | None = None) -> Tensor:
    """A differentiable number of clusters, T~ = sum_i 1 / sum_j exp(-|c_i - c_j|^2 / 2 h^2) [ours].

    points: (y, x) [...,M,2] in pixels of the grid; bandwidth: h, in the same pixels; valid: bool [...,M], the points
    that are counted, by default all. Each point has the weight of one over the number of points in its cluster, so T~
    is the number of clusters when the points of each coincide and the clusters lie several h apart. Returns [...]; 0
    where no point is valid.
    """
    valid = points.new_ones(points.shape[:-1]) if valid is None else valid.to(points)
    y, x = points.unbind(-1)  # apart: a sum over an axis of two is slow
    distance = (y[..., :, None] - y[..., None, :]).square() + (x[..., :, None] - x[..., None, :]).square()
    near = torch.exp(-distance / (2 * bandwidth**2)) * valid[..., None, :]
    return (valid / near.sum(-1).clamp(min=1)).sum(-1)  # at least 1 for valid points; clamped for the others


def subitizing_loss(
    offsets: Tensor,
    salient: Tensor,
    counts: Tensor,
    bandwidth: float,
    *,
    subset: int = 256,
    seed: int = 0,
    valid_fraction: Tensor | None = None,
    form: str = "huber",
) -> Tensor:
    """L_su: the number of centroids in the salient region should be the count label, (T* - T)^2 (Eq. 3, 4).

    T* is an integer without a gradient, so the soft count T~ of the points p + V(p) replaces it (``centroid_count``).
    In each region a random ``subset`` of pixels is used, which bounds the quadratic cost and hardly changes T~. L_V,
    with which this loss is trained, keeps each cluster tight.

    offsets: V [N,2,H,W] in pixels of the grid; salient: bool [N,H,W], the region in which offsets are counted and
    updated; counts: T [N]; bandwidth: h of ``centroid_count``. Images without salient pixels, or without a count
    (T < 1), are left out; valid_fraction: [], the fraction of images that are not, by default of these.
    form: "mse" is (T~ - T)^2 with its gradient divided by K, the number of offsets in the region (Eq. 3, 4); "huber" is
    square up to one object too many or too few, and linear beyond [ours].
    """
    width, regions = offsets.shape[-1], salient.flatten(1)
    # One order of the pixels for all images: an image then has the same subset in every process.
    order = torch.rand(regions.shape[1], generator=torch.Generator().manual_seed(seed)).to(offsets.device)
    rank, chosen = order.where(regions, -1).topk(min(subset, regions.shape[1]))
    valid = rank >= 0
    chosen_offsets = offsets.flatten(2).gather(2, chosen[:, None].expand(-1, 2, -1)).transpose(1, 2)
    points = torch.stack((chosen // width, chosen % width), 2) + chosen_offsets
    has_count = _has_count(salient, counts)
    valid_fraction = has_count.float().mean() if valid_fraction is None else valid_fraction
    found = centroid_count(points, bandwidth, valid)
    if form == "mse":
        found = found.detach() + (found - found.detach()) / regions.sum(1).clamp(min=1)
        losses = (found - counts.to(points)).square()
    else:  # linear far away, as an untrained V has dozens of centroids
        losses = 2 * F.smooth_l1_loss(found, counts.to(points), reduction="none")
    return (losses * has_count).sum() / (len(salient) * valid_fraction).clamp(min=1e-5)


def centroid_target_loss(offsets: Tensor, instances: Tensor, mean_instances: Tensor | None = None) -> Tensor:
    """The distance from the point of each pixel to the centre of its pseudo instance [ours].

    L_V moves the rim of an object first and its interior last, which takes thousands of iterations, and it merges
    touching objects of one class; these targets reach every pixel and separate such objects.

    offsets: V [N,2,H,W] in pixels of the grid; instances: int64 [N,H,W] in 0..255, 0 elsewhere
    (``models.grouping.split_labels_by_count``); mean_instances: [], the mean number of instances per image, by default
    of these. Returns the mean over all instances of the mean |V(p) - (c - p)|_1 over their pixels; 0 without instances.
    """
    count, (height, width) = len(instances), instances.shape[-2:]
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).to(offsets)
    places = places.flatten(1).repeat(1, count)
    bins = 256 * count
    index = (instances + 256 * torch.arange(count, device=instances.device).view(-1, 1, 1)).flatten()
    size = _instance_sizes(instances).flatten()

    def means(values: Tensor) -> Tensor:  # [C,N*H*W] over the pixels of each instance
        return values.new_zeros(len(values), bins).index_add_(1, index, values) / size.clamp(min=1)

    target = means(places)[:, index] - places
    errors = means((offsets.transpose(0, 1).flatten(1) - target).abs().sum(0, keepdim=True))[0]
    is_instance = (size > 0) & (torch.arange(bins, device=index.device) % 256 > 0)
    mean_instances = is_instance.sum() / count if mean_instances is None else mean_instances
    return (errors * is_instance).sum() / (count * mean_instances).clamp(min=1e-5)
