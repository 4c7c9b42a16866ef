"""Say what is understood of a data folder, and what is wrong with it.

    python -m datasets.check my_data
    python -m datasets.check VOCdevkit@trainval,classes my_counts --quick

Reads every photograph and mask. Prints the layout, the number of images, how many show each class (others: objects of
none of the 20) and each count, how many have ground-truth masks, and every problem by the name of its file. The exit
code is 0 when all is well, 1 with problems, 2 when nothing can be read. Several sources are also checked against each
other, as --data of the training scripts merges them.
"""

import argparse
from collections import Counter

from tqdm import tqdm

from datasets.ilso import count_instances
from datasets.images import image_size, read_image
from datasets.labels import VOC_CLASSES
from datasets.masks import MaskFile
from datasets.sources import find_source, merge, read_source
from utils.cli import InputError, Parser, run


def get_args_parser():
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="DIR", help="what --data takes: PATH or PATH@OPTION[,OPTION]")
    parser.add_argument("--quick", action="store_true", help="read headers of pictures only: not all damage is seen")
    parser.add_argument("--deep", action="store_true", help=argparse.SUPPRESS)  # the default, once to be asked for
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    samples, problems = {}, []
    for source in args.sources:
        try:
            title, samples[source], found = check(source, not args.quick)
        except InputError as error:
            title, found = "cannot be read", [error]
        print(f"{source}: {title}")
        print(*describe(samples.get(source, []), found), sep="\n")
        problems += found
    if len(samples) > 1:
        conflicts = []
        merged = merge(samples, conflicts.append)
        print("all together:")
        print(*describe(merged, conflicts), sep="\n")
        problems += conflicts
    if not any(samples.values()):
        return 2
    return 1 if problems else 0


def check(source, deep=True):
    """(name of the layout, list of the readable Samples, list of problems as InputErrors) of a source.

    InputError when the source as a whole cannot be read. Unless ``deep``, pictures are opened for their headers only,
    save masks that counts come from.
    """
    problems = []
    found = find_source(source)
    sound = []
    for sample in tqdm(read_source(found, problems.append), "check", unit="img", leave=False, disable=None):
        try:
            _inspect(sample, deep)
            sound.append(sample)
        except InputError as error:
            problems.append(error)
    return found.layout.name, sound, problems


def describe(samples, problems):
    """The lines that say what ``samples`` hold, and one for each problem."""
    if samples:
        classes = Counter(VOC_CLASSES[index] for sample in samples for index in sample.classes or ())
        unknown = [("not known", number)] if (number := sum(sample.classes is None for sample in samples)) else []
        others = Counter(name for sample in samples for name in sample.others)
        counts = Counter("not known" if sample.count is None else sample.count for sample in samples)
        yield f"  images   {len(samples)}"
        yield f"  classes  {_tally(classes.most_common() + unknown)}"
        if others:
            yield f"  others   {_tally(others.most_common())}"
        yield f"  counts   {_tally(sorted(counts.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))}"
        yield f"  masks    {sum(sample.mask is not None for sample in samples)}"
    yield f"  problems {len(problems)}"
    yield from (f"    {problem}" for problem in problems)


def _inspect(sample, deep):
    """InputError when the photograph or its mask is unreadable, the mask all void, or the two differ in size."""
    size = read_image(sample.path).shape[:2] if deep else image_size(sample.path)
    if sample.mask is None:
        return
    mask = sample.mask.read().shape if deep else sample.mask.size()
    if deep and isinstance(sample.mask, MaskFile):  # 0 and 255 are no instances; COCO may have nothing but crowds
        count_instances(sample.path, sample)
    if mask != size:
        raise InputError(
            f"{sample.path} is {size[0]} x {size[1]} but its mask {sample.mask} {mask[0]} x {mask[1]}; make them equal"
        )


def _tally(pairs):
    return ", ".join(f"{name}: {number}" for name, number in pairs) or "none"


if __name__ == "__main__":
    run(main)
