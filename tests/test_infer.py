"""infer.py on photographs of every kind and size, with a small untrained network."""

import itertools
import json
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
import infer
from datasets.images import read_image
from datasets.masks import decode_polygons, decode_rle, encode_polygons, read_instance_mask
from engine import annotations, inference, visualize
from engine.cuda_graph import Graphed
from engine.predictor import (
    BUNDLED_STUDENT,
    BUNDLED_WSID_NET,
    ROOT,
    Predictor,
    as_rgb,
    bfloat16_pays,
    default_weights,
    process,
)
from engine.results import Results
from models.fusion_config import FusionConfig
from models.wsid_net import NetConfig, WSIDNet, digest_of_weights, load_network, save_weights
from utils import checkpoint, files, lazy
from utils.cli import InputError, path_of
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


ALL_SCORES = FusionConfig(min_score=0)  # the scores of an untrained network are low


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_the_options_of_the_machine_are_used(weights, tmp_path, monkeypatch, amp):
    used = []

    def write_all(paths, predictor, results, batch_size, workers):
        used.append((predictor.bf16, batch_size, workers))
        yield from ()

    monkeypatch.setattr(inference, "write_all", write_all)
    Image.fromarray(noise(40, 60)).save(tmp_path / "a.png")
    options = ("--gpu", -1, "--amp", amp, "--batch-size", 3, "--workers", 5)
    assert call("--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out", *options) == 0
    assert used == [(amp == "bf16", 3, 5)]


def test_ids_of_a_coco_file(weights, tmp_path, capsys):
    Image.fromarray(noise(40, 60)).save(tmp_path / "000000000139.jpg")
    images = [{"id": 139, "file_name": "val2017/000000000139.jpg", "height": 40, "width": 60}]
    truth = tmp_path / "instances.json"
    truth.write_text(json.dumps({"images": images, "categories": [{"id": 1}], "annotations": []}))
    options = ("--img", tmp_path, "--weights", weights, "--out", tmp_path / "out", "--fusion", "min_score=0")
    assert call(*options, "--coco-ids", truth) == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert records and {record["image_id"] for record in records} == {139}
    COCO(str(truth)).loadRes(records)
    Image.fromarray(noise(40, 60)).save(tmp_path / "other.jpg")
    capsys.readouterr()
    assert call(*options, "--coco-ids", truth) == 2
    assert "instances.json has no image called other" in capsys.readouterr().err


def noise(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


def cat(height, width):
    """A photograph in which the bundled weights find an instance."""
    return cv2.resize(read_image(ROOT / "samples" / "cat.jpg"), (width, height), interpolation=cv2.INTER_AREA)


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
    options = ("--weights", weights, "--out", tmp_path / "out", "--visualize", "--fusion", "min_score=0")
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
            name = f"{path.stem}_{kind}.{'jpg' if kind == 'overlay' else 'png'}"
            assert cv2.imread(str(tmp_path / "out" / name)).shape == size
    assert records, "the network was made to find something"
    assert str(weights) in capsys.readouterr().out


def test_a_very_large_photograph(weights):
    prediction = Predictor(weights).predict(np.zeros((6000, 6000, 3), np.uint8))
    assert prediction.masks.shape[1:] == (6000, 6000) and prediction.saliency.shape == (6000, 6000)


def test_nothing_salient_is_a_valid_result(weights, tmp_path):
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    maps = tmp_path / "maps"
    maps.mkdir()
    cv2.imwrite(str(maps / "a.png"), np.zeros((30, 30), np.uint8))
    arguments = ["--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out", "--saliency-dir", maps]
    assert call(*arguments) == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == []
    assert cv2.imread(str(tmp_path / "out" / "a_instances.png"), 0).max() == 0


def test_a_given_count_replaces_the_predicted_one(weights, tmp_path, capsys):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    options = ["--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out", "--fusion", "min_score=0"]
    for count in (1, 2, 3):
        assert call(*options, "--count", count) == 0
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == count
    capsys.readouterr()
    for wrong in (["--count", "-1"], ["--count", "2", "--method", "components"]):
        assert call(*options, *wrong) == 2
        assert "--count" in capsys.readouterr().err


@pytest.mark.parametrize("grouping, count", [("sinks", 1), ("count", 3)])
def test_pixels_are_grouped_by_sinks_or_by_the_predicted_count(weights, grouping, count):
    """All offsets of the network are 0, which is one sink; three objects are predicted."""
    predictor = Predictor(weights, settings=[f"grouping={grouping}", "min_score=0"])
    (maps,) = predictor.network([predictor.prepare(noise(64, 64))])
    maps = maps._replace(count_probs=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert len(predictor.instances(maps, (64, 64)).masks) == count


def test_a_given_saliency_map_replaces_the_branch(weights):
    image, saliency = noise(64, 64), np.zeros((64, 64), np.float32)
    saliency[:, :32] = 1
    prediction = Predictor(weights, method="components").predict(image, saliency)
    assert len(prediction.masks) == 1
    assert prediction.masks[0][:, :28].all() and not prediction.masks[0][:, 36:].any()


def test_folder_glob_and_file_name_the_same(weights, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(30, 30)).save(tmp_path / "in" / "a b.png")
    for source in (tmp_path / "in", tmp_path / "in" / "*.png", tmp_path / "in" / "a b.png"):
        assert call("--img", source, "--weights", weights, "--out", tmp_path / "out") == 0
        assert (tmp_path / "out" / "a b_overlay.jpg").exists()


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
    predictor = Predictor(BUNDLED_WSID_NET, amp="off")
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
    paths = [*folder.glob("*.png"), *folder.glob("*.jpg")]
    pictures = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths}
    return json.loads((folder / "predictions.json").read_text()), pictures


def test_results_do_not_depend_on_batches_and_processes(tmp_path, capsys):
    photographs = write_kinds(tmp_path / "in", cat(180, 260))
    for name in ("alpha", "deep", "palette"):  # the same picture as the others, and each costs three passes
        (photographs / f"{name}.png").unlink()
    _truncated(photographs / "cut.jpg")
    printed = []
    for name, options in (("single", (1, 1)), ("batches", (3, 2)), ("all", (50, 4))):
        options = ("--batch-size", options[0], "--workers", options[1], "--visualize", "--amp", "off")
        assert call("--img", photographs, "--weights", BUNDLED_WSID_NET, "--out", tmp_path / name, *options) == 1
        text, errors = capsys.readouterr()
        assert errors.splitlines()[-1].startswith("error: ") and "cut.jpg" in errors.splitlines()[-1]
        _, _, text = text.partition("weights: ")  # the device is printed once in a process
        printed.append(text.replace(str(tmp_path / name), "OUT"))
    assert printed[0] == printed[1] == printed[2], "in the order of the photographs"
    records, pictures = results(tmp_path / "single")
    assert len(records) >= 2, "cats"
    for name in ("batches", "all"):
        others, other_pictures = results(tmp_path / name)
        assert [record["image_id"] for record in records] == [record["image_id"] for record in others]
        assert np.allclose([record["score"] for record in records], [record["score"] for record in others], atol=1e-4)
        assert pictures.keys() == other_pictures.keys()
        for key, picture in pictures.items():
            assert (picture != other_pictures[key]).mean() < 0.01, key


def test_whole_batches_as_on_a_gpu_give_the_same(tmp_path):
    for number, image in enumerate((cat(90, 120), noise(20, 30), cat(64, 64), cat(120, 90))):
        files.save_png(image, tmp_path / f"{number}.png")
    paths = [tmp_path / f"{name}.png" for name in (0, "missing", 1, 2, 3, "gone")]
    predictor, sizes = Predictor(BUNDLED_WSID_NET, amp="off"), []

    def fuse_batch(outputs, *args):
        sizes.append(len(outputs))
        return predictor.fuse_batch(outputs, *args)

    on_gpu = SimpleNamespace(
        device=torch.device("cuda"),
        method=predictor.method,
        prepare=predictor.prepare,
        network=predictor.network,
        fuse_batch=fuse_batch,
    )
    one, other = (list(process(paths, each, lambda *result: result, 2)) for each in (predictor, on_gpu))
    assert sizes == [1, 2, 1]
    for path, expected, found in zip(paths, one, other, strict=True):
        assert isinstance(expected, InputError) == (path.stem in ("missing", "gone"))
        if isinstance(expected, InputError):
            assert str(found) == str(expected)
        else:
            assert found[0] == path and np.array_equal(found[1], expected[1])
            assert np.array_equal(found[2].masks, expected[2].masks)
            assert np.allclose(found[2].scores, expected[2].scores, atol=1e-6)
    assert sum(len(result[2].masks) for result in other if isinstance(result, tuple)) >= 3, "cats"


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

    monkeypatch.setattr("engine.predictor.read_image", read)
    found = process(itertools.count(), Predictor(weights), finish, batch_size=2, threads=2)
    assert list(itertools.islice(found, 40)) == list(range(40))
    found.close()
    assert most <= 3 * 2 + 2 * 2 + 2


def test_processes_are_started_where_they_save_more_time_than_they_take(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert [inference.processes_for(count, cpu) for count in (0, 1, 260, 270, 10_000)] == [1, 1, 1, 4, 4]
    assert [inference.processes_for(count, gpu) for count in (1, 499, 500, 10_000)] == [1, 1, 2, 8]
    monkeypatch.setattr(inference.distributed, "world_size", lambda: 2)
    assert inference.processes_for(10_000, cpu) == 1, "torchrun has started the others"


def test_map_ahead_keeps_order_and_stops_at_an_error():
    threads = torch.get_num_threads()

    def slow(item):
        time.sleep(0.02 if item % 3 == 0 else 0)
        assert torch.get_num_threads() == 1, "beside the caller, not against it"
        if item == 7:
            raise InputError("seven")
        return item

    for workers, ahead in ((1, 0), (3, 1), (2, 5)):
        values = []
        with pytest.raises(InputError, match="seven"):
            for value in map_ahead(slow, itertools.count(), workers, ahead):
                values.append(value)
        assert values == list(range(7))
    assert list(map_ahead(slow, range(3), 2, 10)) == [0, 1, 2] and list(map_ahead(slow, [], 2, 1)) == []
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_network_as_a_cuda_graph_gives_what_it_gives_without(weights):
    inputs = [Predictor(weights).prepare(noise(50 + row, 50)) for row in range(5)]
    graphed, plain = Predictor(weights, "cuda", amp="off"), load_network(weights, "cuda")
    for batch in (inputs[:2], inputs[2:4], inputs[:1], inputs[1:3], inputs[3:5], inputs[:2], inputs[4:]):
        with torch.no_grad():
            expected = plain(*graphed.batch(batch))
        for i, maps in enumerate(graphed.network(batch)):
            for one, other in zip(maps[:4], expected):
                assert torch.allclose(one, other[i], rtol=1e-3, atol=1e-3)
    assert [graph is not None for graph in graphed.net.forward.graphs.values()] == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_waits_for_the_gpu_runs_without_a_cuda_graph():
    waiting = Graphed(lambda x: x * float(x.sum()))
    for number in range(1, 6):
        assert waiting(torch.full((2,), float(number), device="cuda")).tolist() == [2 * number**2] * 2
    assert list(waiting.graphs.values()) == [None]


def test_bfloat16_is_near_float32(weights):
    exact, rounded = (Predictor(weights, amp=amp, settings=ALL_SCORES) for amp in ("off", "bf16"))
    assert (exact.bf16, rounded.bf16) == (False, True)
    assert Predictor(weights).bf16 == bfloat16_pays(torch.device("cpu"))
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


def not_finite(saved):
    saved["state"]["saliency.aspp.0.0.weight"][0] = float("nan")
    return saved


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: {"model": {}},
        lambda saved: torch.zeros(3),
        lambda saved: [saved],
        lambda saved: saved | {"config": saved["config"] | {"size": "large"}},
        lambda saved: saved | {"config": saved["config"] | {"channels": -1}},
        lambda saved: saved | {"state": {}},
        lambda saved: saved | {"state": 3},
        not_finite,
    ],
)
def test_weights_of_another_kind(weights, tmp_path, change):
    checkpoint.save(change(checkpoint.load(weights)), tmp_path / "odd.pt")
    with pytest.raises(InputError, match="odd.pt (does not hold the weights of a whole|holds weights that are not)"):
        Predictor(tmp_path / "odd.pt")


@torch.no_grad()
def test_default_weights_prefer_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = default_weights()
    assert bundled.parent.name == "weights" and bundled.exists() and default_weights(BUNDLED_WSID_NET).exists()
    run_ = tmp_path / "runs" / "default"
    run_.mkdir(parents=True)
    (run_ / "weights.pt").touch()
    assert default_weights().name == "weights.pt"
    net = WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=8))
    save_weights(net, run_ / "weights.pt")
    save_weights(net, run_ / "weights_pts.pt")  # of an earlier version, which does not record it
    assert default_weights().name == "weights_pts.pt"
    save_weights(net, run_ / "weights_pts.pt", start=digest_of_weights(run_ / "weights.pt"))
    assert default_weights().name == "weights_pts.pt"
    next(net.saliency.parameters()).add_(1)
    save_weights(net, run_ / "weights.pt")
    with pytest.raises(InputError, match="weights_pts.pt was made from another weights.pt"):
        default_weights()


@pytest.mark.parametrize("bundled", [BUNDLED_STUDENT, BUNDLED_WSID_NET])
def test_bundled_weights_find_the_cat(bundled):
    image = read_image(ROOT / "samples" / "cat.jpg")
    prediction = Predictor(bundled).predict(image)
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


def test_start_imports_only_what_it_needs(weights, tmp_path):
    """What torch, timm and scipy would bring with them takes longer than a photograph."""
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    script = """
import sys
import infer
from utils.cli import InputError
for wrong in (["--count", "x"], ["--img", "absent.jpg"], ["--img", "x.jpg", "--count", "2", "--method", "components"]):
    try:
        infer.main(wrong)
    except InputError:
        pass
    else:
        raise AssertionError(wrong)
print("torch" in sys.modules)
assert infer.main(sys.argv[1:]) == 0
names = ("torch torch._dynamo torch._inductor sympy triton matplotlib tensorboard scipy torchvision.io "
         "huggingface_hub pycocotools.coco timm.models.vision_transformer")
print([name for name in names.split() if name in sys.modules])
"""
    arguments = ["--img", tmp_path / "a.png", "--weights", weights, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=conftest.environment(),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "False" and lines[-1] == "['torch']"
    assert not done.stderr, "no progress bar in a log file"


def test_a_partly_imported_package_is_imported_when_used(tmp_path, monkeypatch):
    folder = tmp_path / "large_package" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("from .inner.part import name\nfrom .inner import other\n")
    (folder / "__init__.py").write_text("from .part import *\nother = 3\n")
    (folder / "part.py").write_text("from large_package.functions import double\nname = 2\n")
    (folder.parent / "functions.py").write_text("def double(number):\n    return 2 * number\n")
    monkeypatch.syspath_prepend(tmp_path)
    lazy.package("large_package")
    lazy.package("large_package.inner")
    with lazy.functions_of("large_package.functions"):
        import large_package.inner.part as part
    assert "other" not in vars(sys.modules["large_package.inner"])
    assert "large_package.functions" not in sys.modules and part.double(4) == 8
    import large_package

    assert (large_package.name, large_package.other) == (2, 3)
    with pytest.raises(AttributeError):
        large_package.absent  # noqa: B018
    assert lazy.package("large_package") is large_package
    with pytest.raises(ModuleNotFoundError):
        lazy.package("absent_package")


def test_another_package_of_the_same_name_is_an_error(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    for script in ("import datasets; sys.path.insert(0, ROOT); import infer", "sys.path.append(ROOT); import infer"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; ROOT = {str(ROOT)!r}; {script}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        if "import datasets" in script:
            assert "another package called 'datasets' is imported already" in done.stderr.splitlines()[-1]
        else:
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", ["reader", "before", "full"])
def test_a_closed_output_is_no_failure(tmp_path, closed):
    script = "from utils.script import run; run(lambda: [print('b\\udcff\\u7167', flush=True) for _ in range(9)] and 7)"
    command = f"{sys.executable} -c {json.dumps(script)}"
    command += {"reader": " | head -1; exit ${PIPESTATUS[0]}", "before": " >&-", "full": " >/dev/full"}[closed]
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 7
    assert done.stdout == ("b\\udcff\\u7167\n" if closed == "reader" else "")
    assert done.stderr.count("\n") == (closed == "full"), done.stderr


def make_photographs(folder, count):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(noise(24 + i, 30)).save(folder / f"p{i:02}.png")
    return folder


def image_ids(folder):
    return [record["image_id"] for record in json.loads((folder / "predictions.json").read_text())]


@pytest.fixture
def added(monkeypatch):
    """The stems whose results are written; ``after[n]`` is called once the n-th is."""
    stems, after, add = [], {}, Results.add

    def watched(self, path, *rest):
        pictures = add(self, path, *rest)
        stems.append(path.stem)
        after.pop(len(stems), lambda: None)()
        return pictures

    monkeypatch.setattr(Results, "add", watched)
    watched.stems, watched.after = stems, after
    return watched


@pytest.mark.parametrize("kind, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_continues(weights, tmp_path, capsys, added, kind, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes started in the background ignore it
    photographs, out = make_photographs(tmp_path / "in", 12), tmp_path / "out"
    options = ("--img", photographs, "--weights", weights, "--fusion", "min_score=0", "--batch-size", 1, "--workers", 1)
    added.after[2] = lambda: (os.kill(os.getpid(), kind), time.sleep(0.5))
    assert call(*options, "--out", out) == code
    stopped = list(added.stems)
    assert 2 <= len(stopped) < 12 and set(image_ids(out)) == set(stopped)
    assert "the same command continues" in capsys.readouterr().err
    journal = next(out.glob("finished-*.jsonl"))
    journal.write_bytes(journal.read_bytes() + b'\n{"image_id": "p11", "made_')  # as a kill cuts it short
    assert call(*options, "--out", out) == 0
    assert f"{len(stopped)} of 12 photographs are finished" in capsys.readouterr().out
    assert sorted(added.stems) == [f"p{i:02}" for i in range(12)], "each once"
    assert call(*options, "--out", tmp_path / "whole") == 0
    assert (out / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()
    text = capsys.readouterr().out
    assert "pictures of 12 photographs" in text and "p03" not in text, "names are for few"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_which_photographs_are_computed_anew(weights, tmp_path, capsys, added):
    photographs, out = make_photographs(tmp_path / "in", 3), tmp_path / "out"
    options = ("--weights", weights, "--out", out, "--fusion", "min_score=0")

    def run_(*more, img=photographs):
        added.stems.clear()
        code = call("--img", img, *options, *more)
        return code, sorted(added.stems), sorted(set(image_ids(out)))

    assert run_(img=photographs / "p00.png") == (0, ["p00"], ["p00"])
    assert run_(img=photographs / "p01.png") == (0, ["p01"], ["p00", "p01"]), "of one setting, the records stay"
    assert run_() == (0, ["p02"], ["p00", "p01", "p02"])
    Image.fromarray(noise(50, 50)).save(photographs / "p01.png")
    (out / "p02_overlay.jpg").unlink()
    assert run_() == (0, ["p01", "p02"], ["p00", "p01", "p02"])
    for end in (b"", b"half", b"half" + bytes(4096)):  # as a power failure may leave it
        (out / "p01_overlay.jpg").write_bytes(end)
        assert run_() == (0, ["p01"], ["p00", "p01", "p02"])
    edited = out / "p01_overlay.jpg"
    Image.open(edited).convert("L").save(edited)
    kept = edited.read_bytes()
    assert run_() == (0, [], ["p00", "p01", "p02"]) and edited.read_bytes() == kept, "what a user has changed stays"
    (out / "p00_instances.png").unlink()
    assert run_(img=photographs / "p01.png") == (0, [], ["p01", "p02"]), "records of pictures that are there"
    capsys.readouterr()
    (photographs / "p01.png").write_text("no photograph any more")
    assert run_() == (1, ["p00"], ["p00", "p02"])
    for more in (["--count", "2"], ["--visualize"], ["--fusion", "min_score=0", "power=7"]):
        before = (out / "predictions.json").read_bytes()
        assert call("--img", photographs / "p01.png", *options, *more) == 2
        assert (out / "predictions.json").read_bytes() == before, "nothing was done"
        capsys.readouterr()
        assert run_(*more, img=photographs / "p02.png") == (0, ["p02"], ["p02"]), "others never mix in"
        assert "other settings or weights" in capsys.readouterr().out


def test_runs_of_two_settings_at_once_are_an_error(weights, tmp_path, capsys, added):
    photographs, out = make_photographs(tmp_path / "in", 2), tmp_path / "out"
    options = ("--img", photographs, "--weights", weights, "--out", out, "--fusion", "min_score=0")
    pictures = []

    def another():
        call(*options, "--count", 2)
        pictures.extend(path.read_bytes() for path in sorted(out.glob("*.png")))

    added.after[1] = another
    assert call(*options, "--workers", 1) == 1
    assert "another run with other settings" in capsys.readouterr().err
    assert [path.read_bytes() for path in sorted(out.glob("*.png"))] == pictures != [], "whose pictures stay"
    assert image_ids(out) and len(list(out.glob("finished-*.jsonl"))) == 1


def test_a_photograph_that_is_replaced_while_it_is_computed_is_computed_anew(weights, tmp_path, added):
    photographs, out = make_photographs(tmp_path / "in", 2), tmp_path / "out"
    options = ("--img", photographs, "--weights", weights, "--out", out, "--workers", 1, "--batch-size", 2)
    added.after[1] = lambda: Image.fromarray(noise(50, 50)).save(photographs / "p01.png")  # its pixels are read already
    assert call(*options) == 0 and added.stems == ["p00", "p01"]
    assert call(*options) == 0 and added.stems[2:] == ["p01"]
    assert call(*options) == 0 and len(added.stems) == 3


def test_the_last_line_of_a_journal_counts_whatever_the_clock_said(weights, tmp_path, added):
    photographs, out = make_photographs(tmp_path / "in", 1), tmp_path / "out"
    options = ("--img", photographs, "--weights", weights, "--out", out)
    assert call(*options) == 0
    (journal,) = out.glob("finished-*.jsonl")
    entry = json.loads(journal.read_bytes())
    journal.write_text("\n" + json.dumps(entry | {"time": time.time() + 1e6}))
    Image.fromarray(noise(50, 50)).save(photographs / "p00.png")
    assert call(*options) == 0 and call(*options) == 0 and len(added.stems) == 2


def test_a_full_disk_is_noticed_by_a_line_of_the_journal_that_is_cut(weights, tmp_path, capsys, monkeypatch):
    open_, cut = Results._open, SimpleNamespace(write=lambda line: len(line) - 1, close=lambda: None)
    monkeypatch.setattr(Results, "_open", lambda self: (open_(self), cut)[1])
    assert call("--img", make_photographs(tmp_path / "in", 1), "--weights", weights, "--out", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("size", [10**15, "of OpenCV"])
def test_a_photograph_that_needs_too_much_memory_is_named(weights, tmp_path, capsys, monkeypatch, size):
    photographs = make_photographs(tmp_path / "in", 2)

    def limited(path):
        if path.stem == "p00" and size == "of OpenCV":
            cv2.resize(np.zeros((1, 1), np.float64), (2**30, 2**20))
        elif path.stem == "p00":
            np.ones(size)
        return read_image(path)

    monkeypatch.setattr("engine.predictor.read_image", limited)
    options = ("--weights", weights, "--out", tmp_path / "out", "--workers", 1, "--fusion", "min_score=0")
    assert call("--img", photographs, *options) == 1
    assert "p00.png needs more memory than there is" in capsys.readouterr().err
    assert image_ids(tmp_path / "out")


def test_an_error_leaves_no_empty_predictions(weights, tmp_path):
    (tmp_path / "a.jpg").write_text("words")
    assert call("--img", tmp_path / "a.jpg", "--weights", weights, "--out", tmp_path / "out") == 2
    assert not list((tmp_path / "out").iterdir())


def test_impossible_names_are_skipped_with_an_error(weights, tmp_path, capsys):
    photographs, out = make_photographs(tmp_path / "in", 1), tmp_path / "out"
    long = "n" * 236
    for name in (f"{long}.png", f"{'m' * 245}.png", os.fsdecode(b"b\xe4r \xff.png"), "a b.png", "~c.png", "[d].png"):
        shutil.copy(photographs / "p00.png", photographs / name)
    Image.fromarray(noise(30, 30)).save(photographs / "a b.jpg")
    (out / "a b_overlay.jpg").mkdir(parents=True)
    options = ("--weights", weights, "--out", out, "--fusion", "min_score=0")
    files = [path for path in photographs.iterdir() if not path.name.startswith(("m", "a b"))]
    assert call("--img", photographs, tmp_path / "absent.png", *options) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    for words in ("shorten", "would write the same", "absent", "remove the folder of that name"):
        assert any(words in line for line in errors), words
    assert set(image_ids(out)) == {path.stem for path in files}
    assert all((out / f"{path.stem}_overlay.jpg").is_file() for path in files)
    assert not list(out.glob(".*.partial"))
    (tmp_path / "b").mkdir()
    assert call("--img", *files, *files, "--weights", weights, "--out", tmp_path / "b", "--fusion", "min_score=0") == 0


def test_results_are_no_photographs(weights, tmp_path, capsys, added):
    photographs = make_photographs(tmp_path / "in", 2)
    options = ("--weights", weights, "--visualize", "--out", photographs)
    assert call("--img", photographs, *options) == 0
    there = sorted(path.name for path in photographs.iterdir())
    assert call("--img", photographs, *options) == 0
    capsys.readouterr()
    assert call("--img", photographs, *options) == 0
    assert not capsys.readouterr().err
    assert call("--img", *photographs.iterdir(), *options) == 0
    assert sorted(path.name for path in photographs.iterdir()) == there and sorted(added.stems) == ["p00", "p01"]
    capsys.readouterr()
    other = make_photographs(tmp_path / "other", 1)
    shutil.copy(other / "p00.png", other / "p00_instances.png")  # not written by infer.py
    before = (other / "p00_instances.png").read_bytes()
    assert call("--img", *other.glob("*.png"), "--weights", weights, "--out", other) == 1
    assert "would replace a photograph" in capsys.readouterr().err
    assert (other / "p00_instances.png").read_bytes() == before


def test_label_maps_are_visible_and_exact(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    files.save_label_png(labels, tmp_path / "a.png")
    assert np.array_equal(read_instance_mask(tmp_path / "a.png"), labels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), labels)
    colours = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    assert not colours[0].any() and (colours[1:64].max(1) >= 64).all()
    assert len(np.unique(colours, axis=0)) == 256


RGB = noise(20, 30)


@pytest.mark.parametrize(
    "image, same",
    [
        (RGB[..., ::-1][..., ::-1], RGB),
        (np.asfortranarray(RGB), RGB),
        (RGB[..., 0], np.repeat(RGB[..., :1], 3, 2)),
        (RGB[..., :1], np.repeat(RGB[..., :1], 3, 2)),
        (np.dstack([RGB, np.full((20, 30), 255, np.uint8)]), RGB),
        (np.dstack([RGB, np.zeros((20, 30), np.uint8)]), np.full_like(RGB, 255)),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(RGB).convert("L").convert("P"), np.asarray(Image.fromarray(RGB).convert("L").convert("RGB"))),
        (Image.new("LA", (30, 20), (0, 0)), np.full_like(RGB, 255)),
    ],
)
def test_images_in_memory(image, same):
    taken = as_rgb(image)
    assert taken.dtype == np.uint8 and np.array_equal(taken, same) and taken.flags.c_contiguous


@pytest.mark.parametrize(
    "image",
    [
        RGB / 255,
        RGB.astype(np.uint16),
        RGB > 9,
        torch.from_numpy(RGB),
        "x.jpg",
        Path("x.jpg"),
        RGB.tolist(),
        None,
        RGB[:0],
        RGB[None],
        RGB.transpose(2, 0, 1),
        np.uint8(3),
        Image.new("F", (3, 3)),
        Image.new("I;16", (3, 3)),
    ],
)
def test_arguments_that_are_no_image(image):
    with pytest.raises(InputError, match="^the image (is|has) .*; (give|convert)"):
        as_rgb(image)


def test_wrong_arguments_of_a_predictor(weights, tmp_path):
    for wrong in (
        {"method": "best"},
        {"amp": True},
        {"count": -1},
        {"count": 1.5},
        {"count": 2, "method": "components"},
    ):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}="):
            Predictor(weights, **wrong)
    for wrong in ({"device": "cuda:99"}, {"device": "gpu"}, {"settings": {"power": 3}}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}="):
            Predictor(weights, **wrong)
    predictor = Predictor(weights, count=np.int64(2))
    for one in (RGB, Image.fromarray(RGB)):
        with pytest.raises(InputError, match="a list of images"):
            predictor.predict_batch(one)
    (tmp_path / "half.png").write_bytes(cv2.imencode(".png", noise(90, 90))[1].tobytes()[:9000])
    with Image.open(tmp_path / "half.png") as half, pytest.raises(InputError, match="truncated.*; open it again"):
        predictor.predict(half)
    for wrong in (np.ones((9, 9)) * 2, np.ones((9, 9), np.uint8), np.full((9, 9), np.nan), np.ones(9), np.ones((0, 9))):
        with pytest.raises(InputError, match="saliency map"):
            predictor.predict(RGB, wrong)
    with pytest.raises(InputError, match="1 images came with 2"):
        predictor.predict_batch([RGB], [None, None])


def _send(predictor, queue):
    queue.put(predictor.predict(noise(90, 90)).saliency)


def test_a_forked_process_predicts(weights):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        predictor = Predictor(weights, amp="off")
        predictor.net.config = replace(predictor.net.config, size=256)  # large enough for several threads
        expected = predictor.predict(noise(90, 90)).saliency
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_send, args=(predictor, queue))
        child.start()
        try:
            assert np.allclose(queue.get(timeout=60), expected, atol=1e-4)
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(threads)


def test_a_predictor_is_pickled_as_its_file(weights):
    predictor = Predictor(weights, method="components", settings=ALL_SCORES, amp="off")
    sent = bytes(multiprocessing.reduction.ForkingPickler.dumps(predictor))
    assert len(sent) < 10_000, "no handle of each of its tensors"
    other = pickle.loads(sent)
    assert (other.method, other.settings, other.bf16) == ("components", ALL_SCORES, False)
    assert np.array_equal(other.predict(RGB).masks, predictor.predict(RGB).masks)


def test_home_folders_in_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/results") == tmp_path / "results" and path_of("a~b") == Path("a~b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no_such_user").touch()
    assert path_of("~no_such_user") == tmp_path / "~no_such_user"
    assert call("--img", "x.jpg", "--out", "~no_such_user/results") == 2
    assert "names a home folder that is not known" in capsys.readouterr().err


def test_files_are_whole_after_killed_and_concurrent_writers(tmp_path):
    path = tmp_path / ("n" * 251 + ".txt")
    path.with_name(f".{path.name[-60:]}.partial").write_bytes(b"what a killed process left, longer than the new")

    def write(number):
        files.write_atomically(path, lambda file: [file.write(bytes([number])) for _ in range(1000)])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == 1000 and len(set(content)) == 1
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(path, lambda file: file.write(b"half") / 0)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="shorten"):
        files.write_atomically(tmp_path / ("n" * 256), lambda file: None)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path):
    """Torch itself answers with errors of its own, or ends the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*x.pt"):
            checkpoint.save({"x": torch.zeros(10_000)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_pipes_are_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR)
    files.save_json([1], tmp_path / "pipe")
    assert json.loads(os.read(end, 99)) == [1] and (tmp_path / "pipe").is_fifo()
    os.close(end)


def test_pictures_are_listed_where_predictions_cannot_be_written(weights, tmp_path, capsys):
    photographs, out = make_photographs(tmp_path / "in", 1), tmp_path / "out"
    replace_file = files.write_atomically

    def full(path, write, *sync):
        if path.name == "predictions.json":
            raise files.write_error(path, OSError(28, "No space left on device"))
        replace_file(path, write, *sync)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        assert call("--img", photographs, tmp_path / "absent.png", "--weights", weights, "--out", out) == 1
    output = capsys.readouterr()
    assert "p00_instances.png" in output.out and "predictions.json" not in output.out
    assert "predictions.json (No space" in output.err and "absent.png" in output.err


def test_links_of_another_name_have_results(weights, tmp_path):
    photographs = make_photographs(tmp_path / "in", 1)
    (photographs / "link.png").symlink_to("p00.png")
    (tmp_path / "p00.png").symlink_to(photographs / "p00.png")
    out = tmp_path / "out"
    assert call("--img", photographs, tmp_path / "p00.png", "--weights", weights, "--out", out) == 0
    assert {path.name for path in out.glob("*_instances.png")} == {"p00_instances.png", "link_instances.png"}


def test_files_that_look_like_options(weights, tmp_path, monkeypatch, capsys):
    Image.fromarray(noise(30, 30)).save(tmp_path / "-x.png")
    monkeypatch.chdir(tmp_path)
    assert call("--img", "-x.png", "--weights", weights) == 2
    assert "write ./-x.png" in capsys.readouterr().err
    assert call("--img", "./-x.png", "--weights", weights, "--out", "out") == 0


def two_instances(weights, folder, *options):
    """Results of a photograph with two instances, photo, and one without any, void, in ``folder``."""
    photographs, maps = folder / "in" / "sub", folder / "maps"
    photographs.mkdir(parents=True, exist_ok=True)
    maps.mkdir(exist_ok=True)
    saliency = np.zeros((48, 64), np.uint8)
    saliency[8:40, 4:28] = saliency[0:30, 40:64] = 255
    saliency[16:24, 10:18] = 0  # a hole
    for name, values in (("photo", saliency), ("void", saliency * 0)):
        if not (maps / f"{name}.png").exists():
            Image.fromarray(noise(48, 64)).save(photographs / f"{name}.png")
            cv2.imwrite(str(maps / f"{name}.png"), values)
    out = folder / "out"
    common = ("--weights", weights, "--saliency-dir", maps, "--method", "components", "--fusion", "min_score=0")
    code = call("--img", photographs / "photo.png", photographs / "void.png", "--out", out, *common, *options)
    return code, out, saliency > 0


def test_cutouts(weights, tmp_path):
    code, out, salient = two_instances(weights, tmp_path, "--cutouts")
    assert code == 0
    photograph = read_image(tmp_path / "in" / "sub" / "photo.png")
    labels = read_instance_mask(out / "photo_instances.png")
    places = json.loads((out / "cutouts.json").read_text())
    assert [place["file_name"] for place in places] == ["photo_cutout1.png", "photo_cutout2.png"]
    assert not list(out.glob("void_cutout*"))
    for number, place in enumerate(places, 1):
        cutout = np.asarray(Image.open(out / place["file_name"]))
        x, y, width, height = place["bbox"]
        assert cutout.shape == (height, width, 4) and place["image_id"] == "photo" and 0 < place["score"] <= 1
        crop, mask = photograph[y : y + height, x : x + width], labels[y : y + height, x : x + width] == number
        assert np.array_equal(cutout[mask][:, :3], crop[mask]), "colours of the photograph"
        inside = {tuple(colour) for colour in crop[mask]}
        rim = (cutout[..., 3] > 0) & ~mask
        assert rim.any() and {tuple(colour) for colour in cutout[rim][:, :3]} <= inside, "nothing of the background"
        assert cutout[mask][:, 3].min() > 50 and len(np.unique(cutout[..., 3])) > 5
        assert np.median(cutout[mask][:, 3]) == 255 and np.median(cutout[rim][:, 3]) < 128
        assert not cutout[cutout[..., 3] == 0].any()
        distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_C, 3)
        assert not cutout[distance > 2].any() and mask[2 : mask.shape[0] - 2, 2 : mask.shape[1] - 2].sum() > 0
    at_the_edge = cutout if places[-1]["bbox"][1] == 0 else np.asarray(Image.open(out / places[0]["file_name"]))
    assert at_the_edge[0, 10, 3] == 255, "no rim where the photograph ends"


def test_cutouts_of_an_earlier_result_are_removed(weights, tmp_path):
    assert two_instances(weights, tmp_path, "--cutouts")[0] == 0
    cv2.imwrite(str(tmp_path / "out" / "void_cutout1.png"), noise(9, 9))
    for name in ("void_instances.png", "photo_cutout1.png"):
        (tmp_path / "out" / name).unlink()
    assert two_instances(weights, tmp_path, "--cutouts")[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("*_cutout*")} == {
        "photo_cutout1.png",
        "photo_cutout2.png",
    }


def test_a_rotated_photograph_has_upright_cutouts_and_annotations(weights, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 60)).save(tmp_path / "r.jpg", exif=exif)
    options = ("--weights", weights, "--out", tmp_path, "--fusion", "min_score=0", "--cutouts", "--labelme")
    assert call("--img", tmp_path / "r.jpg", *options, "--coco", tmp_path / "all.json") == 0
    labels, shown = read_instance_mask(tmp_path / "r_instances.png"), read_image(tmp_path / "r.jpg")
    x, y, width, height = json.loads((tmp_path / "cutouts.json").read_text())[0]["bbox"]
    mask = labels[y : y + height, x : x + width] == 1
    cutout = np.asarray(Image.open(tmp_path / "r_cutout1.png"))
    assert np.array_equal(cutout[mask][:, :3], shown[y : y + height, x : x + width][mask])
    image = json.loads((tmp_path / "all.json").read_text())["images"][0]
    labelme = json.loads((tmp_path / "r.json").read_text())
    assert (image["height"], image["width"]) == (labelme["imageHeight"], labelme["imageWidth"]) == (60, 40)


@pytest.mark.parametrize("polygons", [False, True])
def test_a_coco_data_set(weights, tmp_path, capsys, polygons):
    file = tmp_path / "new" / "all.json"
    options = ("--coco", file, *(["--coco-polygons"] if polygons else []))
    code, out, salient = two_instances(weights, tmp_path, *options)
    assert code == 0 and str(file) in capsys.readouterr().out
    coco = COCO(str(file))
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in coco.loadImgs([1, 2])] == [
        (1, "photo.png", 48, 64),
        (2, "void.png", 48, 64),
    ]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["salient object"]
    assert coco.getAnnIds(imgIds=[2]) == [] and coco.getAnnIds() == [1, 2]
    records = json.loads((out / "predictions.json").read_text())
    for annotation, record in zip(coco.loadAnns([1, 2]), records, strict=True):
        mask, exact = coco.annToMask(annotation) > 0, decode_rle(record["segmentation"])
        assert (annotation["category_id"], annotation["iscrowd"], annotation["score"]) == (1, 0, record["score"])
        rows, columns = np.flatnonzero(exact.any(1)), np.flatnonzero(exact.any(0))
        box = [columns[0], rows[0], len(columns), len(rows)]
        assert annotation["bbox"] == box and annotation["area"] == exact.sum()
        assert isinstance(annotation["segmentation"], list) == polygons
        assert np.array_equal(mask, exact) if not polygons else (mask ^ exact).sum() < 0.1 * exact.sum()
    before = file.read_bytes()
    assert two_instances(weights, tmp_path, *options)[0] == 0
    assert "2 of 2 photographs are finished" in capsys.readouterr().out and file.read_bytes() == before


def test_a_coco_data_set_is_measured_like_the_records(weights, tmp_path):
    code, out, _ = two_instances(weights, tmp_path, "--coco", tmp_path / "all.json")
    (tmp_path / "gt").mkdir()
    truth = np.zeros((48, 64), np.uint8)
    truth[8:40, 4:26], truth[0:30, 36:64] = 1, 2
    for stem in ("photo", "void"):
        files.save_label_png(truth, tmp_path / "gt" / f"{stem}.png")
    figures = []
    for name in ("out/predictions.json", "all.json"):
        options = ("--pred", tmp_path / name, "--gt", tmp_path / "gt", "--json", tmp_path / "figures.json")
        assert conftest.call(evaluate.main, *options) == 0
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert figures[0] == figures[1]
    truth = json.loads((tmp_path / "all.json").read_text())
    records = json.loads((out / "predictions.json").read_text())
    results = COCO(str(tmp_path / "all.json")).loadRes([record | {"image_id": 1} for record in records])
    measure = COCOeval(COCO(str(tmp_path / "all.json")), results, "segm")
    measure.evaluate()
    measure.accumulate()
    measure.summarize()
    assert measure.stats[0] == pytest.approx(1) and len(truth["images"]) == 2


def test_coco_files_that_are_not_replaced(weights, tmp_path, capsys):
    for name, words in (
        ("truth.json", "was not written with --coco"),
        ("all.txt", "end its name in .json"),
    ):
        (tmp_path / name).write_text('{"info": {}, "images": []}')
        assert two_instances(weights, tmp_path, "--coco", tmp_path / name)[0] == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert (tmp_path / "truth.json").read_text() == '{"info": {}, "images": []}'
    assert two_instances(weights, tmp_path, "--coco-polygons")[0] == 2
    assert "add --coco FILE" in capsys.readouterr().err


def test_file_names_are_relative_to_the_common_folder(tmp_path):
    paths = [tmp_path / "a" / "1.jpg", tmp_path / "a" / "b" / "2.jpg"]
    assert annotations.file_names(paths) == {"1": "1.jpg", "2": "b/2.jpg"} and annotations.file_names([]) == {}


def test_labelme_files(weights, tmp_path, capsys, added):
    code, out, salient = two_instances(weights, tmp_path, "--labelme")
    data = json.loads((out / "photo.json").read_text())
    assert code == 0 and data["imageData"] is None and (out / data["imagePath"]).resolve().name == "photo.png"
    assert (out / data["imagePath"]).is_file() and (data["imageHeight"], data["imageWidth"]) == (48, 64)
    assert [shape["group_id"] for shape in data["shapes"]] == [1, 2]
    assert {(shape["label"], shape["shape_type"]) for shape in data["shapes"]} == {("salient object", "polygon")}
    labels = read_instance_mask(out / "photo_instances.png")
    for shape in data["shapes"]:
        exact = labels == shape["group_id"]
        mask = decode_polygons([np.ravel(shape["points"])], exact.shape)
        assert (mask ^ exact).sum() < 0.1 * exact.sum()
    assert not json.loads((out / "void.json").read_text())["shapes"]

    (out / "photo_instances.png").unlink()
    added.stems.clear()
    assert two_instances(weights, tmp_path, "--labelme")[0] == 0 and added.stems == ["photo"], "its own is replaced"
    (out / "photo.json").write_text(json.dumps(data | {"version": "5.0.0"}))  # as LabelMe saves it
    (out / "photo_instances.png").unlink()
    assert two_instances(weights, tmp_path, "--labelme")[0] == 1
    assert "was not written by infer.py or was edited since, and is kept" in capsys.readouterr().err
    assert json.loads((out / "photo.json").read_text())["version"] == "5.0.0"


def test_outlines_are_exact_with_holes_and_parts():
    rng = np.random.default_rng(0)
    for number in range(60):
        shape = tuple(rng.integers(2, 50, 2))
        values = rng.random(shape, np.float32)
        mask = cv2.GaussianBlur(values, (0, 0), 2) > 0.5 if number % 2 else values < 0.6
        if mask.any():
            assert np.array_equal(decode_polygons(encode_polygons(mask), shape), mask)
    assert encode_polygons(np.zeros((5, 5), bool)) == []
    assert encode_polygons(np.ones((3, 4), bool), 1) in ([[0, 0, 0, 3, 4, 3, 4, 0]], [[0, 0, 4, 0, 4, 3, 0, 3]])


def test_names_that_results_would_replace(weights, tmp_path, capsys):
    photographs = make_photographs(tmp_path / "in", 1)
    for name in ("p00_cutout1.png", "predictions.png", "p00_overlay.png"):
        shutil.copy(photographs / "p00.png", photographs / name)
    options = ("--weights", weights, "--out", photographs, "--fusion", "min_score=0", "--labelme", "--cutouts")
    before = (photographs / "p00_cutout1.png").read_bytes()
    assert call("--img", *photographs.glob("*.png"), *options) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("would replace a photograph or another result" in line for line in errors)
    assert (photographs / "p00_cutout1.png").read_bytes() == before and not (
        photographs / "predictions_instances.png"
    ).exists()
    assert (photographs / "p00_overlay_instances.png").exists(), "a name that is no longer written"


def test_no_result_is_an_input_of_the_next_call(weights, tmp_path, capsys, added):
    photographs = make_photographs(tmp_path / "in", 2)
    options = ("--weights", weights, "--out", photographs, "--fusion", "min_score=0", "--labelme", "--cutouts")
    options += ("--visualize", "--coco", photographs / "all.json")
    assert call("--img", photographs, *options) == 0
    there = sorted(path.name for path in photographs.iterdir())
    assert {"p00_cutout1.png", "p00_overlay.jpg", "p00.json", "cutouts.json", "all.json"} <= set(there)
    assert call("--img", photographs, *options) == 0
    assert call("--img", *photographs.iterdir(), *options) == 0
    assert sorted(path.name for path in photographs.iterdir()) == there and sorted(added.stems) == ["p00", "p01"]
    assert len(json.loads((photographs / "all.json").read_text())["images"]) == 2


def test_no_overlay(weights, tmp_path):
    code, out, _ = two_instances(weights, tmp_path, "--no-overlay")
    assert code == 0 and not list(out.glob("*_overlay*")) and (out / "photo_instances.png").exists()


def test_overlays_of_very_long_photographs_are_reduced(tmp_path):
    files.save_jpeg(np.zeros((2, 70_000, 3), np.uint8), tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").size == (65_500, 1)


def test_a_photograph_from_the_standard_input(weights, tmp_path):
    Image.fromarray(noise(30, 40)).save(tmp_path / "a.png")
    command = [sys.executable, ROOT / "infer.py", "--img", "-", "--weights", weights, "--out", tmp_path / "out"]
    for content, code, words in (
        ((tmp_path / "a.png").read_bytes(), 0, ""),
        (b"words", 2, "error: the standard input is not an image that can be read"),
        (b"", 2, "error: the standard input is empty"),
    ):
        done = subprocess.run(command, input=content, capture_output=True, env=conftest.environment())
        message = done.stderr.decode()
        assert done.returncode == code and message.startswith(words) and message.count("\n") == (code > 0), message
    assert read_instance_mask(tmp_path / "out" / "stdin_instances.png").shape == (30, 40)


def test_the_standard_input_stands_alone(monkeypatch, capsys):
    for more in (["x.jpg"], ["--labelme"]):
        assert call("--img", "-", *more) == 2
        assert "takes no other paths and no --labelme" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert call("--img", "-") == 2
    assert "needs a photograph on the standard input" in capsys.readouterr().err
