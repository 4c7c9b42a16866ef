"""One training loop for every stage: SGD, poly schedule, TensorBoard, a checkpoint to continue from."""

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.training import ResumableSampler, training_loader
from utils import checkpoint
from utils.cli import InputError

MOMENTUM, WEIGHT_DECAY, GAMMA = 0.9, 1e-4, 0.9  # [IRN]


@dataclass
class Schedule:
    """How long and how fast a stage trains: ``lr`` is that of the new layers, pretrained ones take lr * backbone_lr.

    save_seconds: time between two checkpoints.
    """

    epochs: int
    batch_size: int
    lr: float
    backbone_lr: float = 1.0
    workers: int = 2
    seed: int = 0
    save_seconds: float = 60.0

    @classmethod
    def of(cls, args):
        """The schedule that a script's arguments of the same names describe."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


CENTROID_LR = 10.0  # times lr for the centroid branch, whose outputs are tens of pixels [IRN]


def parameter_groups(model, backbone_lr):
    """SGD groups of the trainable parameters, each with its ``scale`` of the learning rate: ``backbone_lr`` for
    modules under the name ``backbone``, CENTROID_LR for those under ``centroid``, 1 for the rest."""
    scales = {"backbone": backbone_lr, "centroid": CENTROID_LR}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scales.get(name.split(".")[0], 1.0), []).append(parameter)
    return [{"params": params, "scale": scale} for scale, params in groups.items()]


def train(model, dataset, losses, schedule, *, folder, config, device, writer=None, show=None, name="train"):
    """Train ``model`` in place with SGD and the poly schedule lr (1 - itr / max_itr)^0.9 (Sec. 4.1).

    losses(model, batch, progress) -> dict of scalar losses whose sum is minimised; ``progress`` runs 0..1.
    show(model, writer, step) is called at the end of each epoch for pictures.
    folder / "checkpoint.pt" holds model, optimizer and iteration: the same call after a kill continues from it
    and ends with the weights of an uninterrupted run. Raises InputError when the folder belongs to another
    ``config``, and when a loss stops being finite.
    """
    folder = Path(folder)
    checkpoint.claim(folder, config)
    path = folder / "checkpoint.pt"
    optimizer = torch.optim.SGD(
        parameter_groups(model, schedule.backbone_lr), lr=schedule.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    sampler = ResumableSampler(len(dataset), schedule.batch_size, schedule.epochs, schedule.seed)
    total, start = len(sampler), 0
    if path.exists():
        saved = checkpoint.load(path, device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    if start >= total:
        print(f"{name}: already trained ({total} iterations)")
        return
    model.train()
    loader = training_loader(
        dataset, batch_size=schedule.batch_size, epochs=schedule.epochs, workers=schedule.workers, start=start
    )
    bar = tqdm(loader, initial=start, total=total, desc=name, mininterval=2, dynamic_ncols=True)
    saved_at = time.monotonic()
    for step, batch in enumerate(bar, start):
        rate = schedule.lr * (1 - step / total) ** GAMMA
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        terms = losses(model, batch, step / total)
        loss = sum(terms.values())
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"{name}: the loss is {value} at iteration {step}; lower --lr and start the stage again")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
            if writer:
                for key, term in terms.items():
                    writer.add_scalar(f"{name}/{key}", term.item(), step)
                writer.add_scalar(f"{name}/lr", rate, step)
        done = step + 1
        if done == total or time.monotonic() - saved_at > schedule.save_seconds:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            checkpoint.save(state, path)
            saved_at = time.monotonic()
        if show and writer and done % sampler.per_epoch == 0:
            model.eval()
            with torch.no_grad():
                show(model, writer, done)
            model.train()
    model.eval()
