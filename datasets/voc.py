"""PASCAL VOC: classes and counts from the annotated boxes, instances from SegmentationObject.

Also what annotation tools write in its name: any list of images or none, any kind of picture, classes of one's own, and
the XML files in annotations/ beside images/, or beside the photographs themselves.
"""

import math
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets.ilso import count_instances
from datasets.images import SUFFIXES, image_size, list_images
from datasets.labels import Notice, Sample, collect, fail, read_text, split_names
from datasets.masks import MaskFile
from datasets.photographs import Photographs
from utils.cli import InputError

SMALLEST = 0.02  # share of the image below which an object does not count as salient


@dataclass(frozen=True)
class Folders:
    """Where a data set in the format of VOC lies. root: seen from there, ImageSets/ and SegmentationObject/."""

    root: Path
    photographs: Path
    annotations: Path


def find_folders(folder):
    """The Folders of ``folder``, None when there are none.

    They are JPEGImages/ and Annotations/ in it, in VOC2012/, VOC2007/ or VOCdevkit/VOC2012/ (VOCdevkit, its parent), or
    XML annotations in annotations/, Annotations/ or labels/ beside images/ or JPEGImages/, or beside the photographs.
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


def read_voc(folder, report=fail, only=None, split=None):
    """The photographs of a split as a list of Sample, in the order of the image list.

    folder: as for ``find_folders``. split: a list of names, such as ``train``, ``val`` or ``trainval``, from
    ImageSets/Segmentation where it has that list, else from ImageSets/Main or any other folder there; ``Main/train``
    says which. Without it the list is ``train``, or the only one; without any list all photographs are read, those that
    have no annotation without labels.

    Classes are those of all objects not marked difficult; what is of none of the 20 counts and names none. The count is
    the number of these whose bounding box covers at least 2 % of the image; it is not known where there are only
    difficult ones. Of a photograph whose annotation has no object nothing is known: tools write that for what nobody
    has looked at. The mask is SegmentationObject/<name>.png, where there is one: every object in it is an instance,
    whatever its size, and its contours are void; without a folder of annotations the counts are those of the masks.

    only: ``classes`` or ``count`` where the other does not matter. InputError for a missing list; ``report`` gets one
    for a photograph that is missing and for an annotation that is missing, no XML, incomplete, or of no photograph.
    """
    folders = find_folders(folder)
    names = _image_list(folders.root, split)
    photographs = Photographs(folders.photographs, names or ())
    if names is None:
        annotations = {path.stem: path for path in _xml_files(folders.annotations)}
        entries = [(annotations.pop(path.stem, path), path.name) for path in list_images(folders.photographs)]
        if annotations:
            report(
                Notice(
                    f"{len(annotations)} annotations in {folders.annotations}, such as {min(annotations)}.xml, "
                    f"belong to no photograph in {folders.photographs}; add it or remove them"
                )
            )
    else:
        entries = [(folders.annotations / f"{_without_suffix(name)}.xml", name) for name in names]
    return collect(entries, partial(_read, folders, photographs, only), report)


def _image_list(root, split):
    """The names of a split, or None where there are no lists at all and none is asked for."""
    sets = root / "ImageSets"
    found = {path.relative_to(sets).with_suffix("").as_posix() for path in sets.glob("**/*.txt")}
    splits = sorted({name.rpartition("/")[2] for name in found})
    splits = [name for name in splits if not any(name.endswith(f"_{other}") for other in splits)]  # of one class
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
    of_class = all(re.search(r"\s-?[01]$", name) for name in names)  # the lists of one class say 1, 0 or -1 behind each
    if not names or (of_class and not (root / "Annotations" / f"{names[0]}.xml").exists()):
        raise InputError(f"{path} is not a list of image names, one a line; use train, val or trainval")
    return [name.strip('"') for name in names]  # as CVAT writes names with blanks


def _read(folders, photographs, only, where, name):
    path = photographs.find(name if photographs.has(name) else _without_suffix(name), where)
    mask = folders.root / "SegmentationObject" / f"{_without_suffix(name)}.png"
    sample = Sample(path, mask=MaskFile(mask) if os.path.isfile(mask) else None)
    if not folders.annotations.is_dir():
        return count_instances(path, sample)
    if where == path:
        return sample
    annotation = _parse(where)
    objects = annotation.findall("object")
    if not objects:
        return sample
    certain = [thing for thing in objects if (thing.findtext("difficult") or "").strip().lower() not in ("1", "true")]
    names = [(thing.findtext("name") or "").strip() for thing in certain]
    if only != "count" and not all(names):
        raise InputError(f"{where} has an object without a name; write it there, or take only @count")
    classes, others = split_names(names)
    count = None if only == "classes" else _count(certain, annotation, path, where)
    if len(objects) > len(certain) and not count:
        count = None
    return Sample(path, classes, count, sample.mask, others)


def _parse(where):
    try:
        annotation = ET.fromstring(where.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the annotation {where} ({error.strerror}); extract it again") from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two for an encoding nobody knows
        raise InputError(f"{where} is not XML ({error}); extract it again") from error
    if annotation.tag.lower() != "annotation":
        raise InputError(f"{where} is no annotation of PASCAL VOC but <{annotation.tag}>; export it in that format")
    return annotation


def _count(objects, annotation, path, where):
    """How many boxes cover 2 % or more of the image, whose size is the photograph's where the annotation has none."""
    try:
        height, width = (float(annotation.findtext(f"size/{side}")) for side in ("height", "width"))
    except (TypeError, ValueError):
        height = width = 0
    if not (height > 0 and width > 0):
        height, width = image_size(path)
    return sum(_box_area(thing, where) >= SMALLEST * width * height for thing in objects)


def _box_area(thing, where):
    """The pixels in an object's box, whose last row and column belong to it."""
    left, top, right, bottom = (_number(thing, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax"))
    if right < left or bottom < top:
        raise InputError(f"{where} has a box that ends before it begins; exchange its corners")
    if 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and (right, bottom) != (1, 1):
        raise InputError(f"{where} has a box in shares of the image; write it in pixels")
    return (right - left + 1) * (bottom - top + 1)


def _number(element, tag, where):
    try:
        value = float(element.findtext(tag))
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where} has an {element.tag} whose {tag} is no number; mend it or export it again")
    return value


def _without_suffix(name):
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix.lower()}" in SUFFIXES else name


def _xml_files(folder):
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if path.suffix.lower() == ".xml" and not path.name.startswith("."))


def _is_annotation(path):
    try:
        with open(path, "rb") as file:
            return next(ET.iterparse(file, ["start"]))[1].tag == "annotation"
    except (OSError, ET.ParseError, ValueError, LookupError, StopIteration):
        return False
