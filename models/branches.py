"""The three branches: boundary (Sec. 3.2.2), centroid (Sec. 3.1.2) and saliency (Sec. 3)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.attention import CrossLayerAttention, conv_block
from models.backbones import Backbone
from models.count_head import CountHead
from models.enhancement import BoundaryEnhancement


class BoundaryBranch(nn.Module):
    """B = sigmoid(conv(concat(f1*..f5*, fb1, fb2))) (Sec. 3.2.2)."""

    def __init__(self, channels, enhancement_channels=0):
        super().__init__()
        self.predict = nn.Conv2d(5 * channels + 2 * enhancement_channels, 1, 1)

    def forward(self, features, enhanced=()):
        """features f1*..f5*: five [N,C,H,W]; enhanced: fb1, fb2 or nothing. Returns B [N,1,H,W] in 0..1."""
        return self.predict(torch.cat([*features, *enhanced], 1)).sigmoid()


class CentroidBranch(nn.Module):
    """fh = conv(concat(f4*, f5*)); V = conv(conv(concat(fh, f1*, f2*, f3*))) (Sec. 3.1.2).

    The paper ends in a sigmoid, which cannot give signed offsets: the output is linear [IRN]. The centroid
    loss fixes V only up to a constant; ``mean_offset`` holds the mean over the training set, subtracted in
    evaluation mode. The layer's numbers are shares of a quarter of the grid, the length of a usual offset: in pixels
    they would have to grow to tens before the features hear of an error, and by then they serve B alone [ours].
    """

    REACH = 0.25

    def __init__(self, channels):
        super().__init__()
        self.high = conv_block(2 * channels, channels)
        self.mix = conv_block(4 * channels, channels)
        self.predict = nn.Conv2d(channels, 2, 1, bias=False)
        self.register_buffer("mean_offset", torch.zeros(1, 2, 1, 1))

    def forward(self, features):
        """features f1*..f5*: five [N,C,H,W]. Returns V [N,2,H,W], (dy, dx) in pixels of the stride-4 grid."""
        f1, f2, f3, f4, f5 = features
        high = self.high(torch.cat([f4, f5], 1))
        shares = self.predict(self.mix(torch.cat([high, f1, f2, f3], 1)))
        offsets = self.REACH * shares.shape[-1] * shares
        return offsets if self.training else offsets - self.mean_offset


class BranchOutput(NamedTuple):
    """The maps of a batch of N images, on the stride-4 grid [H,W] of the input.

    boundary: B [N,1,H,W] in 0..1. offsets: V [N,2,H,W], (dy, dx) in pixels of the grid. count_probs: the probabilities
    of 1, 2, ... salient objects [N,MAX_COUNT], the last one of MAX_COUNT or more; None without a count head.
    """

    boundary: torch.Tensor
    offsets: torch.Tensor
    count_probs: torch.Tensor | None


class BoundaryCentroidNet(nn.Module):
    """The boundary and the centroid branch on their common backbone, joined by the CA module (Fig. 2).

    channels: width of f', f'' and f* (256 in the paper). mixing, attention: see CrossLayerAttention.
    enhancement: whether the boundary branch sees fb1, fb2; canny: see BoundaryEnhancement. counting: whether it
    tells the number of objects (CountHead).
    """

    def __init__(
        self,
        backbone,
        output_stride=16,
        channels=256,
        *,
        mixing=True,
        attention="parallel",
        enhancement=True,
        canny="auto",
        count_head=True,
    ):
        super().__init__()
        self.backbone = Backbone(backbone, output_stride)
        self.attention = CrossLayerAttention(self.backbone.channels, channels, mixing=mixing, attention=attention)
        self.enhancement = BoundaryEnhancement(canny=canny) if enhancement else None
        self.boundary = BoundaryBranch(channels, 32 if enhancement else 0)
        self.centroid = CentroidBranch(channels)
        self.count_head = CountHead(sum(self.backbone.channels[3:])) if count_head else None

    def forward(self, image, edges):
        """image: RGB [N,3,H,W] in 0..1; edges: Canny map [N,1,H,W] of 0 and 1. Returns a BranchOutput."""
        grid = tuple(-(-side // 4) for side in image.shape[-2:])
        features = self.backbone(image)
        for_boundary, for_centroid = self.attention(features, grid)
        enhanced = self.enhancement(image, edges) if self.enhancement else ()
        count = self.count_head(features) if self.count_head else None
        return BranchOutput(self.boundary(for_boundary, enhanced), self.centroid(for_centroid), count)


class SaliencyNet(nn.Module):
    """The saliency branch: DeepLab with atrous spatial pyramid pooling, last layer binary (Sec. 3, 7)."""

    RATES = (6, 12, 18, 24)
    SETTINGS = ("backbone", "output_stride", "size", "channels")  # those of NetConfig that it depends on

    def __init__(self, backbone, output_stride=16, channels=256):
        super().__init__()
        self.backbone = Backbone(backbone, output_stride)
        width = self.backbone.channels[-1]
        self.aspp = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 3, padding=rate, dilation=rate),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, 1, 1),
            )
            for rate in self.RATES
        )

    def logits(self, image):
        """RGB [N,3,H,W] in 0..1 -> saliency logits [N,1,H/4,W/4]."""
        grid = tuple(-(-side // 4) for side in image.shape[-2:])
        top = self.backbone(image)[-1]
        return F.interpolate(sum(branch(top) for branch in self.aspp), grid, mode="bilinear", align_corners=False)

    def forward(self, image):
        """RGB [N,3,H,W] in 0..1 -> S [N,1,H/4,W/4] in 0..1."""
        return self.logits(image).sigmoid()
