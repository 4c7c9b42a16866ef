"""The options that both training scripts have in common, and the configurations that they describe."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.config import LIMITS, Config, Machine, Preset, override
from engine.presets import PRESETS
from models.backbones import BACKBONES
from utils.cli import Parser, add_gpu_option, integer, path_of

Group = Any  # argparse's group of options has no public type
SWITCHES = ("mixing", "enhancement", "count_head", "spread", "crf", "instance_labels", "freeze_depthwise")
PRESET_DEFAULTS = "defaults: those of --preset"
WORDS = {"epochs": "N", "batch_size": "N", "freeze": "N", "iterations": "R", "backbone": "NAME"}


def add_run_options(parser: Parser, out: str = "runs/default", presets: bool = True) -> Group:
    """--preset, where there are ``presets``, --data and --out. Returns their group."""
    group = parser.add_argument_group("run")
    if presets:
        group.add_argument(
            "--preset",
            choices=PRESETS,
            default="paper",
            help="the settings: those of the paper, or the ones with the highest figures measured here",
        )
    group.add_argument(
        "--data", nargs="+", default=["data"], metavar="PATH[@SPLIT]", help="labelled photographs, see docs/data.md"
    )
    group.add_argument("--out", type=path_of, default=Path(out), help="folder of the run")
    return group


def add_group(parser: Parser, title: str, description: str | None = PRESET_DEFAULTS) -> Group:
    """A group of options for settings; ``description``: what their default values are."""
    return parser.add_argument_group(title, description)


def add_option(group: Group, name: str, setting: str, text: str, **more: Any) -> None:
    """An option for one setting of the preset: a flag with its negation for a switch, else with a value.

    more: of argparse's ``add_argument``; ``type`` is that of ``LIMITS`` unless given.
    """
    common = {"dest": setting, "default": argparse.SUPPRESS, "help": text}
    if setting in SWITCHES:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
    else:
        metavar = {} if "metavar" in more else {"metavar": WORDS.get(setting, setting.upper())}
        group.add_argument(name, **{"type": LIMITS[setting]} | common | metavar | more)


def add_schedule_options(
    parser: Parser, title: str, least_epochs: int = 1, description: str | None = PRESET_DEFAULTS
) -> Group:
    """The options of a Schedule. Returns their group."""
    group = add_group(parser, title, description)
    add_option(
        group, "--epochs", "epochs", "passes over the photographs, in each stage or round", type=integer(least_epochs)
    )
    add_option(group, "--batch-size", "batch_size", "photographs a step")
    add_option(group, "--lr", "lr", "initial learning rate of the new layers")
    add_option(group, "--optimizer", "optimizer", "sgd or adamw", metavar="sgd|adamw")
    add_option(group, "--backbone-lr", "backbone_lr", "times --lr for the pretrained layers")
    add_option(group, "--freeze", "freeze", "pretrained levels f1..fN that are not trained")
    return group


def add_backbone_option(group: Group) -> None:
    """--backbone."""
    add_option(group, "--backbone", "backbone", f"one of {', '.join(BACKBONES)}")


def add_size_options(group: Group) -> None:
    """--backbone, --output-stride and --size, of the network, and of the classifier where that is trained."""
    add_backbone_option(group)
    add_option(group, "--output-stride", "output_stride", "of the backbone: 8, 16 or 32", metavar="8|16|32")
    add_option(group, "--size", "size", "input square, pixels")


def add_fusion_option(group: Group, text: str) -> None:
    """--fusion NAME=VALUE ..., changes to a FusionConfig."""
    group.add_argument("--fusion", nargs="+", default=[], metavar="NAME=VALUE", help=text)


def add_machine_options(parser: Parser, several_seeds: bool = False) -> None:
    """The options of a Machine, and --seed; or, with ``several_seeds``, --seeds."""
    group = parser.add_argument_group("machine; several GPUs: torchrun --nproc_per_node=N SCRIPT ...")
    default = Machine()

    def add(name: str, field: str, text: str, **more: Any) -> None:
        group.add_argument(name, type=LIMITS[field], default=getattr(default, field), help=text, **more)

    add_gpu_option(group)
    add("--workers", "workers", "processes that load images and run the CRF and the fusion")
    add("--amp", "amp", "bf16 computes the networks in bfloat16, for labels too", metavar="off|bf16")
    add("--accumulate", "accumulate", "compute each batch in N parts, for a GPU that cannot hold it", metavar="N")
    group.add_argument("--compile", action="store_true", help="let torch.compile fuse the network")
    group.add_argument(
        "--deterministic", action="store_true", help="on a GPU too, the same weights every time, as far as PyTorch can"
    )
    add("--save-seconds", "save_seconds", "time between two checkpoints")
    if several_seeds:
        group.add_argument("--seeds", type=LIMITS["seed"], nargs="+", default=[0], help="of a training each")
    else:
        group.add_argument("--seed", type=LIMITS["seed"], default=0, help="of everything random")


def machine_of(args: argparse.Namespace) -> Machine:
    """The Machine that the options describe."""
    return Machine(**{field.name: getattr(args, field.name) for field in fields(Machine)})


def preset_of(args: argparse.Namespace, start: Preset | None = None) -> Preset:
    """The preset that --preset names, or ``start``, with the values of the options that are given."""
    return with_options(start or PRESETS[args.preset], args)


def with_options(config: Config, args: argparse.Namespace) -> Config:
    """A dataclass of settings, such as a Preset, with the values of the options that are given."""
    values = {name: _plain(value) for name, value in vars(args).items() if name in LIMITS or name in SWITCHES}
    return override(config, values)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
