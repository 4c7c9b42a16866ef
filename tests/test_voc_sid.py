"""python -m datasets.make_voc_sid on a small folder in the layout of VOC 2012, SegmentationClassAug and PASCAL-S."""

import csv

import numpy as np
import pytest
import scipy.io
from conftest import call
from PIL import Image

from datasets import make_voc_sid
from datasets.labels import CLASS_INDEX
from datasets.make_voc_sid import LISTS, RULES, SPLITS, split_by_boxes, split_by_components
from datasets.masks import read_instance_mask
from datasets.sources import read_ground_truth, read_source
from datasets.voc import Box
from utils import files
from utils.cli import InputError

H, W = 80, 100
CAT, DOG = (CLASS_INDEX[name] + 1 for name in ("cat", "dog"))


def paint(*rectangles, background=0, dtype=np.uint8):
    """[H,W]: each (value, left, top, right, bottom), last column and row included, painted over ``background``."""
    array = np.full((H, W), background, dtype)
    for value, left, top, right, bottom in rectangles:
        array[top : bottom + 1, left : right + 1] = value
    return array


def test_val2_by_boxes():
    """Classes in the order of VOC; contours, pixels in both dog boxes or none, small objects and classes without a box
    are void."""
    classes = paint(
        (DOG, 10, 10, 40, 40),
        (DOG, 44, 10, 80, 40),
        (255, 41, 10, 43, 40),
        (CAT, 10, 60, 40, 75),
        (DOG, 70, 60, 74, 64),
    )
    classes[78, 90:] = 1
    boxes = [
        Box("dog", 10, 10, 41, 40),
        Box("dog", 43, 10, 80, 40),
        Box("cat", 10, 60, 40, 70),
        Box("dog", 70, 60, 74, 64),
    ]
    expected = paint(
        (2, 10, 10, 39, 40), (3, 45, 10, 80, 40), (255, 40, 10, 44, 40), (1, 10, 60, 40, 73), (255, 10, 74, 40, 75)
    )
    expected[60:65, 70:75] = 255
    expected[78, 90:] = 255
    with pytest.raises(ValueError, match="12% of the pixels of cat are inside no box"):
        split_by_boxes(classes, boxes)
    classes[74:76, 20:41] = 0  # 22 of 456 pixels stay outside
    expected[74:76, 20:41] = 0
    np.testing.assert_array_equal(split_by_boxes(classes, boxes), expected)


@pytest.mark.parametrize(
    "boxes, reason",
    [
        ([Box("dog", 10, 10, 60, 60), Box("dog", 15, 10, 60, 60)], "are inside several boxes"),
        ([Box("dog", 10, 10, 60, 90)], "does not fit its box"),
        ([Box("dog", 10, 10, 60, 60), Box("dog", 70, 10, 90, 60)], "does not fit its box"),
    ],
)
def test_val2_leaves_photographs_out(boxes, reason):
    with pytest.raises(ValueError, match=reason):
        split_by_boxes(paint((DOG, 10, 10, 60, 60)), boxes)


@pytest.mark.parametrize("rule", RULES.values())
def test_human_saliency_decides_which_instances_count(rule):
    rectangles = [(10, 10, 30, 70), (40, 10, 60, 70), (70, 10, 90, 70)]
    classes = paint(*((DOG, *rectangle) for rectangle in rectangles))
    boxes = [Box("dog", *rectangle) for rectangle in rectangles]
    saliency = paint(*zip((0.2, 0.3, 0.5), *zip(*rectangles)), dtype=np.float32)
    expected = paint((255, *rectangles[1]), (1, *rectangles[2]))
    np.testing.assert_array_equal(rule(classes, boxes, saliency), expected)
    expected = paint(*((number, *rectangle) for number, rectangle in enumerate(rectangles, 1)))
    np.testing.assert_array_equal(rule(classes, boxes), expected)


def test_val_by_components():
    """Where boxes overlap, a fragment belongs to the box whose IoU grows most; outside all boxes it is background."""
    classes = paint((DOG, 10, 10, 60, 40), (255, 10, 41, 60, 42), (DOG, 10, 43, 60, 70), (DOG, 68, 50, 71, 60))
    classes[75:79, 90:] = DOG
    boxes = [Box("dog", 10, 10, 60, 60), Box("dog", 10, 30, 71, 70)]
    expected = paint((1, 10, 10, 60, 40), (255, 10, 41, 60, 42), (2, 10, 43, 60, 70), (2, 68, 50, 71, 60))
    np.testing.assert_array_equal(split_by_components(classes, boxes), expected)
    moved = [Box("dog", 10, 10, 71, 60), Box("dog", 10, 30, 60, 70)]
    expected[50:61, 68:72] = 1
    np.testing.assert_array_equal(split_by_components(classes, moved), expected)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Folders of VOC 2012, SegmentationClassAug and PASCAL-S with two photographs, and lists that name them."""
    objects = [("dog", 10, 10, 30, 70), ("cat", 50, 10, 80, 70)]
    labels = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for difficult, (name, left, top, right, bottom) in enumerate(objects)
    )
    for folder in ("VOC2012/JPEGImages", "VOC2012/Annotations", "aug", "PASCAL-S/masks", "lists"):
        (tmp_path / folder).mkdir(parents=True)
    for stem in ("2007_1", "2008_2"):
        Image.new("RGB", (W, H), "grey").save(tmp_path / "VOC2012/JPEGImages" / f"{stem}.jpg")
        (tmp_path / "VOC2012/Annotations" / f"{stem}.xml").write_text(f"<annotation>{labels}</annotation>")
        files.save_png(paint((DOG, 10, 10, 30, 70), (CAT, 50, 10, 80, 70)), tmp_path / "aug" / f"{stem}.png")
    files.save_png(paint((200, 10, 10, 30, 70)), tmp_path / "PASCAL-S/masks/1.png")
    names = np.array([["2008_2.jpg"], ["2009_9.jpg"]], dtype=object)
    scipy.io.savemat(tmp_path / "PASCAL-S/imgList.mat", {"imgList": names})
    for split in ("val", "val2", "train"):
        (tmp_path / "lists" / f"{split}.csv").write_text(
            "image,classes,count\n2007_1.jpg,cat dog,2\n2008_2.jpg,dog,1\n"
        )
    (tmp_path / "lists" / "test.csv").write_text("image\n2007_1.jpg\n2008_2.jpg\n")
    monkeypatch.setattr(make_voc_sid, "LISTS", tmp_path / "lists")
    return tmp_path


def make(folder, split, **changes):
    options = {
        "--voc": folder / "VOC2012",
        "--class-masks": folder / "aug",
        "--pascal-s": folder / "PASCAL-S",
    } | changes
    given = [word for option, value in options.items() if value for word in (option, value)]
    return call(make_voc_sid.main, *given, "--split", split, "--out", folder / "out")


@pytest.mark.parametrize("split", ["val", "val2", "test"])
def test_a_data_folder_with_masks(published, split):
    assert make(published, split) == 0
    samples = read_source(published / "out")
    assert [(sample.stem, sample.count) for sample in samples] == [("2007_1", 2), ("2008_2", 1)]
    assert samples[0].classes == (None if split == "test" else (CAT - 1, DOG - 1))
    first, second = (sample.mask.read() for sample in read_ground_truth(published / "out"))
    np.testing.assert_array_equal(first, paint((2, 10, 10, 30, 70), (1, 50, 10, 80, 70)))
    np.testing.assert_array_equal(second, paint((1, 10, 10, 30, 70)))
    image = published / "out" / "images" / "2007_1.jpg"
    assert image.read_bytes() == (published / "VOC2012" / "JPEGImages" / "2007_1.jpg").read_bytes()


def test_a_training_split_needs_no_masks(published):
    assert make(published, "train", **{"--class-masks": None, "--pascal-s": None}) == 0
    assert [sample.count for sample in read_source(published / "out")] == [2, 1]
    assert not (published / "out" / "instance_masks").exists()


def remove(path):
    return lambda folder: (folder / path).unlink()


def write(path, text):
    return lambda folder: (folder / path).write_text(text)


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("VOC2012/JPEGImages/2008_2.jpg"), "2008_2.jpg (No such file or directory); --voc names the folder"),
        (remove("VOC2012/Annotations/2008_2.xml"), "cannot read the annotation"),
        (remove("aug/2008_2.png"), "aug/2008_2.png (No such file"),
        (remove("PASCAL-S/masks/1.png"), "PASCAL-S lacks imgList.mat or masks/1.png"),
        (write("PASCAL-S/imgList.mat", "text"), "imgList.mat is not the list of PASCAL-S"),
        (write("lists/val2.csv", "image,count\n2007_1.jpg,3\n"), "has 2 instances where the list has 3"),
        (lambda folder: files.save_png(paint((77, 1, 1, 9, 9)), folder / "aug/2007_1.png"), "is no class mask"),
        (lambda folder: files.save_png(np.zeros((9, 9), np.uint8), folder / "aug/2007_1.png"), "has another size than"),
        (
            lambda folder: files.save_png(paint((DOG, 1, 1, 99, 79)), folder / "aug/2007_1.png"),
            "no mask can be made of",
        ),
    ],
)
def test_input_that_does_not_fit_is_one_sentence(published, capsys, change, message):
    change(published)
    assert make(published, "val2") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and str(published) in line


def test_masks_need_all_folders(published, capsys):
    assert make(published, "val2", **{"--pascal-s": None}) == 2
    assert "val2 need --class-masks and --pascal-s" in capsys.readouterr().err


def test_the_published_lists():
    """Their sizes as documented; no photograph is in two of them."""
    rows = {split: list(csv.DictReader((LISTS / f"{split}.csv").read_text().splitlines())) for split in SPLITS}
    sizes = {"train": 1013, "voc2012_animals": 1350, "voc2012_animals2": 1549, "val": 150, "val2": 300, "test": 250}
    assert {split: len(found) for split, found in rows.items()} == sizes
    assert len({row["image"] for found in rows.values() for row in found}) == sum(sizes.values())
    assert [sum(int(row["count"]) for row in rows[split]) for split in ("val", "val2")] == [282, 621]
    assert all("count" not in row for row in rows["test"])


def test_masks_are_palette_pictures_of_indices(published):
    assert make(published, "val2") == 0
    path = published / "out" / "instance_masks" / "2007_1.png"
    assert Image.open(path).mode == "P" and set(np.unique(read_instance_mask(path))) == {0, 1, 2}


def test_a_mask_that_cannot_be_split_raises_input_error(published):
    files.save_png(paint((DOG, 1, 1, 99, 79)), published / "aug" / "2007_1.png")
    photograph = published / "VOC2012" / "JPEGImages" / "2007_1.jpg"
    with pytest.raises(InputError, match="check --voc and --class-masks"):
        make_voc_sid.make_mask(split_by_boxes, photograph, published / "VOC2012", published / "aug", {})
