"""The CAM classifier: image-level class labels to class activation maps (Sec. 4.2; Zhou et al., CVPR 2016)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import Backbone

NUM_CLASSES = 20


class Classifier(nn.Module):
    """Backbone, global average pooling and a 1x1 convolution to the 20 VOC classes.

    Pooling and a linear layer commute, so the maps are computed first and averaged: the logits are the mean
    of the class maps, and the maps are there for free.
    """

    def __init__(self, backbone_name, output_stride=16):
        super().__init__()
        self.backbone = Backbone(backbone_name, output_stride)
        self.head = nn.Conv2d(self.backbone.head_channels, NUM_CLASSES, 1, bias=False)

    def class_maps(self, image):
        """RGB [N,3,H,W] in 0..1 -> unnormalised class maps [N,20,H/s,W/s]."""
        return self.head(self.backbone.forward_head(image))

    def forward(self, image):
        """RGB [N,3,H,W] in 0..1 -> class logits [N,20]."""
        return self.class_maps(image).mean((2, 3))


@torch.no_grad()
def class_activation_maps(classifier, image, scales=(1.0, 0.5, 1.5, 2.0), size=None):
    """Class activation maps summed over scales and both mirror images, each divided by its maximum [IRN].

    image: RGB [N,3,H,W] in 0..1. scales: times ``size``, the side of the square the classifier looks at, pixels;
    default the image's own sides. Returns [N,20,H/4,W/4] in 0..1; an all-negative class map is 0.
    """
    height, width = image.shape[-2:]
    grid = (-(-height // 4), -(-width // 4))
    total = image.new_zeros(image.shape[0], NUM_CLASSES, *grid)
    for scale in scales:
        both_sides = [max(32, round(side * scale / 32) * 32) for side in (size or height, size or width)]
        scaled = F.interpolate(image, both_sides, mode="bilinear", align_corners=False, antialias=True)
        both = classifier.class_maps(torch.cat([scaled, scaled.flip(3)]))
        plain, mirrored = F.interpolate(both.relu(), grid, mode="bilinear", align_corners=False).chunk(2)
        total += plain + mirrored.flip(3)
    return _share_of_peak(total)


def _share_of_peak(maps):
    return maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-5)


CAM_SIZE = 512  # photographs are read at this size for their activations, whatever square the networks take


def activations(
    classifier: Classifier,
    image: torch.Tensor,
    classes: Sequence[int],
    scales: Sequence[float],
    size: int,
    spread: bool,
) -> torch.Tensor:
    """The activation maps of the ``classes`` (indices 0..19) of images, from which pseudo labels are made.

    image: RGB [N,3,CAM_SIZE,CAM_SIZE] in 0..1. scales, size: as for ``class_activation_maps``; spread: whether
    ``spread_activations`` follows. Returns [N,len(classes),CAM_SIZE/4,CAM_SIZE/4] in 0..1.
    """
    cams = class_activation_maps(classifier, image, scales, size)[:, list(classes)]
    return spread_activations(classifier, image, cams) if spread else cams


# (level, exponent) of the two walks: first over texture (f3), then over parts (f4); deeper levels are too blunt.
WALKS = ((2, 3), (3, 2))


@torch.no_grad()
def spread_activations(classifier, image, cams, grid=32):
    """Activation maps carried from the peaks to everything in the photograph that looks alike [ours].

    A class activation map peaks on the most telling part and fades over the rest. Here each pixel takes the mean
    of the squared activations of all pixels, weighted by the positive cosine similarity of their centred features:
    c <- A c, A = D^-1 relu(cos(f_p, f_q))^k, once with f3 and once with f4 of the classifier itself. It is the pixel
    correlation of SEAM (Wang et al., CVPR 2020) without its training, and no neighbourhood: distance may not matter.

    image: RGB [N,3,H,W] in 0..1, about 512 pixels a side; cams: [N,C,h,w] in 0..1; grid: side of the square grid
    of the similarities, which take grid^4 numbers. Returns [N,C,h,w] in 0..1, each map a share of its peak. They are
    flat where the plain maps are peaked: thresholds lie near one half.
    """
    features = classifier.backbone(image)
    maps = F.interpolate(cams, (grid, grid), mode="bilinear", align_corners=False, antialias=True)
    maps = maps.square().flatten(2).transpose(1, 2)
    for level, exponent in WALKS:
        feature = F.interpolate(features[level], (grid, grid), mode="bilinear", align_corners=False).flatten(2)
        feature = F.normalize(feature - feature.mean(2, keepdim=True), dim=1)
        affinity = (feature.transpose(1, 2) @ feature).clamp(min=0) ** exponent
        maps = affinity @ maps / affinity.sum(2, keepdim=True).clamp(min=1e-5)
    maps = maps.transpose(1, 2).unflatten(2, (grid, grid))
    return _share_of_peak(F.interpolate(maps, cams.shape[-2:], mode="bilinear", align_corners=False))
