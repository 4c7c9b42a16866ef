"""The CAM classifier: image-level class labels to class activation maps (Sec. 4.2; Zhou et al., CVPR 2016)."""

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
def class_activation_maps(classifier, image, scales=(1.0, 0.5, 1.5, 2.0)):
    """Class activation maps summed over scales and both mirror images, each divided by its maximum [IRN].

    image: RGB [N,3,H,W] in 0..1. Returns [N,20,H/4,W/4] in 0..1; an all-negative class map is 0.
    """
    height, width = image.shape[-2:]
    grid = (-(-height // 4), -(-width // 4))
    total = image.new_zeros(image.shape[0], NUM_CLASSES, *grid)
    for scale in scales:
        size = [max(32, round(side * scale / 32) * 32) for side in (height, width)]
        scaled = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=scale < 1)
        both = classifier.class_maps(torch.cat([scaled, scaled.flip(3)]))
        plain, mirrored = F.interpolate(both.relu(), grid, mode="bilinear", align_corners=False).chunk(2)
        total += plain + mirrored.flip(3)
    return total / total.amax((2, 3), keepdim=True).clamp(min=1e-5)
