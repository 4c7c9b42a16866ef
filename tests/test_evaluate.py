"""evaluate.py end to end: files of predictions, weights (with a stand-in model), and bad input."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

import evaluate
from datasets.masks import (
    decode_rle,
    encode_rle,
    list_masks,
    prediction_records,
    read_instance_mask,
    read_saliency_mask,
)
from utils.cli import InputError, run

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
    assert table[0] == "3 images (2 with instances), 3 instances, 3 predictions"
    assert table[2].split() == ["mAP", "(%)", "IoU", "0.5", "IoU", "0.7", "0.5:0.95"]
    assert table[3].split() == ["pooled", "44.2", "44.2", "44.2"]
    assert table[4].split() == ["per-image", "50.0", "50.0", "50.0"]
    assert table[7].split() == ["count", "33.3", "0.667"]
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
    assert capsys.readouterr().out.splitlines()[3].split() == ["pooled", "-", "-", "-"]


def test_records_of_other_methods(folder):
    # Integer image ids, another category, further keys, uncompressed RLE: 24 pixels not, 120 in, 96 not.
    Image.fromarray(instance_map((0, 2, 12, 12))).save(folder / "instance_masks" / "139.png")
    for name in "abc":
        (folder / "instance_masks" / f"{name}.png").unlink()
    segmentation = {"size": [*SHAPE], "counts": [24, 120, 96]}
    record = {"image_id": 139, "category_id": 18, "segmentation": segmentation, "score": 1, "id": 5}
    numbers = measure(folder, "--pred", write(folder / "p.json", [record]), "--gt", folder / "instance_masks")
    assert numbers["mAP"]["pooled"] == {"0.5": 1.0, "0.7": 1.0, "0.5:0.95": 1.0}


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
        (["--data", "d", "--gt", "d"], "--gt has no meaning with --data"),
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
    seen = types.SimpleNamespace(created=[], maps=[])

    class Predictor:
        def __init__(self, weights, device, method="wsid"):
            seen.created.append((weights, device.type, method))

        def predict(self, image, saliency=None):
            assert image.dtype == np.uint8 and image.shape == (*SHAPE, 3)
            seen.maps.append(saliency)
            red = image[..., 0]
            masks = [red == value for value in (80, 160) if (red == value).any()]
            saliency = (red > 0).astype(np.float32) if saliency is None else saliency
            scores = np.array([0.9, 0.3], np.float32)[: len(masks)]
            return types.SimpleNamespace(masks=np.array(masks, bool), scores=scores, saliency=saliency)

    module = types.ModuleType("infer")
    module.Predictor = Predictor
    monkeypatch.setitem(sys.modules, "infer", module)
    return seen


def test_weights(folder, model):
    numbers = measure(folder, "--weights", "w.pt", "--data", folder, "--method", "components")
    assert model.created == [(Path("w.pt"), "cpu", "components")]
    assert model.maps == [None] * 3
    assert numbers["mAP"]["pooled"] == numbers["mAP"]["per-image"] == {"0.5": 1, "0.7": 1, "0.5:0.95": 1}
    assert numbers["count"]["accuracy"] == 1
    assert (numbers["saliency"]["mae"], numbers["saliency"]["max_f"]) == (0, 1)


def test_default_weights_and_saved_predictions(folder, model):
    direct = measure(folder, "--data", folder, "--save-pred", folder / "saved" / "p.json")
    assert model.created == [(None, "cpu", "wsid")]
    records = json.loads((folder / "saved" / "p.json").read_text())
    assert [record["image_id"] for record in records] == ["a", "a", "b"]
    again = measure(folder, "--pred", folder / "saved" / "p.json", "--gt", folder / "instance_masks")
    assert again == direct | {"saliency": None}


def test_saliency_maps_given_to_the_model(folder, model):
    maps = folder / "maps"
    maps.mkdir()
    for stem in "abc":
        Image.fromarray(np.full(SHAPE, 51, np.uint8)).save(maps / f"{stem}.png")
    measure(folder, "--data", folder, "--saliency-dir", maps)
    assert [saliency.shape for saliency in model.maps] == [SHAPE] * 3
    np.testing.assert_allclose(model.maps, 0.2)


def test_bad_data_folder(folder, model, capsys):
    (folder / "images" / "b.png").unlink()
    assert "b.png has no photograph" in failure(capsys, "--data", folder)
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "images" / "b.png")
    assert "b.png is 5 x 5 but its mask" in failure(capsys, "--data", folder)
    assert "instance_masks is not a folder" in failure(capsys, "--data", folder / "images")


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
    with pytest.raises(InputError, match="missing.png does not exist"):
        read_instance_mask(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(InputError, match="text.png is not a picture"):
        read_instance_mask(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise[..., 0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(InputError, match="cut.png cannot be read"):
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
