"""The experiments: recipes and rows are made of options the scripts know, and rows share what they have in common."""

import json

import pytest

import train_branches
import train_pts
from experiments import recipes, tables


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


@pytest.mark.parametrize("table", [table for table in tables.TABLES if table != "pts"])
def test_every_row_is_an_option_and_stands_in_the_table(called, table, tmp_path):
    options = ["--recipe", "quick", "--out", str(tmp_path), "--seeds", "0", "1", "--saliency-dir", "truth=maps"]
    tables.main([table, *options])
    text = (tmp_path / f"table{table}.md").read_text()
    rows = [row.name for row in tables.TABLES[table]] + ["saliency of truth"] * (table == "6")
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
    rounds, each = recipe.rounds
    assert epochs["run_no_PTS"] == epochs["run"] + rounds * each


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
    assert str(weights) in written[0] and "photographs" in written[0]
