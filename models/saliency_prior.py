"""A saliency prior: logistic regression on frozen ImageNet features, distilled from S [ours]."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone, to_square
from models.count_head import fit_convex, mean_and_scale

MAX_LOGIT = math.log(99)  # logits are clipped to probabilities of .01 and .99

Array = TypeVar("Array", np.ndarray, Tensor)


def combine_logits(first: Array, second: Array, weights: Sequence[float] | Tensor) -> Array:
    """Two predictions of the foreground combined: a weighted sum of their clipped logits and a bias [ours].

    Both must be high for a high result, whereas in a mean of probabilities a confident prediction decides alone. So
    what often occurs beside an object, as a branch under a bird or a keyboard before a screen, is removed where one of
    the two does not count it as foreground.

    first, second: logits, arrays or tensors of one shape; weights: (of the first, of the second, bias). Returns logits
    of that shape.
    """
    of_first, of_second, bias = weights
    return of_first * first.clip(-MAX_LOGIT, MAX_LOGIT) + of_second * second.clip(-MAX_LOGIT, MAX_LOGIT) + bias


class SaliencyPrior(nn.Module):
    """A linear layer on f4 and f5 of a backbone with frozen ImageNet weights, distilled from S [ours].

    S is trained on pseudo labels of an earlier network, and has the capacity to learn their errors, too. A linear layer
    on fixed features can only learn what is common to most images, so the two err differently, and their logits are
    combined (``combine_logits``).

    size: side of its input square, pixels. weights: of the logits of S, of its own, and the bias.
    """

    WEIGHTS = (0.65, 0.92, -0.75)  # from the validation split

    mean: Tensor
    scale: Tensor
    weights: Tensor

    def __init__(self, backbone: str, output_stride: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.backbone = Backbone(backbone, output_stride)
        channels = sum(self.backbone.channels[3:])
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("weights", torch.tensor(self.WEIGHTS))
        self.linear = nn.Conv2d(channels, 1, 1)
        self.requires_grad_(False)

    def features(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1, of any size -> f4 and f5 of the image at ``size``, [N,C_4 + C_5,h,w] on f4's grid."""
        f4, f5 = self.backbone(to_square(image, self.size))[3:]
        return torch.cat([f4, F.interpolate(f5, f4.shape[-2:], mode="bilinear", align_corners=False)], 1)

    def logits(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 -> its own saliency logits [N,1,h,w] on the grid of f4."""
        return self.linear((self.features(image).float() - self.mean) * self.scale)

    def forward(self, image: Tensor, saliency: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 and the logits of S [N,1,h,w] on any grid -> the combined logits on that grid."""
        own = F.interpolate(self.logits(image).float(), saliency.shape[-2:], mode="bilinear", align_corners=False)
        return combine_logits(saliency.float(), own, self.weights)

    def fit(self, features: Tensor, saliency: Tensor, decay: float = 0.1) -> None:
        """Distil S: cross entropy on single cells of the grid, with a penalty on the squared weights.

        features: [M,C_4 + C_5], of ``features``; saliency: S there [M] in 0..1; decay: weight of the penalty, for
        standardised features (.1 from the validation split).
        """
        mean, scale = mean_and_scale(features)
        self.mean.copy_(mean[:, None, None])
        self.scale.copy_(scale[:, None, None])
        x = (features - mean) * scale
        weight, bias = self.linear.parameters()

        def loss() -> Tensor:
            logits = x @ weight[0, :, 0, 0] + bias
            return F.binary_cross_entropy_with_logits(logits, saliency) + decay / 2 * weight.square().sum()

        fit_convex(self.linear, loss)
