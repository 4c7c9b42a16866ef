"""Measure salient instances against ground-truth masks: average precision, count, saliency.

Any method's predictions, as COCO result records whose image_id is the stem of the mask file:

    python evaluate.py --pred predictions.json --gt data/val/instance_masks

or the weights of this repository, image by image:

    python evaluate.py --weights weights/FILE --data data/val
"""

import argparse
import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from datasets.images import list_images, read_image
from datasets.masks import decode_rle, list_masks, prediction_records, read_instance_mask, read_saliency_mask
from utils.cli import Help, InputError, run, select_device
from utils.metrics import SaliencyMetrics, match_instances, summarize
from utils.parallel import map_ahead


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    files = parser.add_argument_group("evaluate a file of predictions")
    files.add_argument("--pred", type=Path, metavar="FILE", help="COCO result records (predictions.json)")
    files.add_argument("--gt", type=Path, metavar="DIR", help="instance masks: 0, 1..N, 255 void; all count")
    files.add_argument("--saliency-pred", type=Path, metavar="DIR", help="saliency maps, one per mask")

    model = parser.add_argument_group("evaluate weights")
    model.add_argument("--data", type=Path, metavar="DIR", help="folder with images/ and instance_masks/")
    model.add_argument("--weights", type=Path, metavar="FILE", help="without it those infer.py takes")
    model.add_argument("--gpu", type=int, default=-1, metavar="N", help="CUDA device, -1 for the CPU")
    model.add_argument(
        "--method",
        choices=("wsid", "components"),
        default="wsid",
        help="the method, or the connected components of its saliency map",
    )
    model.add_argument("--saliency-dir", type=Path, metavar="DIR", help="maps that replace S (Table 6)")
    model.add_argument("--save-pred", type=Path, metavar="FILE", help="write the predictions as COCO results")

    parser.add_argument(
        "--count-threshold", type=float, default=0.0, metavar="T", help="count predictions scoring at least T"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, as fractions")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    _check_options(args)
    records = [] if args.save_pred else None
    outputs = _from_file(args) if args.pred else _from_model(args, records)

    results, saliency = [], None
    for gt, masks, scores, saliency_map in outputs:
        results.append(match_instances(masks, scores, gt))
        if saliency_map is not None:
            saliency = saliency or SaliencyMetrics()
            saliency.add(saliency_map, gt)

    summary = summarize(results, saliency, args.count_threshold)
    print(format_table(summary))
    if args.save_pred:
        _write_json(args.save_pred, records, indent=None)
    if args.json:
        _write_json(args.json, summary, indent=2)


def read_predictions(path):
    """Read COCO result records as {image_id: [(where, segmentation, score), ...]}, in the order of the file.

    ``where`` names the record in messages. category_id and other keys are ignored: instances have no class.
    InputError names the record that is incomplete or malformed. Masks stay encoded.
    """
    try:
        records = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); write COCO results, as infer.py does") from error
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list; write a JSON list of COCO results, as infer.py does")
    predictions = {}
    for number, record in enumerate(records):
        where = f"{path}[{number}]"
        if not isinstance(record, dict):
            raise InputError(f"{where} is not a record; write image_id, segmentation and score")
        for key in ("image_id", "segmentation", "score"):
            if key not in record:
                raise InputError(f"{where} has no {key}; each record needs image_id, segmentation and score")
        if not _is_number(record["score"]):
            raise InputError(f"{where} has the score {record['score']!r}; use a finite number")
        segmentation = record["segmentation"]
        if not _is_rle(segmentation):
            raise InputError(f'{where} has no RLE; write segmentation as {{"size": [H, W], "counts": "..."}}')
        prediction = (where, segmentation, float(record["score"]))
        predictions.setdefault(str(record["image_id"]), []).append(prediction)
    return predictions


def format_table(summary):
    """The summary of utils.metrics.summarize as aligned text; shares in percent, '-' where undefined."""
    lines = [
        f"{summary['images']} images ({summary['images_with_instances']} with instances), "
        f"{summary['instances']} instances, {summary['predictions']} predictions",
        "",
        _row("mAP (%)", "IoU 0.5", "IoU 0.7", "0.5:0.95"),
    ]
    lines += [_row(name, *map(_percent, ap.values())) for name, ap in summary["mAP"].items()]
    count = summary["count"]
    lines += [
        "",
        _row("", "accuracy (%)", "MAE"),
        _row("count", _percent(count["accuracy"]), _number(count["mae"])),
    ]
    if summary["saliency"]:
        saliency = summary["saliency"]
        figures = _percent(saliency["max_f"]), _percent(saliency["adaptive_f"]), _number(saliency["mae"])
        lines += ["", _row("", "max F (%)", "adaptive F (%)", "MAE"), _row("saliency", *figures)]
    return "\n".join(lines)


def _check_options(args):
    """Say what does not fit before the work, not after it."""
    if (args.pred is None) == (args.data is None):
        raise InputError("give either --pred FILE with --gt DIR, or --data DIR (with --weights FILE)")
    if args.pred and args.gt is None:
        raise InputError("--pred needs --gt, the folder of the instance masks")
    strangers = ("weights", "saliency_dir", "save_pred") if args.pred else ("gt", "saliency_pred")
    for name in strangers:
        if getattr(args, name) is not None:
            flag, mode = "--" + name.replace("_", "-"), "--pred" if args.pred else "--data"
            raise InputError(f"{flag} has no meaning with {mode}; leave one of the two out")
    if not math.isfinite(args.count_threshold):
        raise InputError("--count-threshold must be a finite number")
    for path in filter(None, (args.json, args.save_pred)):
        _check_writable(path)


def _from_file(args):
    """Yield (gt, masks, scores, saliency map or None) of every mask file."""
    gt_paths = list_masks(args.gt)
    maps = _maps_for(gt_paths, args.saliency_pred)
    predictions = read_predictions(args.pred)
    for image_id, found in predictions.items():
        if image_id not in gt_paths:
            where = found[0][0]
            raise InputError(f"{where} is of the image {image_id!r}, which has no mask in {args.gt}")
    for stem, path in tqdm(gt_paths.items(), desc="evaluate", unit="img", disable=None):
        gt = read_instance_mask(path)
        found = predictions.get(stem, [])
        masks = (_decode(where, segmentation, gt, path) for where, segmentation, _ in found)
        yield gt, masks, [score for *_, score in found], _read_map(maps, stem, gt.shape, path)


def _from_model(args, records):
    """Yield (gt, masks, scores, saliency map) of every mask file; ``records`` takes the predictions."""
    from infer import Predictor  # here, because evaluating a file needs no model

    gt_paths = list_masks(args.data / "instance_masks")
    images = {path.stem: path for path in list_images(args.data / "images")}
    for stem, path in gt_paths.items():
        if stem not in images:
            raise InputError(f"{path} has no photograph in {args.data / 'images'}; add it or remove the mask")
    maps = _maps_for(gt_paths, args.saliency_dir)
    predictor = Predictor(args.weights, select_device(args.gpu), method=args.method)

    def read(stem):
        path = gt_paths[stem]
        gt, image = read_instance_mask(path), read_image(images[stem])
        if image.shape[:2] != gt.shape:
            sizes = f"{_size(image.shape)} but its mask {path} {_size(gt.shape)}"
            raise InputError(f"{images[stem]} is {sizes}; make them equal")
        return stem, gt, image, _read_map(maps, stem, gt.shape, path)

    samples = map_ahead(read, gt_paths, workers=1, ahead=2)
    for stem, gt, image, saliency in tqdm(samples, "evaluate", len(gt_paths), unit="img", disable=None):
        prediction = predictor.predict(image, saliency=saliency)
        if records is not None:
            records += prediction_records(stem, prediction.masks, prediction.scores)
        yield gt, prediction.masks, prediction.scores, prediction.saliency


def _maps_for(gt_paths, folder):
    """{stem: saliency map} for every ground-truth mask, or None without a folder."""
    if folder is None:
        return None
    maps = list_masks(folder)
    for stem in gt_paths:
        if stem not in maps:
            raise InputError(f"{folder} has no saliency map of {stem}; every mask needs one")
    return maps


def _read_map(maps, stem, shape, gt_path):
    if maps is None:
        return None
    saliency = read_saliency_mask(maps[stem])
    if saliency.shape != shape:
        raise InputError(f"{maps[stem]} is {_size(saliency.shape)} but {gt_path} {_size(shape)}; resize it")
    return saliency


def _decode(where, segmentation, gt, gt_path):
    size = tuple(segmentation["size"])
    if size != gt.shape:
        raise InputError(f"{where} is {_size(size)} but the mask {gt_path} {_size(gt.shape)}; resize it")
    try:
        return decode_rle(segmentation)
    except ValueError as error:
        raise InputError(f"{where} cannot be decoded: {error}; encode the mask with pycocotools") from error


def _check_writable(path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another place") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {path}; choose the name of a file in a writable folder")


def _write_json(path, value, indent):
    try:
        path.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another place") from error


def _is_number(value):
    # The bounds also keep out integers too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_rle(value):
    """Whether value has the keys and types of COCO RLE; its counts are checked when they are decoded."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), (str, list)):
        return False
    size = value.get("size")
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def _size(shape):
    return f"{shape[0]} x {shape[1]}"


def _row(name, *cells):
    return f"{name:<10}" + "".join(f"{cell:>16}" for cell in cells)


def _percent(share):
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value):
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run(main)
