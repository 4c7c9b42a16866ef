"""A second opinion on what is salient, from features that only ImageNet has taught [ours]."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import Backbone, at_size
from models.count_head import fit_convex, mean_and_scale

MAX_LOGIT = math.log(99)  # an opinion counts as no surer than 99 to 1


def combine_logits(network, other, weights):
    """Two opinions on what is foreground as one, by their odds: both must agree [ours].

    What stands beside an object in many photographs, the log under a bird or the keyboard before a screen, the network
    takes for a part of it; one that knows less of the photographs does not. With a mean the surer would have its way.
    network, other: the logarithms of their odds, tensors or arrays of one shape. weights: the powers of the odds of the
    two, and the logarithm of the odds where both are even. Returns the logarithm of the odds of both together.
    """
    of_network, of_other, prior = weights
    return of_network * network.clip(-MAX_LOGIT, MAX_LOGIT) + of_other * other.clip(-MAX_LOGIT, MAX_LOGIT) + prior


class SaliencyPrior(nn.Module):
    """What is salient by a logistic regression on f4 and f5 of a backbone that stays as ImageNet left it [ours].

    It learns from S itself. But S comes of labels that a network before it gave, and is rich enough to learn their
    exceptions too: this log belongs to the bird, those do not. A linear layer can only follow the rule. So the two err
    in different places, and pool their odds (``combine_logits``).
    size: the side of the square it looks at, pixels. odds: the weights of S, of this and of neither.
    """

    WEIGHTS = (0.65, 0.92, -0.75)  # from the validation split

    def __init__(self, backbone, output_stride, size):
        super().__init__()
        self.size = size
        self.backbone = Backbone(backbone, output_stride)
        channels = sum(self.backbone.channels[3:])
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("weights", torch.tensor(self.WEIGHTS))
        self.linear = nn.Conv2d(channels, 1, 1)
        self.requires_grad_(False)

    def features(self, image):
        """RGB [N,3,H,W] in 0..1, of any size -> f4 and f5 at the network's own, [N,C_4 + C_5,h,w] on the grid of f4."""
        f4, f5 = self.backbone(at_size(image, self.size))[3:]
        return torch.cat([f4, F.interpolate(f5, f4.shape[-2:], mode="bilinear", align_corners=False)], 1)

    def logits(self, image):
        """RGB [N,3,H,W] in 0..1 -> its own opinion, logits [N,1,h,w] on the grid of f4."""
        return self.linear((self.features(image).float() - self.mean) * self.scale)

    def forward(self, image, saliency):
        """RGB [N,3,H,W] in 0..1 and the logits of S [N,1,h,w] on any grid -> those of both together, on that grid."""
        own = F.interpolate(self.logits(image).float(), saliency.shape[-2:], mode="bilinear", align_corners=False)
        return combine_logits(saliency.float(), own, self.weights)

    def fit(self, features, saliency, decay=0.1):
        """Learn what S says of single cells: cross entropy, with a penalty on the squared weights.

        features: [M,C_4 + C_5], of ``features``; saliency: S there [M] in 0..1; decay: of the squared weights beside
        the mean cross entropy, for standardised features (.1 from the validation split: the less it follows S, the more
        its opinion is worth).
        """
        mean, scale = mean_and_scale(features)
        self.mean.copy_(mean[:, None, None])
        self.scale.copy_(scale[:, None, None])
        seen = (features - mean) * scale
        weight, bias = self.linear.parameters()

        def loss():
            logits = seen @ weight[0, :, 0, 0] + bias
            return F.binary_cross_entropy_with_logits(logits, saliency) + decay / 2 * weight.square().sum()

        fit_convex(self.linear, loss)
