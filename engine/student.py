"""The student network: Mask R-CNN trained on the instances that a trained network finds, in rounds [ours].

In each round a teacher finds instances in all photographs with a count, as many as were counted (r<N>/labels), and the
student is trained on these labels (r<N>/train). It is the teacher of the next round.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from datasets.images import read_image
from datasets.instances import InstanceImages
from datasets.labels import Sample
from datasets.training import read_label_map
from engine import tensorboard
from engine.config import Machine, StudentTrainingConfig, settings_of
from engine.post_processing import PostProcessor, to_arrays
from engine.predictor import Predictor
from engine.results import label_map
from engine.run import START
from engine.trainer import Batch, train
from models.backbones import load_pretrained
from models.mask_rcnn import MaskRCNN, StudentConfig, is_student, save_student
from models.wsid_net import load_network
from utils import checkpoint, digest, distributed, files, provenance
from utils.cli import InputError, make_folder, path_of
from utils.parallel import WorkerPool, batches_ahead
from utils.progress import tqdm

INITS = ("teacher", "imagenet")


@dataclass(frozen=True)
class StudentRun:
    """The training of a student network: what it learns from, with which settings, and where its results go.

    out: the folder, with a folder r<N> in it for every round. samples: photographs; those with a count are used.
    teacher: the weights file of the network that labels them in the first round. device: of this process
    (engine.trainer.prepare_machine). init: the weights that the first round starts from, one of ``INITS``
    or a file; every other round starts from the one before. backbone_weights: a local file of ImageNet weights, in
    place of the download.
    """

    out: Path
    samples: list[Sample]
    teacher: Path
    config: StudentTrainingConfig
    machine: Machine
    device: torch.device
    seed: int = 0
    init: str = "teacher"
    backbone_weights: Path | None = None


def train_student(run: StudentRun) -> Path:
    """All rounds of labelling and training; returns the file of the result, OUT/weights.pt.

    What is finished is passed over, what was stopped is continued. InputError where no photograph has a count above 0,
    and where the teacher finds the number of objects that was counted in none.
    """
    samples, teacher = [sample for sample in run.samples if sample.count is not None], run.teacher
    result = run.out / "weights.pt"
    distributed.run_on_main(checkpoint.require_own, result, is_student, teacher)
    if not any(sample.count for sample in samples):
        raise InputError("no photograph has a count above 0; name a source in --data that has them, as in labels.csv")
    with distributed.context_on_main(files.lock_folder, make_folder(run.out)):
        for r in range(1, run.config.rounds + 1):
            folder = make_folder(run.out / f"r{r}")
            labels = label_photographs(run, teacher, samples, make_folder(folder / "labels"))
            complete = [sample for sample in samples if is_complete(sample, labels)]
            if distributed.is_main():
                print(f"r{r}: as many instances as counted in {len(complete)} of {len(samples)} photographs")
            if not any(sample.count for sample in complete):
                raise InputError(f"{teacher} finds as many instances as were counted in no photograph; train it longer")
            # Labels are better where their network was trained at full resolution.
            config = run.config if r == run.config.rounds else replace(run.config, resolution=1.0)
            init = run.init if r == 1 else "teacher"
            train_round(replace(run, config=config, init=init), teacher, complete, labels, folder)
            teacher = folder / "weights.pt"
        distributed.run_on_main(lambda: checkpoint.save(checkpoint.load(teacher), result))
    return result


def label_photographs(run: StudentRun, teacher: Path, samples: list[Sample], folder: Path) -> Path:
    """Write ``folder``/instances/<stem>.png for every Sample with objects; returns the folder of these files.

    Each is the label map, uint8 of the photograph's size, of the instances that the ``teacher`` finds when the count is
    given. Those already there are kept: the folder is bound to the teacher, and each file to its photograph and count.
    """
    labels, samples = folder / "instances", [sample for sample in samples if sample.count]
    inputs = {"the teacher": digest.of_file(teacher)}
    photographs = provenance.describe_photographs(samples, "count")
    precision = run.machine.precision_of_labels
    distributed.run_on_main(
        provenance.bind, folder, precision, inputs, photographs, lambda s: (labels / f"{s}.png").exists()
    )
    make_folder(labels)
    todo = [sample for sample in distributed.shard(samples) if not (labels / f"{sample.stem}.png").exists()]
    if todo:
        predictor = Predictor(teacher, run.device, amp=run.machine.amp, refine=False)
        with WorkerPool(run.machine.workers) as pool:
            outputs = network_outputs(predictor, todo)
            for sample, size, output in tqdm(outputs, "labels", total=len(todo), mininterval=2):
                path = labels / f"{sample.stem}.png"
                pool.submit(write_label_map, path, predictor.post_process, to_arrays(output), size, sample.count)
    distributed.barrier()
    return labels


def network_outputs(predictor: Predictor, samples: list[Sample]) -> Iterator[tuple[Sample, tuple[int, int], Any]]:
    """Each Sample with the size (H, W) of its photograph and the output of the network for it, Maps or Detections."""

    def load(sample: Sample) -> Any:
        image = read_image(sample.path)
        return sample, image.shape[:2], predictor.prepare(image)

    for batch in batches_ahead(load, samples, predictor.device):
        outputs = predictor.network([inputs for *_, inputs in batch])
        yield from ((*entry[:2], output) for entry, output in zip(batch, outputs, strict=True))


def write_label_map(path: Path, post_process: PostProcessor, output: Any, size: tuple[int, int], count: int) -> None:
    """Write the label map of the instances of a photograph with ``count`` objects, in a worker process.

    output: of the network, as of ``to_arrays``; size: (H, W) of the photograph.
    """
    files.save_png(label_map(post_process(output, size, count).masks), path)


def is_complete(sample: Sample, labels: Path) -> bool:
    """Whether the label map of a Sample shows as many instances as were counted."""
    return sample.count == 0 or read_label_map(labels / f"{sample.stem}.png").max() == sample.count


def train_round(run: StudentRun, teacher: Path, samples: list[Sample], labels: Path, folder: Path) -> None:
    """Train a student on the samples and their label maps ``labels``, in ``folder``/train. Result:
    ``folder``/weights.pt."""
    config = run.config
    torch.manual_seed(run.seed)  # new layers start the same in every round
    model = MaskRCNN(student_config(config))
    settings = settings_of(config, seed=run.seed)
    del settings["rounds"]  # more rounds may be added, where the last one does not reduce photographs
    maps = digest.of_files(labels / f"{sample.stem}.png" for sample in samples if sample.count)
    inputs = provenance.digest_inputs(samples, "count") | {"an instance label": digest.of_value(maps)}
    inputs[START] = initialize(run, model, teacher)
    distributed.run_on_main(provenance.bind, make_folder(folder / "train"), settings, inputs)
    if distributed.run_on_main((folder / "weights.pt").exists):
        return
    freeze(model, config)
    # The mask head sees another number of regions in every batch: cuDNN would search for the fastest kernels each time.
    torch.backends.cudnn.benchmark = False
    augmentation = {name: getattr(config, name) for name in ("crop", "copy_paste", "exposure", "resolution")}
    dataset = InstanceImages(samples, labels, config.size, seed=run.seed, **augmentation)
    with distributed.context_on_main(SummaryWriter, folder / "train") as writer:
        train(
            model.to(run.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            dataset,
            losses,
            config.schedule,
            run.machine,
            folder=folder / "train",
            device=run.device,
            writer=writer,
            show=partial(tensorboard.show_student, samples=samples[:8], labels=labels, device=run.device),
            name="student",
        )
    distributed.run_on_main(save_student, model, folder / "weights.pt", settings)


def student_config(config: StudentTrainingConfig) -> StudentConfig:
    """The architecture that the settings of a training describe."""
    channels = config.pyramid_channels
    return StudentConfig(config.backbone, config.size, channels, mask_width=channels)


def initialize(run: StudentRun, model: MaskRCNN, teacher: Path) -> str:
    """Give a new network its starting weights, as far as those of ``run.init`` fit; returns their digest.

    A student network of the same architecture (at any size) gives all of them. Else a network of the same backbone
    gives that, a WSID-Net that of its saliency branch, and otherwise ImageNet does.
    """
    start = None
    if run.init != "imagenet":
        start = load_network(teacher if run.init == "teacher" else path_of(run.init))
    source: nn.Module = model.backbone
    if isinstance(start, MaskRCNN) and replace(start.config, size=model.config.size) == model.config:
        source = start
        model.load_state_dict(source.state_dict())
    elif start and start.config.backbone == model.config.backbone:
        source = start.backbone if isinstance(start, MaskRCNN) else start.saliency.backbone
        model.backbone.load_state_dict(source.state_dict())
    else:
        load_pretrained(model.backbone, run.backbone_weights)
    return digest.of_state(source.state_dict())


def freeze(model: MaskRCNN, config: StudentTrainingConfig) -> None:
    """Freeze the levels f1..f<freeze> of the backbone and, with ``freeze_depthwise``, all of its depthwise filters."""
    model.backbone.freeze(config.schedule.freeze)
    for module in model.backbone.modules() if config.freeze_depthwise else ():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.requires_grad_(False)


def losses(model: MaskRCNN, batch: Batch, progress: float) -> Batch:
    """The losses of a batch of InstanceImages. The regions that are sampled depend on ``progress`` alone, so that a
    training that was stopped continues as it would have."""
    torch.manual_seed(round(progress * 2**40))
    return model.losses(batch["image"], batch["labels"])
