"""PASCAL VOC: classes and counts from the annotated boxes, instances from SegmentationObject."""

import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

from datasets.labels import Sample, class_indices, collect, fail
from datasets.masks import MaskFile
from utils.cli import InputError

SMALLEST = 0.02  # share of the image below which an object does not count as salient


def find_root(folder):
    """The folder with JPEGImages/: ``folder`` itself (VOC2012) or below it (VOCdevkit, its parent); None without."""
    folder = Path(folder)
    roots = (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012")
    return next((root for root in roots if (root / "JPEGImages").is_dir()), None)


def read_voc(folder, report=fail, split="train"):
    """The photographs of a split as a list of Sample, in the order of the image list.

    folder: VOCdevkit, VOC2012, or the folder that holds VOCdevkit. split: a list of names, ``train``, ``val`` or
    ``trainval``, from ImageSets/Segmentation where it has that list, else from ImageSets/Main; ``Main/train`` says
    which. Classes are those of all objects not marked difficult; the count is the number of these whose bounding box
    covers at least 2 % of the image. The mask is SegmentationObject/<name>.png, where there is one: every object
    in it is an instance, whatever its size, and its contours are void.

    InputError for a missing list; ``report`` gets one for a photograph that is missing and for an annotation that
    is missing, no XML, or incomplete.
    """
    root = find_root(folder)
    entries = ((root / "Annotations" / f"{name}.xml", name) for name in _image_list(root, split))
    return collect(entries, partial(_read, root), report)


def _image_list(root, split):
    sets = root / "ImageSets"
    names = [split] if "/" in split else [f"Segmentation/{split}", f"Main/{split}"]
    lists = [sets / f"{name}.txt" for name in names]
    path = next(filter(Path.is_file, lists), None)
    if path is None:
        raise InputError(f"{root} has no image list {' or '.join(str(p.relative_to(root)) for p in lists)}; "
                         "name a split that it has, such as @train, @val or @trainval")  # fmt: skip
    rows = [line.split() for line in _text(path).splitlines() if line.strip()]
    if not rows or max(map(len, rows)) > 1:  # the lists of one class hold 1 or -1 behind each name
        raise InputError(f"{path} is not a list of image names, one a line; use train, val or trainval")
    return [name for (name,) in rows]


def _read(root, where, name):
    try:
        annotation = ET.fromstring(where.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the annotation {where} ({error.strerror}); extract it again") from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the last two for an encoding nobody knows
        raise InputError(f"{where} is not XML ({error}); extract it again") from error
    width, height = (_number(annotation, f"size/{side}", where) for side in ("width", "height"))
    if not (width > 0 and height > 0):
        raise InputError(f"{where} has the size {width:g} x {height:g}; write that of its image")
    objects = [thing for thing in annotation.findall("object") if (thing.findtext("difficult") or "0").strip() != "1"]
    classes = class_indices([(thing.findtext("name") or "").strip() for thing in objects], where)
    count = sum(_box_area(thing, where) >= SMALLEST * width * height for thing in objects)

    path, mask = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationObject" / f"{name}.png"
    if not path.is_file():
        raise InputError(f"{where} is of the image {path}, which is missing; extract it again")
    return Sample(path, classes, count, MaskFile(mask) if mask.is_file() else None)


def _box_area(thing, where):
    """The pixels in an object's box, whose last row and column belong to it."""
    left, top, right, bottom = (_number(thing, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax"))
    return (right - left + 1) * (bottom - top + 1)


def _number(element, tag, where):
    try:
        return float(element.findtext(tag))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} has an {element.tag} whose {tag} is no number; extract it again") from error


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the image list {path} ({error}); extract it again") from error
