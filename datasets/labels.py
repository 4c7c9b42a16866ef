"""The only supervision there is: per image the classes in it and the number of salient objects."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets.masks import MaskFile
from utils.cli import InputError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CLASS_INDEX = {name: index for index, name in enumerate(VOC_CLASSES)}
COLUMNS = ("image", "classes", "count")
IGNORE = 255  # in class and instance labels: not known


@dataclass(frozen=True)
class Sample:
    """One photograph and what is known about it; None where something is not.

    path: the image file; classes: sorted indices 0..19 into VOC_CLASSES, without repetition, () when it is
    known to show none of them; count: number of salient instances, 0 or more (the subitizing label T of the
    paper, Sec. 3); mask: the ground-truth instances, for evaluation: mask.read() is uint8 [H,W] with 0 background,
    1..254 instances, 255 void, mask.size() is (H,W), str(mask) names it in messages.
    """

    path: Path
    classes: tuple[int, ...] | None = None
    count: int | None = None
    mask: object = None

    @property
    def stem(self):
        """The file name without its suffix: the image_id under which results are written."""
        return self.path.stem


def fail(error):
    """What a reader does with a problem unless it is told otherwise: raise it. A list's append collects instead."""
    raise error


def collect(entries, read, report):
    """The Samples ``read(where, entry)`` of all (where, entry), in order; ``where`` names the entry in messages.

    An InputError of ``read``, and a name that comes twice (also when two names differ only in their suffix, since
    results are stored under the stem), goes to ``report``; if that returns, the entry is left out.
    """
    samples, first = [], {}
    for where, entry in entries:
        try:
            sample = read(where, entry)
            if sample.stem in first:
                raise InputError(f"{where} names {sample.stem} again, after {first[sample.stem]}; keep one")
        except InputError as error:
            report(error)
            continue
        first[sample.stem] = where
        samples.append(sample)
    return samples


def class_indices(names, where):
    """The sorted indices 0..19 of VOC class names; InputError, beginning with ``where``, for an unknown one."""
    unknown = [name for name in names if name not in CLASS_INDEX]
    if unknown:
        raise InputError(f"{where} has the unknown class {unknown[0]!r}; the classes are {' '.join(VOC_CLASSES)}")
    return tuple(sorted({CLASS_INDEX[name] for name in names}))


def read_labels(folder, report=fail):
    """Read ``folder/labels.csv`` and return its rows as a list of Sample, in file order.

    The file is UTF-8 with the header ``image,classes,count``: a file name under ``folder/images``, VOC class
    names separated by spaces (none is allowed), and an integer of 0 or more. One of the columns classes and count
    may be left out: it is then not known. ``folder/instance_masks/<stem>.png``, where it exists, is the ground truth.

    Raises InputError, naming file and line, for a missing file or column and for no rows. ``report`` gets one for
    a row with too many fields, an unknown class, a missing, negative or non-integer count, a missing image, or a
    doubled row.
    """
    folder = Path(folder)
    table = folder / "labels.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            _check_header(reader, table)
            rows = [(f"{table} line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise InputError(
            f"cannot read {table} ({error.strerror}); a data folder needs images/ and labels.csv"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a UTF-8 text table ({error}); save it again as CSV") from error
    if not rows:
        raise InputError(f"{table} has no rows below its header; add one row per image")
    return collect(rows, partial(_read_row, folder), report)


def _check_header(reader, table):
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    missing = [column for column in COLUMNS if column not in reader.fieldnames]
    if "image" in missing or {"classes", "count"} <= set(missing):
        raise InputError(
            f"{table} line 1 lacks the column {' and '.join(missing)}; its header must be {','.join(COLUMNS)}"
        )


def _read_row(folder, where, row):
    if None in row:
        raise InputError(f"{where} has more fields than the header; put spaces, not commas, between classes")
    # A column that the header lacks is None, an empty or missing cell "".
    name, classes, count = ((row[column] or "").strip() if column in row else None for column in COLUMNS)
    if not name:
        raise InputError(f"{where} names no image; write its file name there or delete the line")
    classes = classes if classes is None else class_indices(classes.split(), where)
    if count is not None and not count.isdecimal():
        raise InputError(
            f"{where} has {f'the count {count!r}' if count else 'no count'}; write an integer of 0 or more"
        )
    path = folder / "images" / name
    if not path.is_file():
        raise InputError(f"{where} names the image {path}, which is missing; add the file or delete the line")
    mask = folder / "instance_masks" / f"{path.stem}.png"
    return Sample(path, classes, count if count is None else int(count), MaskFile(mask) if mask.is_file() else None)
