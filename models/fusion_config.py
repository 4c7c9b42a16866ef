"""FusionConfig: the settings by which S, B and V become instances; stored with the weights of a network."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from utils.cli import InputError, integer, number, one_of


def _switch(text: str) -> bool:
    """``1`` or ``true``, ``0`` or ``false`` as a bool."""
    if text.lower() not in ("0", "1", "true", "false"):
        raise ArgumentTypeError(f"{text!r} does not fit; give 1 or 0")
    return text.lower() in ("1", "true")


# The values that each setting may have. Limits that are left out would give no instance in any image, or overflow.
ALLOWED: dict[str, Callable[[str], Any]] = {
    "grouping": one_of("sinks", "count"),
    "theta": number(0, below=1),
    "sink_thresh": number(None, 1000, above=0),
    "centroid_region": one_of("salient", "image"),
    "radius": integer(1, 64),
    "power": number(0.1, 1000),
    "steps": integer(0, 10**5),
    "saliency_thresh": number(0, below=1),
    "mask_rule": one_of("relative", "peak"),
    "mask_thresh": number(0, below=1),
    "min_area": number(0, below=1),
    "min_score": number(0, 1),
    "count_aware_scores": _switch,
}


@dataclass(frozen=True)
class FusionConfig:
    """The settings of the fusion; lengths are in pixels of the stride-4 grid.

    grouping: how salient pixels are grouped to instances: "sinks", by the sinks of V (Sec. 3.1.1), or "count", by
    k-means of the points p + V(p), with the expected number of objects as k [ours].
    theta: minimal salient fraction of a cluster (Sec. 3.1.1). sink_thresh: |V| below which a pixel belongs to a sink.
    centroid_region: where sinks are searched, among the "salient" pixels [ours] or in the whole "image".
    radius, power, steps: of the random walk (Eq. 9, 10). saliency_thresh: S above which a pixel is salient.
    mask_rule: what masks are thresholded on, the response of the walk "relative" to those of other instances and the
    background [ours], or divided by its own "peak" [IRN]. mask_thresh: the value below which a pixel is background.
    min_area: fraction of the image below which an instance is dropped; min_score: score below which it is.
    count_aware_scores: whether scores are multiplied by the expected IoU under the count distribution [ours].
    Raises InputError for a value that ``ALLOWED`` does not admit.
    """

    grouping: str = "sinks"
    theta: float = 0.5
    sink_thresh: float = 2.5
    centroid_region: str = "salient"
    radius: int = 5
    power: float = 5.0
    steps: int = 256
    saliency_thresh: float = 0.5
    mask_rule: str = "relative"
    mask_thresh: float = 0.4
    min_area: float = 0.01
    min_score: float = 0.1
    count_aware_scores: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = str(getattr(self, field.name))  # text from the command line, or a value
            try:
                object.__setattr__(self, field.name, ALLOWED[field.name](value))
            except ArgumentTypeError as error:
                raise InputError(f"--fusion {field.name}={value}: {error}") from error

    @classmethod
    def of(cls, arguments: Iterable[str], start: "FusionConfig | None" = None) -> "FusionConfig":
        """``start``, by default the values above, with the changes in arguments, NAME=VALUE each as in --fusion.

        Raises InputError for a name that does not exist or a value that is not allowed.
        """
        changes: dict[str, Any] = {}
        for argument in arguments:
            name, _, changes[name] = argument.partition("=")
            if name not in ALLOWED:
                raise InputError(f"--fusion {argument}: there is no such setting; there are {', '.join(ALLOWED)}")
        return replace(start or cls(), **changes)
