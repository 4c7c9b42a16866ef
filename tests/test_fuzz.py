"""Two thousand damaged files: each is read or raises one InputError, in bounded time and memory."""

import io
import json
import resource
import time
import warnings

import cv2
import numpy as np
import pytest
import torch
from conftest import make_data
from PIL import Image

from datasets.images import read_image
from datasets.labels_csv import read_labels
from datasets.masks import read_instance_mask
from datasets.transforms import load_square
from engine.predictions import open_predictions
from infer import Predictor
from models.wsid_net import NetConfig, WSIDNet, save_weights
from utils.cli import InputError

MAX_SECONDS = 20  # for one file, on a machine that also runs other programs
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "ICO")


def mutate(data, rng):
    """Bytes with a few of them changed, dropped, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place, kind = int(rng.integers(len(data))), rng.integers(5)
        if kind == 0:
            data[place] = rng.integers(256)
        elif kind == 1:
            data[place : place + 4] = rng.bytes(4)
        elif kind == 2:
            del data[place : place + int(rng.integers(1, 50))]
        elif kind == 3:
            data[place:place] = data[place : place + int(rng.integers(1, 50))]
        else:
            del data[max(1, place) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def originals(rng):
    """Small photographs of every format and mode, as bytes."""
    array = rng.integers(0, 255, (24, 31, 4), np.uint8)
    for kind in FORMATS:
        for mode in ("RGB", "L") + (("RGBA", "P") if kind == "PNG" else ()):
            buffer = io.BytesIO()
            Image.fromarray(array).convert(mode).save(buffer, kind)
            yield kind, buffer.getvalue()
    dark = rng.integers(0, 4096, (24, 31, 3), np.uint16)
    for kind, samples in (("PNG", dark), ("TIFF", dark), ("TIFF", dark / np.float32(4096))):
        yield kind, cv2.imencode(f".{kind.lower()}", samples)[1].tobytes()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "weights.pt"
    save_weights(WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=16)), path)
    return Predictor(path)


def test_two_thousand_damaged_photographs(tmp_path, predictor):
    rng = np.random.default_rng(0)
    files = list(originals(rng))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = rejected = 0
    for number in range(2000):
        kind, data = files[number % len(files)]
        path = tmp_path / f"{number}.{kind.lower()}"
        path.write_bytes(mutate(data, rng))
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = read_image(path)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
            read += 1
            if read % 20 == 0:
                prediction = predictor.predict(image)
                assert prediction.masks.shape[1:] == image.shape[:2]
        except InputError as error:
            rejected += 1
            assert str(path) in str(error) and "\n" not in str(error)
        assert time.monotonic() - start < MAX_SECONDS, path
        path.unlink()
    assert read > 100 and rejected > 100, "both happen"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 3 * 2**20, f"{grown} KiB"


def test_damaged_label_tables(tmp_path):
    folder = make_data(tmp_path / "data")
    table = folder / "labels.csv"
    original, rng, outcomes = table.read_bytes(), np.random.default_rng(1), set()
    for _ in range(400):
        table.write_bytes(mutate(original, rng))
        try:
            outcomes.add(len(read_labels(folder)) > 0)
        except InputError as error:
            outcomes.add("rejected")
            assert str(folder) in str(error) and "\n" not in str(error)
    assert {True, "rejected"} <= outcomes


def test_damaged_masks_and_predictions(tmp_path):
    rng = np.random.default_rng(2)
    mask, predictions = tmp_path / "a.png", tmp_path / "predictions.json"
    Image.fromarray(rng.integers(0, 3, (24, 31), np.uint8)).save(mask)
    record = {"image_id": "a", "category_id": 1, "segmentation": {"size": [24, 31], "counts": "0b0k`0"}, "score": 0.5}
    predictions.write_text(json.dumps([record]))
    intact, outcomes = {path: path.read_bytes() for path in (mask, predictions)}, set()
    for _ in range(600):
        for path, data in intact.items():
            path.write_bytes(mutate(data, rng))
        for path, read in ((mask, read_instance_mask), (predictions, read_predictions)):
            try:
                read(path)
                outcomes.add((path, "read"))
            except InputError as error:
                outcomes.add((path, "rejected"))
                assert str(path) in str(error) and "\n" not in str(error)
    assert len(outcomes) == 4


def read_predictions(path):
    for load in open_predictions(path, {"a": None}).values():
        load((24, 31))


@pytest.mark.parametrize("name", ["with space.png", "ünïcödé 图.png", "dots.in.name.png"])
def test_any_name_a_file_system_allows(tmp_path, name):
    folder = tmp_path / "a folder ☃"
    folder.mkdir()
    Image.fromarray(np.full((9, 7, 3), 200, np.uint8)).save(folder / name)
    assert read_image(folder / name).shape == (9, 7, 3)
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    (link / name).chmod(0o444)
    assert load_square(link / name, 16).shape == (16, 16, 3)
