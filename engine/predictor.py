"""Inference: from photographs to salient instances, one by one, in batches, or from file to file."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.images import read_image
from datasets.masks import read_saliency_mask
from datasets.transforms import canny_edges, resize
from engine.cuda_graph import Graphed
from engine.post_processing import Maps, PostProcessor, Prediction
from models import AMP, MAX_INSTANCES, METHODS, STUDENT
from models.backbones import Backbone
from models.detections import Detections
from models.fusion_config import FusionConfig
from models.wsid_net import WSIDNet, goes_on_from, load_network
from ops import compiled, sources
from utils import digest
from utils.cli import InputError
from utils.parallel import map_ahead

ROOT = Path(__file__).resolve().parent.parent
OWN_WEIGHTS = Path("runs/default/weights_pts.pt"), Path("runs/default/weights.pt")
# The bundled networks: the student network, and a WSID-Net, for what needs S, B and V.
BUNDLED_STUDENT, BUNDLED_WSID_NET = (ROOT / "weights" / name for name in ("student.pt", "wsid_net.pt"))

# Of the network, uint8: RGB [1,3,S,S] and, but for a student network, Canny edges [1,1,S,S] of 0 and 1.
Input = tuple[Tensor, ...]
T = TypeVar("T")


def default_weights(bundled: Path = BUNDLED_STUDENT) -> Path:
    """The weights used when none are named: those of runs/default, else the ``bundled`` ones.

    Raises InputError when runs/default/weights_pts.pt was not trained from the weights.pt beside it, or when there is
    no weights file at all.
    """
    for path in (*OWN_WEIGHTS, bundled):
        if path.exists():
            progressive, initial = OWN_WEIGHTS
            if path == progressive and initial.exists() and not goes_on_from(progressive, initial):
                raise InputError(
                    f"{progressive} was made from another {initial.name} than the one beside it; run "
                    "train_pts.py anew, or name one of them with --weights"
                )
            return path
    raise InputError(f"there are no weights at {bundled}; train a run or name a file with --weights")


def bfloat16_pays(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16: on GPUs from Ampere on, on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private functions of torch, which a later version may lack: then float32 is used.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


class Predictor:
    """A trained WSID-Net and the settings of its fusion, or a student network.

    weights: a file of train_branches.py, train_pts.py or train_student.py; None takes those of runs/default, else the
    bundled ones.
    device: a torch.device or its name.
    method: "wsid", the fusion of the paper; or "components", the connected components of S, a baseline.
    settings: a FusionConfig, or NAME=VALUE strings that replace single values of the one in the weights file.
    A student network takes neither.
    count: the number of objects where it is known, 1..254: salient pixels are then divided into so many instances; 0
    where it is not.
    amp: precision of the network: "auto" (bfloat16 where ``bfloat16_pays``), "bf16" or "off" (float32).
    ranked: whether a Prediction of a student network has all hypotheses beside its disjoint instances.
    refine: whether a dense CRF aligns the masks of a student network with the photograph.
    Raises InputError when the weights cannot be used, or for an argument that is none of these.

    ``predict`` and ``predict_batch`` are all most callers need. Their three steps, ``prepare``, ``network`` and
    ``instances``, may each run in a thread of their own. A Predictor can be pickled: the other process reads the
    weights file. In a forked process (CPU only) it runs with one thread, because torch's threads do not survive a fork.
    """

    def __init__(
        self,
        weights: Path | str | None = None,
        device: torch.device | str = "cpu",
        *,
        method: str = "wsid",
        settings: FusionConfig | Sequence[str] | None = None,
        count: int = 0,
        amp: str = "auto",
        ranked: bool = False,
        refine: bool = True,
    ) -> None:
        for name, value, known in (("method", method, METHODS), ("amp", amp, AMP)):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known; give {', '.join(map(repr, known))}")
        if not isinstance(count, int | np.integer) or not 0 <= count <= MAX_INSTANCES or (count and method != "wsid"):
            raise InputError(f'count={count!r} is not understood; give 0 or, with method "wsid", up to {MAX_INSTANCES}')
        if not isinstance(settings, FusionConfig | list | tuple | None):
            raise InputError(
                f"settings={settings!r} is not understood; give a models.fusion_config.FusionConfig or a list of "
                "NAME=VALUE strings"
            )
        self.weights = Path(weights) if weights else default_weights()
        self.device, self.method, self.count = _usable(device), method, int(count)
        self.ranked, self.refine = ranked, refine
        self.net = load_network(self.weights, self.device)
        for module in list(self.net.modules()):
            if isinstance(module, Backbone):
                module.fold_batch_norms()
        if isinstance(self.net, WSIDNet):
            self.settings = (
                settings if isinstance(settings, FusionConfig) else FusionConfig.of(settings or (), self.net.fusion)
            )
        else:
            for name, given in (("method", method != METHODS[0]), ("fusion", bool(settings))):
                if given:
                    raise InputError(
                        f"{self.weights} holds a student network, which has no choice of {name}; leave it out, or "
                        f"name the weights of a WSID-Net, such as {BUNDLED_WSID_NET}"
                    )
            self.method, self.settings = STUDENT, FusionConfig()
        self.bf16 = amp == "bf16" or (amp == "auto" and bfloat16_pays(self.device))
        self.process = os.getpid()
        self.stream = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            part = "forward" if isinstance(self.net, WSIDNet) else "candidates"
            setattr(self.net, part, Graphed(getattr(self.net, part)))
        # Where the operators have no CUDA kernels, only the network runs on the GPU.
        self.fusion_device = self.device if compiled.has_kernels(self.device.type) else torch.device("cpu")

    def __reduce__(self) -> tuple[Callable[[], "Predictor"], tuple[()]]:
        """Pickled as the path of its weights and its options, because a pipe does not hold all of its tensors."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("count", "ranked", "refine")}
        options["amp"] = "bf16" if self.bf16 else "off"
        if self.method != STUDENT:
            options |= {"method": self.method, "settings": self.settings}
        return partial(Predictor, self.weights.resolve(), self.device, **options), ()

    @property
    def post_process(self) -> PostProcessor:
        """What ``instances`` computes, without the network."""
        return PostProcessor(self.method, self.settings, self.net.config.size, self.ranked)

    @property
    def map_kinds(self) -> tuple[str, ...]:
        """The maps that a Prediction has, by the names of its fields."""
        return ("saliency",) if self.method == STUDENT else ("saliency", "boundary", "offsets")

    def identity(self) -> dict[str, Any]:
        """All that predictions depend on besides the photographs and the machine, as a plain value."""
        return {
            "weights": digest.of_file(self.weights),
            "method": self.method,
            "count": self.count,
            "refine": self.refine,
            "settings": asdict(self.settings),
            "bf16": self.bf16,
            "device": self.device.type,
            "code": digest_of_code(),
        }

    def predict(self, image: Any, saliency: Any = None) -> Prediction:
        """The instances of one photograph; there may be none.

        image: uint8 RGB [H,W,3] of any size, or another form that ``as_rgb`` takes. saliency: float [H,W] in 0..1 of
        any size that replaces S (Table 6), or None. Raises InputError for any other input.
        """
        return self.predict_batch([image], [saliency])[0]

    def predict_batch(self, images: Sequence[Any], saliencies: Sequence[Any] | None = None) -> list[Prediction]:
        """``predict`` for a list of images of any sizes, which pass the network as one batch."""
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise InputError("predict_batch takes a list of images; put the one into a list, or give it to predict")
        images = [as_rgb(image) for image in images]
        given = [None] * len(images) if saliencies is None else [m if m is None else as_map(m) for m in saliencies]
        if len(given) != len(images):
            raise InputError(f"{len(images)} images came with {len(given)} saliency maps; give one for each, or None")
        maps = self.network([self.prepare(image) for image in images])
        return [finish() for finish in self.fuse_batch(maps, [image.shape[:2] for image in images], given)]

    def prepare(self, image: np.ndarray) -> Input:
        """A photograph uint8 RGB [H,W,3] as input of ``network``, on the CPU."""
        self._limit_threads_after_fork()
        square = resize(image, self.net.config.size)
        pixels = torch.from_numpy(square).permute(2, 0, 1)[None]
        if not isinstance(self.net, WSIDNet):
            return (pixels,)
        return pixels, torch.from_numpy(canny_edges(square, self.net.config.canny)).to(torch.uint8)[None, None]

    def batch(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Inputs of ``network`` as the batch that the network takes, float32 on its device: RGB [N,3,S,S] in 0..1 and,
        but for a student network, edges [N,1,S,S] of 0 and 1. Copied as bytes, a quarter of the memory."""
        image, *edges = (self._upload(torch.cat(part)).float() for part in zip(*inputs, strict=True))
        return [image.div_(255), *edges]

    def autocast(self) -> AbstractContextManager:
        """The precision of the network, as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def network(self, inputs: Sequence[Input]) -> Sequence[Maps | Detections]:
        """The Maps of a batch of inputs, one for each, or the Detections of a student network. On a GPU it returns
        before Maps are computed."""
        if not inputs:
            return []
        self._limit_threads_after_fork()
        with self.autocast():
            output = self.net(*self.batch(inputs))
        if self.method == STUDENT:
            images = [image[0] if self.refine else None for image, *_ in inputs]
            return [found._replace(image=image) for found, image in zip(output, images, strict=True)]
        ready = torch.cuda.current_stream(self.device).record_event() if self.stream else None
        return [Maps(s, b, v, p, ready) for s, b, v, p in zip(*(part.float() for part in output), strict=True)]

    def _limit_threads_after_fork(self) -> None:
        # Torch would wait forever for its threads, which exist in the parent process only.
        if os.getpid() != self.process:
            torch.set_num_threads(1)

    def _upload(self, tensor: Tensor) -> Tensor:
        # The copy from pinned memory is queued; from other memory it would wait for the batch before.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.stream else tensor

    @contextmanager
    def _fusion_stream(self, ready: Any) -> Iterator[None]:
        """A CUDA stream of its own for the fusion: in the network's, every value it reads would wait for the batches
        queued meanwhile. One for all threads, because freed memory stays with the stream it was allocated in."""
        if ready is None or self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            yield

    def instances(
        self,
        maps: Maps | Detections,
        size: tuple[int, int],
        saliency: np.ndarray | None = None,
        count: int | None = None,
    ) -> Prediction:
        """The Prediction of a photograph of ``size`` (H, W) from its Maps or Detections.

        saliency: as for ``predict``; InputError with a student network. count: the number of objects, 0 where it is
        not known; None takes that of the Predictor.
        """
        return self.fuse_batch([maps], [size], [saliency], count)[0]()

    def fuse_batch(
        self,
        outputs: Sequence[Maps | Detections],
        sizes: Sequence[tuple[int, int]],
        saliencies: Sequence[np.ndarray | None],
        count: int | None = None,
    ) -> list[Callable[[], Prediction]]:
        """``instances`` for several photographs, which on a GPU is faster; as of ``PostProcessor.of_batch``."""
        self._limit_threads_after_fork()
        if self.method == STUDENT and any(saliency is not None for saliency in saliencies):
            raise InputError(
                f"{self.weights} holds a student network, which takes no saliency map; leave it out, or name the "
                f"weights of a WSID-Net, such as {BUNDLED_WSID_NET}"
            )
        count = self.count if count is None else count
        if not outputs or self.method == STUDENT:
            return self.post_process.of_batch(outputs, sizes, count) if outputs else []
        ready = outputs[-1].ready  # type: ignore[union-attr]
        with self._fusion_stream(ready):
            moved = [Maps(*(value.to(self.fusion_device) for value in maps[:4])) for maps in outputs]
            fused = self.post_process.of_batch(moved, sizes, count, saliencies)
        return [self._fusion_stream(ready)(finish) for finish in fused]


def digest_of_code() -> list[str | None]:
    """Of all code that predictions depend on, that of the compiled operators included."""
    folders = ("models", "ops", "datasets", "engine", "utils")
    code = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    return [digest.of_value(digest.of_files(code)), sources.digest() if compiled.available else None]


def _usable(device: torch.device | str) -> torch.device:
    """The torch.device that ``device`` names; InputError when this machine does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device={device!r} cannot be used ({reason}); give 'cpu', or 'cuda' on a GPU") from error


def as_rgb(image: Any) -> np.ndarray:
    """An image in memory as uint8 RGB [H,W,3] of the same size.

    image: uint8, RGB [H,W,3], grey [H,W] or [H,W,1], or RGBA [H,W,4], which is composited over white; or a Pillow image
    of 8 bits a channel, whose EXIF orientation is not applied (``ImageOps.exif_transpose`` does so). Raises InputError
    for anything else.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F", "LAB") or image.mode.startswith("I;"):
            raise InputError(f"the image is of Pillow's mode {image.mode}, whose range is not known; convert it to RGB")
        try:  # Pillow may read the file only here
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


def as_map(saliency: Any) -> np.ndarray:
    """A saliency map in memory as float32 [H,W]; InputError unless it is an array of floats in 0..1."""
    saliency = np.asarray(saliency)
    fits = saliency.ndim == 2 and saliency.size and saliency.dtype.kind == "f"
    if not fits or not (saliency.min() >= 0 and saliency.max() <= 1):  # written so that NaN is refused
        raise InputError(f"the saliency map is {saliency.dtype} of shape {saliency.shape}; give floats [H,W] in 0..1")
    return saliency.astype(np.float32)


def default_batch_size(device: torch.device) -> int:
    """Photographs per pass: enough to fill a GPU; on the CPU larger batches only take more memory."""
    return 2 if device.type == "cpu" else 16


def default_threads() -> int:
    """Threads that load photographs, and as many that fuse and write, beside the network."""
    return min(4, torch.get_num_threads())


def process(
    paths: Iterable[Any],
    predictor: Predictor,
    finish: Callable[[Any, np.ndarray, Prediction], T],
    batch_size: int,
    threads: int = 1,
    saliency_dir: Path | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    read: Callable[[Any], np.ndarray] | None = None,
) -> Generator[T | InputError, None, None]:
    """Predict the photographs at ``paths``; loading, network, and fusion with ``finish`` run at the same time.

    read: reads one item of ``paths`` as uint8 RGB [H,W,3], where these are no files but frames of a clip.
    finish(path, image, prediction), with the photograph uint8 RGB [H,W,3], is called in one of ``threads`` threads.
    saliency_dir: a folder of <stem>.png maps that replace S, or None. transform: a change of the photograph, uint8 RGB
    to uint8 RGB, before the network; the prediction keeps the size of the photograph. Returns an iterator over what
    ``finish`` returns, in the order of ``paths``, with an InputError in place of each photograph that cannot be read or
    finished. At most about 3 * batch_size + 2 * threads photographs are in memory at once, with a GPU 4 * batch_size +
    2 * threads.
    """

    def load(path: Any) -> Any:
        image = (read or read_image)(path)
        saliency = read_replacement(saliency_dir, path.stem) if saliency_dir else None
        return path, image, saliency, predictor.prepare(transform(image) if transform else image)

    def with_maps(loaded: Iterator[Any]) -> Iterator[list[Any]]:
        while batch := list(islice(loaded, batch_size)):
            maps = iter(predictor.network([entry[-1] for entry in batch if not isinstance(entry, InputError)]))
            entries = [entry if isinstance(entry, InputError) else (*entry[:-1], next(maps)) for entry in batch]
            yield from [entries] if whole_batches else ([entry] for entry in entries)

    def conclude(entries: list[Any]) -> list[T | InputError]:
        usable = [entry for entry in entries if not isinstance(entry, InputError)]
        _, images, saliencies, maps = zip(*usable, strict=True) if usable else ((),) * 4
        try:
            fused = iter(predictor.fuse_batch(maps, [image.shape[:2] for image in images], saliencies))
        except InputError as error:
            return [entry if isinstance(entry, InputError) else error for entry in entries]
        return [entry if isinstance(entry, InputError) else written(entry, next(fused)) for entry in entries]

    def written(entry: Any, predict: Callable[[], Prediction]) -> T | InputError:
        path, image, *_ = entry
        return _attempt(path, lambda: finish(path, image, predict()))

    ahead = batch_size + threads  # a whole batch is loaded while the network computes the one before
    # The operators take a whole batch on a GPU. On the CPU threads share the photographs.
    whole_batches = predictor.device.type == "cuda" and predictor.method != STUDENT
    loaded = map_ahead(lambda path: _attempt(path, lambda: load(path)), paths, threads, ahead)
    for results in map_ahead(conclude, with_maps(loaded), threads, 1 if whole_batches else ahead):
        yield from results


def _attempt(path: Any, compute: Callable[[], T]) -> T | InputError:
    """What ``compute`` returns for the photograph ``path``, or why it cannot."""
    try:
        return compute()
    except InputError as error:
        return error
    except Exception as error:
        if not lacks_memory(error):
            raise
        return InputError(f"{path} needs more memory than there is; reduce it, or give fewer --workers")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is Python's or OpenCV's for a lack of memory."""
    return isinstance(error, MemoryError) or (isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem)


def read_replacement(folder: Path, stem: str) -> np.ndarray:
    """The saliency map <stem>.png of ``folder``, float32 [H,W] in 0..1; InputError when it is missing or unreadable."""
    path = folder / f"{stem}.png"
    if not path.exists():
        raise InputError(f"there is no saliency map {path}; --saliency-dir needs one <stem>.png per photograph")
    return read_saliency_mask(path)
