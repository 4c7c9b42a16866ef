"""Measure salient instances against ground-truth masks: average precision, count, saliency.

The predictions of any methods, one row of the table each:

    python evaluate.py --pred predictions.json --gt data/val/instance_masks
    python evaluate.py --pred ours=predictions.json irn=irn_masks --gt data/val/instance_masks --html report.html

or the weights of this repository:

    python evaluate.py --weights weights/FILE --data data/val --html report.html

--pred takes any of

    a file                 COCO result records whose image_id is the stem of the mask file, as infer.py writes, or an
                           id of the ground truth's COCO file; also a whole COCO dictionary
    a folder               one label map per image, <stem>.png: 0 background, 1..254 instances. The score of label n is
                           1 / n, or that in a scores.csv of the folder with the columns file,label,score
    a folder, scores.csv   one mask per instance, <stem>_<k>.png: 0 background, one other value; columns file,score

AP has a 95 % bootstrap interval over the images. Of several rows, each is compared with the first: the difference of AP
and the standard error of this paired difference. An image that cannot be measured, such as one whose mask has another
size, is named and left out of all rows: exit code 1.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.labels import Report, collect_into
from datasets.listing import list_images
from datasets.sources import list_ground_truth, masks_by_stem, read_ground_truth
from engine import hparams
from engine.evaluation import GroundTruth, Method, measure_files, measure_predictor, summarize_methods
from engine.perturbations import PERTURBATIONS
from engine.predictions import coco_ids
from engine.report import format_page, format_table
from models import METHODS
from utils import files
from utils.cli import InputError, Parser, add_gpu_option, number, path_of, select_device
from utils.script import report_problems, run

LISTED = 20  # the images that could not be measured are printed one by one up to so many


def get_args_parser() -> Parser:
    parser = Parser(description=__doc__)
    predictions = parser.add_argument_group("evaluate predictions")
    predictions.add_argument(
        "--pred",
        nargs="+",
        action="extend",
        type=_named_path,
        metavar="[NAME=]PATH",
        help="files or folders, see above",
    )
    predictions.add_argument(
        "--gt", type=path_of, metavar="PATH[@SPLIT]", help="instance masks: 0, 1..N, 255 void; all images count"
    )
    predictions.add_argument("--saliency-pred", type=path_of, metavar="DIR", help="saliency maps, one per mask")
    predictions.add_argument(
        "--images",
        type=path_of,
        metavar="DIR",
        help="photographs for --html; default: images/ beside --gt, else grey",
    )

    model = parser.add_argument_group("evaluate weights")
    model.add_argument(
        "--data", type=path_of, metavar="PATH[@SPLIT]", help="photographs with instance masks (docs/data.md)"
    )
    model.add_argument("--weights", type=path_of, metavar="FILE", help="default: those infer.py takes")
    add_gpu_option(model)
    model.add_argument("--method", choices=METHODS, help="as for infer.py; default: wsid")
    model.add_argument("--fusion", nargs="+", metavar="NAME=VALUE", help="as for infer.py")
    model.add_argument("--no-refine", action="store_const", const=True, help="as for infer.py")
    model.add_argument("--saliency-dir", type=path_of, metavar="DIR", help="<stem>.png maps that replace S (Table 6)")
    model.add_argument(
        "--perturb",
        nargs="?",
        const="mild",
        choices=PERTURBATIONS,
        help="also measure changed photographs, a row each, and the mean of all rows: mild (the default), for choosing "
        "settings: reduced to 360 pixels as JPEG, mirrored, half a stop darker and brighter; or exposure: -3 to +3 EV",
    )
    model.add_argument(
        "--log",
        type=path_of,
        metavar="RUN",
        help="write the figures and the settings of this run for TensorBoard's HParams tab",
    )
    model.add_argument("--save-pred", type=path_of, metavar="FILE", help="write the predictions as COCO results")
    model.add_argument(
        "--coco-ids",
        type=path_of,
        metavar="FILE",
        help="with --save-pred: image ids of this COCO annotation file instead of stems",
    )

    parser.add_argument(
        "--count-threshold",
        type=number(None),
        default=0.0,
        metavar="T",
        help="lowest score of the predictions that are counted, and drawn",
    )
    parser.add_argument(
        "--json",
        type=path_of,
        metavar="FILE",
        help="write all figures, as fractions; those of several rows under their names",
    )
    parser.add_argument(
        "--html",
        type=path_of,
        metavar="FILE",
        help="write one page with the table, the curves, the best and the worst images",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    _check_options(args)
    problems: list[InputError] = []
    gt_masks, photographs = _ground_truth(args, collect_into(problems))
    if args.pred:
        methods = measure_files(dict(args.pred), gt_masks, problems.append, args.saliency_pred)
    else:
        methods = _measure_weights(args, gt_masks, photographs, problems.append)
    if not methods or not methods[0].results:
        raise InputError(f"none of {len(problems)} images can be measured; the first: {problems[0]}")

    summaries = summarize_methods(methods, args.count_threshold)
    print(format_table(summaries))
    first = methods[0].name
    if args.log:
        hparams.write(args.log, first, summaries[first])
    if args.json:
        numbers = summaries if len(summaries) > 1 else summaries[first]
        _write(args.json, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    if args.html:
        page = format_page(methods, summaries, gt_masks, photographs, args.count_threshold, problems.append)
        _write(args.html, page)
    return report_problems(problems, LISTED)


def _measure_weights(
    args: argparse.Namespace,
    gt_masks: GroundTruth,
    photographs: Mapping[str, Path],
    report: Report,
) -> list[Method]:
    """The rows of --weights; writes --save-pred."""
    from engine.predictor import Predictor  # here, because evaluating files needs no network

    ids = coco_ids(args.coco_ids, gt_masks) if args.coco_ids else {stem: stem for stem in gt_masks}
    device = select_device(args.gpu)
    method, refine = args.method or "wsid", not args.no_refine
    predictor = Predictor(args.weights, device, method=method, settings=args.fusion, ranked=True, refine=refine)
    perturbations = PERTURBATIONS[args.perturb] if args.perturb else ()
    methods = measure_predictor(predictor, gt_masks, photographs, report, args.saliency_dir, perturbations)
    if args.save_pred and methods:
        records = [record | {"image_id": ids[record["image_id"]]} for record in methods[0].records]
        _write(args.save_pred, json.dumps(records) + "\n")
    return methods


def _ground_truth(args: argparse.Namespace, report: Report) -> tuple[GroundTruth, dict[str, Path]]:
    """({stem: mask}, {stem: photograph}); every mask has a photograph with --data or --images."""
    if args.data:
        samples = read_ground_truth(args.data, report)
        return masks_by_stem(samples), {sample.stem: sample.path for sample in samples}
    masks = list_ground_truth(args.gt, report)
    folder = args.images or args.gt.parent / "images"
    if not (args.images or (args.html and folder.is_dir())):
        return masks, {}
    photographs = {path.stem: path for path in list_images(folder)}
    for stem, mask in masks.items():
        if args.images and stem not in photographs:
            raise InputError(f"{mask} has no photograph in {folder}; add it or remove the mask")
    return masks, photographs


def _named_path(text: str) -> tuple[str, Path]:
    """The ``type=`` of --pred: NAME=PATH or PATH as (name, path); a text that exists as a path has no NAME in it."""
    name, _, path = text.partition("=")
    if name and path and not path_of(text).exists():
        return name, path_of(path)
    return path_of(text).resolve().name.removesuffix(".json"), path_of(text)


def _check_options(args: argparse.Namespace) -> None:
    """Raise the InputErrors of the options and of the files to write before the work begins."""
    if (args.pred is None) == (args.data is None):
        raise InputError("give either --pred PATH with --gt DIR, or --data DIR (with --weights FILE)")
    if args.pred and args.gt is None:
        raise InputError("--pred needs --gt, the folder of the instance masks")
    of_weights = ("weights", "saliency_dir", "save_pred", "coco_ids", "method", "fusion", "no_refine", "perturb", "log")
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
    if args.perturb and args.saliency_dir:
        raise InputError("--perturb changes the photographs but not --saliency-dir; leave one of the two out")
    named: dict[str, Path] = {}
    for name, path in args.pred or ():
        if named.setdefault(name, path) is not path:
            raise InputError(f"{path} and {named[name]} are both called {name}; name them, as in --pred one={path}")
    if args.log:
        hparams.settings_of(args.log)
    used = {path.resolve() for path in (*named.values(), args.coco_ids, args.weights) if path}
    for path in filter(None, (args.json, args.save_pred, args.html)):
        if path.resolve() in used:
            raise InputError(f"{path} is to be written but is named twice, or is read too; choose another name")
        used.add(path.resolve())
        _check_writable(path)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another place") from error
    replaced = path.is_file() or not path.exists()  # then the folder must be writable, else the pipe or device
    if path.is_dir() or not os.access(path.parent if replaced else path, os.W_OK):
        raise InputError(f"cannot write {path}; choose the name of a file in a writable folder")


def _write(path: Path, text: str) -> None:
    # File names in the text may not be valid UTF-8: such bytes become '?'.
    files.write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


if __name__ == "__main__":
    run(main)
