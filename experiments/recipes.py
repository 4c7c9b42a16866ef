"""Whole trainings: from ImageNet weights through all stages of a preset to one network, OUT/weights.pt.

    python -m experiments.recipes paper --data TRAIN --out runs/paper                           # the paper's schedule
    python -m experiments.recipes best --data TRAIN --cam-data MORE --counted MORE@count --out runs/best
    python -m experiments.recipes small --data TRAIN --out runs/small --gpu -1                  # for two CPU cores
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
from engine.config import Machine, NetConfig, Preset, SaliencyPriorConfig, override
from engine.presets import BEST, PAPER
from engine.pts import progressive_training
from engine.run import Run
from engine.stages import run_stages
from engine.trainer import prepare_machine
from models.fusion_config import FusionConfig
from models.wsid_net import load_weights, save_weights
from train_pts import with_unlabelled
from utils import checkpoint, distributed
from utils.cli import InputError, Parser, make_folder, path_of, run

# BEST with a smaller backbone. After this short training, masks are best cut at half of their own peak and scored by S.
SMALL = replace(
    BEST,
    name="small",
    network=NetConfig("mobilenetv2_100", size=256, channels=64),
    fusion=FusionConfig(grouping="count", mask_rule="peak", mask_thresh=0.5, count_aware_scores=False),
    saliency_prior=None,
)
QUICK = replace(
    override(SMALL, {"backbone": "tf_efficientnet_lite0", "size": 128, "channels": 32, "batch_size": 8, "epochs": 2}),
    name="quick",
    saliency_prior=SaliencyPriorConfig(size=128),
)
RECIPES = {preset.name: preset for preset in (PAPER, BEST, SMALL, QUICK)}


@dataclass(frozen=True)
class Data:
    """The photographs of a training, as sources PATH[@SPLIT] (datasets.sources).

    labelled: with class labels and counts. cam: more with class labels, for the classifier. counted: more with a count,
    for what follows PTS. unlabelled: folders of more photographs for PTS. pseudo_labels: the folder labels/ of another
    run; None trains a classifier for them.
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
        start: Path | None = None,
        backbone: str | None = None,
    ) -> Run:
        """The Run of a stage in the folder ``out``, with the labelled photographs, those of the sources in ``more`` and
        those in the folders ``unlabelled``.

        pseudo_labels: the folder of these; start: the file of a network that the stage adds to; backbone: that of the
        stage, where it is not that of the network.
        """
        samples = with_unlabelled(read_samples([*self.data.labelled, *more]), list(unlabelled))
        net = load_weights(start) if start else None
        file = self.backbone_weights.get(backbone or preset.network.backbone)
        return Run(out, samples, preset, self.machine, self.device, self.seed, pseudo_labels, net, start, file)


def train_labels(setup: Setup, preset: Preset, out: Path) -> Path:
    """The CAM classifier and its pseudo labels. Returns their folder, out/labels."""
    run_stages(setup.run(preset, out, *setup.data.cam, backbone=preset.cam.backbone), ["cam"])
    run_stages(setup.run(preset, out), ["labels"])
    return out / "labels"


def train_network(setup: Setup, preset: Preset, out: Path, labels: Path) -> Path:
    """The branches and the saliency branch, on the pseudo labels in ``labels``. Returns out/weights.pt."""
    run_stages(setup.run(preset, out, pseudo_labels=labels), ["branches", "saliency"])
    return out / "weights.pt"


def train_progressively(setup: Setup, preset: Preset, out: Path, labels: Path, *more: str) -> Path:
    """PTS from out/weights.pt on, also on the sources in ``more``; labels: the initial pseudo labels. Returns
    out/weights_pts.pt."""
    progressive_training(setup.run(preset, out, *more, unlabelled=setup.data.unlabelled, pseudo_labels=labels))
    return out / "weights_pts.pt"


def self_training_round(setup: Setup, preset: Preset, out: Path, start: Path, labels: Path) -> Path:
    """A self-training round: the network in the file ``start`` labels instances, on which the branches are trained anew
    [ours].

    The photographs are the labelled ones and those of ``data.counted``; labels: the initial pseudo labels. The saliency
    branch is that of the last iteration of PTS in this round. Returns out/weights.pt.
    """
    config = preset.self_training
    if not config:
        raise InputError(f"the preset {preset.name} has no self-training round; give best or one derived from it")
    teacher = make_folder(out / "teacher")
    distributed.run_on_main(link, teacher / "weights.pt", start)
    train_progressively(setup, replace(preset, pts=config.pts), teacher, labels, *setup.data.counted)
    instances = teacher / "pts" / f"r{config.pts.iterations}" / "labels"
    round_preset = replace(preset, branches=config.branches)
    run_stages(setup.run(round_preset, out, *setup.data.counted, pseudo_labels=instances), ["branches"])
    return out / "weights.pt"


def add_count_net(setup: Setup, preset: Preset, out: Path, start: Path) -> Path:
    """The network in the file ``start`` with a network for the number of objects, trained on all counts [ours]. Returns
    out/weights.pt."""
    run_stages(setup.run(preset, out, *setup.data.counted, start=start), ["count"])
    return out / "weights.pt"


def add_saliency_prior(setup: Setup, preset: Preset, out: Path, start: Path) -> Path:
    """The network in the file ``start`` with a saliency prior, fitted to all photographs [ours]. Returns
    out/weights.pt."""
    data = setup.data
    run_stages(setup.run(preset, out, *data.counted, unlabelled=data.unlabelled, start=start), ["saliency-prior"])
    return out / "weights.pt"


EXTENSIONS = ("self_training", "count", "saliency_prior")  # the parts of a Preset that follow PTS, in their order


def extend(setup: Setup, preset: Preset, out: Path, weights: Path, labels: Path, parts: Sequence[str]) -> Path:
    """What follows PTS: the ``parts`` of ``EXTENSIONS``, each in a folder of ``out``, added to the network in
    ``weights``; labels: the initial pseudo labels. Returns the file of the network with all of them."""
    if "self_training" in parts:
        weights = self_training_round(setup, preset, out / "self_training", weights, labels)
    if "count" in parts:
        weights = add_count_net(setup, preset, out / "count", weights)
    if "saliency_prior" in parts:
        weights = add_saliency_prior(setup, preset, out / "saliency_prior", weights)
    return weights


def extensions_of(preset: Preset) -> tuple[str, ...]:
    """Those of ``EXTENSIONS`` that the preset has."""
    return tuple(part for part in EXTENSIONS if getattr(preset, part))


def train_preset(setup: Setup, preset: Preset, out: Path) -> Path:
    """All stages of a preset. Returns out/weights.pt; InputError when another training has made that file."""
    path, note = out / "weights.pt", f"experiments.recipes {preset.name}"
    if path.exists() and checkpoint.load(path).get("note") != note:
        raise InputError(f"{path} would be overwritten, which this recipe has not made; give another --out")
    first = out / "first_round"
    labels = setup.data.pseudo_labels or train_labels(setup, preset, first)
    train_network(setup, preset, first, labels)
    weights = train_progressively(setup, preset, first, labels)
    weights = extend(setup, preset, out, weights, labels, extensions_of(preset))
    distributed.run_on_main(_publish, weights, path, note)
    return path


def _publish(weights: Path, path: Path, note: str) -> None:
    save_weights(load_weights(weights), path, note=note)
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
    trained = [preset.cam, preset.branches, preset.saliency, preset.pts, preset.count]
    if preset.self_training:
        trained += [preset.self_training.pts, preset.self_training.branches]
    return [config.schedule.batch_size for config in trained if config]


def add_setup_options(parser: Parser, out: str) -> None:
    """The options of a ``Setup`` beside those of the machine, and --out."""
    parser.add_argument("--data", nargs="+", default=["data"], metavar="PATH[@SPLIT]", help="labelled photographs")
    more = [
        ("--cam-data", "PATH[@SPLIT]", "more photographs with class labels, for the classifier"),
        ("--counted", "PATH@count", "more photographs with a count, for the self-training round and the count network"),
        ("--unlabelled", "DIR", "more photographs for PTS and the saliency prior"),
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
    device = prepare_machine(options.machine_of(args), args.seed, batch_sizes(preset))
    train_preset(setup_of(args, device, args.seed), preset, args.out)


if __name__ == "__main__":
    run(main)
