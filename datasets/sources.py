"""What --data takes: a folder (or COCO file) in one of the published layouts, found out from what lies in it.

    my_data                     labels.csv and images/
    VOCdevkit@val               PASCAL VOC: a split, train unless another is named; also XML files beside photographs
    coco@val2017                annotations/instances_val2017.json and its photographs; also the file itself
    roboflow@train              the folder train/ in another, in a layout of its own
    ILSO                        images/ and instance_masks/ (or gt/): counts, no classes
    photos                      any photographs, without labels
    VOCdevkit@trainval,classes  only the classes of a source, or only the @count, to go with those of another

The first that fits in this order is taken.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from datasets import coco, ilso, voc
from datasets.images import image_size, list_images
from datasets.labels import VOC_CLASSES, Notice, Sample, collect, fail, find_table, read_labels
from datasets.masks import MaskFile, list_masks
from datasets.unread import TABLES, folders_in, unread_labels
from utils.cli import InputError


def read_photographs(folder, report=fail, only=None):
    """The photographs in ``folder``, or in its images/, as Samples without labels; also of a file or a pattern.

    ``report`` gets a Notice for photographs in other folders there.
    """
    folder = Path(folder)
    inside = folder / "images" if (folder / "images").is_dir() else folder
    others = [other for other in {folder, *folders_in(folder), *folders_in(inside)} - {inside} if _holds_images(other)]
    if others:
        report(
            Notice(
                f"the photographs in {', '.join(map(str, sorted(others)))} are not read, only those in {inside}; "
                "name the folders one by one"
            )
        )
    return collect(((path, path) for path in _images_of(folder)), lambda where, path: Sample(path), report)


class Layout(NamedTuple):
    """A published layout: its name, whether a path has it, and its reader (path, report, only[, split])."""

    name: str
    fits: Callable
    read: Callable
    splits: bool = False


LAYOUTS = (
    Layout("labels.csv", find_table, read_labels),
    Layout("PASCAL VOC", voc.find_folders, voc.read_voc, splits=True),
    Layout("COCO", lambda path: path.suffix.lower() == ".json" or coco.find_files(path), coco.read_coco, splits=True),
    Layout("ILSO", ilso.is_ilso, ilso.read_ilso),
    Layout("photographs", lambda path: _has_images(path), read_photographs),
)


FORGET = {"classes": {"count": None, "mask": None}, "count": {"classes": None, "others": (), "mask": None}}


@dataclass(frozen=True)
class Source:
    """A source as it was named: its path and layout, the split or None, and the one label to take, or None for all."""

    path: Path
    layout: Layout
    split: str | None = None
    only: str | None = None


@contextmanager
def _readable():
    """A folder that cannot be listed is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {error.filename} ({error.strerror}); check the path and its rights") from error


@_readable()
def find_source(text):
    """The Source that PATH or PATH@OPTION[,OPTION] names; an option is a split, ``classes`` or ``count``.

    InputError when no layout fits, for a split of a layout that has none, and for two splits or labels.
    """
    path, words = _parse(text)
    only = [word for word in words if word in ("classes", "count")]
    split = [word for word in words if word not in only]
    if len(split) > 1 or len(only) > 1:
        raise InputError(f"{text} asks for two things at once; give the source once for each")
    if path.is_file() and path.name.lower() == "labels.csv":
        path = path.parent
    layout = _layout(path)
    if split and not (layout and layout.splits) and _layout(path / split[0]):
        path, layout, split = path / split[0], _layout(path / split[0]), []
    if layout is None:
        raise InputError(_no_layout(path))
    if split and not layout.splits:
        raise InputError(f"{text} names the split {split[0]}, but {path} ({layout.name}) has none; leave it out")
    return Source(path, layout, *split or [None], *only or [None])


def _layout(path):
    """The Layout of a path, None when none fits."""
    if path.is_file() and path.suffix.lower() in TABLES and path.suffix.lower() != ".json":
        return None
    return next((layout for layout in LAYOUTS if layout.fits(path)), None)


def _no_layout(path):
    """What to say of a path that has no layout."""
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
def read_source(source, report=fail):
    """The Samples of a Source, or of the text that names one; no two have the same stem.

    What is wrong with a single photograph goes to ``report`` as an InputError, and the photograph is left out;
    what is wrong with the whole source is raised.
    """
    source = source if isinstance(source, Source) else find_source(source)
    options = {"split": source.split} if source.split else {}
    if source.layout.name in ("photographs", "ILSO"):
        for text in unread_labels(source.path, _stems(source.path)):
            report(Notice(text))
    samples = source.layout.read(source.path, report=report, only=source.only, **options)
    if source.only:
        samples = [replace(sample, **FORGET[source.only]) for sample in samples]
    return samples


def merge(sources, report=fail):
    """One list of Samples from {name of a source: its Samples}, what several know about a photograph joined.

    Two files are one photograph when they share the stem and the size and each source knows what the other does not,
    as classes from one and the count from another. The same file may come as often as it likes. Anything else under
    one stem goes to ``report`` as an InputError that names both, a Notice where the later one has no labels, and the
    later one is left out.
    """
    merged, origin = {}, {}
    for name, samples in sources.items():
        for sample in samples:
            stem = sample.stem
            try:
                merged[stem] = _join(merged[stem], sample, origin[stem], name) if stem in merged else sample
                origin[stem] = f"{origin[stem]}, {name}" if stem in origin else name
            except InputError as error:
                report(error)
    return list(merged.values())


def read_ground_truth(source, report=fail):
    """The Samples of a source that have a ground-truth mask; InputError when none has, else ``report`` gets problems.

    A folder with instance_masks/ (or gt/, see datasets.ilso) is taken by its masks, whether it has labels.csv or not.
    """
    found, problems = find_source(source), []

    def note(error):
        (report if isinstance(error, Notice) else problems.append)(error)

    samples = read_source(found, note) if found.layout.splits else []
    if not any(sample.mask for sample in samples) and (not found.layout.splits or ilso.is_ilso(found.path)):
        samples = ilso.read_pairs(found.path, note)
    samples = [sample for sample in samples if sample.mask is not None]
    if not samples:
        raise problems[0] if problems else InputError(f"{source} has no instance masks; name a source that has")
    for problem in problems:
        report(problem)
    return samples


def list_ground_truth(source, report=fail):
    """{stem: mask} of a source as in ``read_ground_truth``, or of a folder that holds the mask pictures themselves.

    A mask has read(), size() and a name, str(mask), as datasets.labels.Sample says.
    """
    path, options = _parse(source)
    if not options and not any(layout.fits(path) for layout in LAYOUTS if layout.name != "photographs"):
        return {stem: MaskFile(file) for stem, file in list_masks(path).items()}
    return {sample.stem: sample.mask for sample in read_ground_truth(source, report)}


def _parse(text):
    """PATH@OPTION,OPTION -> (Path, [options]); an @ in the name of what exists is no option."""
    name, _, options = str(text).rpartition("@")
    if not name or Path(text).expanduser().exists():
        name, options = text, ""
    return Path(name).expanduser(), [word for word in options.split(",") if word]


def _join(first, second, origin, name):
    known = [{key for key in ("classes", "count", "mask") if getattr(s, key) is not None} for s in (first, second)]
    if first.path.resolve() == second.path.resolve():
        for key in sorted(known[0] & known[1]):
            a, b = getattr(first, key), getattr(second, key)
            if a != b:
                raise InputError(
                    f"{origin} and {name} disagree on the {key} of {first.path} ({_known(key, a)} and "
                    f"{_known(key, b)}); take only @classes or @count from one of them"
                )
    elif not known[1]:
        raise Notice(f"{second.path} is left out, as {first.path} shares its name; rename one of them")
    elif not known[0] or known[0] & known[1]:
        raise InputError(
            f"{first.path} and {second.path} share a name; rename one of them, or take only @classes "
            "from one source and @count from the other if they are one photograph"
        )
    elif image_size(first.path) != image_size(second.path):
        raise InputError(f"{first.path} and {second.path} share a name but not a size; rename one of them")
    joined = replace(first, **{key: getattr(second, key) for key in known[1]})
    return replace(joined, others=second.others) if "classes" in known[1] else joined


def _known(key, value):
    return " ".join(VOC_CLASSES[index] for index in value) or "none" if key == "classes" else str(value)


def _images_of(folder):
    inside = Path(folder) / "images"
    return list_images(inside if inside.is_dir() else folder)


def _stems(path):
    return {image.stem for image in _images_of(path)} if _has_images(path) else set()


def _has_images(path):
    try:
        return bool(_images_of(path))
    except InputError:
        return False


def _holds_images(folder):
    """Whether photographs lie in the folder itself."""
    try:
        return bool(list_images(folder))
    except InputError:
        return False
