"""What the stages of a training have in common: the ``Run``, and how one stage is trained and kept."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from datasets.labels import Sample
from engine.config import Machine, Preset, Schedule, settings_of
from engine.trainer import Losses, Show, autocast, train
from models.wsid_net import WSIDNet
from utils import checkpoint, distributed, provenance
from utils.cli import InputError, make_folder

START = "the weights that training starts from"


@dataclass(frozen=True)
class Run:
    """One training: what it learns from, with which settings, and where its results go.

    out: the folder, with a folder in it for every stage. samples: all photographs; each stage takes those whose labels
    it can use. device: of this process (engine.trainer.prepare_machine). pseudo_labels: the folder labels/ of another
    run, in place of OUT/labels. start: the network that training goes on from, in place of ImageNet weights, and
    start_path, its file. backbone_weights: a local file of ImageNet weights, in place of the download.
    """

    out: Path
    samples: list[Sample]
    preset: Preset
    machine: Machine
    device: torch.device
    seed: int = 0
    pseudo_labels: Path | None = None
    start: WSIDNet | None = None
    start_path: Path | None = None
    backbone_weights: Path | None = None

    @property
    def labels(self) -> Path:
        """The folder of the pseudo labels, with saliency/ and classes/."""
        return self.pseudo_labels or self.out / "labels"

    def autocast(self) -> AbstractContextManager:
        """The precision of the network, as a context."""
        return autocast(self.device, self.machine.amp)


def samples_with_count(run: Run) -> list[Sample]:
    """The samples with a count of at least one; InputError when there are none."""
    samples = [sample for sample in run.samples if sample.count]
    if not samples:
        raise InputError("no photograph has a count; name a source in --data that has them")
    return samples


def run_stage(
    run: Run,
    stage: str,
    model: nn.Module,
    dataset: Dataset,
    losses: Losses,
    schedule: Schedule,
    *,
    config: Any,
    settings: Mapping[str, Any],
    inputs: Callable[[], dict[str, str]],
    weights: Mapping[str, float] | None = None,
    show: Show | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Train one stage in OUT/STAGE and leave the result in its weights.pt.

    The file holds {"model": state, "config": fields of ``config``, the dataclass of the network, "preset": name,
    "settings": all values that the stage depends on}. settings: those beside ``schedule`` and the seed. inputs(): the
    digests of what the stage reads, for ``utils.provenance.bind``. weights: of the losses. finish(): called in the
    first process with the trained ``model`` before it is saved. A stage that is finished is not trained once more.
    """
    folder = make_folder(run.out / stage)
    resolved = settings_of(schedule, seed=run.seed) | dict(settings)
    distributed.run_on_main(lambda: provenance.bind(folder, resolved, inputs()))
    if (folder / "weights.pt").exists():
        if distributed.is_main():
            print(f"{stage}: already trained")
        return
    with distributed.context_on_main(SummaryWriter, folder) as writer:
        train(
            model.to(run.device),
            dataset,
            losses,
            schedule,
            run.machine,
            folder=folder,
            device=run.device,
            weights=weights,
            writer=writer,
            show=show,
            name=stage,
        )
    if distributed.is_main():
        if finish:
            finish()
        saved = {"config": asdict(config), "preset": run.preset.name, "settings": resolved}
        checkpoint.save({"model": model.state_dict()} | saved, folder / "weights.pt")
