"""The stages of a training in their order, and the two that train the network: ``branches`` and ``saliency``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.labels import Sample
from datasets.training import TrainingImages
from datasets.transforms import canny_edges, load_square, network_input, to_tensor
from engine import cam_labels, tensorboard
from engine.assemble import assemble, require_place
from engine.config import settings_of
from engine.run import START, Run, run_stage, samples_with_count
from engine.trainer import Batch
from models.backbones import Backbone, load_pretrained
from models.branches import BoundaryCentroidNet, SaliencyNet
from models.count_head import CountHead
from models.grouping import split_labels_by_count
from models.losses import boundary_loss, centroid_loss, centroid_target_loss, divisors, subitizing_loss
from utils import digest, distributed, files, provenance
from utils.cli import InputError, make_folder
from utils.parallel import batches_ahead
from utils.progress import tqdm


def run_stages(run: Run, names: Sequence[str]) -> None:
    """Run the named stages of ``STAGES`` one after another.

    After them OUT/weights.pt is assembled when either stage, branches or saliency, ran.

    A stage that is finished is passed over, one that was stopped is continued. InputError for samples, settings or an
    OUT that do not fit, before anything is computed.
    """
    for name in names:
        require_place(run, name)
    samples = {select: select(run) for select in {STAGES[name].samples for name in names}}
    to_train = samples.get(cam_labels.usable_samples, [])
    if "branches" in names and uses_counts(run) and not any(sample.count for sample in to_train):
        raise InputError(
            "no photograph has a count; name a source in --data that has them, or give --lsu-weight 0, "
            "--centroid-target-weight 0 and --no-count-head"
        )
    make_folder(run.out)
    for name in names:
        torch.manual_seed(run.seed)  # new layers start the same whether earlier stages were run before or now
        folder = make_folder(run.out / name)
        with distributed.context_on_main(files.lock_folder, folder):
            STAGES[name].train(run, samples[STAGES[name].samples])
        distributed.barrier()
    if "branches" in names or "saliency" in names:
        distributed.run_on_main(assemble, run)


def uses_counts(run: Run) -> bool:
    """Whether the stage ``branches`` learns from count labels."""
    config = run.preset.branches
    return bool(config.lsu_weight or config.centroid_target_weight or run.preset.network.count_head)


def initialize(run: Run, model: BoundaryCentroidNet | SaliencyNet, part: str, freeze: int) -> str:
    """Give a new network its starting weights, and freeze the first ``freeze`` levels of its backbone.

    part: "branches" or "saliency". With ``run.start`` all weights are those of this part of it (a BoundaryCentroidNet
    gets a mean offset of 0), else those of the backbone are ImageNet's. Returns the digest of these weights. Raises
    InputError when ``run.start`` is a network of other settings.
    """
    if run.start:
        require_same_network(run)
        start = getattr(run.start, part)
        model.load_state_dict(start.state_dict())
        if isinstance(model, BoundaryCentroidNet):
            model.centroid.mean_offset.zero_()  # it belongs to the earlier V; training works on V without it
        found = digest.of_state(start.state_dict())
    else:
        load_pretrained(model.backbone, run.backbone_weights)
        found = digest.of_state(model.backbone.state_dict())
    model.backbone.freeze(freeze)
    return found


def require_same_network(run: Run) -> None:
    """InputError, naming the settings, when ``run.start`` is not the network of the preset.

    The size may differ.
    """
    assert run.start
    now, before = asdict(run.preset.network), asdict(run.start.config)
    differs = [f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before[name] and name != "size"]
    if differs:
        raise InputError(f"--init {run.start_path} is a network of other settings ({'; '.join(differs)}); give its own")


def bandwidth(progress: float, size: int) -> float:
    """h of the soft centroid count in stride-4 pixels, coarse to fine: 12, then 6 for an input of 512 pixels.

    A smaller h counts the scatter of V instead of its centroids. progress: of the training, 0..1.
    """
    return (12.0 if progress < 0.5 else 6.0) * size / 512


def edges_and_instances(
    image: np.ndarray, maps: dict[str, np.ndarray], count: int, canny: str, radius: int
) -> dict[str, np.ndarray]:
    """What the branches need of a photograph beside its pseudo labels, on the stride-4 grid [H,W].

    image: uint8 RGB [4H,4W,3]; maps: "pseudo_classes" int64 [H,W], "pseudo_saliency" float32 [H,W]; count: T, 0 where
    it is not known. Returns "edges" float32 [1,4H,4W] of 0 and 1; "instances" int64 [H,W], of
    ``split_labels_by_count``; "divisors" float32 [5], of ``models.losses.divisors``.
    """
    instances = split_labels_by_count(maps["pseudo_classes"], count)
    classes, salient, counts, of_count = (
        torch.from_numpy(array)[None]
        for array in (maps["pseudo_classes"], maps["pseudo_saliency"] > 0.5, np.array(count), instances)
    )
    by = divisors(classes, salient, counts, of_count, radius)
    return {"edges": canny_edges(image, mode=canny)[None], "instances": instances, "divisors": by[0].numpy()}


def train_branches(run: Run, samples: list[Sample]) -> None:
    """Stage branches: the boundary and the centroid branch together (Sec. 3.1, 3.2, 4.2).

    The sum of L_B, L_V, L_su and the centroid targets is minimised, each with its weight in BranchesConfig. Afterwards
    the mean of V is subtracted where only differences of V were trained [IRN], and the count head is fitted [ours].
    """
    config, network, device = run.preset.branches, run.preset.network, run.device
    labels = cam_labels.require_labels(run, samples)
    model = network.build_branches()
    start = initialize(run, model, "branches", config.schedule.freeze)
    # No cropping: the count label holds for whole photographs.
    maps = {"pseudo_classes": labels / "classes", "pseudo_saliency": labels / "saliency"}
    derive = partial(edges_and_instances, canny=network.canny, radius=config.radius)
    dataset = TrainingImages(samples, network.size, jitter=0.2, maps=maps, derive=derive, seed=run.seed)

    def losses(model: BoundaryCentroidNet, batch: Batch, progress: float) -> Batch:
        output = model(batch["image"], batch["edges"])
        boundary, offsets = output.boundary.float(), output.offsets.float()  # bfloat16 is too coarse for the losses
        classes, (pairs, with_count, instances) = batch["pseudo_classes"], batch["divisors"].split((3, 1, 1))
        terms = {
            "boundary": boundary_loss(boundary, classes, config.radius, pairs),
            "centroid": centroid_loss(offsets, classes, config.radius, pairs),
        }
        if config.lsu_weight:
            terms["subitizing"] = subitizing_loss(
                offsets,
                batch["pseudo_saliency"] > 0.5,
                batch["count"],
                bandwidth(progress, network.size),
                seed=run.seed + int(progress * 1e9),
                valid_fraction=with_count[0],
                form=config.lsu_form,
            )
        if config.centroid_target_weight:
            terms["centroid_target"] = centroid_target_loss(offsets, batch["instances"], instances[0])
        return terms

    def inputs() -> dict[str, str]:
        found = provenance.digest_inputs(samples, "count") | cam_labels.inputs(labels, samples, "classes", "saliency")
        if model.count_head:  # it is fitted to photographs without pseudo labels too
            counted = provenance.describe_photographs(samples_with_count(run), "count")
            found["a photograph that the count head is fitted to"] = digest.of_value(counted)
        return found | {START: start}

    def finish() -> None:
        if not config.centroid_target_weight:  # the targets fix V itself, L_V and L_su only its differences
            model.centroid.mean_offset.copy_(mean_offset(model, samples, network.size, network.canny, device))
        if model.count_head:
            fit_count_head(model.count_head, model, samples_with_count(run), network.size, device)

    run_stage(
        run,
        "branches",
        model,
        dataset,
        losses,
        config.schedule,
        config=network,
        settings=settings_of(config, network),
        inputs=inputs,
        weights={"subitizing": config.lsu_weight, "centroid_target": config.centroid_target_weight},
        show=partial(
            tensorboard.show_branches,
            samples=samples[:8],
            size=network.size,
            canny=network.canny,
            device=device,
            labels=labels,
        ),
        finish=finish,
    )


@torch.no_grad()
def mean_offset(
    model: BoundaryCentroidNet, samples: list[Sample], size: int, canny: str, device: torch.device
) -> Tensor:
    """The mean of V, [1,2,1,1] in stride-4 pixels: L_V leaves a constant of V free [IRN].

    It is taken over a sample of some 500 to 1000 training photographs (``evenly_spaced``), or over all where they are
    fewer.
    """
    model.eval()
    model.centroid.mean_offset.zero_()
    chosen = evenly_spaced(samples)
    total = torch.zeros(1, 2, 1, 1, device=device)

    def load(sample: Sample) -> tuple[Tensor, Tensor]:
        return network_input(load_square(sample.path, size), canny, "cpu")

    for batch in batches_ahead(load, tqdm(chosen, desc="mean offset", mininterval=2), device):
        images, edges = (torch.cat(part).to(device) for part in zip(*batch, strict=True))
        total += model(images, edges).offsets.mean((2, 3), keepdim=True).sum(0, keepdim=True)
    return total / len(chosen)


@torch.no_grad()
def fit_count_head(
    head: CountHead, model: BoundaryCentroidNet, samples: list[Sample], size: int, device: torch.device
) -> None:
    """Fit the count ``head`` of the branches to the count labels of the samples, all of which have one."""
    model.eval()
    pooled = pooled_features(model.backbone, samples, size, device)
    head.fit(pooled, torch.tensor([sample.count for sample in samples], device=device))


def evenly_spaced(samples: list[Sample]) -> list[Sample]:
    """Some 500 to 1000 of the samples, evenly spaced: enough for a mean over the training set."""
    return samples[:: max(1, len(samples) // 500)]


@torch.no_grad()
def pooled_features(backbone: Backbone, samples: Sequence[Sample], size: int, device: torch.device) -> Tensor:
    """The input of the count head for photographs, resized to ``size``: [M,C_4 + C_5] of ``CountHead.pool``."""

    def load(sample: Sample) -> Tensor:
        return to_tensor(load_square(sample.path, size))

    squares = batches_ahead(load, tqdm(samples, desc="count", mininterval=2), device)
    return torch.cat([CountHead.pool(backbone(torch.stack(batch).to(device))) for batch in squares])


def saliency_losses(model: SaliencyNet, batch: Batch, progress: float) -> Batch:
    """Binary cross entropy of the saliency logits and soft pseudo masks, on the stride-4 grid (Sec. 3)."""
    logits = model.logits(batch["image"]).float()
    return {"saliency": F.binary_cross_entropy_with_logits(logits, batch["pseudo_saliency"][:, None])}


def train_saliency(run: Run, samples: list[Sample]) -> None:
    """Stage saliency: binary cross entropy on the saliency pseudo masks (Sec. 3)."""
    config, network = run.preset.saliency, run.preset.network
    labels = cam_labels.require_labels(run, samples)
    model = network.build_saliency()
    start = initialize(run, model, "saliency", config.schedule.freeze)
    maps = {"pseudo_saliency": labels / "saliency"}
    dataset = TrainingImages(samples, network.size, crop=0.7, jitter=0.2, maps=maps, seed=run.seed)

    def inputs() -> dict[str, str]:
        return provenance.digest_inputs(samples) | cam_labels.inputs(labels, samples, "saliency") | {START: start}

    run_stage(
        run,
        "saliency",
        model,
        dataset,
        saliency_losses,
        config.schedule,
        config=network,
        settings={name: getattr(network, name) for name in SaliencyNet.SETTINGS},
        inputs=inputs,
        show=partial(
            tensorboard.show_saliency, samples=samples[:8], size=network.size, device=run.device, labels=labels
        ),
    )


class Stage(NamedTuple):
    """A stage: its function, and the samples that it takes."""

    train: Callable[[Run, list[Sample]], None]
    samples: Callable[[Run], list[Sample]]


# The stages of a whole training before PTS, in their order.
STAGES = {
    "cam": Stage(cam_labels.train_classifier, cam_labels.usable_samples),
    "labels": Stage(cam_labels.make_labels, cam_labels.usable_samples),
    "branches": Stage(train_branches, cam_labels.usable_samples),
    "saliency": Stage(train_saliency, cam_labels.usable_samples),
}
