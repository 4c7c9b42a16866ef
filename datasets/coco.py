"""COCO instance annotations: one JSON file beside a folder of photographs."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.images import image_size
from datasets.labels import (
    MIN_AREA,
    LabelWarning,
    Only,
    Report,
    Sample,
    collect_samples,
    raise_or_warn,
    split_class_names,
)
from datasets.masks import VOID, decode_polygons, decode_rle
from datasets.photographs import Photographs
from utils.cli import InputError

Annotation = dict[str, Any]


@dataclass(frozen=True)
class CocoMask:
    """The ground-truth instances of one image of a COCO file, rasterized by ``read``.

    file: the annotations; image_id: its id there, normalized by ``_id``; shape: (H, W) in pixels.
    """

    file: Path
    image_id: str
    shape: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.file} image {self.image_id}"

    def size(self) -> tuple[int, int]:
        """(H, W) in pixels, from the annotations."""
        return self.shape

    def read(self) -> np.ndarray:
        """uint8 [H,W]: 0 background, 1..254 instances in the order of the file, 255 void (iscrowd).

        Smaller instances are painted over larger ones, and instances over void; a wholly covered instance leaves a gap
        in the numbers. Raises InputError for a segmentation that is malformed or of another size, and for more than 254
        instances.
        """
        annotations = _annotations(self.file, _modification_time(self.file))[self.image_id]
        instances = [(_draw(a, self), number) for number, a in enumerate(_instances(annotations), 1)]
        if len(instances) >= VOID:
            raise InputError(f"{self} has more than 254 instances; leave the image out")
        labels = np.zeros(self.shape, np.uint8)
        for annotation in annotations:
            if _is_crowd(annotation):
                labels[_draw(annotation, self)] = VOID
        for mask, number in sorted(instances, key=lambda pair: -pair[0].sum()):
            labels[mask] = number
        return labels


def find_files(folder: str | Path) -> dict[str, Path]:
    """{split: annotations file} of a folder: ``annotations/instances_<split>.json``, else COCO files of other names
    there, else those in the folder itself."""
    files: list[Path] = []
    for inside in (Path(folder) / "annotations", Path(folder)):
        found = sorted(inside.iterdir()) if inside.is_dir() and not files else []
        found = [path for path in found if path.suffix.lower() == ".json"]
        files = files or [path for path in found if path.name.startswith("instances_")] or list(filter(_is_coco, found))
    return {file.stem.removeprefix("instances_"): file for file in files}


def read_coco(
    path: str | Path, report: Report = raise_or_warn, only: Only = None, split: str | None = None
) -> list[Sample]:
    """The images of a COCO instances file as a list of Sample, in its order.

    path: the JSON file, or a folder in which ``find_files`` finds it; split: not needed when there is only one.
    The photographs lie in <split>/, images/<split>/, images/, JPEGImages/, data/ or ., relative to the folder that
    contains annotations/ (or to the folder of the file), matched by ``datasets.photographs.Photographs``.

    The classes are the VOC classes of all annotations, by COCO's or VOC's names; objects of other classes only add to
    the count. The count is the number of annotations with iscrowd 0 whose area is at least MIN_AREA of the image; it is
    unknown when there are only crowds. A missing area is computed from the segmentation or, without one, from the bbox;
    a missing image size is read from the photograph. The mask holds all instances of any size, with iscrowd as void;
    an image has no mask when one of its annotations has no segmentation. The labels of an image without annotations are
    unknown, because tools list images that have not been annotated.

    only: ``classes`` or ``count`` when the other is not needed. Raises InputError for a missing file, a file that holds
    no COCO instances, annotations none of which belongs to an image, and a missing folder of photographs; ``report``
    gets one for an incomplete record, an unknown category, and a missing photograph, and a LabelWarning for annotations
    that belong to no image.
    """
    file = _choose(Path(path), split)
    data = _load(file, only)
    annotations = _by_image(data)
    _report_strays(file, data, report)
    categories = {}
    if only != "count":
        categories = {_id(category["id"]): str(category["name"]) for category in data["categories"]}
    folder = _photographs(file, [str(image["file_name"]) for image in data["images"]])
    entries = ((f"{file} image {_id(image['id'])}", image) for image in data["images"])
    return collect_samples(entries, partial(_read, file, folder, categories, annotations, only), report)


def _read(
    file: Path,
    photographs: Photographs,
    categories: dict[str | None, str],
    annotations: dict[str | None, list[Annotation]],
    only: Only,
    where: str,
    image: Mapping[str, Any],
) -> Sample:
    path = photographs.find(str(image["file_name"]), where)
    number = _id(image["id"])
    found = annotations[number]
    if not found:
        return Sample(path)
    mask = CocoMask(file, str(number), _shape(image, path))
    names = []
    for annotation in found:
        category = _id(annotation.get("category_id"))
        if category in categories:
            names.append(categories[category])
        elif only != "count":
            raise InputError(f"{where} has the unknown category {annotation.get('category_id')}; add it to categories")
    classes, others = split_class_names(names)
    count = None
    if only != "classes":
        least = MIN_AREA * math.prod(mask.shape)
        count = len([annotation for annotation in _instances(found) if _area(annotation, mask) >= least])
    if not count and len(_instances(found)) < len(found):
        count = None
    whole = all(_outlines(annotation) for annotation in found)
    return Sample(path, classes, count, mask if whole else None, others)


def _choose(path: Path, split: str | None) -> Path:
    """The annotations file of a path and a split."""
    if path.suffix.lower() == ".json":
        if split:
            raise InputError(f"{path} is one split already; leave @{split} out")
        return path
    files = find_files(path)
    if split is None and len(files) == 1:
        return next(iter(files.values()))
    if split is None or split not in files:
        raise InputError(f"{path} has the splits {', '.join(files)}; name one, such as {path}@{next(iter(files))}")
    return files[split]


def _load(file: Path, only: Only = None) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); copy it again") from error
    needed = {"images": ("id", "file_name"), "annotations": ("image_id",)}
    if only != "count":
        needed["categories"] = ("id", "name")
    for part, keys in needed.items():
        records = data.get(part) if isinstance(data, dict) else None
        if not isinstance(records, list) or (not records and part == "images"):
            raise InputError(f"{file} holds no list of {part}; name a COCO instances file")
        for number, record in enumerate(records):
            if not isinstance(record, dict) or not all(_id(record.get(key)) for key in keys):
                raise InputError(f"{file} {part}[{number}] needs {' and '.join(keys)}; correct the record")
    for part in [part for part in needed if part != "annotations"]:
        repeated = [id_ for id_, times in Counter(_id(record["id"]) for record in data[part]).items() if times > 1]
        if repeated:
            raise InputError(f"{file} has several {part} of the id {repeated[0]}; give each its own")
    return data


def _id(value: object) -> str | None:
    """An id as text, because some tools write 1 as "1" or 1.0; None for other values."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _by_image(data: dict[str, Any]) -> dict[str | None, list[Annotation]]:
    """{image id: its annotations}, for every image of the file."""
    grouped: dict[str | None, list[Annotation]] = {_id(image["id"]): [] for image in data["images"]}
    for annotation in data["annotations"]:
        grouped.get(_id(annotation["image_id"]), []).append(annotation)
    return grouped


def _report_strays(file: Path, data: dict[str, Any], report: Report) -> None:
    images = {_id(image["id"]) for image in data["images"]}
    strays = [_id(annotation["image_id"]) for annotation in data["annotations"]]
    strays = [number for number in strays if number not in images]
    if strays:
        text = (
            f"{len(strays)} of {len(data['annotations'])} annotations in {file} belong to no image (image_id "
            f"{strays[0]}); write the id of an image there or remove them"
        )
        if len(strays) == len(data["annotations"]):
            raise InputError(text)
        report(LabelWarning(text))


@lru_cache(maxsize=2)
def _annotations(file: Path, modified: int | None) -> dict[str | None, list[Annotation]]:
    """{image id: annotations} of the file; ``modified`` is its modification time, part of the cache's key. Samples do
    not keep the annotations, so that a training does not hold all polygons in memory."""
    return _by_image(_load(file))


def _modification_time(file: Path) -> int | None:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return None  # reading the file will report the error


def _photographs(file: Path, names: list[str]) -> Photographs:
    """The Photographs of an annotations file, in the first folder that contains any of them."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = file.stem.removeprefix("instances_")
    inside = (split, f"images/{split}", "images", "JPEGImages", "data", ".")
    folders = [Photographs(root / folder, names) for folder in inside]
    some = names[:100]  # not only the first, which may be missing
    found = next((folder for folder in folders if any(os.path.isfile(folder.folder / name) for name in some)), None)
    found = found or next((folder for folder in folders if any(map(folder.has, some))), None)
    if found is None:
        raise InputError(
            f"the photographs of {file}, such as {names[0]}, are in none of "
            f"{', '.join(str(folder.folder) for folder in folders)}; put them into one"
        )
    return found


def _is_coco(path: Path) -> bool:
    """Whether a file contains COCO's keys, without parsing it."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return b'"images"' in data and b'"annotations"' in data


def _shape(image: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """(H, W) in pixels from the record, else from the photograph."""
    try:
        height, width = (int(image.get(side, 0)) for side in ("height", "width"))
    except (TypeError, ValueError, OverflowError):
        height = width = 0
    return (height, width) if height > 0 and width > 0 else image_size(path)


def _area(annotation: Annotation, mask: CocoMask) -> float:
    """The area of an annotation in pixels: its "area", else that of its segmentation, else of its bbox."""
    area: Any = annotation.get("area")
    box = annotation.get("bbox")
    if _is_number(area) and area >= 1:
        return area
    if _outlines(annotation):
        return _draw(annotation, mask).sum()
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise InputError(f"{mask} has an annotation without an area, a segmentation or a bbox; write its pixels there")
    if min(box[2:]) < 0:
        raise InputError(f"{mask} has the bbox {box}, which ends before it begins; write its width and height")
    if 0 < max(box) <= 1:
        raise InputError(f"{mask} has the bbox {box} in fractions of the image; write it in pixels")
    return box[2] * box[3]


def _instances(annotations: list[Annotation]) -> list[Annotation]:
    return [annotation for annotation in annotations if not _is_crowd(annotation)]


def _is_crowd(annotation: Annotation) -> bool:
    return annotation.get("iscrowd") in (1, "1")


def _outlines(annotation: Annotation) -> Any:
    """The segmentation: an RLE, or a list of polygons (also where the file has one bare polygon); empty without one."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation and all(map(_is_number, segmentation)):
        return [segmentation]
    return None if segmentation == [[]] else segmentation


def _draw(annotation: Annotation, mask: CocoMask) -> np.ndarray:
    """One annotation of ``mask`` as bool [H,W]."""
    segmentation, (height, width) = _outlines(annotation), mask.shape
    try:
        if isinstance(segmentation, dict):
            if segmentation["size"] != [height, width]:
                raise ValueError(f"its size is {segmentation['size']} in an image of {[height, width]}")
            return decode_rle(segmentation)
        return decode_polygons(segmentation, mask.shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{mask} has a segmentation that is no polygon or RLE ({error}); correct it") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
