"""Progressive training of the saliency branch: Algorithm 1 of the paper (Sec. 3.4).

    python train_pts.py                                               # goes on from runs/default, the paper's settings
    python train_pts.py --preset best --out runs/mine --data voc --unlabelled photos
    tensorboard --logdir runs

Takes the network that train_branches.py left in --out. In each iteration the whole network labels all photographs
anew (pts/r<N>/labels) and the saliency branch is trained on these labels; the result is weights_pts.pt. A run that was
stopped or killed continues when the command is repeated.
"""

from dataclasses import replace

from datasets.labels import Sample
from datasets.listing import list_images
from datasets.sources import merge
from datasets.training import read_samples
from engine import options
from engine.pts import progressive_training
from engine.run import Run
from engine.trainer import prepare_machine
from models.fusion_config import FusionConfig
from utils.cli import Parser, path_of
from utils.script import run


def get_args_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = options.add_run_options(parser)
    group.add_argument("--unlabelled", nargs="*", default=[], metavar="DIR", help="photographs without labels")
    group.add_argument(
        "--pseudo-labels", type=path_of, metavar="DIR", help="of the initial pseudo masks; default OUT/labels"
    )

    group = options.add_schedule_options(parser, "schedule of each iteration (Sec. 4.1)", least_epochs=0)
    options.add_option(group, "--iters", "iterations", "iterations R of Algorithm 1")

    group = options.add_group(parser, "pseudo labels (Sec. 3.4.1)")
    options.add_option(group, "--size", "size", "input square, pixels; default: that of the run's network")
    options.add_option(
        group, "--saliency-weight", "saliency_weight", "of S in its mean with the union of masks; 0 is Algorithm 1"
    )
    options.add_option(
        group, "--init-mask-weight", "init_mask_weight", "of the initial pseudo mask in new ones; 0 is Algorithm 1"
    )
    options.add_option(
        group, "--instance-labels", "instance_labels", "write instances too, to train the branches on them"
    )
    options.add_fusion_option(group, "settings of models.fusion_config.FusionConfig for the masks of the labels")
    options.add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    preset = options.preset_of(args)
    preset = replace(preset, pts=replace(preset.pts, fusion=FusionConfig.of(args.fusion, preset.pts.fusion)))
    machine = options.machine_of(args)
    device = prepare_machine(machine, args.seed, [preset.pts.schedule.batch_size])
    samples = with_unlabelled(read_samples(args.data), args.unlabelled)
    progressive_training(Run(args.out, samples, preset, machine, device, args.seed, args.pseudo_labels))


def with_unlabelled(samples: list[Sample], folders: list[str]) -> list[Sample]:
    """The samples and all photographs in the folders, as samples without labels."""
    more = {folder: [Sample(path) for path in list_images(folder)] for folder in folders}
    return merge({"--data": samples} | more)


if __name__ == "__main__":
    run(main)
