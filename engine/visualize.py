"""Pictures of maps and of results. Arrays are uint8 RGB [H,W,3] unless said otherwise."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np


def instance_colours(count: int) -> np.ndarray:
    """``count`` well separated colours, float [count,3] in 0..255: hues a golden section apart."""
    hues = [(0.02 + 0.618034 * i) % 1 for i in range(count)]
    return np.array([colorsys.hsv_to_rgb(hue, 0.75, 1.0) for hue in hues]).reshape(-1, 3) * 255


def heat(values: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """A map [H,W] in 0..1 as colours, blended with ``image`` where one is given."""
    colour = cv2.applyColorMap(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return colour.copy() if image is None else cv2.addWeighted(image, 0.4, np.ascontiguousarray(colour), 0.6, 0)


def grey(values: np.ndarray) -> np.ndarray:
    """A map [H,W] in 0..1 as grey."""
    return np.repeat(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)[..., None], 3, 2)


def colour_wheel(offsets: np.ndarray, reach: float | None = None) -> np.ndarray:
    """Offsets [2,H,W] (dy, dx): direction as hue, length as saturation, full at ``reach`` (default: the longest)."""
    dy, dx = offsets
    length = np.hypot(dy, dx)
    hsv = np.full((*length.shape, 3), 255, np.uint8)
    hsv[..., 0] = np.round((np.arctan2(dy, dx) / (2 * np.pi) % 1) * 179)
    hsv[..., 1] = np.round(255 * np.clip(length / (reach or max(length.max(), 1e-6)), 0, 1))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def mark(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Draw (y, x) points [n,2], in pixels of ``picture``, as ringed dots; returns a new picture."""
    picture = np.ascontiguousarray(picture).copy()
    radius = max(2, round(max(picture.shape) / 100))
    for y, x in np.asarray(points).reshape(-1, 2):
        centre = (round(float(x)), round(float(y)))
        cv2.circle(picture, centre, radius + 1, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(picture, centre, radius, (20, 20, 20), -1, cv2.LINE_AA)
    return picture


def cutout(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pixels of ``mask``, bool [H,W] and not empty, as uint8 RGBA [H,W,4] with a soft rim.

    Opacity is the mask smoothed by a Gaussian of one pixel, so that the rim reaches two pixels beyond the mask. These
    pixels have the colour of the nearest pixel of the mask, not that of the background; all others of the mask are
    unchanged. Where nothing is visible all values are 0.
    """
    opacity = cv2.GaussianBlur(mask.astype(np.uint8) * 255, (5, 5), 1, borderType=cv2.BORDER_REPLICATE)
    outside = (~mask).astype(np.uint8)
    nearest = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    colours = np.zeros((nearest.max() + 1, 3), np.uint8)
    colours[nearest[mask]] = image[mask]
    picture = np.dstack([colours[nearest], opacity])
    picture[opacity == 0] = 0
    return picture


def overlay(
    image: np.ndarray,
    masks: np.ndarray,
    scores: np.ndarray,
    centroids: np.ndarray,
    numbers: Sequence[int] | None = None,
) -> np.ndarray:
    """A photograph with its instances tinted, outlined, and labelled with their scores at their centroids.

    image: uint8 RGB [H,W,3]; masks: bool [n,H,W]; scores: n values in 0..1; centroids: (y, x) in image pixels
    [n,2]. The rest of the photograph is shown in grey. numbers: n of 1, 2, ..., of tracks in a clip, which then choose
    the colours and are the labels.
    """
    height, width = image.shape[:2]
    rest = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    picture = cv2.addWeighted(image, 0.35, rest, 0.45, 0)
    thickness = max(1, round(max(height, width) / 300))
    places = range(len(masks)) if numbers is None else [number - 1 for number in numbers]
    colours = instance_colours(max(places, default=-1) + 1)[list(places)]
    labels = [f"{score:.2f}" for score in scores] if numbers is None else list(map(str, numbers))
    binary = [mask.astype(np.uint8) for mask in masks]
    for mask, colour in zip(binary, colours, strict=True):
        x, y, w, h = cv2.boundingRect(mask)
        place = np.s_[y : y + h, x : x + w]
        tints = np.rint(0.65 * np.arange(256)[:, None] + 0.35 * colour).astype(np.uint8)
        cv2.copyTo(cv2.LUT(image[place], tints[None]), mask[place], picture[place])
    for mask, colour in zip(binary, colours, strict=True):
        contours = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]
        cv2.drawContours(picture, contours, -1, (255, 255, 255), thickness + 2, cv2.LINE_AA)
        cv2.drawContours(picture, contours, -1, colour.tolist(), thickness, cv2.LINE_AA)
    picture = mark(picture, centroids)
    scale = max(0.35, max(height, width) / 1100)
    for text, colour, (y, x) in zip(labels, colours, centroids, strict=True):
        (w, h), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        left = int(np.clip(x + 8 * scale, 0, max(0, width - w - 4)))
        top = int(np.clip(y - 8 * scale, h + 4, max(h + 4, height - base)))
        cv2.rectangle(picture, (left - 2, top - h - 3), (left + w + 2, top + base), colour.tolist(), -1)
        cv2.putText(picture, text, (left, top), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return picture
