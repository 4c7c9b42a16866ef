"""Changes of a photograph that leave its salient instances what they are, for choosing settings that do not depend on
the details of one set of files."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from datasets.transforms import expose, reduce_and_compress


class Perturbation(NamedTuple):
    """name: of its row in a table; change: uint8 RGB [H,W,3] to uint8 RGB [H',W',3]; mirrored: whether the change swaps
    left and right, so that predictions have to be mirrored back."""

    name: str
    change: Callable[[np.ndarray], np.ndarray]
    mirrored: bool = False


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
