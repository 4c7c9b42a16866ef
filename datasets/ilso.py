"""Photographs with a folder of instance masks beside them, as ILSO is published: counts come from the masks."""

from pathlib import Path

import numpy as np

from datasets.images import list_images
from datasets.labels import Sample, collect, fail
from datasets.masks import VOID, MaskFile, list_masks
from utils.cli import InputError

PHOTOGRAPHS, MASKS = ("images", "imgs"), ("instance_masks", "gt", "GT", "masks")


def is_ilso(folder):
    """Whether ``folder`` has a folder of photographs and a folder of masks."""
    return all(_first(folder, names).is_dir() for names in (PHOTOGRAPHS, MASKS))


def read_pairs(folder, report=fail):
    """The photographs as Samples with their masks, without classes and counts, sorted by name.

    The layout: ``images/`` (or ``imgs/``) holds the photographs and ``instance_masks/`` (or ``gt/``, ``GT/``,
    ``masks/``) their masks, a picture each, of one name save the suffix. A mask paints each instance in a colour of
    its own on black, as ILSO does, or holds 0, 1..N, 255 void, as ``datasets.masks.read_instance_mask`` describes;
    white is void, not an instance. A photograph may lack its mask.

    InputError when a folder is missing or empty; ``report`` gets one for a mask without a photograph.
    """
    masks = list_masks(_first(folder, MASKS))
    photographs = list_images(_first(folder, PHOTOGRAPHS))
    stems = {path.stem for path in photographs}
    for stem, path in masks.items():
        if stem not in stems:
            report(InputError(f"{path} has no photograph in {photographs[0].parent}; add it or remove the mask"))

    def read(where, path):
        return Sample(path, mask=MaskFile(masks[path.stem]) if path.stem in masks else None)

    return collect(((path, path) for path in photographs), read, report)


def read_ilso(folder, report=fail):
    """``read_pairs`` with counts: the number of instances in each mask. Classes are not known.

    All masks are read for that. ``report`` gets, besides, an InputError for a mask that cannot be read or that is
    void where it is not background.
    """
    pairs = ((sample.path, sample) for sample in read_pairs(folder, report))
    return collect(pairs, _count, report)


def _first(folder, names):
    """The first of the named folders in ``folder`` that exists; the first of all when none does."""
    paths = [Path(folder) / name for name in names]
    return next(filter(Path.is_dir, paths), paths[0])


def _count(where, sample):
    if sample.mask is None:
        return sample
    labels = np.unique(sample.mask.read())
    count = int(np.count_nonzero((labels > 0) & (labels < VOID)))
    return Sample(sample.path, count=count, mask=sample.mask)
