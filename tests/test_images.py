"""Every kind of file a user may hand over: what is read, and what is refused in one clear sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets.images import MAX_PIXELS, list_images, read_image
from utils.cli import InputError

MARKS = np.array([[[200, 20, 20], [20, 200, 20], [20, 20, 200]], [[90, 90, 90], [0, 0, 0], [250, 250, 250]]])


def picture(height=40, width=60):
    """A smooth colour picture no two of whose quarters are alike."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], axis=-1).astype(np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def is_one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    assert all(str(word) in text for word in words), text
    return True


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF", "webp"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", picture(), **options))
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, picture())


def test_jpeg(tmp_path):
    image = read_image(save(tmp_path / "a.jpg", picture(), quality=95))
    assert np.abs(image.astype(int) - picture()).max() < 12


def test_format_is_told_by_content_not_by_name(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.jpg", picture(), format="PNG")), picture())


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_by_its_full_range(tmp_path, suffix):
    grey = np.array([[0, 257, 32896, 65535], [128, 129, 65278, 65279]], dtype=np.uint16)
    image = read_image(save(tmp_path / f"a.{suffix}", grey))
    expected = np.rint(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(image, np.stack([expected] * 3, axis=-1))


def test_16_bit_big_endian_tiff(tmp_path):
    grey = np.array([[0, 257, 65535]], dtype=np.uint16)
    Image.frombytes("I;16B", (3, 1), grey.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0, :, 0], [0, 1, 255])


def test_16_bit_colour(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_rgb16(np.array([[[0, 32896, 65535], [65535, 0, 257]]], dtype=np.uint16)))
    np.testing.assert_array_equal(read_image(path), [[[0, 128, 255], [255, 0, 1]]])


def test_float_and_32_bit_are_stretched(tmp_path):
    values = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    np.testing.assert_array_equal(read_image(save(tmp_path / "f.tif", values))[0, :, 1], [0, 128, 255])
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "i.tif", np.array([[0, 10**6]], dtype=np.int32)))[0, :, 2], [0, 255]
    )
    flat = read_image(save(tmp_path / "flat.tif", np.full((2, 2), 7, dtype=np.float32)))
    np.testing.assert_array_equal(flat, np.zeros((2, 2, 3)))
    odd = np.array([[np.nan, 1.0, np.inf]], dtype=np.float32)
    np.testing.assert_array_equal(read_image(save(tmp_path / "nan.tif", odd))[0, :, 0], [0, 255, 0])


def test_grey_and_bilevel(tmp_path):
    grey = picture()[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey)), np.stack([grey] * 3, axis=-1))
    Image.fromarray(grey > 100).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[..., 2], 255 * (grey > 100))


def test_palette(tmp_path):
    indexed = Image.fromarray(MARKS.astype(np.uint8)).quantize(6, dither=Image.Dither.NONE)
    indexed.save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), MARKS)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 128, 255]
    image = read_image(save(tmp_path / "a.png", rgba))
    np.testing.assert_allclose(image[0], [[255, 255, 255], [227, 127, 127], [200, 0, 0]], atol=1)
    image = read_image(save(tmp_path / "la.png", np.array([[[0, 0], [0, 255]]], dtype=np.uint8)))
    np.testing.assert_array_equal(image[0], [[255] * 3, [0] * 3])


def test_transparent_palette_entry_is_laid_over_white(tmp_path):
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.putdata([0, 1])
    indexed.save(tmp_path / "p.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png")[0], [[10, 20, 30], [255, 255, 255]])


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "c.jpg").astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    # What a camera held that way stores: `upright` seen through the inverse of the tag's meaning.
    upright = picture()
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    image = read_image(path)
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).max() < 12


def test_exif_orientation_of_16_bit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 257, 514]], dtype=np.uint16)
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.png", stored, exif=exif))[..., 0], [[0], [1], [2]]
    )


def test_damaged_exif_does_not_matter(tmp_path):
    path = save(tmp_path / "a.jpg", picture(), quality=95, exif=b"Exif\x00\x00 this is no TIFF header")
    assert np.abs(read_image(path).astype(int) - picture()).max() < 12


@pytest.mark.parametrize("height, width", [(1, 1), (3, 4000), (4000, 3)])
def test_odd_sizes(tmp_path, height, width):
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.png", picture(height, width))), picture(height, width)
    )


def test_6000x6000(tmp_path):
    Image.new("RGB", (6000, 6000), (10, 200, 30)).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (6000, 6000, 3)
    assert np.abs(image[::1000, ::1000].astype(int) - [10, 200, 30]).max() < 6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9_500, 10_001, 12_000, 60_000])
def test_more_than_100_megapixels_are_refused_before_decoding(tmp_path, side):
    # Only the header is written: were it decoded, "truncated" would be the complaint.
    path = tmp_path / "huge.png"
    path.write_bytes(png_rgb16(np.zeros((1, 1, 3), dtype=np.uint16), claimed=side)[:60])
    with pytest.raises(InputError) as error:
        read_image(path)
    complaint = "too large" if side**2 > MAX_PIXELS else "truncated"
    assert is_one_sentence(error, path, complaint)


def test_missing(tmp_path):
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "none.jpg")
    assert is_one_sentence(error, tmp_path / "none.jpg", "No such file")


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(InputError) as error:
        read_image(tmp_path)
    assert is_one_sentence(error, tmp_path, "is a folder")


def test_empty_file(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "a.jpg")
    assert is_one_sentence(error, "a.jpg", "empty")


@pytest.mark.parametrize("content", [b"words\n" * 50, b"\x00" * 500, b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9])
def test_not_an_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "a.jpg")
    assert is_one_sentence(error, "a.jpg", "not an image")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as error:
        read_image(path)
    assert is_one_sentence(error, path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on what it finds
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_damage_anywhere_gives_an_image_or_an_input_error(tmp_path, suffix):
    random = np.random.default_rng(1)
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    path = tmp_path / f"a.{suffix}"
    refused = 0
    for _ in range(150):
        content = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
        where = random.integers(0, min(200, len(content)), 3)
        content[where] = random.integers(0, 256, 3)
        path.write_bytes(content.tobytes())
        try:
            image = read_image(path)
        except InputError:
            refused += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert refused > 0


def test_list_a_file(tmp_path):
    path = save(tmp_path / "a.jpg", picture())
    assert list_images(path) == [path] and list_images(str(path)) == [path]


def test_list_a_folder(tmp_path):
    for name in ["b.jpg", "a.JPEG", "c.png", "d.bmp", "e.WebP", "f.tif", "g.tiff"]:
        (tmp_path / name).touch()
    for name in ["notes.txt", "h.gif", "._b.jpg"]:
        (tmp_path / name).touch()
    (tmp_path / "sub.jpg").mkdir()
    (tmp_path / "sub.jpg" / "z.jpg").touch()
    assert [path.name for path in list_images(tmp_path)] == [
        "a.JPEG", "b.jpg", "c.png", "d.bmp", "e.WebP", "f.tif", "g.tiff",
    ]  # fmt: skip


def test_list_a_pattern(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ["b.jpg", "a.jpg", "a.txt", "c.png", "sub/d.jpg"]:
        (tmp_path / name).touch()

    def found(pattern):
        return [str(path.relative_to(tmp_path)) for path in list_images(f"{tmp_path}/{pattern}")]

    assert found("*.jpg") == ["a.jpg", "b.jpg"]
    assert found("a.*") == ["a.jpg"]
    assert found("**") == ["a.jpg", "b.jpg", "c.png", "sub/d.jpg"]


def test_a_file_name_that_looks_like_a_pattern(tmp_path):
    path = save(tmp_path / "photo[1].jpg", picture())
    assert list_images(path) == [path]


@pytest.mark.parametrize("source", ["", "none.jpg", "*.jpg", "nowhere"])
def test_list_nothing(tmp_path, source):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError) as error:
        list_images(tmp_path / source)
    assert is_one_sentence(error, tmp_path / source)


def png_rgb16(array, claimed=None):
    """PNG file of uint16 RGB [H, W, 3], which Pillow cannot write; the header may claim another side."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = (claimed, claimed) if claimed else array.shape[:2]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in array)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
