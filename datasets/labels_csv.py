"""labels.csv: one row per photograph with its file name, its classes and the number of its salient instances."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets.labels import VOC_CLASSES, LabelWarning, Only, Report, Sample, class_index, collect_samples, raise_or_warn
from datasets.masks import MaskFile
from datasets.photographs import Photographs
from utils.cli import InputError

COLUMNS = {  # of labels.csv, and the other names they may have
    "image": ("image", "images", "filename", "file_name", "file"),
    "classes": ("classes", "class", "labels", "label"),
    "count": ("count", "counts", "number"),
}
Row = tuple[str, dict[str, str]]  # file and line, for messages; {column: cell}
_Entry = tuple[dict[str, str], Path | InputError, str]  # {column: cell}, photograph, name


def find_table(folder: str | Path) -> Path | None:
    """The labels.csv of ``folder``, upper or lower case; None without one."""
    table = Path(folder) / "labels.csv"
    if table.is_file() or not table.parent.is_dir():
        return table if table.is_file() else None
    return next((path for path in sorted(table.parent.iterdir()) if path.name.lower() == table.name), None)


def read_labels(folder: str | Path, report: Report = raise_or_warn, only: Only = None) -> list[Sample]:
    """The rows of ``folder/labels.csv`` as a list of Sample, in file order.

    The table has the header ``image,classes,count``: a file name in ``folder/images`` (or in ``folder``, where there is
    no such folder), class names, and an integer of 0 or more. One of the columns classes and count may be missing: that
    label is then unknown. Tables of spreadsheets are read (``_rows``), and file names are matched by
    ``datasets.photographs.Photographs``. ``folder/instance_masks/<stem>.png``, where it exists, is the ground truth.
    The stems of equally named photographs include their folders: cats/1.jpg becomes cats_1.

    only: ``classes`` or ``count`` when the other is not needed.

    Raises InputError, naming file and line, for a missing file or column and for a table without rows. ``report`` gets
    one for a row with too many fields, an unknown class, a missing, negative or non-integer count, a missing image, or
    a repeated name.
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
    return collect_samples(_with_unique_names(rows, photographs), partial(_read_row, folder, only), report)


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, UTF-16 or, where it is neither, cp1252; InputError when it is no text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path and its rights") from error
    encodings = ["utf-8-sig", "cp1252"]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    elif b"\0" in data[:2]:  # no byte-order mark; the first character is a Latin one
        encodings = ["utf-16-be" if data[0] == 0 else "utf-16-le"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise InputError(f"{path} is not text; save it again as CSV or text in UTF-8")


def parse_classes(text: str, where: str) -> tuple[int, ...]:
    """The sorted indices 0..19 of the class names in a cell; InputError, beginning with ``where``, for an unknown name.

    Names are separated by blanks or any of ``, ; | /``; "dining table" is one name, as in COCO.
    """
    found: set[int] = set()
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


def _rows(table: Path, report: Report, only: Only) -> list[Row]:
    """The rows of a table without the empty ones, with the cells of the columns in ``COLUMNS``.

    The delimiter is that of the header (``, ; |`` or a tab), or that of Excel's line ``sep=;``. InputError when the
    file is no text or its header lacks a column.
    """
    text = read_text(table)
    separator = re.match(r'"?sep=(.)"?[^\r\n]*', text, re.IGNORECASE)
    text = text[separator.end() :] if separator else text  # its line end stays, which keeps the line numbers right
    names = {name for names in COLUMNS.values() for name in names}
    first = text.strip().splitlines()[:1] or [""]
    delimiter = (
        separator[1]
        if separator
        else max(",;\t|", key=lambda mark: sum(name.strip(' "').lower() in names for name in first[0].split(mark)))
    )
    # Strict: an unclosed quote would swallow the following rows.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True
    )
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise InputError(
            f"{table} line {reader.line_num} is no row of a table ({error}); correct its quotes"
        ) from error
    (first_line, header), *lines = [(line, row) for line, row in lines if any(row)] or [(1, [])]
    places = _columns(header, f"{table} line {first_line}", report, only)
    return [(f"{table} line {line}", _cells(row, places, len(header))) for line, row in lines]


def _columns(header: list[str], where: str, report: Report, only: Only) -> dict[str, int]:
    """{column: its position in the header}; InputError when a required one is missing or any occurs twice.

    ``report`` gets a LabelWarning when a column is missing while unknown ones are there.
    """
    names = [name.lower() for name in header]
    places = {}
    for column, others in COLUMNS.items():
        found = [name for name in others if name in names]
        if found and names.count(found[0]) > 1:
            raise InputError(f"{where} has the column {found[0]} twice; keep one")
        if found:
            places[column] = names.index(found[0])
    missing = [column for column in COLUMNS if column not in places]
    if "image" in missing or only in missing or {"classes", "count"} <= set(missing):
        raise InputError(f"{where} lacks the column {' and '.join(missing)}; its header must be {','.join(COLUMNS)}")
    unknown = [name for place, name in enumerate(header) if name and place not in places.values()]
    if missing and unknown and not only:
        report(
            LabelWarning(
                f"{where} has no column {missing[0]}, so that label is unknown (not read: {', '.join(unknown)}); "
                f"its header should be {','.join(COLUMNS)}"
            )
        )
    return places


def _cells(row: list[str], places: dict[str, int], width: int) -> dict[str, str]:
    cells = {column: row[place] if place < len(row) else "" for column, place in places.items()}
    return cells | ({"too many": "yes"} if any(row[width:]) else {})


def _with_unique_names(rows: list[Row], photographs: Photographs) -> Iterator[tuple[str, _Entry]]:
    """(where, (row, path, name)) of each row. path: the photograph, or the InputError for a missing one; name: the stem
    with its folders for photographs that share their stem with others, else ""."""
    paths = [_find(photographs, row["image"], where) for where, row in rows]
    of_stem: dict[str, set[Path]] = defaultdict(set)
    for path in paths:
        if isinstance(path, Path):
            of_stem[path.stem].add(path)
    for (where, row), path in zip(rows, paths, strict=True):
        name = ""
        if isinstance(path, Path) and len(of_stem[path.stem]) > 1 and path.is_relative_to(photographs.folder):
            name = "_".join(path.relative_to(photographs.folder).with_suffix("").parts)
        yield where, (row, path, name)


def _find(photographs: Photographs, name: str, where: str) -> Path | InputError:
    try:
        if not name:
            raise InputError(f"{where} names no image; write its file name there or delete the line")
        return photographs.find(name, where)
    except InputError as error:
        return error


def _read_row(folder: Path, only: Only, where: str, entry: _Entry) -> Sample:
    row, path, name = entry
    if "too many" in row:
        raise InputError(f"{where} has more fields than the header; put spaces, not commas, between classes")
    if isinstance(path, InputError):
        raise path
    # A missing column means unknown; an empty cell of classes means that none is there.
    classes = parse_classes(row["classes"], where) if "classes" in row and only != "count" else None
    count = _count(row["count"], where) if "count" in row and only != "classes" else None
    mask = folder / "instance_masks" / f"{name or path.stem}.png"
    return Sample(path, classes, count, MaskFile(mask) if os.path.isfile(mask) else None, name=name)


def _count(text: str, where: str) -> int:
    whole = re.fullmatch(r"(\d{1,9})([.,]00?)?", text)  # 2.0 as pandas and 2,0 as European spreadsheets write it
    if not whole:
        raise InputError(f"{where} has {f'the count {text!r}' if text else 'no count'}; write an integer of 0 or more")
    return int(whole[1])
