"""evaluate.py end to end: predictions of every form, weights (with a stand-in network), the page, and bad input."""

import base64
import json
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import evaluate
from datasets.masks import (
    MaskFile,
    decode_rle,
    encode_rle,
    list_masks,
    prediction_records,
    read_instance_mask,
    read_saliency_mask,
)
from utils.cli import InputError, run
from utils.metrics import ImageResult
from utils.report import SIDE, format_page, rank_images, tint

SHAPE = (12, 20)


def instance_map(*boxes):
    """uint8 SHAPE with instance n in the n-th (top, left, bottom, right) box."""
    gt = np.zeros(SHAPE, np.uint8)
    for label, (top, left, bottom, right) in enumerate(boxes, start=1):
        gt[top:bottom, left:right] = label
    return gt


@pytest.fixture
def folder(tmp_path):
    """Three images: two instances and void, one instance, none. The photographs show an instance of label n
    in the red value 80 n."""
    truths = {
        "a": instance_map((1, 1, 6, 9), (7, 11, 12, 19)),
        "b": instance_map((0, 0, 12, 10)),
        "c": instance_map(),
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "instance_masks").mkdir()
    for stem, gt in truths.items():
        photograph = np.zeros((*SHAPE, 3), np.uint8)
        photograph[..., 0] = 80 * gt
        Image.fromarray(photograph).save(tmp_path / "images" / f"{stem}.png")
        if stem == "a":
            gt[6, :] = 255
        Image.fromarray(gt).save(tmp_path / "instance_masks" / f"{stem}.png")
    return tmp_path


@pytest.fixture
def predictions(folder):
    """Perfect on a, with a false positive on c scored highest, and nothing on b."""
    gt = read_instance_mask(folder / "instance_masks" / "a.png")
    records = prediction_records("a", [gt == 1, (gt == 2) | (gt == 255)], [0.5, 0.25])
    records += prediction_records("c", [np.ones(SHAPE, bool)], [0.75])
    return write(folder / "predictions.json", records)


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def measure(folder, *argv):
    """Run evaluate.main and return the numbers it writes."""
    evaluate.main([*map(str, argv), "--json", str(folder / "out" / "numbers.json")])
    return json.loads((folder / "out" / "numbers.json").read_text())


def failure(capsys, *argv):
    """The message of a run that must end with exit code 2 and one sentence."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: evaluate.main([*map(str, argv)]))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out
    return captured.err


# ---- files of predictions


def test_file_of_predictions_by_hand(folder, predictions, capsys):
    numbers = measure(folder, "--pred", predictions, "--gt", folder / "instance_masks")
    # Ranking .75 (c) miss, .5 (a) hit, .25 (a) hit; b is never found, so 3 instances.
    # precision 0 1/2 2/3, best from here on 2/3; recall 0 1/3 2/3: recalls 0 .. .66 (67) read 2/3.
    pooled = 67 * 2 / 3 / 101
    # Per image: a 1, b 0, c has no instance: 1/2.
    assert numbers["mAP"]["pooled"] == pytest.approx({"0.5": pooled, "0.7": pooled, "0.5:0.95": pooled})
    assert numbers["mAP"]["per-image"] == pytest.approx({"0.5": 0.5, "0.7": 0.5, "0.5:0.95": 0.5})
    # T 2 1 0, T* 2 0 1
    assert numbers["count"] == pytest.approx({"accuracy": 1 / 3, "mae": 2 / 3, "threshold": 0})
    assert numbers["saliency"] is None
    assert (numbers["images"], numbers["images_with_instances"], numbers["instances"]) == (3, 2, 3)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "3 images (2 with instances), 3 instances"
    assert table[2].split() == ["pooled", "mAP", "(%)", "per-image", "mAP", "(%)", "count"]
    assert table[3].split() == "method predictions 0.5 0.7 0.5:0.95 0.5 0.7 0.5:0.95 exact (%) MAE".split()
    assert table[4].split() == "predictions 3 44.2 44.2 44.2 50.0 50.0 50.0 33.3 0.667".split()
    assert len({len(line) for line in table[2:5]}) == 1  # aligned


def test_count_threshold(folder, predictions):
    gt = folder / "instance_masks"
    numbers = measure(folder, "--pred", predictions, "--gt", gt, "--count-threshold", 0.5)
    # T 2 1 0, T* 1 0 1
    assert numbers["count"] == pytest.approx({"accuracy": 0, "mae": 1, "threshold": 0.5})


def test_saliency_maps(folder, predictions):
    maps = folder / "maps"
    maps.mkdir()
    for stem, path in list_masks(folder / "instance_masks").items():
        gt = read_instance_mask(path)
        saliency = np.where(gt == 255, 255, np.where(gt > 0, 255, 51)).astype(np.uint8)
        Image.fromarray(saliency).save(maps / f"{stem}.png")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(maps / "of_another_image.png")
    numbers = measure(
        folder, "--pred", predictions, "--gt", folder / "instance_masks", "--saliency-pred", maps
    )
    # Background is wrong by 51 / 255. a has 2 * 40 pixels of instances among the 240 - 20 that are not void.
    background = [1 - 80 / 220, 1 - 120 / 240, 1]
    assert numbers["saliency"]["mae"] == pytest.approx(0.2 * np.mean(background))
    assert numbers["saliency"]["max_f"] == 1
    assert numbers["saliency"]["images"] == 3


def test_no_predictions_and_no_instances(folder, capsys):
    empty = write(folder / "empty.json", [])
    numbers = measure(folder, "--pred", empty, "--gt", folder / "instance_masks")
    assert numbers["mAP"]["pooled"]["0.5"] == 0
    for name in "ab":
        (folder / "instance_masks" / f"{name}.png").unlink()
    capsys.readouterr()
    numbers = measure(folder, "--pred", empty, "--gt", folder / "instance_masks")
    assert numbers["mAP"]["pooled"]["0.5"] is None
    assert numbers["count"] == {"accuracy": 1.0, "mae": 0.0, "threshold": 0.0}
    assert capsys.readouterr().out.splitlines()[4].split() == "empty 0 - - - - - - 100.0 0.000".split()


def test_records_of_other_methods(folder):
    # Integer image ids, another category, further keys, uncompressed RLE: 24 pixels not, 120 in, 96 not.
    Image.fromarray(instance_map((0, 2, 12, 12))).save(folder / "instance_masks" / "139.png")
    for name in "abc":
        (folder / "instance_masks" / f"{name}.png").unlink()
    segmentation = {"size": [*SHAPE], "counts": [24, 120, 96]}
    record = {"image_id": 139, "category_id": 18, "segmentation": segmentation, "score": 1, "id": 5}
    numbers = measure(folder, "--pred", write(folder / "p.json", [record]), "--gt", folder / "instance_masks")
    assert numbers["mAP"]["pooled"] == {"0.5": 1.0, "0.7": 1.0, "0.5:0.95": 1.0}


# ---- folders of predictions


def save_mask(path, labels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(labels).save(path)


@pytest.fixture
def label_maps(folder, predictions):
    """The same as ``predictions``, as label maps with their scores."""
    gt = read_instance_mask(folder / "instance_masks" / "a.png")
    save_mask(folder / "maps" / "a.png", np.where(gt == 255, 2, gt).astype(np.uint8))
    save_mask(folder / "maps" / "b.png", np.zeros(SHAPE, np.uint8))
    save_mask(folder / "maps" / "c.png", np.ones(SHAPE, np.uint8))
    (folder / "maps" / "scores.csv").write_text("file,label,score\na.png,2,.25\nc.png,1,.75\na.png,1,.5\n")
    return folder / "maps"


@pytest.fixture
def single_masks(folder, predictions):
    """The same as ``predictions``, as a mask per instance; one of them black and white."""
    gt = read_instance_mask(folder / "instance_masks" / "a.png")
    save_mask(folder / "masks" / "a_1.png", (gt == 1).astype(np.uint8))
    save_mask(folder / "masks" / "a_02.png", np.where(gt >= 2, 255, 0).astype(np.uint8))
    save_mask(folder / "masks" / "c_7.png", np.ones(SHAPE, np.uint8))
    (folder / "masks" / "scores.csv").write_text("\ufefffile, score\na_1.png,0.5\na_02.png,.25\nc_7.png,.75\n")
    return folder / "masks"


def test_every_form_is_a_row_of_one_table(folder, predictions, label_maps, single_masks, capsys):
    gt = folder / "instance_masks"
    one = measure(folder, "--pred", predictions, "--gt", gt)
    (folder / "results").mkdir()
    (folder / "results" / "predictions.json").write_bytes(predictions.read_bytes())
    save_mask(folder / "results" / "a_overlay.png", np.zeros((5, 5), np.uint8))  # what infer.py writes beside it
    named = [f"json={predictions}", f"maps of mine={label_maps}", single_masks, folder / "results"]
    capsys.readouterr()
    several = measure(folder, "--pred", *named, "--gt", gt)
    assert several == {"json": one, "maps of mine": one, "masks": one, "results": one}
    rows = capsys.readouterr().out.splitlines()[4:]
    figures = "3 44.2 44.2 44.2 50.0 50.0 50.0 33.3 0.667"
    assert [" ".join(row.split()) for row in rows] == [f"{name} {figures}" for name in several]


def test_labels_without_scores_are_ranks(folder, label_maps):
    (label_maps / "scores.csv").unlink()
    numbers = measure(folder, "--pred", label_maps, "--gt", folder / "instance_masks")
    # Ranking 1 (a) hit, 1 (c) miss, 1/2 (a) hit of 3 instances: recalls 0 .. .33 (34) read 1, .34 .. .66 (33) 2/3.
    assert numbers["mAP"]["pooled"]["0.5"] == pytest.approx((34 + 22) / 101)


def test_names_of_methods(folder, predictions, capsys):
    gt = folder / "instance_masks"
    odd = folder / "lr=0.1"
    odd.mkdir()
    (odd / "predictions.json").write_bytes(predictions.read_bytes())
    message = failure(capsys, "--pred", predictions, odd / "predictions.json", "--gt", gt)
    assert "are both called predictions" in message
    argv = ["--pred", predictions, "--pred", f"other={odd / 'predictions.json'}", odd, "--gt", gt]
    assert list(measure(folder, *argv)) == ["predictions", "other", "lr=0.1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zebra.png": instance_map()}, "zebra.png is of no image that has a ground truth"),
        ({"b.png": None}, "maps has no label map of b"),
        ({"b.png": np.full(SHAPE, 255, np.uint8)}, "b.png holds 255"),
        ({"b.png": np.zeros((5, 6), np.uint8)}, "b.png is 5 x 6 but the mask"),
        ({"b.png": instance_map((0, 0, 2, 2))}, "scores.csv has no score for the label 1 of b.png"),
        ({"scores.csv": ""}, "scores.csv line 1 lacks the column"),
        ({"scores.csv": "a.png;1;0.5\n"}, "scores.csv line 1 lacks the column"),
        ({"scores.csv": "file,label,score\na.png,0,1\n"}, "scores.csv line 2 has the label '0'"),
        ({"scores.csv": "file,label,score\na.png,one,1\n"}, "scores.csv line 2 has the label 'one'"),
        ({"scores.csv": "file,label,score\na.png,1,1\na.png,1,2\n"}, "scores.csv line 3 scores what"),
    ],
)
def test_bad_label_maps(folder, label_maps, capsys, change, message):
    alter(label_maps, change)
    assert message in failure(capsys, "--pred", label_maps, "--gt", folder / "instance_masks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_1.png": instance_map()}, "b_1.png has no line in"),
        ({"c_7.png": None}, "scores.csv line 4 names 'c_7.png'"),
        ({"a_1.png": np.zeros((5, 6), np.uint8)}, "a_1.png is 5 x 6 but the mask"),
        ({"a_1.png": instance_map((0, 0, 2, 2), (3, 3, 5, 5))}, "a_1.png holds several values"),
        ({"scores.csv": None}, "c_7.png is of no image that has a ground truth"),
        ({"scores.csv": "file,score\na_1.png,high\n"}, "scores.csv line 2 has the score 'high'"),
        ({"scores.csv": "file,score\na_1.png\n"}, "scores.csv line 2 has the score ''"),
        ({"scores.csv": "file,score\na_1.png,inf\n"}, "scores.csv line 2 has the score 'inf'"),
        ({"scores.csv": "file,score\n\xff,1\n"}, "scores.csv is not a UTF-8 text table"),
    ],
)
def test_bad_masks(folder, single_masks, capsys, change, message):
    if change == {"scores.csv": None}:  # then they are label maps of images called a_1, ...
        (single_masks / "a_1.png").unlink()
        (single_masks / "a_02.png").unlink()
    alter(single_masks, change)
    assert message in failure(capsys, "--pred", single_masks, "--gt", folder / "instance_masks")


def test_mask_of_no_image(folder, single_masks, capsys):
    (single_masks / "c_7.png").rename(single_masks / "c_best.png")
    (single_masks / "scores.csv").write_text("file,score\na_1.png,1\na_02.png,1\nc_best.png,1\n")
    message = failure(capsys, "--pred", single_masks, "--gt", folder / "instance_masks")
    assert "c_best.png is of no image" in message


def alter(folder, change):
    """change: {file name: new picture, new text, or None to remove it}."""
    for name, content in change.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, str):
            (folder / name).write_bytes(content.encode("latin-1"))
        else:
            save_mask(folder / name, content)


# ---- bad predictions


def test_missing_files(folder, predictions, capsys):
    gt = folder / "instance_masks"
    assert "nothing.json" in failure(capsys, "--pred", folder / "nothing.json", "--gt", gt)
    assert "nowhere is not a folder" in failure(capsys, "--pred", predictions, "--gt", folder / "nowhere")
    (folder / "bare").mkdir()
    assert "bare" in failure(capsys, "--pred", predictions, "--gt", folder / "bare")
    bare = folder / "bare"
    Image.fromarray(np.zeros(SHAPE, np.uint8)).save(bare / "a.png")
    message = failure(capsys, "--pred", predictions, "--gt", gt, "--saliency-pred", bare)
    assert "bare has no saliency map of b" in message


@pytest.mark.parametrize("text", ["{", "", '[{"image_id": "a"', "\xff", "[" * 100_000])
def test_broken_json(folder, capsys, text):
    path = folder / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    assert "broken.json is not JSON" in failure(capsys, "--pred", path, "--gt", folder / "instance_masks")


@pytest.mark.parametrize("value", [{"annotations": []}, "text", 3, None])
def test_no_list(folder, capsys, value):
    path = write(folder / "p.json", value)
    assert "p.json holds no list" in failure(capsys, "--pred", path, "--gt", folder / "instance_masks")


GOOD = {"image_id": "a", "category_id": 1, "segmentation": encode_rle(np.ones(SHAPE, bool)), "score": 0.5}
COUNTS = GOOD["segmentation"]["counts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": None}, "has no image_id"),
        ({"segmentation": None}, "has no segmentation"),
        ({"score": None}, "has no score"),
        ({"score": "high"}, "has the score 'high'"),
        ({"score": True}, "has the score True"),
        ({"score": float("nan")}, "has the score nan"),
        ({"score": 10**400}, "has the score 1000"),
        ({"image_id": "zebra"}, "is of the image 'zebra'"),
        ({"segmentation": [[0, 0, 5, 0, 5, 5]]}, "has no RLE"),  # a polygon
        ({"segmentation": {"size": [12], "counts": COUNTS}}, "has no RLE"),
        ({"segmentation": {"size": [12, "20"], "counts": COUNTS}}, "has no RLE"),
        ({"segmentation": {"size": [*SHAPE]}}, "has no RLE"),
        ({"segmentation": {"size": [20, 12], "counts": COUNTS}}, "is 20 x 12 but the mask"),
        ({"segmentation": {"size": [10**9, 10**9], "counts": COUNTS}}, "is 1000000000 x 1000000000"),
        ({"segmentation": {"size": [*SHAPE], "counts": "zzzz"}}, "cannot be decoded"),
        ({"segmentation": {"size": [*SHAPE], "counts": ""}}, "cannot be decoded"),
        ({"segmentation": {"size": [*SHAPE], "counts": "é"}}, "cannot be decoded"),
        ({"segmentation": {"size": [*SHAPE], "counts": [100]}}, "fill 100 pixels of 12 x 20"),
        ({"segmentation": {"size": [*SHAPE], "counts": [250, -10]}}, "cannot be decoded"),
        ({"segmentation": {"size": [*SHAPE], "counts": [0.5]}}, "cannot be decoded"),
    ],
)
def test_bad_record(folder, capsys, change, message):
    bad = {key: value for key, value in (GOOD | change).items() if value is not None}
    path = write(folder / "p.json", [GOOD, bad])
    error = failure(capsys, "--pred", path, "--gt", folder / "instance_masks")
    assert "p.json[1]" in error and message in error


def test_bad_record_is_no_dict(folder, capsys):
    path = write(folder / "p.json", ["a"])
    assert "p.json[0] is not a record" in failure(capsys, "--pred", path, "--gt", folder / "instance_masks")


def test_saliency_map_of_wrong_size(folder, predictions, capsys):
    maps = folder / "maps"
    maps.mkdir()
    for stem in "abc":
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(maps / f"{stem}.png")
    gt = folder / "instance_masks"
    message = failure(capsys, "--pred", predictions, "--gt", gt, "--saliency-pred", maps)
    assert "a.png is 5 x 5" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either --pred"),
        (["--pred", "p.json", "--data", "d"], "give either --pred"),
        (["--pred", "p.json"], "--pred needs --gt"),
        (["--pred", "p.json", "--gt", "d", "--weights", "w.pt"], "--weights has no meaning with --pred"),
        (["--pred", "p.json", "--gt", "d", "--save-pred", "q.json"], "--save-pred has no meaning"),
        (["--pred", "p.json", "--gt", "d", "--mirror"], "--mirror has no meaning with --pred"),
        (["--data", "d", "--gt", "d"], "--gt has no meaning with --data"),
        (["--data", "d", "--images", "d", "--html", "h.html"], "--images has no meaning with --data"),
        (["--pred", "p.json", "--gt", "d", "--images", "d"], "--images has no meaning without --html"),
        (["--pred", "p.json", "q.json", "--gt", "d", "--saliency-pred", "d"], "--saliency-pred is of one method"),
        (["--data", "d", "--count-threshold", "nan"], "--count-threshold"),
    ],
)
def test_options_that_do_not_fit(capsys, argv, message):
    assert message in failure(capsys, *argv)


def test_unwritable_json_is_found_before_the_work(folder, predictions, capsys):
    argv = ["--pred", predictions, "--gt", folder / "instance_masks", "--json"]
    assert "cannot write" in failure(capsys, *argv, folder)  # a folder
    assert "cannot write" in failure(capsys, *argv, predictions / "numbers.json")  # below a file


def test_script(folder, predictions):
    """As typed in a shell."""
    script = [sys.executable, str(Path(evaluate.__file__))]
    argv = ["--pred", str(predictions), "--gt", str(folder / "instance_masks")]
    good = subprocess.run([*script, *argv], capture_output=True, text=True, cwd=folder)
    assert (good.returncode, good.stderr) == (0, "") and "pooled" in good.stdout
    bad = subprocess.run([*script, *argv[:3], "nowhere"], capture_output=True, text=True, cwd=folder)
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.startswith("error: nowhere")


# ---- weights


@pytest.fixture
def model(monkeypatch):
    """A stand-in for infer.Predictor that reads instances off the red channel; returns what it was given."""
    import infer

    seen = types.SimpleNamespace(created=[], maps={}, batches=[])

    class Predictor:
        def __init__(self, weights, device, method="wsid", settings=None, mirror=False):
            seen.created.append((weights, device.type, method, mirror))
            self.weights = weights or Path("bundled.pt")

        def prepare(self, image):
            assert image.dtype == np.uint8 and image.shape[2] == 3
            return image[..., 0]

        def network(self, inputs):
            seen.batches.append(len(inputs))
            return inputs

        def instances(self, red, size, saliency=None):
            assert size == red.shape
            seen.maps[int(red.max())] = saliency
            masks = [red == value for value in (80, 160) if (red == value).any()]
            saliency = (red > 0).astype(np.float32) if saliency is None else saliency
            scores = np.array([0.9, 0.3], np.float32)[: len(masks)]
            return types.SimpleNamespace(masks=np.array(masks, bool), scores=scores, saliency=saliency)

    monkeypatch.setattr(infer, "Predictor", Predictor)
    return seen


def test_weights(folder, model):
    numbers = measure(folder, "--weights", "w.pt", "--data", folder, "--method", "components", "--mirror")
    assert model.created == [(Path("w.pt"), "cpu", "components", True)]
    assert model.maps == {160: None, 80: None, 0: None}
    assert model.batches == [2, 1]
    assert numbers["mAP"]["pooled"] == numbers["mAP"]["per-image"] == {"0.5": 1, "0.7": 1, "0.5:0.95": 1}
    assert numbers["count"]["accuracy"] == 1
    assert (numbers["saliency"]["mae"], numbers["saliency"]["max_f"]) == (0, 1)


def test_default_weights_and_saved_predictions(folder, model):
    direct = measure(folder, "--data", folder, "--save-pred", folder / "saved" / "p.json")
    assert model.created == [(None, "cpu", "wsid", False)]
    records = json.loads((folder / "saved" / "p.json").read_text())
    assert [record["image_id"] for record in records] == ["a", "a", "b"]
    again = measure(folder, "--pred", folder / "saved" / "p.json", "--gt", folder / "instance_masks")
    assert again == direct | {"saliency": None}


def test_saliency_maps_given_to_the_model(folder, model, capsys):
    maps = folder / "maps"
    maps.mkdir()
    for stem in "abc":
        Image.fromarray(np.full(SHAPE, 51, np.uint8)).save(maps / f"{stem}.png")
    measure(folder, "--data", folder, "--saliency-dir", maps)
    capsys.readouterr()
    assert [saliency.shape for saliency in model.maps.values()] == [SHAPE] * 3
    np.testing.assert_allclose(list(model.maps.values()), 0.2)
    (maps / "c.png").unlink()
    assert "maps has no saliency map of c" in failure(capsys, "--data", folder, "--saliency-dir", maps)


def test_figures_beside_the_settings_of_the_run(folder, model, capsys):
    run = folder / "run"
    for stage, settings in (("branches", {"lr": 0.5, "canny": "auto"}), ("pts/r1", {"keep": 0, "scales": [1, 2]})):
        (run / stage).mkdir(parents=True)
        (run / stage / "config.json").write_text(json.dumps(settings))
    numbers = measure(folder, "--weights", "w.pt", "--data", folder, "--log", run)
    capsys.readouterr()
    events = EventAccumulator(str(run / "val" / "w (wsid)")).Reload()
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = HParamsPluginData.FromString(start).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in told.items()} == {
        "branches/lr": 0.5, "branches/canny": "auto", "pts/keep": "", "pts/scales": "[1, 2]"
    }  # fmt: skip
    assert events.Scalars("pooled mAP@0.7")[0].value == numbers["mAP"]["pooled"]["0.7"] == 1
    assert "holds no settings of a training" in failure(capsys, "--data", folder, "--log", folder)


def test_bad_data_folder(folder, model, capsys):
    (folder / "images" / "b.png").unlink()
    assert "b.png has no photograph" in failure(capsys, "--data", folder)
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "images" / "b.png")
    assert "b.png is 5 x 5 but the mask" in failure(capsys, "--data", folder)
    assert "instance_masks is not a folder" in failure(capsys, "--data", folder / "images")


# ---- the page


class Page(HTMLParser):
    """The parts of a page, which must be well-formed and need nothing from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open
        assert "url(" not in text and "@import" not in text
        self.pictures = {attributes["alt"]: decode(attributes["src"]) for tag, attributes in self.tags if tag == "img"}

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object")
        assert not {"href", "srcset", "data", "action"} & dict(attributes).keys()
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def decode(source):
    """A data URI as RGB [H, W, 3]."""
    kind, data = source.split(",")
    assert kind == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def page_of(folder, *argv):
    evaluate.main([*map(str, argv), "--html", str(folder / "page.html")])
    return Page((folder / "page.html").read_text())


def test_page_of_predictions(folder, predictions, label_maps):
    page = page_of(folder, "--pred", f"ours={predictions}", f"<i>x={label_maps}", "--gt", folder / "instance_masks")
    assert list(page.pictures) == [f"{stem}: {name}" for stem in "ab" for name in ("ground truth", "ours", "<i>x")]
    headings = [text for text in page.text if text in ("Best images", "a", "Worst images", "b")]
    assert headings == ["Best images", "a", "Worst images", "b"]
    assert "AP 100.0 %, predictions: 2" in page.text and "AP 0.0 %, predictions: 0" in page.text
    assert page.text.count("44.2") == 6  # a row a method
    # precision 2/3 up to recall 2/3, as in test_file_of_predictions_by_hand
    curves = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    points = np.array([point.split(",") for point in curves[0].split()], float)
    assert len(curves) == 4 and len(set(curves)) == 1
    np.testing.assert_allclose(points[:, 1], [110] * 67 + [310] * 34)
    np.testing.assert_allclose(points[[0, 100], 0], [56, 556])


def test_photographs_of_the_page(folder, predictions, capsys):
    argv = ["--pred", predictions, "--gt", folder / "instance_masks"]
    # Far from its instance, the ground truth of b is the photograph, black, or else grey.
    beside = page_of(folder, *argv).pictures["b: ground truth"]
    assert beside.shape == (*SHAPE, 3) and (beside[:, 17] < 12).all()
    (folder / "images").rename(folder / "elsewhere")
    assert (abs(page_of(folder, *argv).pictures["b: ground truth"][:, 17].astype(int) - 128) < 12).all()
    named = page_of(folder, *argv, "--images", folder / "elsewhere").pictures["b: ground truth"]
    np.testing.assert_array_equal(named, beside)
    capsys.readouterr()
    save_mask(folder / "elsewhere" / "b.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(InputError, match="b.png is 5 x 6 but the mask"):
        page_of(folder, *argv, "--images", folder / "elsewhere")
    assert "44.2" in capsys.readouterr().out  # the table is not lost
    (folder / "elsewhere" / "b.png").unlink()
    message = failure(capsys, *argv, "--images", folder / "elsewhere", "--html", folder / "page.html")
    assert "b.png has no photograph in" in message


def test_page_of_weights(folder, model):
    page = page_of(folder, "--data", folder)
    assert list(page.pictures) == [f"{s}: {n}" for s in "ab" for n in ("ground truth", "bundled (wsid)")]
    assert page.text.count("AP 100.0 %, predictions: 2") == page.text.count("AP 100.0 %, predictions: 1") == 1


def test_page_draws_what_counts(folder, predictions):
    argv = ["--pred", predictions, "--gt", folder / "instance_masks", "--count-threshold", "0.4"]
    assert "AP 100.0 %, predictions: 1" in page_of(folder, *argv).text


def test_page_of_large_pictures_and_odd_names(folder):
    stem = 'a<b>&"c'
    gt = np.zeros((400, 1000), np.uint8)
    gt[100:300, 100:500] = 1
    for name in ("instance_masks", "found"):
        (folder / "odd" / name).mkdir(parents=True)
        save_mask(folder / "odd" / name / f"{stem}.png", gt)
    page = page_of(folder, "--pred", folder / "odd" / "found", "--gt", folder / "odd" / "instance_masks")
    assert stem in page.text
    assert page.pictures[f"{stem}: found"].shape == (round(SIDE * 0.4), SIDE, 3)
    assert (folder / "page.html").stat().st_size < 40_000


def test_page_without_instances(folder, predictions):
    for name in "ab":
        save_mask(folder / "instance_masks" / f"{name}.png", instance_map())
    page = page_of(folder, "--pred", predictions, "--gt", folder / "instance_masks")
    assert not page.pictures and "polyline" not in dict(page.tags)
    assert "The ground truth holds no instance: there is no curve." in page.text


def test_ranking_of_images():
    def image(scores, hits, instances):
        return ImageResult(np.array(scores, float), np.array([hits] * 10, bool).reshape(10, len(scores)), instances)

    results = {
        "sure mistake": image([0.9], [0], 1),
        "nothing found": image([], [], 1),
        "unsure mistake": image([0.2], [0], 1),
        "no instance": image([0.99], [0], 0),
        "half": image([0.5], [1], 2),
        "right": image([0.3], [1], 1),
        "surely right": image([0.8], [1], 1),
    }
    ranked = ["surely right", "right", "half", "nothing found", "unsure mistake", "sure mistake"]
    assert rank_images(results) == ranked


def test_page_shows_ten_at_either_end(folder):
    save_mask(folder / "gt.png", instance_map((1, 1, 6, 9)))
    # Image n reaches n of the ten thresholds; above 10 all, the later the less confident.
    hits = {n: np.arange(10)[:, None] < n for n in range(25)}
    results = {f"{n:02}": ImageResult(np.array([1 - n / 100]), hit, 1) for n, hit in hits.items()}
    method = evaluate.Method("m", results=results)
    masks = dict.fromkeys(results, MaskFile(folder / "gt.png"))
    page = Page(format_page([method], {"m": method.summary(0)}, masks, {}))
    shown = [int(text) for text in page.text if text in results]
    assert shown == [*range(10, 20), *range(10)]


def test_tint():
    image = np.full((60, 60, 3), 100, np.uint8)
    left, all_but_rim = np.zeros((2, 60, 60), bool)
    left[10:50, 10:30] = True
    all_but_rim[5:55, 5:55] = True
    picture = tint(image, [left, all_but_rim])
    assert (picture[:3] == 100).all() and (image == 100).all()
    first, second = picture[30, 20].astype(int), picture[30, 45].astype(int)
    assert abs(first - second).max() > 50  # the first lies on top, in a colour of its own
    np.testing.assert_array_equal(tint(image, [left])[30, 20], first)


# ---- masks on disk


def test_instance_masks_of_every_kind(tmp_path):
    labels = instance_map((0, 0, 3, 3), (4, 4, 8, 8))
    labels[8, :] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(labels).save(path)
    np.testing.assert_array_equal(read_instance_mask(path), labels)
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(path)  # VOC's own kind: the colours say nothing
    np.testing.assert_array_equal(read_instance_mask(path), labels)
    Image.fromarray(labels.astype(np.uint16)).save(path)
    np.testing.assert_array_equal(read_instance_mask(path), labels)
    gaps = np.where(labels == 2, 7, labels).astype(np.uint8)  # grey, if stored as colour: no renumbering
    Image.fromarray(np.stack([gaps] * 3, -1)).save(path)
    np.testing.assert_array_equal(read_instance_mask(path), gaps)
    Image.fromarray(labels == 1).save(path)
    np.testing.assert_array_equal(read_instance_mask(path), labels == 1)
    # One plain colour per instance, numbered by their red, green, blue values.
    colours = np.zeros((256, 3), np.uint8)
    colours[1], colours[2], colours[255] = (0, 128, 0), (128, 0, 0), (224, 224, 192)
    Image.fromarray(colours[labels]).save(path)
    np.testing.assert_array_equal(read_instance_mask(path), labels)
    colours[255] = 255
    Image.fromarray(colours[labels]).convert("RGBA").save(path)
    np.testing.assert_array_equal(read_instance_mask(path), labels)


def test_instance_masks_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="missing.png .No such file"):
        read_instance_mask(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(InputError, match="text.png is not an image"):
        read_instance_mask(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise[..., 0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(InputError, match="cut.png is truncated"):
        read_instance_mask(tmp_path / "cut.png")
    Image.fromarray(instance_map()).save(tmp_path / "lossy.jpg")
    with pytest.raises(InputError, match="lossy.jpg is a JPEG"):
        read_instance_mask(tmp_path / "lossy.jpg")
    Image.fromarray(np.full(SHAPE, 300, np.uint16)).save(tmp_path / "many.png")
    with pytest.raises(InputError, match="many.png holds labels outside"):
        read_instance_mask(tmp_path / "many.png")
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with pytest.raises(InputError, match="noise.png holds more than 254 colours"):
        read_instance_mask(tmp_path / "noise.png")


def test_saliency_masks_of_every_kind(tmp_path):
    path = tmp_path / "map.png"
    grey = np.array([[0, 51, 255]], np.uint8)
    for picture in (grey, np.stack([grey] * 3, -1), grey.astype(np.uint16) * 257):
        Image.fromarray(picture).save(path)
        saliency = read_saliency_mask(path)
        assert saliency.dtype == np.float32
        np.testing.assert_allclose(saliency, [[0, 0.2, 1]], atol=1e-6)
    Image.fromarray(np.array([[0.25, 1]], np.float32)).save(tmp_path / "map.tif")
    np.testing.assert_array_equal(read_saliency_mask(tmp_path / "map.tif"), [[0.25, 1]])
    for bad in (1.5, -0.1, np.nan):
        Image.fromarray(np.array([[0.25, bad]], np.float32)).save(tmp_path / "map.tif")
        with pytest.raises(InputError, match="outside 0..1"):
            read_saliency_mask(tmp_path / "map.tif")


def test_two_masks_of_one_image(tmp_path):
    for name in ("a.png", "a.bmp"):
        Image.fromarray(instance_map()).save(tmp_path / name)
    with pytest.raises(InputError, match="are masks of one image"):
        list_masks(tmp_path)


def test_masks_are_listed_by_stem(tmp_path):
    for name in ("b.png", "a-1.png", "a.png"):
        Image.fromarray(instance_map()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no mask")
    assert list(list_masks(tmp_path)) == ["a", "a-1", "b"]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools under numpy 2
def test_rle_equals_pycocotools():
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 7), (9, 1), (13, 17), (60, 90), (500, 375)]
    for height, width in shapes:
        for density in (0, 0.001, 0.3, 0.9, 1):
            mask = rng.random((height, width)) < density
            rle = encode_rle(mask)
            np.testing.assert_array_equal(decode_rle(rle), mask)
            np.testing.assert_array_equal(pycocotools.mask.decode(rle), mask)
            assert json.loads(json.dumps(rle)) == rle
