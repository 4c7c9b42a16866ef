"""One training loop for every stage: the optimizer, poly schedule, TensorBoard, a checkpoint to continue from."""

import math
import os
import resource
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.training import ResumableSampler, training_loader
from utils import checkpoint, distributed
from utils.cli import InputError, Stopped, stop_signal

WEIGHT_DECAY, GAMMA = 1e-4, 0.9  # [IRN]
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}


@dataclass
class Schedule:
    """How long and how fast a stage trains: ``lr`` is that of the new layers, pretrained ones take lr * backbone_lr.

    batch_size: images per step of the optimizer, over all processes and parts. optimizer: a name of OPTIMIZERS.
    accumulate: parts that a batch is computed in, one after another. amp: "off", or "bf16" for the network in
    bfloat16. compile: whether torch.compile fuses the network. save_seconds: time between two checkpoints.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "sgd"
    backbone_lr: float = 1.0
    accumulate: int = 1
    amp: str = "off"
    compile: bool = False
    workers: int = 2
    seed: int = 0
    save_seconds: float = 60.0

    @classmethod
    def of(cls, args):
        """The schedule that a script's arguments of the same names describe; the defaults where it has none."""
        given = (field.name for field in fields(cls) if hasattr(args, field.name))
        return cls(**{name: getattr(args, name) for name in given})


def add_machine_arguments(parser, workers="processes that load images and run the CRF"):
    """The options of a training that do not change what is learned, up to rounding."""
    machine = parser.add_argument_group("machine; several GPUs: torchrun --nproc_per_node=N SCRIPT ...")
    machine.add_argument("--gpu", type=int, default=0, help="CUDA device; -1 is the CPU")
    machine.add_argument("--workers", type=int, default=2, help=workers)
    machine.add_argument("--amp", choices=("off", "bf16"), default="off", help="the network in bfloat16")
    machine.add_argument("--accumulate", type=int, default=1, metavar="N",
                         help="compute each batch in N parts, for a GPU that cannot hold it")  # fmt: skip
    machine.add_argument("--compile", action="store_true", help="let torch.compile fuse the network")
    machine.add_argument("--deterministic", action="store_true", help="on a GPU too, the same weights every time")
    machine.add_argument("--seed", type=int, default=0, help="of everything random")
    machine.add_argument("--save-seconds", type=float, default=60, help="time between two checkpoints")


def prepare_machine(args):
    """Join the other processes, if there are any, and settle the seed. Returns the torch.device of this one."""
    device = distributed.start(args.gpu)
    distributed.share_of_batch(args.batch_size)
    if args.accumulate < 1:
        raise InputError(f"--accumulate {args.accumulate} leaves nothing to compute; give 1 or more")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic  # all batches of a stage have one shape
    torch.manual_seed(args.seed)
    return device


def parameter_groups(model, backbone_lr):
    """Groups of the trainable parameters, each with its ``scale`` of the learning rate: ``backbone_lr`` for modules
    under the name ``backbone``, 1 for the rest."""
    groups = {backbone_lr: [], 1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[backbone_lr if name.startswith("backbone.") else 1.0].append(parameter)
    return [{"params": params, "scale": scale} for scale, params in groups.items()]


class _Step(nn.Module):
    """The losses of one batch as a module's forward, which is where DistributedDataParallel looks."""

    def __init__(self, model, losses, device, amp):
        super().__init__()
        self.model, self.losses = model, losses
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=amp == "bf16")

    def forward(self, batch, progress):
        with self.autocast():
            return self.losses(self.model, batch, progress)


def train(model, dataset, losses, schedule, *, folder, device, writer=None, show=None, name="train"):
    """Train ``model`` in place with the poly schedule lr (1 - itr / max_itr)^0.9 (Sec. 4.1).

    losses(model, batch, progress) -> dict of scalar losses whose sum is minimised; ``progress`` runs 0..1.
    writer: a SummaryWriter in the first process, None in others; it also gets the learning rate, the norm of the
    gradient, images per second and memory. show(model, writer, step) is called at each epoch's end for pictures.
    folder / "checkpoint.pt" holds model, optimizer and iteration: the same call after a kill continues from it
    and ends with the weights of an uninterrupted run. Raises InputError when a loss stops being finite, and when the
    GPU's memory does not suffice; Stopped on SIGTERM. After each of them the checkpoint is the last good state.
    The caller binds the folder to what it is made from (utils.provenance).
    """
    folder = Path(folder)
    optimizer = OPTIMIZERS[schedule.optimizer](
        parameter_groups(model, schedule.backbone_lr), lr=schedule.lr, weight_decay=WEIGHT_DECAY
    )
    sampler = ResumableSampler(len(dataset), schedule.batch_size, schedule.epochs, schedule.seed)
    total, start = len(sampler), 0
    saved = checkpoint.load_newest(folder / "checkpoint.pt", device)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    if start >= total:
        print(f"{name}: already trained ({total} iterations)")
        return

    def save(step):
        if distributed.is_first():
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            checkpoint.save_newest(state, folder / "checkpoint.pt")

    model.train()
    if schedule.compile:
        for part in model.children():
            part.compile()
    step_of = _Step(model, losses, device, schedule.amp)
    if distributed.size() > 1:
        # The branches leave the backbone's last convolution, which the classifier uses, without a gradient.
        step_of = DistributedDataParallel(step_of, find_unused_parameters=True)
    loader = training_loader(
        dataset, batch_size=schedule.batch_size, epochs=schedule.epochs, workers=schedule.workers, start=start,
        pin=device.type == "cuda",
    )  # fmt: skip
    bar = tqdm(loader, initial=start, total=total, desc=folder.name, mininterval=2, dynamic_ncols=True,
               disable=not distributed.is_first())  # fmt: skip
    saved_at = logged_at = time.monotonic()
    with stop_signal() as stopped:
        for step, batch in enumerate(bar, start):
            rate = schedule.lr * (1 - step / total) ** GAMMA
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad(set_to_none=True)
            terms = _backward(step_of, batch, step / total, schedule.accumulate, device)
            value = sum(terms.values())
            if not math.isfinite(value):
                if all(parameter.isfinite().all() for parameter in model.parameters()):
                    save(step)
                remedy = f"lower --lr, and give another --out or delete {folder}"
                raise InputError(f"{name}: the loss is {value} at iteration {step}; {remedy}")
            optimizer.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                if writer:
                    speed = schedule.batch_size * min(step - start + 1, 10) / (time.monotonic() - logged_at)
                    logged_at = time.monotonic()
                    scalars = {"lr": rate, "images_per_second": speed, "gradient_norm": _gradient_norm(model),
                               "memory_gib": _memory(device)}  # fmt: skip
                    for key, scalar in (terms | scalars).items():
                        writer.add_scalar(f"{name}/{key}", scalar, step)
            done = step + 1
            stop = distributed.anywhere(stopped.is_set())
            if done == total or stop or time.monotonic() - saved_at > schedule.save_seconds:
                save(done)
                saved_at = time.monotonic()
            if stop and done < total:
                raise Stopped
            if show and writer and done % sampler.per_epoch == 0:
                model.eval()
                with torch.no_grad():
                    show(model, writer, done)
                model.train()
    model.eval()


def _backward(step_of, batch, progress, parts, device):
    """Add the gradient of one batch, computed in ``parts``. Returns {name: the batch's loss as a float}."""
    batch = {key: value.to(device, non_blocking=True).chunk(parts) for key, value in batch.items()}
    parts = [dict(zip(batch, part)) for part in zip(*batch.values())]
    total = {}
    try:
        for part in parts:
            terms = step_of(part, progress)
            (sum(terms.values()) / len(parts)).backward()
            for key, term in terms.items():
                total[key] = total.get(key, 0.0) + term.item() / len(parts)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            "the GPU's memory does not hold a batch; give --accumulate 2 or more, --amp bf16, or a smaller --size or "
            "--batch-size, and start the stage again"
        ) from error
    return total


def _memory(device):
    """The peak so far in GiB: of this process on the GPU, of its main memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _gradient_norm(model):
    return torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item()
