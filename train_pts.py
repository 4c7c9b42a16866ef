"""Progressive training of the saliency branch: Algorithm 1 of the paper (Sec. 3.4).

    python train_pts.py --iters 6                                     # goes on from runs/default
    python train_pts.py --iters 6 --out runs/mine --data voc --unlabelled photos --gpu 0
    tensorboard --logdir runs

Takes the branches and the saliency branch that train_branches.py left in --out. In each iteration the whole
network labels all photographs anew (pts/r<N>/labels) and the saliency branch trains on these labels; the result is
weights_pts.pt. A run that was stopped, however hard, continues when the same command is given again.
"""

import argparse
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from datasets.labels import Sample
from datasets.listing import list_images
from datasets.sources import merge
from datasets.training import TrainingImages, read_label_map, read_samples
from datasets.transforms import load_square, network_input, resize
from engine import cam_labels, visualize
from engine.pts import instance_label, pseudo_label, refresh
from engine.trainer import OPTIMIZERS, Schedule, add_machine_arguments, prepare_machine, train
from models.count_head import expected_count
from models.fusion import FusionConfig
from models.wsid_net import digest_of_weights, load_weights, save_weights
from train_branches import input_size, saliency_losses
from utils import checkpoint, digest, distributed, files, provenance
from utils.cli import InputError, Parser, integer, make_folder, number, path_of, run
from utils.parallel import WorkerPool
from utils.progress import tqdm

# Masks for labels are cut as they were where PTS was measured; what newer ways to cut are worth there is not.
MEASURED = ("mask_rule=peak", "mask_thresh=0.5")


def get_args_parser():
    parser = Parser(description=__doc__)
    run_ = parser.add_argument_group("run")
    run_.add_argument(
        "--data",
        nargs="+",
        default=["data"],
        metavar="PATH[@SPLIT]",
        help="labelled photographs; without classes (PATH@count) they need no pseudo masks",
    )
    run_.add_argument("--unlabelled", nargs="*", default=[], metavar="DIR", help="photographs without labels")
    run_.add_argument("--out", type=path_of, default=Path("runs/default"), help="folder of the run to go on from")
    run_.add_argument("--size", type=input_size, help="input square, pixels; default: that of the run's network")

    schedule = parser.add_argument_group("schedule (Sec. 4.1)")
    schedule.add_argument("--iters", type=integer(1), default=6, help="iterations R of Algorithm 1")
    schedule.add_argument("--epochs", type=integer(0), default=8, help="epochs E of each iteration; 0 labels alone")
    schedule.add_argument("--batch-size", type=integer(1, 2**16), default=6, help="photographs a step")
    schedule.add_argument("--lr", type=number(None, 1000, above=0), default=1e-4, help="at the start of each iteration")
    schedule.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="of the saliency branch")
    schedule.add_argument(
        "--backbone-lr", type=number(0, 1000), default=1.0, help="times --lr for the pretrained layers"
    )
    schedule.add_argument(
        "--freeze",
        type=int,
        choices=range(6),
        default=1,
        metavar="N",
        help="pretrained levels f1..fN that stay as they are",
    )

    labels = parser.add_argument_group("pseudo labels (Sec. 3.4.1)")
    labels.add_argument(
        "--keep",
        type=number(0, below=1),
        default=1 / 3,
        help="share of a photograph's first pseudo mask in its new ones; 0 is Algorithm 1",
    )
    labels.add_argument(
        "--odds",
        type=number(-100, 100),
        nargs=3,
        metavar=("NETWORK", "FIRST", "PRIOR"),
        help="instead: the odds of both, to these powers, multiply, for first masks made with "
        "--no-crf; 0.6 1.7 -0.5 fit the bundled network without its second opinion",
    )
    labels.add_argument("--labels", type=path_of, metavar="DIR", help="of the first pseudo masks; default OUT/labels")
    labels.add_argument(
        "--by-class", action="store_true", help="the instances for the branches come apart by their classes first"
    )
    labels.add_argument(
        "--fusion", nargs="+", default=[], metavar="NAME=VALUE", help=f"as for infer.py, but {' '.join(MEASURED)}"
    )
    add_machine_arguments(parser, "processes that load images, fuse and run the CRF")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    args.fusion = FusionConfig.of([*MEASURED, *args.fusion])
    if args.odds:
        require_unrefined(first_labels(args))
    device = prepare_machine(args)
    start = args.out / "weights.pt"
    if not start.exists():
        raise InputError(f"there is no trained network at {start}; run train_branches.py --out {args.out} first")
    samples = with_unlabelled(read_samples(args.data), args.unlabelled)
    net, before = load_weights(start, device), digest_of_weights(start)
    net.config = replace(net.config, size=args.size or net.config.size)
    previous = clone(net.saliency.state_dict())
    with files.lock_folder(make_folder(args.out / "pts")) if distributed.is_main() else nullcontext():
        for r in range(1, args.iters + 1):
            folder = make_folder(args.out / "pts" / f"r{r}")
            distributed.run_on_main(bind, args, samples, net, previous, folder)
            labelled = make_labels(net, samples, folder, args, device)  # of a finished one too: what was deleted
            finished = folder / "weights.pt"
            if finished.exists():
                current = checkpoint.load(finished, device)["model"]
            else:
                if args.epochs:
                    train_iteration(net, labelled, folder, args, device, r)
                current = refresh(previous, net.saliency.state_dict(), r)
                if distributed.is_main():
                    checkpoint.save({"model": current, "config": asdict(net.config)}, finished)
                distributed.barrier()
            net.saliency.load_state_dict(current)
            previous = clone(current)
    note = f"train_pts.py, {args.iters} iterations"
    distributed.run_on_main(save_weights, net, args.out / "weights_pts.pt", note, before)
    if distributed.is_main():
        print(f"the network is in {args.out / 'weights_pts.pt'}; try it: python infer.py --img samples")


def with_unlabelled(samples, folders):
    """The samples and all photographs in the folders, whose labels are not asked for."""
    more = {folder: [Sample(path) for path in list_images(folder)] for folder in folders}
    return merge({"--data": samples} | more)


def require_unrefined(labels):
    """InputError when the pseudo masks in the folder ``labels`` are known to come from the CRF."""
    made = provenance.read_record(labels)
    if made and not made["settings"].get("no_crf", True):
        raise InputError(f"the CRF has refined the masks in {labels}; --odds wants those of --stage labels --no-crf")


def clone(state):
    return {key: value.clone() for key, value in state.items()}


def first_labels(args):
    """The folder of the pseudo labels that the network before PTS was trained on."""
    return args.labels or args.out / "labels"


def bind(args, samples, net, saliency, folder):
    """The folder of an iteration belongs to its settings, the photographs and what is known of them, the first pseudo
    labels that it reads, the network and the weights of the saliency branch that it goes on from."""
    names = ("epochs", "batch_size", "lr", "optimizer", "backbone_lr", "freeze", "seed", "keep", "odds", "by_class")
    settings = {name: getattr(args, name) for name in names} | asdict(args.fusion) | {"size": net.config.size}
    labelled = [sample for sample in samples if sample.classes]
    cam_labels.require(first_labels(args), labelled, "run train_branches.py --stage labels on those with classes")
    provenance.check_unchanged(first_labels(args), {}, labelled)
    first = cam_labels.inputs(first_labels(args), labelled, "saliency", "classes")
    others = {name: value for name, value in net.state_dict().items() if not name.startswith("saliency.")}
    inputs = provenance.digest_inputs(samples, "classes", "count") | {
        "a first pseudo label": digest.of_value(first),
        "the network": digest.of_state(others),
        "the saliency branch that the iteration starts from": digest.of_state(saliency),
    }
    provenance.bind(folder, settings, inputs)
    labels = make_folder(folder / "labels")
    provenance.bind(labels, {}, photographs=provenance.describe_photographs(samples, "classes", "count"))


def make_labels(net, samples, folder, args, device):
    """Pseudo label generation (Sec. 3.4.1), for all photographs that show an instance.

    Writes ``folder``/labels/saliency/<stem>.png; and for photographs with labels ``folder``/labels/classes/<stem>.png
    (see ``write_label``). Returns the samples that got a label.
    """
    net.eval()
    labels = folder / "labels"
    for kind in ("saliency", "classes"):
        make_folder(labels / kind)
    own = distributed.shard(samples)
    todo = [sample for sample in own if not is_tried(labels, sample)]
    with WorkerPool(args.workers) as pool, torch.no_grad():
        done = len(own) - len(todo)
        for sample in tqdm(todo, f"{folder.name}: labels", initial=done, total=len(own), mininterval=2):
            square = load_square(sample.path, net.config.size)
            maps = net(*network_input(square, net.config.canny, device))
            *maps, shares = (m[0].float().cpu() for m in maps)
            maps = [m.numpy() for m in maps]
            first = first_labels(args) if sample.classes else None
            pool.submit(
                write_label,
                labels,
                sample,
                square,
                maps,
                int(expected_count(shares)),
                args.fusion,
                first,
                args.keep,
                args.odds,
                args.by_class,
            )
    distributed.barrier()
    # What was tried and shows nothing is remembered as <stem>.none, so a stopped run does not repeat it.
    found = [sample for sample in samples if not (labels / "saliency" / f"{sample.stem}.none").exists()]
    if not found:
        raise InputError(f"the network finds no salient instance in any photograph; train the run {args.out} longer")
    if distributed.is_main():
        print(f"{folder.name}: {len(found)} of {len(samples)} photographs show salient instances")
    return found


def is_tried(labels, sample):
    """Whether ``write_label`` came to the end of a photograph: a labelled one always has a label."""
    suffixes = (".png",) if sample.classes else (".png", ".none")
    return any((labels / "saliency" / f"{sample.stem}{suffix}").exists() for suffix in suffixes)


def write_label(labels, sample, image, maps, count, settings, first, keep, odds, by_class):
    """One photograph of ``make_labels``, in a worker process: its saliency; and, not used here, its instances in
    classes/, for train_branches.py to be given: where it shows another number than was counted, its first class labels,
    unless these were to part the objects and could not.

    What cannot be told is an empty <stem>.none instead; of the saliency, together with the first labels again.
    maps: as for ``pseudo_label``, arrays; first: the folder of its first labels, None where
    it has none; keep (0 is Algorithm 1 to the letter) and odds: as for ``pseudo_label``; by_class: as for
    ``instance_label``, where there are several classes.
    """
    maps = [torch.from_numpy(m) for m in maps]
    size, png = image.shape[0], f"{sample.stem}.png"
    mask = classes = instances = None
    if first:
        mask = resize(read_label_map(first / "saliency" / png), size) / 255
        classes = read_label_map(first / "classes" / png, size)
    several = by_class and len(sample.classes or ()) > 1
    label = pseudo_label(image, maps, count, settings, mask, keep, odds)
    if label is None:
        (labels / "saliency" / f"{sample.stem}.none").touch()
        label = mask
    elif sample.count:
        instances = instance_label(label, maps, sample.count, settings, classes, several)
    if several or instances is not None:
        classes = instances
    if classes is not None:
        files.save_png(classes, labels / "classes" / png)
    else:
        (labels / "classes" / f"{sample.stem}.none").touch()
    if label is not None:
        files.save_png(np.round(label * 255).astype(np.uint8), labels / "saliency" / png)


def train_iteration(net, samples, folder, args, device, r):
    """Lines 2-4 of Algorithm 1: E epochs of the saliency branch on the labels of this iteration, in place."""
    net.saliency.backbone.freeze(args.freeze)
    maps = {"pseudo_saliency": folder / "labels" / "saliency"}
    dataset = TrainingImages(samples, net.config.size, crop=0.7, jitter=0.2, maps=maps, seed=args.seed + r)
    schedule = Schedule.of(args)
    show = partial(
        visualize.show_saliency,
        samples=samples[:8],
        args=argparse.Namespace(size=net.config.size),
        device=device,
        labels=folder / "labels",
    )
    with SummaryWriter(folder) if distributed.is_main() else nullcontext() as writer:
        train(
            net.saliency,
            dataset,
            saliency_losses,
            schedule,
            folder=folder,
            device=device,
            writer=writer,
            show=show,
            name="pts",
        )


if __name__ == "__main__":
    run(main)
