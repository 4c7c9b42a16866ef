"""The stages ``count`` and ``saliency-prior``, which add to the trained network of ``Run.start`` [ours]."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.labels import Sample
from datasets.training import TrainingImages
from datasets.transforms import load_square, to_tensor
from engine.assemble import origin
from engine.run import START, Run, run_stage
from engine.trainer import Batch
from models.backbones import Backbone, load_pretrained
from models.count_head import CountHead, CountNet
from models.losses import count_loss
from models.wsid_net import WSIDNet, save_weights, with_parts
from utils import checkpoint, digest, distributed, provenance
from utils.cli import InputError, make_folder
from utils.progress import tqdm

CELLS, MOST_CELLS = 64, 200_000  # feature cells of each photograph that the saliency prior is fitted to, and of all


def train_count_net(run: Run, samples: list[Sample]) -> None:
    """Stage count: a CountNet learns the number of objects from count labels alone.

    It starts from the branches' backbone of ``run.start``; both together become OUT/weights.pt.
    """
    net, config = _start_of(run), run.preset.count
    if not config:
        raise InputError(f"the preset {run.preset.name} has no count network; give --preset best")
    if not net.config.count_head:
        raise InputError(f"{run.start_path} has no count head, which a count network adds to; name one that has")
    model = replace(net.config, count_net=config.size).build_count_net()
    model.backbone.load_state_dict(net.branches.backbone.state_dict())
    model.backbone.freeze(config.schedule.freeze)
    trained = run.out / "count" / "weights.pt"
    if not trained.exists():
        model.to(run.device).eval()
        chosen = evenly_spaced(samples)
        model.count_head.standardize(pooled_features(model.backbone, chosen, config.size, run.device))
    # Crops keep nearly everything: an object that is cut off still counts.
    dataset = TrainingImages(samples, config.size, crop=0.9, jitter=0.2, seed=run.seed)

    def losses(model: CountNet, batch: Batch, progress: float) -> Batch:
        return {"count": count_loss(model.count_head.logits(model.features(batch["image"])), batch["count"])}

    settings = {"backbone": net.config.backbone, "output_stride": net.config.output_stride, "size": config.size}
    run_stage(
        run,
        "count",
        model,
        dataset,
        losses,
        config.schedule,
        config=config,
        settings=settings,
        inputs=lambda: provenance.digest_inputs(samples, "count") | {START: digest.of_state(net.state_dict())},
    )
    if distributed.is_main():
        saved = checkpoint.load(trained)
        model.load_state_dict(saved["model"])
        _save(run, with_parts(net, count_net=model), "count", saved["settings"])


@torch.no_grad()
def fit_saliency_prior(run: Run, samples: list[Sample]) -> None:
    """Stage saliency-prior: a linear layer on frozen ImageNet features is distilled from S of ``run.start``.

    The photographs need no labels. Both together become OUT/weights.pt.
    """
    if not distributed.is_main():  # one pass over the photographs, in one process
        return
    net, config = _start_of(run).to(run.device), run.preset.saliency_prior
    if not config:
        raise InputError(f"the preset {run.preset.name} has no saliency prior; give --preset best")
    model = replace(net.config, saliency_prior=config.size).build_saliency_prior()
    load_pretrained(model.backbone, run.backbone_weights)
    settings = {
        "backbone": net.config.backbone,
        "output_stride": net.config.output_stride,
        "size": config.size,
        "prior_weights": config.prior_weights,
        "seed": run.seed,
    }
    inputs = {START: digest.of_state(net.state_dict()), "the backbone": digest.of_state(model.backbone.state_dict())}
    folder = make_folder(run.out / "saliency-prior")
    provenance.bind(folder, settings, inputs | provenance.digest_inputs(samples))
    model.weights.copy_(torch.tensor(config.prior_weights))
    model.to(run.device).eval()
    cells = max(1, min(CELLS, MOST_CELLS // len(samples)))
    generator = torch.Generator().manual_seed(run.seed)
    features, saliency = [], []
    for sample in tqdm(samples, desc="saliency prior", mininterval=2):
        image = to_tensor(load_square(sample.path, net.config.size))[None].to(run.device)
        of_image = model.features(image)[0]
        grid = (of_image.shape[1], of_image.shape[2])
        target = F.adaptive_avg_pool2d(net.saliency(image)[0], grid)
        chosen = torch.randperm(target.numel(), generator=generator)[:cells].to(run.device)
        features.append(of_image.flatten(1)[:, chosen].t())
        saliency.append(target.flatten()[chosen])
    model.fit(torch.cat(features), torch.cat(saliency))
    _save(run, with_parts(net, saliency_prior=model), "saliency-prior", settings)


def _start_of(run: Run) -> WSIDNet:
    if not run.start:
        raise InputError("this stage adds to a trained network; name its weights.pt with --init")
    return run.start


def _save(run: Run, net: WSIDNet, stage: str, settings: dict) -> None:
    assert run.start
    net.training_record = run.start.training_record | {stage: settings}
    save_weights(net, run.out / "weights.pt", note=origin(stage))
    print(f"{run.start_path} with the result of the stage {stage} is in {run.out / 'weights.pt'}")


def evenly_spaced(samples: list[Sample]) -> list[Sample]:
    """Some 500 to 1000 of the samples, evenly spaced: enough for a mean over the training set."""
    return samples[:: max(1, len(samples) // 500)]


@torch.no_grad()
def pooled_features(backbone: Backbone, samples: Sequence[Sample], size: int, device: torch.device) -> Tensor:
    """The input of the count head for photographs, resized to ``size``: [M,C_4 + C_5] of ``CountHead.pool``."""
    pooled = []
    for sample in tqdm(samples, desc="count", mininterval=2):
        image = to_tensor(load_square(sample.path, size))[None].to(device)
        pooled.append(CountHead.pool(backbone(image)))
    return torch.cat(pooled)
