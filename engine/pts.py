"""The progressive training scheme: what Algorithm 1 adds to plain training (Sec. 3.4)."""

from dataclasses import replace

import cv2
import numpy as np
import torch
from scipy.special import expit, logit

from datasets.labels import IGNORE
from engine.crf import refine_saliency
from models.fusion import fuse, instance_masks, walk
from models.grouping import components, masks_of, split_regions
from models.saliency_prior import combine_logits

FG_THRESH, BG_THRESH = 0.6, 0.3  # rho above which a pixel is an instance's, and below which the background's [ours]


def refresh(previous, current, iteration):
    """Model refreshing, Eq. 8: alpha w_{r-1} + (1 - alpha) w_r with alpha = r / (r + 1), from iteration r = 3 on.

    previous, current: state dicts of one network. Returns a new state dict; before r = 3 it equals ``current``, and
    what is no float always is that of ``current``.
    """
    if iteration <= 2:
        return dict(current)
    alpha = iteration / (iteration + 1)
    return {
        key: alpha * previous[key] + (1 - alpha) * value if value.is_floating_point() else value
        for key, value in current.items()
    }


def pseudo_label(image, maps, count, settings, first=None, keep=0.0, odds=None):
    """The next pseudo label rho of one photograph: the union of its salient instances, refined by the CRF (Alg. 1).

    image: uint8 RGB [S,S,3]; maps: saliency, boundary [h,w] in 0..1 and offsets [2,h,w] on its stride-4 grid; count:
    as in ``fuse``.
    The CRF starts from the mean of the union and of S, so that the network's doubts stay visible [ours].
    first: float [S,S] in 0..1, the pseudo mask made from the photograph's class labels, which the network does not
    know; keep: its share in what the CRF starts from; odds: or the weights of ``combine_logits`` [ours].
    Returns float32 [S,S] in 0..1, or None when no instance was found: that says nothing about the photograph.
    """
    saliency, boundary, offsets = maps
    shares, _ = fuse(saliency, boundary, offsets, settings, count)
    masks, _, _ = instance_masks(shares, saliency, image.shape[:2], settings)
    if not len(masks):
        return None
    soft = torch.nn.functional.interpolate(saliency[None, None], image.shape[:2], mode="bilinear")[0, 0].numpy()
    foreground = (masks.any(0) + np.clip(soft, 0, 1)) / 2
    if first is not None and odds:
        foreground = expit(combine_logits(logit(foreground), logit(first), odds))
    elif first is not None:
        foreground = (1 - keep) * foreground + keep * first
    return refine_saliency(image, foreground)


def parts_of_classes(region, classes, count, least):
    """The salient region of a photograph of several classes: what is known to be of each, in every component [ours].

    region: bool [h,w]; classes: uint8 [h,w], 1..20, elsewhere 0 or 255; count: of objects; least: pixels below which a
    part is noise. Returns (objects, rest), lists of int [M_k,2], the (y, x) of their pixels: as objects the largest
    parts, of every class one before any has two; as rest those beyond ``count``. A component that shows one class is
    whole, and so is one whose classes are not known; of others the undecided pixels are in no part.
    """
    parts = []
    for component in components(region, least):
        names = classes[component[:, 0], component[:, 1]]
        of_each = [(name, component[names == name]) for name in np.unique(names) if 0 < name < IGNORE]
        of_each = [(name, part) for name, part in of_each if len(part) >= least]
        parts += of_each if len(of_each) > 1 else [(of_each[0][0] if of_each else 0, component)]
    parts.sort(key=lambda part: -len(part[1]))
    names = [name for name, _ in parts]
    order = sorted(range(len(parts)), key=lambda k: names[k] in names[:k])  # the largest of every class come first
    parts = [parts[k][1] for k in order]
    return parts[:count], parts[count:]


def instance_label(label, maps, count, settings, classes=None, by_class=False):
    """The salient region of a pseudo label in as many instances as were counted, for the branches to learn [ours].

    The class labels that the branches first learn from hold touching objects of one class together; these part them,
    by V and B as they are, and lie where the CRF has put the contour.
    label: float32 [S,S] in 0..1 of ``pseudo_label``; maps: as there, but that this label takes the place of S; count:
    the count label, 1 or more; classes: uint8 [S,S], the photograph's class labels (0 background, 1..20, 255 unknown)
    or None: where they contradict the class that most of an instance has, the instance is not known.
    by_class: objects of two classes come apart by the class labels, where they know several in the region, and V
    divides within a class.
    Returns uint8 [S,S]: 0 background, 1..count instance, 255 not known; None when it does not show just as many
    instances, each of ``settings.min_area`` of the image: then V has not understood the photograph.
    """
    _, boundary, offsets = maps
    saliency = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(label)[None], boundary.shape)[0]
    region, least = saliency.numpy() > settings.saliency_thresh, settings.min_area * saliency.numel()
    if by_class:
        names = cv2.resize(classes, boundary.shape[::-1], interpolation=cv2.INTER_NEAREST)
        parts, rest = parts_of_classes(region, names, count, least)
    else:
        parts, rest = components(region, least), []
    parts = split_regions(parts, count, offsets.numpy())
    if len(parts) != count:
        return None
    # Where the region ends is settled, and a small part has as much of a say as a large one.
    peaks = replace(settings, mask_rule="peak")
    shares = walk(masks_of(parts + rest, boundary.shape), saliency, boundary, peaks)
    shares = torch.nn.functional.interpolate(shares[None], label.shape, mode="bilinear")[0]
    nearest = shares.argmax(0).numpy().astype(np.uint8) + 1
    nearest[nearest > count] = IGNORE
    result = np.where(label > FG_THRESH, nearest, np.where(label < BG_THRESH, 0, IGNORE)).astype(np.uint8)
    if classes is not None:
        known = (classes > 0) & (classes != IGNORE)
        for number in range(1, count + 1):
            inside = known & (result == number)
            if inside.any():
                result[inside & (classes != np.bincount(classes[inside]).argmax())] = IGNORE
    size = np.bincount(result.ravel(), minlength=count + 1)[1 : count + 1]
    return result if size.min() >= settings.min_area * result.size else None
