"""The names in weights files of former versions, such as the bundled one, mapped to the present ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Former name -> present name; None for a setting that no longer exists.
CONFIG: dict[str, str | None] = {"counting": "count_head", "number": "count_net", "opinion": "saliency_prior"}
FUSION: dict[str, str | None] = {
    "sink": "sink_thresh",
    "region": "centroid_region",
    "salient": "saliency_thresh",
    "share": "mask_rule",
    "background": "mask_thresh",
    "smallest": "min_area",
    "unsure": "min_score",
    "doubt": "count_aware_scores",
    "likeness": None,
}
PREFIXES = {  # the first that fits
    "number.counting.": "count_net.count_head.",
    "number.": "count_net.",
    "branches.counting.": "branches.count_head.",
    "opinion.odds": "saliency_prior.weights",
    "opinion.": "saliency_prior.",
}


def config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a NetConfig."""
    return _renamed(saved, CONFIG)


def fusion(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a FusionConfig."""
    settings = _renamed(saved, FUSION)
    if "share" in saved:  # these versions grouped by the predicted count
        settings["grouping"] = "count"
        settings["mask_rule"] = {"rival": "relative"}.get(saved["share"], saved["share"])
    if "doubt" in saved:  # the power of the expected IoU
        settings["count_aware_scores"] = saved["doubt"] > 0
    return settings


def state(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a WSIDNet."""
    return {_key(name): value for name, value in saved.items()}


def _renamed(settings: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    pairs = ((names.get(name, name), value) for name, value in settings.items())
    return {name: value for name, value in pairs if name}


def _key(name: str) -> str:
    for former, present in PREFIXES.items():
        if name.startswith(former):
            return present + name.removeprefix(former)
    return name
