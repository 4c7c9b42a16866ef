"""Photographs of any format as upright uint8 RGB arrays."""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from datasets import pixels
from datasets.listing import READABLE
from utils.cli import InputError

# The decoders of Pillow that are used. HEIC is added by pillow-heif, where that is installed.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "ICO")
MAX_PIXELS, MAX_SIDE = 250_000_000, 1_000_000
MAX_TEXT = 2**26  # bytes of text beside the pixels of a PNG

# Pillow's limit of 1 MiB protects servers; image generators and editors write more text into a PNG.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT, 4 * MAX_TEXT
# Pillow itself refuses images of more than twice this.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Pillow's own decoder of uncompressed TIFFs mistakes 16-bit planes for 8-bit ones; libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True

# Raw files that are TIFFs, of which Pillow would read the preview.
_RAW = (".cr2", ".nef", ".nrw", ".arw", ".sr2", ".dng", ".pef", ".srw", ".orf", ".rw2", ".3fr", ".iiq")
_ORIENTATION_TAG, _SUBFILE_TAG = 0x0112, 254
_UPRIGHT = {  # EXIF orientation -> the transposition that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width
_SIGNATURES = (  # (offset, bytes, kind of file), for the message about a file that is not read
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG", "PNG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"ftypcrx", "camera raw"),
    (0, b"FUJIFILM", "camera raw"),
    (0, b"IIU\0", "camera raw"),
    (0, b"IIRO", "camera raw"),
    (4, b"ftyp", "video"),
    (8, b"AVI ", "video"),
    (0, b"8BPS", "Photoshop"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"qoif", "QOI"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RAD", "Radiance HDR"),
    (0, b"PF\n", "colour PFM"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"<!doctype", "HTML"),
    (0, b"<html", "HTML"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"version https://git-lfs", "Git LFS pointer"),
)


class _Unidentified(InputError):
    """No decoder of Pillow reads the file."""


def read_image(path: str | Path) -> np.ndarray:
    """Read one photograph as uint8 RGB [H,W,3], upright, of the file's own size in pixels.

    EXIF orientation is applied; of several pages or frames the first is read, and of a TIFF's pages the first that
    is no thumbnail. Colours are converted to sRGB by an embedded profile (or a PNG's gamma); grey, palette, CMYK and
    Lab become RGB; transparent pixels are composited over white. Samples of more than 8 bits, and floating-point
    samples, are scaled by ``datasets.pixels.to_8_bit``.

    Raises InputError when the file is missing, empty, of another kind than ``READABLE``, truncated or otherwise
    damaged, larger than 250 megapixels, or longer than a million pixels.
    """
    try:
        with _decoded(path) as picture:
            return np.array(_upright(pixels.to_rgb(picture, path), _orientation(picture)))
    except _Unidentified:
        tags, _ = _deep_tiff(path)
        deep = pixels.read_deep(path, tags) if tags else None
        if deep is None:
            raise
        return np.array(deep)


def image_size(path: str | Path) -> tuple[int, int]:
    """(H, W) in pixels of the upright photograph, from the file's header alone.

    Raises InputError as ``read_image`` does, except for damage behind the header.
    """
    try:
        picture = _open(path)
    except _Unidentified:
        _, size = _deep_tiff(path)
        if size is None:
            raise
        return size[::-1]
    with picture:
        width, height = picture.size
        # Pillow rotates TIFFs itself, and would decode all of a PNG to find EXIF behind its pixels.
        upright = picture.format == "TIFF" or (picture.format == "PNG" and not _png_has_exif(path))
        return (width, height) if not upright and _orientation(picture) in _SIDEWAYS else (height, width)


def read_picture(path: str | Path) -> Image.Image:
    """The decoded picture as an upright Pillow image, in the mode and the colours of the file.

    Raises InputError as ``read_image`` does, and for TIFFs that only OpenCV reads.
    """
    with _decoded(path) as picture:
        return _upright(picture, _orientation(picture))


def _open(path: str | Path) -> Image.Image:
    """The picture with its format and size, from the header; the pixels are not decoded."""
    path = Path(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder where an image file was expected; name a file in it")
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise InputError(f"cannot open the image {path} ({reason}); check the path") from error
    if not os.path.isfile(path):
        raise InputError(f"{path} is no regular file; name an image file")
    if size == 0:
        raise InputError(f"the image {path} is empty (0 bytes); copy it again or leave it out")
    try:
        with warnings.catch_warnings():
            # Pillow's warnings about sizes and odd headers.
            warnings.simplefilter("ignore")
            picture = Image.open(path, formats=_decoders())
    except Image.DecompressionBombError as error:
        raise _too_large(path, f"over {2 * MAX_PIXELS // 1_000_000} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise _unidentified(path) from error
    except PermissionError as error:
        raise InputError(f"cannot open the image {path} ({error.strerror}); check its rights") from error
    except Exception as error:
        raise _damaged(path, error) from error
    try:
        if picture.format == "TIFF":
            _seek_first_page(path, picture)
        _check_size(path, *picture.size)
    except InputError:
        picture.close()
        raise
    return picture


@cache
def _decoders() -> tuple[str, ...]:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return PILLOW_FORMATS
    register_heif_opener()
    return (*PILLOW_FORMATS, "HEIF")


def _seek_first_page(path: Path, picture: Any) -> None:
    """Select the first page of a TIFF that is not marked as a thumbnail; InputError without one, as in raw files."""
    page = 0
    try:
        if path.suffix.lower() in _RAW:
            raise EOFError
        while picture.tag_v2.get(_SUBFILE_TAG, 0) & 1:
            page += 1
            picture.seek(page)
    except Exception as error:  # EOFError behind the last page; others for a page that Pillow cannot read
        raise InputError(
            f"{path} holds a preview and no picture that is read, as raw files of cameras do; develop it "
            "to JPEG or TIFF"
        ) from error


def _check_size(path: str | Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(path, f"{width}x{height} pixels")


@contextmanager
def _decoded(path: str | Path) -> Iterator[Image.Image]:
    """Context with the decoded picture as the file stores it; its errors are reported as damage of the file."""
    with _open(path) as picture:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ... for damaged files.
        try:
            picture.load()
            yield picture
        except InputError:
            raise
        except Exception as error:
            packing = f", {picture.info.get('compression')} compression" if picture.format == "TIFF" else ""
            raise _damaged(path, f"{error}{packing}") from error


def _deep_tiff(path: str | Path) -> tuple[dict[int, Any], tuple[int, int] | None]:
    """(tags, (W, H)) of a TIFF that OpenCV reads and Pillow does not, else ({}, None); InputError when too large."""
    tags = pixels.tiff_tags(path)
    size = pixels.deep_size(tags)
    if size is None:
        return {}, None
    _check_size(path, *size)
    return tags, size


def _orientation(picture: Image.Image) -> int | None:
    try:
        return picture.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the pixels are readable even where EXIF is damaged
        return None


def _upright(picture: Image.Image, orientation: int | None) -> Image.Image:
    if orientation not in _UPRIGHT:
        return picture
    turned = picture.transpose(_UPRIGHT[orientation])
    turned.format = picture.format
    return turned


def _png_has_exif(path: str | Path) -> bool:
    """Whether any chunk of a PNG, also behind its pixels, holds EXIF or XMP."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            begin = file.read(min(length, 32))
            if kind == b"eXIf" or begin.startswith((b"XML:com.adobe.xmp", b"Raw profile type")):
                return True
            file.seek(length - len(begin) + 4, os.SEEK_CUR)
    return False


def _unidentified(path: Path) -> InputError:
    """The InputError that names the kind of a file that no decoder reads."""
    with open(path, "rb") as file:
        begin = file.read(512)
    text = begin.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    fits = (name for at, mark, name in _SIGNATURES if begin.startswith(mark, at) or text.startswith(mark.lower()))
    kind = next(fits, None)
    if kind == "HEIC" and "HEIF" not in _decoders():
        return InputError(f"{path} is a HEIC file, which needs one library more: pip install pillow-heif")
    if kind == "Git LFS pointer":
        return InputError(f"{path} is no image but a pointer of Git LFS; get the image with git lfs pull")
    if kind and kind in READABLE:
        samples = f" {pixels.describe(tags)}" if (tags := pixels.tiff_tags(path)) else ""
        return _Unidentified(
            f"{path} is a {kind} file{samples} that is damaged or of a kind that is not read; save it "
            "again as 8-bit PNG or JPEG"
        )
    guess = f" (it looks like {kind})" if kind else ""
    return InputError(f"{path} is not an image that can be read{guess}; save it as JPEG or PNG")


def _too_large(path: str | Path, size: str) -> InputError:
    return InputError(
        f"the image {path} is too large ({size}); reduce it to at most {MAX_PIXELS // 1_000_000} "
        f"megapixels and {MAX_SIDE} pixels a side"
    )


def _damaged(path: str | Path, error: Exception | str) -> InputError:
    if "MAX_TEXT" in str(error):
        return InputError(
            f"the image {path} holds more than {MAX_TEXT >> 20} MiB of text beside its pixels; save it again without"
        )
    reason = " ".join(str(error).split())  # on one line
    return InputError(f"the image {path} is truncated or damaged ({reason}); copy it again or leave it out")
