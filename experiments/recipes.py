"""What the stages are told beside the data: the paper's schedule, one for two CPU cores, and a quick one.

A recipe is the options of each stage as they would be typed. ``python -m experiments.recipes NAME ...`` runs all
stages of one and leaves the network in OUT/weights_pts.pt; with --counted, after a second cycle, in
OUT/final/weights.pt:

    python -m experiments.recipes cpu --data data --cam-data more --counted more@count --out runs/mine --gpu -1
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import train_branches
import train_pts
from engine.trainer import LARGEST_SEED
from utils import distributed
from utils.cli import Parser, integer, make_folder, path_of, run


@dataclass(frozen=True)
class Recipe:
    """Options of ``train_branches.py`` for each stage, and of ``train_pts.py``.

    cam: of the classifier and of the labels that come from it, which may use another backbone and size than the
    network; classifier, labels: of one of the two alone. network: of both nets. epochs: of the saliency branch
    before PTS. rounds: (R, E) of PTS. again: of the branches when they train a second time. number: of the network for
    the number of objects. fusion: the settings that go into the file of the network.
    """

    cam: str
    classifier: str
    labels: str
    network: str
    branches: str
    saliency: str
    epochs: int
    pts: str
    rounds: tuple[int, int]
    again: str
    count_net: str
    fusion: str = ""


# After a short training S is too unsure for the background to walk, and scores are best by S alone.
SHORT = "--fusion grouping=count count_aware_scores=0 mask_rule=peak mask_thresh=0.5"
NUMBER_SCHEDULE = "--epochs 2 --optimizer adamw --lr 0.001 --backbone-lr 0.2 --freeze 2"
RECIPES = {
    "paper": Recipe(
        cam="--backbone resnet50 --size 512",
        classifier="",
        labels="",
        network="--backbone resnet50 --size 512",
        branches="",
        saliency="",
        epochs=5,
        pts="",
        rounds=(6, 8),
        again="",
        count_net=f"--size 256 --batch-size 16 {NUMBER_SCHEDULE}",
    ),
    "cpu": Recipe(  # its second cycle's network labels what the bundled weights learn from
        cam="--backbone tf_efficientnet_lite2 --size 320",
        classifier="--output-stride 32 --epochs 4 --batch-size 16 --lr 0.05 --freeze 2",
        labels="--cam-scales 1 2",
        network="--backbone mobilenetv2_100 --size 256 --channels 64",
        branches="--epochs 4 --batch-size 8 --optimizer adamw --lr 0.001 --freeze 3 --radius 5",
        saliency="--batch-size 8 --lr 0.012 --backbone-lr 0.5 --freeze 2",
        epochs=6,
        pts="--batch-size 8 --lr 0.004 --backbone-lr 0.5 --freeze 2",
        rounds=(2, 1),
        again="--epochs 3",
        count_net=f"--size 256 --batch-size 16 {NUMBER_SCHEDULE}",
        fusion=SHORT,
    ),
    "quick": Recipe(  # minutes, to see that everything runs
        cam="--backbone mobilenetv2_100 --size 128",
        classifier="--epochs 2 --batch-size 8 --lr 0.05",
        labels="--cam-scales 1 2",
        network="--backbone mobilenetv2_100 --size 128 --channels 32",
        branches="--epochs 2 --batch-size 8 --optimizer adamw --lr 0.001 --freeze 3 --radius 5",
        saliency="--batch-size 8 --lr 0.012 --backbone-lr 0.5",
        epochs=2,
        pts="--batch-size 8 --lr 0.004 --backbone-lr 0.5",
        rounds=(2, 1),
        again="",
        count_net=f"--size 128 --batch-size 8 {NUMBER_SCHEDULE}",
        fusion=SHORT,
    ),
}
# The same with the backbone of the bundled weights, in twice the time.
RECIPES["lite2"] = replace(RECIPES["cpu"], network="--backbone tf_efficientnet_lite2 --size 256 --channels 64")


def add_data_arguments(parser, out):
    """The options that every experiment has: where the photographs are, where results go, on what to compute."""
    parser.add_argument("--data", nargs="+", default=["data"], metavar="PATH[@SPLIT]", help="labelled photographs")
    parser.add_argument(
        "--cam-data",
        nargs="*",
        default=[],
        metavar="PATH[@SPLIT]",
        help="more photographs with class labels, for the classifier alone",
    )
    parser.add_argument(
        "--counted",
        nargs="*",
        default=[],
        metavar="PATH@count",
        help="more photographs, with a count, for a second cycle",
    )
    parser.add_argument("--unlabelled", nargs="*", default=[], metavar="DIR", help="more photographs for PTS")
    parser.add_argument(
        "--labels",
        type=path_of,
        metavar="DIR",
        help="pseudo labels of another run; default: a classifier is trained for them",
    )
    parser.add_argument("--out", type=path_of, default=Path(out), help="folder of the runs")
    parser.add_argument("--gpu", type=integer(-1), default=0, help="CUDA device; -1 is the CPU")
    parser.add_argument("--workers", type=integer(0, 256), default=2, help="processes that load images and run the CRF")


def stage(args, out, seed, name, *options, data=(), **paths):
    """One stage of ``train_branches.py`` in the folder ``out``; what is finished there is not done again. paths: of
    --labels and --init."""
    given = [argument for option, path in paths.items() for argument in (f"--{option}", str(path))]
    train_branches.main(
        [
            "--data",
            *args.data,
            *data,
            "--out",
            str(out),
            "--gpu",
            str(args.gpu),
            "--workers",
            str(args.workers),
            "--seed",
            str(seed),
            "--stage",
            name,
            *" ".join(options).split(),
            *given,
        ]
    )


def train_labels(recipe, args, out, seed, more=""):
    """The classifier and its pseudo labels; ``more`` goes to the labels' options. Returns out/labels."""
    stage(args, out, seed, "cam", recipe.cam, recipe.classifier, data=args.cam_data)
    stage(args, out, seed, "labels", recipe.cam, recipe.labels, more)
    return out / "labels"


def train_saliency(recipe, args, out, seed, labels, epochs, more=""):
    """The saliency branch on the pseudo masks in ``labels``, for ``epochs``; ``more`` as in ``train_both_branches``."""
    stage(
        args,
        out,
        seed,
        "saliency",
        recipe.network,
        recipe.saliency,
        f"--epochs {epochs}",
        more,
        recipe.fusion,
        labels=labels,
    )


def train_both_branches(recipe, args, out, seed, labels, more=""):
    """The boundary and the centroid branch; ``more`` are the switches of an ablation. Returns out/weights.pt."""
    stage(args, out, seed, "branches", recipe.network, recipe.branches, more, recipe.fusion, labels=labels)
    return out / "weights.pt"


def train_progressively(recipe, args, out, seed, labels, data=()):
    """PTS on the network in ``out``, with more photographs in ``data``. Returns out/weights_pts.pt."""
    iterations, epochs = recipe.rounds
    train_pts.main(
        [
            "--data",
            *args.data,
            *data,
            "--unlabelled",
            *args.unlabelled,
            "--out",
            str(out),
            "--gpu",
            str(args.gpu),
            "--workers",
            str(args.workers),
            "--seed",
            str(seed),
            "--labels",
            str(labels),
            "--iters",
            str(iterations),
            "--epochs",
            str(epochs),
            *recipe.pts.split(),
        ]
    )
    return out / "weights_pts.pt"


def train_count_net(recipe, args, out, seed, start, data=()):
    """A network for the number of objects, added to that in the file ``start`` [ours]; ``data``: more photographs.
    Returns the file of both."""
    stage(args, out, seed, "number", recipe.count_net, data=data, init=start)
    return out / "weights.pt"


def link(name, target):
    """Let the path ``name`` stand for ``target``, unless there is a file or folder already. The link is relative, so
    that a folder of runs may be moved; one that leads elsewhere, as in a copy of such a folder, is replaced."""
    if name.is_symlink() and name.resolve() != target.resolve():
        name.unlink()
    if not name.exists():
        name.symlink_to(os.path.relpath(target.resolve(), name.parent.resolve()))


def train_again(recipe, args, out, seed, labels):
    """A second cycle, with the --counted photographs: one iteration of PTS, then the branches anew, on the instances
    that the network of ``out`` tells [ours]. Returns out/final/weights.pt."""
    start = make_folder(out / "cycle2") / "weights.pt"
    distributed.run_on_main(link, start, out / "weights_pts.pt")
    once = replace(recipe, rounds=(1, recipe.rounds[1]))
    train_progressively(once, args, start.parent, seed, labels, args.counted)
    instances = start.parent / "pts" / "r1" / "labels"
    stage(
        args,
        out / "final",
        seed,
        "branches",
        recipe.network,
        recipe.branches,
        recipe.again,
        recipe.fusion,
        data=args.counted,
        labels=instances,
    )
    return out / "final" / "weights.pt"


def main(argv=None):
    parser = Parser(prog="python -m experiments.recipes", description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    add_data_arguments(parser, "runs/recipe")
    parser.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.recipe]
    labels = args.labels or train_labels(recipe, args, args.out / "labels_run", args.seed)
    train_saliency(recipe, args, args.out, args.seed, labels, recipe.epochs)
    train_both_branches(recipe, args, args.out, args.seed, labels)
    train_progressively(recipe, args, args.out, args.seed, labels)
    if args.counted:
        train_again(recipe, args, args.out, args.seed, labels)


if __name__ == "__main__":
    run(main)
