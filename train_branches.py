"""Train WSID-Net from class labels and counts: CAM classifier, pseudo labels, branches, saliency (Sec. 4.1, 4.2).

    python train_branches.py                                           # data/ -> runs/default, the paper's settings
    python train_branches.py --preset best --data voc ilso --out runs/mine   # several labelled folders
    python train_branches.py --gpu -1 --backbone mobilenetv2_100 --size 256 --stage cam --epochs 5
    tensorboard --logdir runs

The stages are cam, labels, branches and saliency, in this order. Each can be run alone with --stage and its own
settings: an option changes its setting in every stage that the command runs. A stage that was stopped or killed
continues when the command is repeated.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from datasets.training import read_samples
from engine import options
from engine.config import Preset, Schedule
from engine.run import Run
from engine.stages import STAGES, run_stages
from engine.trainer import prepare_machine
from models.attention import MutualAttention
from models.fusion_config import FusionConfig
from models.wsid_net import WSIDNet, load_weights
from utils.cli import InputError, Parser, path_of
from utils.script import run


def get_args_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = options.add_run_options(parser)
    group.add_argument("--stage", choices=("all", *STAGES), default="all", help="one of them alone")
    group.add_argument(
        "--init",
        default="imagenet",
        metavar="imagenet|FILE",
        help="start the branches and S from ImageNet, or from the weights.pt of a network, whose settings they take",
    )
    group.add_argument("--backbone-weights", type=path_of, help="local ImageNet weights instead of the download")
    group.add_argument(
        "--pseudo-labels",
        type=path_of,
        metavar="DIR",
        help="pseudo labels of another run (its labels/), in place of the stages cam and labels",
    )

    group = options.add_group(parser, "network and its ablations (Tables 2-5)")
    options.add_size_options(group)
    options.add_option(group, "--channels", "channels", "width of the CA module and the ASPP")
    group.add_argument("--no-ca", action="store_true", help="without the CA module (= --no-cfm --ma none)")
    options.add_option(group, "--cfm", "mixing", "cross-layer feature mixing")
    orders = "|".join(MutualAttention.ORDERS)
    options.add_option(group, "--ma", "attention", "order of the mutual attention", metavar=orders)
    options.add_option(group, "--be", "enhancement", "boundary enhancement")
    options.add_option(group, "--canny", "canny", "edges of the BE module", metavar="auto|none|only|LOW,HIGH")
    options.add_option(group, "--count-head", "count_head", "predict the number of objects on the branches' backbone")
    options.add_fusion_option(
        group,
        "settings of models.fusion_config.FusionConfig for the network's file; default: those of --init or --preset",
    )

    options.add_schedule_options(parser, "schedule (Sec. 4.1)")

    group = options.add_group(parser, "pseudo labels (Sec. 4.2)")
    options.add_option(group, "--cam-scales", "scales", "of a photograph whose activations are summed", nargs="+")
    options.add_option(group, "--spread-cam", "spread", "propagate activations along a feature-affinity matrix")
    options.add_option(group, "--crf", "crf", "refine the saliency masks with the CRF (Table 7)")

    group = options.add_group(parser, "losses of the branches (Sec. 3.1, 3.2)")
    options.add_option(group, "--radius", "radius", "of pixel pairs in L_B and L_V, stride-4 pixels")
    options.add_option(group, "--lsu-weight", "lsu_weight", "of L_su beside L_B and L_V; 0 is without L_su")
    options.add_option(
        group, "--lsu-form", "lsu_form", "mse is Eq. 3 and 4; huber is linear beyond an error of 1", metavar="mse|huber"
    )
    options.add_option(
        group,
        "--centroid-target-weight",
        "centroid_target_weight",
        "of the loss that points the pixels of counted instances to their centres; 0 is without",
    )

    options.add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    if args.stage == "all" and args.pseudo_labels:
        stages = ["branches", "saliency"]
    elif args.pseudo_labels and args.stage not in ("branches", "saliency"):
        raise InputError(f"--stage {args.stage} learns from no pseudo labels of others; leave out --pseudo-labels")
    start_path, start = starting_network(args.init)
    preset = resolve(args, start)
    machine = options.machine_of(args)
    device = prepare_machine(machine, args.seed, [schedule.batch_size for schedule in schedules(preset, stages)])
    samples = read_samples(args.data)
    training = Run(
        args.out,
        samples,
        preset,
        machine,
        device,
        args.seed,
        args.pseudo_labels,
        start,
        start_path,
        args.backbone_weights,
    )
    run_stages(training, stages)


def starting_network(init: str) -> tuple[Path | None, WSIDNet | None]:
    """The file that --init names and its network, None and None for imagenet; InputError for a file without one."""
    if init == "imagenet":
        return None, None
    path = path_of(init)
    if not path.is_file():
        raise InputError(f"--init {init}: no such file; give imagenet or the weights.pt of a network")
    return path, load_weights(path)


def resolve(args: argparse.Namespace, start: WSIDNet | None) -> Preset:
    """The preset with the values of the options; where training goes on from ``start``, with its network and fusion."""
    if args.no_ca:
        args.mixing, args.attention = False, "none"
    preset = options.preset_of(args)
    if not start:
        return replace(preset, fusion=FusionConfig.of(args.fusion, preset.fusion))
    start.fusion = FusionConfig.of(args.fusion, start.fusion)
    return options.preset_of(args, replace(preset, network=start.config, fusion=start.fusion))


def schedules(preset: Preset, stages: list[str]) -> list[Schedule]:
    """The schedules of the stages that are trained; that of the branches for a stage without one."""
    of_stages = {
        "cam": preset.cam.schedule,
        "branches": preset.branches.schedule,
        "saliency": preset.saliency.schedule,
    }
    return [of_stages[stage] for stage in stages if stage in of_stages] or [preset.branches.schedule]


if __name__ == "__main__":
    run(main)
