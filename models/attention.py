"""Cross-layer attention: the CFM unit, shared by both branches, and one MA unit per level and branch (Sec. 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5

Grid = tuple[int, int]  # height and width of the stride-4 grid


def conv_block(channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, group normalisation, ReLU, as in the heads of IRN."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
        nn.GroupNorm(4, channels_out),
        nn.ReLU(inplace=True),
    )


def to_grid(feature: Tensor, grid: Grid) -> Tensor:
    """[N,C,h,w] -> [N,C,*grid], bilinear."""
    if feature.shape[-2:] == grid:
        return feature
    return F.interpolate(feature, grid, mode="bilinear", align_corners=False)


def average_to_grid(feature: Tensor, grid: Grid) -> Tensor:
    """[N,C,h,w] -> [N,C,*grid], averages. Exact halves are pooled by 2x2: that gradient is deterministic on CUDA."""
    if feature.shape[-2:] == (2 * grid[0], 2 * grid[1]):
        return F.avg_pool2d(feature, 2)
    return F.adaptive_avg_pool2d(feature, grid)


class Reduction(nn.Module):
    """f1..f5 to one width with 1x1 convolutions, each at its own resolution: f1'..f5' (Fig. 7, left).

    f1, finer than the stride-4 grid, is averaged down to it first.
    """

    def __init__(self, channels_in: Sequence[int], channels: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(conv_block(width, channels) for width in channels_in)

    def forward(self, features: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """list of [N,C_l,h_l,w_l] -> list of [N,channels,h,w], none finer than ``grid``."""
        features = [average_to_grid(f, grid) if f.shape[-1] > grid[1] else f for f in features]
        return [reduce(feature) for reduce, feature in zip(self.reduce, features, strict=True)]


class CrossLayerFeatureMixing(nn.Module):
    """CFM: mixes the five levels with a channel shuffle (Sec. 3.3.1, Fig. 7).

    The paper brings f1'..f5' to one resolution, concatenates them (5C channels), shuffles the channels as
    [5,C] -> [C,5], concatenates before and after (10C) and maps that with 1x1 convolutions to f1''..f5''.
    ``forward_literal`` does just that. ``forward`` is equal and cheaper: the shuffle is a permutation, so the
    convolution over [before; after] is one 5C -> 5C convolution with folded weights, and a 1x1 convolution commutes
    with bilinear upsampling, so the contribution of each level is computed at its own resolution.
    """

    def __init__(self, channels_in: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.reduction = Reduction(channels_in, channels)
        self.mix = nn.Conv2d(2 * LEVELS * channels, LEVELS * channels, 1, bias=False)
        self.norm = nn.GroupNorm(4 * LEVELS, LEVELS * channels)

    def forward(self, features: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """list f1..f5 of [N,C_l,h_l,w_l] -> list f1''..f5'' of [N,channels,*grid]."""
        before, after = self.mix.weight.chunk(2, dim=1)
        # Channel j of the shuffled stack is channel order[j] of the plain one.
        order = torch.arange(LEVELS * self.channels, device=before.device).view(LEVELS, -1).t().flatten()
        folded = before + torch.empty_like(after).index_copy(1, order, after)
        # Levels of one resolution are mapped by one convolution, and each resolution is upsampled once.
        levels: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for feature, weight in zip(self.reduction(features, grid), folded.chunk(LEVELS, 1), strict=True):
            levels.setdefault(feature.shape[-2:], []).append((feature, weight))
        mixed: Tensor | None = None
        for parts in levels.values():
            stack, weights = (torch.cat(part, 1) for part in zip(*parts, strict=True))
            contribution = to_grid(F.conv2d(stack, weights), grid)
            mixed = contribution if mixed is None else mixed.add_(contribution)
            del contribution  # before the next one is made: each is as large as the result
        assert mixed is not None
        return self._activate(mixed)

    def forward_literal(self, features: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """The same as ``forward``, computed as drawn in Fig. 7: the reference of the tests."""
        stack = torch.cat([to_grid(f, grid) for f in self.reduction(features, grid)], 1)
        n, _, height, width = stack.shape
        shuffled = stack.view(n, LEVELS, self.channels, height, width).transpose(1, 2).reshape(stack.shape)
        return self._activate(self.mix(torch.cat([stack, shuffled], 1)))

    def _activate(self, mixed: Tensor) -> list[Tensor]:
        return list(self.norm(mixed).relu_().chunk(LEVELS, 1))


class MutualAttention(nn.Module):
    """MA: channel-wise and spatial-wise attention on one level (Sec. 3.3.2, Eq. 5-7, Fig. 8).

    order: "parallel", f* = f'' Fc + f'' Fs (the paper); "s-c" or "c-s", spatial or channel attention first, the other
    on its output; "none", f* = f'' (Table 3).
    """

    ORDERS = ("parallel", "s-c", "c-s", "none")

    def __init__(self, channels: int, order: str = "parallel", reduction: int = 16) -> None:
        super().__init__()
        self.order = order
        if order == "none":
            return
        hidden = max(8, channels // reduction)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def channel_attention(self, feature: Tensor) -> Tensor:
        """Eq. 5: [N,C,H,W] -> Fc [N,C,1,1] in 0..1."""
        return (self.mlp(feature.mean((2, 3), keepdim=True)) + self.mlp(feature.amax((2, 3), keepdim=True))).sigmoid()

    def spatial_attention(self, feature: Tensor) -> Tensor:
        """Eq. 6: [N,C,H,W] -> Fs [N,1,H,W] in 0..1."""
        return self.spatial(torch.cat([feature.mean(1, keepdim=True), feature.amax(1, keepdim=True)], 1)).sigmoid()

    def forward(self, feature: Tensor) -> Tensor:
        """Eq. 7: f'' [N,C,H,W] -> f* [N,C,H,W]."""
        if self.order == "none":
            return feature
        if self.order == "parallel":
            return feature * (self.channel_attention(feature) + self.spatial_attention(feature))
        first, second = self.channel_attention, self.spatial_attention
        if self.order == "s-c":
            first, second = second, first
        feature = feature * first(feature)
        return feature * second(feature)


class CrossLayerAttention(nn.Module):
    """The CA module: f1..f5 -> f1*..f5* for the boundary branch and for the centroid branch (Fig. 6).

    mixing=False is without the CFM unit (f'' = f'), attention="none" without the MA units. Without both, the network
    has plain 1x1 reductions, one set per branch, as in IRN.
    """

    def __init__(
        self, channels_in: Sequence[int], channels: int = 256, *, mixing: bool = True, attention: str = "parallel"
    ) -> None:
        super().__init__()
        self.shared = mixing or attention != "none"
        self.mixing = mixing
        if mixing:
            self.cfm = CrossLayerFeatureMixing(channels_in, channels)
        else:
            self.reductions = nn.ModuleList(Reduction(channels_in, channels) for _ in range(1 if self.shared else 2))
        self.ma = nn.ModuleList(
            nn.ModuleList(MutualAttention(channels, attention) for _ in range(LEVELS)) for _ in range(2)
        )

    def forward(self, features: Sequence[Tensor], grid: Grid) -> tuple[list[Tensor], list[Tensor]]:
        """list f1..f5 of [N,C_l,h_l,w_l] -> (boundary features, centroid features), each a list of five
        [N,channels,*grid]."""
        if self.mixing:
            stacks = [self.cfm(features, grid)]
        else:
            stacks = [[to_grid(f, grid) for f in reduction(features, grid)] for reduction in self.reductions]
        stacks = stacks * 2 if self.shared else stacks
        for_boundary, for_centroid = (
            [unit(feature) for unit, feature in zip(units, stack, strict=True)]  # type: ignore[call-overload]
            for units, stack in zip(self.ma, stacks, strict=True)
        )
        return for_boundary, for_centroid
