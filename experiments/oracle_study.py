"""Where instances are lost: the network's answers replaced by the truth, one after another.

    python -m experiments.oracle_study --data data/val --gpu -1
    python -m experiments.oracle_study --weights runs/mine/weights_pts.pt --data data/val

A row that gains much names a stage that limits. S is the saliency, B the boundary, V the offsets, T the number of
objects; what is missing with all four true is the fusion's and the grid's.
"""

import sys

import cv2
import numpy as np
import torch
from scipy import ndimage

from datasets.images import read_image
from datasets.masks import VOID
from datasets.sources import read_ground_truth
from engine.metrics import match_instances, summarize
from engine.predictions import check_size
from engine.report import format_table
from infer import Predictor
from models.count_head import one_hot_count
from utils.cli import InputError, Parser, integer, path_of, run, select_device
from utils.progress import tqdm

TRUE = ("T", "V", "B", "S", "VT", "BVT", "ST", "SBT", "SBVT")
ROWS = {"as it is": ""} | {f"{', '.join(true)} true": true for true in TRUE}


def true_saliency(gt):
    """uint8 [H,W] instance mask -> bool [H,W], where an instance is; void counts as background."""
    return (gt > 0) & (gt != VOID)


def true_maps(gt, grid):
    """uint8 [H,W] instance mask -> S [h,w], the share of each cell that is salient; B [h,w], 1 on the contours between
    instances and around them; V [2,h,w], from each cell to the centre of the instance nearest to it; T, the number of
    instances. Void counts as background."""
    height, width = grid
    salient = true_saliency(gt)
    coarse = cv2.resize(np.where(salient, gt, 0), (width, height), interpolation=cv2.INTER_NEAREST)
    contour = np.zeros(grid, np.float32)
    contour[:, 1:] += coarse[:, 1:] != coarse[:, :-1]
    contour[1:] += coarse[1:] != coarse[:-1]
    share = cv2.resize(salient.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    nearest = ndimage.distance_transform_edt(coarse == 0, return_distances=False, return_indices=True)
    owner, place = coarse[tuple(nearest)], np.indices(grid, np.float32)
    offsets = np.zeros_like(place)
    for number in np.unique(coarse[coarse > 0]):
        here, centre = owner == number, np.argwhere(coarse == number).mean(0)
        offsets[:, here] = centre[:, None] - place[:, here]
    return share, contour.clip(0, 1), offsets, len(np.unique(gt[salient]))


def with_truth(maps, gt, replaced):
    """Maps of one photograph in which those named in ``replaced``, of "SBVT", are true."""
    *values, count = true_maps(gt, maps.saliency.shape)
    true = dict(zip("SBVT", zip(("saliency", "boundary", "offsets", "shares"), (*values, one_hot_count(count)))))
    return maps._replace(**{true[k][0]: torch.as_tensor(true[k][1]).to(maps.saliency) for k in replaced})


def get_args_parser():
    parser = Parser(prog="python -m experiments.oracle_study", description=__doc__)
    parser.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    parser.add_argument("--data", default="data/val", metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument("--gpu", type=integer(-1), default=0, help="CUDA device; -1 is the CPU")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    predictor = Predictor(args.weights, select_device(args.gpu))
    results, problems = {row: [] for row in ROWS}, []
    for sample in tqdm(read_ground_truth(args.data, problems.append), "stages", unit="img", mininterval=2):
        try:
            image, gt = read_image(sample.path), sample.mask.read()
            check_size(sample.path, image.shape, gt.shape)
        except InputError as error:
            problems.append(error)
            continue
        (maps,) = predictor.network([predictor.prepare(image)])
        for row, replaced in ROWS.items():
            found = predictor.instances(with_truth(maps, gt, replaced), gt.shape)
            results[row].append(match_instances(found.masks, found.scores, gt))
    if not results["as it is"]:
        raise InputError(f"none of {len(problems)} photographs can be measured; the first: {problems[0]}")
    print(format_table({row: summarize(result) for row, result in results.items()}))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
