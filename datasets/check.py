"""Print what is read from a data folder, and its problems.

    python -m datasets.check my_data
    python -m datasets.check VOCdevkit@trainval,classes my_counts --quick

Reads every photograph and mask. Prints the layout, the number of images, the number of images with each class (others:
objects of other classes than VOC's 20) and with each count, the number of ground-truth masks, and each problem with the
name of its file. The exit code is 0 without problems, 1 with problems, 2 when nothing can be read. Several sources are
also merged, as by --data of the training scripts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets.ilso import count_instances
from datasets.images import image_size, read_image
from datasets.labels import VOC_CLASSES, Sample
from datasets.masks import MaskFile
from datasets.sources import find_source, merge, read_source
from utils.cli import InputError, Parser
from utils.progress import tqdm
from utils.script import run


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="DIR", help="as for --data: PATH or PATH@OPTION[,OPTION]")
    parser.add_argument(
        "--quick", action="store_true", help="read the headers of pictures only, which does not find all damage"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    samples: dict[str, list[Sample]] = {}
    problems: list[InputError] = []
    for source in args.sources:
        try:
            title, samples[source], found = check(source, not args.quick)
        except InputError as error:
            title, found = "cannot be read", [error]
        print(f"{source}: {title}")
        print(*describe(samples.get(source, []), found), sep="\n")
        problems += found
    if len(samples) > 1:
        conflicts: list[InputError] = []
        merged = merge(samples, conflicts.append)
        print("all together:")
        print(*describe(merged, conflicts), sep="\n")
        problems += conflicts
    if not any(samples.values()):
        return 2
    return 1 if problems else 0


def check(source: str, read_pixels: bool = True) -> tuple[str, list[Sample], list[InputError]]:
    """(name of the layout, readable Samples, problems) of a source.

    read_pixels: False opens pictures for their headers only, except masks from which counts are read. Raises InputError
    when the source as a whole cannot be read.
    """
    problems: list[InputError] = []
    found = find_source(source)
    readable = []
    for sample in tqdm(read_source(found, problems.append), "check", unit="img", leave=False):
        try:
            _inspect(sample, read_pixels)
            readable.append(sample)
        except InputError as error:
            problems.append(error)
    return found.layout.name, readable, problems


def describe(samples: list[Sample], problems: list[InputError]) -> Iterator[str]:
    """Lines with the statistics of ``samples``, and one for each problem."""
    if samples:
        classes = Counter(VOC_CLASSES[index] for sample in samples for index in sample.classes or ())
        unknown = [("unknown", number)] if (number := sum(sample.classes is None for sample in samples)) else []
        others = Counter(name for sample in samples for name in sample.others)
        counts = Counter("unknown" if sample.count is None else sample.count for sample in samples)
        yield f"  images   {len(samples)}"
        yield f"  classes  {_tally(classes.most_common() + unknown)}"
        if others:
            yield f"  others   {_tally(others.most_common())}"
        by_count = sorted(counts.items(), key=lambda pair: (isinstance(pair[0], str), pair[0]))
        yield f"  counts   {_tally(by_count)}"
        yield f"  masks    {sum(sample.mask is not None for sample in samples)}"
    yield f"  problems {len(problems)}"
    yield from (f"    {problem}" for problem in problems)


def _inspect(sample: Sample, read_pixels: bool) -> None:
    """InputError when the photograph or its mask is unreadable, the mask only void, or the two differ in size."""
    size = read_image(sample.path).shape[:2] if read_pixels else image_size(sample.path)
    if sample.mask is None:
        return
    mask = sample.mask.read().shape if read_pixels else sample.mask.size()
    if read_pixels and isinstance(sample.mask, MaskFile):  # masks of COCO may have crowds only
        count_instances(sample.path, sample)
    if mask != size:
        raise InputError(
            f"{sample.path} is {size[0]} x {size[1]} but its mask {sample.mask} {mask[0]} x {mask[1]}; make them equal"
        )


def _tally(pairs: Iterable[tuple[Any, int]]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in pairs) or "none"


if __name__ == "__main__":
    run(main)
