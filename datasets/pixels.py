"""From the samples of a file, whatever their depth and colours, to 8-bit sRGB."""

import io

import cv2
import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from utils.cli import InputError

DEPTHS = (8, 10, 12, 14, 16, 32)  # bits that cameras and scanners give, and those of the number type

_WIDTH, _HEIGHT, _BITS, _COLOURS, _ORIENTATION, _SAMPLES, _PLANES = 256, 257, 258, 262, 274, 277, 284  # TIFF's tags
_EXTRA, _FORMAT, _NO_DATA = 338, 339, 42113  # the last is GDAL's
_FILL = 1e30
_FORMATS = {1: "integer", 2: "signed integer", 3: "floating-point"}
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # space of a profile -> Pillow's mode

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it has to say of a file, our sentences say


def to_8_bit(values):
    """Samples of any number type [H, ...] -> uint8 of that shape.

    White is the full scale of the fewest bits (``DEPTHS``) that hold the largest value, because 10, 12 or 14 bits are
    stored in 16; floating-point values up to 1 have white there. Values that fit no such scale (negative, or none
    above a quarter of it) have their own minimum for black and their maximum for white. NaN and -infinity are black,
    infinity is white; magnitudes from 1e30 on, which programs write where they have no value, count as infinite.
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
    for begin in range(0, len(values), 256):  # in strips, because of the memory
        strip = np.nan_to_num(values[begin : begin + 256].astype(np.float64), nan=low).clip(low, high)
        # Divided before the difference is taken, which could overflow.
        strip = (strip / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
        result[begin : begin + 256] = np.rint(strip * 255)
    return result


def to_rgb(picture, path):
    """A decoded Pillow image of any mode, from the file ``path`` -> one of mode RGB in sRGB, transparency over white.

    InputError for a TIFF that is too dark to be told at 8 bits and stored in a way that gives no more.
    """
    info, tags = picture.info, getattr(picture, "tag_v2", {})
    if picture.mode.startswith("I") or picture.mode == "F":
        samples = np.asarray(picture)
        if picture.mode == "I" and tags.get(_FORMAT, (1,))[0] == 1:
            samples = samples.view(np.uint32)  # which Pillow does not have
        clear = info.get("transparency")
        alpha = Image.fromarray(samples != clear) if isinstance(clear, int) else None
        return _compose(_from_samples(samples, tags), alpha, info)
    alpha = None
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
    colours = picture.convert({"L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(picture.mode, "RGB"))
    if colours.mode == "RGB" and (samples := deep_samples(picture, path)) is not None:
        if tags.get(_PLANES) == 2:
            raise InputError(f"{path} uses a few of its 16 bits, and stores its colours apart; save it as 8-bit PNG")
        colours = _from_samples(samples[..., :3], tags)
        alpha = alpha and Image.fromarray(to_8_bit(samples[..., 3]))
    return _compose(colours, alpha, info)


def deep_samples(picture, path):
    """``decode`` of a colour picture whose 8 bits are the upper ones of 16, where those do not do; None for any other.

    They do when they are not dark, but for JPEG 2000, where Pillow rounds them and white becomes 256, which is 0.
    """
    if picture.format not in ("PNG", "TIFF", "JPEG2000"):
        return None
    if picture.format != "JPEG2000" and max(high for _, high in picture.convert("RGB").getextrema()) >= 64:
        return None
    samples = decode(path)
    return samples if samples is not None and samples.ndim == 3 and samples.dtype.itemsize == 2 else None


def decode(path):
    """The samples of a PNG, TIFF or JPEG 2000 at their full depth, [H, W] or RGB(A) [H, W, 3 or 4]; None if they cannot
    be had. TIFFs are upright, others as stored. A PNG that is cut off is not noticed.
    """
    try:
        samples = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (cv2.error, MemoryError):
        return None
    if samples is None or samples.ndim == 2:
        return samples
    return samples[..., [2, 1, 0, 3][: samples.shape[2]]]


def tiff_tags(path):
    """{tag: value} of the first page of a TIFF; {} when ``path`` is none."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            header += file.read(8) if header[2:3] == b"+" else b""  # BigTIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            return dict(tags)
    except Exception:  # as many as there are ways to damage a file
        return {}


def deep_size(tags):
    """(W, H), upright, of a TIFF with samples that OpenCV reads and Pillow may not, such as float RGB; else None."""
    bits, samples = _bits(tags), tags.get(_SAMPLES, 1)
    size = tags.get(_WIDTH), tags.get(_HEIGHT)
    deep = bits in (32, 64) or (bits in (10, 12, 14, 16) and tags.get(_FORMAT, (1,))[0] != 3)
    readable = deep and samples in (1, 3, 4) and tags.get(_COLOURS) in (0, 1, 2)
    if not (readable and tags.get(_PLANES, 1) == 1 and all(isinstance(side, int) and side > 0 for side in size)):
        return None
    return size[::-1] if tags.get(_ORIENTATION) in (5, 6, 7, 8) else size


def read_deep(path, tags):
    """Such a TIFF as in ``to_rgb``; None when it is damaged."""
    samples = decode(path)
    if samples is None or samples.shape[1::-1] != deep_size(tags):
        return None
    alpha = None
    if samples.ndim == 3 and samples.shape[2] == 4 and tags.get(_EXTRA, (0,))[0] in (1, 2):
        alpha = Image.fromarray(to_8_bit(samples[..., 3]))
    return _compose(_from_samples(samples[..., :3] if samples.ndim == 3 else samples, tags), alpha, {})


def describe(tags):
    """What the samples of a TIFF are, for a sentence."""
    kind = _FORMATS.get(tags.get(_FORMAT, (1,))[0], "other")
    return f"of {_bits(tags) or 'mixed'}-bit {kind} samples, {tags.get(_SAMPLES, 1)} a pixel"


def _bits(tags):
    bits = tags.get(_BITS, (1,))
    return bits[0] if len(set(bits)) == 1 else 0


def _from_samples(samples, tags):
    """Samples [H, W] or [H, W, 3] -> an 8-bit Pillow image."""
    no_data = tags.get(_NO_DATA)
    if no_data is not None and samples.dtype.kind == "f":
        try:
            samples = np.where(samples == samples.dtype.type(str(no_data).strip(" \0")), np.nan, samples)
        except ValueError:
            pass
    values = to_8_bit(samples)
    return Image.fromarray(255 - values if tags.get(_COLOURS) == 0 else values)


def _compose(colours, alpha, info):
    colours = _to_srgb(colours, info)
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _to_srgb(colours, info):
    """Follow the file's colour profile, or a PNG's gamma; a damaged profile is no reason to refuse a picture."""
    if info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(info["icc_profile"]))
            mode = _PROFILE_MODES[profile.profile.xcolor_space.strip()]
            source = colours.convert("RGB") if (colours.mode, mode) == ("L", "RGB") else colours
            if source.mode == mode:
                return ImageCms.profileToProfile(source, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
            pass
    colours = colours.convert("RGB")
    gamma = info.get("gamma", 0)
    if "icc_profile" in info or "srgb" in info or not 0.1 < gamma < 10 or 0.4 < gamma < 0.5:
        return colours
    # A PNG's gamma is that from light to samples; sRGB's is about 1 / 2.2.
    return colours.point([round(255 * (value / 255) ** (1 / 2.2 / gamma)) for value in range(256)] * 3)
