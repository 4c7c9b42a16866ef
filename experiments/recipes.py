"""Whole trainings: from ImageNet weights through all stages of a preset to one network, OUT/weights.pt.

    python -m experiments.recipes paper --data TRAIN --out runs/paper                           # the paper's schedule
    python -m experiments.recipes best --data TRAIN --cam-data MORE --counted MORE@count --out runs/best
    python -m experiments.recipes small --data TRAIN --out runs/small --gpu -1                  # for two CPU cores
    python -m experiments.recipes paper_small --data TRAIN --out runs/paper_small --gpu -1      # the paper on them
    python -m experiments.recipes quick --data TRAIN --out runs/quick --gpu -1                  # a trial, minutes

Every stage has a folder in OUT. A training that was stopped continues when the same command is given again.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from datasets.training import read_samples
from engine import options
from engine.config import Machine, NetConfig, Preset, StudentTrainingConfig, override
from engine.predictor import bfloat16_pays
from engine.presets import BEST, PAPER
from engine.pts import progressive_training
from engine.run import Run
from engine.stages import run_stages
from engine.student import StudentRun, train_student
from engine.trainer import prepare_machine
from models.fusion_config import FusionConfig
from train_pts import with_unlabelled
from utils import checkpoint, distributed
from utils.cli import InputError, Parser, path_of
from utils.script import run

# The paper's method with a small backbone and networks of 256 px and 64 channels. Their schedules are those of BEST:
# with the paper's, on some thousand photographs, V stays 0. The activation maps are those of the paper's 512 px: on
# val, masks made of maps of 256 px have an IoU of .39 with the objects, those of 512 px .48.
_SMALL_PAPER = override(PAPER, {"backbone": "tf_efficientnet_lite0"})
PAPER_SMALL = replace(
    _SMALL_PAPER,
    name="paper_small",
    network=replace(_SMALL_PAPER.network, size=256, channels=64),
    branches=replace(PAPER.branches, schedule=BEST.branches.schedule),
    saliency=BEST.saliency,
    pts=replace(PAPER.pts, schedule=BEST.pts.schedule, iterations=BEST.pts.iterations),
)

# BEST with a smaller backbone. After this short training, masks are best cut at half of their own peak and scored by S.
SMALL = replace(
    BEST,
    name="small",
    network=NetConfig("mobilenetv2_100", size=256, channels=64),
    fusion=FusionConfig(grouping="count", mask_rule="peak", mask_thresh=0.5, count_aware_scores=False),
)
QUICK = replace(
    override(
        SMALL,
        {
            "backbone": "tf_efficientnet_lite0",
            "size": 128,
            "channels": 32,
            "pyramid_channels": 32,
            "batch_size": 8,
            "epochs": 2,
            "rounds": 1,
        },
    ),
    name="quick",
)
RECIPES = {preset.name: preset for preset in (PAPER, PAPER_SMALL, BEST, SMALL, QUICK)}


@dataclass(frozen=True)
class Data:
    """The photographs of a training, as sources PATH[@SPLIT] (datasets.sources).

    labelled: with class labels and counts. cam: more with class labels, for the classifier. counted: more with a count,
    for the student network. unlabelled: folders of more photographs for PTS. pseudo_labels: the folder labels/ of
    another run; None trains a classifier for them.
    """

    labelled: tuple[str, ...]
    cam: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    pseudo_labels: Path | None = None


@dataclass(frozen=True)
class Setup:
    """What the stages of a training have in common: the photographs, the machine and its device, and the seed.

    backbone_weights: {backbone: file of its ImageNet weights}, in place of downloads.
    """

    data: Data
    machine: Machine
    device: torch.device
    seed: int = 0
    backbone_weights: Mapping[str, Path] = field(default_factory=dict)

    def run(
        self,
        preset: Preset,
        out: Path,
        *more: str,
        unlabelled: Sequence[str] = (),
        pseudo_labels: Path | None = None,
        backbone: str | None = None,
    ) -> Run:
        """The Run of a stage in the folder ``out``, with the labelled photographs, those of the sources in ``more`` and
        those in the folders ``unlabelled``.

        pseudo_labels: the folder of these; backbone: that of the stage, where it is not that of the network.
        """
        samples = with_unlabelled(read_samples([*self.data.labelled, *more]), list(unlabelled))
        file = self.backbone_weights.get(backbone or preset.network.backbone)
        return Run(out, samples, preset, self.machine, self.device, self.seed, pseudo_labels, backbone_weights=file)


def train_labels(setup: Setup, preset: Preset, out: Path) -> Path:
    """The CAM classifier and its pseudo labels. Returns their folder, out/labels."""
    run_stages(setup.run(preset, out, *setup.data.cam, backbone=preset.cam.backbone), ["cam"])
    run_stages(setup.run(preset, out), ["labels"])
    return out / "labels"


def train_network(setup: Setup, preset: Preset, out: Path, labels: Path) -> Path:
    """The branches and the saliency branch, on the pseudo labels in ``labels``. Returns out/weights.pt."""
    run_stages(setup.run(preset, out, pseudo_labels=labels), ["branches", "saliency"])
    return out / "weights.pt"


def train_progressively(setup: Setup, preset: Preset, out: Path, labels: Path) -> Path:
    """PTS from out/weights.pt on; labels: the initial pseudo labels. Returns out/weights_pts.pt."""
    progressive_training(setup.run(preset, out, unlabelled=setup.data.unlabelled, pseudo_labels=labels))
    return out / "weights_pts.pt"


def train_student_on(setup: Setup, config: StudentTrainingConfig, out: Path, teacher: Path) -> Path:
    """The student network, on the instances that the network in the file ``teacher`` finds in all photographs with a
    count [ours]. Returns out/weights.pt."""
    samples = read_samples([*setup.data.labelled, *setup.data.counted])
    file = setup.backbone_weights.get(config.backbone)
    machine, device = setup.machine, setup.device
    if bfloat16_pays(device):  # the labels of the stages before are made in float32
        machine = replace(machine, amp="bf16")
    return train_student(StudentRun(out, samples, teacher, config, machine, device, setup.seed, "imagenet", file))


def train_preset(setup: Setup, preset: Preset, out: Path) -> Path:
    """All stages of a preset. Returns out/weights.pt; InputError when another training has made that file."""
    path, note = out / "weights.pt", f"experiments.recipes {preset.name}"
    distributed.run_on_main(checkpoint.require_own, path, lambda saved: saved.get("note") == note)
    teacher = out / "wsid_net"
    labels = setup.data.pseudo_labels or train_labels(setup, preset, teacher)
    weights = train_network(setup, preset, teacher, labels)
    if preset.student:
        # Its rounds stand for those of PTS, which make the labels of the first one no better (docs/results.md).
        weights = train_student_on(setup, preset.student, out / "student", weights)
    else:
        weights = train_progressively(setup, preset, teacher, labels)
    distributed.run_on_main(_publish, weights, path, note)
    return path


def _publish(weights: Path, path: Path, note: str) -> None:
    checkpoint.save(checkpoint.load(weights) | {"note": note}, path)
    print(f"the network with all stages is in {path}; try it: python infer.py --img samples --weights {path}")


def link(name: Path, target: Path) -> None:
    """Make the path ``name`` a symbolic link to ``target``, unless it is a file or folder.

    The link is relative, so that a folder of runs can be moved. A link to another place, as in a copy of such a folder,
    is replaced.
    """
    if name.is_symlink() and name.resolve() != target.resolve():
        name.unlink()
    if not name.exists():
        name.symlink_to(os.path.relpath(target.resolve(), name.parent.resolve()))


def batch_sizes(preset: Preset) -> list[int]:
    """The batch sizes of all stages of a preset."""
    trained = [preset.cam, preset.branches, preset.saliency, preset.pts, preset.student]
    return [config.schedule.batch_size for config in trained if config]


def add_setup_options(parser: Parser, out: str) -> None:
    """The options of a ``Setup`` beside those of the machine, and --out."""
    parser.add_argument("--data", nargs="+", default=["data"], metavar="PATH[@SPLIT]", help="labelled photographs")
    more = [
        ("--cam-data", "PATH[@SPLIT]", "more photographs with class labels, for the classifier"),
        ("--counted", "PATH@count", "more photographs with a count, for the student network"),
        ("--unlabelled", "DIR", "more photographs for PTS"),
    ]
    for name, metavar, text in more:
        parser.add_argument(name, nargs="*", default=[], metavar=metavar, help=text)
    parser.add_argument(
        "--pseudo-labels",
        type=path_of,
        metavar="DIR",
        help="pseudo labels of another run (its labels/), in place of the stages cam and labels",
    )
    parser.add_argument(
        "--backbone-weights",
        nargs="*",
        type=named_path,
        default=[],
        metavar="NAME=FILE",
        help="local ImageNet weights of backbones, instead of the download",
    )
    parser.add_argument("--out", type=path_of, default=Path(out), help="folder of the training")


def named_path(argument: str) -> tuple[str, Path]:
    """NAME=PATH -> (NAME, PATH)."""
    name, _, path = argument.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{argument!r} does not fit; give NAME=PATH")
    return name, path_of(path)


def setup_of(args: argparse.Namespace, device: torch.device, seed: int) -> Setup:
    """The Setup that the options describe."""
    labelled, cam, counted, unlabelled = map(tuple, (args.data, args.cam_data, args.counted, args.unlabelled))
    data = Data(labelled, cam, counted, unlabelled, args.pseudo_labels)
    return Setup(data, options.machine_of(args), device, seed, dict(args.backbone_weights))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m experiments.recipes", description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    add_setup_options(parser, "runs/recipe")
    options.add_machine_options(parser)
    args = parser.parse_args(argv)
    preset = RECIPES[args.recipe]
    if args.unlabelled and preset.student:
        raise InputError(f"the recipe {args.recipe} goes without PTS; leave out --unlabelled")
    device = prepare_machine(options.machine_of(args), args.seed, batch_sizes(preset))
    train_preset(setup_of(args, device, args.seed), preset, args.out)


if __name__ == "__main__":
    run(main)
