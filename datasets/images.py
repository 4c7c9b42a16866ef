"""Photographs from disk, whatever their format, as the one array the rest of the code expects."""

import os
import struct
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cache
from glob import escape, glob, has_magic
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from datasets import pixels
from utils.cli import InputError

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".mpo",
    ".png",
    ".apng",
    ".bmp",
    ".dib",
    ".webp",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    ".avifs",
    ".heic",
    ".heif",
    ".hif",
    ".jp2",
    ".j2k",
    ".jpx",
    ".jpf",
    ".j2c",
    ".jpc",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".pfm",
    ".ico",
)
# The decoders that may touch a user's file. HEIC comes with pillow-heif, where that is installed.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "ICO")
READ = "JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF, HEIC, JPEG 2000, PPM or ICO"
MAX_PIXELS, MAX_SIDE = 250_000_000, 1_000_000
MAX_TEXT = 2**26

# Pillow's limit of 1 MiB is for servers: image generators and editors write more beside a PNG's pixels.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT, 4 * MAX_TEXT
# Pillow refuses beyond twice its limit, before ours is asked.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Pillow's own decoder of uncompressed TIFFs takes 16-bit planes for 8-bit ones; libtiff reads all.
TiffImagePlugin.READ_LIBTIFF = True

_RESULTS = ("_instances", "_overlay", "_saliency", "_boundary", "_offsets")  # what infer.py adds to a stem
_CLUTTER = ("predictions.json", "labels.csv", "thumbs.db", "desktop.ini")  # nobody takes these for photographs
# Raw files in the guise of TIFFs, of which Pillow sees the preview.
_RAW = (".cr2", ".nef", ".nrw", ".arw", ".sr2", ".dng", ".pef", ".srw", ".orf", ".rw2", ".3fr", ".iiq")
_ORIENTATION_TAG, _SUBFILE_TAG = 0x0112, 254
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # those that exchange height and width
_KINDS = (  # what a file is by the bytes at an offset, for the sentence that says why it is not read
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
    """No decoder of Pillow takes the file."""


def read_image(path):
    """Read one photograph as uint8 RGB [H, W, 3], upright.

    EXIF orientation is applied; of several pages or frames the first is taken, and of a TIFF's pages the first that
    is no thumbnail. An embedded colour profile (or a PNG's gamma) is followed to sRGB; grey, palette, CMYK and Lab
    become RGB; transparent pixels are laid over white. What has more than 8 bits, and floating-point values, are
    scaled as ``datasets.pixels.to_8_bit`` says.

    Raises InputError when the file is missing, empty, of a kind that is not read (``READ`` are), truncated or otherwise
    damaged, larger than 250 megapixels, or longer than a million pixels.
    """
    try:
        with _decoded(path) as picture:
            return np.array(_upright(pixels.to_rgb(picture, path), _orientation(picture)))
    except _Unidentified:
        tags, _ = _deep_tiff(path)
        picture = pixels.read_deep(path, tags) if tags else None
        if picture is None:
            raise
        return np.array(picture)


def image_size(path):
    """(H, W) of the upright photograph, from the file's header alone.

    InputError as in ``read_image``, save that damage behind the header is not seen.
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
        # Pillow turns TIFFs itself, and would decode all of a PNG to look for EXIF behind its pixels.
        upright = picture.format == "TIFF" or (picture.format == "PNG" and not _png_has_exif(path))
        return (width, height) if not upright and _orientation(picture) in _SIDEWAYS else (height, width)


def load(path):
    """The decoded picture as an upright Pillow image, in the mode and the colours of the file.

    InputError as in ``read_image``; more kinds of TIFF are refused.
    """
    with _decoded(path) as picture:
        return _upright(picture, _orientation(picture))


def list_images(source, report=None, results=False):
    """Return the image files that ``source`` names, as a sorted list of Paths.

    source: a file (taken whatever its suffix), a folder (its own images, not those of its subfolders; those of
    ``SUFFIXES`` in any case) or a glob pattern such as ``photos/*.jpg`` or ``photos/**``; brackets in the name of what
    exists are no pattern. Hidden files are left out, and the pictures that infer.py wrote, unless ``results``.
    report: gets one sentence about the files and subfolders that are passed over, where there are any.
    Raises InputError when nothing is found.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return [path]
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(f"{path} is a link to {os.readlink(path)}, which is missing; mend the link")
    if os.path.isdir(path):
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            raise InputError(f"cannot list the folder {path} ({error.strerror}); check its rights") from error
    else:
        # By folder and name, because ``**`` also finds what a link to a folder above repeats.
        entries = sorted({(os.path.realpath(match.parent), match.name): match for match in _matches(path)}.values())
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    files = [entry for entry in visible if os.path.isfile(entry)]
    own = set() if results else _own_results(files)
    images = [file for file in files if file.suffix.lower() in SUFFIXES and file not in own]
    skipped = _describe_skipped(path, set(visible) - set(images) - own)
    if own and not images:
        skipped = f"{len(own)} results of infer.py{'; ' * bool(skipped)}{skipped}"
    if images:
        if report and skipped:
            report(skipped)
        return images
    if not os.path.isdir(path) and not visible:
        raise InputError(f"no image file, folder or pattern matches {source}; check the path")
    reason = f" ({skipped})" if skipped else ""
    raise InputError(f"{path} holds no images{reason}; name {READ} files")


def _matches(path):
    """The paths that a pattern matches; brackets are first a pattern, then, should that find nothing, themselves."""
    parts = path.parts
    known = 0
    while known < len(parts) and os.path.exists(Path(*parts[: known + 1])):
        known += 1
    begin, rest = escape(str(Path(*parts[:known]))) if known else "", parts[known:]
    for pattern in (rest, [part.replace("[", "[[]") for part in rest]):
        found = glob(os.path.join(begin, *pattern), recursive=True)
        if found or not has_magic(str(path)):
            break
    return sorted(map(Path, found), reverse=True)


def _own_results(files):
    """Those of ``files`` that infer.py wrote: <stem>_<result>.png beside predictions.json, or beside the photograph
    <stem> and its instances."""
    names, stems = set(files), {(file.parent, file.stem) for file in files if file.suffix.lower() in SUFFIXES}
    recorded = {folder for folder in {file.parent for file in files} if os.path.isfile(folder / "predictions.json")}
    own = set()
    for file in files:
        stem, _, kind = file.stem.rpartition("_")
        if stem and file.suffix == ".png" and f"_{kind}" in _RESULTS:
            beside = (file.parent, stem) in stems and file.with_name(f"{stem}_instances.png") in names
            if file.parent in recorded or beside:
                own.add(file)
    return own


def _describe_skipped(source, entries):
    """One sentence about what is passed over in a folder or by a pattern; "" when that is nothing worth a word."""
    folders = sum(os.path.isdir(entry) for entry in entries)
    files = [entry for entry in sorted(entries) if not os.path.isdir(entry) and not _is_clutter(entry.name.lower())]
    kinds = Counter(_kind_of_entry(file) for file in files)
    several = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
    words = []
    if files:
        more = ", ..." if len(kinds) > 5 else ""
        words.append(f"{len(files)} file{'s' * (len(files) > 1)} skipped: {several}{more}")
    if folders and "**" not in source.parts:
        inner = source if os.path.isdir(source) else source.parent
        words.append(f'{folders} subfolder{"s" * (folders > 1)} skipped, which "{inner / "**"}" takes too')
    return "; ".join(words)


def _is_clutter(name):
    return name in _CLUTTER or (name.startswith("finished-") and name.endswith(".jsonl"))  # infer.py's journal


def _kind_of_entry(path):
    if os.path.islink(path) and not os.path.exists(path):
        return "broken link"
    if not os.path.isfile(path):
        return "no regular file"
    return path.suffix.lower() or "without suffix"


def _open(path):
    """Open without decoding. The header alone tells the format and the size."""
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
            # What Pillow remarks on the size, or on odd headers, would only confuse beside our own sentences.
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
            _leave_thumbnails(path, picture)
        _check_size(path, *picture.size)
    except InputError:
        picture.close()
        raise
    return picture


@cache
def _decoders():
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _leave_thumbnails(path, picture):
    """Go to the first page that is not marked as a reduced one; InputError when there is none, as in raw files."""
    page = 0
    try:
        if path.suffix.lower() in _RAW:
            raise EOFError
        while picture.tag_v2.get(_SUBFILE_TAG, 0) & 1:
            page += 1
            picture.seek(page)
    except Exception as error:  # EOFError behind the last page; whatever else for one that Pillow cannot read
        raise InputError(
            f"{path} holds a preview and no picture that is read, as raw files of cameras do; develop it "
            "to JPEG or TIFF"
        ) from error


def _check_size(path, width, height):
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(path, f"{width}x{height} pixels")


@contextmanager
def _decoded(path):
    """The decoded picture as the file stores it. Whatever fails within is the damage of the file."""
    with _open(path) as picture:
        # Pillow's plugins answer damaged files with OSError, SyntaxError, ValueError, struct.error, ...
        try:
            picture.load()
            yield picture
        except InputError:
            raise
        except Exception as error:
            packing = f", {picture.info.get('compression')} compression" if picture.format == "TIFF" else ""
            raise _damaged(path, f"{error}{packing}") from error


def _deep_tiff(path):
    """(tags, (W, H)) of a TIFF that OpenCV reads where Pillow does not, else ({}, None); InputError when too large."""
    tags = pixels.tiff_tags(path)
    size = pixels.deep_size(tags)
    if size is None:
        return {}, None
    _check_size(path, *size)
    return tags, size


def _orientation(picture):
    try:
        return picture.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF is no reason to refuse sound pixels
        return None


def _upright(picture, orientation):
    if orientation not in _UPRIGHT:
        return picture
    turned = picture.transpose(_UPRIGHT[orientation])
    turned.format = picture.format
    return turned


def _png_has_exif(path):
    """Whether any chunk of a PNG holds EXIF or XMP, also behind its pixels; seeks from chunk to chunk."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            begin = file.read(min(length, 32))
            if kind == b"eXIf" or begin.startswith((b"XML:com.adobe.xmp", b"Raw profile type")):
                return True
            file.seek(length - len(begin) + 4, os.SEEK_CUR)
    return False


def _unidentified(path):
    """The sentence that says why no decoder takes the file."""
    with open(path, "rb") as file:
        begin = file.read(512)
    text = begin.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    fits = (name for at, mark, name in _KINDS if begin.startswith(mark, at) or text.startswith(mark.lower()))
    kind = next(fits, None)
    if kind == "HEIC" and "HEIF" not in _decoders():
        return InputError(f"{path} is a HEIC file, which needs one library more: pip install pillow-heif")
    if kind == "Git LFS pointer":
        return InputError(f"{path} is no image but a pointer of Git LFS; get the image with git lfs pull")
    if kind and kind in READ:
        samples = f" {pixels.describe(tags)}" if (tags := pixels.tiff_tags(path)) else ""
        return _Unidentified(
            f"{path} is a {kind} file{samples} that is damaged or of a kind that is not read; save it "
            "again as 8-bit PNG or JPEG"
        )
    looks = f" (it looks like {kind})" if kind else ""
    return InputError(f"{path} is not an image that can be read{looks}; save it as JPEG or PNG")


def _too_large(path, size):
    return InputError(
        f"the image {path} is too large ({size}); reduce it to at most {MAX_PIXELS // 1_000_000} "
        f"megapixels and {MAX_SIDE} pixels a side"
    )


def _damaged(path, error):
    if "MAX_TEXT" in str(error):
        return InputError(
            f"the image {path} holds more than {MAX_TEXT >> 20} MiB of text beside its pixels; save it again without"
        )
    reason = " ".join(str(error).split())  # in one line
    return InputError(f"the image {path} is truncated or damaged ({reason}); copy it again or leave it out")
