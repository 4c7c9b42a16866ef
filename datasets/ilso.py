"""ILSO's layout: a folder of photographs and a folder of instance masks, from which the counts are read."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.labels import Only, Report, Sample, collect_samples, raise_or_warn
from datasets.listing import list_images
from datasets.masks import VOID, MaskFile, list_masks
from utils.cli import InputError

PHOTOGRAPHS, MASKS = ("images", "imgs"), ("instance_masks", "gt", "GT", "masks")


def is_ilso(folder: str | Path) -> bool:
    """Whether ``folder`` has a folder of photographs and a folder of masks."""
    return all(_first(folder, names).is_dir() for names in (PHOTOGRAPHS, MASKS))


def read_pairs(folder: str | Path, report: Report = raise_or_warn) -> list[Sample]:
    """The photographs as Samples with their masks, without classes and counts, sorted by name.

    ``images/`` (or ``imgs/``) holds the photographs and ``instance_masks/`` (or ``gt/``, ``GT/``, ``masks/``) one
    picture per photograph with the same stem, read by ``datasets.masks.read_instance_mask``: each instance has its own
    colour on black, as in ILSO, or its own index. Photographs without a mask are kept.

    Raises InputError when a folder is missing or empty; ``report`` gets one for a mask without a photograph.
    """
    masks = list_masks(_first(folder, MASKS))
    photographs = list_images(_first(folder, PHOTOGRAPHS))
    stems = {path.stem for path in photographs}
    for stem, path in masks.items():
        if stem not in stems:
            report(InputError(f"{path} has no photograph in {photographs[0].parent}; add it or remove the mask"))

    def read(where: Path, path: Path) -> Sample:
        return Sample(path, mask=MaskFile(masks[path.stem]) if path.stem in masks else None)

    return collect_samples(((path, path) for path in photographs), read, report)


def read_ilso(folder: str | Path, report: Report = raise_or_warn, only: Only = None) -> list[Sample]:
    """``read_pairs`` with counts, the number of instances in each mask. Classes are unknown.

    The masks are not read when ``only`` is "classes". ``report`` also gets an InputError for a mask that cannot be read
    or holds no instance but void.
    """
    if only == "classes":
        return read_pairs(folder, report)
    pairs = ((sample.path, sample) for sample in read_pairs(folder, report))
    return collect_samples(pairs, count_instances, report)


def count_instances(where: Path, sample: Sample) -> Sample:
    """``sample`` with the count of its mask, if it has one; InputError when the mask has void but no instance."""
    if sample.mask is None:
        return sample
    labels = np.unique(sample.mask.read())
    count = int(np.count_nonzero((labels > 0) & (labels < VOID)))
    return replace(sample, count=count)


def _first(folder: str | Path, names: tuple[str, ...]) -> Path:
    """The first of the named folders in ``folder`` that exists; the first name when none does."""
    paths = [Path(folder) / name for name in names]
    return next(filter(Path.is_dir, paths), paths[0])
