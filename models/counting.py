"""Subitizing: how many salient objects a photograph shows, and a region in as many parts (Sec. 3.1.3, and [ours])."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.labels import IGNORE
from models.backbones import Backbone, at_size

MOST = 4  # the last number the head tells stands for itself and all above: more are rare in every data set


class CountHead(nn.Module):
    """The number of salient objects, 1 to MOST [ours]: linear in f4 and f5, averaged over the photograph, standardised.

    It gives a probability to each number, of which the expected one is told (``told``). On the branches' backbone it is
    fitted to the count labels once all else is trained (``fit``) and changes nothing there; in a NumberNet both learn.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.linear = nn.Linear(channels, MOST).requires_grad_(False)

    @staticmethod
    def pool(features):
        """f1..f5 of [N,C_l,h_l,w_l] -> the averages of f4 and f5 [N,C_4 + C_5]."""
        return torch.cat([feature.mean((2, 3)) for feature in features[3:]], 1)

    def logits(self, features):
        """f1..f5 -> the logits of 1..MOST objects [N,MOST]."""
        return self.linear((self.pool(features).float() - self.mean) * self.scale)

    def forward(self, features):
        """f1..f5 -> the probabilities of 1..MOST objects [N,MOST]."""
        return self.logits(features).softmax(1)

    def standardise(self, pooled):
        """Take the mean and the spread of the features over photographs, pooled [M,C_4 + C_5] of ``pool``."""
        mean, scale = mean_and_scale(pooled)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def fit(self, pooled, counts, decay=0.2):
        """Multinomial logistic regression in which every number weighs the same, as most photographs show one object;
        how often each comes is put back afterwards.

        pooled: [M,C_4 + C_5] of ``pool``; counts: [M], 1 or more; decay: of the squared parameters, for standardised
        features (.2 from five-fold cross-validation on the training photographs).
        """
        self.standardise(pooled)
        x, y = (pooled - self.mean) * self.scale, counts.long().clamp(max=MOST) - 1
        times = torch.bincount(y, minlength=MOST).clamp(min=1)

        def loss():
            size = sum(parameter.square().sum() for parameter in self.linear.parameters())
            return F.cross_entropy(self.linear(x), y, weight=1 / times) + decay / 2 * size

        fit_convex(self.linear, loss)
        self.linear.bias += (times / times.sum()).log()


def mean_and_scale(features):
    """What standardises features [M,C], (x - mean) * scale: their mean and one by their spread, each [C]."""
    return features.mean(0), 1 / (features.std(0, correction=0) + 1e-3)


@torch.enable_grad()
def fit_convex(layer, loss):
    """Bring a linear ``layer``, in place, from zero to where the convex ``loss()`` is least; there it stays."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter).requires_grad_(True)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    layer.requires_grad_(False)


class NumberNet(nn.Module):
    """The number of salient objects from a backbone of its own, which learns nothing else [ours; salient object
    subitizing, Zhang et al., CVPR 2015].

    It needs count labels alone, and a small square is enough for it: ``size``, pixels.
    """

    def __init__(self, backbone, output_stride, size):
        super().__init__()
        self.size = size
        self.backbone = Backbone(backbone, output_stride)
        self.counting = CountHead(sum(self.backbone.channels[3:]))
        for parameter in self.counting.linear.parameters():
            nn.init.zeros_(parameter).requires_grad_(True)

    def features(self, image):
        """RGB [N,3,H,W] in 0..1, of any size -> f1..f5 at the network's own."""
        return self.backbone(at_size(image, self.size))

    def forward(self, image):
        """RGB [N,3,H,W] in 0..1 -> the probabilities of 1..MOST objects [N,MOST]."""
        return self.counting(self.features(image))


def told(shares):
    """The expected number of objects: it is seldom far off, where the likeliest is often an extreme.

    shares: the probabilities of 1..M objects [..,M]; all 0 where the number is not known. Returns [..], a float tensor
    of integers in 1..M, or 0 where it is not known.
    """
    return (shares * torch.arange(1, shares.shape[-1] + 1, device=shares.device)).sum(-1).round()


def certain(count):
    """The probabilities of 1..count objects [count] where there are known to be ``count``, 0 or more."""
    return (torch.arange(1, count + 1) == count).float()


def components(region, least):
    """The 4-connected components of a bool [H,W] of at least ``least`` pixels: list of int [M_k,2], their (y, x)."""
    found, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=4)
    return [np.argwhere(labels == k) for k in range(1, found) if stats[k, cv2.CC_STAT_AREA] >= least]


def divide(parts, count, offsets=None):
    """Divide the largest of ``parts`` until there are ``count``; what is more stays.

    parts: list of int [M_k,2], the (y, x) pixels of regions. The parts with the most pixels per object are divided, by
    k-means of their pixels' places p, so that each piece holds about as much as another; or, given V as ``offsets``
    [2,H,W] in the same pixels, of where they point to, p + V(p). Returns a list of int [M_n,2].
    """
    shares = [1] * len(parts)
    while parts and sum(shares) < count:
        shares[max(range(len(parts)), key=lambda k: len(parts[k]) / shares[k])] += 1
    return [piece for part, share in zip(parts, shares, strict=True) for piece in _k_means(part, share, offsets)]


def counted_instances(classes, count, smallest=0.005):
    """The photograph's objects in as many parts as the count label says [ours].

    Parts are the connected components of each class: touching objects of two classes are two. Where there are too
    many, the largest T stay; where there are too few, they are divided.

    classes: integers [H,W], 0 background, 1..20 class, 255 undecided; count: T; smallest: share of the image below
    which a component is noise. Returns int64 [H,W], 0 elsewhere and 1..n in the parts; n is T, or 0 without any
    component.
    """
    parts = []
    for name in np.unique(classes[(classes > 0) & (classes != IGNORE)]):
        parts += components(classes == name, smallest * classes.size)
    parts = sorted(parts, key=len, reverse=True)[:count]
    instances = np.zeros(classes.shape, np.int64)
    for number, piece in enumerate(divide(parts, count), 1):
        instances[piece[:, 0], piece[:, 1]] = number
    return instances


def _k_means(place, share, offsets):
    """Pixels [M,2] in ``share`` compact groups: k-means, ten steps at most, from even steps along the longest axis."""
    if share == 1:
        return [place]
    points = place if offsets is None else place + offsets[:, place[:, 0], place[:, 1]].T
    points = points - points.mean(0)
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]
    order = np.argsort(points @ axis, kind="stable")
    y, x = points.T.copy()
    centres = points[order[((np.arange(share) + 0.5) / share * len(points)).astype(int)]]
    group = None
    for _ in range(10):
        before, group = group, (np.square(y - centres[:, :1]) + np.square(x - centres[:, 1:])).argmin(0)
        if np.array_equal(before, group):
            break
        size = np.bincount(group, minlength=share)[:, None]
        sums = np.stack([np.bincount(group, column, share) for column in (y, x)], 1)
        centres = np.where(size > 0, sums / np.maximum(size, 1), centres)  # an empty group stays where it is
    return [place[group == k] for k in range(share) if (group == k).any()]
