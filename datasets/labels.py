"""The only supervision there is: per image the classes in it and the number of salient objects."""

import csv
import io
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets.masks import MaskFile
from datasets.photographs import Photographs
from utils import distributed
from utils.cli import InputError

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
CLASS_INDEX = {name: index for index, name in enumerate(VOC_CLASSES)}
COCO_NAMES = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"}
COLUMNS = {  # of labels.csv, and the other names they go by
    "image": ("image", "images", "filename", "file_name", "file"),
    "classes": ("classes", "class", "labels", "label"),
    "count": ("count", "counts", "number"),
}
IGNORE = 255  # in class and instance labels: not known
MOST_OBJECTS = 250  # instance labels have 8 bits, of which 0 is background and 255 not known


@dataclass(frozen=True)
class Sample:
    """One photograph and what is known about it; None where something is not.

    path: the image file; classes: sorted indices 0..19 into VOC_CLASSES, without repetition, () when it is
    known to show none of them; count: number of salient instances, 0 to MOST_OBJECTS (the subitizing label T of the
    paper, Sec. 3); mask: the ground-truth instances, for evaluation: mask.read() is uint8 [H,W] with 0 background,
    1..254 instances, 255 void, mask.size() is (H,W), str(mask) names it in messages; others: the names of objects
    that are of none of the 20 classes, as far as they are told; name: the stem, where it is not that of the file.
    """

    path: Path
    classes: tuple[int, ...] | None = None
    count: int | None = None
    mask: object = None
    others: tuple[str, ...] = ()
    name: str = ""

    @property
    def stem(self):
        """The file name without its suffix, unless named otherwise: the image_id under which results are written."""
        return self.name or self.path.stem


class Notice(InputError):
    """What a reader says of labels that it does not use; it stops nothing."""


def fail(error):
    """What a reader does with a problem unless it is told otherwise: raise it, or print it where it is a Notice.

    A list's append collects instead.
    """
    if not isinstance(error, Notice):
        raise error
    if distributed.is_first():
        print(f"warning: {error}", file=sys.stderr)


def collect(entries, read, report):
    """The Samples ``read(where, entry)`` of all (where, entry), in order; ``where`` names the entry in messages.

    An InputError of ``read``, a count above MOST_OBJECTS, and a name that comes twice (also when two names differ only
    in their suffix, since results are stored under the stem), goes to ``report``; if that returns, the entry is left
    out.
    """
    samples, first = [], {}
    for where, entry in entries:
        try:
            sample = read(where, entry)
            if (sample.count or 0) > MOST_OBJECTS:
                raise InputError(
                    f"{where} has the count {sample.count}; at most {MOST_OBJECTS} objects can be told "
                    "apart, so correct it or leave the photograph out"
                )
            if sample.stem in first:
                raise InputError(f"{where} names {sample.stem} again, after {first[sample.stem]}; rename or remove one")
        except InputError as error:
            report(error)
            continue
        first[sample.stem] = where
        samples.append(sample)
    return samples


def class_index(name):
    """The index 0..19 of a class by its name in VOC or COCO, whatever its case, blanks, _ and -; None for others."""
    name = "".join(filter(str.isalnum, name.lower()))
    return CLASS_INDEX.get(COCO_NAMES.get(name, name))


def split_names(names):
    """(sorted indices 0..19 of the classes, sorted other names) of the names of a photograph's objects."""
    indices = {name: class_index(name) for name in names}
    return (
        tuple(sorted({index for index in indices.values() if index is not None})),
        tuple(sorted(name for name, index in indices.items() if index is None)),
    )


def class_indices(text, where):
    """The sorted indices 0..19 of class names in a text; InputError, beginning with ``where``, for an unknown one.

    Names stand apart by blanks or any of ``, ; | /``; "dining table" is one, as in COCO.
    """
    found = set()
    for part in re.split(r"[,;|/]", text.strip(" []{}()")):
        words = part.strip(" '\"").split()
        while words:
            taken = 2 if len(words) > 1 and class_index(words[0] + words[1]) is not None else 1
            index = class_index("".join(words[:taken]))
            if index is None:
                raise InputError(f"{where} has the unknown class {words[0]!r}; the classes are {' '.join(VOC_CLASSES)}")
            found.add(index)
            words = words[taken:]
    return tuple(sorted(found))


def find_table(folder):
    """The labels.csv of ``folder``, whatever the case of its letters; None without."""
    table = Path(folder) / "labels.csv"
    if table.is_file() or not table.parent.is_dir():
        return table if table.is_file() else None
    return next((path for path in sorted(table.parent.iterdir()) if path.name.lower() == table.name), None)


def read_labels(folder, report=fail, only=None):
    """Read ``folder/labels.csv`` and return its rows as a list of Sample, in file order.

    The table has the header ``image,classes,count``: a file name under ``folder/images`` (or in ``folder``, where there
    is no such folder), class names, and an integer of 0 or more. One of the columns classes and count may be left
    out: it is then not known. Tables as spreadsheets write them are understood (``_rows``), and names as
    ``datasets.photographs.Photographs`` finds them. ``folder/instance_masks/<stem>.png``, where it exists, is the
    ground truth. Photographs of one stem in several folders are named by these: cats/1.jpg is then cats_1.

    only: ``classes`` or ``count`` where the other does not matter.

    Raises InputError, naming file and line, for a missing file or column and for no rows. ``report`` gets one for
    a row with too many fields, an unknown class, a missing, negative or non-integer count, a missing image, or a
    doubled row.
    """
    folder = Path(folder)
    table = find_table(folder)
    if table is None:
        raise InputError(f"there is no {folder / 'labels.csv'}; a data folder needs images/ and labels.csv")
    rows = _rows(table, report, only)
    if not rows:
        raise InputError(f"{table} has no rows below its header; add one row per image")
    images = folder / "images"
    photographs = Photographs(images if images.is_dir() else folder, [row.get("image", "") for _, row in rows])
    return collect(_named_apart(rows, photographs), partial(_read_row, folder, only), report)


def read_text(path):
    """The text of a file in UTF-8, UTF-16 or, where it is neither, cp1252; InputError when it is no text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path and its rights") from error
    encodings = ["utf-8-sig", "cp1252"]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    elif b"\0" in data[:2]:  # without a mark: the first character is a Latin one
        encodings = ["utf-16-be" if data[0] == 0 else "utf-16-le"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise InputError(f"{path} is not text; save it again as CSV or text in UTF-8")


def _rows(table, report, only):
    """[(file and line, {column: cell})] of a table, empty rows left out; of its columns those that are known.

    The delimiter is that of the header (``, ; |`` or a tab), or what Excel's line ``sep=;`` says. InputError when the
    table is no text or its header is not understood.
    """
    text = read_text(table)
    said = re.match(r'"?sep=(.)"?[^\r\n]*', text, re.IGNORECASE)
    text = text[said.end() :] if said else text  # its line end stays, and so do the numbers of the lines
    names = {name for names in COLUMNS.values() for name in names}
    first = text.strip().splitlines()[:1] or [""]
    delimiter = (
        said[1]
        if said
        else max(",;\t|", key=lambda mark: sum(name.strip(' "').lower() in names for name in first[0].split(mark)))
    )
    # Strict: a quote that is never closed would swallow the rows behind it.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True
    )
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise InputError(f"{table} line {reader.line_num} is no row of a table ({error}); mend its quotes") from error
    rows = [(line, row) for line, row in rows if any(row)]
    header, *rows = rows or [(1, [])]
    places = _columns(header[1], f"{table} line {header[0]}", report, only)
    return [(f"{table} line {line}", _cells(row, places, len(header[1]))) for line, row in rows]


def _columns(header, where, report, only):
    """{column: its place in the header}; InputError when one that is needed is missing, or is there twice.

    ``report`` gets a Notice when one is missing that others may stand for.
    """
    names = [name.lower() for name in header]
    places = {}
    for column, others in COLUMNS.items():
        name = next((name for name in others if name in names), None)
        if names.count(name) > 1:
            raise InputError(f"{where} has the column {name} twice; keep one")
        if name:
            places[column] = names.index(name)
    missing = [column for column in COLUMNS if column not in places]
    if "image" in missing or only in missing or {"classes", "count"} <= set(missing):
        raise InputError(f"{where} lacks the column {' and '.join(missing)}; its header must be {','.join(COLUMNS)}")
    others = [name for place, name in enumerate(header) if name and place not in places.values()]
    if missing and others and not only:
        report(
            Notice(
                f"{where} has no column {missing[0]}, which is then not known (not read: {', '.join(others)}); "
                f"its header should be {','.join(COLUMNS)}"
            )
        )
    return places


def _cells(row, places, width):
    cells = {column: row[place] if place < len(row) else "" for column, place in places.items()}
    return cells | ({"too many": "yes"} if any(row[width:]) else {})


def _named_apart(rows, photographs):
    """The (where, (row, path, name)) of rows. path: the photograph, or the InputError that says why there is none;
    name: "" but for photographs in folders that share their stem with others."""
    paths = [_find(photographs, row["image"], where) for where, row in rows]
    of_stem = defaultdict(set)
    for path in paths:
        if isinstance(path, Path):
            of_stem[path.stem].add(path)
    for (where, row), path in zip(rows, paths, strict=True):
        name = ""
        if isinstance(path, Path) and len(of_stem[path.stem]) > 1 and path.is_relative_to(photographs.folder):
            name = "_".join(path.relative_to(photographs.folder).with_suffix("").parts)
        yield where, (row, path, name)


def _find(photographs, name, where):
    try:
        if not name:
            raise InputError(f"{where} names no image; write its file name there or delete the line")
        return photographs.find(name, where)
    except InputError as error:
        return error


def _read_row(folder, only, where, entry):
    row, path, name = entry
    if "too many" in row:
        raise InputError(f"{where} has more fields than the header; put spaces, not commas, between classes")
    if isinstance(path, InputError):
        raise path
    # A column that the header lacks is not known; an empty cell of classes says that there is none.
    classes = class_indices(row["classes"], where) if "classes" in row and only != "count" else None
    count = _count(row["count"], where) if "count" in row and only != "classes" else None
    mask = folder / "instance_masks" / f"{name or path.stem}.png"
    return Sample(path, classes, count, MaskFile(mask) if os.path.isfile(mask) else None, name=name)


def _count(text, where):
    whole = re.fullmatch(r"(\d{1,9})([.,]00?)?", text)  # 2.0 as pandas and 2,0 as European spreadsheets write it
    if not whole:
        raise InputError(f"{where} has {f'the count {text!r}' if text else 'no count'}; write an integer of 0 or more")
    return int(whole[1])
