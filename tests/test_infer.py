"""infer.py on photographs of every kind and size, with a small network made for the purpose."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from datasets.images import read_image
from datasets.masks import decode_rle
from models.wsid_net import NetConfig, WSIDNet, save_weights
from utils import checkpoint, visualize
from utils.cli import InputError, run


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


def call(*arguments):
    """infer.py in this process; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: infer.main(list(map(str, arguments))))
    return stop.value.code


def noise(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


def write_kinds(folder):
    """One photograph of every kind a user may have."""
    folder.mkdir()
    picture = Image.fromarray(noise(40, 60))
    picture.save(folder / "plain.jpg")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "rotated.jpg", exif=exif)
    cv2.imwrite(str(folder / "deep.png"), noise(40, 60).astype(np.uint16) * 257)
    Image.fromarray(noise(1, 1)).save(folder / "dot.png")
    Image.fromarray(noise(3, 4000)).save(folder / "thin.png")
    return folder


def test_every_kind_gives_results_at_its_own_size(weights, tmp_path, capsys):
    photographs = write_kinds(tmp_path / "in")
    assert call("--img", photographs, "--weights", weights, "--out", tmp_path / "out", "--visualize") == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    for path in photographs.iterdir():
        size = read_image(path).shape
        labels = cv2.imread(str(tmp_path / "out" / f"{path.stem}_instances.png"), cv2.IMREAD_UNCHANGED)
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
    prediction = infer.Predictor(weights).predict(np.zeros((6000, 6000, 3), np.uint8))
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


def test_a_given_saliency_map_replaces_the_branch(weights):
    image, saliency = noise(64, 64), np.zeros((64, 64), np.float32)
    saliency[:, :32] = 1
    prediction = infer.Predictor(weights, method="components").predict(image, saliency)
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
    photographs = write_kinds(tmp_path / "in")
    _truncated(photographs / "cut.jpg")
    assert call("--img", photographs, "--weights", weights, "--out", tmp_path / "out") == 1
    assert "cut.jpg" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*_instances.png"))) == 8


@pytest.mark.parametrize(
    "extra, words",
    [
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


def test_two_photographs_of_one_name(weights, tmp_path):
    for suffix in ("png", "jpg"):
        Image.fromarray(noise(30, 30)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(InputError, match="would write the same files"):
        infer.main(["--img", str(tmp_path), "--weights", str(weights), "--out", str(tmp_path / "out")])


def test_default_weights_prefer_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = infer.default_weights()
    assert bundled.parent.name == "weights" and bundled.exists()
    run_ = tmp_path / "runs" / "default"
    run_.mkdir(parents=True)
    (run_ / "weights.pt").touch()
    assert infer.default_weights().name == "weights.pt"
    (run_ / "weights_pts.pt").touch()
    assert infer.default_weights().name == "weights_pts.pt"


def test_bundled_weights_find_the_cat():
    image = read_image(infer.ROOT / "samples" / "cat.jpg")
    prediction = infer.Predictor(infer.default_weights()).predict(image)
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
