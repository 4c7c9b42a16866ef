"""Image-level labels: the classes in a photograph and the number of its salient instances, the paper's supervision."""

import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from utils import distributed
from utils.cli import InputError

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor".split()
)
CLASS_INDEX = {name: index for index, name in enumerate(VOC_CLASSES)}
COCO_NAMES = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"}
IGNORE = 255  # in class and instance label maps: unknown
MAX_OBJECTS = 250  # per image: instance labels have 8 bits, of which 0 is background and 255 unknown
MIN_AREA = 0.02  # fraction of the image that an annotated object covers at least to count as salient [ours]

Only = Literal["classes", "count"] | None  # the label that is read when the other does not matter
Report = Callable[[InputError], object]  # receives the problem of a single photograph
Entry = TypeVar("Entry")
Where = TypeVar("Where", bound=Hashable)


class Mask(Protocol):
    """The ground-truth instances of a photograph; str(mask) names them in messages."""

    def read(self) -> np.ndarray:
        """uint8 [H,W]: 0 background, 1..254 instances, 255 void; InputError when they cannot be read."""
        ...

    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        ...


@dataclass(frozen=True)
class Sample:
    """One photograph and its labels; None stands for an unknown label.

    path: the image file; classes: sorted indices 0..19 into VOC_CLASSES, without repetition, () when none of them is
    there; count: number of salient instances, 0 to MAX_OBJECTS (the subitizing label T of the paper, Sec. 3); mask: the
    ground-truth instances, for evaluation; others: the names of annotated objects of other classes; name: the stem,
    where it differs from that of the file.
    """

    path: Path
    classes: tuple[int, ...] | None = None
    count: int | None = None
    mask: Mask | None = None
    others: tuple[str, ...] = ()
    name: str = ""

    @property
    def stem(self) -> str:
        """The image_id under which results are written: ``name``, else the file name without its suffix."""
        return self.name or self.path.stem


class LabelWarning(InputError):
    """Labels that are not used; the photographs are read all the same."""


def raise_or_warn(error: InputError) -> None:
    """The default ``report`` of all readers: raises an InputError, prints a LabelWarning to stderr.

    ``collect_into`` makes one that collects the errors instead.
    """
    if not isinstance(error, LabelWarning):
        raise error
    if distributed.is_main():
        print(f"warning: {error}", file=sys.stderr)


def collect_into(problems: list[InputError]) -> Report:
    """A ``report`` that appends every InputError to ``problems``, and prints a LabelWarning to stderr."""
    return lambda error: raise_or_warn(error) if isinstance(error, LabelWarning) else problems.append(error)


def collect_samples(
    entries: Iterable[tuple[Where, Entry]], read: Callable[[Where, Entry], Sample], report: Report
) -> list[Sample]:
    """The Samples ``read(where, entry)`` of all (where, entry), in order; ``where`` names the entry in messages.

    ``report`` gets the InputErrors of ``read``, and one for a count above MAX_OBJECTS and for a stem that occurs twice
    (results are stored under the stem). When it returns, the entry is left out.
    """
    samples: list[Sample] = []
    first: dict[str, Where] = {}
    for where, entry in entries:
        try:
            sample = read(where, entry)
            if (sample.count or 0) > MAX_OBJECTS:
                raise InputError(
                    f"{where} has the count {sample.count}; at most {MAX_OBJECTS} objects can be distinguished, "
                    "so correct it or leave the photograph out"
                )
            if sample.stem in first:
                raise InputError(
                    f"{where} repeats the name {sample.stem} of {first[sample.stem]}; rename or remove one"
                )
        except InputError as error:
            report(error)
            continue
        first[sample.stem] = where
        samples.append(sample)
    return samples


def class_index(name: str) -> int | None:
    """The index 0..19 of a class by its VOC or COCO name, ignoring case, blanks, _ and -; None for other names."""
    name = "".join(filter(str.isalnum, name.lower()))
    return CLASS_INDEX.get(COCO_NAMES.get(name, name))


def split_class_names(names: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(sorted indices 0..19 of the VOC classes, sorted other names) among the names of a photograph's objects."""
    indices = {name: class_index(name) for name in names}
    return (
        tuple(sorted({index for index in indices.values() if index is not None})),
        tuple(sorted(name for name, index in indices.items() if index is None)),
    )
