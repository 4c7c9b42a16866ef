"""evaluate.py end to end: predictions of every form, weights (with a stand-in network), the page, and bad input."""

import base64
import json
import subprocess
import sys
import types
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
import torch
from conftest import call
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import evaluate
from datasets import check
from datasets.images import read_image
from datasets.masks import (
    MaskFile,
    decode_rle,
    encode_rle,
    list_masks,
    prediction_records,
    read_instance_mask,
    read_saliency_mask,
)
from datasets.sources import list_ground_truth
from engine.evaluation import Method, summarize_methods
from engine.metrics import ImageResult
from engine.perturbations import PERTURBATIONS, expose, mirror, reduce_and_compress
from engine.report import SIDE, format_page, rank_images, tint
from models.wsid_net import NetConfig, WSIDNet, save_weights
from utils import checkpoint, provenance
from utils.cli import InputError

SHAPE = (12, 20)
SAMPLE = Path(evaluate.__file__).parent / "samples" / "cat.jpg"


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
    code = call(evaluate.main, *argv)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out
    return captured.err


def left_out(capsys, *argv, of=3):
    """The message of a run that must measure all images but one, name that and end with exit code 1."""
    code = call(evaluate.main, *argv)
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out.startswith(f"{of - 1} images")
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
    assert table[6].startswith("95 % intervals") and len(table) == 10
    low, high = numbers["intervals"]["pooled"]["0.5"]
    assert 0 <= low < pooled < high <= 1
    assert table[9].split()[:2] == ["predictions", f"{100 * low:.1f}..{100 * high:.1f}"]


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
    numbers = measure(folder, "--pred", predictions, "--gt", folder / "instance_masks", "--saliency-pred", maps)
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


# ---- what image_id means


@pytest.fixture
def coco(tmp_path):
    """Three photographs of one COCO file with one instance each; the order of the ids is not that of the names."""
    for number in (1, 2, 3):
        save_mask(tmp_path / "images" / f"{number:06}.png", np.zeros((*SHAPE, 3), np.uint8))
    images = [{"id": 4 - n, "file_name": f"{n:06}.png", "height": 12, "width": 20} for n in (1, 2, 3)]
    polygon = lambda n: [[2 * n, 0, 2 * n + 5, 0, 2 * n + 5, 12, 2 * n, 12]]  # noqa: E731
    truths = [
        {"id": n, "image_id": 4 - n, "category_id": 1, "iscrowd": 0, "area": 60, "segmentation": polygon(n)}
        for n in (1, 2, 3)
    ]
    data = {"images": images, "categories": [{"id": 1, "name": "person"}], "annotations": truths}
    (tmp_path / "annotations").mkdir()
    write(tmp_path / "annotations" / "instances_default.json", data)
    return tmp_path


def found_in_coco(names, polygons=False):
    """Records of the exact instances; names: the image_id of the photographs 1, 2, 3."""
    for number, name in zip((1, 2, 3), names):
        mask = np.zeros(SHAPE, bool)
        mask[:, 2 * number : 2 * number + 5] = True
        outline = [[2 * number, 0, 2 * number + 5, 0, 2 * number + 5, 12, 2 * number, 12]]
        yield {"image_id": name, "segmentation": outline if polygons else encode_rle(mask), "score": 0.5}


def masks_of(coco):
    """The same ground truth as a folder of masks."""
    for stem, mask in list_ground_truth(coco / "annotations" / "instances_default.json").items():
        save_mask(coco / "masks" / f"{stem}.png", mask.read())
    return coco / "masks"


@pytest.mark.parametrize(
    "names",
    [
        (3, 2, 1),
        (3.0, 2.0, 1.0),
        ("000001", "000002", "000003"),
        ("000001.jpg", "000002.jpg", "000003.PNG"),
        ("images/000001.png", "a\\000002", "/b/000003.jpg"),
        ("1", "2", "3"),
    ],
)
def test_ids_of_records_are_those_of_the_coco_file_or_names(coco, names):
    path = write(coco / "p.json", list(found_in_coco(names)))
    numbers = measure(coco, "--pred", path, "--gt", coco / "annotations" / "instances_default.json")
    assert numbers["mAP"]["pooled"]["0.5:0.95"] == 1 and numbers["images"] == 3


@pytest.mark.parametrize("names", [(1, 2, 3), ("1", "02", "3.jpg"), ("000001.png", "000002.png", "000003.png")])
def test_ids_of_records_are_numbers_of_masks(coco, names):
    path = write(coco / "p.json", list(found_in_coco(names)))
    assert measure(coco, "--pred", path, "--gt", masks_of(coco))["mAP"]["pooled"]["0.5:0.95"] == 1


def test_string_ids_of_a_coco_file_whose_photographs_have_other_names(coco):
    file = coco / "annotations" / "instances_default.json"
    data = json.loads(file.read_text())
    for image in data["images"]:
        (coco / "images" / image["file_name"]).rename(coco / "images" / f"photo {image['id']}.png")
        image["file_name"] = f"photo {image['id']}.png"
    write(file, data)
    for names in ((3, 2, 1), ("3", "2", "1")):
        path = write(coco / "p.json", list(found_in_coco(names)))
        assert measure(coco, "--pred", path, "--gt", file)["mAP"]["pooled"]["0.5:0.95"] == 1


@pytest.mark.parametrize("truth", ["masks", "coco"])
def test_a_whole_coco_dictionary_is_read_with_its_own_images(coco, capsys, truth):
    images = [{"id": 10 * n, "file_name": f"other/00000{n}.jpg", "height": 12, "width": 20} for n in (1, 2, 3)]
    data = {"images": images, "annotations": list(found_in_coco((10, 20, 30), polygons=True))}
    gt = masks_of(coco) if truth == "masks" else coco / "annotations" / "instances_default.json"
    assert measure(coco, "--pred", write(coco / "p.json", data), "--gt", gt)["mAP"]["pooled"]["0.5:0.95"] == 1
    capsys.readouterr()
    images[1]["width"] = 22
    assert "p.json[1] is 12 x 22 but" in left_out(capsys, "--pred", write(coco / "p.json", data), "--gt", gt)
    data["annotations"][0]["image_id"] = 1
    message = failure(capsys, "--pred", write(coco / "p.json", data), "--gt", gt)
    assert "p.json[0] is of the image 1, which has no ground truth" in message
    del data["annotations"][0]["score"]
    assert "p.json[0] has no score" in failure(capsys, "--pred", write(coco / "p.json", data), "--gt", gt)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((3, 2, 7), "p.json[2] is of the image 7, which has no ground truth"),
        (("000001", "000002", "000003.v2"), "p.json[2] is of the image '000003.v2'"),
        (("000001", "000002.png", "000002.jpg"), "calls the image 000002 both '000002.png' and '000002.jpg'"),
        ((3, 2, "000002"), "calls the image 000002 both 2 and '000002'"),
    ],
)
def test_ids_of_no_image_or_of_two(coco, capsys, names, message):
    path = write(coco / "p.json", list(found_in_coco(names)))
    gt = coco / "annotations" / "instances_default.json"
    assert message in failure(capsys, "--pred", path, "--gt", gt)


def test_a_number_of_two_masks_is_an_error(coco, capsys):
    gt = masks_of(coco)
    save_mask(gt / "01.png", instance_map())
    path = write(coco / "p.json", list(found_in_coco((1, 2, 3))))
    assert "p.json[0] is of the image 1" in failure(capsys, "--pred", path, "--gt", gt)


def test_repeated_records_are_a_warning(folder, predictions, capsys):
    records = json.loads(predictions.read_text())
    path = write(folder / "twice.json", 2 * records)
    assert measure(folder, "--pred", path, "--gt", folder / "instance_masks")["predictions"] == 6
    assert "warning: 3 records of" in (error := capsys.readouterr().err) and "[3] the first" in error


def test_saved_predictions_with_ids_are_what_pycocotools_takes(coco, model, capsys):
    file = coco / "annotations" / "instances_default.json"
    red = np.zeros((*SHAPE, 3), np.uint8)
    red[:, 2:7, 0] = 80
    save_mask(coco / "images" / "000001.png", red)
    saved = coco / "p.json"
    direct = measure(coco, "--data", file, "--save-pred", saved, "--coco-ids", file)
    assert [record["image_id"] for record in json.loads(saved.read_text())] == [3]
    assert measure(coco, "--pred", saved, "--gt", file) == direct | {"saliency": None}
    pycocotools.coco.COCO(str(file)).loadRes(str(saved))
    data = json.loads(file.read_text())
    capsys.readouterr()
    for change, message in (
        ({"images": data["images"][1:]}, "other.json has no image called 000001"),
        ({"images": [*data["images"], {"id": 9, "file_name": "x/000001.jpg"}]}, "has 2 images called 000001"),
        ({"images": [{"id": 1}]}, "other.json lists no images"),
    ):
        other = write(coco / "other.json", data | change)
        options = ["--data", file, "--save-pred", saved, "--coco-ids", other]
        assert message in failure(capsys, *options)


# ---- ground truth that is no instance map


WHITE = 255 * instance_map((2, 3, 9, 12))
SALIENCY = cv2.GaussianBlur(np.pad(np.full((30, 30), 250, np.uint8), 20), (0, 0), 6)
TWO = np.zeros((100, 150), np.uint8)
cv2.circle(TWO, (40, 40), 25, 1, -1)
cv2.circle(TWO, (100, 60), 25, 2, -1)
PAINTED = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[TWO]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (WHITE, "shows nothing but void"),
        (np.stack(3 * [WHITE], -1), "shows nothing but void"),
        (cv2.resize(WHITE, (200, 120)), "holds shades of grey"),
        (cv2.GaussianBlur(np.kron(WHITE, np.ones((10, 10), np.uint8)), (0, 0), 2), "holds shades of grey"),
        (SALIENCY, "holds shades of grey"),
        (cv2.resize(120 * TWO, (90, 75), interpolation=cv2.INTER_AREA), "holds shades of grey or soft edges"),
        (cv2.resize(PAINTED, (300, 200), interpolation=cv2.INTER_LINEAR), "holds shades of grey or soft edges"),
        (cv2.resize(PAINTED, (112, 75), interpolation=cv2.INTER_AREA), "holds shades of grey or soft edges"),
    ],
)
def test_ground_truth_that_is_no_instance_map_is_an_error(folder, model, capsys, picture, message):
    for stem in "abc":
        save_mask(folder / "instance_masks" / f"{stem}.png", picture)
        Image.fromarray(np.zeros((*picture.shape[:2], 3), np.uint8)).save(folder / "images" / f"{stem}.png")
    empty = write(folder / "empty.json", [])
    for given in (["--pred", empty, "--gt", folder / "instance_masks"], ["--data", folder]):
        error = failure(capsys, *given)
        assert "none of 3 images can be measured" in error and f"a.png {message}" in error
    assert call(check.main, folder) == 2 and f"a.png {message}" in capsys.readouterr().out


def test_an_image_whose_mask_is_no_instance_map_is_left_out(folder, predictions, capsys):
    save_mask(folder / "instance_masks" / "b.png", WHITE)
    assert "b.png shows nothing" in left_out(capsys, "--pred", predictions, "--gt", folder / "instance_masks")


def test_thin_and_many_instances_are_instances(tmp_path):
    many = np.kron(np.arange(150, dtype=np.uint8).reshape(10, 15), np.ones((3, 3), np.uint8))
    thin = np.full((20, 20), 255, np.uint8)
    thin[:, :6], thin[4:9, 10] = 7, 3
    for labels in (many, thin, TWO):
        save_mask(tmp_path / "m.png", labels)
        np.testing.assert_array_equal(MaskFile(tmp_path / "m.png").read(), labels)


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
    no_difference = {"difference": 0, "standard_error": 0, "exceeds_two": False}
    same = {protocol: {"0.5": no_difference, "0.7": no_difference} for protocol in ("pooled", "per-image")}
    other = one | {"differences": same}
    assert several == {"json": one, "maps of mine": other, "masks": other, "results": other}
    rows = capsys.readouterr().out.splitlines()[4:8]
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
        ({"b.png": np.full(SHAPE, 255, np.uint8)}, "b.png holds 255"),
        ({"b.png": np.zeros((13, 20), np.uint8)}, "b.png is 13 x 20 but the mask"),
        ({"b.png": instance_map((0, 0, 2, 2))}, "scores.csv has no score for the label 1 of b.png"),
        ({"b.png": np.stack(3 * [instance_map()], -1) + np.uint8([0, 1, 9])}, "b.png is a picture in colours"),
        ({"b.png": "no picture"}, "b.png is not an image that can be read"),
    ],
)
def test_an_image_with_a_bad_label_map_is_left_out(folder, label_maps, predictions, capsys, change, message):
    alter(label_maps, change)
    argv = ["--pred", label_maps, f"json={predictions}", "--gt", folder / "instance_masks"]
    assert message in left_out(capsys, *argv, "--json", folder / "numbers.json")
    numbers = json.loads((folder / "numbers.json").read_text())
    del numbers["json"]["differences"]
    assert numbers["maps"] == numbers["json"] and numbers["json"]["instances"] == 2, "no row has the image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_1.png": np.zeros((5, 6), np.uint8)}, "a_1.png is 5 x 6 but the mask"),
        ({"a_1.png": instance_map((0, 0, 2, 2), (3, 3, 5, 5))}, "a_1.png holds several values"),
    ],
)
def test_an_image_with_a_bad_mask_is_left_out(folder, single_masks, capsys, change, message):
    alter(single_masks, change)
    assert message in left_out(capsys, "--pred", single_masks, "--gt", folder / "instance_masks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_1.png": instance_map()}, "b_1.png has no line in"),
        ({"c_7.png": None}, "scores.csv line 4 names 'c_7.png'"),
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


@pytest.mark.parametrize("value", [{"images": []}, {"annotations": 3}, "text", 3, None])
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
        ({"image_id": True}, "has the image_id True"),
        ({"image_id": 1.5}, "has the image_id 1.5"),
        ({"image_id": ["a"]}, "has the image_id ['a']"),
        ({"score": "0.9"}, "has the score '0.9'"),
        ({"segmentation": []}, "has no RLE"),
        ({"segmentation": [[0, 0, 5, 0]]}, "has no RLE and no polygons"),
        ({"segmentation": [[0, 0, 5, 0, 5, "5"]]}, "has no RLE and no polygons"),
        ({"segmentation": {"size": [12], "counts": COUNTS}}, "has no RLE"),
        ({"segmentation": {"size": [12, "20"], "counts": COUNTS}}, "has no RLE"),
        ({"segmentation": {"size": [*SHAPE]}}, "has no RLE"),
    ],
)
def test_bad_record(folder, capsys, change, message):
    bad = {key: value for key, value in (GOOD | change).items() if value is not None}
    path = write(folder / "p.json", [GOOD, bad])
    error = failure(capsys, "--pred", path, "--gt", folder / "instance_masks")
    assert "p.json[1]" in error and message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
def test_an_image_with_a_record_that_cannot_be_decoded_is_left_out(folder, capsys, change, message):
    path = write(folder / "p.json", [GOOD, GOOD | {"image_id": "b"} | change])
    error = left_out(capsys, "--pred", path, "--gt", folder / "instance_masks")
    assert "p.json[1]" in error and message in error


def test_bad_record_is_no_dict(folder, capsys):
    path = write(folder / "p.json", ["a"])
    assert "p.json[0] is not a record" in failure(capsys, "--pred", path, "--gt", folder / "instance_masks")


def test_saliency_map_of_wrong_size(folder, predictions, capsys):
    maps = folder / "maps"
    maps.mkdir()
    for stem, shape in {"a": (5, 5), "b": SHAPE, "c": SHAPE}.items():
        Image.fromarray(np.zeros(shape, np.uint8)).save(maps / f"{stem}.png")
    gt = folder / "instance_masks"
    message = left_out(capsys, "--pred", predictions, "--gt", gt, "--saliency-pred", maps)
    assert "a.png is 5 x 5" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either --pred"),
        (["--pred", "p.json", "--data", "d"], "give either --pred"),
        (["--pred", "p.json"], "--pred needs --gt"),
        (["--pred", "p.json", "--gt", "d", "--weights", "w.pt"], "--weights has no meaning with --pred"),
        (["--pred", "p.json", "--gt", "d", "--save-pred", "q.json"], "--save-pred has no meaning"),
        (["--pred", "p.json", "--gt", "d", "--fusion", "min_score=0"], "--fusion has no meaning with --pred"),
        (["--data", "d", "--gt", "d"], "--gt has no meaning with --data"),
        (["--data", "d", "--images", "d", "--html", "h.html"], "--images has no meaning with --data"),
        (["--pred", "p.json", "--gt", "d", "--images", "d"], "--images has no meaning without --html"),
        (["--pred", "p.json", "q.json", "--gt", "d", "--saliency-pred", "d"], "--saliency-pred is of one method"),
        (["--data", "d", "--count-threshold", "nan"], "--count-threshold"),
        (["--data", "d", "--count-threshold", "half"], "give a number"),
        (["--data", "d", "--gpu", "-2"], "--gpu"),
        (["--data", "d", "--gpu", "0.5"], "--gpu"),
        (["--pred", "p.json", "--gt", "d", "--method", "components"], "--method has no meaning with --pred"),
        (["--data", "d", "--coco-ids", "c.json"], "--coco-ids has no meaning without --save-pred"),
        (["--pred", "p.json", "--gt", "d", "--perturb"], "--perturb has no meaning with --pred"),
        (["--data", "d", "--perturb", "--saliency-dir", "d"], "--perturb changes the photographs but not"),
        (["--pred", "~no_such_user/p.json", "--gt", "d"], "names a home folder that is not known"),
        (["--pred", "p.json", "--gt", "d", "--json", "p.json"], "p.json is to be written but is named twice, or is"),
        (["--data", "d", "--json", "j", "--html", "./j"], "j is to be written but is named twice"),
        (["--data", "d", "--weights", "w.pt", "--save-pred", "w.pt"], "w.pt is to be written"),
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
    """A stand-in for the Predictor that reads instances off the red channel; returns the values passed to it."""
    calls = types.SimpleNamespace(created=[], maps={}, batches=[])

    class Predictor:
        def __init__(self, weights, device, method="wsid", settings=None, ranked=False, refine=True):
            calls.created.append((weights, device.type, method))
            self.weights, self.device, self.method = weights or Path("bundled.pt"), device, method

        def prepare(self, image):
            assert image.dtype == np.uint8 and image.shape[2] == 3
            return image[..., 0]

        def network(self, inputs):
            calls.batches.append(len(inputs))
            return inputs

        def fuse_batch(self, outputs, sizes, saliencies):
            return [partial(self.instances, *each) for each in zip(outputs, sizes, saliencies, strict=True)]

        def instances(self, red, size, saliency=None):
            assert size == red.shape
            calls.maps[int(red.max())] = saliency
            masks = [red == value for value in (80, 160) if (red == value).any()]
            saliency = (red > 0).astype(np.float32) if saliency is None else saliency
            scores = np.array([0.9, 0.3], np.float32)[: len(masks)]
            return types.SimpleNamespace(masks=np.array(masks, bool), scores=scores, saliency=saliency, ranked=None)

    monkeypatch.setattr("engine.predictor.Predictor", Predictor)
    return calls


def test_weights(folder, model):
    numbers = measure(folder, "--weights", "w.pt", "--data", folder, "--method", "components")
    assert model.created == [(Path("w.pt"), "cpu", "components")]
    assert model.maps == {160: None, 80: None, 0: None}
    assert model.batches == [2, 1]
    assert numbers["mAP"]["pooled"] == numbers["mAP"]["per-image"] == {"0.5": 1, "0.7": 1, "0.5:0.95": 1}
    assert numbers["count"]["accuracy"] == 1
    assert (numbers["saliency"]["mae"], numbers["saliency"]["max_f"]) == (0, 1)


def test_default_weights_and_saved_predictions(folder, model):
    direct = measure(folder, "--data", folder, "--save-pred", folder / "saved" / "p.json")
    assert model.created == [(None, "cpu", "wsid")]
    records = json.loads((folder / "saved" / "p.json").read_text())
    assert [record["image_id"] for record in records] == ["a", "a", "b"]
    from_file = measure(folder, "--pred", folder / "saved" / "p.json", "--gt", folder / "instance_masks")
    assert from_file == direct | {"saliency": None}


def test_rows_are_compared_with_the_first(tmp_path, capsys):
    """Method b misses the instance of every other photograph, c that of one."""
    found = instance_map((1, 1, 6, 9))
    records = {"a": [], "b": [], "c": []}
    for number in range(20):
        save_mask(tmp_path / "gt" / f"{number:02}.png", found)
        every = prediction_records(f"{number:02}", [found == 1], [0.5])
        for name, hit in (("a", True), ("b", number % 2), ("c", number)):
            records[name] += every if hit else []
    paths = [write(tmp_path / f"{name}.json", records[name]) for name in "abc"]
    numbers = measure(tmp_path, "--pred", *paths, "--gt", tmp_path / "gt")
    assert "differences" not in numbers["a"]
    half, one = (numbers[name]["differences"]["per-image"]["0.5"] for name in "bc")
    # AP of a photograph is 1 or 0: the standard error of its mean over n photographs is sqrt(p (1 - p) / n).
    assert half == pytest.approx(
        {"difference": -0.5, "standard_error": (0.25 / 20) ** 0.5, "exceeds_two": True}, rel=0.1
    )
    assert one["difference"] == pytest.approx(-1 / 20) and not one["exceeds_two"]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].split()[-3:] == ["-50.0", "+/-", f"{100 * half['standard_error']:.1f}*"]
    assert last[1].split()[-3:] == ["-5.0", "+/-", f"{100 * one['standard_error']:.1f}"]


def test_perturbed_photographs_are_rows_and_their_mean(folder, model, capsys):
    """The stand-in finds 80 and 160 in the red channel alone: changes of the exposure leave it nothing."""
    saved = folder / "saved.json"
    numbers = measure(folder, "--data", folder, "--perturb", "--save-pred", saved, "--html", folder / "page.html")
    name = "bundled (wsid)"
    rows = [name, *(f"{name}, {perturbation.name}" for perturbation in PERTURBATIONS["mild"]), f"{name}, mean"]
    assert list(numbers) == rows
    ap = [numbers[row]["mAP"]["pooled"]["0.5"] for row in rows]
    assert ap[0] == ap[2] == 1 and ap[3] == ap[4] == 0, "mirrored predictions are mirrored back"
    assert ap[5] == pytest.approx(np.mean(ap[:5]))
    assert numbers[rows[2]]["saliency"] == numbers[name]["saliency"]
    assert numbers[rows[3]]["differences"]["pooled"]["0.5"]["difference"] == -1
    assert "intervals" not in numbers[rows[5]] and "bundled (wsid), mean" in capsys.readouterr().out
    assert [record["image_id"] for record in json.loads(saved.read_text())] == ["a", "a", "b"]
    (folder / "images" / "b.png").write_bytes(b"no picture")
    assert left_out(capsys, "--data", folder, "--perturb").count("b.png") == 1


def test_perturbations():
    image = read_image(SAMPLE)
    small = reduce_and_compress(image, 360, 76)
    height, width = image.shape[:2]
    assert max(small.shape) == 360 and small.shape[0] / small.shape[1] == pytest.approx(height / width, rel=0.01)
    expected = cv2.resize(image, small.shape[1::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert 0 < abs(small - expected).mean() < 6, "what JPEG changes, with red and blue in their places"
    assert reduce_and_compress(image[:50, :60], 360, 76).shape == (50, 60, 3)
    np.testing.assert_array_equal(mirror(mirror(image)), image)
    np.testing.assert_array_equal(mirror(image)[:, 0], image[:, -1])
    np.testing.assert_array_equal(expose(image, 0), image)
    # sRGB 188 is half the linear light of white, and below 0.04045 the function is linear.
    values = np.array([[[0, 4, 188]]], np.uint8)
    assert expose(values, 1).ravel().tolist() == [0, 8, 255] and expose(expose(values, 1), -1)[0, 0, 2] == 188
    grey = np.full((4, 4, 3), 188, np.uint8)  # half the linear light of white
    assert (expose(grey, 0, 2) == 138).all(), "a quarter of it"
    assert len({perturbation.name for perturbation in PERTURBATIONS["mild"]}) == 4
    exposures = {perturbation.name: perturbation.change(grey)[0, 0, 0] for perturbation in PERTURBATIONS["exposure"]}
    assert exposures == {"-3 EV": 71, "-2 EV": 99, "-1 EV": 137, "+1 EV": 255, "+2 EV": 255, "+3 EV": 255}


def test_saliency_maps_given_to_the_model(folder, model, capsys):
    maps = folder / "maps"
    maps.mkdir()
    for stem in "abc":
        Image.fromarray(np.full(SHAPE, 51, np.uint8)).save(maps / f"{stem}.png")
    measure(folder, "--data", folder, "--saliency-dir", maps)
    capsys.readouterr()
    assert [saliency.shape for saliency in model.maps.values()] == [SHAPE] * 3
    np.testing.assert_allclose(list(model.maps.values()), 0.2)
    (maps / "c.png").rename(maps / "c.bmp")  # infer.py takes <stem>.png alone
    assert "maps has no saliency map of c" in failure(capsys, "--data", folder, "--saliency-dir", maps)


def test_figures_and_settings_of_a_run_for_tensorboard(folder, model, capsys):
    run = folder / "run"
    for stage, settings in (("branches", {"lr": 0.5, "canny": "auto"}), ("pts/r1", {"keep": 0, "scales": [1, 2]})):
        (run / stage).mkdir(parents=True)
        provenance.bind(run / stage, settings, {"a photograph": "0123456789abcdef"})
    numbers = measure(folder, "--weights", "w.pt", "--data", folder, "--log", run)
    capsys.readouterr()
    events = EventAccumulator(str(run / "val" / "w (wsid)")).Reload()
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(start).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in hparams.items()} == {
        "branches/lr": 0.5,
        "branches/canny": "auto",
        "pts/keep": "",
        "pts/scales": "[1, 2]",
    }
    assert events.Scalars("pooled mAP@0.7")[0].value == numbers["mAP"]["pooled"]["0.7"] == 1
    assert "holds no settings of a training" in failure(capsys, "--data", folder, "--log", folder)
    (run / "branches" / "config.json").write_text("{")
    assert "config.json does not say what the folder was made from" in failure(capsys, "--data", folder, "--log", run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file of a small network."""
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    save_weights(WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=8)), path)
    return path


NOT_WHOLE = "w.pt does not hold the weights of a whole WSID-Net"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: None, "no weights at"),
        (lambda saved: b"", "w.pt is not a readable weights file"),
        (lambda saved: b"PK and no more", "w.pt is not a readable weights file"),
        (lambda saved: torch.zeros(3), NOT_WHOLE),
        (lambda saved: [saved], NOT_WHOLE),
        (lambda saved: {"model": saved["state"]}, NOT_WHOLE),
        (lambda saved: saved | {"state": 3}, NOT_WHOLE),
        (lambda saved: saved | {"state": dict(list(saved["state"].items())[:-1])}, NOT_WHOLE),
        (lambda saved: saved | {"config": saved["config"] | {"backbone": "x"}}, NOT_WHOLE),
        (lambda saved: saved | {"state": {k: v + torch.nan for k, v in saved["state"].items()}}, "not finite"),
    ],
)
def test_weights_that_are_not_whole(whole, folder, capsys, change, message):
    content = change(checkpoint.load(whole))
    if isinstance(content, bytes):
        (folder / "w.pt").write_bytes(content)
    elif content is not None:
        checkpoint.save(content, folder / "w.pt")
    assert message in failure(capsys, "--data", folder, "--weights", folder / "w.pt")


def test_bad_data_folder(folder, model, capsys):
    (folder / "images" / "b.png").unlink()
    assert "b.png has no photograph" in left_out(capsys, "--data", folder)
    Image.fromarray(np.zeros((12, 21, 3), np.uint8)).save(folder / "images" / "b.png")
    assert "b.png is 12 x 21 but the mask" in left_out(capsys, "--data", folder)
    (folder / "images" / "b.png").write_bytes(b"no picture")
    assert "b.png is not an image" in left_out(capsys, "--data", folder, "--html", folder / "page.html")
    for stem in "ac":
        (folder / "instance_masks" / f"{stem}.png").unlink()
    assert "none of 1 images can be measured; the first: " in failure(capsys, "--data", folder)
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
    assert page.text.count("44.2") == 6  # two rows
    assert "+0.0 +/- 0.0 " in page.text
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
    page = page_of(folder, *argv, "--images", folder / "elsewhere")
    assert (abs(page.pictures["b: ground truth"][:, 17].astype(int) - 128) < 12).all(), "grey, and the page is not lost"
    assert "b.png is 5 x 6 but the mask" in capsys.readouterr().err
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
        "confident mistake": image([0.9], [0], 1),
        "nothing found": image([], [], 1),
        "hesitant mistake": image([0.2], [0], 1),
        "no instance": image([0.99], [0], 0),
        "half": image([0.5], [1], 2),
        "right": image([0.3], [1], 1),
        "confident and right": image([0.8], [1], 1),
    }
    ranked = ["confident and right", "right", "half", "nothing found", "hesitant mistake", "confident mistake"]
    assert rank_images(results) == ranked


def test_page_shows_ten_at_either_end(folder):
    save_mask(folder / "gt.png", instance_map((1, 1, 6, 9)))
    # Image n reaches n of the ten thresholds; above 10 all, the later the less confident.
    hits = {n: np.arange(10)[:, None] < n for n in range(25)}
    results = {f"{n:02}": ImageResult(np.array([1 - n / 100]), hit, 1) for n, hit in hits.items()}
    method = Method("m", results=results)
    masks = dict.fromkeys(results, MaskFile(folder / "gt.png"))
    page = Page(format_page([method], summarize_methods([method]), masks, {}))
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
    palette.save(path)  # VOC's own kind: the colours are ignored
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
