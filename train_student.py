"""Train a Mask R-CNN on the instances that a trained network finds, the usual last step of weakly supervised methods.

    python train_student.py --data data                          # teacher: runs/default, else the bundled WSID-Net
    python train_student.py --data voc ilso --teacher runs/mine/weights_pts.pt --out runs/mine_student --rounds 2
    tensorboard --logdir runs

In each round the teacher finds instances in all photographs with a count, as many as were counted (r<N>/labels); where
it finds fewer, the photograph is left out. The student is trained on these labels and is the teacher of the next round.
The result is OUT/weights.pt, for --weights of infer.py and evaluate.py. A run that was stopped or killed continues when
the command is repeated.
"""

from datasets.training import read_samples
from engine import options
from engine.config import StudentTrainingConfig, settings_of
from engine.predictor import BUNDLED_WSID_NET, default_weights
from engine.student import StudentRun, train_student
from engine.trainer import prepare_machine
from utils import distributed
from utils.cli import Parser, path_of
from utils.script import run


def get_args_parser() -> Parser:
    parser = Parser(description=__doc__)
    group = options.add_run_options(parser, "runs/student", presets=False)
    group.add_argument(
        "--teacher",
        type=path_of,
        metavar="FILE",
        help="weights; default: those of runs/default, else those of the bundled WSID-Net",
    )
    group.add_argument(
        "--init",
        default="teacher",
        metavar="teacher|imagenet|FILE",
        help="start the first round from the weights of the teacher or of another file, as far as they fit, or from "
        "ImageNet's; the others start from the round before",
    )
    group.add_argument("--backbone-weights", type=path_of, help="local ImageNet weights instead of the download")
    options.add_option(group, "--rounds", "rounds", "rounds of labelling and training", metavar="N")

    group = options.add_group(parser, "network", None)
    options.add_backbone_option(group)
    options.add_option(group, "--size", "size", "input square, pixels")
    options.add_option(
        group, "--channels", "pyramid_channels", "width of the feature pyramid and the mask head", metavar="CHANNELS"
    )

    group = options.add_schedule_options(parser, "schedule of a round", description=None)
    options.add_option(group, "--freeze-depthwise", "freeze_depthwise", "leave out depthwise filters, slow on a CPU")
    options.add_option(group, "--warmup", "warmup", "iterations in which the learning rate rises", metavar="N")
    options.add_option(group, "--average", "average", "decay of the moving average of the weights; 0 is without")

    group = options.add_group(parser, "augmentation", None)
    options.add_option(group, "--crop", "crop", "smallest fraction of each side that a random crop keeps")
    options.add_option(group, "--copy-paste", "copy_paste", "mean number of instances pasted from other photographs")
    options.add_option(group, "--exposure", "exposure", "largest change of the exposure, EV; 0 for none", metavar="EV")
    text = "smallest fraction of the input square to which photographs are reduced in the last round; 1 for none"
    options.add_option(group, "--resolution", "resolution", text)
    options.add_machine_options(parser)
    parser.set_defaults(**settings_of(StudentTrainingConfig()))
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    config = options.with_options(StudentTrainingConfig(), args)
    machine = options.machine_of(args)
    device = prepare_machine(machine, args.seed, [config.schedule.batch_size])
    samples = read_samples(args.data)
    teacher = args.teacher or default_weights(BUNDLED_WSID_NET)
    result = train_student(
        StudentRun(args.out, samples, teacher, config, machine, device, args.seed, args.init, args.backbone_weights)
    )
    if distributed.is_main():
        print(f"the network is in {result}; try it: python infer.py --img samples --weights {result}")


if __name__ == "__main__":
    run(main)
