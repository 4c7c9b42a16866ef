"""How many objects a network finds, by their class, size and number.

    python -m experiments.limits --data data/val data/val2
    python -m experiments.limits --data data/val --weights runs/mine/weights.pt --gpu -1

Each row is a group of objects: those in photographs of one class alone (of several: "several classes"), of one part of
the photograph's area, of photographs with so many objects. Recall is the percentage of them that a disjoint instance
overlaps with an IoU of at least 0.5 or 0.7; of groups by photograph also the percentage with the right number.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from datasets.images import read_image
from datasets.labels import VOC_CLASSES, Sample, collect_into
from datasets.masks import VOID, areas_of
from datasets.sources import read_ground_truth, read_source
from engine.metrics import mask_ious
from engine.predictions import check_size
from engine.predictor import Predictor
from utils.cli import InputError, Parser, add_gpu_option, path_of, select_device
from utils.progress import tqdm
from utils.script import report_problems, run

# Of the photograph's area, and of the number of its objects: upper limits, the last of which is reached.
AREAS = ((0.02, "below 2 %"), (0.05, "2 to 5 %"), (0.15, "5 to 15 %"), (0.4, "15 to 40 %"), (1.0, "40 % and more"))
NUMBERS = ((1, "1"), (2, "2"), (3, "3"), (5, "4 or 5"), (VOID, "6 and more"))
MIN_INSTANCES = 10  # of a class that gets a row


@dataclass
class Group:
    """best: the highest IoU with an instance found, of every object of the group. exact: of every photograph, whether
    as many instances were found as there are."""

    best: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)

    def row(self) -> list[str]:
        """Cells of the table: objects, recall at 0.5 and 0.7, photographs, right number."""
        best = np.array(self.best)
        recalls = [f"{100 * (best >= iou).mean():.1f}" for iou in (0.5, 0.7)]
        photographs = [str(len(self.exact)), f"{100 * np.mean(self.exact):.1f}"] if self.exact else ["-", "-"]
        return [str(len(best)), *recalls, *photographs]


def read_classes(source: str) -> dict[str, list[str]]:
    """{stem: names of its classes} of the photographs of a source, where it says them."""
    samples = read_source(source, lambda _: None)
    return {sample.stem: [VOC_CLASSES[index] for index in sample.classes or ()] for sample in samples}


def measure(sample: Sample, classes: Sequence[str], predictor: Predictor, groups: dict[tuple[str, str], Group]) -> None:
    """Add the objects of a photograph with these ``classes`` to ``groups``, {(kind, name): Group}; InputError where it
    cannot be read."""
    assert sample.mask
    image, gt = read_image(sample.path), sample.mask.read()
    check_size(sample.path, image.shape, gt.shape)
    masks = predictor.predict(image).masks
    areas = areas_of(gt)[1:VOID]
    areas = areas[areas > 0]
    if not len(areas):
        return
    ious, counts = mask_ious(masks, gt)
    best = ious[counts].max(0, initial=0)
    exact = bool(counts.sum() == len(areas))
    name = classes[0] if len(classes) == 1 else "several classes" if classes else "no class"
    for key in (("class", name), ("objects", _limit(len(areas), NUMBERS)), ("all", "")):
        groups[key].best += best.tolist()
        groups[key].exact.append(exact)
    for area, iou in zip(areas / gt.size, best, strict=True):
        groups["area", _limit(area, AREAS)].best.append(float(iou))


def _limit(value: float, limits: Sequence[tuple[float, str]]) -> str:
    return next(name for limit, name in limits if value <= limit)


def format_groups(groups: dict[tuple[str, str], Group]) -> str:
    """The groups as a Markdown table; of classes those with at least MIN_INSTANCES objects."""

    def rows() -> Iterable[list[str]]:
        order = {name: place for limits in (AREAS, NUMBERS) for place, (_, name) in enumerate(limits)}
        kinds = ("all", "area", "objects", "class")
        for (kind, name), group in sorted(groups.items(), key=lambda i: (kinds.index(i[0][0]), order.get(i[0][1], 99))):
            if kind != "class" or len(group.best) >= MIN_INSTANCES:
                yield [f"{kind} {name}".strip(), *group.row()]

    head = ["group", "objects", "recall 0.5", "recall 0.7", "photographs", "right number"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * 5], *rows()))


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m experiments.limits", description=__doc__)
    parser.add_argument("--data", nargs="+", default=["data/val"], metavar="PATH[@SPLIT]", help="with instance masks")
    parser.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    add_gpu_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    predictor = Predictor(args.weights, select_device(args.gpu))
    groups: dict[tuple[str, str], Group] = defaultdict(Group)
    problems: list[InputError] = []
    samples = [
        (sample, classes.get(sample.stem, ()))
        for source in args.data
        for classes in [read_classes(source)]
        for sample in read_ground_truth(source, collect_into(problems))
    ]
    for sample, classes in tqdm(samples, "limits", unit="img", mininterval=2):
        try:
            measure(sample, classes, predictor, groups)
        except InputError as error:
            problems.append(error)
    if not groups:
        raise InputError(f"none of {len(problems)} photographs can be measured; the first: {problems[0]}")
    print(format_groups(groups))
    return report_problems(problems)


if __name__ == "__main__":
    run(main)
