"""Pseudo labels from the whole network (Sec. 3.4.1), on maps whose instances are known."""

import numpy as np
import torch
from test_fusion import iou, scene

from engine.instance_labels import Maps, instance_label, pseudo_mask
from models.fusion_config import FusionConfig


def test_a_pseudo_mask_is_the_union_of_instances():
    *maps, truth = scene()
    maps, settings = Maps(*maps), FusionConfig()
    image = np.full((128, 192, 3), 60, np.uint8)
    union = truth.any(0).repeat(4, 0).repeat(4, 1)
    image[union] = 180
    label = pseudo_mask(image, maps, 0, settings)
    assert iou(label > 0.5, union) > 0.95
    assert pseudo_mask(image, maps._replace(saliency=maps.saliency * 0), 0, settings) is None
    # The initial mask has one of the two objects, and removes the other where it has a large weight.
    one, other = (mask.repeat(4, 0).repeat(4, 1) for mask in truth)
    mixed = pseudo_mask(image, maps, 0, settings, initial=one.astype(np.float32), init_mask_weight=0.9)
    assert mixed[other].mean() < 0.5 < mixed[one].mean() and label[other].mean() > 0.9
    alone = pseudo_mask(image, maps, 0, settings, initial=one.astype(np.float32), init_mask_weight=0)
    assert np.allclose(label, alone, atol=1e-4), "Algorithm 1 has no initial mask"


def test_a_pseudo_label_has_as_many_instances_as_its_count():
    label = np.full((64, 96), 0.1, np.float32)
    label[16:48, 8:88], label[16:48, 88:92] = 0.9, 0.5  # one region of two objects, and an undecided rim
    boundary = torch.zeros(16, 24)
    boundary[:, 12] = 1
    yy, xx = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    offsets = torch.stack([8 - yy, torch.where(xx < 12, 6, 17) - xx])
    maps = Maps(boundary, boundary, offsets)
    classes = np.zeros((64, 96), np.uint8)
    classes[16:48, 8:46], classes[20:24, 10:14] = 7, 9
    found = instance_label(label, maps, 2, FusionConfig(), classes)
    assert found.dtype == np.uint8 and sorted(np.unique(found)) == [0, 1, 2, 255]
    assert (found[:12] == 0).all() and (found[16:48, 88:92] == 255).all()
    left, right = found[32, 30], found[32, 70]
    assert left != right and (found[26:48, 10:44] == left).all() and (found[16:48, 54:86] == right).all()
    assert (found[20:24, 10:14] == 255).all(), "another class than the rest of its instance"
    assert sorted(np.unique(instance_label(label, maps, 1, FusionConfig()))) == [0, 1, 255]
    assert instance_label(label * 0, maps, 2, FusionConfig()) is None
    speck = label * 0
    speck[:4, :4], speck[16:48, 8:88] = 0.9, 0.9
    assert instance_label(speck, maps, 1, FusionConfig()) is not None
    assert instance_label(speck, maps, 2, FusionConfig(min_area=0.3)) is None, "not two of that size"
