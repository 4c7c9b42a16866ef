"""The progressive training scheme of the saliency branch: Algorithm 1 (Sec. 3.4)."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from datasets.labels import Sample
from datasets.training import TrainingImages, read_label_map
from datasets.transforms import load_square, network_input, resize
from engine import cam_labels, tensorboard
from engine.config import PtsConfig, settings_of
from engine.instance_labels import Maps, instance_label, pseudo_mask
from engine.run import Run
from engine.stages import saliency_losses
from engine.trainer import train
from models.count_head import expected_count
from models.wsid_net import WSIDNet, read_weights, save_weights
from utils import checkpoint, digest, distributed, files, provenance
from utils.cli import InputError, make_folder
from utils.parallel import WorkerPool, batches_ahead
from utils.progress import tqdm

State = dict[str, Tensor]


def progressive_training(run: Run) -> None:
    """Algorithm 1 from OUT/weights.pt on: R iterations, each in OUT/pts/r<N>. Result: OUT/weights_pts.pt.

    In iteration r the network labels all ``run.samples`` (r<N>/labels), its saliency branch is trained E epochs on
    these labels, and from r = 3 on averaged with the one before (Eq. 8). ``run.labels`` holds the initial pseudo masks
    of the samples with classes. An iteration that is finished is passed over, one that was stopped is continued.
    """
    config, start = run.preset.pts, run.out / "weights.pt"
    if not start.exists():
        raise InputError(f"there is no trained network at {start}; run train_branches.py --out {run.out} first")
    net, start_digest = read_weights(start, run.device)
    net.config = replace(net.config, size=config.size or net.config.size)
    others = {name: value for name, value in net.state_dict().items() if not name.startswith("saliency.")}
    inputs = distributed.run_on_main(_inputs, run, digest.of_state(others))
    previous = _clone(net.saliency.state_dict())
    with distributed.context_on_main(files.lock_folder, make_folder(run.out / "pts")):
        for r in range(1, config.iterations + 1):
            folder = make_folder(run.out / "pts" / f"r{r}")
            distributed.run_on_main(_bind, run, net, inputs, previous, folder)
            labelled = make_labels(run, net, folder)  # of a finished iteration too: labels that were deleted
            finished = folder / "weights.pt"
            if distributed.run_on_main(finished.exists):  # else a process might see what the first one is writing
                current = checkpoint.load(finished, run.device)["model"]
            else:
                if config.schedule.epochs:
                    train_iteration(run, net, labelled, folder, r)
                current = refresh(previous, net.saliency.state_dict(), r)
                if distributed.is_main():
                    checkpoint.save({"model": current, "config": asdict(net.config)}, finished)
                distributed.barrier()
            net.saliency.load_state_dict(current)
            previous = _clone(current)
    net.training_record = net.training_record | {"pts": settings_of(config, seed=run.seed, preset=run.preset.name)}
    note = f"train_pts.py, {config.iterations} iterations"
    distributed.run_on_main(save_weights, net, run.out / "weights_pts.pt", note, start_digest)
    if distributed.is_main():
        print(f"the network is in {run.out / 'weights_pts.pt'}; try it: python infer.py --img samples")


def refresh(previous: Mapping[str, Tensor], current: Mapping[str, Tensor], iteration: int) -> State:
    """Model refreshing, Eq. 8: alpha w_{r-1} + (1 - alpha) w_r with alpha = r / (r + 1), from iteration r = 3 on.

    previous, current: state dicts of one network. Returns a new state dict; before r = 3 it equals ``current``, and
    tensors of integers always are those of ``current``.
    """
    if iteration <= 2:
        return dict(current)
    alpha = iteration / (iteration + 1)
    return {
        key: alpha * previous[key] + (1 - alpha) * value if value.is_floating_point() else value
        for key, value in current.items()
    }


def _clone(state: Mapping[str, Tensor]) -> State:
    return {key: value.clone() for key, value in state.items()}


def _inputs(run: Run, network: str) -> dict[str, str]:
    """The digests of what all iterations read: photographs, initial pseudo labels, and the ``network`` but for S."""
    labelled = [sample for sample in run.samples if sample.classes]
    cam_labels.require(run.labels, labelled, "run train_branches.py --stage labels on those with classes")
    provenance.check_unchanged(run.labels, {}, labelled)
    initial = cam_labels.inputs(run.labels, labelled, "saliency", "classes")
    return provenance.digest_inputs(run.samples, "classes", "count") | {
        "an initial pseudo label": digest.of_value(initial),
        "the network": network,
    }


def _bind(run: Run, net: WSIDNet, inputs: dict[str, str], saliency: State, folder: Path) -> None:
    """Bind the folder of an iteration to its settings, its inputs and the saliency branch that it starts from."""
    settings = settings_of(run.preset.pts, seed=run.seed, size=net.config.size)
    del settings["iterations"]  # more of them may be added
    start = {"the saliency branch that the iteration starts from": digest.of_state(saliency)}
    provenance.bind(folder, settings, inputs | start)
    photographs = provenance.describe_photographs(run.samples, "classes", "count")
    # The saliency branch that is trained on these labels, for a network whose branches are trained on them.
    made_by = {"saliency_branch": "../weights.pt"} | run.machine.precision_of_labels
    provenance.bind(make_folder(folder / "labels"), made_by, photographs=photographs)


def make_labels(run: Run, net: WSIDNet, folder: Path) -> list[Sample]:
    """Pseudo label generation (Sec. 3.4.1), for all photographs in which an instance is found.

    Writes ``folder``/labels/saliency/<stem>.png and, for photographs with labels, classes/<stem>.png (see
    ``write_label``). Returns the samples that have a label.
    """
    net.eval()
    labels = folder / "labels"
    for kind in ("saliency", "classes"):
        make_folder(labels / kind)
    own = distributed.shard(run.samples)
    todo = [sample for sample in own if not is_tried(labels, sample)]
    with WorkerPool(run.machine.workers) as pool:
        done = len(own) - len(todo)
        outputs = network_outputs(run, net, todo)
        for sample, square, maps, count in tqdm(
            outputs, f"{folder.name}: labels", initial=done, total=len(own), mininterval=2
        ):
            initial = run.labels if sample.classes else None
            pool.submit(write_label, labels, sample, square, maps, count, run.preset.pts, initial)
    distributed.barrier()
    # Photographs without an instance have a <stem>.none, so that a run that was stopped does not repeat them.
    found = [sample for sample in run.samples if not (labels / "saliency" / f"{sample.stem}.none").exists()]
    if not found:
        raise InputError(f"the network finds no salient instance in any photograph; train the run {run.out} longer")
    if distributed.is_main():
        print(f"{folder.name}: {len(found)} of {len(run.samples)} photographs show salient instances")
    return found


@torch.no_grad()
def network_outputs(
    run: Run, net: WSIDNet, samples: list[Sample]
) -> Iterator[tuple[Sample, np.ndarray, list[np.ndarray], int]]:
    """Each Sample with its square, uint8 RGB [S,S,3], its maps S [h,w], B [h,w] and V [2,h,w], and the predicted number
    of objects. The maps are arrays, which pass to another process without shared memory."""

    def load(sample: Sample) -> tuple[Sample, np.ndarray, tuple[Tensor, Tensor]]:
        square = load_square(sample.path, net.config.size)
        return sample, square, network_input(square, net.config.canny, "cpu")

    for batch in batches_ahead(load, samples, run.device):
        inputs = (torch.cat(part).to(run.device) for part in zip(*(entry[-1] for entry in batch), strict=True))
        with run.autocast():
            output = net(*inputs)
        maps = [m.float().cpu().numpy() for m in (output.saliency, output.boundary, output.offsets)]
        numbers = expected_count(output.count_probs.float()).tolist()
        for (sample, square, _), number, *of_one in zip(batch, numbers, *maps, strict=True):
            yield sample, square, of_one, int(number)


def is_tried(labels: Path, sample: Sample) -> bool:
    """Whether ``write_label`` is finished with a photograph.

    Its saliency/<stem>.png then exists or, if it has no classes and so no initial mask, its <stem>.none.
    """
    suffixes = (".png",) if sample.classes else (".png", ".none")
    return any((labels / "saliency" / f"{sample.stem}{suffix}").exists() for suffix in suffixes)


def write_label(
    labels: Path,
    sample: Sample,
    image: np.ndarray,
    arrays: list[np.ndarray],
    count: int,
    config: PtsConfig,
    initial: Path | None,
) -> None:
    """The labels of one photograph, in a worker process.

    saliency/<stem>.png is its next pseudo mask. If no instance is found, an empty <stem>.none marks it (not trained
    on); if it has an initial mask, that is saved as <stem>.png, too.

    With ``config.instance_labels``, classes/<stem>.png is for a later training of the branches. It holds
    - the instances, where as many are found as the count label says;
    - else the initial class labels, where there are any;
    - else it is missing, and an empty classes/<stem>.none is written.

    image: uint8 RGB [S,S,3]; arrays: S [h,w], B [h,w] and V [2,h,w], as of ``Maps``; count: the predicted number of
    objects; initial: the folder of its initial pseudo labels, None where it has none.
    """
    maps = Maps(*map(torch.from_numpy, arrays))
    size, png = image.shape[0], f"{sample.stem}.png"
    mask = classes = instances = None
    if initial:
        mask = resize(read_label_map(initial / "saliency" / png), size) / 255
        classes = read_label_map(initial / "classes" / png, size)
    label = pseudo_mask(
        image,
        maps,
        count,
        config.fusion,
        config.saliency_weight,
        mask,
        config.init_mask_weight,
    )
    found = label is not None
    if label is None:
        label = mask
    elif sample.count and config.instance_labels:
        instances = instance_label(label, maps, sample.count, config.fusion, classes)
    if config.instance_labels:
        if instances is not None:
            classes = instances
        if classes is not None:
            files.save_png(classes, labels / "classes" / png)
        else:
            (labels / "classes" / f"{sample.stem}.none").touch()
    # Last what ``is_tried`` looks for, so that a photograph is repeated after a kill in between.
    without = labels / "saliency" / f"{sample.stem}.none"
    if found:
        without.unlink(missing_ok=True)
    else:
        without.touch()
    if label is not None:
        files.save_png(np.round(label * 255).astype(np.uint8), labels / "saliency" / png)


def train_iteration(run: Run, net: WSIDNet, samples: list[Sample], folder: Path, r: int) -> None:
    """Lines 2-4 of Algorithm 1: E epochs of the saliency branch on the labels in ``folder``, in place."""
    schedule, size = run.preset.pts.schedule, net.config.size
    net.saliency.backbone.freeze(schedule.freeze)
    maps = {"pseudo_saliency": folder / "labels" / "saliency"}
    dataset = TrainingImages(samples, size, crop=0.7, jitter=0.2, maps=maps, seed=run.seed + r)
    show = partial(
        tensorboard.show_saliency, samples=samples[:8], size=size, device=run.device, labels=folder / "labels"
    )
    with distributed.context_on_main(SummaryWriter, folder) as writer:
        train(
            net.saliency,
            dataset,
            saliency_losses,
            schedule,
            run.machine,
            folder=folder,
            device=run.device,
            writer=writer,
            show=show,
            name="pts",
        )
