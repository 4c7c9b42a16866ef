"""The three branches: boundary (Sec. 3.2.2), centroid (Sec. 3.1.2) and saliency (Sec. 3)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import CrossLayerAttention, conv_block
from models.backbones import Backbone
from models.count_head import CountHead
from models.enhancement import BoundaryEnhancement


class BoundaryBranch(nn.Module):
    """B = sigmoid(conv(concat(f1*..f5*, fb1, fb2))) (Sec. 3.2.2)."""

    def __init__(self, channels: int, enhancement_channels: int = 0) -> None:
        super().__init__()
        self.predict = nn.Conv2d(5 * channels + 2 * enhancement_channels, 1, 1)

    def forward(self, features: Sequence[Tensor], enhanced: Sequence[Tensor] = ()) -> Tensor:
        """features: f1*..f5*, five [N,C,H,W]; enhanced: fb1, fb2 or nothing. Returns B [N,1,H,W] in 0..1."""
        return self.predict(torch.cat([*features, *enhanced], 1)).sigmoid()


class CentroidBranch(nn.Module):
    """fh = conv(concat(f4*, f5*)); V = conv(conv(concat(fh, f1*, f2*, f3*))) (Sec. 3.1.2).

    The paper ends in a sigmoid, which cannot give signed offsets: the output is linear [IRN]. The centroid loss
    determines V only up to a constant; ``mean_offset`` holds the mean over the training set, which is subtracted in
    evaluation mode. The last layer predicts offsets in units of REACH times the width of the grid, the length of a
    typical offset [ours]: in pixels its outputs would have to grow to tens, while L_B alone shapes the features.
    """

    REACH = 0.25

    mean_offset: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.high = conv_block(2 * channels, channels)
        self.mix = conv_block(4 * channels, channels)
        self.predict = nn.Conv2d(channels, 2, 1, bias=False)
        self.register_buffer("mean_offset", torch.zeros(1, 2, 1, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features: f1*..f5*, five [N,C,H,W]. Returns V [N,2,H,W], (dy, dx) in pixels of the stride-4 grid."""
        f1, f2, f3, f4, f5 = features
        high = self.high(torch.cat([f4, f5], 1))
        normalized_offsets = self.predict(self.mix(torch.cat([high, f1, f2, f3], 1)))
        offsets = self.REACH * normalized_offsets.shape[-1] * normalized_offsets
        return offsets if self.training else offsets - self.mean_offset


class BranchOutput(NamedTuple):
    """The maps of a batch of N images, on the stride-4 grid [H,W] of the input.

    boundary: B [N,1,H,W] in 0..1. offsets: V [N,2,H,W], (dy, dx) in pixels of the grid. count_probs: the probabilities
    of 1, 2, ... salient objects [N,MAX_COUNT], the last one of MAX_COUNT or more; None without a count head.
    """

    boundary: Tensor
    offsets: Tensor
    count_probs: Tensor | None


class BoundaryCentroidNet(nn.Module):
    """The boundary and the centroid branch on their common backbone, joined by the CA module (Fig. 2).

    channels: width of f', f'' and f* (256 in the paper). mixing, attention: of CrossLayerAttention. enhancement:
    whether the boundary branch has the BE module; canny: of BoundaryEnhancement. count_head: whether there is a
    CountHead [ours].
    """

    def __init__(
        self,
        backbone: str,
        output_stride: int = 16,
        channels: int = 256,
        *,
        mixing: bool = True,
        attention: str = "parallel",
        enhancement: bool = True,
        canny: str = "auto",
        count_head: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(backbone, output_stride)
        self.attention = CrossLayerAttention(self.backbone.channels, channels, mixing=mixing, attention=attention)
        self.enhancement = BoundaryEnhancement(canny=canny) if enhancement else None
        self.boundary = BoundaryBranch(channels, 32 if enhancement else 0)
        self.centroid = CentroidBranch(channels)
        self.count_head = CountHead(sum(self.backbone.channels[3:])) if count_head else None

    def forward(self, image: Tensor, edges: Tensor) -> BranchOutput:
        """image: RGB [N,3,H,W] in 0..1; edges: Canny map [N,1,H,W] of 0 and 1. Returns a BranchOutput."""
        grid = (-(-image.shape[-2] // 4), -(-image.shape[-1] // 4))
        features = self.backbone(image)
        for_boundary, for_centroid = self.attention(features, grid)
        enhanced = self.enhancement(image, edges) if self.enhancement else ()
        count = self.count_head(features) if self.count_head else None
        return BranchOutput(self.boundary(for_boundary, enhanced), self.centroid(for_centroid), count)


class SaliencyNet(nn.Module):
    """The saliency branch: DeepLab with atrous spatial pyramid pooling, last layer binary (Sec. 3, 7)."""

    RATES = (6, 12, 18, 24)
    SETTINGS = ("backbone", "output_stride", "size", "channels")  # the fields of NetConfig that it depends on

    def __init__(self, backbone: str, output_stride: int = 16, channels: int = 256) -> None:
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

    def logits(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 -> saliency logits [N,1,H/4,W/4]."""
        grid = (-(-image.shape[-2] // 4), -(-image.shape[-1] // 4))
        f5 = self.backbone(image)[-1]
        return F.interpolate(sum(branch(f5) for branch in self.aspp), grid, mode="bilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 -> S [N,1,H/4,W/4] in 0..1."""
        return self.logits(image).sigmoid()
