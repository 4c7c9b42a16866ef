"""Changes of a photograph that leave its salient instances what they are, for choosing settings that do not depend on
the details of one set of files."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

from datasets.transforms import expose


class Perturbation(NamedTuple):
    """name: of its row in a table; change: uint8 RGB [H,W,3] to uint8 RGB [H',W',3]; mirrored: whether the change swaps
    left and right, so that predictions have to be mirrored back."""

    name: str
    change: Callable[[np.ndarray], np.ndarray]
    mirrored: bool = False


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


def mirror(image: np.ndarray) -> np.ndarray:
    """``image`` [H,W,...] with left and right swapped."""
    return np.ascontiguousarray(image[:, ::-1])


# What --perturb of evaluate.py measures beside the unchanged photographs.
PERTURBATIONS = {
    "mild": (
        Perturbation("360 px JPEG", partial(reduce_and_compress, side=360, quality=76)),
        Perturbation("mirrored", mirror, mirrored=True),
        Perturbation("-0.5 EV", partial(expose, stops=-0.5)),
        Perturbation("+0.5 EV", partial(expose, stops=0.5)),
    ),
    "exposure": tuple(Perturbation(f"{stops:+d} EV", partial(expose, stops=stops)) for stops in (-3, -2, -1, 1, 2, 3)),
}
