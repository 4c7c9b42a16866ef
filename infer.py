"""Find the salient instances of photographs.

    python infer.py --img x.jpg                       # one photograph; the bundled weights unless you trained your own
    python infer.py --img "photos/*.jpg" --visualize  # a glob or a folder; also S, B and V as pictures
    python infer.py --img photos --weights runs/mine/weights_pts.pt --out results

For every photograph <stem>_instances.png (0 background, 1..N in order of score) and <stem>_overlay.png are
written at its own size, and predictions.json holds all instances as COCO result records. While the network runs on
one batch, the next photographs load and the instances of the previous ones are fused and written.
"""

import argparse
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.images import list_images, read_image
from datasets.masks import prediction_records, read_saliency_mask
from datasets.training import resize
from models.counting import certain, told
from models.enhancement import network_input
from models.fusion import Fusion, connected_components, fuse, guesses, instance_masks
from models.wsid_net import load_weights, mirrored
from ops import compiled
from utils import checkpoint, distributed, visualize
from utils.cli import Help, InputError, make_folder, run
from utils.parallel import map_ahead
from utils.predictions import coco_ids

ROOT = Path(__file__).resolve().parent
DEFAULT_WEIGHTS = (
    Path("runs/default/weights_pts.pt"),
    Path("runs/default/weights.pt"),
    ROOT / "weights" / "wsid_tf_efficientnet_lite2_512.pt",
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


class Maps(NamedTuple):
    """What the network says of one photograph, float32 on the stride-4 grid: S [h,w], B [h,w], V [2,h,w].

    shares: the probabilities of 1, 2, ... objects [M], all 0 when the network does not tell their number. features: f3
    [C_3,h/2,w/2], what its places look like; None lets B alone hold the walk. ready: the CUDA event after which they
    hold their values, None on the CPU.
    """

    saliency: torch.Tensor
    boundary: torch.Tensor
    offsets: torch.Tensor
    shares: torch.Tensor
    features: torch.Tensor | None = None
    ready: Any = None


def bfloat16_pays(device):
    """Whether convolutions are faster in bfloat16: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Names private to torch, which may go: then the answer is no.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


class Predictor:
    """Trained weights, ready to be asked.

    weights: a file of train_branches.py or train_pts.py; None takes those of runs/default, else the bundled ones.
    method: "wsid"; "sinks", the centroids as the paper finds them, whatever the number of objects may be; or
    "components", the connected components of S: the baseline.
    settings: a models.fusion.Fusion. count: the number of objects where it is known; 0 lets the network tell it.
    amp: the network in bfloat16, "auto" (where it pays), "bf16" or "off". mirror: whether it answers with the mean of a
    photograph and its mirror image.
    Raises InputError when the weights cannot be used.

    ``predict`` and ``predict_batch`` are all most callers need. Their three steps, ``prepare``, ``network`` and
    ``instances``, may each run in a thread of their own.
    """

    METHODS = ("wsid", "sinks", "components")
    AMP = ("auto", "bf16", "off")

    def __init__(self, weights=None, device="cpu", *, method="wsid", settings=None, count=0, amp="auto",
                 mirror=False):  # fmt: skip
        self.weights = Path(weights) if weights else default_weights()
        self.device, self.method, self.settings = torch.device(device), method, settings or Fusion()
        self.count, self.mirror = count, mirror
        self.net = load_weights(self.weights, self.device)
        self.bf16 = amp == "bf16" or (amp == "auto" and bfloat16_pays(self.device))
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # A GPU without a CUDA toolkit beside it runs the network only.
        self.fusion_device = self.device if compiled.has_kernels(self.device.type) else torch.device("cpu")

    def predict(self, image, saliency=None):
        """image: uint8 RGB [H,W,3], any size; saliency: float [H,W] in 0..1 in place of S (Table 6), or None.

        Returns a Prediction; one without instances is a valid answer.
        """
        return self.predict_batch([image], [saliency])[0]

    def predict_batch(self, images, saliencies=None):
        """``predict`` for a list of images, each of its own size, that pass the network together."""
        maps = self.network([self.prepare(image) for image in images])
        given = saliencies or [None] * len(images)
        return [self.instances(m, image.shape[:2], s) for m, image, s in zip(maps, images, given, strict=True)]

    def prepare(self, image):
        """uint8 RGB [H,W,3] -> what ``network`` takes: RGB [1,3,S,S] in 0..1 and edges [1,1,S,S], on the CPU."""
        return network_input(resize(image, self.net.config.size), self.net.config.canny, "cpu")

    def autocast(self):
        """The precision of the network, as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def network(self, inputs):
        """A list of what ``prepare`` returned -> as many Maps. On a GPU it does not wait for the values."""
        if not inputs:
            return []
        image, edges = (self._upload(torch.cat(part)) for part in zip(*inputs, strict=True))
        with self.autocast():
            maps = mirrored(self.net, image, edges) if self.mirror else self.net(image, edges)
        ready = torch.cuda.current_stream(self.device).record_event() if self.stream else None
        return [Maps(*parts, ready) for parts in zip(*(m.float() for m in maps), strict=True)]

    def _upload(self, tensor):
        # From pinned memory the copy is queued; from other memory it would wait for the batch before.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.stream else tensor

    @contextmanager
    def _beside_the_network(self, ready):
        """A CUDA stream of its own for the fusion: in the network's, every value it reads would wait for the batches
        queued meanwhile. One for all threads, because freed memory stays with the stream it came from."""
        if ready is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            yield

    @torch.no_grad()
    def instances(self, maps, size, saliency=None):
        """The Prediction of one photograph of ``size`` (H, W) from its Maps; saliency: as for ``predict``."""
        with self._beside_the_network(maps.ready):
            s, b, v = (m.to(self.fusion_device) for m in maps[:3])
            looks = None if maps.features is None else maps.features.to(self.fusion_device)
            if saliency is not None:
                given = torch.from_numpy(np.ascontiguousarray(saliency, np.float32))[None, None].to(s.device)
                s = F.interpolate(given, s.shape, mode="bilinear", align_corners=False, antialias=True)
                s = s[0, 0].clamp(0, 1)
            seen, edges, field = (m.cpu().numpy() for m in (s, b, v))
            alternatives = ()
            if self.method == "components":
                soft, centroids = connected_components(seen, self.settings)
            elif self.method == "sinks":
                soft, centroids = fuse(s, b, v, self.settings, features=looks)
            else:
                shares = certain(self.count) if self.count else maps.shares.cpu()
                soft, centroids = fuse(s, b, v, self.settings, int(told(shares)), looks)
                alternatives = guesses(seen, field, shares, self.settings)
            masks, scores, kept = instance_masks(soft, s, size, self.settings, alternatives)
        height, width = size
        centroids = (centroids[kept] + 0.5) * (np.array(size) / seen.shape) - 0.5
        seen, edges = (cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in (seen, edges))
        return Prediction(masks, scores, centroids, np.clip(seen, 0, 1), edges, field)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    files = parser.add_argument_group("files")
    files.add_argument("--img", required=True, help="a photograph, a folder of them, or a glob")
    files.add_argument("--out", type=Path, default=Path("output"), help="folder for the results")
    files.add_argument("--weights", type=Path, help="default: those of runs/default, else the bundled ones")
    files.add_argument("--saliency-dir", type=Path, help="<stem>.png maps that replace the saliency branch (Table 6)")
    files.add_argument("--coco-ids", type=Path, metavar="FILE",
                       help="image_id is that of this COCO annotation file, not the photograph's stem")  # fmt: skip
    files.add_argument("--visualize", action="store_true", help="also write S, B and V as pictures")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=Predictor.METHODS, default="wsid",
                        help="how instances are told apart; components of S are the baseline")  # fmt: skip
    method.add_argument("--count", type=int, default=0, metavar="N",
                        help="the number of objects, where you know it; 0: the network tells it")  # fmt: skip
    method.add_argument("--fusion", nargs="+", default=[], metavar="NAME=VALUE",
                        help="settings of models.fusion.Fusion, such as power=10 background=0.25")  # fmt: skip
    method.add_argument("--mirror", action="store_true",
                        help="means over each photograph and its mirror image, in twice the time")  # fmt: skip

    machine = parser.add_argument_group("machine; several GPUs: torchrun --nproc_per_node=N infer.py ...")
    machine.add_argument("--gpu", type=int, default=-1, help="CUDA device; -1 is the CPU")
    machine.add_argument("--batch-size", type=int, help="photographs per pass; default: 16 on a GPU, 2 on the CPU")
    machine.add_argument("--workers", type=int, default=min(4, torch.get_num_threads()),
                         help="threads that load photographs, and as many that fuse and write")  # fmt: skip
    machine.add_argument("--amp", choices=Predictor.AMP, default="auto",
                         help="the network in bfloat16: where the machine is fast at it, always, never")  # fmt: skip
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = distributed.start(args.gpu)
    batch_size = default_batch_size(device) if args.batch_size is None else args.batch_size
    if min(batch_size, args.workers) < 1:
        raise InputError("--batch-size and --workers must be 1 or more")
    if args.count < 0 or (args.count and args.method != "wsid"):
        raise InputError(f"--count {args.count} is not understood; give 1 or more, and no --method beside it")
    paths = list_images(args.img)
    unique_stems(paths)
    ids = coco_ids(args.coco_ids, [path.stem for path in paths]) if args.coco_ids else {}
    predictor = Predictor(
        args.weights, device, method=args.method, settings=Fusion.of(args.fusion), count=args.count, amp=args.amp,
        mirror=args.mirror,
    )  # fmt: skip
    make_folder(args.out)
    if distributed.is_first():
        print(f"weights: {predictor.weights}")
    own = distributed.mine(paths)
    write = partial(write_results, args.out, everything=args.visualize)
    results = process(own, predictor, write, batch_size, args.workers, args.saliency_dir)
    records, written, failed = [], [], []
    quiet = len(paths) < 2 or not distributed.is_first()
    for result in tqdm(results, total=len(own), disable=quiet, mininterval=1):
        if isinstance(result, InputError):
            failed.append(result)
        else:
            records += result[0]
            written += result[1]
    records, written, failed = map(distributed.gather, (records, written, failed))
    if not distributed.is_first():
        return 0
    order = {path.stem: place for place, path in enumerate(paths)}
    records = sorted(records, key=lambda record: order[record["image_id"]])
    records = [record | {"image_id": ids.get(record["image_id"], record["image_id"])} for record in records]
    checkpoint.save_json(records, args.out / "predictions.json")
    for line in [*written, args.out / "predictions.json"]:
        print(line)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if failed and len(failed) == len(paths):
        return 2
    return 1 if failed else 0


def default_batch_size(device):
    """Photographs per pass: enough to fill a GPU; on the CPU more than a few only cost memory."""
    return 2 if device.type == "cpu" else 16


def process(paths, predictor, finish, batch_size, workers=1, saliency_dir=None):
    """Photographs from their files to results, loading, network and the rest at the same time.

    finish(path, image, prediction) is called in one of ``workers`` threads. Returns an iterator over what it returns,
    in the order of ``paths``; for a photograph that cannot be read, its InputError. Some 3 * batch_size + 2 * workers
    photographs are in memory at once, however many there are.
    """

    def load(path):
        try:
            image = read_image(path)
            saliency = read_replacement(saliency_dir, path.stem) if saliency_dir else None
        except InputError as error:
            return error
        return path, image, saliency, predictor.prepare(image)

    def with_maps(loaded):
        while batch := list(islice(loaded, batch_size)):
            maps = iter(predictor.network([entry[-1] for entry in batch if not isinstance(entry, InputError)]))
            for entry in batch:
                yield entry if isinstance(entry, InputError) else (*entry[:-1], next(maps))

    def conclude(entry):
        if isinstance(entry, InputError):
            return entry
        path, image, saliency, maps = entry
        return finish(path, image, predictor.instances(maps, image.shape[:2], saliency))

    ahead = batch_size + workers  # a whole batch is under way while the network takes the next one
    return map_ahead(conclude, with_maps(map_ahead(load, paths, workers, ahead)), workers, ahead)


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


def write_results(folder, path, image, prediction, everything=False):
    """Write the pictures of one photograph; returns its COCO records and the paths of the pictures."""
    pictures = write_pictures(folder, path.stem, image, prediction, everything)
    return prediction_records(path.stem, prediction.masks, prediction.scores), pictures


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
