"""The CAM classifier: image-level class labels to class activation maps (Sec. 4.2; Zhou et al., CVPR 2016)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone

NUM_CLASSES = 20
CAM_SIZE = 512  # side of the images whose activations are computed, pixels, whatever the input size of the networks


class Classifier(nn.Module):
    """Backbone, global average pooling and a 1x1 convolution to the 20 VOC classes.

    Pooling and a linear layer commute, so the class maps are computed first and the logits are their means.
    """

    def __init__(self, backbone_name: str, output_stride: int = 16) -> None:
        super().__init__()
        self.backbone = Backbone(backbone_name, output_stride, head=True)
        self.head = nn.Conv2d(self.backbone.head_channels, NUM_CLASSES, 1, bias=False)

    def class_maps(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 -> unnormalised class maps [N,20,H/s,W/s]."""
        return self.head(self.backbone.forward_head(image))

    def forward(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 -> class logits [N,20]."""
        return self.class_maps(image).mean((2, 3))


@torch.no_grad()
def class_activation_maps(
    classifier: Classifier,
    image: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5, 2.0),
    size: int | None = None,
) -> Tensor:
    """Class activation maps, summed over scales and horizontal flips, each divided by its maximum [IRN].

    image: RGB [N,3,H,W] in 0..1. scales: sides of the classifier's input, times ``size`` pixels, by default times the
    sides of the image; they are rounded to multiples of 32. Returns [N,20,H/4,W/4] in 0..1; a class map without a
    positive value is 0.
    """
    height, width = image.shape[-2:]
    grid = (-(-height // 4), -(-width // 4))
    total = image.new_zeros(image.shape[0], NUM_CLASSES, *grid)
    for scale in scales:
        sides = [max(32, round(side * scale / 32) * 32) for side in (size or height, size or width)]
        scaled = F.interpolate(image, sides, mode="bilinear", align_corners=False, antialias=True)
        both = classifier.class_maps(torch.cat([scaled, scaled.flip(3)])).float()
        plain, flipped = F.interpolate(both.relu(), grid, mode="bilinear", align_corners=False).chunk(2)
        total += plain + flipped.flip(3)
    return _divided_by_peak(total)


def _divided_by_peak(maps: Tensor) -> Tensor:
    return maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-5)


def activations(
    classifier: Classifier,
    image: Tensor,
    classes: Sequence[int],
    scales: Sequence[float],
    size: int,
    spread: bool,
) -> Tensor:
    """The activation maps of the ``classes`` (indices 0..19) of images, from which pseudo labels are made.

    image: RGB [N,3,CAM_SIZE,CAM_SIZE] in 0..1. scales, size: as for ``class_activation_maps``; spread: whether
    ``spread_activations`` follows. Returns [N,len(classes),CAM_SIZE/4,CAM_SIZE/4] in 0..1.
    """
    cams = class_activation_maps(classifier, image, scales, size)[:, list(classes)]
    return spread_activations(classifier, image, cams) if spread else cams


# (level, exponent) of the two propagations: first by texture (f3), then by object parts (f4); f5 is too coarse.
WALKS = ((2, 3), (3, 2))


@torch.no_grad()
def spread_activations(classifier: Classifier, image: Tensor, cams: Tensor, grid: int = 32) -> Tensor:
    """Activation maps propagated along feature-affinity matrices [ours].

    A class activation map peaks on the most discriminative part of an object. Here each pixel gets the mean of the
    squared activations of all pixels, weighted by the positive cosine similarity of their centred features:
    c <- A c, A = D^-1 relu(cos(f_p, f_q))^k, once with f3 and once with f4 of the classifier itself. This is the pixel
    correlation of SEAM (Wang et al., CVPR 2020) without its training and over the whole image.

    image: RGB [N,3,H,W] in 0..1, about 512 pixels a side; cams: [N,C,h,w] in 0..1; grid: side of the square grid
    of the affinities, which hold grid^4 numbers. Returns [N,C,h,w] in 0..1, each map divided by its maximum. They are
    flat where the plain maps are peaked: thresholds lie near one half.
    """
    features = classifier.backbone(image)
    maps = F.interpolate(cams, (grid, grid), mode="bilinear", align_corners=False, antialias=True)
    maps = maps.square().flatten(2).transpose(1, 2)
    with torch.autocast(cams.device.type, enabled=False):  # bfloat16 would round the affinities too
        for level, exponent in WALKS:
            feature = F.interpolate(features[level].float(), (grid, grid), mode="bilinear", align_corners=False)
            feature = F.normalize(feature.flatten(2) - feature.mean((2, 3))[..., None], dim=1)
            affinity = (feature.transpose(1, 2) @ feature).clamp(min=0) ** exponent
            maps = affinity @ maps / affinity.sum(2, keepdim=True).clamp(min=1e-5)
    maps = maps.transpose(1, 2).unflatten(2, (grid, grid))
    return _divided_by_peak(F.interpolate(maps, cams.shape[-2:], mode="bilinear", align_corners=False))
