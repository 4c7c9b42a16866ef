"""Oracle study: the network's outputs are replaced by the ground truth, one after another.

    python -m experiments.oracle_study --data data/val --gpu -1
    python -m experiments.oracle_study --weights runs/mine/weights.pt --data data/val --fusion grouping=count

The row that gains most names the part that limits the method. S is the saliency, B the boundary, V the offsets, T the
number of objects, which scales the scores and, with grouping=count, is the number of instances. What is missing when
all four are true is lost by the fusion and by the resolution of the stride-4 grid.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from scipy import ndimage

from datasets.images import read_image
from datasets.labels import collect_into
from datasets.masks import VOID
from datasets.sources import read_ground_truth
from engine.metrics import ImageResult, match_instances, summarize
from engine.post_processing import Maps
from engine.predictions import check_size
from engine.predictor import BUNDLED_WSID_NET, Predictor, default_weights
from engine.report import format_table
from models.count_head import one_hot_count
from models.wsid_net import WSIDNet
from utils.cli import InputError, Parser, add_gpu_option, path_of, select_device
from utils.progress import tqdm
from utils.script import report_problems, run

BASELINE = "predicted"
REPLACED = ("T", "V", "B", "S", "VT", "BVT", "ST", "SBT", "SBVT")
ROWS = {BASELINE: ""} | {f"{', '.join(names)} true": names for names in REPLACED}
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


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m experiments.oracle_study", description=__doc__)
    parser.add_argument(
        "--weights", type=path_of, help="of a WSID-Net; default: those of runs/default, else the bundled ones"
    )
    parser.add_argument("--data", default="data/val", metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument("--fusion", nargs="+", default=[], metavar="NAME=VALUE", help="as for infer.py")
    add_gpu_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    weights = args.weights or default_weights(BUNDLED_WSID_NET)
    predictor = Predictor(weights, select_device(args.gpu), settings=args.fusion)
    if not isinstance(predictor.net, WSIDNet):
        raise InputError(f"{predictor.weights} holds a student network, without S, B and V; name those of a WSID-Net")
    results: dict[str, list[ImageResult]] = {row: [] for row in ROWS}
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
        (maps,) = predictor.network([predictor.prepare(image)])
        assert isinstance(maps, Maps)
        for row, replaced in ROWS.items():
            found = predictor.instances(with_truth(maps, gt, replaced), gt.shape)
            results[row].append(match_instances(found.masks, found.scores, gt))
    if not results[BASELINE]:
        raise InputError(f"none of {len(problems)} photographs can be measured; the first: {problems[0]}")
    print(format_table({row: summarize(result) for row, result in results.items()}))
    return report_problems(problems)


if __name__ == "__main__":
    run(main)
