"""Boundary enhancement: edge features from the image for the boundary branch (Sec. 3.2.1, Fig. 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import conv_block


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_block(channels_in, channels, 3, stride),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(4, channels),
        )
        plain = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N,channels_in,H,W] -> [N,channels,H/stride,W/stride]."""
        return (self.body(x) + self.shortcut(x)).relu()


class BoundaryEnhancement(nn.Module):
    """BE: a horizontal (1x7) and a vertical (7x1) stream, three residual blocks each, joined with Canny edges.

    The first convolution and the first block halve the resolution, so that fb1 and fb2 lie on the stride-4 grid of B.
    canny: "none" is without the edge map, "only" without the streams (Table 4); any other value, of
    ``datasets.transforms.canny_edges``, with both.
    """

    def __init__(self, channels: int = 32, canny: str = "auto") -> None:
        super().__init__()
        self.canny = canny
        self.with_edges, with_streams = canny != "none", canny != "only"
        self.streams = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, channels // 2, kernel, 2, (kernel[0] // 2, kernel[1] // 2), bias=False),
                nn.GroupNorm(4, channels // 2),
                nn.ReLU(inplace=True),
                ResidualBlock(channels // 2, channels, stride=2),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            )
            for kernel in ((1, 7), (7, 1))
            if with_streams
        )
        width = channels * with_streams + self.with_edges
        self.join = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in range(2))

    def forward(self, image: Tensor, edges: Tensor) -> list[Tensor]:
        """image: RGB [N,3,H,W] in 0..1; edges: Canny map [N,1,H,W] of 0 and 1.

        Returns fb1, fb2, each [N,channels,H/4,W/4]. A cell of 4x4 pixels is an edge where one of them is.
        """
        grid = tuple(-(-side // 4) for side in image.shape[-2:])
        low = [F.adaptive_max_pool2d(edges, grid)] if self.with_edges else []
        streams = [[stream(image - 0.5)] for stream in self.streams] or [[], []]
        return [join(torch.cat(stream + low, 1)).relu() for join, stream in zip(self.join, streams, strict=True)]
