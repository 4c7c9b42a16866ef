"""Readers of the predictions of any method: masks with scores, in three formats.

predictions.json         COCO result records, or a whole COCO dictionary whose annotations have scores; a folder
                         with this file in it, such as infer.py's, is read as the file. image_id is the stem of
                         the mask file, or one of the names and numbers listed at ``group_records``
folder of label maps     <stem>.png: 0 background, 1..254 instances. The score of label n is 1 / n, or that in
                         scores.csv with the columns file,label,score
folder of masks          <stem>_<k>.png, one per instance: 0 background, one other value; and scores.csv with the
                         columns file,score
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datasets.labels import Mask
from datasets.listing import SUFFIXES
from datasets.masks import VOID, decode_polygons, decode_rle, is_coloured, list_masks, read_instance_mask
from utils.cli import InputError

Shape = tuple[int, int]  # (H, W) in pixels
Scored = tuple[Iterable[np.ndarray], Sequence[float] | np.ndarray]  # masks, bool [H,W] each, and their scores
Load = Callable[[Shape], Scored]
Instance = tuple[Callable[[Shape], np.ndarray], float]  # a function that decodes the mask, and its score
Scores = dict[str, dict[int | None, float]]  # of a scores.csv: {file: {label: score}}, None without the column label


def open_predictions(path: Path | str, gt_masks: Mapping[str, Mask]) -> dict[str, Load]:
    """Open the predictions of one method for the images of ``gt_masks``, {stem: ground-truth mask}.

    Returns {stem: load} of the images that have predictions. load(shape) returns (masks, scores) for an image of
    ``shape`` (H, W): an iterator over n bool masks [H, W], decoded one at a time, and n finite scores, higher is
    better, of any scale. Equal scores keep the order of the file.

    Raises InputError naming the file and the line or record that is missing, malformed or of another image; ``load``
    and its iterator raise it for errors that only decoding finds.
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


def group_records(
    records: Iterable[Any],
    source: Path | str | None,
    images: Mapping[Any, dict[str, Any]],
    gt_masks: Mapping[str, Mask],
) -> dict[str, Load]:
    """``open_predictions`` for a list of COCO result records; ``source`` names them in messages.

    images: {id: its record} of the images that the predictions' own file lists, or {}. Where there are any, an image_id
    stands for the file name of its record. Otherwise a number is an id of the ground truth's COCO file, or else a name;
    a string is a name, or else such an id. A name may have a folder, an image suffix, and more or fewer leading zeros
    than the stem.

    category_id and other keys are ignored: instances have no class. Masks stay encoded until they are loaded. Repeated
    records count as often as they occur, as in COCO, with a warning on standard error.
    """
    checked = [_check_record(f"{source}[{number}]", record) for number, record in enumerate(records)]
    stems = _stems_of([image_id for image_id, _, _ in checked], source, images, gt_masks)
    found: dict[str, list[Instance]] = {}
    first: dict[tuple[str, float, str], int] = {}
    repeated = []
    for number, (image_id, segmentation, score) in enumerate(checked):
        where, stem = f"{source}[{number}]", stems[image_id]
        if stem is None:
            raise InputError(
                f"{where} is of the image {image_id!r}, which has no ground truth; add a mask or leave it out"
            )
        if first.setdefault((stem, score, json.dumps(segmentation)), number) != number:
            repeated.append(number)
        decode = partial(_decode, where, segmentation, _size_of(images.get(image_id)))
        found.setdefault(stem, []).append((decode, score))
    if repeated:
        print(
            f"warning: {len(repeated)} records of {source}, [{repeated[0]}] the first, are copies of others and count "
            "as false positives; check whether files were concatenated twice",
            file=sys.stderr,
        )
    return {stem: partial(_load_each, instances) for stem, instances in found.items()}


def coco_ids(file: Path, stems: Iterable[str]) -> dict[str, Any]:
    """{stem: image id} of the images called ``stems`` in a COCO annotation file, from its "images".

    Raises InputError for another kind of file, for a stem that it lacks, and for one that two of its images have.
    """
    images = _listed_images(_read_json(file, "name a COCO annotation file"))
    if not images:
        raise InputError(f"{file} lists no images with an id and a file_name; name a COCO annotation file")
    ids: dict[str, list[Any]] = {}
    for image_id, image in images.items():
        ids.setdefault(_stem(image["file_name"]), []).append(image_id)
    for stem in stems:
        if len(ids.get(stem, ())) != 1:
            many = f"{len(ids[stem])} images" if stem in ids else "no image"
            raise InputError(f"{file} has {many} called {stem}; name the COCO file of these photographs")
    return {stem: ids[stem][0] for stem in stems}


def check_size(where: Any, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raises InputError when a picture does not have the size of its ground-truth mask.

    where: the name of the picture in the message; shape, expected: (H, W, ...) of the picture and of the mask.
    """
    if tuple(shape[:2]) != tuple(expected[:2]):
        sizes = f"{shape[0]} x {shape[1]} but the mask of its image {expected[0]} x {expected[1]}"
        raise InputError(f"{where} is {sizes}; make them equal")


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {remedy}") from error


def _read_records(path: Path) -> tuple[list[Any], Path, dict[Any, dict[str, Any]]]:
    """(records, path, {id: image}) of a file of COCO results or of a whole COCO dictionary."""
    data = _read_json(path, "write COCO results, as infer.py does, or name a folder of masks")
    records = data.get("annotations") if isinstance(data, dict) else data
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list; write a JSON list of COCO results, as infer.py does")
    return records, path, _listed_images(data)


def _listed_images(data: Any) -> dict[Any, dict[str, Any]]:
    """{id: image} of the images of a COCO dictionary that have an id and a file_name; {} of anything else."""
    images = data.get("images") if isinstance(data, dict) else None
    usable = [
        image
        for image in (images if isinstance(images, list) else ())
        if isinstance(image, dict) and _is_id(image.get("id")) and isinstance(image.get("file_name"), str)
    ]
    return {image["id"]: image for image in usable}


def _check_record(where: str, record: Any) -> tuple[Any, Any, float]:
    """(image_id, segmentation, score) of a COCO result record; InputError for one that is missing or malformed."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a record; write image_id, segmentation and score")
    for key in ("image_id", "segmentation", "score"):
        if key not in record:
            raise InputError(f"{where} has no {key}; each record needs image_id, segmentation and score")
    image_id, segmentation, score = record["image_id"], record["segmentation"], record["score"]
    if isinstance(image_id, float) and image_id.is_integer():  # as spreadsheets export ids
        image_id = int(image_id)
    if not _is_id(image_id):
        raise InputError(f"{where} has the image_id {image_id!r}; use the stem of the mask, or an id of its COCO file")
    if not _is_number(score):
        raise InputError(f"{where} has the score {score!r}; use a finite number")
    if not (_is_rle(segmentation) or _are_polygons(segmentation)):
        form = '{"size": [H, W], "counts": "..."}'
        raise InputError(f"{where} has no RLE and no polygons; write segmentation as {form}")
    return image_id, segmentation, float(score)


def _stems_of(
    image_ids: Iterable[Any],
    source: Path | str | None,
    images: Mapping[Any, dict[str, Any]],
    gt_masks: Mapping[str, Mask],
) -> dict[Any, str | None]:
    """{image_id: stem, or None for an image without ground truth} by the rules of ``group_records``.

    An id may be valid both as an id and as a name. All ids of one type are resolved in the same way, that which
    resolves most of them.
    """
    ids = {mask.image_id: stem for stem, mask in gt_masks.items() if hasattr(mask, "image_id")}
    ids |= {str(image_id): stem for image_id, stem in ids.items() if str(image_id) not in ids}
    numbers: dict[int, list[str]] = {}
    for stem in filter(_is_decimal, gt_masks):
        numbers.setdefault(int(stem), []).append(stem)

    def by_name(name: Any) -> str | None:
        last = re.split(r"[/\\]", str(name))[-1]
        for candidate in (str(name), last, _stem(last)):
            if candidate in gt_masks:
                return candidate
        same = numbers.get(int(_stem(last)), ()) if _is_decimal(_stem(last)) else ()
        return same[0] if len(same) == 1 else None

    def by_id(image_id: Any) -> str | None:
        return ids.get(image_id, ids.get(str(image_id)))

    def by_own_images(image_id: Any) -> str | None:
        return by_name(images[image_id]["file_name"]) if image_id in images else None

    stems: dict[Any, str | None] = {}
    for kind, ways in ((int, (by_id, by_name)), (str, (by_name, by_id))):
        of_kind = [image_id for image_id in dict.fromkeys(image_ids) if isinstance(image_id, kind)]
        resolved = [{image_id: way(image_id) for image_id in of_kind} for way in ((by_own_images,) if images else ways)]
        best = min(resolved, key=_unresolved)
        stems |= best
    first: dict[str, Any] = {}
    for image_id, name in stems.items():
        if name is not None and first.setdefault(name, image_id) != image_id:
            raise InputError(
                f"{source} calls the image {name} both {first[name]!r} and {image_id!r}; give each image one image_id"
            )
    return stems


def _unresolved(stems: dict[Any, str | None]) -> int:
    return list(stems.values()).count(None)


def _stem(name: str) -> str:
    """A file's name without folders and without an image suffix; other dots are part of the name."""
    last = PurePosixPath(re.split(r"[/\\]", name)[-1])
    return last.stem if last.suffix.lower() in SUFFIXES else last.name


def _size_of(image: dict[str, Any] | None) -> list[int] | None:
    """[H, W] of the record of an image in a COCO file, or None where it lacks them."""
    size = [image.get("height"), image.get("width")] if image else []
    return size if len(size) == 2 and all(type(side) is int for side in size) else None  # type: ignore[return-value]


def _read_scores(table: Path, files: Mapping[str, Path]) -> tuple[Scores, bool]:
    """(the scores in the order of scores.csv, whether it has the column label)."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            return _read_rows(reader, table, files)
    except OSError as error:
        raise InputError(f"cannot read {table} ({error.strerror}); check its rights") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a UTF-8 text table ({error}); save it again as CSV") from error


def _read_rows(reader: csv.DictReader, table: Path, files: Mapping[str, Path]) -> tuple[Scores, bool]:
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    if not {"file", "score"} <= set(columns):
        remedy = "its header must be file,score for masks or file,label,score for label maps"
        raise InputError(f"{table} line 1 lacks the column file or score; {remedy}")
    scores: Scores = {}
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


def _group_masks(
    files: Mapping[str, Path], scores: Scores, table: Path, gt_masks: Mapping[str, Mask]
) -> dict[str, Load]:
    for name, file in files.items():
        if name not in scores:
            raise InputError(f"{file} has no line in {table}; score it there or remove it")
    found: dict[str, list[Instance]] = {}
    for name, labels in scores.items():
        file = files[name]
        stem, _, number = file.stem.rpartition("_")
        if stem not in gt_masks or not number.isdecimal():
            raise InputError(f"{file} is of no image that has a ground truth; name it <stem of the mask>_<number>.png")
        found.setdefault(stem, []).append((partial(_read_mask, file), labels[None]))
    return {stem: partial(_load_each, instances) for stem, instances in found.items()}


def _group_label_maps(
    folder: Path,
    files: Mapping[str, Path],
    scores: Scores | None,
    table: Path | None,
    gt_masks: Mapping[str, Mask],
) -> dict[str, Load]:
    found: dict[str, Load] = {}
    for name, file in files.items():
        if file.stem not in gt_masks:
            remedy = "name it as the mask is named, or score masks of single instances in a scores.csv"
            raise InputError(f"{file} is of no image that has a ground truth; {remedy}")
        found[file.stem] = partial(_load_label_map, file, None if scores is None else scores.get(name, {}), table)
    for stem in gt_masks:
        if stem not in found:
            raise InputError(f"{folder} has no label map of {stem}; where nothing was found write one that is all 0")
    return found


def _load_each(instances: Sequence[Instance], shape: Shape) -> Scored:
    return (read(shape) for read, _ in instances), [score for _, score in instances]


def _load_label_map(file: Path, scores: Mapping[int | None, float] | None, table: Path | None, shape: Shape) -> Scored:
    """scores: {label: score} from ``table``; both None where labels are ranks."""
    labels = read_instance_mask(file)
    check_size(file, labels.shape, shape)
    if is_coloured(file):  # the numbering of colours is arbitrary, and would decide the ranking
        raise InputError(f"{file} is a picture in colours, which have no order; save the labels 1..254 as a grey PNG")
    numbers = [int(number) for number in np.unique(labels) if number]
    if VOID in numbers:
        raise InputError(f"{file} holds 255, which has no meaning in a prediction; number the instances 1..254")
    for number in numbers:
        if scores is not None and number not in scores:
            raise InputError(f"{table} has no score for the label {number} of {file.name}; add the line")
    return (labels == number for number in numbers), [1 / n if scores is None else scores[n] for n in numbers]


def _read_mask(file: Path, shape: Shape) -> np.ndarray:
    labels = read_instance_mask(file)
    check_size(file, labels.shape, shape)
    if len(np.unique(labels[labels > 0])) > 1:
        remedy = "write one mask an instance, or give scores.csv the column label for label maps"
        raise InputError(f"{file} holds several values besides 0; {remedy}")
    return labels > 0


def _decode(where: str, segmentation: Any, size: Sequence[int] | None, shape: Shape) -> np.ndarray:
    """size: [H, W] of the image where the predictions list it, or None."""
    try:
        if isinstance(segmentation, list):
            check_size(where, size or shape, shape)
            return decode_polygons(segmentation, shape)
        check_size(where, segmentation["size"], shape)
        return decode_rle(segmentation)
    except ValueError as error:
        raise InputError(f"{where} cannot be decoded: {error}; encode the mask with pycocotools") from error


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_number(value: Any) -> bool:
    # The bounds also exclude NaN and integers too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 100  # Python refuses to parse thousands of digits


def _is_rle(value: Any) -> bool:
    """Whether value has the keys and types of COCO RLE; its counts are checked when they are decoded."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), (str, list)):
        return False
    size = value.get("size")
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def _are_polygons(value: Any) -> bool:
    """Whether value is a list of polygons [x, y, x, y, ...] of three points or more."""
    return (
        bool(value)
        and isinstance(value, list)
        and all(
            isinstance(outline, list) and len(outline) > 5 and len(outline) % 2 == 0 and all(map(_is_number, outline))
            for outline in value
        )
    )
