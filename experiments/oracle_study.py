"""Oracle study: the network's outputs are replaced by the ground truth, one after another.

    python -m experiments.oracle_study --data data/val --gpu -1
    python -m experiments.oracle_study --weights weights/wsid_net.pt --data data/val --fusion grouping=count

The row that gains most names the part that limits the method. Of a WSID-Net, S is the saliency, B the boundary, V the
offsets, T the number of objects, which scales the scores and, with grouping=count, is the number of instances. What is
missing when all four are true is lost by the fusion and by the resolution of the stride-4 grid.

Of a student network, "count" is the given number of objects, as with ``infer.py --count``; with true "scores" the
confidence of every hypothesis is its highest IoU with an instance, 0 where that is below 0.5; with true "masks" the
mask of a hypothesis with an IoU of at least 0.5 is that of the instance. What is missing when all three are true are
the instances with which no hypothesis has such an IoU.
"""

from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from scipy import ndimage

from datasets.images import read_image
from datasets.labels import collect_into
from datasets.masks import VOID
from datasets.sources import read_ground_truth
from engine.metrics import IOU_THRESHOLDS, ImageResult, mask_ious, match_instances, summarize
from engine.post_processing import Maps, Prediction, to_arrays
from engine.predictions import check_size
from engine.predictor import Predictor
from engine.report import format_table
from models.count_head import one_hot_count
from models.detections import Detections, ranked
from utils.cli import InputError, Parser, add_gpu_option, path_of, select_device
from utils.progress import tqdm
from utils.script import report_problems, run

BASELINE = "predicted"
REPLACED = ("T", "V", "B", "S", "VT", "BVT", "ST", "SBT", "SBVT")
REPLACED_STUDENT = (
    ("count",),
    ("masks",),
    ("masks", "count"),
    ("scores",),
    ("scores", "count"),
    ("masks", "scores", "count"),
)
FIELDS = {"S": "saliency", "B": "boundary", "V": "offsets", "T": "count_probs"}


def true_saliency(gt: np.ndarray) -> np.ndarray:
    """Instance mask uint8 [H,W] (0 background, 255 void) -> bool [H,W], True on instances; void is background."""
    return (gt > 0) & (gt != VOID)


def true_maps(gt: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The network's outputs as the ground truth has them, on the stride-4 grid.

    gt: instance mask uint8 [H,W], 0 background, 1..254 instances, 255 void, which counts as background. grid: (h, w).
    Returns S [h,w], the fraction of each cell on instances; B [h,w], 1 on the contours of instances, else 0; V [2,h,w],
    the offset (dy, dx) of each cell to the centre of the instance nearest to it, in pixels of the grid; and the number
    of instances.
    """
    height, width = grid
    salient = true_saliency(gt)
    coarse = cv2.resize(np.where(salient, gt, 0), (width, height), interpolation=cv2.INTER_NEAREST)
    contour = np.zeros(grid, np.float32)
    contour[:, 1:] += coarse[:, 1:] != coarse[:, :-1]
    contour[1:] += coarse[1:] != coarse[:-1]
    saliency = cv2.resize(salient.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    nearest = ndimage.distance_transform_edt(coarse == 0, return_distances=False, return_indices=True)
    owner, position = coarse[tuple(nearest)], np.indices(grid, np.float32)
    offsets = np.zeros_like(position)
    for number in np.unique(coarse[coarse > 0]):
        owned, centre = owner == number, np.argwhere(coarse == number).mean(0)
        offsets[:, owned] = centre[:, None] - position[:, owned]
    return saliency, contour.clip(0, 1), offsets, len(np.unique(gt[salient]))


def with_truth(maps: Maps, gt: np.ndarray, replaced: str) -> Maps:
    """The Maps of one photograph with the outputs named in ``replaced`` (letters of "SBVT") taken from its instance
    mask ``gt``, uint8 [H,W]."""
    height, width = maps.saliency.shape
    *values, count = true_maps(gt, (height, width))
    true = dict(zip("SBVT", (*values, one_hot_count(count)), strict=True))
    return maps._replace(**{FIELDS[name]: torch.as_tensor(true[name]).to(maps.saliency) for name in replaced})


def hypotheses_with_truth(
    found: Detections, ious: np.ndarray, gt: np.ndarray, replaced: Sequence[str], side: int
) -> Detections:
    """The hypotheses of one photograph with their "scores" or "masks", where ``replaced`` names them, from the truth.

    ious: [n,g], of the n hypotheses with the g instances of ``gt``, uint8 [H,W], in the order of their labels.
    side: of the input square of the network.
    """
    best, owner = ious.max(1, initial=0), np.unique(gt[true_saliency(gt)])[ious.argmax(1)]
    fits = best >= IOU_THRESHOLDS[0]
    if "masks" in replaced:
        boxes, masks = found.boxes.copy(), found.masks.copy()
        for index in np.flatnonzero(fits):
            boxes[index], masks[index] = true_hypothesis(gt == owner[index], side, masks.shape[1])
        # Those that fit nothing fit nothing before they are refined, and the true ones are aligned.
        found, best = found._replace(boxes=boxes, masks=masks, image=None), fits.astype(np.float32)
    if "scores" in replaced:
        found = found._replace(scores=np.where(fits, best, 0).astype(np.float32))
    return found


def true_hypothesis(mask: np.ndarray, side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """An instance, bool [H,W], as a network of ``side`` pixels describes it: its box, float32 [4], (x0, y0, x1, y1) in
    pixels of the input square, the last ones included, and its mask there, float32 [cells,cells] in 0..1."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    inside = mask[top : top + height, left : left + width].astype(np.float32)
    corners = np.array([left, top, left + width - 1, top + height - 1], np.float32)
    box = corners / np.array([*mask.shape[::-1]] * 2, np.float32) * side
    return box, cv2.resize(inside, (cells, cells), interpolation=cv2.INTER_AREA)


def study(predictor: Predictor, image: np.ndarray, gt: np.ndarray) -> dict[str, ImageResult]:
    """The result of one photograph with each of the replacements, {row of the table: result}.

    image: uint8 RGB [H,W,3]; gt: uint8 [H,W] with at least one instance.
    """
    (output,) = predictor.network([predictor.prepare(image)])
    found: dict[Sequence[str], Prediction]
    if isinstance(output, Maps):
        found = {names: predictor.instances(with_truth(output, gt, names), gt.shape) for names in ("", *REPLACED)}
    else:
        output = to_arrays(output)
        side = predictor.net.config.size
        ious, _ = mask_ious(ranked(output, side, gt.shape).masks, gt)
        count = ious.shape[1]
        found = {
            names: predictor.instances(
                hypotheses_with_truth(output, ious, gt, names, side), gt.shape, count=count * ("count" in names)
            )
            for names in ((), *REPLACED_STUDENT)
        }
    return {
        f"{', '.join(names)} true" if names else BASELINE: match_instances(instances.masks, instances.scores, gt)
        for names, instances in found.items()
    }


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m experiments.oracle_study", description=__doc__)
    parser.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    parser.add_argument("--data", default="data/val", metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument("--fusion", nargs="+", default=[], metavar="NAME=VALUE", help="as for infer.py")
    add_gpu_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    predictor = Predictor(args.weights, select_device(args.gpu), settings=args.fusion)
    results: dict[str, list[ImageResult]] = defaultdict(list)
    problems: list[InputError] = []
    samples = read_ground_truth(args.data, collect_into(problems))
    for sample in tqdm(samples, "oracle study", unit="img", mininterval=2):
        assert sample.mask
        try:
            image, gt = read_image(sample.path), sample.mask.read()
            check_size(sample.path, image.shape, gt.shape)
        except InputError as error:
            problems.append(error)
            continue
        for row, result in study(predictor, image, gt).items():
            results[row].append(result)
    if not results:
        raise InputError(f"none of {len(problems)} photographs can be measured; the first: {problems[0]}")
    print(format_table({row: summarize(result) for row, result in results.items()}))
    return report_problems(problems)


if __name__ == "__main__":
    run(main)
