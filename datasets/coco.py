"""COCO instance annotations: one JSON file beside a folder of photographs."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from datasets.images import image_size
from datasets.labels import Notice, Sample, collect, fail, split_names
from datasets.masks import VOID, decode_polygons, decode_rle
from datasets.photographs import Photographs
from utils.cli import InputError

SMALLEST = 0.02  # share of the image below which an object does not count as salient


@dataclass(frozen=True)
class CocoMask:
    """The ground-truth instances of one image of a COCO file, drawn when they are asked for.

    file: the annotations; image_id: its id there, as ``_id`` writes it; shape: (H, W).
    """

    file: Path
    image_id: str
    shape: tuple[int, int]

    def __str__(self):
        return f"{self.file} image {self.image_id}"

    def size(self):
        """(H, W), as the annotations say."""
        return self.shape

    def read(self):
        """uint8 [H,W]: 0 background, 1..254 instances in the order of the file, 255 void (iscrowd).

        Where instances overlap, the one of fewer pixels is on top, and any is on top of void; one that is wholly
        covered leaves a gap in the numbers. InputError for a segmentation that is malformed or of another size,
        and for more than 254 instances.
        """
        annotations = _annotations(self.file, _time_of(self.file))[self.image_id]
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


def find_files(folder):
    """{split: annotations file} of a folder: ``annotations/instances_<split>.json``, else COCO files of other names
    there, else those in the folder itself."""
    files = []
    for inside in (Path(folder) / "annotations", Path(folder)):
        found = sorted(inside.iterdir()) if inside.is_dir() and not files else []
        found = [path for path in found if path.suffix.lower() == ".json"]
        files = files or [path for path in found if path.name.startswith("instances_")] or list(filter(_is_coco, found))
    return {file.stem.removeprefix("instances_"): file for file in files}


def read_coco(path, report=fail, only=None, split=None):
    """The images of a COCO instances file as a list of Sample, in its order.

    path: the JSON file, or the folder that ``find_files`` finds it in; split may be left out where there is only one.
    The photographs lie in <split>/, images/<split>/, images/, JPEGImages/, data/ or beside, seen from the folder that
    holds annotations/ (or else from the folder of the file); ``datasets.photographs.Photographs`` finds them there.

    Classes are those of the 20 of VOC that any annotation has, by COCO's names or VOC's own; objects of other classes
    are counted but name none. The count is the number of annotations with iscrowd 0 whose area is at least 2 % of
    the image; it is not known where there are only crowds. An area that is missing is that of the segmentation or,
    without one, of the bbox, a size that is missing that of the photograph. The mask holds all instances, whatever
    their size, with iscrowd as void; an image with an annotation that has no segmentation has no mask. Of an image
    without any annotation nothing is known: tools list those that nobody has looked at.

    only: ``classes`` or ``count`` where the other does not matter. InputError for a file that is missing or holds no
    COCO instances, for annotations that all belong to no image, and without a folder of photographs; ``report`` gets
    one for an incomplete record, an unknown category, and a missing photograph, and a Notice for some annotations that
    belong to no image.
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
    return collect(entries, partial(_read, file, folder, categories, annotations, only), report)


def _read(file, photographs, categories, annotations, only, where, image):
    path = photographs.find(str(image["file_name"]), where)
    number = _id(image["id"])
    found = annotations[number]
    if not found:
        return Sample(path)
    mask = CocoMask(file, number, _shape(image, path))
    names = []
    for annotation in found:
        category = _id(annotation.get("category_id"))
        if category in categories:
            names.append(categories[category])
        elif only != "count":
            raise InputError(f"{where} has the unknown category {annotation.get('category_id')}; add it to categories")
    classes, others = split_names(names)
    count = None
    if only != "classes":
        least = SMALLEST * math.prod(mask.shape)
        count = len([annotation for annotation in _instances(found) if _area(annotation, mask) >= least])
    if not count and len(_instances(found)) < len(found):
        count = None
    whole = all(_outlines(annotation) for annotation in found)
    return Sample(path, classes, count, mask if whole else None, others)


def _choose(path, split):
    """The annotations file that a path and a split name."""
    if path.suffix.lower() == ".json":
        if split:
            raise InputError(f"{path} is one split already; leave @{split} out")
        return path
    files = find_files(path)
    if split is None and len(files) == 1:
        return next(iter(files.values()))
    if split not in files:
        raise InputError(f"{path} has the splits {', '.join(files)}; name one, such as {path}@{next(iter(files))}")
    return files[split]


def _load(file, only=None):
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
                raise InputError(f"{file} {part}[{number}] needs {' and '.join(keys)}; mend the record")
    for part in [part for part in needed if part != "annotations"]:
        doubled = [number for number, times in Counter(_id(record["id"]) for record in data[part]).items() if times > 1]
        if doubled:
            raise InputError(f"{file} has several {part} of the id {doubled[0]}; give each its own")
    return data


def _id(value):
    """An id as text, as tools write 1 as "1" or 1.0 too; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _by_image(data):
    """{image id: its annotations}, for every image of the file."""
    grouped = {_id(image["id"]): [] for image in data["images"]}
    for annotation in data["annotations"]:
        grouped.get(_id(annotation["image_id"]), []).append(annotation)
    return grouped


def _report_strays(file, data, report):
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
        report(Notice(text))


@lru_cache(maxsize=2)
def _annotations(file, written):
    """{image id: annotations} of the file that was ``written`` then. Read anew for masks, so that a training does not
    hold all polygons in memory."""
    return _by_image(_load(file))


def _time_of(file):
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return None  # whoever reads it will say why


def _photographs(file, names):
    """The Photographs of an annotations file, in the first folder that holds any of them."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = file.stem.removeprefix("instances_")
    inside = (split, f"images/{split}", "images", "JPEGImages", "data", ".")
    folders = [Photographs(root / folder, names) for folder in inside]
    some = names[:100]  # not only the first: it may be what is missing
    found = next((folder for folder in folders if any(os.path.isfile(folder.folder / name) for name in some)), None)
    found = found or next((folder for folder in folders if any(map(folder.has, some))), None)
    if found is None:
        raise InputError(
            f"the photographs of {file}, such as {names[0]}, are in none of "
            f"{', '.join(str(folder.folder) for folder in folders)}; put them into one"
        )
    return found


def _is_coco(path):
    """Whether a file has the parts of COCO's; reading them takes much longer."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return b'"images"' in data and b'"annotations"' in data


def _shape(image, path):
    """(H, W) as the record says; where it does not, as the photograph."""
    try:
        height, width = (int(image.get(side)) for side in ("height", "width"))
    except (TypeError, ValueError, OverflowError):
        height = width = 0
    return (height, width) if height > 0 and width > 0 else image_size(path)


def _area(annotation, mask):
    """Pixels of an annotation: as it says, else of its segmentation, else of its bbox."""
    area, box = annotation.get("area"), annotation.get("bbox")
    if _is_number(area) and area >= 1:
        return area
    if _outlines(annotation):
        return _draw(annotation, mask).sum()
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise InputError(f"{mask} has an annotation without an area, a segmentation or a bbox; write its pixels there")
    if min(box[2:]) < 0:
        raise InputError(f"{mask} has the bbox {box}, which ends before it begins; write its width and height")
    if 0 < max(box) <= 1:
        raise InputError(f"{mask} has the bbox {box} in shares of the image; write it in pixels")
    return box[2] * box[3]


def _instances(annotations):
    return [annotation for annotation in annotations if not _is_crowd(annotation)]


def _is_crowd(annotation):
    return annotation.get("iscrowd") in (1, "1")


def _outlines(annotation):
    """The segmentation, which is empty where there is none: an RLE, or polygons; a single one may come bare."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation and all(map(_is_number, segmentation)):
        return [segmentation]
    return None if segmentation == [[]] else segmentation


def _draw(annotation, mask):
    """One annotation of ``mask`` as bool [H,W]."""
    segmentation, (height, width) = _outlines(annotation), mask.shape
    try:
        if isinstance(segmentation, dict):
            if segmentation["size"] != [height, width]:
                raise ValueError(f"its size is {segmentation['size']} in an image of {[height, width]}")
            return decode_rle(segmentation)
        return decode_polygons(segmentation, mask.shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{mask} has a segmentation that is no polygon or RLE ({error}); mend it") from error


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)
