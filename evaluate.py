"""Measure salient instances against ground-truth masks: average precision, count, saliency.

The predictions of any methods, a row of the table each:

    python evaluate.py --pred predictions.json --gt data/val/instance_masks
    python evaluate.py --pred ours=predictions.json irn=irn_masks --gt data/val/instance_masks --html report.html

or the weights of this repository:

    python evaluate.py --weights weights/FILE --data data/val --html report.html

--pred takes, whichever is given:

    a file                 COCO result records whose image_id is the stem of the mask file, as infer.py writes, or an
                           id of the ground truth's COCO file; also a whole COCO dictionary
    a folder               one label map an image, <stem>.png: 0 background, 1..254 instances. Label n scores 1 / n,
                           or what scores.csv in the folder says in the columns file,label,score
    a folder, scores.csv   one mask an instance, <stem>_<k>.png: 0 background, one other value; columns file,score

An image that cannot be measured, such as one whose mask has another size, is named and left out of all rows: exit
code 1.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.labels import LabelWarning, raise_or_warn
from datasets.listing import list_images
from datasets.masks import list_masks, prediction_records, read_saliency_mask
from datasets.sources import list_ground_truth, read_ground_truth
from engine import hparams
from engine.metrics import SaliencyMetrics, match_instances, summarize
from engine.predictions import check_size, coco_ids, group_records, open_predictions
from engine.report import format_page, format_table
from models import METHODS
from utils import files
from utils.cli import InputError, Parser, integer, number, run, select_device

NAMED = 20  # images that could not be measured; of more the number is told


@dataclass
class Method:
    """A row of the table. found: {stem: load} of engine.predictions; results: {stem: ImageResult} of every mask file
    that could be measured."""

    name: str
    found: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    saliency: SaliencyMetrics = field(default_factory=SaliencyMetrics)

    def summary(self, count_threshold):
        """The numbers of engine.metrics.summarize."""
        measured = self.saliency if self.saliency.summary()["images"] else None
        return summarize(list(self.results.values()), measured, count_threshold)


def get_args_parser():
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("evaluate predictions")
    files.add_argument("--pred", nargs="+", action="extend", metavar="[NAME=]PATH", help="files or folders, see above")
    files.add_argument("--gt", metavar="PATH[@SPLIT]", help="instance masks: 0, 1..N, 255 void; all count")
    files.add_argument("--saliency-pred", type=Path, metavar="DIR", help="saliency maps, one per mask")
    files.add_argument(
        "--images", type=Path, metavar="DIR", help="photographs for --html; without it images/ beside --gt, else grey"
    )

    model = parser.add_argument_group("evaluate weights")
    model.add_argument("--data", metavar="PATH[@SPLIT]", help="photographs with instance masks, see README")
    model.add_argument("--weights", type=Path, metavar="FILE", help="without it those infer.py takes")
    model.add_argument("--gpu", type=integer(-1), default=-1, metavar="N", help="CUDA device, -1 for the CPU")
    model.add_argument(
        "--method",
        choices=METHODS,
        help="as for infer.py, wsid unless another is named; components are the baseline",
    )
    model.add_argument("--fusion", nargs="+", metavar="NAME=VALUE", help="as for infer.py")
    model.add_argument("--saliency-dir", type=Path, metavar="DIR", help="<stem>.png maps that replace S (Table 6)")
    model.add_argument(
        "--log",
        type=Path,
        metavar="RUN",
        help="put the figures into TensorBoard's HParams tab, with this run's settings",
    )
    model.add_argument("--save-pred", type=Path, metavar="FILE", help="write the predictions as COCO results")
    model.add_argument(
        "--coco-ids",
        type=Path,
        metavar="FILE",
        help="with --save-pred: image ids of this COCO annotation file in place of stems",
    )

    parser.add_argument(
        "--count-threshold",
        type=number(None),
        default=0.0,
        metavar="T",
        help="count, and draw, predictions scoring at least T",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all numbers, as fractions; of several methods under their names",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write one page with the table, the curves, the best and the worst images",
    )
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    _check_options(args)
    problems = []

    def report(error):
        if isinstance(error, LabelWarning):
            raise_or_warn(error)  # which prints it
        else:
            problems.append(error)

    gt_masks, photographs = _ground_truth(args, report)
    if args.pred:
        methods = measure_files(args, gt_masks, problems.append)
    else:
        methods = [measure_weights(args, gt_masks, photographs, problems.append)]
    if not methods[0].results:
        raise InputError(f"none of {len(problems)} images can be measured; the first: {problems[0]}")

    summaries = {method.name: method.summary(args.count_threshold) for method in methods}
    print(format_table(summaries))
    if args.log:
        hparams.write(args.log, methods[0].name, summaries[methods[0].name])
    if args.json:
        numbers = summaries if len(methods) > 1 else summaries[methods[0].name]
        _write(args.json, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    if args.html:
        page = format_page(methods, summaries, gt_masks, photographs, args.count_threshold, problems.append)
        _write(args.html, page)
    for problem in problems[:NAMED]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > NAMED:
        print(f"error: {len(problems) - NAMED} more such", file=sys.stderr)
    return 1 if problems else 0


def measure_files(args, gt_masks, report):
    """Measure what --pred names; returns a list of Method. ``report`` gets an InputError for each image left out."""
    maps = maps_for(gt_masks, args.saliency_pred) if args.saliency_pred else None
    methods = [Method(name, open_predictions(path, gt_masks)) for name, path in _named(args.pred).items()]
    for stem, mask in tqdm(gt_masks.items(), "evaluate", unit="img", disable=None):
        try:
            gt = mask.read()
            saliency = read_saliency_mask(maps[stem]) if maps else None
            if maps:
                check_size(maps[stem], saliency.shape, gt.shape)
            loads = [method.found.get(stem, lambda shape: ((), ())) for method in methods]
            results = [match_instances(*load(gt.shape), gt) for load in loads]
        except InputError as error:  # what one method does not answer is asked of none: rows stay comparable
            report(error)
            continue
        for method, result in zip(methods, results, strict=True):
            method.results[stem] = result
        if maps:
            methods[0].saliency.add(saliency, gt)
    return methods


def measure_weights(args, gt_masks, photographs, report):
    """Run the network on every photograph that has a mask and measure what it finds; returns a Method.

    ``report`` gets an InputError for each image that is left out.
    """
    import infer  # here, because evaluating files needs no network

    if args.saliency_dir:
        maps_for(gt_masks, args.saliency_dir, png=True)  # a missing one is told before the work, not amid it
    ids = coco_ids(args.coco_ids, gt_masks) if args.coco_ids else {stem: stem for stem in gt_masks}
    device = select_device(args.gpu)
    how = args.method or "wsid"
    predictor = infer.Predictor(args.weights, device, method=how, settings=args.fusion)

    def finish(path, image, prediction):
        try:
            gt = gt_masks[path.stem].read()
            check_size(path, image.shape, gt.shape)
        except InputError as error:
            return error
        records = prediction_records(path.stem, prediction.masks, prediction.scores)
        return path.stem, gt, match_instances(prediction.masks, prediction.scores, gt), prediction.saliency, records

    method, records = Method(f"{predictor.weights.stem} ({how})"), []
    workers = min(4, torch.get_num_threads())
    paths = [photographs[stem] for stem in gt_masks]
    measured = infer.process(paths, predictor, finish, infer.default_batch_size(device), workers, args.saliency_dir)
    for result in tqdm(measured, "evaluate", len(paths), unit="img", disable=None):
        if isinstance(result, InputError):
            report(result)
            continue
        stem, gt, method.results[stem], saliency, found = result
        method.saliency.add(saliency, gt)
        records += found
    if args.save_pred and method.results:
        named = [record | {"image_id": ids[record["image_id"]]} for record in records]
        _write(args.save_pred, json.dumps(named) + "\n")
    method.found = group_records(records, args.save_pred, {}, gt_masks)
    return method


def maps_for(stems, folder, png=False):
    """{stem: saliency map} of a folder that must have one for each of ``stems``; png: of the name <stem>.png alone."""
    maps = list_masks(folder)
    for stem in stems:
        if stem not in maps or (png and maps[stem].suffix != ".png"):
            raise InputError(f"{folder} has no saliency map of {stem}; each photograph needs {stem}.png")
    return maps


def _check_options(args):
    """Say what does not fit before the work, not after it."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))
    if (args.pred is None) == (args.data is None):
        raise InputError("give either --pred PATH with --gt DIR, or --data DIR (with --weights FILE)")
    if args.pred and args.gt is None:
        raise InputError("--pred needs --gt, the folder of the instance masks")
    of_weights = ("weights", "saliency_dir", "save_pred", "coco_ids", "method", "fusion", "log")
    for name in of_weights if args.pred else ("gt", "saliency_pred", "images"):
        if getattr(args, name) is not None:
            flag, mode = "--" + name.replace("_", "-"), "--pred" if args.pred else "--data"
            raise InputError(f"{flag} has no meaning with {mode}; leave one of the two out")
    if args.images and not args.html:
        raise InputError("--images has no meaning without --html; add the page to write or leave it out")
    if args.saliency_pred and len(args.pred) > 1:
        raise InputError("--saliency-pred is of one method; give one --pred with it")
    if args.coco_ids and not args.save_pred:
        raise InputError("--coco-ids has no meaning without --save-pred; name the file to write or leave it out")
    if args.log:
        hparams.settings_of(args.log)
    used = {Path(path).resolve() for path in (*_named(args.pred or []).values(), args.coco_ids, args.weights) if path}
    for path in filter(None, (args.json, args.save_pred, args.html)):
        if path.resolve() in used:
            raise InputError(f"{path} is to be written but is named twice, or is read too; choose another name")
        used.add(path.resolve())
        _check_writable(path)


def _named(arguments):
    """["NAME=PATH" or PATH, ...] -> {name: Path}; a path that exists as it stands, '=' and all, is no name."""
    paths = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not (name and path) or Path(argument).exists():
            name, path = Path(argument).resolve().name.removesuffix(".json"), argument
        if name in paths:
            raise InputError(f"{path} and {paths[name]} are both called {name}; name them, as in --pred one={path}")
        paths[name] = Path(os.path.expanduser(path))
    return paths


def _ground_truth(args, report):
    """({stem: mask}, {stem: photograph}): one photograph for every mask with --data or --images, else what is there."""
    if args.data:
        samples = read_ground_truth(args.data, report)
        return {sample.stem: sample.mask for sample in samples}, {sample.stem: sample.path for sample in samples}
    masks = list_ground_truth(args.gt, report)
    folder = args.images or Path(os.path.expanduser(args.gt)).parent / "images"
    if not (args.images or (args.html and folder.is_dir())):
        return masks, {}
    photographs = {path.stem: path for path in list_images(folder)}
    for stem, mask in masks.items():
        if args.images and stem not in photographs:
            raise InputError(f"{mask} has no photograph in {folder}; add it or remove the mask")
    return masks, photographs


def _check_writable(path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another place") from error
    replaced = path.is_file() or not path.exists()  # by another file, which its folder has to take
    if path.is_dir() or not os.access(path.parent if replaced else path, os.W_OK):
        raise InputError(f"cannot write {path}; choose the name of a file in a writable folder")


def _write(path, text):
    # A file name need not be UTF-8; what is not shows as '?'.
    files.write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


if __name__ == "__main__":
    run(main)
