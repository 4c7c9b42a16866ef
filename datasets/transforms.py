"""Photographs as network inputs: resizing, tensors, Canny edges (Sec. 3.2.1, 4.1)."""

from pathlib import Path

import cv2
import numpy as np
import torch

from datasets.images import read_image
from utils.cli import InputError


def load_square(path: str | Path, size: int) -> np.ndarray:
    """The photograph at ``path`` as uint8 RGB [size,size,3]; the aspect ratio is not kept (Sec. 4.1).

    Raises InputError as ``datasets.images.read_image`` does.
    """
    return resize(read_image(path), size)


def resize(array: np.ndarray, size: int) -> np.ndarray:
    """[H,W] or [H,W,C] to [size,size] or [size,size,C], by area averaging when a side shrinks, else bilinearly."""
    shrinks = array.shape[0] > size or array.shape[1] > size
    return cv2.resize(array, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 RGB [H,W,3] -> float32 RGB [3,H,W] in 0..1."""
    # The channels stay last in memory, as the networks take them; to move them costs more than all the rest.
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)


def expose(image: np.ndarray, stops: float, gamma: float = 1) -> np.ndarray:
    """A photograph as if exposed differently: its linear light times 2^stops, clipped at white, to the power ``gamma``.

    image: uint8 sRGB [H,W,3]; the transfer function is that of IEC 61966-2-1. Returns uint8 sRGB.
    """
    values = np.arange(256) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.minimum(linear * 2.0**stops, 1) ** gamma
    values = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(values * 255).astype(np.uint8)[image]


def reduce_and_compress(image: np.ndarray, side: int, quality: int) -> np.ndarray:
    """A photograph reduced to a longer side of ``side`` pixels, where it is larger, and compressed as JPEG.

    image: uint8 RGB [H,W,3]; quality: of OpenCV's encoder, 0..100. Returns uint8 RGB.
    """
    height, width = image.shape[:2]
    scale = min(1, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)


LARGEST_GRADIENT = 2040  # |dx| + |dy| of cv2.Canny's Sobel filters


def parse_canny(text: str) -> str:
    """A value of --canny in its normal form: ``auto``, ``none``, ``only`` or ``LOW,HIGH``; InputError for others."""
    if text in ("auto", "none", "only"):
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = np.nan
    if not 0 <= low <= high <= LARGEST_GRADIENT:
        raise InputError(
            f"--canny {text} is not understood; use auto, none, only or LOW,HIGH, from 0 "
            f"to {LARGEST_GRADIENT}, as in 30,200"
        )
    return f"{low:g},{high:g}"


def canny_edges(image: np.ndarray, mode: str = "auto") -> np.ndarray:
    """Canny edge map of a photograph at the network's input size (Sec. 3.2.1, Table 4, Table 5).

    image: uint8 RGB [H,W,3]. mode: with "auto" (and "only") the two thresholds are (1 -/+ 0.33) x the median of the
    grey image, clipped to 0..255 [ours]; "LOW,HIGH" gives them; "none" gives no edges.
    Returns float32 [H,W] of 0 and 1.
    """
    if mode == "none":
        return np.zeros(image.shape[:2], np.float32)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if mode in ("auto", "only"):
        low, high = np.clip(_median(grey) * np.array([0.67, 1.33]), 0, 255)
    else:
        low, high = (float(part) for part in mode.split(","))
    return (cv2.Canny(grey, low, high) > 0).astype(np.float32)


def _median(grey: np.ndarray) -> float:
    """The median of a uint8 array, by counting: ten times as fast as ``np.median``."""
    up_to = np.cumsum(cv2.calcHist([grey], [0], None, [256], [0, 256]), dtype=np.int64)
    middle = (up_to[-1] + 1) / 2
    return float(np.searchsorted(up_to, [np.floor(middle), np.ceil(middle)]).mean())


def network_input(image: np.ndarray, canny: str, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """One square photograph as network input: uint8 RGB [S,S,3] -> (float32 [1,3,S,S] in 0..1, edges [1,1,S,S] of 0 and
    1), both on ``device``. canny: as the mode of ``canny_edges``."""
    edges = torch.from_numpy(canny_edges(image, canny))
    return to_tensor(image)[None].to(device), edges[None, None].to(device)
