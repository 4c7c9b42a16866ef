"""Conversion of samples of any depth and colour space to 8-bit sRGB."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from utils.cli import InputError

DEPTHS = (8, 10, 12, 14, 16, 32)  # bits per sample of cameras, scanners and number types

_WIDTH, _HEIGHT, _BITS, _COLOURS, _ORIENTATION, _SAMPLES, _PLANES = 256, 257, 258, 262, 274, 277, 284  # TIFF's tags
_EXTRA, _FORMAT, _NO_DATA = 338, 339, 42113  # the last is GDAL's
_FILL = 1e30  # programs write such values where there is no measurement
_FORMATS = {1: "integer", 2: "signed integer", 3: "floating-point"}
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # space of a profile -> Pillow's mode

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # problems are reported as InputErrors


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Samples of any number type [H,...] -> uint8 of that shape.

    White is the full scale of the smallest depth in ``DEPTHS`` that holds the largest value, because 10, 12 or 14 bits
    are stored in 16; for floating-point values up to 1 white is 1. Values outside such a scale (negative, or none above
    a quarter of it) are stretched from their minimum (black) to their maximum (white). NaN and -infinity are black,
    infinity is white; magnitudes from 1e30 on count as infinite.
    """
    floating = values.dtype.kind == "f"
    finite = values[np.abs(values) < _FILL] if floating else values
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = float(finite.min()), float(finite.max())
    whites = [1] * floating + [2**bits - 1 for bits in DEPTHS]
    white = next((white for white in whites if high <= white), None)
    if low >= 0 and white and 4 * high > white:
        low, high = 0.0, float(white)
    result = np.empty(values.shape, np.uint8)
    for begin in range(0, len(values), 256):  # in strips, to save memory
        strip = np.nan_to_num(values[begin : begin + 256].astype(np.float64), nan=low).clip(low, high)
        # Halved first: the difference of two large values could overflow.
        strip = (strip / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
        result[begin : begin + 256] = np.rint(strip * 255)
    return result


def to_rgb(picture: Image.Image, path: str | Path) -> Image.Image:
    """A decoded Pillow image of any mode, from the file ``path`` -> one of mode RGB in sRGB, transparency over white.

    Raises InputError for a dark 16-bit TIFF whose colour planes are separate: it cannot be read at its full depth.
    """
    info, tags = picture.info, getattr(picture, "tag_v2", {})
    alpha: Image.Image | None
    if picture.mode.startswith("I") or picture.mode == "F":
        samples = np.asarray(picture)
        if picture.mode == "I" and tags.get(_FORMAT, (1,))[0] == 1:
            samples = samples.view(np.uint32)  # a type that Pillow lacks
        transparent = info.get("transparency")
        alpha = Image.fromarray(samples != transparent) if isinstance(transparent, int) else None
        return _composite(_from_samples(samples, tags), alpha, info)
    alpha = None
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
    colours = picture.convert({"L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(picture.mode, "RGB"))
    if colours.mode == "RGB" and (deep := deep_samples(picture, path)) is not None:
        if tags.get(_PLANES) == 2:
            raise InputError(f"{path} uses a few of its 16 bits, and stores its colours apart; save it as 8-bit PNG")
        colours = _from_samples(deep[..., :3], tags)
        alpha = alpha and Image.fromarray(to_8_bit(deep[..., 3]))
    return _composite(colours, alpha, info)


def deep_samples(picture: Image.Image, path: str | Path) -> np.ndarray | None:
    """The full samples (``decode``) of a 16-bit colour picture of which Pillow keeps the upper 8 bits; None otherwise.

    For pictures that are not dark the upper 8 bits are enough, which returns None too, except for JPEG 2000, where
    Pillow rounds them and white becomes 256, that is 0.
    """
    if picture.format not in ("PNG", "TIFF", "JPEG2000"):
        return None
    bands: Any = picture.convert("RGB").getextrema()
    if picture.format != "JPEG2000" and max(high for _, high in bands) >= 64:
        return None
    samples = decode(path)
    return samples if samples is not None and samples.ndim == 3 and samples.dtype.itemsize == 2 else None


def decode(path: str | Path) -> np.ndarray | None:
    """The samples of a PNG, TIFF or JPEG 2000 at their full depth, [H,W] or RGB(A) [H,W,3 or 4]; None when OpenCV does
    not read it. TIFFs are upright, others as stored. A truncated PNG is not detected.
    """
    try:
        samples = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (cv2.error, MemoryError):
        return None
    if samples is None or samples.ndim == 2:
        return samples
    return samples[..., [2, 1, 0, 3][: samples.shape[2]]]


def tiff_tags(path: str | Path) -> dict[int, Any]:
    """{tag: value} of the first page of a TIFF; {} for other files."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            header += file.read(8) if header[2:3] == b"+" else b""  # BigTIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            return dict(tags)
    except Exception:  # of any type, for a damaged file
        return {}


def deep_size(tags: Mapping[int, Any]) -> tuple[int, int] | None:
    """(W, H) in pixels, upright, of a TIFF with samples that OpenCV reads and Pillow may not, such as float RGB; None
    for others."""
    bits, samples = _bits(tags), tags.get(_SAMPLES, 1)
    size: tuple[Any, Any] = tags.get(_WIDTH), tags.get(_HEIGHT)
    deep = bits in (32, 64) or (bits in (10, 12, 14, 16) and tags.get(_FORMAT, (1,))[0] != 3)
    readable = deep and samples in (1, 3, 4) and tags.get(_COLOURS) in (0, 1, 2)
    if not (readable and tags.get(_PLANES, 1) == 1 and all(isinstance(side, int) and side > 0 for side in size)):
        return None
    width, height = size
    return (height, width) if tags.get(_ORIENTATION) in (5, 6, 7, 8) else (width, height)


def read_deep(path: str | Path, tags: Mapping[int, Any]) -> Image.Image | None:
    """A TIFF with a ``deep_size`` as an RGB image like that of ``to_rgb``; None when it is damaged."""
    samples = decode(path)
    if samples is None or samples.shape[1::-1] != deep_size(tags):
        return None
    alpha = None
    if samples.ndim == 3 and samples.shape[2] == 4 and tags.get(_EXTRA, (0,))[0] in (1, 2):
        alpha = Image.fromarray(to_8_bit(samples[..., 3]))
    return _composite(_from_samples(samples[..., :3] if samples.ndim == 3 else samples, tags), alpha, {})


def describe(tags: Mapping[int, Any]) -> str:
    """The sample format of a TIFF in words, for a message."""
    kind = _FORMATS.get(tags.get(_FORMAT, (1,))[0], "other")
    return f"of {_bits(tags) or 'mixed'}-bit {kind} samples, {tags.get(_SAMPLES, 1)} a pixel"


def _bits(tags: Mapping[int, Any]) -> int:
    """Bits per sample; 0 when they differ."""
    bits = tags.get(_BITS, (1,))
    return bits[0] if len(set(bits)) == 1 else 0


def _from_samples(samples: np.ndarray, tags: Mapping[int, Any]) -> Image.Image:
    """Samples [H,W] or [H,W,3] -> an 8-bit Pillow image."""
    no_data = tags.get(_NO_DATA)
    if no_data is not None and samples.dtype.kind == "f":
        try:
            samples = np.where(samples == samples.dtype.type(str(no_data).strip(" \0")), np.nan, samples)
        except ValueError:
            pass
    values = to_8_bit(samples)
    return Image.fromarray(255 - values if tags.get(_COLOURS) == 0 else values)


def _composite(colours: Image.Image, alpha: Image.Image | None, info: Mapping[Any, Any]) -> Image.Image:
    colours = _to_srgb(colours, info)
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _to_srgb(colours: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Convert by the file's colour profile, or a PNG's gamma; a damaged profile is ignored."""
    if info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(info["icc_profile"]))
            mode = _PROFILE_MODES[profile.profile.xcolor_space.strip()]
            source = colours.convert("RGB") if (colours.mode, mode) == ("L", "RGB") else colours
            if source.mode == mode:
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(source, profile, srgb, outputMode="RGB")  # type: ignore[return-value]
        except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
            pass
    colours = colours.convert("RGB")
    gamma = info.get("gamma", 0)
    if "icc_profile" in info or "srgb" in info or not 0.1 < gamma < 10 or 0.4 < gamma < 0.5:
        return colours
    # A PNG's gamma maps light to samples; sRGB's is about 1 / 2.2.
    return colours.point([round(255 * (value / 255) ** (1 / 2.2 / gamma)) for value in range(256)] * 3)
