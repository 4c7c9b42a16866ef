"""Boundary enhancement: edges of the image itself for the boundary branch (Sec. 3.2.1, Fig. 4)."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.training import to_tensor
from models.attention import conv_block
from utils.cli import InputError

LARGEST_GRADIENT = 2040  # |dx| + |dy| of cv2.Canny's Sobel filters


def parse_canny(text):
    """``auto``, ``none``, ``only`` or ``LOW,HIGH`` as the value of --canny; InputError for anything else."""
    if text in ("auto", "none", "only"):
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = np.nan
    if not 0 <= low <= high <= LARGEST_GRADIENT:
        raise InputError(f"--canny {text} is not understood; use auto, none, only or LOW,HIGH, from 0 "
                         f"to {LARGEST_GRADIENT}, as in 30,200")  # fmt: skip
    return f"{low:g},{high:g}"


def canny_edges(image, mode="auto"):
    """Canny edge map of a photograph at the network's input size (Table 4, Table 5).

    image: uint8 RGB [H,W,3]. mode: "auto" (and "only") takes (1 -/+ 0.33) x the median of the grey image,
    clipped to 0..255; "LOW,HIGH" takes these; "none" gives no edges. Returns float32 [H,W] of 0 and 1.
    """
    if mode == "none":
        return np.zeros(image.shape[:2], np.float32)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if mode in ("auto", "only"):
        low, high = np.clip(np.median(grey) * np.array([0.67, 1.33]), 0, 255)
    else:
        low, high = (float(part) for part in mode.split(","))
    return (cv2.Canny(grey, low, high) > 0).astype(np.float32)


def network_input(image, canny, device):
    """One square photograph as the networks take it: uint8 RGB [S,S,3] -> ([1,3,S,S] in 0..1, edges [1,1,S,S])."""
    edges = torch.from_numpy(canny_edges(image, canny))
    return to_tensor(image)[None].to(device), edges[None, None].to(device)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels_in, channels, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            conv_block(channels_in, channels, 3, stride),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(4, channels),
        )
        plain = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x):
        return (self.body(x) + self.shortcut(x)).relu()


class BoundaryEnhancement(nn.Module):
    """BE: a horizontal (1x7) and a vertical (7x1) stream, three residual blocks each, joined with Canny edges.

    The first convolution and the first block halve the resolution, so that fb1 and fb2 lie on the stride-4
    grid of the boundary map. canny="none" leaves the edge map out; "only" leaves the streams out (Table 4).
    """

    def __init__(self, channels=32, canny="auto"):
        super().__init__()
        self.canny = canny
        self.with_edges, with_streams = canny != "none", canny != "only"
        self.streams = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, channels // 2, kernel, 2, tuple(k // 2 for k in kernel), bias=False),
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

    def forward(self, image, edges):
        """image: RGB [N,3,H,W] in 0..1; edges: Canny map [N,1,H,W] of 0 and 1.

        Returns fb1, fb2, each [N,channels,H/4,W/4]. An edge pixel marks its whole 4x4 cell.
        """
        grid = tuple(-(-side // 4) for side in image.shape[-2:])
        low = [F.adaptive_max_pool2d(edges, grid)] if self.with_edges else []
        streams = [[stream(image - 0.5)] for stream in self.streams] or [[], []]
        return [join(torch.cat(stream + low, 1)).relu() for join, stream in zip(self.join, streams, strict=True)]
