"""Trained weights, ready to be asked: from photographs to instances, one by one, in batches, or from file to file."""

import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.images import read_image
from datasets.masks import read_saliency_mask
from datasets.transforms import network_input, resize
from models import AMP, MAX_INSTANCES, METHODS
from models.count_head import expected_count, one_hot_count
from models.fusion import FusionConfig, fuse, instance_masks
from models.grouping import connected_components
from models.scoring import count_hypotheses
from models.wsid_net import goes_on_from, load_weights
from ops import compiled
from utils import digest
from utils.cli import InputError
from utils.parallel import map_ahead

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_WEIGHTS = (
    Path("runs/default/weights_pts.pt"),
    Path("runs/default/weights.pt"),
    ROOT / "weights" / "wsid_tf_efficientnet_lite2_512.pt",
)


def default_weights():
    """The weights used when none are named: those of runs/default, else the bundled ones.

    InputError when those of train_pts.py were not trained from those that lie beside them now.
    """
    for path in DEFAULT_WEIGHTS:
        if path.exists():
            progressive, before = DEFAULT_WEIGHTS[:2]
            if path == progressive and before.exists() and not goes_on_from(progressive, before):
                raise InputError(
                    f"{progressive} was made from another {before.name} than the one beside it; run "
                    "train_pts.py anew, or name one of them with --weights"
                )
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

    count_probs: the probabilities of 1, 2, ... objects [M], all 0 for a network without a count head. ready: the CUDA
    event after which they hold their values, None on the CPU.
    """

    saliency: torch.Tensor
    boundary: torch.Tensor
    offsets: torch.Tensor
    count_probs: torch.Tensor
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
    settings: a models.fusion.FusionConfig, or what differs from the one in the weights, as NAME=VALUE strings.
    count: the number of objects where it is known; 0 lets the network tell it.
    amp: the network in bfloat16, "auto" (where it pays), "bf16" or "off".
    Raises InputError when the weights cannot be used, or when another argument is none of these.

    ``predict`` and ``predict_batch`` are all most callers need. Their three steps, ``prepare``, ``network`` and
    ``instances``, may each run in a thread of their own. A Predictor may be sent to another process. In a forked one
    (which a GPU does not allow) it works with a single thread, because torch's others do not survive a fork.
    """

    def __init__(self, weights=None, device="cpu", *, method="wsid", settings=None, count=0, amp="auto"):
        for name, value, known in (("method", method, METHODS), ("amp", amp, AMP)):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known; give {', '.join(map(repr, known))}")
        if not isinstance(count, int | np.integer) or not 0 <= count <= MAX_INSTANCES or (count and method != "wsid"):
            raise InputError(f'count={count!r} is not understood; give 0 or, with method "wsid", up to {MAX_INSTANCES}')
        if not isinstance(settings, FusionConfig | list | tuple | None):
            raise InputError(
                f"settings={settings!r} are none; give a models.fusion.FusionConfig, or as in ['power=10']"
            )
        self.weights = Path(weights) if weights else default_weights()
        self.device, self.method, self.count = _usable(device), method, int(count)
        self.net = load_weights(self.weights, self.device)
        self.settings = (
            settings if isinstance(settings, FusionConfig) else FusionConfig.of(settings or (), self.net.fusion)
        )
        self.bf16 = amp == "bf16" or (amp == "auto" and bfloat16_pays(self.device))
        self.process = os.getpid()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # A GPU without a CUDA toolkit beside it runs the network only.
        self.fusion_device = self.device if compiled.has_kernels(self.device.type) else torch.device("cpu")

    def __reduce__(self):
        """Sent to another process it is read from its file again: its tensors are more than a pipe hands over."""
        options = {"method": self.method, "settings": self.settings, "count": self.count}
        options["amp"] = "bf16" if self.bf16 else "off"
        return partial(Predictor, self.weights.resolve(), self.device, **options), ()

    def identity(self):
        """What its answers depend on beside the photographs and the machine, as a plain value."""
        code = [path for part in ("models", "ops", "datasets", "engine") for path in sorted((ROOT / part).glob("*.py"))]
        return {
            "weights": digest.of_file(self.weights),
            "method": self.method,
            "count": self.count,
            "settings": asdict(self.settings),
            "bf16": self.bf16,
            "device": self.device.type,
            "code": digest.of_files(code),
        }

    def predict(self, image, saliency=None):
        """image: uint8 RGB [H,W,3], or whatever else ``as_rgb`` takes, of any size; saliency: float [H,W] in 0..1 in
        place of S (Table 6), or None.

        Returns a Prediction; one without instances is a valid answer. InputError for what is no photograph or no map.
        """
        return self.predict_batch([image], [saliency])[0]

    def predict_batch(self, images, saliencies=None):
        """``predict`` for a list of images, each of its own size, that pass the network together."""
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise InputError("predict_batch takes a list of images; put the one into a list, or give it to predict")
        images = [as_rgb(image) for image in images]
        given = [None] * len(images) if saliencies is None else [m if m is None else as_map(m) for m in saliencies]
        if len(given) != len(images):
            raise InputError(f"{len(images)} images came with {len(given)} saliency maps; give one for each, or None")
        maps = self.network([self.prepare(image) for image in images])
        return [self.instances(m, image.shape[:2], s) for m, image, s in zip(maps, images, given, strict=True)]

    def prepare(self, image):
        """uint8 RGB [H,W,3] -> what ``network`` takes: RGB [1,3,S,S] in 0..1 and edges [1,1,S,S], on the CPU."""
        self._mind_a_fork()
        return network_input(resize(image, self.net.config.size), self.net.config.canny, "cpu")

    def autocast(self):
        """The precision of the network, as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def network(self, inputs):
        """A list of what ``prepare`` returned -> as many Maps. On a GPU it does not wait for the values."""
        if not inputs:
            return []
        self._mind_a_fork()
        image, edges = (self._upload(torch.cat(part)) for part in zip(*inputs, strict=True))
        with self.autocast():
            maps = self.net(image, edges)
        ready = torch.cuda.current_stream(self.device).record_event() if self.stream else None
        return [Maps(*parts, ready) for parts in zip(*(m.float() for m in maps), strict=True)]

    def _mind_a_fork(self):
        # Torch would wait for the parent's threads, which have not come along.
        if os.getpid() != self.process:
            torch.set_num_threads(1)

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
        self._mind_a_fork()
        with self._beside_the_network(maps.ready):
            s, b, v = (m.to(self.fusion_device) for m in maps[:3])
            if saliency is not None:
                given = torch.from_numpy(np.ascontiguousarray(saliency, np.float32))[None, None].to(s.device)
                s = F.interpolate(given, s.shape, mode="bilinear", align_corners=False, antialias=True)
                s = s[0, 0].clamp(0, 1)
            seen, edges, field = (m.cpu().numpy() for m in (s, b, v))
            hypotheses = []
            if self.method == "components":
                soft, centroids = connected_components(seen, self.settings)
            else:
                count_probs = one_hot_count(self.count) if self.count else maps.count_probs.cpu()
                by_count = self.count or self.settings.grouping == "count"
                hypotheses = count_hypotheses(seen, field, count_probs, self.settings)
                count = int(expected_count(count_probs)) if by_count else 0
                soft, centroids = fuse(s, b, v, self.settings, count, hypotheses)
            masks, scores, kept = instance_masks(soft, s, size, self.settings, hypotheses)
        height, width = size
        centroids = (centroids[kept] + 0.5) * (np.array(size) / seen.shape) - 0.5
        seen, edges = (cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in (seen, edges))
        return Prediction(masks, scores, centroids, np.clip(seen, 0, 1), edges, field)


def _usable(device):
    """The torch.device that ``device`` names; InputError when this machine has none such."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device={device!r} cannot be used ({reason}); give 'cpu', or 'cuda' on a GPU") from error


def as_rgb(image):
    """A photograph that a program has in memory, as uint8 RGB [H,W,3] of its size.

    image: uint8, RGB [H,W,3], grey [H,W] or [H,W,1], or RGBA [H,W,4], which is laid over white; or a Pillow image of 8
    bits a channel, which is taken as it lies (``ImageOps.exif_transpose`` turns one upright). InputError for all else.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F", "LAB") or image.mode.startswith("I;"):
            raise InputError(f"the image is of Pillow's mode {image.mode}, whose range is not known; convert it to RGB")
        try:  # only here may Pillow read its file
            image = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"the Pillow image cannot be read ({error}); open it again") from error
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        raise InputError(f"the image is of type {kind}; give uint8 RGB [H,W,3], as datasets.images.read_image reads it")
    if image.dtype != np.uint8:
        raise InputError(f"the image is of type {image.dtype}; give uint8 RGB in 0..255")
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size:
        raise InputError(f"the image has the shape {image.shape}; give [H,W], [H,W,1], RGB [H,W,3] or RGBA [H,W,4]")
    if image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def as_map(saliency):
    """A saliency map in place of S, as float32 [H,W]; InputError where it is none of floats in 0..1."""
    saliency = np.asarray(saliency)
    fits = saliency.ndim == 2 and saliency.size and saliency.dtype.kind == "f"
    if not fits or not (saliency.min() >= 0 and saliency.max() <= 1):  # written so that NaN does not fit
        raise InputError(f"the saliency map is {saliency.dtype} of shape {saliency.shape}; give floats [H,W] in 0..1")
    return saliency.astype(np.float32)


def default_batch_size(device):
    """Photographs per pass: enough to fill a GPU; on the CPU more than a few only cost memory."""
    return 2 if device.type == "cpu" else 16


def default_workers():
    """Threads that load, and as many that finish: no more than torch would use."""
    return min(4, torch.get_num_threads())


def process(paths, predictor, finish, batch_size, workers=1, saliency_dir=None):
    """Photographs from their files to results, loading, network and the rest at the same time.

    finish(path, image, prediction) is called in one of ``workers`` threads. Returns an iterator over what it returns,
    in the order of ``paths``; for a photograph that cannot be read or finished, its InputError. Some 3 * batch_size +
    2 * workers photographs are in memory at once, however many there are.
    """

    def load(path):
        try:
            image = read_image(path)
            saliency = read_replacement(saliency_dir, path.stem) if saliency_dir else None
            return path, image, saliency, predictor.prepare(image)
        except InputError as error:
            return error
        except MemoryError:
            return _too_large(path)

    def with_maps(loaded):
        while batch := list(islice(loaded, batch_size)):
            maps = iter(predictor.network([entry[-1] for entry in batch if not isinstance(entry, InputError)]))
            for entry in batch:
                yield entry if isinstance(entry, InputError) else (*entry[:-1], next(maps))

    def conclude(entry):
        if isinstance(entry, InputError):
            return entry
        path, image, saliency, maps = entry
        try:
            return finish(path, image, predictor.instances(maps, image.shape[:2], saliency))
        except InputError as error:
            return error
        except MemoryError:
            return _too_large(path)

    ahead = batch_size + workers  # a whole batch is under way while the network takes the next one
    return map_ahead(conclude, with_maps(map_ahead(load, paths, workers, ahead)), workers, ahead)


def _too_large(path):
    return InputError(f"{path} needs more memory than there is; reduce it, or give fewer --workers")


def read_replacement(folder, stem):
    path = folder / f"{stem}.png"
    if not path.exists():
        raise InputError(f"there is no saliency map {path}; --saliency-dir needs one <stem>.png per photograph")
    return read_saliency_mask(path)
