"""PRM adapted to class-agnostic salient instances: a baseline of Table 1 (Zhou et al., CVPR 2018; Sec. 4.3).

    python -m experiments.prm --classifier runs/mine/cam/weights.pt --backbone resnet50 --size 512 --data data/val \\
        --out predictions.json

Each peak of the class maps is an instance. Its peak response map is the gradient of the class map at the peak
with respect to the image; a foreground pixel is assigned to the peak with the largest response there. Differences: the
classes are merged by their maximum instead of a trained layer, and no external mask proposals are used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from datasets.images import read_image
from datasets.labels import collect_into
from datasets.masks import prediction_records
from datasets.sources import read_ground_truth
from datasets.transforms import resize, to_tensor
from engine.config import LIMITS
from engine.presets import PAPER
from models.backbones import BACKBONES
from models.classifier import Classifier
from models.fusion import instance_masks
from models.fusion_config import FusionConfig
from utils import checkpoint, files
from utils.cli import InputError, Parser, add_gpu_option, make_folder, path_of, select_device
from utils.progress import tqdm
from utils.script import report_problems, run

PEAK_THRESH, FOREGROUND_THRESH = 0.5, 0.3  # fractions of the maximal response: of a peak [PRM], of the foreground [IRN]
BLUR = 2.0  # standard deviation of the smoothing of the noisy gradients, pixels of the stride-4 grid


def find_peaks(response: Tensor) -> Tensor:
    """Local maxima of a response [h,w] >= 0 of at least PEAK_THRESH times its maximum: (y, x) int64 [n,2].

    The window is 3x3 [PRM] on small maps and a third of the shorter side on larger ones, where an object has many 3x3
    maxima.
    """
    reach = max(1, min(response.shape) // 6)
    highest = F.max_pool2d(response[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0]
    return ((response == highest) & (response >= PEAK_THRESH * response.max()) & (response > 0)).nonzero()


def peak_response_maps(classifier: Classifier, image: Tensor) -> tuple[Tensor, Tensor]:
    """The peak response map of every peak.

    image: RGB [1,3,S,S] in 0..1. Returns (maps [n,S/4,S/4] in 0..1, each divided by its maximum; the response of all
    classes [S/4,S/4] in 0..1). n is 0 when no class map is positive anywhere.
    """
    image = image.clone().requires_grad_()
    class_maps = classifier.class_maps(image)[0]
    probability = class_maps.mean((1, 2)).sigmoid()
    response, winner = (class_maps.relu() * probability[:, None, None]).max(0)
    found = []
    for y, x in find_peaks(response.detach()):
        gradient = torch.autograd.grad(class_maps[winner[y, x], y, x], image, retain_graph=True)[0]
        coarse = F.avg_pool2d(gradient.abs().sum(1, keepdim=True), 4)[0, 0]
        found.append(ndimage.gaussian_filter(coarse.cpu().numpy(), BLUR))
    grid = (image.shape[-2] // 4, image.shape[-1] // 4)
    response = F.interpolate(response.detach()[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
    maps = np.stack(found) if found else np.zeros((0, *grid), np.float32)
    maxima = maps.max((1, 2), keepdims=True, initial=0).clip(1e-12)
    return torch.from_numpy(maps / maxima), (response / response.max().clamp(min=1e-6)).cpu()


def find_instances(
    classifier: Classifier, image: np.ndarray, size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The instances of a photograph uint8 RGB [H,W,3] at an input square of ``size`` pixels.

    Returns (masks bool [n,H,W], scores float32 [n] in (0, 1]), by descending score.
    """
    inputs = to_tensor(resize(image, size))[None].to(device)
    maps, response = peak_response_maps(classifier, inputs)
    foreground = response > FOREGROUND_THRESH
    if len(maps):
        owner = maps.argmax(0)
        maps = torch.stack([foreground & (owner == index) for index in range(len(maps))]).float()
    masks, scores, _ = instance_masks(maps, response, image.shape[:2], FusionConfig(mask_thresh=0.5))
    return masks, scores


def predict_source(
    classifier: Classifier, source: str, size: int, device: torch.device
) -> tuple[list[dict[str, Any]], list[InputError]]:
    """The instances of all photographs with a mask in ``source`` (PATH[@SPLIT]) as COCO result records, and an
    InputError for each photograph that cannot be read."""
    records: list[dict[str, Any]] = []
    problems: list[InputError] = []
    for sample in tqdm(read_ground_truth(source, collect_into(problems)), "PRM", unit="img", mininterval=2):
        try:
            image = read_image(sample.path)
        except InputError as error:
            problems.append(error)
            continue
        records += prediction_records(sample.stem, *find_instances(classifier, image, size, device))
    return records, problems


def load_classifier(path: Path, backbone: str, output_stride: int) -> Classifier:
    """The Classifier in a run's cam/weights.pt, in evaluation mode; InputError for weights of anything else."""
    classifier = Classifier(backbone, output_stride)
    saved = checkpoint.load(path)
    try:
        classifier.load_state_dict(saved["model"])
    except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        remedy = "give cam/weights.pt of a run, and the --backbone it was trained with"
        raise InputError(f"{path} does not hold a classifier with {backbone}; {remedy}") from error
    return classifier.eval().requires_grad_(False)


def get_args_parser() -> Parser:
    default = PAPER.cam
    parser = Parser(prog="python -m experiments.prm", description=__doc__)
    parser.add_argument("--classifier", type=path_of, required=True, help="cam/weights.pt of a run")
    parser.add_argument("--backbone", choices=BACKBONES, default=default.backbone, help="of the classifier")
    parser.add_argument(
        "--output-stride", type=int, choices=(8, 16, 32), default=default.output_stride, help="of the classifier"
    )
    parser.add_argument("--size", type=LIMITS["size"], default=default.size, help="input square, pixels")
    parser.add_argument("--data", required=True, metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument("--out", type=path_of, default=Path("predictions.json"), help="COCO result records")
    add_gpu_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    device = select_device(args.gpu)
    classifier = load_classifier(args.classifier, args.backbone, args.output_stride).to(device)
    make_folder(args.out.parent)
    records, problems = predict_source(classifier, args.data, args.size, device)
    files.save_json(records, args.out)
    return report_problems(problems)


if __name__ == "__main__":
    run(main)
