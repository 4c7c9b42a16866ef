"""infer.py on photographs of every kind and size, with a small network made for the purpose."""

import itertools
import json
import threading
import time
from functools import partial

import conftest
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from datasets.images import read_image
from datasets.masks import decode_rle, read_instance_mask
from models import inference
from models.fusion import Fusion
from models.wsid_net import NetConfig, WSIDNet, save_weights
from utils import checkpoint, visualize
from utils.cli import InputError
from utils.parallel import map_ahead


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose saliency is high everywhere, so that something is found in every photograph."""
    torch.manual_seed(0)
    net = WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=16))
    with torch.no_grad():
        net.saliency.aspp[0][2].bias.fill_(3)
        net.branches.boundary.predict.weight.mul_(0.1)
        net.branches.centroid.predict.weight.zero_()
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    save_weights(net, path)
    return path


call = partial(conftest.call, infer.main)


BUNDLED = inference.DEFAULT_WEIGHTS[-1]
SURE = Fusion(unsure=0)  # what a network that nobody trained finds is unsure


def noise(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


def cat(height, width):
    """A photograph of which the bundled weights are sure."""
    return cv2.resize(read_image(infer.ROOT / "samples" / "cat.jpg"), (width, height), interpolation=cv2.INTER_AREA)


def write_kinds(folder, image):
    """One photograph of every kind a user may have, those of usual shape from ``image``, uint8 RGB."""
    folder.mkdir()
    picture = Image.fromarray(image)
    picture.save(folder / "plain.jpg")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "rotated.jpg", exif=exif)
    cv2.imwrite(str(folder / "deep.png"), image[..., ::-1].astype(np.uint16) * 257)
    Image.fromarray(noise(1, 1)).save(folder / "dot.png")
    Image.fromarray(noise(3, 4000)).save(folder / "thin.png")
    return folder


def test_every_kind_gives_results_at_its_own_size(weights, tmp_path, capsys):
    photographs = write_kinds(tmp_path / "in", noise(40, 60))
    options = ("--weights", weights, "--out", tmp_path / "out", "--visualize", "--fusion", "unsure=0")
    assert call("--img", photographs, *options) == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    for path in photographs.iterdir():
        size = read_image(path).shape
        labels = read_instance_mask(tmp_path / "out" / f"{path.stem}_instances.png")
        assert labels.dtype == np.uint8 and labels.shape == size[:2]
        mine = [record for record in records if record["image_id"] == path.stem]
        assert len(mine) == labels.max()
        for number, record in enumerate(mine, 1):
            assert record["category_id"] == 1 and 0 < record["score"] <= 1
            assert np.array_equal(decode_rle(record["segmentation"]).astype(bool), labels == number)
        for kind in ("overlay", "saliency", "boundary", "offsets"):
            assert cv2.imread(str(tmp_path / "out" / f"{path.stem}_{kind}.png")).shape == size
    assert records, "the network was made to find something"
    assert str(weights) in capsys.readouterr().out


def test_a_very_large_photograph(weights):
    prediction = inference.Predictor(weights).predict(np.zeros((6000, 6000, 3), np.uint8))
    assert prediction.masks.shape[1:] == (6000, 6000) and prediction.saliency.shape == (6000, 6000)


def test_nothing_salient_is_a_valid_answer(weights, tmp_path):
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    maps = tmp_path / "maps"
    maps.mkdir()
    cv2.imwrite(str(maps / "a.png"), np.zeros((30, 30), np.uint8))
    arguments = ["--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out", "--saliency-dir", maps]
    assert call(*arguments) == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == []
    assert cv2.imread(str(tmp_path / "out" / "a_instances.png"), 0).max() == 0


def test_a_given_number_replaces_the_told_one(weights, tmp_path, capsys):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    options = ["--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out", "--fusion", "unsure=0"]
    for count in (1, 2, 3):
        assert call(*options, "--count", count) == 0
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == count
    capsys.readouterr()
    for wrong in (["--count", "-1"], ["--count", "2", "--method", "components"]):
        assert call(*options, *wrong) == 2
        assert "--count" in capsys.readouterr().err


def test_mirror_answers_for_both_images_alike(weights, tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    Image.fromarray(noise(64, 64)[:, ::-1]).save(tmp_path / "b.png")
    options = ["--img", tmp_path, "--weights", weights, "--out", tmp_path / "out", "--visualize", "--amp", "off"]
    assert call(*options, "--mirror") == 0
    one, other = (cv2.imread(str(tmp_path / "out" / f"{stem}_saliency.png"), 0).astype(int) for stem in "ab")
    assert np.abs(one - other[:, ::-1]).max() <= 1 and np.ptp(one) > 0
    assert call(*options) == 0
    alone = cv2.imread(str(tmp_path / "out" / "a_saliency.png"), 0).astype(int)
    assert np.abs(one - alone).max() > 1


def test_a_given_saliency_map_replaces_the_branch(weights):
    image, saliency = noise(64, 64), np.zeros((64, 64), np.float32)
    saliency[:, :32] = 1
    prediction = inference.Predictor(weights, method="components").predict(image, saliency)
    assert len(prediction.masks) == 1
    assert prediction.masks[0][:, :28].all() and not prediction.masks[0][:, 36:].any()


def test_folder_glob_and_file_name_the_same(weights, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(30, 30)).save(tmp_path / "in" / "a b.png")
    for source in (tmp_path / "in", tmp_path / "in" / "*.png", tmp_path / "in" / "a b.png"):
        assert call("--img", source, "--weights", weights, "--out", tmp_path / "out") == 0
        assert (tmp_path / "out" / "a b_overlay.png").exists()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: folder / "absent.jpg", "absent.jpg"),
        (lambda folder: folder, "holds no images"),
        (lambda folder: _file(folder / "text.jpg", b"words"), "text.jpg"),
        (lambda folder: _truncated(folder / "cut.jpg"), "cut.jpg"),
    ],
)
def test_bad_photographs_are_one_sentence(weights, tmp_path, capsys, make, words):
    folder = tmp_path / "in"
    folder.mkdir()
    assert call("--img", make(folder), "--weights", weights, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1


def _file(path, content):
    path.write_bytes(content)
    return path


def _truncated(path):
    Image.fromarray(noise(200, 200)).save(path)
    return _file(path, path.read_bytes()[:2000])


def test_one_bad_file_does_not_stop_the_others(weights, tmp_path, capsys):
    photographs = write_kinds(tmp_path / "in", noise(40, 60))
    _truncated(photographs / "cut.jpg")
    assert call("--img", photographs, "--weights", weights, "--out", tmp_path / "out") == 1
    assert "cut.jpg" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*_instances.png"))) == 8


def test_a_batch_equals_its_photographs_one_by_one():
    predictor = inference.Predictor(BUNDLED, amp="off")
    images = [cat(40, 60), cat(90, 30), cat(300, 451)]
    given = [None, np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30), None]
    for together, alone in zip(predictor.predict_batch(images, given), map(predictor.predict, images, given)):
        assert together.offsets.any()
        for name in ("scores", "centroids", "saliency", "boundary", "offsets"):
            np.testing.assert_allclose(getattr(together, name), getattr(alone, name), atol=1e-4, err_msg=name)
        assert len(alone.masks)
        assert (together.masks != alone.masks).mean() < 1e-3, "a pixel on an edge may fall to the other side"
    assert predictor.predict_batch([]) == []


def results(folder):
    """What infer.py wrote: (records, {file name: picture})."""
    pictures = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in folder.glob("*.png")}
    return json.loads((folder / "predictions.json").read_text()), pictures


def test_batches_and_threads_leave_the_results_as_they_are(tmp_path, capsys):
    photographs = write_kinds(tmp_path / "in", cat(180, 260))
    _truncated(photographs / "cut.jpg")
    printed = []
    for name, options in (("single", (1, 1)), ("batches", (3, 2)), ("all", (50, 4))):
        options = ("--batch-size", options[0], "--workers", options[1], "--visualize", "--amp", "off")
        assert call("--img", photographs, "--weights", BUNDLED, "--out", tmp_path / name, *options) == 1
        text, errors = capsys.readouterr()
        assert errors.splitlines()[-1].startswith("error: ") and "cut.jpg" in errors.splitlines()[-1]
        printed.append(text.replace(str(tmp_path / name), "OUT"))
    assert printed[0] == printed[1] == printed[2], "in the order of the photographs"
    records, pictures = results(tmp_path / "single")
    assert len(records) >= 4, "cats"
    for name in ("batches", "all"):
        others, other_pictures = results(tmp_path / name)
        assert [record["image_id"] for record in records] == [record["image_id"] for record in others]
        assert np.allclose([record["score"] for record in records], [record["score"] for record in others], atol=1e-4)
        assert pictures.keys() == other_pictures.keys()
        for key, picture in pictures.items():
            assert (picture != other_pictures[key]).mean() < 0.01, key


def test_few_photographs_are_in_memory_at_once(weights, monkeypatch):
    """Counted from reading to finishing, of endlessly many; the writer is slow, as a network drive may be."""
    alive, most, lock = 0, 0, threading.Lock()

    def count(step):
        nonlocal alive, most
        with lock:
            alive += step
            most = max(most, alive)

    def read(path):
        count(1)
        return noise(8, 8)

    def finish(path, image, prediction):
        time.sleep(0.01)
        count(-1)
        return path

    monkeypatch.setattr(inference, "read_image", read)
    found = inference.process(itertools.count(), inference.Predictor(weights), finish, batch_size=2, workers=2)
    assert list(itertools.islice(found, 40)) == list(range(40))
    found.close()
    assert most <= 3 * 2 + 2 * 2 + 2


def test_map_ahead_keeps_order_and_stops_at_an_error():
    threads = torch.get_num_threads()

    def slow(item):
        time.sleep(0.02 if item % 3 == 0 else 0)
        assert torch.get_num_threads() == 1, "beside the caller, not against it"
        if item == 7:
            raise InputError("seven")
        return item

    for workers, ahead in ((1, 0), (3, 1), (2, 5)):
        seen = []
        with pytest.raises(InputError, match="seven"):
            for value in map_ahead(slow, itertools.count(), workers, ahead):
                seen.append(value)
        assert seen == list(range(7))
    assert list(map_ahead(slow, range(3), 2, 10)) == [0, 1, 2] and list(map_ahead(slow, [], 2, 1)) == []
    assert torch.get_num_threads() == threads


def test_bfloat16_is_near_float32(weights):
    exact, rounded = (inference.Predictor(weights, amp=amp, settings=SURE) for amp in ("off", "bf16"))
    assert (exact.bf16, rounded.bf16) == (False, True)
    assert inference.Predictor(weights).bf16 == inference.bfloat16_pays(torch.device("cpu"))
    inputs = [exact.prepare(noise(50, 50))]
    for one, other in zip(exact.network(inputs)[0][:2], rounded.network(inputs)[0][:2]):
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.05
    assert len(rounded.predict(noise(50, 50)).masks), "the operators take what it gives"


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--batch-size", 0], "at least 1"),
        (["--workers", 0], "at least 1"),
        (["--weights", "absent.pt"], "no weights at absent.pt"),
        (["--gpu", "77"], "--gpu 77"),
        (["--saliency-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_settings_are_one_sentence(weights, tmp_path, capsys, extra, words):
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    arguments = ["--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out", *extra]
    assert call(*arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_output_must_be_writable(weights, tmp_path, capsys):
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("in the way")
    assert call("--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "file") == 2
    assert "choose another with --out" in capsys.readouterr().err


def test_weights_of_another_kind(weights, tmp_path, capsys):
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    checkpoint.save({"model": {}}, tmp_path / "stage.pt")
    assert call("--img", tmp_path / "a.png", "--weights", tmp_path / "stage.pt", "--out", tmp_path / "out") == 2
    assert "does not hold the weights of a whole WSID-Net" in capsys.readouterr().err


def test_default_weights_prefer_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = inference.default_weights()
    assert bundled.parent.name == "weights" and bundled.exists()
    run_ = tmp_path / "runs" / "default"
    run_.mkdir(parents=True)
    (run_ / "weights.pt").touch()
    assert inference.default_weights().name == "weights.pt"
    (run_ / "weights_pts.pt").touch()
    assert inference.default_weights().name == "weights_pts.pt"


def test_bundled_weights_find_the_cat():
    image = read_image(infer.ROOT / "samples" / "cat.jpg")
    prediction = inference.Predictor(inference.default_weights()).predict(image)
    assert len(prediction.masks) >= 1
    height, width = image.shape[:2]
    middle = prediction.masks.any(0)[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
    assert middle.mean() > 0.4, "the cat fills the middle of the photograph"


def test_colour_wheel_and_overlay():
    offsets = np.zeros((2, 5, 5), np.float32)
    offsets[1, :, 3:], offsets[1, :, :2] = -4, 4
    wheel = visualize.colour_wheel(offsets)
    assert (wheel[:, 2] == 255).all(), "no offset is white"
    assert not np.array_equal(wheel[0, 0], wheel[0, 4]), "opposite directions have opposite colours"
    image = noise(40, 60)
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:30, 10:30] = True
    picture = visualize.overlay(image, mask, [0.9], np.array([[20.0, 20.0]]))
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert not np.array_equal(picture, visualize.overlay(image, mask[:0], [], np.zeros((0, 2))))
