"""What a method found, from disk: masks with scores, in the three forms that methods write.

    predictions.json         COCO result records, whose image_id is the stem of the mask file; a folder with this file
                             in it, such as infer.py's, is read as the file
    folder of label maps     <stem>.png: 0 background, 1..254 instances. Label n scores 1 / n, unless scores.csv says
                             otherwise in the columns file,label,score
    folder of masks          <stem>_<k>.png, one an instance: 0 background, one other value; and scores.csv with the
                             columns file,score
"""

import csv
import json
import math
from functools import partial
from pathlib import Path

import numpy as np

from datasets.masks import VOID, decode_rle, list_masks, read_instance_mask
from utils.cli import InputError


def open_predictions(path, stems):
    """Open what one method found in the images ``stems``; returns {stem: load} of those it says something of.

    load(shape) returns (masks, scores) of an image of ``shape`` (H, W): an iterator over n bool masks [H, W], decoded
    one at a time, and n finite scores, higher is better, of any scale. Equal scores keep the order of the file.

    Raises InputError naming the file and line or record that is missing, malformed or of another image; ``load``
    and its masks do so for what only decoding shows.
    """
    path = Path(path)
    if (path / "predictions.json").is_file():
        path = path / "predictions.json"
    if not path.is_dir():
        return group_records(_read_json(path), path, stems)
    files = {file.name: file for file in list_masks(path).values()}
    table = path / "scores.csv"
    if not table.exists():
        return _group_label_maps(path, files, None, None, stems)
    scores, of_label_maps = _read_scores(table, files)
    if of_label_maps:
        return _group_label_maps(path, files, scores, table, stems)
    return _group_masks(files, scores, table, stems)


def group_records(records, source, stems):
    """``open_predictions`` of a list of COCO result records; ``source`` names them in messages.

    category_id and other keys are ignored: instances have no class. Masks stay encoded until they are asked for.
    """
    found = {}
    for number, record in enumerate(records):
        where = f"{source}[{number}]"
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
        stem = str(record["image_id"])
        if stem not in stems:
            raise InputError(f"{where} is of the image {stem!r}, which has no ground truth; add a mask or leave it out")
        found.setdefault(stem, []).append((partial(_decode, where, segmentation), float(record["score"])))
    return {stem: partial(_load_each, instances) for stem, instances in found.items()}


def check_size(where, shape, expected):
    """InputError when the picture that ``where`` names has not the size (H, W) of its ground-truth mask."""
    if tuple(shape[:2]) != tuple(expected[:2]):
        sizes = f"{shape[0]} x {shape[1]} but the mask of its image {expected[0]} x {expected[1]}"
        raise InputError(f"{where} is {sizes}; make them equal")


def _read_json(path):
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        remedy = "write COCO results, as infer.py does, or name a folder of masks"
        raise InputError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list; write a JSON list of COCO results, as infer.py does")
    return records


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


def _group_masks(files, scores, table, stems):
    for name, file in files.items():
        if name not in scores:
            raise InputError(f"{file} has no line in {table}; score it there or remove it")
    found = {}
    for name, labels in scores.items():
        file = files[name]
        stem, _, number = file.stem.rpartition("_")
        if stem not in stems or not number.isdecimal():
            raise InputError(f"{file} is of no image that has a ground truth; name it <stem of the mask>_<number>.png")
        found.setdefault(stem, []).append((partial(_read_mask, file), labels[None]))
    return {stem: partial(_load_each, instances) for stem, instances in found.items()}


def _group_label_maps(folder, files, scores, table, stems):
    found = {}
    for name, file in files.items():
        if file.stem not in stems:
            remedy = "name it as the mask is named, or score masks of single instances in a scores.csv"
            raise InputError(f"{file} is of no image that has a ground truth; {remedy}")
        found[file.stem] = partial(_load_label_map, file, None if scores is None else scores.get(name, {}), table)
    for stem in stems:
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


def _decode(where, segmentation, shape):
    check_size(where, segmentation["size"], shape)
    try:
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


def _is_rle(value):
    """Whether value has the keys and types of COCO RLE; its counts are checked when they are decoded."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), (str, list)):
        return False
    size = value.get("size")
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
