"""Find the salient instances of photographs.

    python infer.py --img x.jpg                       # one photograph; the bundled weights unless you trained your own
    python infer.py --img "photos/*.jpg" --visualize  # a glob or a folder; also S, B and V as pictures
    python infer.py --img photos --weights runs/mine/weights_pts.pt --out results

For every photograph <stem>_instances.png (0 background, 1..N in order of score) and <stem>_overlay.png are
written at its own size, and predictions.json holds all instances as COCO result records.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.images import list_images, read_image
from datasets.masks import prediction_records, read_saliency_mask
from datasets.training import resize
from models.enhancement import network_input
from models.fusion import Fusion, connected_components, fuse, instance_masks
from models.wsid_net import load_weights
from utils import checkpoint, visualize
from utils.cli import Help, InputError, make_folder, run, select_device

ROOT = Path(__file__).resolve().parent
DEFAULT_WEIGHTS = (
    Path("runs/default/weights_pts.pt"),
    Path("runs/default/weights.pt"),
    ROOT / "weights" / "wsid_mobilenetv2_256.pt",
)


def default_weights():
    """The weights used when none are named: those of runs/default, else the bundled ones."""
    for path in DEFAULT_WEIGHTS:
        if path.exists():
            return path
    raise InputError(f"there are no weights at {DEFAULT_WEIGHTS[-1]}; train a run or name a file with --weights")


@dataclass
class Prediction:
    """The salient instances of one photograph, best first.

    masks: bool [n,H,W] at the photograph's size, disjoint. scores: float32 [n] in (0, 1].
    centroids: float [n,2], (y, x) in the photograph's pixels. saliency, boundary: float32 [H,W] in 0..1.
    offsets: float32 [2,h,w], (dy, dx) in pixels of the network's stride-4 grid.
    """

    masks: np.ndarray
    scores: np.ndarray
    centroids: np.ndarray
    saliency: np.ndarray
    boundary: np.ndarray
    offsets: np.ndarray


class Predictor:
    """Trained weights, ready to be asked.

    weights: a file of train_branches.py or train_pts.py; None takes those of runs/default, else the bundled ones.
    method: "wsid", the fusion of the paper, or "components", the connected components of S: the baseline.
    settings: a models.fusion.Fusion. Raises InputError when the weights cannot be used.
    """

    def __init__(self, weights=None, device="cpu", *, method="wsid", settings=None):
        self.weights = Path(weights) if weights else default_weights()
        self.device, self.method, self.settings = device, method, settings or Fusion()
        self.net = load_weights(self.weights, device)

    @torch.no_grad()
    def predict(self, image, saliency=None):
        """image: uint8 RGB [H,W,3], any size; saliency: float [H,W] in 0..1 in place of S (Table 6), or None.

        Returns a Prediction; one without instances is a valid answer.
        """
        size = self.net.config.size
        square = resize(image, size)
        inputs = network_input(square, self.net.config.canny, self.device)
        s, b, v = (m[0].float() for m in self.net(*inputs))
        if saliency is not None:
            grid = torch.from_numpy(np.ascontiguousarray(saliency, np.float32))[None, None].to(self.device)
            s = F.interpolate(grid, s.shape, mode="bilinear", align_corners=False, antialias=True)[0, 0].clamp(0, 1)
        if self.method == "components":
            maps, centroids = connected_components(s, self.settings)
        else:
            maps, centroids = fuse(s, b, v, self.settings)
        height, width = image.shape[:2]
        masks, scores, kept = instance_masks(maps, s, (height, width), self.settings)
        scale = np.array([height, width]) / s.shape

        def full(values):
            return cv2.resize(values.cpu().numpy(), (width, height), interpolation=cv2.INTER_LINEAR)

        return Prediction(
            masks, scores, (centroids[kept] + 0.5) * scale - 0.5, np.clip(full(s), 0, 1), full(b), v.cpu().numpy()
        )


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--img", required=True, help="a photograph, a folder of them, or a glob")
    parser.add_argument("--out", type=Path, default=Path("output"), help="folder for the results")
    parser.add_argument("--weights", type=Path, help="default: those of runs/default, else the bundled ones")
    parser.add_argument("--gpu", type=int, default=-1, help="CUDA device; -1 is the CPU")
    parser.add_argument("--saliency-dir", type=Path, help="<stem>.png maps that replace the saliency branch (Table 6)")
    parser.add_argument("--method", choices=("wsid", "components"), default="wsid",
                        help="the paper's fusion, or the connected components of S")  # fmt: skip
    parser.add_argument("--visualize", action="store_true", help="also write S, B and V as pictures")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = select_device(args.gpu)
    paths = list_images(args.img)
    unique_stems(paths)
    predictor = Predictor(args.weights, device, method=args.method)
    make_folder(args.out)
    print(f"weights: {predictor.weights}")
    records, written, failed = [], [], []
    for path in tqdm(paths, disable=len(paths) < 2, mininterval=1):
        try:
            image = read_image(path)
            saliency = read_replacement(args.saliency_dir, path.stem) if args.saliency_dir else None
        except InputError as error:
            failed.append(error)
            continue
        prediction = predictor.predict(image, saliency)
        records += prediction_records(path.stem, prediction.masks, prediction.scores)
        written += write_pictures(args.out, path.stem, image, prediction, args.visualize)
    checkpoint.save_json(records, args.out / "predictions.json")
    for line in [*written, args.out / "predictions.json"]:
        print(line)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if failed and len(failed) == len(paths):
        return 2
    return 1 if failed else 0


def unique_stems(paths):
    """InputError when two photographs would write the same result files."""
    seen = {}
    for path in paths:
        if path.stem in seen:
            raise InputError(f"{path} and {seen[path.stem]} would write the same files; rename one or run them apart")
        seen[path.stem] = path


def read_replacement(folder, stem):
    path = folder / f"{stem}.png"
    if not path.exists():
        raise InputError(f"there is no saliency map {path}; --saliency-dir needs one <stem>.png per photograph")
    return read_saliency_mask(path)


def write_pictures(folder, stem, image, prediction, everything):
    """Write the pictures of one photograph and return their paths."""
    labels = np.zeros(image.shape[:2], np.uint8)
    for number, mask in enumerate(prediction.masks[:255], 1):
        labels[mask] = number
    pictures = {
        "instances": labels,
        "overlay": visualize.overlay(image, prediction.masks, prediction.scores, prediction.centroids),
    }
    if everything:
        height, width = image.shape[:2]
        wheel = cv2.resize(visualize.colour_wheel(prediction.offsets), (width, height), interpolation=cv2.INTER_CUBIC)
        pictures |= {
            "saliency": visualize.grey(prediction.saliency),
            "boundary": visualize.grey(prediction.boundary),
            "offsets": visualize.mark(wheel, prediction.centroids),
        }
    paths = []
    for kind, picture in pictures.items():
        paths.append(folder / f"{stem}_{kind}.png")
        checkpoint.save_png(picture, paths[-1])
    return paths


if __name__ == "__main__":
    run(main)
