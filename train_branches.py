"""Train WSID-Net from class labels and counts: CAM classifier, pseudo labels, branches, saliency (Sec. 4.1, 4.2).

    python train_branches.py --gpu 0                                   # data/ -> runs/default, the paper's settings
    python train_branches.py --gpu 0 --data voc ilso --out runs/mine   # several folders with images/ and labels.csv
    python train_branches.py --gpu -1 --backbone mobilenetv2_100 --size 256 --stage cam --epochs 5
    tensorboard --logdir runs

Stages run in order: cam -> labels -> branches -> saliency. Each can be run alone with --stage and its own
settings, and a stage that was stopped, however hard, continues when the same command is given again. Two more run
only when they are named, and add to the network that --init names: number, a network that tells the number of objects,
beside the branches' own head, and opinion, a second one on what is salient.
"""

import argparse
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from datasets.training import TrainingImages, pseudo_maps_can_be_made, read_samples, with_classes
from datasets.transforms import canny_edges, load_square, network_input, parse_canny, to_tensor
from engine import cam_labels, visualize
from engine.trainer import OPTIMIZERS, Schedule, add_machine_arguments, prepare_machine, train
from models.attention import MutualAttention
from models.backbones import BACKBONES, load_pretrained
from models.branches import SaliencyNet
from models.classifier import CAM_SIZE, Classifier, activations
from models.count_head import CountHead
from models.fusion import FusionConfig
from models.grouping import split_labels_by_count
from models.losses import (
    boundary_loss,
    centroid_loss,
    centroid_target_loss,
    count_loss,
    divisors,
    subitizing_loss,
)
from models.saliency_prior import SaliencyPrior
from models.wsid_net import NetConfig, WSIDNet, load_weights, save_weights, with_parts
from utils import checkpoint, digest, distributed, provenance
from utils.cli import InputError, Parser, integer, make_folder, number, path_of, run
from utils.parallel import WorkerPool
from utils.progress import tqdm

STAGES = ("cam", "labels", "branches", "saliency")
ADDED = ("number", "opinion")  # to a network that is there


def input_size(text):
    """The value of --size, an input square that the backbones can halve five times; InputError for others."""
    size = int(text) if text.isdecimal() else 0
    if not 64 <= size <= 4096 or size % 32:
        raise InputError(f"--size {text} does not fit the backbones; give a multiple of 32, from 64 to 4096")
    return size


def group_width(text):
    """The value of --channels, which group normalisation divides by four."""
    channels = integer(4, 4096)(text)
    if channels % 4:
        raise argparse.ArgumentTypeError(f"{text!r} does not fit; give a multiple of 4, for group normalisation")
    return channels


def get_args_parser():
    parser = Parser(description=__doc__)
    run_ = parser.add_argument_group("run")
    run_.add_argument(
        "--data", nargs="+", default=["data"], metavar="PATH[@SPLIT]", help="labelled photographs, see README"
    )
    run_.add_argument("--out", type=path_of, default=Path("runs/default"), help="folder of this run")
    run_.add_argument("--stage", choices=("all", *STAGES, *ADDED), default="all", help="one of them alone")

    net = parser.add_argument_group("network and its ablations (Tables 2-5)")
    net.add_argument(
        "--backbone", choices=BACKBONES, default="resnet50", metavar="NAME", help=f"one of {', '.join(BACKBONES)}"
    )
    net.add_argument("--backbone-weights", type=path_of, help="local ImageNet weights instead of the download")
    net.add_argument("--output-stride", type=int, choices=(8, 16, 32), default=16, help="of the backbones")
    net.add_argument("--size", type=input_size, default=512, help="input square, pixels")
    net.add_argument("--channels", type=group_width, default=256, help="width of the CA module and the ASPP")
    net.add_argument("--no-ca", action="store_true", help="without cross-layer attention (= --no-cfm --ma none)")
    net.add_argument("--no-cfm", action="store_true", help="without cross-layer feature mixing")
    net.add_argument("--ma", choices=MutualAttention.ORDERS, default="parallel", help="mutual attention")
    net.add_argument("--no-be", action="store_true", help="without boundary enhancement")
    net.add_argument("--canny", default="auto", help="edges of the BE module: auto, none, only or LOW,HIGH")
    net.add_argument("--no-lsu", action="store_true", help="without the centroid-based subitizing loss")
    net.add_argument(
        "--fusion",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of models.fusion.FusionConfig that the network's file gets; default: those of --init "
        "FILE, else the ones there",
    )
    net.add_argument("--no-crf", action="store_true", help="saliency pseudo masks without the CRF (Table 7)")

    schedule = parser.add_argument_group("schedule (Sec. 4.1)")
    schedule.add_argument("--epochs", type=integer(1), default=5, help="of each stage that trains")
    schedule.add_argument("--batch-size", type=integer(1, 2**16), default=6, help="photographs a step")
    schedule.add_argument(
        "--lr", type=number(None, 1000, above=0), default=0.01, help="initial learning rate of the new layers"
    )
    schedule.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="adamw moves V in a tenth of the iterations, at an --lr near 0.001",
    )
    schedule.add_argument(
        "--backbone-lr", type=number(0, 1000), default=0.1, help="times --lr for the pretrained layers"
    )
    schedule.add_argument(
        "--freeze",
        type=int,
        choices=range(6),
        default=1,
        metavar="N",
        help="pretrained levels f1..fN that stay as they are",
    )
    schedule.add_argument(
        "--init",
        default="imagenet",
        metavar="imagenet|cam|FILE",
        help="start the branches from ImageNet, from the CAM classifier's backbone, or from the "
        "weights.pt of a network that goes on, on other data or at another --size",
    )

    labels = parser.add_argument_group("pseudo labels (Sec. 4.2)")
    labels.add_argument(
        "--cam-scales",
        type=number(0.1, 8),
        nargs="+",
        default=[1.0, 0.5, 1.5, 2.0],
        help="sizes of a photograph whose activations are averaged",
    )
    labels.add_argument("--plain-cam", action="store_true", help="activations as they are, not spread over likes [IRN]")
    labels.add_argument(
        "--labels",
        type=path_of,
        metavar="DIR",
        help="pseudo labels of another run (its labels/) instead of making some",
    )
    labels.add_argument(
        "--radius", type=integer(1, 64), default=10, help="of pixel pairs in L_B and L_V, stride-4 pixels"
    )
    labels.add_argument("--lsu-weight", type=number(0, 1000), default=0.02, help="of L_su beside L_B and L_V")
    labels.add_argument(
        "--counted-weight",
        type=number(0, 1000),
        default=0.1,
        help="of the centroids of counted instances; 0 is the paper's L_su alone",
    )
    labels.add_argument(
        "--odds",
        type=number(-100, 100),
        nargs=3,
        metavar=("S", "OPINION", "PRIOR"),
        default=SaliencyPrior.ODDS,
        help="how the stage opinion pools the odds of S and of its own",
    )
    add_machine_arguments(parser)
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    args.canny = parse_canny(args.canny)
    args.start = starting_network(args.init)
    args.fusion = FusionConfig.of(args.fusion, args.start.fusion if args.start else None)
    if args.start:
        args.start.fusion = args.fusion
    if args.stage in ADDED and not args.start:
        raise InputError(f"--stage {args.stage} goes on from a network; name its weights.pt with --init")
    if args.labels and args.stage not in ("all", "branches", "saliency"):
        raise InputError(f"--stage {args.stage} learns from no pseudo labels of others; leave out --labels")
    require_place(args)
    device = prepare_machine(args)
    samples = SAMPLES.get(args.stage, usable_samples)(args)
    if args.stage in ("all", "branches") and not args.no_lsu and not any(sample.count for sample in samples):
        raise InputError("no photograph has a count; name a source in --data that has them, or give --no-lsu")
    make_folder(args.out)
    stages = {
        "cam": train_classifier,
        "labels": make_labels,
        "branches": train_branches,
        "saliency": train_saliency,
        "number": train_count_net,
        "opinion": fit_saliency_prior,
    }
    todo = STAGES[2:] if args.labels else STAGES
    for stage in todo if args.stage == "all" else [args.stage]:
        torch.manual_seed(args.seed)  # new layers start the same whether earlier stages ran before or today
        folder = make_folder(args.out / stage)
        with checkpoint.alone(folder) if distributed.is_first() else nullcontext():
            stages[stage](args, samples, device)
        distributed.wait_for_all()
    if args.stage in ("all", "branches", "saliency"):
        distributed.from_first(assemble, args)  # what comes next may read it


def starting_network(init):
    """The WSIDNet that --init FILE names, None for imagenet and cam; InputError for a file that holds none."""
    if init in ("imagenet", "cam"):
        return None
    init = path_of(init)
    if not Path(init).is_file():
        raise InputError(f"--init {init}: no such file; give imagenet, cam or the weights.pt of a network")
    return load_weights(init)


def origin(args):
    """The note of OUT/weights.pt, by which it is known again."""
    return f"train_branches.py --stage {args.stage}" if args.stage in ADDED else "train_branches.py"


def require_place(args):
    """InputError when OUT/weights.pt, which would be overwritten, is the network in --init or another's work, such as
    a copy or that of a run without what --stage number adds."""
    path = args.out / "weights.pt"
    if args.stage in ("cam", "labels") or not path.exists():
        return
    try:
        saved = checkpoint.load(path)
    except InputError:  # nothing to lose
        return
    note = saved.get("note") if isinstance(saved, dict) else None
    if note != origin(args) or (args.start and path.samefile(path_of(args.init))):
        raise InputError(f"{path} would be overwritten, which this training has not made; give another --out")


def usable_samples(args):
    """The Samples of --data that pseudo labels can be made of or, in --labels, have been made of."""
    found = read_samples(args.data)
    if not args.labels:
        samples = with_classes(found)
    else:  # one with classes but without labels is not left out: require_labels names it
        samples = [
            sample
            for sample in found
            if cam_labels.is_done(args.labels, sample.stem)
            or (pseudo_maps_can_be_made(sample) and not cam_labels.is_untold(args.labels, sample.stem))
        ]
        if not samples:
            raise InputError(f"{args.labels} has pseudo labels of no photograph in --data; check both")
    if len(samples) < len(found) and distributed.is_first():
        why = f"no pseudo labels in {args.labels}" if args.labels else "no class of the 20 is known to be in them"
        print(f"{len(found) - len(samples)} of {len(found)} photographs are left out: {why}")
    return samples


def samples_with_count(args):
    """The Samples of --data with a count of at least one; InputError when there are none."""
    samples = [sample for sample in read_samples(args.data) if sample.count]
    if not samples:
        raise InputError("no photograph has a count; name a source in --data that has them")
    return samples


def any_samples(args):
    """The Samples of --data, whatever is known of them."""
    return read_samples(args.data)


SAMPLES = {"number": samples_with_count, "opinion": any_samples}  # of the others: usable_samples


def net_config(args):
    """The NetConfig that the ablation switches describe."""
    return NetConfig(
        backbone=args.backbone,
        output_stride=args.output_stride,
        size=args.size,
        channels=args.channels,
        mixing=not (args.no_ca or args.no_cfm),
        attention="none" if args.no_ca else args.ma,
        enhancement=not args.no_be,
        canny=args.canny,
        count_head=not args.no_lsu,
    )


def settings_of(args, *names):
    """The options that a stage depends on, as plain values."""
    return {name: getattr(args, name) for name in ("backbone", "output_stride", "size", *names)}


LABELS = ("no_crf", "plain_cam", "cam_scales")
START = "the weights that training starts from"
SCHEDULE = ("seed", "batch_size", "epochs", "lr", "optimizer", "backbone_lr", "freeze")


def run_stage(args, samples, device, stage, model, dataset, losses, *, inputs, settings=(), show=None, finish=None):
    """Train one stage in its folder and leave the result in its weights.pt, with the configuration of its network.

    inputs(): the digests of what the stage reads, for utils.provenance.bind; settings: names of options that it
    depends on beside the schedule. finish: what the first process does with the trained model before it is saved.
    """
    folder = make_folder(args.out / stage)
    schedule = Schedule.of(args)
    if show:
        show = partial(show, samples=samples[:8], args=args, device=device, labels=labels_folder(args))
    distributed.from_first(lambda: provenance.bind(folder, settings_of(args, *SCHEDULE, *settings), inputs()))
    if (folder / "weights.pt").exists():
        if distributed.is_first():
            print(f"{stage}: already trained")
        return
    with SummaryWriter(folder) if distributed.is_first() else nullcontext() as writer:
        train(
            model.to(device),
            dataset,
            losses,
            schedule,
            folder=folder,
            device=device,
            writer=writer,
            show=show,
            name=stage,
        )
    if distributed.is_first():
        if finish:
            finish(model)
        config = asdict(net_config(args))
        checkpoint.save({"model": model.state_dict(), "config": config}, folder / "weights.pt")


def initialize(model, part, args):
    """Give a branch its starting weights: its backbone those of ImageNet, or what the CAM classifier made of them, or
    all of it what the same ``part`` of another WSIDNet has learned. Returns the digest of these."""
    start = model.backbone
    if args.init == "cam":
        model.backbone.load_state_dict(finished_classifier(args).backbone.state_dict())
    elif args.init == "imagenet":
        load_pretrained(model.backbone, args.backbone_weights)
    else:
        same_network(args)
        start = getattr(args.start, part)
        model.load_state_dict(start.state_dict())
        if part == "branches":
            model.centroid.mean_offset.zero_()  # it is that of the V before, and V now learns without it
    model.backbone.freeze(args.freeze)
    return digest.of_state(start.state_dict())


def same_network(args):
    """InputError, naming the options, when the network in --init FILE is not the one that the options describe.

    It may be trained on at another --size, and the parts that are added later are not the branches'.
    """
    now, before = (asdict(config) for config in (net_config(args), args.start.config))
    differs = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if now[name] != before[name] and name not in ("size", "number", "opinion")
    ]
    if differs:
        raise InputError(f"--init {args.init} is a network of other settings ({'; '.join(differs)}); give its own")


def finished_classifier(args):
    """The trained Classifier that the pseudo labels of this run come from; InputError without one."""
    model = Classifier(args.backbone, args.output_stride)
    path = classifier_file(args)
    if not path.exists():
        raise InputError(f"there is no trained classifier at {path}; run --stage cam first")
    try:
        model.load_state_dict(checkpoint.load(path)["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} was trained with another --backbone; give the same one, or another --out") from error
    return model


def classifier_file(args):
    return labels_folder(args).parent / "cam" / "weights.pt"


def train_classifier(args, samples, device):
    """Stage cam: multi-label classification of the 20 classes (Sec. 4.2)."""
    model = Classifier(args.backbone, args.output_stride)
    load_pretrained(model.backbone, args.backbone_weights)
    start = digest.of_state(model.backbone.state_dict())
    model.backbone.freeze(args.freeze)
    dataset = TrainingImages(samples, args.size, crop=0.5, jitter=0.2, seed=args.seed)

    def inputs():
        return provenance.inputs_of(samples, "classes") | {START: start}

    def losses(model, batch, progress):
        logits = model(batch["image"]).float()
        return {"classification": F.multilabel_soft_margin_loss(logits, batch["classes"])}

    run_stage(args, samples, device, "cam", model, dataset, losses, inputs=inputs, show=visualize.show_cams)


def make_labels(args, samples, device):
    """Stage labels: class activation maps here, the CRF in worker processes, two PNGs per photograph."""
    folder = make_folder(labels_folder(args))
    model = finished_classifier(args)
    distributed.from_first(bind_labels, args, samples)
    model.to(device).eval()
    for kind in ("saliency", "classes"):
        make_folder(folder / kind)
    samples = distributed.shard(samples)
    todo = [sample for sample in samples if not cam_labels.is_done(folder, sample.stem)]
    thresholds = cam_labels.PLAIN if args.plain_cam else cam_labels.SPREAD
    with WorkerPool(args.workers) as pool:
        for sample in tqdm(todo, desc="labels", initial=len(samples) - len(todo), total=len(samples), mininterval=2):
            image = to_tensor(load_square(sample.path, CAM_SIZE))[None].to(device)
            cams = (
                activations(model, image, sample.classes, args.cam_scales, args.size, not args.plain_cam)[0]
                .cpu()
                .numpy()
            )
            pool.submit(
                cam_labels.write_pseudo_labels,
                folder,
                sample,
                cams,
                sample.classes,
                args.size,
                thresholds,
                not args.no_crf,
            )


def bind_labels(args, samples):
    """The folder of this run's pseudo labels belongs to its classifier and, one by one, to the photographs."""
    notes = provenance.photographs(samples, "classes")  # of any photographs: more can be added
    finished = partial(cam_labels.is_done, labels_folder(args))
    provenance.bind(labels_folder(args), settings_of(args, *LABELS), classifier_input(args), notes, finished)


def classifier_input(args):
    """The input of the pseudo labels that they have in common."""
    return {"the classifier": digest.of_state(checkpoint.load(classifier_file(args))["model"])}


def labels_folder(args):
    """Where the pseudo labels of this run are or come from."""
    return args.labels or args.out / "labels"


def require_labels(args, samples):
    """The folder of the pseudo labels; InputError when a photograph has none, or when they were made from other
    photographs or, in a run that makes its own, by another classifier."""
    folder = labels_folder(args)
    remedy = "run what made the others again" if args.labels else "run --stage labels first"
    cam_labels.require(folder, samples, remedy)
    own = not args.labels and classifier_file(args).exists()
    distributed.from_first(provenance.check, folder, classifier_input(args) if own else {}, samples)
    return folder


def bandwidth(progress, size):
    """h of the soft centroid count, coarse to fine: 12 then 6 pixels of a 128x128 grid, the same share of others.

    Finer than that it counts the scatter of V, not its centroids.
    """
    return (12.0 if progress < 0.5 else 6.0) * size / 512


def edges_and_instances(image, maps, count, canny, radius):
    """What else the branches need of a photograph: its edges, its counted instances on the stride-4 grid, and what
    their losses divide by."""
    instances = split_labels_by_count(maps["pseudo_classes"], count)
    labels = (maps["pseudo_classes"], maps["pseudo_saliency"] > 0.5, np.array(count), instances)
    by = divisors(*(torch.from_numpy(label)[None] for label in labels), radius)
    return {"edges": canny_edges(image, mode=canny)[None], "instances": instances, "divisors": by[0].numpy()}


def train_branches(args, samples, device):
    """Stage branches: the boundary and the centroid branch together, L_B + L_V + L_su (Sec. 3.1, 3.2, 4.2)."""
    labels = require_labels(args, samples)
    model = net_config(args).build_branches()
    start = initialize(model, "branches", args)
    # No cropping: the count label holds for whole photographs.
    maps = {"pseudo_classes": labels / "classes", "pseudo_saliency": labels / "saliency"}
    derive = partial(edges_and_instances, canny=args.canny, radius=args.radius)
    dataset = TrainingImages(samples, args.size, jitter=0.2, maps=maps, derive=derive, seed=args.seed)

    def losses(model, batch, progress):
        maps = model(batch["image"], batch["edges"])
        boundary, offsets = (m.float() for m in maps[:2])  # the losses are too fine for bfloat16
        classes, (pairs, speaking, number) = batch["pseudo_classes"], batch["divisors"].split((3, 1, 1))
        terms = {
            "boundary": boundary_loss(boundary, classes, args.radius, pairs),
            "centroid": centroid_loss(offsets, classes, args.radius, pairs),
        }
        if not args.no_lsu:
            salient = batch["pseudo_saliency"] > 0.5
            seed = args.seed + int(progress * 1e9)
            width = bandwidth(progress, args.size)
            count = subitizing_loss(offsets, salient, batch["count"], width, seed=seed, valid_fraction=speaking[0])
            terms["subitizing"] = args.lsu_weight * count
            terms["counted"] = args.counted_weight * centroid_target_loss(offsets, batch["instances"], number[0])
        return terms

    settings = (
        "channels",
        "no_ca",
        "no_cfm",
        "ma",
        "no_be",
        "canny",
        "no_lsu",
        "radius",
        "lsu_weight",
        "counted_weight",
    )

    def inputs():
        found = provenance.inputs_of(samples, "count") | cam_labels.inputs(labels, samples, "classes", "saliency")
        if model.count_head:  # it learns from photographs without pseudo labels too
            counted = provenance.photographs(samples_with_count(args), "count")
            found["a photograph that the count head learns from"] = digest.of_value(counted)
        return found | {START: start}

    def finish(model):
        if args.no_lsu or not args.counted_weight:  # counted instances have settled V's constant
            model.centroid.mean_offset.copy_(mean_offset(model, samples, args, device))
        if model.count_head:
            fit_count(model, samples_with_count(args), args, device)  # those too whose instances no label tells

    run_stage(
        args,
        samples,
        device,
        "branches",
        model,
        dataset,
        losses,
        inputs=inputs,
        settings=settings,
        show=visualize.show_branches,
        finish=finish,
    )


def some_of(samples):
    """Every so many of the samples, some 500 in all: they fix a mean over the training set well enough."""
    return samples[:: max(1, len(samples) // 500)]


@torch.no_grad()
def mean_offset(model, samples, args, device):
    """The mean of V over the training set: L_V fixes V only up to a constant [IRN]. Returns [1,2,1,1]."""
    model.eval()
    model.centroid.mean_offset.zero_()
    chosen = some_of(samples)
    total = torch.zeros(1, 2, 1, 1, device=device)
    for sample in tqdm(chosen, desc="mean offset", mininterval=2):
        inputs = network_input(load_square(sample.path, args.size), args.canny, device)
        total += model(*inputs)[1].mean((2, 3), keepdim=True)
    return total / len(chosen)


@torch.no_grad()
def fit_count(model, samples, args, device):
    """Teach the count head the count labels of the samples, which all have one."""
    model.eval()
    pooled = pooled_features(model.backbone, samples, args, device)
    model.count_head.fit(pooled, torch.tensor([sample.count for sample in samples], device=device))


@torch.no_grad()
def pooled_features(backbone, samples, args, device):
    """What the count head sees of photographs: [M,C_4 + C_5] of CountHead.pool."""
    pooled = []
    for sample in tqdm(samples, desc="count", mininterval=2):
        image = to_tensor(load_square(sample.path, args.size))[None].to(device)
        pooled.append(CountHead.pool(backbone(image)))
    return torch.cat(pooled)


def train_saliency(args, samples, device):
    """Stage saliency: binary cross entropy on the saliency pseudo masks (Sec. 3)."""
    labels = require_labels(args, samples)
    model = net_config(args).build_saliency()
    start = initialize(model, "saliency", args)
    dataset = TrainingImages(
        samples, args.size, crop=0.7, jitter=0.2, maps={"pseudo_saliency": labels / "saliency"}, seed=args.seed
    )

    def inputs():
        return provenance.inputs_of(samples) | cam_labels.inputs(labels, samples, "saliency") | {START: start}

    run_stage(
        args,
        samples,
        device,
        "saliency",
        model,
        dataset,
        saliency_losses,
        inputs=inputs,
        settings=("channels",),
        show=visualize.show_saliency,
    )


def train_count_net(args, samples, device):
    """Stage number: how many objects there are, from the count labels alone (models.count_head.CountNet).

    It starts from the branches' backbone of the network in --init, which with it becomes OUT/weights.pt.
    """
    net = args.start
    if not net.config.count_head:
        raise InputError(f"{args.init} was trained with --no-lsu and tells no number; name a network that does")
    args.backbone, args.output_stride = net.config.backbone, net.config.output_stride
    model = replace(net.config, count_net=args.size).build_count_net()
    model.backbone.load_state_dict(net.branches.backbone.state_dict())
    model.backbone.freeze(args.freeze)
    trained = args.out / "number" / "weights.pt"
    if not trained.exists():
        model.to(device).eval().counting.standardize(pooled_features(model.backbone, some_of(samples), args, device))
    # Crops that leave nearly everything: an object that is cut off counts.
    dataset = TrainingImages(samples, args.size, crop=0.9, jitter=0.2, seed=args.seed)

    def losses(model, batch, progress):
        return {"number": count_loss(model.count_head.logits(model.features(batch["image"])), batch["count"])}

    def inputs():
        return provenance.inputs_of(samples, "count") | {START: digest.of_state(net.state_dict())}

    run_stage(args, samples, device, "number", model, dataset, losses, inputs=inputs)
    if distributed.is_first():
        model.load_state_dict(checkpoint.load(trained)["model"])
        save_weights(with_parts(net, number=model), args.out / "weights.pt", note=origin(args))
        print(f"{args.init}, and who tells its number, are in {args.out / 'weights.pt'}")


CELLS, MOST_CELLS = 64, 200_000  # of each photograph that the second opinion learns from, and of all


@torch.no_grad()
def fit_saliency_prior(args, samples, device):
    """Stage opinion: a linear layer on a backbone as ImageNet left it learns what S says (models.saliency_prior).

    The photographs need no labels. The network in --init with it becomes OUT/weights.pt.
    """
    if not distributed.is_first():  # one pass, and nothing to share
        return
    net = args.start.to(device)
    args.backbone, args.output_stride = net.config.backbone, net.config.output_stride
    model = replace(net.config, saliency_prior=args.size).build_saliency_prior()
    load_pretrained(model.backbone, args.backbone_weights)
    inputs = {START: digest.of_state(net.state_dict()), "the backbone": digest.of_state(model.backbone.state_dict())}
    settings = settings_of(args, "seed", "odds")
    provenance.bind(make_folder(args.out / "opinion"), settings, inputs | provenance.inputs_of(samples))
    model.weights.copy_(torch.tensor(args.odds))
    model.to(device).eval()
    cells = max(1, min(CELLS, MOST_CELLS // len(samples)))
    generator, features, saliency = torch.Generator().manual_seed(args.seed), [], []
    for sample in tqdm(samples, desc="opinion", mininterval=2):
        image = to_tensor(load_square(sample.path, net.config.size))[None].to(device)
        seen = model.features(image)[0]
        told = F.adaptive_avg_pool2d(net.saliency(image)[0], seen.shape[-2:])
        chosen = torch.randperm(told.numel(), generator=generator)[:cells].to(device)
        features.append(seen.flatten(1)[:, chosen].t())
        saliency.append(told.flatten()[chosen])
    model.fit(torch.cat(features), torch.cat(saliency))
    save_weights(with_parts(net, saliency_prior=model), args.out / "weights.pt", note=origin(args))
    print(f"{args.init}, with a second opinion on what is salient, is in {args.out / 'weights.pt'}")


def saliency_losses(model, batch, progress):
    """Binary cross entropy of the saliency logits against soft pseudo masks, on the stride-4 grid."""
    logits = model.logits(batch["image"]).float()
    return {"saliency": F.binary_cross_entropy_with_logits(logits, batch["pseudo_saliency"][:, None])}


def assemble(args):
    """Write runs/NAME/weights.pt, what infer.py takes, once both nets are trained.

    Its configuration is the one that the branches were trained with; InputError when the saliency branch does not fit.
    With the --labels of an iteration of train_pts.py, the saliency branch of that iteration goes with the branches;
    with an --init FILE that has a network for the number or a second opinion, so do these.
    """
    parts = {"branches": args.out / "branches" / "weights.pt", "saliency": args.out / "saliency" / "weights.pt"}
    iteration = args.labels and args.labels.resolve().parent
    if iteration and iteration.parent.name == "pts" and not parts["saliency"].exists():
        parts["saliency"] = iteration / "weights.pt"
    missing = [str(path) for path in parts.values() if not path.exists()]
    if missing:
        print(f"the network will be in {args.out / 'weights.pt'} when {missing[0]} is there too")
        return
    saved = {name: checkpoint.load(path) for name, path in parts.items()}
    try:
        configs = {name: part["config"] for name, part in saved.items()}
        differs = [
            f"{key} {configs['branches'][key]} and {configs['saliency'][key]}"
            for key in SaliencyNet.SETTINGS
            if configs["branches"][key] != configs["saliency"][key]
        ]
        if differs:
            raise InputError(
                f"{parts['branches']} and {parts['saliency']} do not go together ({'; '.join(differs)}); "
                "train one of them anew with the settings of the other"
            )
        net = WSIDNet(NetConfig(**configs["branches"]), args.fusion)
        for name, part in saved.items():
            getattr(net, name).load_state_dict(part["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{args.out} holds parts of an earlier version of this program; train it anew") from error
    if args.start and args.start.count_net and net.config.count_head:
        net = with_parts(net, count_net=args.start.count_net)
    if args.start and args.start.saliency_prior:
        net = with_parts(net, saliency_prior=args.start.saliency_prior)
    save_weights(net, args.out / "weights.pt", note=origin(args))
    print(f"the network is in {args.out / 'weights.pt'}; try it: python infer.py --img samples")


if __name__ == "__main__":
    run(main)
