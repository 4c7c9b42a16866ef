"""Image files of every kind: the pixels that are read, and the message for files that are not read."""

import io
import struct
import sys
import zlib
from itertools import product

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from datasets import images
from datasets.images import MAX_PIXELS, MAX_SIDE, image_size, read_image
from datasets.listing import list_images
from datasets.masks import MaskFile, list_masks, read_instance_mask, read_saliency_mask
from utils.cli import InputError

MARKS = np.array([[[200, 20, 20], [20, 200, 20], [20, 20, 200]], [[90, 90, 90], [0, 0, 0], [250, 250, 250]]])


def picture(height=40, width=60):
    """A smooth colour picture whose quarters all differ."""
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


def test_format_is_detected_from_the_content(tmp_path):
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
    odd = np.array([[np.nan, 5.0, 10.0, np.inf, -1e38]], dtype=np.float32)
    np.testing.assert_array_equal(read_image(save(tmp_path / "nan.tif", odd))[0, :, 0], [0, 0, 255, 255, 0])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix, bands", [*product(("png", "tiff"), (1, 3, 4)), ("jp2", 1), ("jp2", 3)])
def test_fewer_bits_in_16_are_not_black(tmp_path, bits, suffix, bands):
    rgb = picture()
    rgb[0, 0] = 255
    samples = np.rint(rgb / 255 * (2**bits - 1)).astype(np.uint16)
    samples = np.dstack([samples[..., ::-1], np.full(rgb.shape[:2], 65535, np.uint16)])[..., :bands].squeeze()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(cv2.imencode(path.suffix, samples, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes())
    expected = rgb if bands > 1 else rgb[..., 2:]
    assert np.abs(read_image(path).astype(int) - expected).max() <= (1 if suffix != "jp2" else 4)


@pytest.mark.parametrize("dtype, white", [(np.float32, 1), (np.float64, 1), (np.float32, 255), (np.uint32, 2**32 - 1)])
@pytest.mark.parametrize("bands", [1, 3])
def test_float_and_32_bit_tiffs_keep_their_scale(tmp_path, dtype, white, bands):
    rgb = picture()
    (tmp_path / "a.tif").write_bytes(tiff((rgb / 255 * white).astype(dtype)[..., :bands]))
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - rgb[..., :bands]).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 3, 9]], np.uint16),
        np.array([[-5.0, 1000, 3019]], np.float32),
        np.array([[7, 1, 1]], np.float32) / 99,
        np.array([[1, 2, 30000]], np.int16),
    ],
)
def test_any_range_of_values_is_visible(tmp_path, values):
    (tmp_path / "a.tif").write_bytes(tiff(values[..., None]))
    assert 64 < read_image(tmp_path / "a.tif").max()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_whose_zero_is_white(tmp_path, dtype):
    grey = picture()[..., :1]
    samples = (255 - grey) if dtype == np.uint8 else (1 - grey / 255) * (65535 if dtype == np.uint16 else 1)
    (tmp_path / "a.tif").write_bytes(tiff(np.rint(samples * 9999) / 9999 if dtype == np.float32 else samples, dtype, 0))
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - grey).max() <= 1


def test_tiffs_that_store_colours_apart(tmp_path):
    deep = picture().astype(np.uint16) * 257
    (tmp_path / "a.tif").write_bytes(tiff(deep, planes=2))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), picture())
    (tmp_path / "b.tif").write_bytes(tiff(deep >> 6, planes=2))  # neither library reads these at their full depth
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "b.tif")
    assert is_one_sentence(error, "b.tif", "stores its colours apart", "8-bit PNG")


def test_kinds_of_tiff_that_are_not_read_are_named(tmp_path):
    for samples, words in (
        (picture().astype(np.float16), "16-bit floating-point samples, 3 a pixel"),
        (np.zeros((4, 4, 6), np.uint16), "16-bit integer samples, 6 a pixel"),
    ):
        (tmp_path / "a.tif").write_bytes(tiff(samples))
        for read in (read_image, image_size):
            with pytest.raises(InputError) as error:
                read(tmp_path / "a.tif")
            assert is_one_sentence(error, "a.tif is a TIFF", words, "not read")


def test_thumbnails_in_tiffs_are_skipped(tmp_path):
    thumbnail, page = (Image.fromarray(picture(*size)) for size in ((4, 6), (40, 60)))
    thumbnail.save(tmp_path / "a.tif", save_all=True, append_images=[page], tiffinfo={254: 1})
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHII", 254, 4, 1, 1)
    first, second = content.find(entry), content.rfind(entry)
    if first < second:  # the tag was written to both pages
        content = content[:second] + struct.pack("<HHII", 254, 4, 1, 0) + content[second + 12 :]
    (tmp_path / "a.tif").write_bytes(content)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), picture())
    for name, subfile in (("raw.tif", 1), ("a.NEF", 0)):
        (tmp_path / name).write_bytes(tiff(picture(4, 6), subfile=subfile))
        with pytest.raises(InputError) as error:
            read_image(tmp_path / name)
        assert is_one_sentence(error, f"{name} holds a preview", "raw files of cameras")


@pytest.mark.parametrize("name", ["a.gif", "a.avif", "a.jp2", "a.j2k", "a.ppm", "a.ico", "a.jfif", "a.dib"])
def test_further_formats(tmp_path, name):
    options = {"jfif": {"format": "JPEG", "quality": 95}, "avif": {"quality": 95}, "ico": {"sizes": [(60, 40)]}}
    path = save(tmp_path / name, picture(), **options.get(name[2:], {}))
    assert list_images(tmp_path) == [path] and image_size(path) == (40, 60)
    assert np.abs(read_image(path).astype(int) - picture()).mean() < (3 if name == "a.gif" else 2)


@pytest.mark.parametrize(
    "name, content",
    [
        ("12.pgm", b"P2 3 1 4095 0 2048 4095"),
        ("16.pgm", b"P5 3 1 65535\n" + bytes([0, 0, 128, 0, 255, 255])),
        ("f.pfm", b"Pf\n3 1\n-1\n" + np.array([0, 0.5, 1], "<f4").tobytes()),
    ],
)
def test_portable_maps_are_scaled_by_their_header(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    np.testing.assert_allclose(read_image(tmp_path / name)[0, :, 1], [0, 128, 255], atol=1)


@pytest.mark.parametrize(
    "name, kind",
    [("a.gif", None), ("a.webp", None), ("a.png", None), ("a.tif", None), ("a.avif", None), ("a.jpg", "MPO")],
)
def test_the_first_frame_is_taken(tmp_path, name, kind):
    first, second = Image.new("RGB", (30, 20), (250, 20, 20)), Image.new("RGB", (30, 20), (20, 20, 250))
    first.save(tmp_path / name, kind, save_all=True, append_images=[second])
    assert np.abs(read_image(tmp_path / name).astype(int) - [250, 20, 20]).max() < 16


@pytest.mark.parametrize("suffix, mode", [*product(("png", "tif", "webp"), ("RGB", "RGBA")), ("jpg", "RGB")])
def test_colour_profiles_are_followed(tmp_path, suffix, mode):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture()).convert(mode).save(path, icc_profile=red_is_blue(), **options)
    assert np.abs(read_image(path).astype(int) - picture()[..., ::-1]).max() < (12 if suffix == "jpg" else 3)


@pytest.mark.parametrize("profile", [b"\0" * 1_500_000, b"no profile", "truncated", "of other colours"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_unusable_colour_profiles_are_ignored(tmp_path, profile, mode):
    profile = {"truncated": red_is_blue()[:300], "of other colours": lab_profile()}.get(profile, profile)
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.array(image.convert("RGB")))


def test_gamma_of_a_png(tmp_path):
    linear = np.rint(255 * (picture() / 255) ** 2.2).astype(np.uint8)
    for gamma, stored in ((100_000, linear), (45_455, picture()), (0, picture())):
        content = save(tmp_path / "a.png", stored).read_bytes()
        (tmp_path / "a.png").write_bytes(content[:33] + chunk(b"gAMA", struct.pack(">I", gamma)) + content[33:])
        dark = picture() < 40  # where few of the linear levels are
        difference = np.abs(read_image(tmp_path / "a.png").astype(int) - picture())
        assert difference[~dark].max() <= 4 and difference[dark].max() <= 20


@pytest.mark.parametrize("zipped", [True, False])
def test_long_text_in_a_png(tmp_path, zipped):
    text = PngInfo()
    text.add_itxt("workflow", "ü" * 3_000_000, zip=zipped)
    path = save(tmp_path / "a.png", picture(), pnginfo=text)
    np.testing.assert_array_equal(read_image(path), picture())
    assert image_size(path) == (40, 60)
    text.add_text("bomb", "x" * 100_000_000, zip=True)
    with pytest.raises(InputError) as error:
        read_image(save(tmp_path / "a.png", picture(), pnginfo=text))
    assert is_one_sentence(error, "a.png holds more than 64 MiB of text") and "damaged" not in str(error.value)


def test_lab_tiff(tmp_path):
    lab = ImageCms.profileToProfile(
        Image.fromarray(picture()), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "a.tif")
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - picture()).mean() < 3
    assert read_saliency_mask(tmp_path / "a.tif").shape == picture().shape[:2]


def test_heic_names_the_library_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._decoders.cache_clear()
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 400)
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "a.heic")
    images._decoders.cache_clear()
    assert is_one_sentence(error, "a.heic", "pip install pillow-heif")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\x0a" + b"\0" * 99, "JPEG XL"),
        (b"8BPS" + b"\0" * 99, "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "HTML"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\xff\xd8\xff\xc3" + b"\0" * 99, "a JPEG"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\0\0\0\x18ftypcrx ", "camera raw"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "a.jpg")
    assert is_one_sentence(error, "a.jpg", words)


def test_more_than_a_million_pixels_in_a_row_are_refused(tmp_path):
    for width in (MAX_SIDE, MAX_SIDE + 1):
        Image.new("L", (width, 1), 99).save(tmp_path / f"{width}.png")
    assert read_image(tmp_path / f"{MAX_SIDE}.png").shape == (1, MAX_SIDE, 3)
    for read in (read_image, image_size):
        with pytest.raises(InputError) as error:
            read(tmp_path / f"{MAX_SIDE + 1}.png")
        assert is_one_sentence(error, "too large", f"{MAX_SIDE + 1}x1 pixels")


WHITE_AND_TWO = np.array([[[255, 0, 0, 255], [0, 255, 0, 255], [255, 255, 255, 0], [255, 255, 255, 255]]], np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_transparent_parts_of_instance_masks_are_background(tmp_path, name):
    path = save(tmp_path / name, WHITE_AND_TWO, **({"lossless": True} if name == "a.webp" else {}))
    np.testing.assert_array_equal(read_instance_mask(path), [[2, 1, 0, 255]])


def test_transparent_parts_of_grey_and_palette_masks_are_background(tmp_path):
    grey = np.array([[1, 2, 255, 255]], np.uint8)
    path = save(tmp_path / "la.png", np.dstack([grey, [[255, 255, 0, 255]]]).astype(np.uint8))
    np.testing.assert_array_equal(read_instance_mask(path), [[1, 2, 0, 255]])
    np.testing.assert_array_equal(read_instance_mask(save(tmp_path / "l.png", grey, transparency=255)), [[1, 2, 0, 0]])
    indexed = Image.fromarray(np.array([[3, 1, 2, 255]], np.uint8))
    indexed.putpalette(np.arange(768, dtype=np.uint8).tobytes())
    indexed.save(tmp_path / "p.png", transparency=3)
    np.testing.assert_array_equal(read_instance_mask(tmp_path / "p.png"), [[0, 1, 2, 255]])
    hidden = WHITE_AND_TWO * np.array([1, 1, 1, 0], np.uint8)  # an alpha plane that was never filled
    np.testing.assert_array_equal(read_instance_mask(save(tmp_path / "all.png", hidden)), [[2, 1, 255, 255]])
    np.testing.assert_array_equal(read_saliency_mask(save(tmp_path / "s.png", WHITE_AND_TWO))[0, 2:], [0, 1])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_are_upright_and_have_a_size(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = np.kron(np.array([[1, 2, 3]], np.uint8), np.ones((3, 3), np.uint8))
    mask = MaskFile(save(tmp_path / f"a.{suffix}", labels, exif=exif))
    np.testing.assert_array_equal(mask.read(), labels.T)
    assert mask.size() == (9, 3)


@pytest.mark.parametrize("name", ["a.webp", "a.avif", "a.jp2", "a.tif"])
def test_lossy_masks_are_refused(tmp_path, name):
    options = {"compression": "jpeg"} if name == "a.tif" else {}
    with pytest.raises(InputError) as error:
        read_instance_mask(save(tmp_path / name, picture(), **options))
    assert is_one_sentence(error, name, "blurs instance labels", "PNG")


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    # What a camera in that orientation stores.
    upright = picture()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    image = read_image(path)
    assert image.shape == upright.shape and image_size(path) == upright.shape[:2]
    assert np.abs(image.astype(int) - upright).max() < 12


def test_exif_orientation_of_16_bit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 257, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", stored, exif=exif))[..., 0], [[0], [1], [255]])


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = (
        b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" '
        b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:rdf="rdf"/></x:xmpmeta>'
    )
    content = save(tmp_path / "a.png", picture()).read_bytes()
    for behind in (chunk(b"eXIf", exif.tobytes()[6:]), chunk(b"iTXt", xmp)):
        (tmp_path / "a.png").write_bytes(content[:-12] + behind + content[-12:])
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(picture(), -1))
        assert image_size(tmp_path / "a.png") == (60, 40)


@pytest.mark.parametrize("dtype, white", [(np.uint16, 4095), (np.uint16, 65535), (np.float32, 1), (np.float64, 255)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_of_deep_tiffs(tmp_path, dtype, white, orientation):
    (tmp_path / "a.tif").write_bytes(tiff((picture() * (white / 255)).astype(dtype), orientation=orientation))
    image = read_image(tmp_path / "a.tif")
    upright = np.rot90(picture(), -1) if orientation == 6 else picture()
    assert image_size(tmp_path / "a.tif") == image.shape[:2] == upright.shape[:2]
    assert np.abs(image.astype(int) - upright).max() <= 1


def test_damaged_exif_is_ignored(tmp_path):
    path = save(tmp_path / "a.jpg", picture(), quality=95, exif=b"Exif\x00\x00 this is no TIFF header")
    assert np.abs(read_image(path).astype(int) - picture()).max() < 12


@pytest.mark.parametrize("height, width", [(1, 1), (3, 4000), (4000, 3)])
def test_odd_sizes(tmp_path, height, width):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", picture(height, width))), picture(height, width))


def test_6000x6000(tmp_path):
    Image.new("RGB", (6000, 6000), (10, 200, 30)).save(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (6000, 6000, 3)
    assert np.abs(image[::1000, ::1000].astype(int) - [10, 200, 30]).max() < 6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [15_000, 15_812, 22_000, 60_000])
def test_more_than_250_megapixels_are_refused_before_decoding(tmp_path, side):
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
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_truncated(tmp_path, suffix, fraction):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(InputError) as error:
        read_image(path)
    assert is_one_sentence(error, path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
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
    names = ["a.JPEG", "b.jpg", "c.png", "d.bmp", "e.WebP", "f.tif", "g.tiff", "h.gif", "i.avif", "j.heic", "k.jfif"]
    for name in [*names, "notes.txt", "m.txt", "raw.nef", "no_suffix", "._b.jpg", "Thumbs.db"]:
        (tmp_path / name).touch()
    (tmp_path / "sub.jpg").mkdir()
    (tmp_path / "sub.jpg" / "z.jpg").touch()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    messages = []
    assert [path.name for path in list_images(tmp_path, messages.append)] == names
    assert messages == [
        "5 files skipped: 2 .txt, 1 broken link, 1 without suffix, 1 .nef; 1 subfolder skipped, which "
        f'"{tmp_path / "**"}" takes too'
    ]
    assert len(list_images(tmp_path / "**")) == 1 + len(names)


def test_no_report_for_a_folder_of_photographs(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert list_images(tmp_path, pytest.fail) == [tmp_path / "a.jpg"]


def test_the_message_for_a_folder_without_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.cr2").touch()
    for source in (tmp_path, tmp_path / "*"):
        with pytest.raises(InputError) as error:
            list_images(source)
        assert is_one_sentence(error, source, "1 file skipped: 1 .cr2; 1 subfolder", tmp_path / "**")


@pytest.mark.parametrize("record", [True, False])
def test_results_of_infer_are_skipped(tmp_path, record):
    photographs = ["cat.jpg", "dog.jpg", "old_overlay.png"]
    results = [f"cat_{kind}.png" for kind in ("instances", "overlay", "saliency", "boundary", "offsets")]
    for name in [*photographs, *results]:
        (tmp_path / name).touch()
    if record:
        (tmp_path / "predictions.json").touch()
        photographs.remove("old_overlay.png")  # its photograph may be elsewhere
    for source in (tmp_path, tmp_path / "*", tmp_path / "**"):
        assert [path.name for path in list_images(source, pytest.fail)] == photographs
    assert len(list_masks(tmp_path)) == 8


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


def test_brackets_in_existing_names_are_no_pattern(tmp_path):
    folder = tmp_path / "[2024] Holiday"
    folder.mkdir()
    for name in ("a [1].jpg", "a [2].jpg", "b1.jpg"):
        (folder / name).touch()

    def found(pattern):
        return [path.name for path in list_images(f"{tmp_path}/{pattern}")]

    assert found("[2024] Holiday") == found("[2024] Holiday/*.jpg") == ["a [1].jpg", "a [2].jpg", "b1.jpg"]
    assert found("[2024] Holiday/a [1]*") == ["a [1].jpg"]
    assert found("*/[a]*.jpg") == ["a [1].jpg", "a [2].jpg"] and found("*/b[0-9].jpg") == ["b1.jpg"]


def test_a_link_to_nothing_and_links_to_a_folder_above(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list_images(tmp_path / "**") == [tmp_path / "a.jpg"]
    (tmp_path / "broken.jpg").symlink_to("gone.jpg")
    with pytest.raises(InputError) as error:
        list_images(tmp_path / "broken.jpg")
    assert is_one_sentence(error, "broken.jpg is a link to gone.jpg")


@pytest.mark.parametrize("source", ["", "none.jpg", "*.jpg", "nowhere"])
def test_list_nothing(tmp_path, source):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError) as error:
        list_images(tmp_path / source)
    assert is_one_sentence(error, tmp_path / source)


def chunk(kind, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(samples, dtype=None, colours=None, *, orientation=1, planes=1, subfile=0):
    """An uncompressed TIFF file of samples [H, W, bands] of any number type, of which Pillow writes few."""
    samples = samples.astype(dtype or samples.dtype)
    height, width, bands = samples.shape
    data = (samples.transpose(2, 0, 1) if planes == 2 else samples).tobytes()
    strips = planes == 2 and bands or 1
    tags = {
        254: (4, [subfile]),
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8 * samples.itemsize] * bands),
        259: (3, [1]),
        262: (3, [(1 if bands == 1 else 2) if colours is None else colours]),
        273: (4, [8 + strip * len(data) // strips for strip in range(strips)]),
        274: (3, [orientation]),
        277: (3, [bands]),
        278: (4, [height]),
        279: (4, [len(data) // strips] * strips),
        284: (3, [planes]),
        339: (3, ["uif".index(samples.dtype.kind) + 1] * bands),
    }
    body, entries = data + b"\0" * (len(data) % 2), b""
    for tag, (kind, values) in tags.items():
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, body = struct.pack("<I", 8 + len(body)), body + packed + b"\0" * (len(packed) % 4)
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def red_is_blue():
    """sRGB's profile with red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ") + 4, profile.find(b"bXYZ") + 4
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    return bytes(profile)


def lab_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def png_rgb16(array, claimed=None):
    """PNG file of uint16 RGB [H, W, 3], which Pillow cannot write; the header may claim another side."""
    height, width = (claimed, claimed) if claimed else array.shape[:2]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in array)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
