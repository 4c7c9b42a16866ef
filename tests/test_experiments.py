"""The experiments: recipes and rows are made of options the scripts know, and rows share what they have in common."""

import json

import cv2
import numpy as np
import pytest
import torch
from conftest import call

import train_branches
import train_pts
from experiments import prm, recipes, stages, tables
from infer import Maps
from models.classifier import Classifier
from models.wsid_net import NetConfig, WSIDNet, load_weights, save_weights
from utils import checkpoint


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Runs experiments.tables with trainings that only note their parsed arguments and leave empty weights."""
    calls = []

    def branches(argv):
        args = train_branches.get_args_parser().parse_args(argv)
        calls.append(args)
        (args.out / args.stage).mkdir(parents=True, exist_ok=True)
        (args.out / args.stage / "weights.pt").touch()
        (args.out / "weights.pt").touch()

    def pts(argv):
        args = train_pts.get_args_parser().parse_args(argv)
        calls.append(args)
        (args.out / "weights_pts.pt").touch()

    def measure(row, weights, args):
        assert weights.exists()
        ap = {"0.5": 0.25, "0.7": 0.125}
        return {"mAP": {"pooled": ap, "per-image": ap}, "count": {"accuracy": 0.5}, "saliency": {"max_f": 1, "mae": 0}}

    monkeypatch.setattr(train_branches, "main", branches)
    monkeypatch.setattr(train_pts, "main", pts)
    monkeypatch.setattr(tables, "measure", measure)
    monkeypatch.setattr(tables, "write_truth", lambda args: args.out / "truth")
    return calls


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_recipes_are_options_of_the_scripts(called, recipe, tmp_path):
    out = tmp_path / "with space"
    recipes.main([recipe, "--data", "a b", "c", "--cam-data", "d", "--out", str(out), "--gpu", "-1"])
    cam, labels, saliency, branches, pts = called
    assert [args.stage for args in called[:4]] == ["cam", "labels", "saliency", "branches"]
    assert cam.data == ["a b", "c", "d"] and labels.data == branches.data == pts.data == ["a b", "c"]
    assert branches.labels == saliency.labels == pts.labels == out / "labels_run" / "labels"
    assert (cam.backbone, cam.size) == (labels.backbone, labels.size), "labels come from the classifier"
    assert (pts.iters, pts.epochs) == recipes.RECIPES[recipe].rounds and not branches.no_ca


def test_a_second_cycle_learns_from_instances_of_counted_photographs(called, tmp_path):
    recipes.main(["cpu", "--data", "a", "--counted", "b@count", "--out", str(tmp_path)])
    first, second, branches = called[-3:]
    assert [args.data for args in called[-3:]] == [["a"], ["a", "b@count"], ["a", "b@count"]]
    assert (second.iters, second.out) == (1, tmp_path / "cycle2") and (second.out / "weights.pt").exists()
    assert first.labels == second.labels, "the first pseudo masks"
    assert (branches.stage, branches.labels) == ("branches", second.out / "pts" / "r1" / "labels")
    assert branches.epochs == 3 and branches.out == tmp_path / "final"


@pytest.mark.parametrize("table", [table for table in tables.TABLES if table != "pts"])
def test_every_row_is_an_option_and_stands_in_the_table(called, table, tmp_path):
    options = ["--recipe", "quick", "--out", str(tmp_path), "--seeds", "0", "1", "--saliency-dir", "X=maps"]
    options += ["--counted", "b@count"]
    tables.main([table, *options])
    text = (tmp_path / f"table{table}.md").read_text()
    rows = [row.name for row in tables.TABLES[table]]
    rows += {"1": ["saliency of X"], "6": ["saliency of the ground truth", "saliency of X"]}.get(table, [])
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[4:]] == rows
    numbers = [25, 12.5, 25, 12.5, 50, 100, 0]
    assert text.splitlines()[4].endswith("".join(f" | {number:.1f} ± 0.0" for number in numbers) + " |")
    for row in tables.TABLES[table]:
        assert not row.paper or f"{row.paper[0]} / {row.paper[1]}" in text


def test_rows_share_what_they_have_in_common(called, tmp_path):
    args = tables.get_args_parser().parse_args(["2", "7", "--recipe", "quick", "--out", str(tmp_path)])
    recipe = recipes.RECIPES["quick"]
    rows = {row.name: row for row in (*tables.TABLES["2"], *tables.TABLES["7"])}
    for name in ("ours", "w/o PTS", "w/o CA, BE, PTS, L_su", "w/o CRF"):
        tables.train_row(rows[name], recipe, args, 0)
    base = tmp_path / "seed0"
    same = lambda a, b: (base / a).resolve() == (base / b).resolve()  # noqa: E731
    assert same("run/branches", "run_no_PTS/branches"), "the same network, with and without PTS"
    assert not same("run/saliency", "run_no_PTS/saliency"), "without PTS it trains as long as with"
    assert same("run_no_PTS/saliency", "run_no_ca_no_be_no_lsu_no_PTS/saliency")
    assert not same("run/branches", "run_no_ca_no_be_no_lsu_no_PTS/branches")
    assert same("run_labels/cam", "run_labels_no_crf/cam") and not same("run/saliency", "run_no_crf/saliency")
    epochs = {args.out.name: args.epochs for args in called if getattr(args, "stage", "") == "saliency"}
    stages = [args for args in called if getattr(args, "stage", "") in ("saliency", "branches")]
    assert all(args.no_ca == ("no_ca" in args.out.name) for args in stages), "either may be the last, which assembles"
    rounds, each = recipe.rounds
    assert epochs["run_no_PTS"] == epochs["run"] + rounds * each


def test_a_network_for_the_number_is_added_to_ours(called, tmp_path):
    out = tmp_path / "with space"
    args = tables.get_args_parser().parse_args(["2", "--recipe", "quick", "--out", str(out)])
    ours, more = (tables.train_row(row, recipes.RECIPES["quick"], args, 0) for row in (tables.OURS, tables.NUMBER))
    assert (called[-1].stage, called[-1].init) == ("number", str(ours)) and more.parent == ours.parent / "number"
    assert [getattr(args, "stage", "pts") for args in called].count("pts") == 2, "the same network: found, not trained"
    assert {args.out for args in called if getattr(args, "stage", "pts") == "pts"} == {ours.parent}


def test_a_second_cycle_of_a_table_learns_the_number_from_all_counts(called, tmp_path):
    args = tables.get_args_parser().parse_args(["cycle", "--data", "a", "--counted", "b@count", "--out", str(tmp_path)])
    told = tables.train_row(tables.AGAIN, recipes.RECIPES["quick"], args, 0)
    final = tmp_path / "seed0" / "run" / "final"
    assert told == final / "number" / "weights.pt" and called[-1].init == str(final / "weights.pt")
    assert called[-1].stage == "number" and called[-1].data == ["a", "b@count"]
    assert [getattr(args, "stage", "pts") for args in called[-4:-1]] == ["pts", "pts", "branches"]


def test_all_rows_without_pts(called, tmp_path):
    tables.main(["2", "--recipe", "quick", "--out", str(tmp_path), "--no-pts"])
    assert {getattr(args, "stage", "pts") for args in called} == {"cam", "labels", "saliency", "branches", "number"}
    text = (tmp_path / "table2_no_pts.md").read_text()
    assert "w/o PTS" not in text and "--no-pts`" in text and "| w/o CA |" in text and "| ours |" in text
    assert len({args.epochs for args in called if args.stage == "saliency"}) == 1


def test_given_labels_serve_all_seeds(called, tmp_path):
    given = tmp_path / "other" / "labels"
    tables.main(["2", "--recipe", "quick", "--out", str(tmp_path), "--seeds", "0", "1", "--labels", str(given)])
    assert {getattr(args, "stage", "pts") for args in called} == {"saliency", "branches", "pts", "number"}
    assert {args.labels for args in called if getattr(args, "stage", "") != "number"} == {given}
    assert {args.seed for args in called} == {0, 1}
    called.clear()
    recipes.main(["quick", "--out", str(tmp_path), "--seed", "2", "--labels", str(given)])
    assert [(args.labels, args.seed) for args in called] == 3 * [(given, 2)], "no classifier, no labels of its own"
    args = tables.get_args_parser().parse_args(["1", "--out", str(tmp_path), "--labels", str(given)])
    assert tables.train_row(tables.PRM, recipes.RECIPES["quick"], args, 0) == given.parent / "cam" / "weights.pt"
    tables.train_row(tables.TABLES["7"][0], recipes.RECIPES["quick"], args, 0)
    assert called[-3].labels == tmp_path / "seed0" / "run_labels_no_crf" / "labels", "this row is about the labels"


def test_iterations_of_pts_go_on_from_those_of_ours(called, tmp_path, monkeypatch):
    """As many as the paper has; the saliency branch of each is joined with the branches that all have in common."""
    config = NetConfig(backbone="mobilenetv2_100", size=64, channels=8)
    before = WSIDNet(config)
    written = []

    def pts(argv):
        args = train_pts.get_args_parser().parse_args(argv)
        for r in range(1, args.iters + 1):
            folder = args.out / "pts" / f"r{r}"
            if not folder.exists():
                folder.mkdir(parents=True)
                state = {key: torch.full_like(value, r) for key, value in before.saliency.state_dict().items()}
                checkpoint.save({"model": state}, folder / "weights.pt")
                written.append((args.out.name, r))
        (args.out / "weights_pts.pt").write_text(str(args.iters))

    def branches(argv):
        save_weights(before, train_branches.get_args_parser().parse_args(argv).out / "weights.pt")

    monkeypatch.setattr(train_pts, "main", pts)
    monkeypatch.setattr(train_branches, "main", branches)
    tables.main(["pts", "--recipe", "quick", "--out", str(tmp_path), "--labels", str(tmp_path)])
    assert written == [("run", 1), ("run", 2), *(("run_6_iterations", r) for r in range(3, 7))]
    assert (tmp_path / "seed0" / "run" / "weights_pts.pt").read_text() == "2", "ours is what it was"
    rows = [line.split(" | ")[0].strip("| ") for line in (tmp_path / "tablepts.md").read_text().splitlines()[4:]]
    assert rows == ["r = 0, before PTS", *(f"r = {r}" for r in range(1, 7))]
    assert "iteration of PTS" in (tmp_path / "pts.svg").read_text()
    last = load_weights(tmp_path / "seed0" / "run" / "pts" / "r6" / "network.pt")
    assert {float(value.detach().min()) for value in last.saliency.parameters()} == {6.0}
    part = before.branches.state_dict()["centroid.predict.weight"]
    assert torch.allclose(last.branches.state_dict()["centroid.predict.weight"], part, atol=1e-3)


@pytest.mark.parametrize("table, option, message", [
    ("pts", "--no-pts", "--no-pts leaves nothing of the tables pts and cycle"),
    ("cycle", "--no-pts", "--no-pts leaves nothing of the tables pts and cycle"),
    ("cycle", "--gpu=-1", "name them with --counted"),
])
def test_tables_that_go_on_say_what_they_need(called, tmp_path, capsys, table, option, message):
    assert call(tables.main, table, option, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not called


def test_a_wrong_setting_of_the_fusion_is_told_before_the_training(called, tmp_path, capsys):
    assert call(tables.main, "2", "--fusion", "steps=many", "--out", tmp_path / "out") == 2
    assert "steps is of type int" in capsys.readouterr().err and not called


def test_saliency_of_the_ground_truth(tmp_path):
    for kind in ("images", "instance_masks"):
        (tmp_path / kind).mkdir()
        checkpoint.save_png(np.array([[0, 1, 2, 255]] * 3, np.uint8), tmp_path / kind / "a.png")
    args = tables.get_args_parser().parse_args(["6", "--val", str(tmp_path), "--out", str(tmp_path / "out")])
    assert cv2.imread(str(tables.write_truth(args) / "a.png"), 0)[0].tolist() == [0, 255, 255, 0]


def test_measured_rows_are_not_measured_again(monkeypatch, tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    written = []

    def evaluate(argv):
        written.append(argv)
        (tmp_path / argv[argv.index("--json") + 1]).write_text(json.dumps({"run": len(written)}))

    monkeypatch.setattr(tables.evaluate, "main", evaluate)
    args = tables.get_args_parser().parse_args(["2", "--val", "photographs"])
    assert tables.measure(tables.OURS, weights, args) == tables.measure(tables.OURS, weights, args) == {"run": 1}
    assert tables.measure(tables.COMPONENTS, weights, args) == {"run": 2} and "components" in written[1]
    weights.write_bytes(b"other")
    assert tables.measure(tables.OURS, weights, args) == {"run": 3}
    assert str(weights) in written[0] and "photographs" in written[0]


def test_peaks_are_local_maxima_that_stand_out():
    response = torch.zeros(9, 12)
    response[2, 3], response[6, 8], response[6, 9], response[8, 0] = 1.0, 0.8, 0.7, 0.4
    assert prm.find_peaks(response).tolist() == [[2, 3], [6, 8]]
    assert len(prm.find_peaks(torch.zeros(4, 4))) == 0


def test_every_peak_answers_to_its_own_side():
    """With a classifier that looks at nothing but brightness, two bright places are two instances."""

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


def test_true_maps_say_what_the_mask_says():
    gt = np.zeros((40, 60), np.uint8)
    gt[8:32, 8:28], gt[8:32, 28:48], gt[0:4] = 1, 2, 255
    saliency, boundary, offsets, count = stages.true_maps(gt, (10, 15))
    assert count == 2 and saliency[0].max() == 0 and saliency[2:8, 2:12].min() == 1 and saliency.sum() == 60
    assert offsets[:, 4, 4].tolist() == [0.5, 0] and offsets[:, 4, 12].tolist() == [0.5, -3], "centres of the two"
    assert boundary[2:8, 7].min() == 1 and boundary[3:7, 3:6].max() == 0, "between the two, not inside"
    maps = Maps(*torch.rand(2, 10, 15), torch.rand(2, 10, 15), torch.tensor([0.2, 0.3, 0.5]), torch.rand(3, 5, 8))
    replaced = stages.with_truth(maps, gt, "ST")
    assert replaced.shares.tolist() == [0, 1] and torch.equal(replaced.boundary, maps.boundary)
    assert np.array_equal(replaced.saliency.numpy(), saliency) and stages.with_truth(maps, gt, "") == maps
    assert replaced.features is maps.features and stages.with_truth(maps, gt, "B").features is None
