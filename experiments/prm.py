"""PRM, adapted to class-agnostic salient instances: a baseline of Table 1 (Zhou et al., CVPR 2018; Sec. 4.3).

    python -m experiments.prm --classifier runs/mine/cam/weights.pt --backbone resnet50 --size 512 --data data/val \\
        --out predictions.json

The peaks of a classifier's response are taken for instances. What each peak answers to in the photograph, its peak
response map, is the gradient of the response there; a pixel of the foreground belongs to the peak that answers to it
most. The classes are merged by their maximum, where the paper trains a layer, and no masks are proposed from outside.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from datasets.images import read_image
from datasets.masks import prediction_records
from datasets.sources import read_ground_truth
from datasets.transforms import resize, to_tensor
from models.backbones import BACKBONES
from models.classifier import Classifier
from models.fusion import FusionConfig, instance_masks
from train_branches import input_size
from utils import checkpoint, files
from utils.cli import InputError, Parser, integer, make_folder, path_of, run, select_device
from utils.progress import tqdm

PEAK, FOREGROUND = 0.5, 0.3  # shares of the highest response: of a peak [PRM], of the foreground [IRN]
BLUR = 2.0  # of a gradient, which is noise pixel by pixel, in pixels of the stride-4 grid


def find_peaks(response):
    """The local maxima of at least PEAK times the highest: response [h,w] >= 0 -> (y, x) int [n,2].

    Local is 3x3 [PRM] on small maps, and a third of the shorter side on larger ones, where an object has many such.
    """
    reach = max(1, min(response.shape) // 6)
    highest = F.max_pool2d(response[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0]
    return ((response == highest) & (response >= PEAK * response.max()) & (response > 0)).nonzero()


def peak_response_maps(classifier, image):
    """What each peak answers to.

    image: RGB [1,3,S,S] in 0..1. Returns (maps [n,S/4,S/4], one a peak, each a share of its own maximum; the merged
    response [S/4,S/4] in 0..1). n is 0 when no class responds at all.
    """
    image = image.clone().requires_grad_()
    maps = classifier.class_maps(image)[0]
    probability = maps.mean((1, 2)).sigmoid()
    response, of_class = (maps.relu() * probability[:, None, None]).max(0)
    found = []
    for y, x in find_peaks(response.detach()):
        gradient = torch.autograd.grad(maps[of_class[y, x], y, x], image, retain_graph=True)[0]
        coarse = F.avg_pool2d(gradient.abs().sum(1, keepdim=True), 4)[0, 0]
        found.append(ndimage.gaussian_filter(coarse.cpu().numpy(), BLUR))
    grid = tuple(side // 4 for side in image.shape[-2:])
    response = F.interpolate(response.detach()[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
    found = np.stack(found) if found else np.zeros((0, *grid), np.float32)
    peaks = found.max((1, 2), keepdims=True, initial=0).clip(1e-12)
    return torch.from_numpy(found / peaks), (response / response.max().clamp(min=1e-6)).cpu()


def find_instances(classifier, image, size, device):
    """uint8 RGB [H,W,3] -> (masks bool [n,H,W], scores float32 [n]), best first."""
    inputs = to_tensor(resize(image, size))[None].to(device)
    maps, response = peak_response_maps(classifier, inputs)
    owner = maps.argmax(0) if len(maps) else None
    foreground = response > FOREGROUND
    parts = [foreground & (owner == n) for n in range(len(maps))]
    soft = torch.stack(parts).float() if parts else maps.float()
    return instance_masks(soft, response, image.shape[:2], FusionConfig(mask_thresh=0.5))[:2]


def load_classifier(path, backbone, output_stride):
    """The Classifier in a run's cam/weights.pt, as it answers; InputError for weights of anything else."""
    classifier = Classifier(backbone, output_stride)
    saved = checkpoint.load(path)
    try:
        classifier.load_state_dict(saved["model"])
    except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        remedy = "give cam/weights.pt of a run, and the --backbone it was trained with"
        raise InputError(f"{path} does not hold a classifier with {backbone}; {remedy}") from error
    return classifier.eval().requires_grad_(False)


def get_args_parser():
    parser = Parser(prog="python -m experiments.prm", description=__doc__)
    parser.add_argument("--classifier", type=path_of, required=True, help="cam/weights.pt of a run")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50", help="that of the classifier")
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32), default=16)
    parser.add_argument("--size", type=input_size, default=512, help="input square, pixels")
    parser.add_argument("--data", required=True, metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument("--out", type=path_of, default=Path("predictions.json"), help="COCO result records")
    parser.add_argument("--gpu", type=integer(-1), default=0, help="CUDA device; -1 is the CPU")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = select_device(args.gpu)
    classifier = load_classifier(args.classifier, args.backbone, args.output_stride).to(device)
    make_folder(args.out.parent)
    records, problems = [], []
    for sample in tqdm(read_ground_truth(args.data, problems.append), "PRM", unit="img", mininterval=2):
        try:
            image = read_image(sample.path)
        except InputError as error:
            problems.append(error)
            continue
        records += prediction_records(sample.stem, *find_instances(classifier, image, args.size, device))
    files.save_json(records, args.out)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
