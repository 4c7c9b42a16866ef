"""Class activation maps against their formulas, with stand-ins for the classifier."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from models.classifier import class_activation_maps, spread_activations


def test_activation_maps_are_summed_over_scales_and_flips():
    """IRN: the positive part of the class maps of the image at 1, .5, 1.5 and 2 times its size, plain and flipped."""
    sizes = []

    def class_maps(images):  # not equivariant to flips
        sizes.append(images.shape[-2:])
        pooled = F.avg_pool2d(images, 16)
        tilt = torch.linspace(-0.3, 0.3, pooled.shape[-1])
        return torch.cat([pooled[:, k % 3, None] - 0.5 + tilt * k / 20 for k in range(20)], 1)

    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = class_activation_maps(SimpleNamespace(class_maps=class_maps), image)
    assert sizes == [(64, 64), (32, 32), (96, 96), (128, 128)]
    total = torch.zeros(1, 20, 16, 16)
    for side in (64, 32, 96, 128):
        for flip in (False, True):
            view = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
            maps = class_maps(view.flip(-1) if flip else view)
            maps = F.interpolate(maps.clamp(min=0), (16, 16), mode="bilinear")
            total += maps.flip(-1) if flip else maps
    assert torch.allclose(found, total / total.amax((2, 3), keepdim=True), atol=1e-5)


def test_activation_maps_have_the_stride_4_grid_of_the_image_at_any_input_size():
    sizes = []

    def class_maps(images):
        sizes.append(images.shape[-1])
        return torch.ones(len(images), 20, 4, 4)

    classifier = SimpleNamespace(class_maps=class_maps)
    maps = class_activation_maps(classifier, torch.rand(1, 3, 128, 128), (1.0, 2.0), size=64)
    assert sizes == [64, 128] and maps.shape == (1, 20, 32, 32)


def test_activations_spread_by_the_third_power_of_f3_and_the_second_of_f4():
    """c <- D^-1 relu(cos)^k c from the squared activations, written out pixel by pixel."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, channels, 4, 4, generator=generator) for channels in (2, 3, 6, 8, 5)]
    cams = torch.rand(1, 2, 4, 4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):  # is for the network alone
        found = spread_activations(SimpleNamespace(backbone=lambda image: levels), None, cams, grid=4)[0]
    maps = cams[0].flatten(1).numpy().astype(float) ** 2
    for level, power in ((2, 3), (3, 2)):
        feature = levels[level][0].flatten(1).numpy().astype(float)
        feature = feature - feature.mean(1, keepdims=True)
        walked = np.zeros_like(maps)
        for p in range(16):
            cosines = [
                feature[:, p] @ feature[:, q] / np.linalg.norm(feature[:, p]) / np.linalg.norm(feature[:, q])
                for q in range(16)
            ]
            weights = np.maximum(cosines, 0) ** power
            walked[:, p] = maps @ weights / weights.sum()
        maps = walked
    expected = maps / maps.max(1, keepdims=True)
    assert np.allclose(found.flatten(1).numpy(), expected, atol=1e-5)
