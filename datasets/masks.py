"""Masks on disk: instance masks, saliency maps, and run-length encoded (RLE) predictions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
from PIL import Image

from datasets import pixels
from datasets.images import image_size, read_picture
from datasets.listing import list_images
from utils.cli import InputError

VOID = 255  # pixels without annotation, which evaluation ignores
MAX_THIN = 2  # labels less than 3 pixels wide that a mask may have; more are soft edges
VOID_COLOURS = ((255, 255, 255), (224, 224, 192))  # white, and VOC's colour of void


@dataclass(frozen=True)
class MaskFile:
    """The ground-truth instances of a photograph, in a picture that ``read_instance_mask`` reads."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def size(self) -> tuple[int, int]:
        """(H, W) in pixels, from the file's header; InputError as in ``image_size``."""
        return image_size(self.path)

    def read(self) -> np.ndarray:
        """uint8 [H,W]: 0 background, 1..254 instances, 255 void.

        Raises InputError as ``read_instance_mask`` does, and for a mask that does not separate its instances: one with
        void only, or one most of whose labels are nowhere 3 pixels wide (a saliency map, or soft edges of resizing).
        """
        labels = read_instance_mask(self.path)
        void, instance = labels == VOID, (labels > 0) & (labels < VOID)
        if void.any() and not instance.any():
            raise InputError(f"{self} shows nothing but void (white, 255); paint its instances in other colours")
        numbers = np.unique(labels[instance])
        thin = np.setdiff1d(numbers, _broad_labels(labels))
        if 2 * len(thin) > len(numbers) and (len(thin) > MAX_THIN or void.sum() > instance.sum()):
            raise InputError(
                f"{self} holds shades of grey or soft edges, not a label for each instance; paint its "
                "instances in plain colours, or number them 1..254"
            )
        return labels


def list_masks(folder: str | Path) -> dict[str, Path]:
    """{stem: Path} of the mask pictures directly inside ``folder``, sorted by stem.

    Raises InputError when the folder is missing or holds no picture, or when two pictures share a stem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder that holds the mask pictures")
    masks: dict[str, Path] = {}
    for path in sorted(list_images(folder, results=True), key=lambda path: path.stem):
        if path.stem in masks:
            raise InputError(f"{path} and {masks[path.stem].name} are masks of one image; remove one of them")
        masks[path.stem] = path
    return masks


def read_instance_mask(path: str | Path) -> np.ndarray:
    """Read an instance mask as uint8 [H,W]: 0 background, 1..254 instances, 255 void.

    In grey and palette pictures the stored index is the label (labels may have gaps); in colour pictures black is
    background, white and VOC's (224, 224, 192) are void and every other colour is one instance. Transparent pixels are
    background, except index 255 of a palette; in a picture that is wholly transparent, transparency is ignored. The
    mask is rotated upright like a photograph.
    Raises InputError when the file is missing, broken, lossy, or holds more than 254 instances.
    """
    picture = read_picture(path)
    if lossy := _lossy_kind(picture, path):
        raise InputError(f"{path} is a {lossy}, which blurs instance labels; save the mask as PNG")
    alpha = _alpha(picture)
    hidden = alpha < 128 if alpha is not None and (alpha >= 128).any() else np.zeros(picture.size[::-1], bool)
    if len(picture.getbands()) > 1:
        if pixels.deep_samples(picture, path) is not None:
            raise InputError(f"{path} holds 16-bit colours; save the mask as 8-bit PNG")
        colours = np.array(picture.convert("RGB"))
        colours[hidden] = 0
        grey = (colours == colours[..., :1]).all()
        labels = colours[..., 0] if grey else _labels_of_colours(colours, path)
    else:
        labels = np.array(picture)
        labels[hidden & ~((labels == VOID) & (picture.mode == "P"))] = 0
    if labels.min() < 0 or labels.max() > VOID or (labels != labels.astype(np.uint8)).any():
        raise InputError(f"{path} holds labels outside 0..255; use 0 background, 1..254 instances, 255 void")
    return labels.astype(np.uint8)


def is_coloured(path: str | Path) -> bool:
    """Whether ``read_instance_mask`` derives the labels from colours instead of stored indices."""
    picture = read_picture(path)
    if len(picture.getbands()) < 2:
        return False
    colours = np.asarray(picture.convert("RGB"))
    return bool((colours != colours[..., :1]).any())


def read_saliency_mask(path: str | Path) -> np.ndarray:
    """Read a saliency map as float32 [H,W] in 0..1 (8-bit values / 255, 16-bit values / 65535).

    Colour pictures are converted to grey; transparent pixels are 0. Raises InputError when the file is missing, broken,
    or holds floating-point values outside 0..1.
    """
    picture = read_picture(path)
    if picture.mode.startswith("I"):
        saliency = np.asarray(picture).astype(np.float32) / 65535
    elif picture.mode == "F":
        saliency = np.asarray(picture)
    else:
        saliency = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32) / 255
        if (alpha := _alpha(picture)) is not None:
            saliency = saliency * (alpha.astype(np.float32) / 255)
    if not (saliency.min() >= 0 and saliency.max() <= 1):  # written so that NaN fails too
        raise InputError(f"{path} holds values outside 0..1; save the saliency map as an 8-bit grey PNG")
    return saliency


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a bool mask [H,W] as COCO RLE: {"size": [H, W], "counts": str}, ready for JSON."""
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Decode COCO RLE, compressed (counts is a str) or not (a list of ints), to a bool mask [H,W].

    Raises ValueError with the reason when the runs do not fill the mask exactly; pycocotools returns uninitialised
    memory for such input.
    """
    height, width = rle["size"]
    runs = _runs_of_string(rle["counts"]) if isinstance(rle["counts"], str) else np.array(rle["counts"])
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("its RLE counts are not run lengths")
    filled = sum(runs.tolist())  # Python integers cannot overflow
    if filled != height * width:
        raise ValueError(f"its RLE counts fill {filled} pixels of {height} x {width}")
    values = np.arange(len(runs)) % 2 == 1  # runs alternate, beginning with background
    return np.repeat(values, runs).reshape(width, height).T


def decode_polygons(polygons: Iterable[Sequence[float]], shape: tuple[int, int]) -> np.ndarray:
    """Decode COCO polygons, a list of outlines [x, y, x, y, ...] in pixels, to a bool mask of ``shape`` (H, W).

    Raises ValueError for an outline of fewer than three points, with a coordinate that is not finite, or with relative
    coordinates 0..1.
    """
    height, width = shape
    # Clipped: pycocotools allocates memory for every pixel of an outline, even far outside.
    outlines = [np.array(points, np.float64).reshape(-1, 2).clip(0, (width, height)) for points in polygons]
    if not all(len(outline) > 2 and np.isfinite(outline).all() for outline in outlines):
        raise ValueError("a polygon needs three points or more")
    if max(outline.max() for outline in outlines) <= 1:
        raise ValueError("its points are fractions of the image, not pixels")
    runs = pycocotools.mask.frPyObjects([outline.ravel().tolist() for outline in outlines], height, width)
    union = pycocotools.mask.merge(runs)
    return decode_rle({"size": union["size"], "counts": union["counts"].decode("ascii")})


def encode_polygons(mask: np.ndarray, tolerance: float = 0) -> list[list[float]]:
    """Encode a bool mask [H,W] as COCO polygons: for each connected part its outline [x, y, x, y, ...] along
    the edges of pixels; pixel (0, 0) covers 0..1 in both coordinates.

    A hole is part of the outline around it, joined to it by a cut without width. tolerance: how far a simplified
    outline may be from that of the mask, in pixels; with 0 ``decode_polygons`` restores the mask exactly.
    """
    # Doubled, so that the pixels that OpenCV's outlines pass through lie beside every edge of the mask.
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, 0), 2, 1)
    outlines, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = hierarchy[0, :, 3] if outlines else ()
    polygons = {i: _simplified(outlines[i], tolerance) for i, parent in enumerate(parents) if parent < 0}
    for i, parent in enumerate(parents):
        if parent >= 0:
            polygons[parent] = _with_hole(polygons[parent], _simplified(outlines[i], tolerance))
    return [polygon.ravel().tolist() for polygon in polygons.values()]


def bounding_box(rle: Mapping[str, Any], margin: int = 0) -> list[int]:
    """[x, y, width, height], in pixels, of a compressed COCO RLE and ``margin`` pixels around, within the image."""
    height, width = rle["size"]
    x, y, w, h = (int(side) for side in pycocotools.mask.toBbox(rle))
    left, top = max(x - margin, 0), max(y - margin, 0)
    return [left, top, min(x + w + margin, width) - left, min(y + h + margin, height) - top]


def areas_of(labels: np.ndarray) -> np.ndarray:
    """The number of pixels of each label in a uint8 array of any shape: int [256]."""
    return np.bincount(labels.ravel(), minlength=256)


def centroids_of(masks: Iterable[np.ndarray]) -> np.ndarray:
    """The centres of mass (y, x) of bool masks [H,W], in pixels: float [n,2]; (0, 0) of an empty mask."""
    centroids = []
    for mask in masks:
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        m = cv2.moments(mask[y : y + height, x : x + width].astype(np.uint8), binaryImage=True)
        centroids.append((y, x) + np.array([m["m01"], m["m10"]]) / max(m["m00"], 1))
    return np.array(centroids).reshape(-1, 2)


def prediction_records(image_id: str, masks: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """COCO result records (dicts ready for JSON) of bool masks [n,H,W] with scores [n] in (0, 1]."""
    return [
        {"image_id": image_id, "category_id": 1, "segmentation": encode_rle(mask), "score": float(score)}
        for mask, score in zip(masks, scores, strict=True)
    ]


def _simplified(outline: np.ndarray, tolerance: float) -> np.ndarray:
    """An outline of the doubled mask, int [n,1,2] (x, y), as corners of pixels of the mask itself, int [m,2]."""
    corners = (outline + 1) // 2
    simplified = cv2.approxPolyDP(corners, tolerance, closed=True)
    exact = cv2.approxPolyDP(corners, 0, closed=True)
    return (simplified if len(simplified) > 2 else exact)[:, 0]


def _with_hole(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """``outline`` and ``hole``, int [n,2] and [m,2], as one outline, joined at their nearest points."""
    distances = ((outline[:, None] - hole[None]) ** 2).sum(2)
    i, k = np.unravel_index(distances.argmin(), distances.shape)
    return np.concatenate([outline[: i + 1], hole[k:], hole[: k + 1], outline[i:]])


def _lossy_kind(picture: Image.Image, path: str | Path) -> str | None:
    """The name of a lossy format, else None."""
    if picture.format in ("JPEG", "MPO", "AVIF", "HEIF", "JPEG2000"):
        return picture.format
    if picture.format == "WEBP" and b"VP8 " in Path(path).read_bytes():
        return "lossy WebP"
    return "TIFF with JPEG compression" if picture.info.get("compression") == "jpeg" else None


def _alpha(picture: Image.Image) -> np.ndarray | None:
    """The opacity uint8 [H,W] of a picture of 8 bits or less; None for an opaque picture."""
    if picture.mode.startswith("I") or picture.mode == "F" or not picture.has_transparency_data:
        return None
    return np.asarray(picture.convert("RGBA").getchannel("A"))


def _broad_labels(labels: np.ndarray) -> np.ndarray:
    """The labels that fill a square of 3x3 pixels somewhere, clipped at the rim of the image."""
    square = np.ones((3, 3), np.uint8)
    return np.unique(labels[cv2.erode(labels, square) == cv2.dilate(labels, square)])


def _labels_of_colours(colours: np.ndarray, path: str | Path) -> np.ndarray:
    """uint8 RGB [H,W,3] -> int [H,W]: instances are numbered in the order of their colour values."""
    codes = colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    found, labels = np.unique(codes, return_inverse=True)
    void = [(red << 16) + (green << 8) + blue for red, green, blue in VOID_COLOURS]
    instance = (found != 0) & ~np.isin(found, void)
    if instance.sum() >= VOID:
        raise InputError(f"{path} holds more than 254 colours; save one plain colour or index per instance")
    names = np.where(instance, np.cumsum(instance), np.where(found == 0, 0, VOID))
    return names[labels.reshape(codes.shape)]


def _runs_of_string(counts: str) -> np.ndarray:
    """Decode COCO's compressed counts, 5 bits a character, to run lengths int64 [n]."""
    try:
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        codes = np.array([-1])
    if codes.size and (codes.min() < 0 or codes.max() > 63 or codes[-1] & 32):
        raise ValueError("its RLE counts are not a COCO string")
    last = np.flatnonzero((codes & 32) == 0)  # the character that ends each number
    first = np.concatenate([[0], last[:-1] + 1]).astype(np.int64)[: len(last)]
    lengths = last - first + 1
    if codes.size and lengths.max() > 7:
        raise ValueError("its RLE counts hold a number too large")
    place = np.arange(len(codes)) - np.repeat(first, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first) if len(first) else np.zeros(0, np.int64)
    numbers -= np.where(codes[last] & 16, 1 << (5 * lengths), 0)  # the sign
    # From the fourth number on, each is the difference to the run two before it.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
