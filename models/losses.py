"""The losses of the boundary and centroid branches, on pairs of nearby pixels of the stride-4 grid (Sec. 3.1, 4.2)."""

import torch
import torch.nn.functional as F

import ops
from datasets.labels import IGNORE
from models.count_head import MAX_COUNT


def divisors(labels, salient, counts, instances, radius):
    """What the losses of the branches divide their sums by, as labels alone tell it.

    labels, radius: as for ``boundary_loss``; salient, counts: as for ``subitizing_loss``; instances: as for
    ``centroid_target_loss``. Returns float32 [N,5], of each image: pairs in the background, pairs of one object, pairs
    of different labels; 1 where L_su speaks; instances. A batch that is computed in parts, or by several processes,
    has the gradient of the whole where every part divides by the mean of these over the images of all parts: each loss
    takes it, [3], [] or [], in the place of what it else finds for the images it is given.
    """
    speaks, numbers = _speaks(salient, counts), _instance_sizes(instances)[:, 1:] > 0
    return torch.cat((_pairs(labels, radius), speaks[:, None], numbers.sum(1, keepdim=True)), 1).float()


def _pairs(labels, radius):
    same, different = ops.pair_counts(labels, radius, IGNORE).unbind(1)
    return torch.stack([x.flatten(1).sum(1) for x in (same * (labels == 0), same * (labels > 0), different)], 1)


def _speaks(salient, counts):
    return salient.flatten(1).any(1) & (counts >= 1)


def _instance_sizes(instances):
    """Pixels of each number 0..255 in int64 [N,H,W]: int64 [N,256]."""
    of = (instances + 256 * torch.arange(len(instances), device=instances.device).view(-1, 1, 1)).flatten()
    return of.new_zeros(256 * len(instances)).index_add_(0, of, torch.ones_like(of)).unflatten(0, (-1, 256))


def boundary_loss(boundary, labels, radius, pairs=None):
    """L_B: pairs of one label should see no boundary between them, pairs of different labels should [IRN].

    boundary: B [N,1,H,W] in 0..1; labels: int64 [N,H,W] on the stride-4 grid, 0 background, 1..20 class (or 1..n
    instance), 255 undecided, whose pairs do not count; radius: of the pairs, in pixels of that grid; pairs: [3], the
    mean over images of the first three ``divisors``, by default over these images.
    L_B = (L+ + L-) / 2 with L+ = 1/2 mean_bg -log(a + 1e-5) + 1/2 mean_fg -log(a + 1e-5) and
    L- = mean_neg -log(1 + 1e-5 - a).
    """
    together, apart = ops.boundary_pair_loss(boundary[:, 0], labels, radius, IGNORE).unbind(1)
    background, foreground, different = len(labels) * _mean_pairs(labels, radius, pairs) + 1e-5
    positive = (together * (labels == 0)).sum() / background + (together * (labels > 0)).sum() / foreground
    return (positive / 2 + apart.sum() / different) / 2


def _mean_pairs(labels, radius, pairs):
    return _pairs(labels, radius).float().mean(0) if pairs is None else pairs


def centroid_loss(offsets, labels, radius, pairs=None):
    """L_V: two pixels of one object point to one place, background points nowhere in particular [IRN].

    offsets: V [N,2,H,W] in stride-4 pixels; labels, radius, pairs: as for ``boundary_loss``. With delta = V(p) - V(q),
    which should equal q - p in the foreground and 0 in the background:
    L_V = (sum_fg |delta - (q - p)| / 2 #fg + sum_bg |delta| / 2 #bg) / 2.
    """
    errors = ops.displacement_pair_loss(offsets, labels, radius, IGNORE)
    background, foreground, _ = 2 * len(labels) * _mean_pairs(labels, radius, pairs) + 1e-5
    return ((errors * (labels > 0)).sum() / foreground + (errors * (labels == 0)).sum() / background) / 2


def centroid_count(points, bandwidth, valid=None):
    """A differentiable number of clusters: T~ = sum_i 1 / sum_j exp(-|c_i - c_j|^2 / 2 h^2).

    points: (y, x) [...,M,2] in stride-4 pixels; bandwidth: h, in the same pixels; valid: bool [...,M], the points that
    count, by default all. Every pixel counts for one over the number of pixels that share its centroid, so T~ is the
    number of clusters when the points of each coincide and the clusters lie several h apart. Returns [...]; 0 where
    no point counts.
    """
    valid = points.new_ones(points.shape[:-1]) if valid is None else valid.to(points)
    y, x = points.unbind(-1)  # apart: a sum over an axis of two is slow
    distance = (y[..., :, None] - y[..., None, :]).square() + (x[..., :, None] - x[..., None, :]).square()
    near = torch.exp(-distance / (2 * bandwidth**2)) * valid[..., None, :]
    return (valid / near.sum(-1).clamp(min=1)).sum(-1)  # a point that counts has itself near, others stay finite


def subitizing_loss(offsets, salient, counts, bandwidth, *, subset=256, seed=0, speaking=None, form="huber"):
    """L_su: as many centroids in the salient region as the count label says, (T* - T)^2 (Eq. 3, 4).

    offsets: V [N,2,H,W] in stride-4 pixels; salient: bool [N,H,W], the region whose offsets count and alone are
    updated; counts: T [N]; bandwidth: h of ``centroid_count``. T* is an integer without a gradient, so the soft
    count T~ over the points p + V(p) stands in for it; of each region a random ``subset`` of pixels is used, which
    bounds the quadratic cost and hardly changes T~. Images without salient pixels, or without a count (T < 1), are
    left out; speaking: [], the share of the images that are not, by default of these. What keeps each cluster tight is
    L_V, with which this loss is trained. form: "mse" is (T~ - T)^2 with its gradient divided by K, the number of
    offsets in the region (Eq. 3, 4); "huber" is square up to one object too many or too few, and linear beyond [ours].
    """
    width, regions = offsets.shape[-1], salient.flatten(1)
    # One order of the grid's pixels for all images: an image has the same subset in whichever process it is.
    order = torch.rand(regions.shape[1], generator=torch.Generator().manual_seed(seed)).to(offsets.device)
    rank, chosen = order.where(regions, -1).topk(min(subset, regions.shape[1]))
    valid = rank >= 0
    pointed = offsets.flatten(2).gather(2, chosen[:, None].expand(-1, 2, -1)).transpose(1, 2)
    points = torch.stack((chosen // width, chosen % width), 2) + pointed
    speaks = _speaks(salient, counts)
    speaking = speaks.float().mean() if speaking is None else speaking
    found = centroid_count(points, bandwidth, valid)
    if form == "mse":
        offsets_in_region = regions.sum(1).clamp(min=1)
        found = found.detach() + (found - found.detach()) / offsets_in_region
        losses = (found - counts.to(points)).square()
    else:  # an unformed V has dozens of centroids
        losses = 2 * F.smooth_l1_loss(found, counts.to(points), reduction="none")
    return (losses * speaks).sum() / (len(salient) * speaking).clamp(min=1e-5)


def count_loss(logits, counts):
    """Cross entropy of the number that is told, with a tenth of each label spread over all numbers [ours].

    logits: [N,MAX_COUNT] of a CountHead; counts: T [N], 1 or more, clipped at MAX_COUNT. Returns a scalar.
    """
    return F.cross_entropy(logits.float(), counts.long().clamp(max=MAX_COUNT) - 1, label_smoothing=0.1)


def centroid_target_loss(offsets, instances, number=None):
    """What the count label says about V at once: every pixel of a counted instance points to its centre [ours].

    L_V moves an object's rim first and its inside last, which takes thousands of iterations, and it holds touching
    objects of one class together; these targets reach every pixel and part them. offsets: V [N,2,H,W] in stride-4
    pixels; instances: int64 [N,H,W] in 0..255, 0 elsewhere (``models.grouping.split_labels_by_count``); number: [], of
    instances on average in an image, by default in these. Returns the mean over all instances of the mean
    |V(p) - (c - p)|_1 over their pixels; 0 when there are none.
    """
    count, (height, width) = len(instances), instances.shape[-2:]
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).to(offsets)
    bins = 256 * count
    of = (instances + 256 * torch.arange(count, device=instances.device).view(-1, 1, 1)).flatten()

    def means(values):  # [C,N*H*W] over the pixels of each instance
        return values.new_zeros(len(values), bins).index_add_(1, of, values) / size.clamp(min=1)

    size = _instance_sizes(instances).flatten()
    places = places.flatten(1).repeat(1, count)
    target = means(places)[:, of] - places
    errors = means((offsets.transpose(0, 1).flatten(1) - target).abs().sum(0, keepdim=True))[0]
    is_instance = (size > 0) & (torch.arange(bins, device=of.device) % 256 > 0)
    number = is_instance.sum() / count if number is None else number
    return (errors * is_instance).sum() / (count * number).clamp(min=1e-5)
