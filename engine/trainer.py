"""One training loop for every stage: the optimizer, poly schedule, TensorBoard, a checkpoint to continue from."""

import math
import os
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets.loader import ResumableSampler, training_loader
from utils import checkpoint, distributed
from utils.cli import InputError, Stopped, integer, number, sigterm_event
from utils.progress import tqdm

try:
    import resource
except ImportError:  # Windows has none
    resource = None

LARGEST_SEED = 2**32 - 1
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
    machine.add_argument("--gpu", type=integer(-1), default=0, help="CUDA device; -1 is the CPU")
    machine.add_argument("--workers", type=integer(0, 256), default=2, help=workers)
    machine.add_argument("--amp", choices=("off", "bf16"), default="off", help="the network in bfloat16")
    machine.add_argument(
        "--accumulate",
        type=integer(1),
        default=1,
        metavar="N",
        help="compute each batch in N parts, for a GPU that cannot hold it",
    )
    machine.add_argument("--compile", action="store_true", help="let torch.compile fuse the network")
    machine.add_argument(
        "--deterministic", action="store_true", help="on a GPU too, the same weights every time, as far as PyTorch can"
    )
    machine.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0, help="of everything random")
    machine.add_argument("--save-seconds", type=number(0), default=60, help="time between two checkpoints")


def prepare_machine(args):
    """Join the other processes, if there are any, and settle the seed. Returns the torch.device of this one."""
    device = distributed.init(args.gpu)
    share = distributed.local_batch_size(args.batch_size)
    if args.accumulate > share:
        raise InputError(f"--accumulate {args.accumulate} asks for more parts than images; give 1 to {share}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # what cannot repeat itself is named, and goes on
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

    losses(model, batch, progress) -> dict of scalar losses whose sum is minimised; ``progress`` runs 0..1. A batch may
    be computed in several parts and by several processes, and has then the gradient of the whole if each loss is a mean
    over images, or a sum over images divided by their number in the part times a mean over the images of the whole
    batch: of what items have as "divisors" [K], batches have this mean [K].
    writer: a SummaryWriter in the first process, None in others; it also gets the learning rate, the norm of the
    gradient, images per second and memory. show(model, writer, step) is called at each epoch's end for pictures.
    folder / "checkpoint.pt" holds model, optimizer and iteration: the same call after a kill continues from it
    and ends with the weights of an uninterrupted run. Raises InputError when an image cannot be read, when a loss, a
    gradient or a weight stops being finite, and when memory does not suffice; Stopped on SIGTERM. After each of them
    the checkpoint is the last good state. The caller binds the folder to what it is made from (utils.provenance).
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
    remedy = f"lower --lr, and give another --out or delete {folder}"

    def save(step):
        """Of a state that is not finite the InputError; then, and when it cannot be written, what was saved stays."""
        if distributed.is_main():
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            if not checkpoint.is_finite(state):
                raise InputError(f"{name}: the weights are not finite after iteration {step - 1}; {remedy}")
            checkpoint.save_newest(state, folder / "checkpoint.pt")

    model.train()
    if schedule.compile:
        for part in model.children():
            part.compile()
    step_of = _Step(model, losses, device, schedule.amp)
    if distributed.world_size() > 1:
        # The branches leave the backbone's last convolution, which the classifier uses, without a gradient.
        step_of = DistributedDataParallel(step_of, find_unused_parameters=True)
    loader = training_loader(
        dataset,
        batch_size=schedule.batch_size,
        epochs=schedule.epochs,
        workers=schedule.workers,
        start=start,
        pin=device.type == "cuda",
    )
    steps = tqdm(range(start, total), folder.name, initial=start, total=total, disable=not distributed.is_main())
    saved_at = logged_at = time.monotonic()
    with sigterm_event() as stopped, loader as batches:
        for step in steps:
            with distributed.raise_in_all():
                batch = next(batches)
                if step > start and time.monotonic() - saved_at > schedule.save_seconds:
                    save(step)
                    saved_at = time.monotonic()
            if distributed.any_rank(stopped.is_set()):
                with distributed.raise_in_all():
                    save(step)
                raise Stopped
            rate = schedule.lr * (1 - step / total) ** GAMMA
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad(set_to_none=True)
            terms, norm = _backward(step_of, batch, step / total, schedule.accumulate, device)
            value = sum(terms.values())
            if not (math.isfinite(value) and math.isfinite(norm)):  # of all processes, so all of them stop here
                if checkpoint.is_finite(model.state_dict()):
                    save(step)
                what = f"gradient's norm is {norm}" if math.isfinite(value) else f"loss is {value}"
                raise InputError(f"{name}: the {what} at iteration {step}; {remedy}")
            optimizer.step()
            if step % 10 == 0:
                steps.set_postfix(loss=f"{value:.4f}", refresh=False)
                if writer:
                    speed = schedule.batch_size * min(step - start + 1, 10) / (time.monotonic() - logged_at)
                    logged_at = time.monotonic()
                    scalars = {"lr": rate, "images_per_second": speed, "gradient_norm": norm} | _memory(device)
                    for key, scalar in (terms | scalars).items():
                        writer.add_scalar(f"{name}/{key}", scalar, step)
            if show and writer and (step + 1) % sampler.per_epoch == 0 and not stopped.is_set():
                model.eval()
                with torch.no_grad():
                    show(model, writer, step + 1)
                model.train()
        with distributed.raise_in_all():
            save(total)
    model.eval()


def _backward(step_of, batch, progress, parts, device):
    """Add the gradient of one batch, computed in ``parts``.

    Returns {name: the loss as a float}, of the batch of all processes, and the norm of the gradient.
    """
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    shared, total = {}, {}
    if "divisors" in batch:
        shared["divisors"] = distributed.all_reduce_mean(batch.pop("divisors").mean(0))
    images = len(batch["image"])
    parts = zip(*(value.tensor_split(parts) for value in batch.values()), strict=True)
    try:
        for part in parts:
            part = dict(zip(batch, part, strict=True))
            weight = len(part["image"]) / images
            terms = {key: weight * term for key, term in step_of(part | shared, progress).items()}
            sum(terms.values()).backward()
            for key, term in terms.items():
                total[key] = total.get(key, 0.0) + term.detach()
        values = distributed.all_reduce_mean(torch.stack([*total.values()]).float())
        gradients = [parameter.grad for parameter in step_of.parameters() if parameter.grad is not None]
        norm, *values = torch.cat((torch.nn.utils.get_total_norm(gradients)[None], values)).tolist()
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        where = "GPU" if device.type == "cuda" else "machine"
        raise InputError(
            f"the {where}'s memory does not hold a batch; give --accumulate 2 or more, --amp bf16, or a smaller --size "
            "or --batch-size, and start the stage again"
        ) from error
    return dict(zip(total, values, strict=True)), norm


def _memory(device):
    """The peak so far in GiB, where it is known: of this process on the GPU, of its main memory on the CPU."""
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20} if resource else {}
