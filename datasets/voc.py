"""PASCAL VOC: classes and counts from the annotated boxes, instances from SegmentationObject.

Also exports of annotation tools in this format: with any list of images or none, any kind of picture, other classes,
and the XML files in annotations/ beside images/, or beside the photographs themselves.
"""

import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets.ilso import count_instances
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
from datasets.labels_csv import read_text
from datasets.listing import SUFFIXES, list_images
from datasets.masks import MaskFile
from datasets.photographs import Photographs
from utils.cli import InputError


@dataclass(frozen=True)
class Folders:
    """The folders of a data set in VOC's format. root: the parent of ImageSets/ and SegmentationObject/."""

    root: Path
    photographs: Path
    annotations: Path


class Box(NamedTuple):
    """An annotated object: its class name and the first and last column and row of its box, in VOC's pixel coordinates
    (the first pixel is 1)."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


def find_folders(folder: str | Path) -> Folders | None:
    """The Folders of ``folder``, None when it is not in VOC's format.

    They are JPEGImages/ and Annotations/ in it, in VOC2012/, VOC2007/ or VOCdevkit/VOC2012/, or XML annotations in
    annotations/, Annotations/ or labels/ beside images/ or JPEGImages/, or beside the photographs.
    """
    folder = Path(folder)
    for root in (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012", folder / "VOC2007"):
        others = (root / name for name in ("Annotations", "ImageSets", "SegmentationObject"))
        if (root / "JPEGImages").is_dir() and any(map(Path.is_dir, others)):
            return Folders(root, root / "JPEGImages", root / "Annotations")
    inside = (folder / name for name in ("images", "Images", "JPEGImages"))
    photographs = next(filter(Path.is_dir, inside), folder)
    for annotations in (folder / "annotations", folder / "Annotations", folder / "labels", photographs, folder):
        if any(map(_is_annotation, _xml_files(annotations)[:10])):
            return Folders(folder, photographs, annotations)
    return None


def read_voc(
    folder: str | Path, report: Report = raise_or_warn, only: Only = None, split: str | None = None
) -> list[Sample]:
    """The photographs of a split as a list of Sample, in the order of the image list.

    folder: as for ``find_folders``. split: the name of an image list, such as ``train``, ``val`` or ``trainval``, in
    ImageSets/Segmentation if it is there, else in ImageSets/Main or any other folder of ImageSets; ``Main/train``
    selects the folder. The default is ``train``, or the only list; without any list all photographs are read, and those
    without an annotation have no labels.

    The classes are those of all objects not marked difficult; objects of other classes only add to the count. The count
    is the number of these objects whose bounding box covers at least MIN_AREA of the image; it is unknown when there
    are only difficult ones. The labels of a photograph whose annotation has no object are unknown, because tools write
    such annotations for images that have not been annotated. The mask is SegmentationObject/<name>.png, if it exists:
    every object in it is an instance, whatever its size, and its contours are void; without a folder of annotations the
    counts are those of the masks.

    only: ``classes`` or ``count`` when the other is not needed. Raises InputError for a missing list; ``report`` gets
    one for a missing photograph and for an annotation that is missing, malformed, incomplete, or of no photograph.
    """
    folders = find_folders(folder)
    if folders is None:
        raise InputError(
            f"{folder} is not in the format of PASCAL VOC; name a folder with JPEGImages/ and Annotations/"
        )
    names = _image_list(folders.root, split)
    photographs = Photographs(folders.photographs, names or ())
    if names is None:
        annotations = {path.stem: path for path in _xml_files(folders.annotations)}
        entries = [(annotations.pop(path.stem, path), path.name) for path in list_images(folders.photographs)]
        if annotations:
            report(
                LabelWarning(
                    f"{len(annotations)} annotations in {folders.annotations}, such as {min(annotations)}.xml, "
                    f"belong to no photograph in {folders.photographs}; add it or remove them"
                )
            )
    else:
        entries = [(folders.annotations / f"{_without_suffix(name)}.xml", name) for name in names]
    return collect_samples(entries, partial(_read, folders, photographs, only), report)


def _image_list(root: Path, split: str | None) -> list[str] | None:
    """The names of a split; None when there is no list and no split is given."""
    sets = root / "ImageSets"
    found = {path.relative_to(sets).with_suffix("").as_posix() for path in sets.glob("**/*.txt")}
    splits = sorted({name.rpartition("/")[2] for name in found})
    splits = [
        name for name in splits if not any(name.endswith(f"_{other}") for other in splits)
    ]  # without those of one class
    if split is None:
        if not found:
            return None
        split = splits[0] if len(splits) == 1 else "train"
    wanted = [split] if "/" in split else [f"Segmentation/{split}", f"Main/{split}"]
    wanted += [name for name in sorted(found) if name.rpartition("/")[2] == split and "/" not in split]
    name = next((name for name in wanted if name in found), None)
    if name is None:
        lists = " or ".join(f"ImageSets/{name}.txt" for name in wanted[:2])
        has = f"it has {', '.join(splits)}; name one of them, such as @{splits[0]}" if splits else "leave the split out"
        raise InputError(f"{root} has no image list {lists}; {has}")
    path = sets / f"{name}.txt"
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    of_class = all(
        re.search(r"\s-?[01]$", name) for name in names
    )  # lists of one class have 1, 0 or -1 after each name
    if not names or (of_class and not (root / "Annotations" / f"{names[0]}.xml").exists()):
        raise InputError(f"{path} is not a list of image names, one a line; use train, val or trainval")
    return [name.strip('"') for name in names]  # CVAT quotes names with blanks


def _read(folders: Folders, photographs: Photographs, only: Only, where: Path, name: str) -> Sample:
    path = photographs.find(name if photographs.has(name) else _without_suffix(name), str(where))
    mask = folders.root / "SegmentationObject" / f"{_without_suffix(name)}.png"
    sample = Sample(path, mask=MaskFile(mask) if os.path.isfile(mask) else None)
    if not folders.annotations.is_dir():
        return count_instances(path, sample)
    if where == path:
        return sample
    annotation = parse_annotation(where)
    objects = annotation.findall("object")
    if not objects:
        return sample
    clear = [thing for thing in objects if (thing.findtext("difficult") or "").strip().lower() not in ("1", "true")]
    names = [(thing.findtext("name") or "").strip() for thing in clear]
    if only != "count" and not all(names):
        raise InputError(f"{where} has an object without a name; write it there, or take only @count")
    classes, others = split_class_names(names)
    count = None if only == "classes" else _count(clear, annotation, path, where)
    if len(objects) > len(clear) and not count:
        count = None
    return Sample(path, classes, count, sample.mask, others)


def parse_annotation(path: Path) -> ET.Element:
    """The <annotation> element of a VOC annotation; InputError when the file is missing or in another format."""
    try:
        annotation = ET.fromstring(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the annotation {path} ({error.strerror}); extract it again") from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two for an unknown encoding
        raise InputError(f"{path} is not XML ({error}); extract it again") from error
    if annotation.tag.lower() != "annotation":
        raise InputError(f"{path} is no annotation of PASCAL VOC but <{annotation.tag}>; export it in that format")
    return annotation


def _count(objects: Iterable[ET.Element], annotation: ET.Element, path: Path, where: Path) -> int:
    """The number of boxes that cover at least MIN_AREA of the image; a missing size is that of the photograph."""
    try:
        height, width = (float(annotation.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    except ValueError:
        height = width = 0
    if not (height > 0 and width > 0):
        height, width = image_size(path)
    boxes = (read_box(thing, where) for thing in objects)
    areas = ((box.right - box.left + 1) * (box.bottom - box.top + 1) for box in boxes)
    return sum(area >= MIN_AREA * width * height for area in areas)


def read_box(thing: ET.Element, where: Path) -> Box:
    """The Box of an <object> element; InputError, beginning with ``where``, when it is incomplete or not in pixels."""
    left, top, right, bottom = (_number(thing, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax"))
    if right < left or bottom < top:
        raise InputError(f"{where} has a box that ends before it begins; exchange its corners")
    if 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and (right, bottom) != (1, 1):
        raise InputError(f"{where} has a box in fractions of the image; write it in pixels")
    return Box((thing.findtext("name") or "").strip(), left, top, right, bottom)


def _number(element: ET.Element, tag: str, where: Path) -> float:
    try:
        value = float(element.findtext(tag) or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where} has an {element.tag} whose {tag} is no number; correct it or export it again")
    return value


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix.lower()}" in SUFFIXES else name


def _xml_files(folder: Path) -> list[Path]:
    paths: Iterator[Path] = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(path for path in paths if path.suffix.lower() == ".xml" and not path.name.startswith("."))


def _is_annotation(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return next(ET.iterparse(file, ["start"]))[1].tag == "annotation"
    except (OSError, ET.ParseError, ValueError, LookupError, StopIteration):
        return False
