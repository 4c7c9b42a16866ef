"""One training loop for every stage: the optimizer, poly schedule, TensorBoard, a checkpoint to continue from."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from datasets.loader import ResumableSampler, training_loader
from engine.config import Machine, Schedule
from utils import checkpoint, distributed
from utils.cli import InputError
from utils.progress import tqdm
from utils.script import Stopped, sigterm_event

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

WEIGHT_DECAY, GAMMA = 1e-4, 0.9  # [IRN]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}

Batch = dict[str, Tensor]
Losses = Callable[[Any, Batch, float], dict[str, Tensor]]
Show = Callable[[nn.Module, SummaryWriter, int], None]


def prepare_machine(machine: Machine, seed: int, batch_sizes: Iterable[int]) -> torch.device:
    """Join the other processes, if there are any, and fix the seed. Returns the torch.device of this process.

    batch_sizes: of the stages that will run. InputError when one cannot be divided among the processes and parts.
    """
    device = distributed.init(machine.gpu)
    if machine.gpu is None and device.type == "cpu" and distributed.is_main():
        print("device: cpu")  # which trains much slower than a GPU
    images = min(distributed.local_batch_size(size) for size in batch_sizes)
    if machine.accumulate > images:
        raise InputError(f"--accumulate {machine.accumulate} asks for more parts than images; give 1 to {images}")
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # an operation without such a form warns and runs
    torch.backends.cudnn.benchmark = not machine.deterministic  # all batches of a stage have one shape
    torch.manual_seed(seed)
    return device


def parameter_groups(model: nn.Module, backbone_lr: float) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimizer, each with its ``scale`` of the learning rate:
    ``backbone_lr`` for the module named ``backbone``, 1 for the rest."""
    groups: dict[float, list[nn.Parameter]] = {backbone_lr: [], 1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[backbone_lr if name.startswith("backbone.") else 1.0].append(parameter)
    return [{"params": params, "scale": scale} for scale, params in groups.items()]


@torch.no_grad()
def _update_average(decay: float, averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
    """One step of an exponential moving average, in place. The decay is smaller in the first steps: the weights at the
    start of a training do not count for long."""
    share = max(1 - decay, 9 / (10 + float(updates)))
    for average, current in zip(averages, weights, strict=True):
        average.lerp_(current, share)


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The precision of a network that is trained or that makes labels, as a context; amp: of a ``Machine``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


class _Step(nn.Module):
    """The losses of one batch as the forward of a module, which DistributedDataParallel needs."""

    def __init__(self, model: nn.Module, losses: Losses, device: torch.device, amp: str) -> None:
        super().__init__()
        self.model, self.losses = model, losses
        self.autocast = partial(autocast, device, amp)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        with self.autocast():
            return self.losses(self.model, batch, progress)


def train(
    model: nn.Module,
    dataset: Dataset,
    losses: Losses,
    schedule: Schedule,
    machine: Machine,
    *,
    folder: Path,
    device: torch.device,
    weights: Mapping[str, float] | None = None,
    writer: SummaryWriter | None = None,
    show: Show | None = None,
    name: str = "train",
) -> None:
    """Train ``model`` in place with the poly schedule lr (1 - itr / max_itr)^0.9 (Sec. 4.1), after the linear warmup
    of the schedule, if it has one. With ``schedule.average`` the result is the moving average of the weights.

    dataset: items as of ``datasets.training.TrainingImages``, with a ``seed``.
    losses(model, batch, progress) -> {name: scalar loss}; ``progress`` runs 0..1. What is minimised is the sum of the
    losses, each times its entry in ``weights`` (default 1). A batch may be computed in several parts and by several
    processes. It has the gradient of the whole batch if each loss is a mean over images, or a sum over images divided
    by their number in the part times a mean over the images of the whole batch: a batch's "divisors" [K] are such
    means, of the "divisors" [K] of all its items.
    folder: for checkpoint.pt, which holds model, optimizer, average and iteration: the same call after a kill continues
    from it and ends with the weights of an uninterrupted run. The caller binds the folder to what it is made from
    (utils.provenance).
    writer: of the first process, None in the others; it gets every loss, under NAME/LOSS, and where the loss has a
    weight, its product with that under NAME/LOSS_weighted; the learning rate, the norm of the gradient, images per
    second, the fraction of the time in which the network waited for its images, and memory (GiB). show(model, writer,
    step): called at the end of each epoch, for images.
    Raises InputError when an image cannot be read, when a loss, a gradient or a weight is not finite, and when memory
    does not suffice; Stopped on SIGTERM. After each of them the checkpoint is the last finite state.
    """
    weights = weights or {}
    optimizer = OPTIMIZERS[schedule.optimizer](
        parameter_groups(model, schedule.backbone_lr), lr=schedule.lr, weight_decay=WEIGHT_DECAY
    )
    average = None
    if schedule.average:
        average = AveragedModel(model, multi_avg_fn=partial(_update_average, schedule.average))
    sampler = ResumableSampler(
        len(dataset),  # type: ignore[arg-type]
        schedule.batch_size,
        schedule.epochs,
        dataset.seed,  # type: ignore[attr-defined]
    )
    total, start = len(sampler), 0
    saved = checkpoint.load_newest(folder / "checkpoint.pt", device)
    if saved:
        model.load_state_dict(saved["model"])
        start = saved["step"]
        if average:
            average.load_state_dict(saved["average"])
    if start >= total:
        if average:
            model.load_state_dict(average.module.state_dict())
        print(f"{name}: already trained ({total} iterations)")
        return
    if saved:
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:  # other parameters were trained
            raise InputError(f"another version of this code began {folder}; delete it to begin anew") from error
    remedy = f"lower --lr, and give another --out or delete {folder}"

    def save(step: int) -> None:
        """InputError for a state that is not finite; the checkpoint before stays, as it does where writing fails."""
        if distributed.is_main():
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            if average:
                state["average"] = average.state_dict()
            if not checkpoint.is_finite(state):
                raise InputError(f"{name}: the weights are not finite after iteration {step - 1}; {remedy}")
            checkpoint.save_newest(state, folder / "checkpoint.pt")

    model.train()
    if machine.compile:
        for part in model.children():
            part.compile()
    step_of: nn.Module = _Step(model, losses, device, machine.amp)
    if distributed.world_size() > 1:
        # Filters of one input channel, as depthwise ones, have the same layout whatever their strides say.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        step_of = DistributedDataParallel(step_of)
    loader = training_loader(
        dataset,
        batch_size=schedule.batch_size,
        epochs=schedule.epochs,
        workers=machine.workers,
        start=start,
        pin=device.type == "cuda",
    )
    steps = tqdm(range(start, total), folder.name, initial=start, total=total, disable=not distributed.is_main())
    saved_at = logged_at = time.monotonic()
    waited = 0.0  # seconds since the last log in which the network waited for its images
    with sigterm_event() as stopped, loader as batches:
        for step in steps:
            with distributed.raise_in_all():
                asked_at = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked_at
                if step > start and time.monotonic() - saved_at > machine.save_seconds:
                    save(step)
                    saved_at = time.monotonic()
            if distributed.any_rank(stopped.is_set()):
                with distributed.raise_in_all():
                    save(step)
                raise Stopped
            rate = schedule.lr * (1 - step / total) ** GAMMA * min(1, (step + 1) / (schedule.warmup + 1))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad(set_to_none=True)
            terms, norm = _backward(step_of, batch, step / total, machine.accumulate, weights, device)
            weighted = {key: weights[key] * term for key, term in terms.items() if key in weights}
            value = sum((terms | weighted).values())
            if not (math.isfinite(value) and math.isfinite(norm)):  # values of all processes: all stop here
                if checkpoint.is_finite(model.state_dict()):
                    save(step)
                what = f"gradient's norm is {norm}" if math.isfinite(value) else f"loss is {value}"
                raise InputError(f"{name}: the {what} at iteration {step}; {remedy}")
            optimizer.step()
            if average:
                average.update_parameters(model)
            if step % 10 == 0:
                seconds = time.monotonic() - logged_at
                speed = schedule.batch_size * min(step - start + 1, 10) / seconds
                waiting = f"{waited / seconds:.0%}"
                steps.set_postfix(loss=f"{value:.4f}", images_per_second=f"{speed:.1f}", waiting=waiting, refresh=False)
                if writer:
                    scalars = {"lr": rate, "images_per_second": speed, "waiting": waited / seconds}
                    scalars |= {"gradient_norm": norm} | _memory(device)
                    scalars |= terms | {f"{key}_weighted": term for key, term in weighted.items()}
                    for key, scalar in scalars.items():
                        writer.add_scalar(f"{name}/{key}", scalar, step)
                logged_at, waited = time.monotonic(), 0.0
            if show and writer and (step + 1) % sampler.per_epoch == 0 and not stopped.is_set():
                model.eval()
                with torch.no_grad():
                    show(model, writer, step + 1)
                model.train()
        with distributed.raise_in_all():
            save(total)
    if average:
        model.load_state_dict(average.module.state_dict())
    model.eval()


def _backward(
    step_of: nn.Module,
    batch: Batch,
    progress: float,
    parts: int,
    weights: Mapping[str, float],
    device: torch.device,
) -> tuple[dict[str, float], float]:
    """Add the gradient of one batch, computed in ``parts``, of the weighted sum of its losses.

    Returns {name: loss, without its weight} over the batch of all processes, and the norm of the gradient.
    """
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    shared: Batch = {}
    total: Batch = {}
    if "divisors" in batch:
        shared["divisors"] = distributed.all_reduce_mean(batch.pop("divisors").mean(0))
    images = len(batch["image"])
    try:
        for values in zip(*(value.tensor_split(parts) for value in batch.values()), strict=True):
            part = dict(zip(batch, values, strict=True))
            fraction = len(part["image"]) / images
            terms = {key: fraction * term for key, term in step_of(part | shared, progress).items()}
            sum(weights.get(key, 1.0) * term for key, term in terms.items()).backward()  # type: ignore[union-attr]
            for key, term in terms.items():
                total[key] = total.get(key, 0.0) + term.detach()
        means = distributed.all_reduce_mean(torch.stack([*total.values()]).float())
        gradients = [parameter.grad for parameter in step_of.parameters() if parameter.grad is not None]
        norm, *scalars = torch.cat((torch.nn.utils.get_total_norm(gradients)[None], means)).tolist()
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        where = "GPU" if device.type == "cuda" else "machine"
        raise InputError(
            f"the {where}'s memory does not hold a batch; give --accumulate 2 or more, --amp bf16, or a smaller --size "
            "or --batch-size, and repeat the command"
        ) from error
    return dict(zip(total, scalars, strict=True)), norm


def _memory(device: torch.device) -> dict[str, float]:
    """The peak memory in GiB so far, where it can be measured: of this process on the GPU, or of it on the CPU."""
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20} if resource else {}
