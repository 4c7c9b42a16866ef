"""COCO instance annotations: one JSON file beside a folder of photographs."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from datasets.labels import CLASS_INDEX, Sample, collect, fail
from datasets.masks import VOID, decode_polygons, decode_rle
from utils.cli import InputError

SMALLEST = 0.02  # share of the image below which an object does not count as salient
VOC_NAMES = {  # where COCO's name of a VOC class differs
    "airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor",
}  # fmt: skip


@dataclass(frozen=True)
class CocoMask:
    """The ground-truth instances of one image of a COCO file, drawn when they are asked for.

    file: the annotations; image_id: its id there; shape: (H, W).
    """

    file: Path
    image_id: int | str
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
        annotations = _annotations(self.file).get(self.image_id, ())
        instances = [(_draw(a, self), number) for number, a in enumerate(_instances(annotations), 1)]
        if len(instances) >= VOID:
            raise InputError(f"{self} has more than 254 instances; leave the image out")
        labels = np.zeros(self.shape, np.uint8)
        for annotation in annotations:
            if annotation.get("iscrowd"):
                labels[_draw(annotation, self)] = VOID
        for mask, number in sorted(instances, key=lambda pair: -pair[0].sum()):
            labels[mask] = number
        return labels


def find_files(folder):
    """{split: annotations file} of ``folder``/annotations/instances_<split>.json."""
    files = sorted((Path(folder) / "annotations").glob("instances_*.json"))
    return {file.stem.removeprefix("instances_"): file for file in files}


def read_coco(path, report=fail, split=None):
    """The images of a COCO instances file as a list of Sample, in its order.

    path: the JSON file, or the folder with annotations/instances_<split>.json; split may be left out where there is
    only one. The photographs lie in <split>/, images/<split>/, images/ or beside, seen from the folder that holds
    annotations/ (or else from the folder of the file).

    Classes are those of the 20 of VOC that any annotation has, by COCO's names or VOC's own; objects of other classes
    are counted but name none. The count is the number of annotations with iscrowd 0 whose area is at least 2 % of
    the image. The mask holds all instances, whatever their size, with iscrowd as void; an image with an annotation
    that has no segmentation has no mask.

    InputError for a file that is missing or holds no COCO instances, and without a folder of photographs; ``report``
    gets one for an incomplete record, an unknown category, and a missing photograph.
    """
    file = _choose(Path(path), split)
    data = _load(file)
    categories = {category["id"]: category["name"] for category in data["categories"]}
    annotations = _by_image(data)
    folder = _photographs(file, data["images"])
    entries = ((f"{file} image {image.get('id')}", image) for image in data["images"])
    return collect(entries, partial(_read, file, folder, categories, annotations), report)


def _read(file, folder, categories, annotations, where, image):
    height, width = (image.get(side) for side in ("height", "width"))
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise InputError(f"{where} has no height and width in pixels; add them to its record")
    path = folder / str(image["file_name"])
    if not path.is_file():
        raise InputError(f"{where} is {path}, which is missing; add the photograph or remove its record")
    found = annotations.get(image["id"], ())
    names = []
    for annotation in found:
        if annotation.get("category_id") not in categories:
            raise InputError(f"{where} has the unknown category {annotation.get('category_id')}; add it to categories")
        if not _is_number(annotation.get("area")):
            raise InputError(f"{where} has an annotation without an area; write its pixels there")
        name = categories[annotation["category_id"]]
        names.append(VOC_NAMES.get(name, name))
    return Sample(
        path,
        classes=tuple(sorted({CLASS_INDEX[name] for name in names if name in CLASS_INDEX})),
        count=sum(annotation["area"] >= SMALLEST * height * width for annotation in _instances(found)),
        mask=CocoMask(file, image["id"], (height, width)) if all(a.get("segmentation") for a in found) else None,
    )


def _choose(path, split):
    """The annotations file that a path and a split name."""
    if path.suffix == ".json":
        if split:
            raise InputError(f"{path} is one split already; leave @{split} out")
        return path
    files = find_files(path)
    if split is None and len(files) == 1:
        return next(iter(files.values()))
    if split not in files:
        raise InputError(f"{path} has the splits {', '.join(files)}; name one, such as {path}@{next(iter(files))}")
    return files[split]


def _load(file):
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); copy it again") from error
    needed = {"images": ("id", "file_name"), "annotations": ("image_id",), "categories": ("id", "name")}
    for part, keys in needed.items():
        records = data.get(part) if isinstance(data, dict) else None
        if not isinstance(records, list) or (not records and part == "images"):
            raise InputError(f"{file} holds no list of {part}; name a COCO instances file")
        for number, record in enumerate(records):
            if not isinstance(record, dict) or not all(isinstance(record.get(key), int | str) for key in keys):
                raise InputError(f"{file} {part}[{number}] needs {' and '.join(keys)}; mend the record")
    return data


def _by_image(data):
    grouped = defaultdict(list)
    for annotation in data["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    return dict(grouped)


@lru_cache(maxsize=2)
def _annotations(file):
    """{image id: annotations}. Read anew for masks, so that a training does not hold all polygons in memory."""
    return _by_image(_load(file))


def _photographs(file, images):
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = file.stem.removeprefix("instances_")
    folders = (root / split, root / "images" / split, root / "images", root)
    names = [str(image["file_name"]) for image in images[:100]]  # not only the first: it may be what is missing
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)
    if folder is None:
        raise InputError(f"the photographs of {file}, such as {names[0]}, are in none of "
                         f"{', '.join(map(str, folders))}; put them into the first")  # fmt: skip
    return folder


def _instances(annotations):
    return [annotation for annotation in annotations if not annotation.get("iscrowd")]


def _draw(annotation, mask):
    """One annotation of ``mask`` as bool [H,W]."""
    segmentation, (height, width) = annotation["segmentation"], mask.shape
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
