"""Label files in formats that are not supported, for a warning that names them."""

from collections.abc import Collection
from pathlib import Path

BESIDE = ("labels", "label", "annotations", "Annotations", "ann", "json", "xml")  # folders in which tools put labels
OF_INFER = ("predictions.json", "cutouts.json")  # which infer.py writes
LABEL_SUFFIXES = (".csv", ".tsv", ".xls", ".xlsx", ".ods", ".xml", ".json")


def unread_labels(path: Path, stems: Collection[str]) -> list[str]:
    """[a message] about the label files in and around the folder ``path``; [] without any.

    stems: of the photographs, whose labels may be .txt files of the same name.
    """
    named = {*stems, "labels", "annotations", "classes"}

    def may_hold_labels(file: Path) -> bool:
        table = file.suffix.lower() in LABEL_SUFFIXES and file.name not in OF_INFER
        return table or (file.suffix.lower() == ".txt" and file.stem in named)

    folders = [path, *(path / name for name in ("images", *BESIDE))]
    if path.name.lower() in ("images", "imgs", "img", "jpegimages"):
        folders += [path.parent, *(path.parent / name for name in BESIDE)]
    if path.parent.name == "images":  # YOLO: labels/train beside images/train
        folders.append(path.parent.parent / "labels" / path.name)
    found = [file for folder in folders for file in files_in(folder) if may_hold_labels(file)]
    if path.name and path.is_dir():  # COCO: annotations/instances_val2017.json beside val2017/
        around = files_in(path.parent) + files_in(path.parent / "annotations")
        found += [file for file in around if file.stem.endswith(path.name) and may_hold_labels(file)]
    if not found:
        return []
    more = f" and {len(found) - 1} more files" if found[1:] else ""
    return [
        f"{found[0]}{more} may hold labels, which are not read; export labels.csv, COCO's JSON or VOC's XML, or "
        "move the files away"
    ]


def folders_in(path: Path) -> list[Path]:
    """The folders in ``path``, sorted, without hidden ones; [] when it is no folder."""
    found = path.iterdir() if path.is_dir() else iter(())
    return sorted(inside for inside in found if inside.is_dir() and not inside.name.startswith("."))


def files_in(path: Path) -> list[Path]:
    """The entries of ``path``, sorted, without hidden ones; [] when it is no folder."""
    return sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else []
