"""Subitizing: how many salient objects a photograph shows, and a region in as many parts (Sec. 3.1.3, and [ours])."""

import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import Backbone, at_size

MAX_COUNT = 4  # the last number the head tells stands for itself and all above: more are rare in every data set


class CountHead(nn.Module):
    """The number of salient objects, 1 to MAX_COUNT [ours]: linear in the averages of f4 and f5, standardized.

    On the branches' backbone it is fitted to the count labels after all other training (``fit``) and leaves the
    backbone as it is; in a CountNet both are trained.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.linear = nn.Linear(channels, MAX_COUNT).requires_grad_(False)

    @staticmethod
    def pool(features):
        """f1..f5 of [N,C_l,h_l,w_l] -> the averages of f4 and f5 [N,C_4 + C_5]."""
        return torch.cat([feature.mean((2, 3)) for feature in features[3:]], 1)

    def logits(self, features):
        """f1..f5 -> the logits of 1..MAX_COUNT objects [N,MAX_COUNT]."""
        return self.linear((self.pool(features).float() - self.mean) * self.scale)

    def forward(self, features):
        """f1..f5 -> the probabilities of 1..MAX_COUNT objects [N,MAX_COUNT]."""
        return self.logits(features).softmax(1)

    def standardize(self, pooled):
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
        self.standardize(pooled)
        x, y = (pooled - self.mean) * self.scale, counts.long().clamp(max=MAX_COUNT) - 1
        times = torch.bincount(y, minlength=MAX_COUNT).clamp(min=1)

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


class CountNet(nn.Module):
    """The number of salient objects from a backbone of its own, which learns nothing else [ours; salient object
    subitizing, Zhang et al., CVPR 2015].

    It needs count labels alone, and a small square is enough for it: ``size``, pixels.
    """

    def __init__(self, backbone, output_stride, size):
        super().__init__()
        self.size = size
        self.backbone = Backbone(backbone, output_stride)
        self.count_head = CountHead(sum(self.backbone.channels[3:]))
        for parameter in self.count_head.linear.parameters():
            nn.init.zeros_(parameter).requires_grad_(True)

    def features(self, image):
        """RGB [N,3,H,W] in 0..1, of any size -> f1..f5 at the network's own."""
        return self.backbone(at_size(image, self.size))

    def forward(self, image):
        """RGB [N,3,H,W] in 0..1 -> the probabilities of 1..MAX_COUNT objects [N,MAX_COUNT]."""
        return self.count_head(self.features(image))


def expected_count(shares):
    """The expected number of objects: it is seldom far off, where the likeliest is often an extreme.

    shares: the probabilities of 1..M objects [..,M]; all 0 where the number is not known. Returns [..], a float tensor
    of integers in 1..M, or 0 where it is not known.
    """
    return (shares * torch.arange(1, shares.shape[-1] + 1, device=shares.device)).sum(-1).round()


def one_hot_count(count):
    """The probabilities of 1..count objects [count] where there are known to be ``count``, 0 or more."""
    return (torch.arange(1, count + 1) == count).float()
