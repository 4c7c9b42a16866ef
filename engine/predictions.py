"""What a method found, from disk: masks with scores, in the three forms that methods write.

predictions.json         COCO result records, or a whole COCO dictionary whose annotations have scores; a folder
                         with this file in it, such as infer.py's, is read as the file. image_id is the stem of
                         the mask file, or a name or number that tells it: see ``group_records``
folder of label maps     <stem>.png: 0 background, 1..254 instances. Label n scores 1 / n, unless scores.csv says
                         otherwise in the columns file,label,score
folder of masks          <stem>_<k>.png, one an instance: 0 background, one other value; and scores.csv with the
                         columns file,score
"""

import csv
import json
import math
import re
import sys
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.listing import SUFFIXES
from datasets.masks import VOID, decode_polygons, decode_rle, is_coloured, list_masks, read_instance_mask
from utils.cli import InputError


def open_predictions(path, gt_masks):
    """Open what one method found in the images of ``gt_masks``, {stem: ground-truth mask}; returns {stem: load} of
    those it says something of.

    load(shape) returns (masks, scores) of an image of ``shape`` (H, W): an iterator over n bool masks [H, W], decoded
    one at a time, and n finite scores, higher is better, of any scale. Equal scores keep the order of the file.

    Raises InputError naming the file and line or record that is missing, malformed or of another image; ``load``
    and its masks do so for what only decoding shows.
    """
    path = Path(path)
    if (path / "predictions.json").is_file():
        path = path / "predictions.json"
    if not path.is_dir():
        return group_records(*_read_records(path), gt_masks)
    files = {file.name: file for file in list_masks(path).values()}
    table = path / "scores.csv"
    if not table.exists():
        return _group_label_maps(path, files, None, None, gt_masks)
    scores, of_label_maps = _read_scores(table, files)
    if of_label_maps:
        return _group_label_maps(path, files, scores, table, gt_masks)
    return _group_masks(files, scores, table, gt_masks)


def group_records(records, source, images, gt_masks):
    """``open_predictions`` of a list of COCO result records; ``source`` names them in messages.

    images: {id: its record} of the images that the predictions' own file lists, or {}. Where there are any, their file
    names tell what an image_id means. Otherwise a number is an id of the ground truth's COCO file, or else a name; a
    string is a name, or else such an id. A name may have a folder, an image's suffix, and more or fewer leading zeros
    than the stem.

    category_id and other keys are ignored: instances have no class. Masks stay encoded until they are asked for. A
    record that repeats another counts twice, as in COCO; that there are such is said on standard error.
    """
    checked = [_check_record(f"{source}[{number}]", record) for number, record in enumerate(records)]
    stems = _stems_of([image_id for image_id, _, _ in checked], source, images, gt_masks)
    found, seen, repeated = {}, {}, []
    for number, (image_id, segmentation, score) in enumerate(checked):
        where, stem = f"{source}[{number}]", stems[image_id]
        if stem is None:
            raise InputError(
                f"{where} is of the image {image_id!r}, which has no ground truth; add a mask or leave it out"
            )
        if seen.setdefault((stem, score, json.dumps(segmentation)), number) != number:
            repeated.append(number)
        decode = partial(_decode, where, segmentation, _size_of(images.get(image_id)))
        found.setdefault(stem, []).append((decode, score))
    if repeated:
        print(
            f"warning: {len(repeated)} records of {source}, [{repeated[0]}] the first, repeat others to the last "
            "digit, and count as false positives; was something joined twice?",
            file=sys.stderr,
        )
    return {stem: partial(_load_each, instances) for stem, instances in found.items()}


def coco_ids(file, stems):
    """{stem: image id} of the images called ``stems`` in a COCO annotation file, which lists images with id and
    file_name; InputError for another file, for a stem it does not have, and for one it has twice.
    """
    images = _listed_images(_read_json(file, "name a COCO annotation file"))
    if not images:
        raise InputError(f"{file} lists no images with an id and a file_name; name a COCO annotation file")
    ids = {}
    for image_id, image in images.items():
        ids.setdefault(_stem(image["file_name"]), []).append(image_id)
    for stem in stems:
        if len(ids.get(stem, ())) != 1:
            many = f"{len(ids[stem])} images" if stem in ids else "no image"
            raise InputError(f"{file} has {many} called {stem}; name the COCO file of these photographs")
    return {stem: ids[stem][0] for stem in stems}


def check_size(where, shape, expected):
    """InputError when the picture that ``where`` names has not the size (H, W) of its ground-truth mask."""
    if tuple(shape[:2]) != tuple(expected[:2]):
        sizes = f"{shape[0]} x {shape[1]} but the mask of its image {expected[0]} x {expected[1]}"
        raise InputError(f"{where} is {sizes}; make them equal")


def _read_json(path, remedy):
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {remedy}") from error


def _read_records(path):
    """(records, path, {id: image}) of a file of COCO results, or of a whole COCO dictionary with its own images."""
    data = _read_json(path, "write COCO results, as infer.py does, or name a folder of masks")
    records = data.get("annotations") if isinstance(data, dict) else data
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list; write a JSON list of COCO results, as infer.py does")
    return records, path, _listed_images(data)


def _listed_images(data):
    """{id: image} of the images of a COCO dictionary that have an id and a file_name; {} of anything else."""
    images = data.get("images") if isinstance(data, dict) else None
    usable = [
        image
        for image in (images if isinstance(images, list) else ())
        if isinstance(image, dict) and _is_id(image.get("id")) and isinstance(image.get("file_name"), str)
    ]
    return {image["id"]: image for image in usable}


def _check_record(where, record):
    """(image_id, segmentation, score) of a COCO result record; InputError for what it lacks."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a record; write image_id, segmentation and score")
    for key in ("image_id", "segmentation", "score"):
        if key not in record:
            raise InputError(f"{where} has no {key}; each record needs image_id, segmentation and score")
    image_id, segmentation, score = record["image_id"], record["segmentation"], record["score"]
    if isinstance(image_id, float) and image_id.is_integer():  # as tables of numbers are exported
        image_id = int(image_id)
    if not _is_id(image_id):
        raise InputError(f"{where} has the image_id {image_id!r}; use the stem of the mask, or an id of its COCO file")
    if not _is_number(score):
        raise InputError(f"{where} has the score {score!r}; use a finite number")
    if not (_is_rle(segmentation) or _are_polygons(segmentation)):
        form = '{"size": [H, W], "counts": "..."}'
        raise InputError(f"{where} has no RLE and no polygons; write segmentation as {form}")
    return image_id, segmentation, float(score)


def _stems_of(image_ids, source, images, gt_masks):
    """{image_id: stem, or None of an image without ground truth}, as ``group_records`` says.

    All ids of a type are understood in one way, the first of those that tell most of them: an id may be valid in two.
    """
    ids = {mask.image_id: stem for stem, mask in gt_masks.items() if hasattr(mask, "image_id")}
    ids |= {str(image_id): stem for image_id, stem in ids.items() if str(image_id) not in ids}
    numbers = {}
    for stem in filter(_is_decimal, gt_masks):
        numbers.setdefault(int(stem), []).append(stem)

    def named(name):
        last = re.split(r"[/\\]", str(name))[-1]
        for candidate in (str(name), last, _stem(last)):
            if candidate in gt_masks:
                return candidate
        same = numbers.get(int(_stem(last)), ()) if _is_decimal(_stem(last)) else ()
        return same[0] if len(same) == 1 else None

    def known(image_id):
        return ids.get(image_id, ids.get(str(image_id)))

    def listed(image_id):
        return named(images[image_id]["file_name"]) if image_id in images else None

    stems = {}
    for kind, ways in ((int, (known, named)), (str, (named, known))):
        asked = [image_id for image_id in dict.fromkeys(image_ids) if isinstance(image_id, kind)]
        understood = [{image_id: way(image_id) for image_id in asked} for way in ((listed,) if images else ways)]
        stems |= max(understood, key=lambda way: sum(stem is not None for stem in way.values()))
    first = {}
    for image_id, stem in stems.items():
        if stem is not None and first.setdefault(stem, image_id) != image_id:
            raise InputError(
                f"{source} calls the image {stem} both {first[stem]!r} and {image_id!r}; give each image one image_id"
            )
    return stems


def _stem(name):
    """A file's name without folders and without the suffix of an image; other dots are part of the name."""
    last = PurePosixPath(re.split(r"[/\\]", name)[-1])
    return last.stem if last.suffix.lower() in SUFFIXES else last.name


def _size_of(image):
    """[H, W] of the record of an image in a COCO file, None where it does not say."""
    size = [image.get("height"), image.get("width")] if image else [None]
    return size if all(type(side) is int for side in size) else None


def _read_scores(table, files):
    """({file name: {label: score}} in the order of scores.csv, whether it has the column label); else label is None."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            return _read_rows(reader, table, files)
    except OSError as error:
        raise InputError(f"cannot read {table} ({error.strerror}); check its rights") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a UTF-8 text table ({error}); save it again as CSV") from error


def _read_rows(reader, table, files):
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    if not {"file", "score"} <= set(columns):
        remedy = "its header must be file,score for masks or file,label,score for label maps"
        raise InputError(f"{table} line 1 lacks the column file or score; {remedy}")
    scores = {}
    for row in reader:
        where, label = f"{table} line {reader.line_num}", None
        name, score = ((row[column] or "").strip() for column in ("file", "score"))
        if name not in files:
            raise InputError(f"{where} names {name!r}, no picture of {table.parent}; add it or delete the line")
        if not _is_number(_float(score)):
            raise InputError(f"{where} has the score {score!r}; use a finite number")
        if "label" in columns:
            text = (row["label"] or "").strip()
            if not (text.isdecimal() and 0 < int(text) < VOID):
                raise InputError(f"{where} has the label {text!r}; use one of 1..254, as in the label map")
            label = int(text)
        if label in scores.setdefault(name, {}):
            raise InputError(f"{where} scores what an earlier line scores; keep one of them")
        scores[name][label] = float(score)
    return scores, "label" in columns


def _group_masks(files, scores, table, gt_masks):
    for name, file in files.items():
        if name not in scores:
            raise InputError(f"{file} has no line in {table}; score it there or remove it")
    found = {}
    for name, labels in scores.items():
        file = files[name]
        stem, _, number = file.stem.rpartition("_")
        if stem not in gt_masks or not number.isdecimal():
            raise InputError(f"{file} is of no image that has a ground truth; name it <stem of the mask>_<number>.png")
        found.setdefault(stem, []).append((partial(_read_mask, file), labels[None]))
    return {stem: partial(_load_each, instances) for stem, instances in found.items()}


def _group_label_maps(folder, files, scores, table, gt_masks):
    found = {}
    for name, file in files.items():
        if file.stem not in gt_masks:
            remedy = "name it as the mask is named, or score masks of single instances in a scores.csv"
            raise InputError(f"{file} is of no image that has a ground truth; {remedy}")
        found[file.stem] = partial(_load_label_map, file, None if scores is None else scores.get(name, {}), table)
    for stem in gt_masks:
        if stem not in found:
            raise InputError(f"{folder} has no label map of {stem}; where nothing was found write one that is all 0")
    return found


def _load_each(instances, shape):
    """instances: n pairs of read(shape) and its score."""
    return (read(shape) for read, _ in instances), [score for _, score in instances]


def _load_label_map(file, scores, table, shape):
    """scores: {label: score} from ``table``; both None where labels are ranks."""
    labels = read_instance_mask(file)
    check_size(file, labels.shape, shape)
    if is_coloured(file):  # which colour is label 1 is chance, and so would be what scores best
        raise InputError(f"{file} is a picture in colours, which have no order; save the labels 1..254 as a grey PNG")
    numbers = [int(number) for number in np.unique(labels) if number]
    if VOID in numbers:
        raise InputError(f"{file} holds 255, which is nothing in a prediction; number the instances 1..254")
    for number in numbers:
        if scores is not None and number not in scores:
            raise InputError(f"{table} has no score for the label {number} of {file.name}; add the line")
    return (labels == number for number in numbers), [1 / n if scores is None else scores[n] for n in numbers]


def _read_mask(file, shape):
    labels = read_instance_mask(file)
    check_size(file, labels.shape, shape)
    if len(np.unique(labels[labels > 0])) > 1:
        remedy = "write one mask an instance, or give scores.csv the column label for label maps"
        raise InputError(f"{file} holds several values besides 0; {remedy}")
    return labels > 0


def _decode(where, segmentation, size, shape):
    """size: [H, W] of the image where the predictions say it, or None."""
    try:
        if isinstance(segmentation, list):
            check_size(where, size or shape, shape)
            return decode_polygons(segmentation, shape)
        check_size(where, segmentation["size"], shape)
        return decode_rle(segmentation)
    except ValueError as error:
        raise InputError(f"{where} cannot be decoded: {error}; encode the mask with pycocotools") from error


def _float(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_number(value):
    # The bounds also keep out NaN and integers too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_id(value):
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_decimal(text):
    return text.isascii() and text.isdecimal() and len(text) < 100  # Python refuses to read thousands of digits


def _is_rle(value):
    """Whether value has the keys and types of COCO RLE; its counts are checked when they are decoded."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), (str, list)):
        return False
    size = value.get("size")
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def _are_polygons(value):
    """Whether value is a list of outlines [x, y, x, y, ...] of three points or more."""
    return (
        bool(value)
        and isinstance(value, list)
        and all(
            isinstance(outline, list) and len(outline) > 5 and len(outline) % 2 == 0 and all(map(_is_number, outline))
            for outline in value
        )
    )
