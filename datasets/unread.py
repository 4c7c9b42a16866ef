"""Label files that no reader looks at, so that they can be named: those of other tools, and those beside a folder."""

BESIDE = ("labels", "label", "annotations", "Annotations", "ann", "json", "xml")  # where tools put labels
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods", ".xml", ".json")  # that may hold labels


def unread_labels(path, stems):
    """[a sentence] on the label files in ``path`` and where tools put them for the photographs there; [] without any.

    stems: those of the photographs, whose labels may be a .txt of the same name.
    """
    named = {*stems, "labels", "annotations", "classes"}

    def may_hold_labels(file):
        table = file.suffix.lower() in TABLES and file.name != "predictions.json"  # which infer.py writes
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


def folders_in(path):
    """The folders in ``path``, sorted, without hidden ones; [] when it is none."""
    found = path.iterdir() if path.is_dir() else ()
    return sorted(inside for inside in found if inside.is_dir() and not inside.name.startswith("."))


def files_in(path):
    """What lies in the folder ``path``, sorted, without hidden ones; [] when it is none."""
    return sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else []
