"""Photographs from disk, whatever their format, as the one array the rest of the code expects."""

import warnings
from glob import glob
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # the decoders that may touch a user's file
MAX_PIXELS = 100_000_000

_ORIENTATION_TAG = 0x0112
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


def read_image(path):
    """Read one photograph as uint8 RGB [H, W, 3], upright.

    EXIF orientation is applied; grey, palette, CMYK and 16-bit files (scaled by their full range 65535)
    become 8-bit RGB; transparent pixels are laid over white; of several pages or frames the first is taken.
    32-bit integer and float files have no agreed range, so their own minimum..maximum becomes 0..255.

    Raises InputError when the file is missing, empty, not a JPEG / PNG / BMP / WebP / TIFF image,
    truncated or otherwise damaged, or larger than 100 megapixels.
    """
    with _open(path) as image:
        # Pillow's plugins answer damaged files with OSError, SyntaxError, ValueError, struct.error, ...
        try:
            image.load()
            return _to_rgb(_upright(image))
        except Exception as error:
            raise _damaged(path, error) from error


def image_size(path):
    """(H, W) of the upright photograph, from the file's header alone.

    InputError as in ``read_image``, save that damage behind the header is not seen.
    """
    with _open(path) as image:
        width, height = image.size
        # Pillow would decode a whole PNG to look for EXIF behind the pixels.
        exif = image.format != "PNG" or "exif" in image.info
        return (width, height) if exif and _orientation(image) in _SIDEWAYS else (height, width)


def list_images(source, report=None):
    """Return the image files that ``source`` names, as a sorted list of Paths.

    source: a file (taken whatever its suffix), a folder (its own images, not those of its subfolders;
    jpg jpeg png bmp webp tif tiff in any case) or a glob pattern such as ``photos/*.jpg`` or ``photos/**``.
    Raises InputError when nothing is found.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        try:
            found = sorted(filter(_is_image, path.iterdir()))
        except OSError as error:
            raise InputError(f"cannot list the folder {path} ({error.strerror}); check its rights") from error
        if not found:
            raise InputError(f"the folder {path} holds no images ({_suffix_list()}); name another folder")
        return found
    found = sorted(filter(_is_image, map(Path, glob(str(path), recursive=True))))
    if not found:
        raise InputError(f"no image file, folder or pattern matches {source}; check the path")
    return found


def _open(path):
    """Open without decoding. The header alone tells the format and the size."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder where an image file was expected; name a file in it")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot open the image {path} ({error.strerror}); check the path") from error
    if size == 0:
        raise InputError(f"the image {path} is empty (0 bytes); copy it again or leave it out")
    try:
        with warnings.catch_warnings():
            # MAX_PIXELS is our limit; Pillow's own warning, at 89 megapixels, would only confuse.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "over 178 megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read; use a {_suffix_list()} file") from error
    except PermissionError as error:
        raise InputError(f"cannot open the image {path} ({error.strerror}); check its rights") from error
    except Exception as error:
        raise _damaged(path, error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise _too_large(path, f"{width}x{height} pixels")
    return image


def _orientation(image):
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF is no reason to refuse sound pixels
        return None


def _upright(image):
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image):
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image).astype(np.float32) / 65535)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        low, high = values.min(), values.max()
        return _grey_to_rgb((values - low) / max(high - low, np.finfo(np.float64).tiny))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _grey_to_rgb(grey):
    """float [H, W] in 0..1 -> uint8 [H, W, 3]."""
    return np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=2)


def _is_image(path):
    # Names with a leading dot are what macOS and editors leave behind ("._photo.jpg").
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _suffix_list():
    return ", ".join(suffix[1:] for suffix in SUFFIXES[:-1]) + f" or {SUFFIXES[-1][1:]}"


def _too_large(path, size):
    return InputError(
        f"the image {path} is too large ({size}); reduce it to at most {MAX_PIXELS // 1_000_000} megapixels"
    )


def _damaged(path, error):
    return InputError(f"the image {path} is truncated or damaged ({error}); copy it again or leave it out")
