"""The values of --data: a folder (or COCO file) in one of the published layouts, which is detected from its content.

    my_data                     labels.csv and images/
    VOCdevkit@val               PASCAL VOC: a split, train unless another is named; also XML files beside photographs
    coco@val2017                annotations/instances_val2017.json and its photographs; also the file itself
    roboflow@train              the folder train/ in it, in any of these layouts
    ILSO                        images/ and instance_masks/ (or gt/): counts, no classes
    photos                      any photographs, without labels
    VOCdevkit@trainval,classes  only the classes of a source, or only its @count, to combine with another source

The first layout in this order that fits is used.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import coco, ilso, voc
from datasets.images import image_size
from datasets.labels import (
    VOC_CLASSES,
    LabelWarning,
    Mask,
    Only,
    Report,
    Sample,
    collect_samples,
    raise_or_warn,
)
from datasets.labels_csv import find_table, read_labels
from datasets.listing import list_images
from datasets.masks import MaskFile, list_masks
from datasets.unread import LABEL_SUFFIXES, folders_in, unread_labels
from utils.cli import InputError


def read_photographs(folder: str | Path, report: Report = raise_or_warn, only: Only = None) -> list[Sample]:
    """The photographs in ``folder``, or in its images/, as Samples without labels; also of a file or a pattern.

    ``report`` gets a LabelWarning for photographs in other subfolders.
    """
    folder = Path(folder)
    inside = folder / "images" if (folder / "images").is_dir() else folder
    others = [other for other in {folder, *folders_in(folder), *folders_in(inside)} - {inside} if _holds_images(other)]
    if others:
        report(
            LabelWarning(
                f"the photographs in {', '.join(map(str, sorted(others)))} are not read, only those in {inside}; "
                "name the folders one by one"
            )
        )
    return collect_samples(((path, path) for path in _images_of(folder)), lambda where, path: Sample(path), report)


class Layout(NamedTuple):
    """A published layout: fits(path) is true for a path that has it; read(path, report, only[, split]) reads it."""

    name: str
    fits: Callable[[Path], Any]
    read: Callable[..., list[Sample]]
    splits: bool = False


LAYOUTS = (
    Layout("labels.csv", find_table, read_labels),
    Layout("PASCAL VOC", voc.find_folders, voc.read_voc, splits=True),
    Layout("COCO", lambda path: path.suffix.lower() == ".json" or coco.find_files(path), coco.read_coco, splits=True),
    Layout("ILSO", ilso.is_ilso, ilso.read_ilso),
    Layout("photographs", lambda path: _has_images(path), read_photographs),
)


# {the only label to read: the values of the others}
CLEARED: dict[str, dict[str, Any]] = {
    "classes": {"count": None, "mask": None},
    "count": {"classes": None, "others": (), "mask": None},
}


@dataclass(frozen=True)
class Source:
    """A parsed value of --data: path, layout, the split or None, and the only label to read or None for all."""

    path: Path
    layout: Layout
    split: str | None = None
    only: Only = None


@contextmanager
def _readable() -> Iterator[None]:
    """Context that turns the OSError of a folder that cannot be listed into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {error.filename} ({error.strerror}); check the path and its rights") from error


@_readable()
def find_source(text: str | Path) -> Source:
    """The Source of PATH or PATH@OPTION[,OPTION]; an option is a split, ``classes`` or ``count``.

    Raises InputError when no layout fits, for a split of a layout without splits, and for two splits or two labels.
    """
    path, words = _parse(text)
    only = [word for word in words if word in ("classes", "count")]
    split = [word for word in words if word not in only]
    if len(split) > 1 or len(only) > 1:
        raise InputError(f"{text} asks for two things at once; give the source once for each")
    if path.is_file() and path.name.lower() == "labels.csv":
        path = path.parent
    layout = _layout(path)
    if split and not (layout and layout.splits) and (inner := _layout(path / split[0])):
        path, layout, split = path / split[0], inner, []
    if layout is None:
        raise InputError(_no_layout(path))
    if split and not layout.splits:
        raise InputError(f"{text} names the split {split[0]}, but {path} ({layout.name}) has none; leave it out")
    label: Any = only[0] if only else None
    return Source(path, layout, split[0] if split else None, label)


def _layout(path: Path) -> Layout | None:
    """The Layout of a path, None when none fits."""
    if path.is_file() and path.suffix.lower() in LABEL_SUFFIXES and path.suffix.lower() != ".json":
        return None
    return next((layout for layout in LAYOUTS if layout.fits(path)), None)


def _no_layout(path: Path) -> str:
    """The message for a path without a layout."""
    if path.is_file():
        return f"{path} is no photograph and no COCO file; name the folder that holds the photographs and labels.csv"
    text = f"there is no {path / 'labels.csv'} nor another known layout in {path}"
    folders = folders_in(path)
    inside = [folder for folder in folders if _layout(folder)]
    inside = inside or [folder for outer in folders for folder in folders_in(outer) if _layout(folder)]
    if inside:
        return f"{text}; name one of the folders in it: {', '.join(map(str, inside))}"
    text = "; ".join([text, *unread_labels(path, _stems(path))])
    return f"{text}; name a folder with labels.csv, JPEGImages/, annotations/, instance_masks/ or photographs"


@_readable()
def read_source(source: Source | str | Path, report: Report = raise_or_warn) -> list[Sample]:
    """The Samples of a Source, or of its text; no two have the same stem.

    ``report`` gets an InputError for each problem of a single photograph, which is left out; problems of the whole
    source are raised.
    """
    source = source if isinstance(source, Source) else find_source(source)
    options = {"split": source.split} if source.split else {}
    if source.layout.name in ("photographs", "ILSO"):
        for text in unread_labels(source.path, _stems(source.path)):
            report(LabelWarning(text))
    samples = source.layout.read(source.path, report=report, only=source.only, **options)
    if source.only:
        samples = [replace(sample, **CLEARED[source.only]) for sample in samples]
    return samples


def merge(sources: Mapping[str, list[Sample]], report: Report = raise_or_warn) -> list[Sample]:
    """One list of Samples from {name of a source: its Samples}; the labels of one photograph in several are joined.

    Two files are the same photograph when they have the same stem and size and the sources have different labels of it,
    such as classes from one and the count from the other. The same file may occur in any number of sources. Other
    photographs of one stem are a problem: ``report`` gets an InputError that names both, or a LabelWarning when the
    later one has no labels, and the later one is left out.
    """
    merged: dict[str, Sample] = {}
    origin: dict[str, str] = {}
    for name, samples in sources.items():
        for sample in samples:
            stem = sample.stem
            try:
                merged[stem] = _join(merged[stem], sample, origin[stem], name) if stem in merged else sample
                origin[stem] = f"{origin[stem]}, {name}" if stem in origin else name
            except InputError as error:
                report(error)
    return list(merged.values())


def read_ground_truth(source: str | Path, report: Report = raise_or_warn) -> list[Sample]:
    """The Samples of a source that have a ground-truth mask.

    In a folder with instance_masks/ (or gt/, see datasets.ilso) all masks are used, whatever labels.csv lists. Raises
    InputError when there is no mask; else ``report`` gets the problems of single photographs.
    """
    found = find_source(source)
    problems: list[InputError] = []

    def note(error: InputError) -> None:
        (report if isinstance(error, LabelWarning) else problems.append)(error)

    samples = read_source(found, note) if found.layout.splits else []
    if not any(sample.mask for sample in samples) and (not found.layout.splits or ilso.is_ilso(found.path)):
        samples = ilso.read_pairs(found.path, note)
    samples = [sample for sample in samples if sample.mask is not None]
    if not samples:
        raise problems[0] if problems else InputError(f"{source} has no instance masks; name a source that has")
    for problem in problems:
        report(problem)
    return samples


def list_ground_truth(source: str | Path, report: Report = raise_or_warn) -> Mapping[str, Mask]:
    """{stem: mask} of a source as in ``read_ground_truth``, or of a folder of mask pictures."""
    path, options = _parse(source)
    if not options and not any(layout.fits(path) for layout in LAYOUTS if layout.name != "photographs"):
        return {stem: MaskFile(file) for stem, file in list_masks(path).items()}
    return {sample.stem: sample.mask for sample in read_ground_truth(source, report) if sample.mask is not None}


def _parse(text: str | Path) -> tuple[Path, list[str]]:
    """PATH@OPTION,OPTION -> (Path, [options]); an @ in the name of an existing file or folder is no option."""
    name, _, options = str(text).rpartition("@")
    if not name or Path(text).expanduser().exists():
        name, options = str(text), ""
    return Path(name).expanduser(), [word for word in options.split(",") if word]


def _join(first: Sample, second: Sample, origin: str, name: str) -> Sample:
    """The labels of both Samples of one stem, from the sources ``origin`` and ``name``; InputError for a conflict."""
    known = [{key for key in ("classes", "count", "mask") if getattr(s, key) is not None} for s in (first, second)]
    if first.path.resolve() == second.path.resolve():
        for key in sorted(known[0] & known[1]):
            a, b = getattr(first, key), getattr(second, key)
            if a != b:
                raise InputError(
                    f"{origin} and {name} disagree on the {key} of {first.path} ({_label_text(key, a)} and "
                    f"{_label_text(key, b)}); take only @classes or @count from one of them"
                )
    elif not known[1]:
        raise LabelWarning(f"{second.path} is left out, as {first.path} shares its name; rename one of them")
    elif not known[0] or known[0] & known[1]:
        raise InputError(
            f"{first.path} and {second.path} share a name; rename one of them, or take only @classes "
            "from one source and @count from the other if they are one photograph"
        )
    elif image_size(first.path) != image_size(second.path):
        raise InputError(f"{first.path} and {second.path} share a name but not a size; rename one of them")
    labels: dict[str, Any] = {key: getattr(second, key) for key in known[1]}
    joined = replace(first, **labels)
    return replace(joined, others=second.others) if "classes" in known[1] else joined


def _label_text(key: str, value: Any) -> str:
    return " ".join(VOC_CLASSES[index] for index in value) or "none" if key == "classes" else str(value)


def _images_of(folder: str | Path) -> list[Path]:
    inside = Path(folder) / "images"
    return list_images(inside if inside.is_dir() else folder)


def _stems(path: Path) -> set[str]:
    return {image.stem for image in _images_of(path)} if _has_images(path) else set()


def _has_images(path: Path) -> bool:
    """Whether there are photographs in the folder or in its images/."""
    try:
        return bool(_images_of(path))
    except InputError:
        return False


def _holds_images(folder: Path) -> bool:
    """Whether there are photographs in the folder itself."""
    try:
        return bool(list_images(folder))
    except InputError:
        return False
