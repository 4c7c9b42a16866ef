"""The only supervision there is: per image the classes in it and the number of salient objects."""

import csv
from dataclasses import dataclass
from pathlib import Path

from utils.cli import InputError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
COLUMNS = ("image", "classes", "count")

_INDEX = {name: index for index, name in enumerate(VOC_CLASSES)}


@dataclass(frozen=True)
class Sample:
    """One labelled photograph.

    path: the image file; classes: sorted indices 0..19 into VOC_CLASSES, without repetition;
    count: number of salient instances, 0 or more (the subitizing label T of the paper, Sec. 3).
    """

    path: Path
    classes: tuple[int, ...]
    count: int

    @property
    def stem(self):
        """The file name without its suffix: the image_id under which results are written."""
        return self.path.stem


def read_labels(folder):
    """Read ``folder/labels.csv`` and return its rows as a list of Sample, in file order.

    The file is UTF-8 with the header ``image,classes,count``: a file name under ``folder/images``, VOC class
    names separated by spaces (none is allowed), and an integer of 0 or more.

    Raises InputError, naming file and line, for a missing file or column, no rows, a row with too many
    fields, an unknown class, a missing, negative or non-integer count, a missing image, or a doubled row
    (also when two names differ only in their suffix, since results are stored under the stem).
    """
    folder = Path(folder)
    table = folder / "labels.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            samples = _read_rows(csv.DictReader(file, skipinitialspace=True), table, folder / "images")
    except OSError as error:
        raise InputError(
            f"cannot read {table} ({error.strerror}); a data folder needs images/ and labels.csv"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a UTF-8 text table ({error}); save it again as CSV") from error
    if not samples:
        raise InputError(f"{table} has no rows below its header; add one row per image")
    return samples


def _read_rows(reader, table, images):
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    missing = [column for column in COLUMNS if column not in reader.fieldnames]
    if missing:
        raise InputError(
            f"{table} line 1 lacks the column {' and '.join(missing)}; its header must be {','.join(COLUMNS)}"
        )
    samples, lines = [], {}
    for row in reader:
        line = reader.line_num
        sample = _read_row(row, f"{table} line {line}", images)
        if sample.stem in lines:
            first = lines[sample.stem]
            raise InputError(f"{table} line {line} names {sample.stem} again, after line {first}; keep one")
        lines[sample.stem] = line
        samples.append(sample)
    return samples


def _read_row(row, where, images):
    if None in row:
        raise InputError(f"{where} has more fields than the header; put spaces, not commas, between classes")
    name, classes, count = ((row[column] or "").strip() for column in COLUMNS)
    if not name:
        raise InputError(f"{where} names no image; write its file name there or delete the line")
    unknown = [word for word in classes.split() if word not in _INDEX]
    if unknown:
        raise InputError(
            f"{where} has the unknown class {unknown[0]!r}; the classes are {' '.join(VOC_CLASSES)}"
        )
    if not count.isdecimal():
        raise InputError(
            f"{where} has {f'the count {count!r}' if count else 'no count'}; write an integer of 0 or more"
        )
    path = images / name
    if not path.is_file():
        raise InputError(f"{where} names the image {path}, which is missing; add the file or delete the line")
    return Sample(path, tuple(sorted({_INDEX[word] for word in classes.split()})), int(count))
