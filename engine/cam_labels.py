"""Pseudo labels from class activation maps: the stages ``cam`` and ``labels`` (Sec. 4.2).

The labels are 8-bit PNGs of the training square: ``saliency/<stem>.png``, foreground probability 0..255, and
``classes/<stem>.png``, 0 background, 1..20 class, 255 undecided.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.labels import IGNORE, VOC_CLASSES, Sample
from datasets.training import TrainingImages, select_cam_samples, supports_cam
from datasets.transforms import load_square, resize, to_tensor
from engine import tensorboard
from engine.config import settings_of
from engine.run import START, Run, run_stage
from engine.trainer import Batch
from models.backbones import load_pretrained
from models.classifier import CAM_SIZE, Classifier, activations
from models.crf import refine_labels, refine_saliency
from utils import checkpoint, digest, distributed, files, provenance
from utils.cli import InputError, make_folder
from utils.parallel import WorkerPool, batches_ahead
from utils.progress import tqdm


@dataclass(frozen=True)
class CamThresholds:
    """How activations in 0..1 are turned into labels.

    even: the activation of equal foreground and background probability, for the saliency mask; power: the exponent of
    the ratio activation / even; foreground, background: the confident thresholds of the class labels.
    """

    even: float
    power: float
    foreground: float
    background: float


# Plain activations fade from a peak, spread ones (models.classifier.spread_activations) are flat over the object.
# even and power were chosen on the validation split for both; .30 and .05 are IRN's.
PLAIN = CamThresholds(even=0.25, power=1, foreground=0.30, background=0.05)
SPREAD = CamThresholds(even=0.6, power=2, foreground=0.7, background=0.5)


def train_classifier(run: Run, samples: list[Sample]) -> None:
    """Stage cam: multi-label classification of the 20 classes (Sec. 4.2). Result: OUT/cam/weights.pt."""
    config = run.preset.cam
    model = Classifier(config.backbone, config.output_stride)
    load_pretrained(model.backbone, run.backbone_weights)
    start = digest.of_state(model.backbone.state_dict())
    model.backbone.freeze(config.schedule.freeze)
    dataset = TrainingImages(samples, config.size, crop=0.5, jitter=0.2, seed=run.seed)

    def losses(model: Classifier, batch: Batch, progress: float) -> Batch:
        logits = model(batch["image"]).float()
        return {"classification": F.multilabel_soft_margin_loss(logits, batch["classes"])}

    run_stage(
        run,
        "cam",
        model,
        dataset,
        losses,
        config.schedule,
        config=config,
        settings=settings_of(config),
        inputs=lambda: provenance.digest_inputs(samples, "classes") | {START: start},
        show=partial(
            tensorboard.show_cams,
            samples=samples[:8],
            scales=run.preset.labels.scales,
            size=config.size,
            spread=run.preset.labels.spread,
            device=run.device,
        ),
    )


def make_labels(run: Run, samples: list[Sample]) -> None:
    """Stage labels: class activation maps in this process, the CRF in worker processes. Result: OUT/labels.

    Photographs that have their two PNGs are left as they are.
    """
    size, config, folder = run.preset.cam.size, run.preset.labels, make_folder(run.labels)
    model = finished_classifier(run)
    distributed.run_on_main(_bind_labels, run, samples)
    model.to(run.device).eval()
    model.backbone.fold_batch_norms()
    for kind in ("saliency", "classes"):
        make_folder(folder / kind)
    samples = distributed.shard(samples)
    todo = [sample for sample in samples if not is_done(folder, sample.stem)]
    thresholds = SPREAD if config.spread else PLAIN
    with WorkerPool(run.machine.workers) as pool:
        done = len(samples) - len(todo)
        found = class_activations(run, model, todo)
        for sample, cams in tqdm(found, desc="labels", initial=done, total=len(samples), mininterval=2):
            pool.submit(write_pseudo_labels, folder, sample, cams, sample.classes, size, thresholds, config.crf)


def class_activations(run: Run, model: Classifier, samples: Sequence[Sample]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Each Sample with the activation maps of its classes, float32 [C,h,w] in 0..1 (``activations``)."""
    size, config = run.preset.cam.size, run.preset.labels

    def load(sample: Sample) -> tuple[Sample, Tensor]:
        return sample, to_tensor(load_square(sample.path, CAM_SIZE))

    for batch in batches_ahead(load, samples, run.device):
        images = torch.stack([image for _, image in batch]).to(run.device)
        with run.autocast():
            cams = activations(model, images, range(len(VOC_CLASSES)), config.scales, size, config.spread)
        for (sample, _), of_one in zip(batch, cams, strict=True):
            yield sample, of_one[list(sample.classes or ())].cpu().numpy()


def finished_classifier(run: Run) -> Classifier:
    """The trained Classifier of the pseudo labels of this run; InputError without one."""
    model = Classifier(run.preset.cam.backbone, run.preset.cam.output_stride)
    path = classifier_file(run)
    if not path.exists():
        raise InputError(f"there is no trained classifier at {path}; run --stage cam first")
    try:
        model.load_state_dict(checkpoint.load(path)["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} was trained with another --backbone; give the same one, or another --out") from error
    return model


def classifier_file(run: Run) -> Path:
    """The file of the classifier that the pseudo labels of this run come from."""
    return run.labels.parent / "cam" / "weights.pt"


def _classifier_input(run: Run) -> dict[str, str]:
    return {"the classifier": digest.of_state(checkpoint.load(classifier_file(run))["model"])}


def _bind_labels(run: Run, samples: list[Sample]) -> None:
    """Bind the folder of the pseudo labels to the classifier and, one by one, to the photographs."""
    cam = run.preset.cam
    settings = settings_of(run.preset.labels, backbone=cam.backbone, output_stride=cam.output_stride, size=cam.size)
    settings |= run.machine.precision_of_labels
    photographs = provenance.describe_photographs(samples, "classes")  # noted one by one: more can be added
    finished = partial(is_done, run.labels)
    provenance.bind(run.labels, settings, _classifier_input(run), photographs, finished)


def require_labels(run: Run, samples: list[Sample]) -> Path:
    """The folder of the pseudo labels of all ``samples``.

    InputError when a photograph has none, or when they were made from other photographs or, in a run that makes its
    own, by another classifier.
    """
    remedy = "run the command that made the others once more" if run.pseudo_labels else "run --stage labels first"
    require(run.labels, samples, remedy)
    own = not run.pseudo_labels and classifier_file(run).exists()
    distributed.run_on_main(provenance.check_unchanged, run.labels, _classifier_input(run) if own else {}, samples)
    return run.labels


def usable_samples(run: Run) -> list[Sample]:
    """The samples that pseudo labels can be made of or, with ``run.pseudo_labels``, have been made of.

    Prints how many others there are. InputError when no sample is left.
    """
    if not run.pseudo_labels:
        samples = select_cam_samples(run.samples)
    else:  # one with classes but without labels stays: require_labels names it
        folder = run.pseudo_labels
        samples = [
            sample
            for sample in run.samples
            if is_done(folder, sample.stem) or (supports_cam(sample) and not is_without_instances(folder, sample.stem))
        ]
        if not samples:
            raise InputError(f"{folder} has pseudo labels of no photograph in --data; check both")
    if len(samples) < len(run.samples) and distributed.is_main():
        why = f"no pseudo labels in {run.pseudo_labels}" if run.pseudo_labels else "their classes are not known"
        print(f"{len(run.samples) - len(samples)} of {len(run.samples)} photographs are left out: {why}")
    return samples


def foreground_probability(activation: np.ndarray, thresholds: CamThresholds) -> np.ndarray:
    """Activation [..] in 0..1 -> probability r / (1 + r) in 0..1 with r = (activation / even) ** power."""
    ratio = (activation / thresholds.even) ** thresholds.power
    return ratio / (1 + ratio)


def saliency_mask(image: np.ndarray, cams: np.ndarray, thresholds: CamThresholds, use_crf: bool = True) -> np.ndarray:
    """The saliency pseudo mask: maximum over the image's own classes, as a unary, refined by the CRF (Sec. 4.2).

    image: uint8 RGB [S,S,3]; cams: float [C,S,S] in 0..1, one per class of the image. Returns float32 [S,S] in 0..1.
    """
    if not len(cams):
        return np.zeros(image.shape[:2], np.float32)
    foreground = foreground_probability(cams.max(0), thresholds)
    return refine_saliency(image, foreground) if use_crf else foreground.astype(np.float32)


def class_labels(image: np.ndarray, cams: np.ndarray, classes: Sequence[int], thresholds: CamThresholds) -> np.ndarray:
    """Class labels on which two CRF runs agree, with a confident-foreground and a confident-background threshold [IRN].

    image, cams: as for ``saliency_mask``; classes: the 0..19 index of each map. Returns uint8 [S,S]: 0 background,
    class + 1, 255 where the two disagree.
    """
    names = np.array([0, *(index + 1 for index in classes)], np.uint8)

    def refined(threshold: float) -> np.ndarray:
        scores = np.concatenate([np.full((1, *image.shape[:2]), threshold, np.float32), cams])
        return names[refine_labels(image, scores.argmax(0), len(names))]

    foreground, background = refined(thresholds.foreground), refined(thresholds.background)
    labels = foreground.copy()
    labels[foreground == 0] = IGNORE
    labels[(foreground == 0) & (background == 0)] = 0
    return labels


def is_done(folder: Path, stem: str) -> bool:
    """Whether both maps of a photograph are written."""
    return all((Path(folder) / kind / f"{stem}.png").exists() for kind in ("saliency", "classes"))


def is_without_instances(folder: Path, stem: str) -> bool:
    """Whether PTS could not divide a photograph into as many instances as its count, and has no class labels of it."""
    return (Path(folder) / "classes" / f"{stem}.none").exists()


def require(folder: Path, samples: Sequence[Sample], remedy: str) -> None:
    """InputError, which ends in ``remedy``, when a photograph has no pseudo labels in ``folder``."""
    missing = [sample.stem for sample in samples if not is_done(folder, sample.stem)]
    if missing:
        some = f"{len(missing)} photographs, such as {missing[0]},"
        raise InputError(f"{some} have no pseudo labels in {folder}; {remedy}")


def inputs(folder: Path, samples: Sequence[Sample], *kinds: str) -> dict[str, str]:
    """Digests of the pseudo labels of photographs, {words: digest}; kinds: "classes", "saliency" or both."""
    return {
        f"a pseudo label ({kind})": digest.of_value(
            digest.of_files(Path(folder) / kind / f"{sample.stem}.png" for sample in samples)
        )
        for kind in kinds
    }


def write_pseudo_labels(
    folder: Path,
    sample: Sample,
    cams: np.ndarray,
    classes: Sequence[int],
    size: int,
    thresholds: CamThresholds,
    use_crf: bool,
) -> None:
    """Make and write both maps of one photograph, in a worker process.

    cams: float [C,h,w] in 0..1 on any grid, one for each of ``classes`` (0..19); size: of the PNGs, pixels. InputError
    for activations that are not finite, whose mask would be empty.
    """
    if not np.isfinite(cams).all():
        raise InputError(f"the activations of {sample.path} are not finite; repeat the stage cam with a lower --lr")
    image = load_square(sample.path, size)
    cams = np.stack([resize(cam.astype(np.float32), size) for cam in cams]) if len(cams) else np.zeros((0, size, size))
    saliency = saliency_mask(image, cams, thresholds, use_crf)
    # The class labels come first: is_done checks both, so a kill in between only repeats this photograph.
    labels = class_labels(image, cams, classes, thresholds)
    files.save_png(labels, Path(folder) / "classes" / f"{sample.stem}.png")
    files.save_png(np.round(saliency * 255).astype(np.uint8), Path(folder) / "saliency" / f"{sample.stem}.png")
