"""Pseudo masks from class activation maps: what the branches are trained on in place of masks (Sec. 4.2).

Runs in worker processes, one photograph at a time, and writes 8-bit PNGs of the training square:
``saliency/<stem>.png``, foreground probability 0..255, and ``classes/<stem>.png``, 0 background, 1..20 class,
255 undecided.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.labels import IGNORE
from datasets.transforms import load_square, resize
from engine.crf import refine_labels, refine_saliency
from utils import digest, files
from utils.cli import InputError


@dataclass(frozen=True)
class CamThresholds:
    """Where an activation in 0..1 counts as what.

    even: the activation at which foreground and background are equally likely, for the saliency mask;
    power: how fast the odds grow with the activation;
    foreground, background: the confident thresholds of the class labels.
    """

    even: float
    power: float
    foreground: float
    background: float


# Plain activations fade from a peak, spread ones (models.classifier.spread_activations) are flat over the object.
# even and power were chosen on the validation split for both; .30 and .05 are IRN's.
PLAIN = CamThresholds(even=0.25, power=1, foreground=0.30, background=0.05)
SPREAD = CamThresholds(even=0.6, power=2, foreground=0.7, background=0.5)


def foreground_probability(activation, thresholds):
    """Activation [..] in 0..1 -> probability in 0..1: the odds are (activation / even) ** power."""
    odds = (activation / thresholds.even) ** thresholds.power
    return odds / (1 + odds)


def saliency_mask(image, cams, thresholds, use_crf=True):
    """The saliency pseudo mask: maximum over the image's own classes, as a unary, refined by the CRF (Sec. 4.2).

    image: uint8 RGB [S,S,3]; cams: float [C,S,S] in 0..1, one per class of the image. Returns float32 [S,S].
    """
    if not len(cams):
        return np.zeros(image.shape[:2], np.float32)
    foreground = foreground_probability(cams.max(0), thresholds)
    return refine_saliency(image, foreground) if use_crf else foreground.astype(np.float32)


def class_labels(image, cams, classes, thresholds):
    """Class labels that two CRF runs agree on: a confident-foreground one and a confident-background one [IRN].

    classes: the 0..19 index of each map. Returns uint8 [S,S]: 0 background, class + 1, 255 where they disagree.
    """
    names = np.array([0, *(index + 1 for index in classes)], np.uint8)

    def refined(threshold):
        scores = np.concatenate([np.full((1, *image.shape[:2]), threshold, np.float32), cams])
        return names[refine_labels(image, scores.argmax(0), len(names))]

    foreground, background = refined(thresholds.foreground), refined(thresholds.background)
    labels = foreground.copy()
    labels[foreground == 0] = IGNORE
    labels[(foreground == 0) & (background == 0)] = 0
    return labels


def is_done(folder, stem):
    """Whether both maps of a photograph are written."""
    return all((Path(folder) / kind / f"{stem}.png").exists() for kind in ("saliency", "classes"))


def require(folder, samples, remedy):
    """InputError, which ends in ``remedy``, when a photograph of the Samples has no pseudo labels in ``folder``."""
    missing = [sample.stem for sample in samples if not is_done(folder, sample.stem)]
    if missing:
        some = f"{len(missing)} photographs, such as {missing[0]},"
        raise InputError(f"{some} have no pseudo labels in {folder}; {remedy}")


def inputs(folder, samples, *kinds):
    """Digests of the pseudo labels of the Samples, {what: digest}: of "classes" and "saliency" those in ``kinds``."""
    return {
        f"a pseudo label ({kind})": digest.of_value(
            digest.of_files(Path(folder) / kind / f"{sample.stem}.png" for sample in samples)
        )
        for kind in kinds
    }


def is_untold(folder, stem):
    """Whether train_pts.py could not tell a photograph's instances, and it has no class labels either."""
    return (Path(folder) / "classes" / f"{stem}.none").exists()


def write_pseudo_labels(folder, sample, cams, classes, size, thresholds, use_crf):
    """Make and write both maps of the photograph of a Sample; cams: float [C,h,w] in 0..1 on any grid.

    InputError for activations that are not finite, which would come out as a mask of nothing.
    """
    if not np.isfinite(cams).all():
        raise InputError(f"the activations of {sample.path} are not finite; train the stage cam again, at a lower --lr")
    image = load_square(sample.path, size)
    cams = np.stack([resize(cam.astype(np.float32), size) for cam in cams]) if len(cams) else np.zeros((0, size, size))
    saliency = saliency_mask(image, cams, thresholds, use_crf)
    # The class labels come first: is_done looks for both, so a kill in between only repeats this photograph.
    labels = class_labels(image, cams, classes, thresholds)
    files.save_png(labels, Path(folder) / "classes" / f"{sample.stem}.png")
    files.save_png(np.round(saliency * 255).astype(np.uint8), Path(folder) / "saliency" / f"{sample.stem}.png")
