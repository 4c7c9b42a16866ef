"""The published layouts, on a few generated 32 x 48 images of each: reading, merging, errors and reports."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import check
from datasets.images import image_size, read_image
from datasets.labels import CLASS_INDEX, VOC_CLASSES, Sample
from datasets.masks import encode_rle
from datasets.sources import find_source, list_ground_truth, merge, read_ground_truth, read_source
from datasets.training import TrainingImages, read_label_map, read_samples, select_cam_samples
from engine.cam_labels import SPREAD, write_pseudo_labels
from models.grouping import split_labels_by_count
from models.losses import centroid_target_loss, subitizing_loss
from utils.cli import InputError

H, W = 32, 48
CAT, DOG, PERSON = (CLASS_INDEX[name] for name in ("cat", "dog", "person"))


def photograph(path, size=(W, H), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def save(array, path, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if mode == "P":
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(path)
    return path


def regions(*boxes):
    """uint8 [H,W]: (label, top, left, bottom, right) painted over 0."""
    labels = np.zeros((H, W), np.uint8)
    for label, top, left, bottom, right in boxes:
        labels[top:bottom, left:right] = label
    return labels


def labels_of(samples):
    """{stem: (classes, count)}"""
    return {sample.stem: (sample.classes, sample.count) for sample in samples}


def message_of(function, *args):
    """The message of the InputError that function(*args) raises."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# PASCAL VOC

VOC_LABELS = regions((1, 2, 2, 10, 10), (255, 10, 2, 11, 10), (2, 11, 2, 20, 30))


def voc_object(name, width, height, difficult=0):
    """An object whose box covers width x height pixels, with a part that is none of its own."""
    right = width if isinstance(width, str) else width + 2
    box = f"<bndbox><xmax>{right}</xmax><xmin>3</xmin><ymin>5.0</ymin><ymax>{height + 4}</ymax></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>48</xmax><ymax>32</ymax></bndbox></part>"
    return f"<object><name>{name}</name>{part}{box}<difficult>{difficult}</difficult></object>"


def voc_annotation(root, name, objects, size="<size><width>50</width><height>40</height></size>"):
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")


VOC_FRACTIONS = """<object><name>cat</name>
    <bndbox><xmin>0.1</xmin><xmax>0.9</xmax><ymin>0</ymin><ymax>1</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit/VOC2012 with 2 images in Segmentation/train, 3 in Main/train, 1 in Main/val; 50 x 40 in its XML."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name in ("2007_1", "2007_2", "2007_3", "2007_4"):
        photograph(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_2\n2007_1\n")
    (root / "ImageSets/Main/train.txt").write_text("2007_1\n2007_2\n2007_3\n")
    (root / "ImageSets/Main/val.txt").write_text("2007_4\n")
    (root / "ImageSets/Main/dog_train.txt").write_text("2007_1  1\n2007_2 -1\n")
    # 8 x 5 pixels are 2 % of 50 x 40 and count, 7 x 5 do not; difficult objects are ignored.
    voc_annotation(root, "2007_1", [voc_object("person", 8, 5), voc_object("person", 20, 20), voc_object("cat", 7, 5)])
    voc_annotation(root, "2007_2", [voc_object("dog", 20, 20), voc_object("cat", 30, 30, difficult=1)])
    voc_annotation(root, "2007_3", [])  # not annotated yet
    voc_annotation(root, "2007_4", [voc_object("tvmonitor", 9, 9)])
    save(VOC_LABELS, root / "SegmentationObject" / "2007_1.png", "P")
    return tmp_path / "VOCdevkit"


def test_voc_classes_counts_and_masks(voc):
    samples = read_source(voc)
    assert labels_of(samples) == {"2007_2": ((DOG,), 1), "2007_1": ((CAT, PERSON), 2)}
    assert [sample.stem for sample in samples] == ["2007_2", "2007_1"], "the order of the list"
    without, with_mask = samples
    assert without.mask is None and with_mask.mask.size() == (H, W)
    np.testing.assert_array_equal(with_mask.mask.read(), VOC_LABELS)


def test_voc_splits_and_roots(voc):
    assert list(labels_of(read_source(f"{voc}@Main/train"))) == ["2007_1", "2007_2", "2007_3"]
    assert labels_of(read_source(f"{voc}@val")) == {"2007_4": ((19,), 1)}, "from Main, as Segmentation has no val"
    assert read_source(voc) == read_source(voc / "VOC2012") == read_source(voc.parent)
    message = message_of(read_source, f"{voc}@test")
    assert "no image list ImageSets/Segmentation/test.txt or" in message and "it has train, val; name" in message
    assert "dog_train.txt is not a list of image names" in message_of(read_source, f"{voc}@dog_train")


@pytest.mark.parametrize(
    "xml, complaint",
    [
        ("<annotation>", "2007_3.xml is not XML"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "2007_3.xml is not XML"),
        ([voc_object("", 9, 9)], "2007_3.xml has an object without a name"),
        ([voc_object("cat", -9, -9)], "2007_3.xml has a box that ends before it begins"),
        ([VOC_FRACTIONS], "2007_3.xml has a box in fractions of the image"),
        ("<annotations><image><box label='cat'/></image></annotations>", "2007_3.xml is no annotation of PASCAL VOC"),
        ("<annotation xmlns='a'><object/></annotation>", "2007_3.xml is no annotation of PASCAL VOC"),
        ([voc_object("cat", "nan", 9)], "2007_3.xml has an object whose bndbox/xmax is no number"),
        (["<object><name>cat</name></object>"], "2007_3.xml has an object whose bndbox/xmin is no number"),
        ([voc_object("cat", 9, 9)] * 256, "2007_3.xml has the count 256"),
    ],
)
def test_voc_bad_annotation(voc, xml, complaint):
    if isinstance(xml, list):
        voc_annotation(voc / "VOC2012", "2007_3", xml)
    else:
        (voc / "VOC2012/Annotations/2007_3.xml").write_text(xml)
    assert complaint in message_of(read_source, f"{voc}@Main/train")
    problems = []
    assert len(read_source(f"{voc}@Main/train", problems.append)) == 2 and complaint in str(problems[0])


def test_voc_missing_files(voc):
    (voc / "VOC2012/JPEGImages/2007_1.jpg").unlink()
    assert "JPEGImages/2007_1, which is missing" in message_of(read_source, voc)
    (voc / "VOC2012/Annotations/2007_2.xml").unlink()
    assert "2007_2.xml (No such file" in message_of(read_source, voc)


def test_voc_other_classes_count(voc):
    voc_annotation(voc / "VOC2012", "2007_3", [voc_object(name, 9, 9) for name in ("unicorn", "Dining table", "TV")])
    voc_annotation(voc / "VOC2012", "2007_4", [voc_object("unicorn", 9, 9)])
    samples = read_source(f"{voc}@Main/train")
    assert labels_of(samples)["2007_3"] == ((10, 19), 3) and samples[2].others == ("unicorn",)
    assert labels_of(read_source(f"{voc}@val")) == {"2007_4": ((), 1)}


def test_voc_unknown_counts(voc):
    """An annotation without objects, or with difficult ones alone, does not mean a count of 0."""
    voc_annotation(voc / "VOC2012", "2007_4", [voc_object("cat", 30, 30, difficult=1)])
    assert labels_of(read_source(f"{voc}@val")) == {"2007_4": ((), None)}
    assert labels_of(read_source(f"{voc}@Main/train"))["2007_3"] == (None, None)


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>", "<size><width/></size>"])
def test_voc_a_missing_size_is_that_of_the_photograph(voc, size):
    # 2 % of 48 x 32 are 30.72 pixels, of 50 x 40 they are 40.
    voc_annotation(voc / "VOC2012", "2007_4", [voc_object("cat", 31, 1), voc_object("cat", 30, 1)], size)
    assert labels_of(read_source(f"{voc}@val")) == {"2007_4": ((CAT,), 1)}


def test_voc_names_as_tools_write_them(tmp_path):
    """A list of another name with a byte-order mark, blanks and quotes; pictures of any kind, dots in names."""
    root = tmp_path / "cvat"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations" / "sub").mkdir(parents=True)
    stems = {"my photo 1": ".PNG", "a.v2": ".jpeg", "sub/b": ".webp", "c": ".bmp"}
    for stem, suffix in stems.items():
        photograph(root / "JPEGImages" / f"{stem}{suffix}")
        voc_annotation(root, stem, [voc_object("cat", 20, 20)])
    lists = root / "ImageSets" / "Main"
    (lists / "default.txt").write_bytes('"my photo 1"\r\na.v2\r\nsub/b\r\nc.jpg\r\n'.encode("utf-8-sig"))
    (lists / "cat_default.txt").write_text("a.v2  1\nc -1\n")
    samples = read_source(root)
    assert labels_of(samples) == dict.fromkeys(["my photo 1", "a.v2", "b", "c"], ((CAT,), 1))
    save(VOC_LABELS, root / "SegmentationObject" / "sub" / "b.png")
    assert [sample.mask is None for sample in read_source(root)] == [True, True, False, True]
    (lists / "mine.txt").write_text("my photo 1\n")
    assert list(labels_of(read_source(f"{root}@mine"))) == ["my photo 1"]
    assert "it has default, mine; name one" in message_of(read_source, root)
    photograph(root / "JPEGImages" / "c.jpg")
    assert read_source(f"{root}@default")[3].path.name == "c.jpg", "the whole name decides"
    (lists / "default.txt").write_text("c\n")
    assert "may be c.bmp or c.jpg" in message_of(read_source, f"{root}@default")


def test_voc_masks_without_annotations(voc):
    shutil.rmtree(voc / "VOC2012" / "Annotations")
    assert labels_of(read_source(voc)) == {"2007_2": (None, None), "2007_1": (None, 2)}
    shutil.rmtree(voc / "VOC2012" / "ImageSets")
    assert len(read_source(voc)) == 4 and "leave the split out" in message_of(read_source, f"{voc}@train")


@pytest.mark.parametrize("places", ["images annotations", "images images", ". .", "JPEGImages labels"])
def test_voc_annotations_beside_photographs(tmp_path, capsys, places):
    """The layouts of labelImg, Roboflow and Kaggle."""
    photographs, annotations = (tmp_path / "set" / place for place in places.split())
    (tmp_path / "Annotations").mkdir()
    for name in ("a.png", "b.JPG", "unlabelled.jpg"):
        photograph(photographs / name)
    for name in ("a", "b", "gone"):
        voc_annotation(tmp_path, name, [voc_object("dog", 20, 20)])
        annotations.mkdir(exist_ok=True)
        suffix = "XML" if name == "b" else "xml"
        (tmp_path / "Annotations" / f"{name}.xml").rename(annotations / f"{name}.{suffix}")
    assert labels_of(read_samples([tmp_path / "set"])) == {
        "a": ((DOG,), 1),
        "b": ((DOG,), 1),
        "unlabelled": (None, None),
    }
    assert "gone.xml, belong to no photograph" in capsys.readouterr().err
    assert check.main([str(tmp_path / "set")]) == 1
    assert "gone.xml, belong to no photograph" in capsys.readouterr().out


# ILSO


@pytest.fixture
def ilso(tmp_path):
    """Three photographs: one with three coloured instances, one with an indexed mask of one and void, one without."""
    folder = tmp_path / "ilso"
    for stem in "abc":
        photograph(folder / "images" / f"{stem}.jpg")
    labels = regions((1, 0, 0, 9, 9), (2, 0, 9, 9, 20), (3, 20, 20, 30, 40))
    colours = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0), (200, 0, 100)], np.uint8)
    save(colours[labels], folder / "gt" / "a.png")
    save(regions((7, 3, 3, 9, 9), (255, 0, 0, 2, 2)), folder / "gt" / "b.png", "P")
    return folder


def test_ilso_counts_come_from_the_masks(ilso):
    samples = read_source(ilso)
    assert labels_of(samples) == {"a": (None, 3), "b": (None, 1), "c": (None, None)}
    mask = samples[0].mask.read()
    assert [len(np.unique(mask[region])) for region in (np.s_[:9, :9], np.s_[:9, 9:20], np.s_[20:30, 20:40])] == [1] * 3
    assert sorted(np.unique(mask)) == [0, 1, 2, 3] and (mask > 0).sum() == 81 + 99 + 200
    assert samples[2].mask is None


def test_ilso_under_its_other_names(ilso):
    before = labels_of(read_source(ilso))
    (ilso / "images").rename(ilso / "imgs")
    (ilso / "gt").rename(ilso / "instance_masks")
    assert labels_of(read_source(ilso)) == before


def test_ilso_bad_masks(ilso):
    save(regions((255, 3, 3, 9, 9)), ilso / "gt" / "b.png")
    assert "b.png shows nothing but void" in message_of(read_source, ilso)
    photograph(ilso / "gt" / "z.png")
    problems = []
    assert list(labels_of(read_source(ilso, problems.append))) == ["a", "c"]
    assert "z.png has no photograph in" in str(problems[0]) and "b.png shows" in str(problems[1])


# COCO


def rectangle(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def coco_data():
    """One image of four annotations, two of them overlapping, and a crowd; one of a giraffe; one of nothing."""
    names = ["airplane", "motorcycle", "couch", "potted plant", "dining table", "tv", "giraffe", "person", "cat"]
    rle = encode_rle(regions((1, 10, 30, 20, 40)) > 0)
    records = [
        (1, 8, rectangle(2, 2, 22, 22), 400, 0),
        (1, 9, rectangle(4, 4, 10, 10), 36, 0),
        (1, 7, {"size": rle["size"], "counts": rle["counts"]}, 100, 0),
        (1, 8, rectangle(25, 0, 30, 6), 30, 0),  # below 2 % of 32 x 48 = 30.72
        (1, 8, {"size": [H, W], "counts": [0, 32, H * W - 32]}, 32, 1),
        (2, 7, rectangle(0, 0, 9, 9), 81, 0),
    ]
    keys = ("image_id", "category_id", "segmentation", "area", "iscrowd")
    return {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": H, "width": W} for i in (1, 2, 3)],
        "annotations": [dict(zip(keys, record, strict=True)) for record in records],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }


NO_AREA = {"area": None, "segmentation": []}


def write_coco(folder, data, split="val2017"):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    write_coco(folder, coco_data())
    for i in (1, 2, 3):
        photograph(folder / "val2017" / f"{i:012}.jpg")
    return folder


def test_coco_classes_counts_and_masks(coco):
    samples = read_source(coco)
    assert labels_of(samples) == {
        "000000000001": ((CAT, PERSON), 3),
        "000000000002": ((), 1),
        "000000000003": (None, None),
    }
    expected = regions((255, 0, 0, 32, 1), (1, 2, 2, 22, 22), (2, 4, 4, 10, 10), (3, 10, 30, 20, 40), (4, 25, 0, 30, 6))
    np.testing.assert_array_equal(samples[0].mask.read(), expected)
    assert samples[0].mask.size() == (H, W) and samples[2].mask is None, "the labels of the last are unknown"


def test_coco_names_of_voc_classes(coco):
    data = coco_data()
    data["annotations"] = [
        {"image_id": 1, "category_id": i, "segmentation": rectangle(0, 0, 9, 9), "area": 81} for i in range(1, 8)
    ]
    write_coco(coco, data)
    names = "aeroplane diningtable motorbike pottedplant sofa tvmonitor"
    assert " ".join(VOC_CLASSES[i] for i in read_source(coco)[0].classes) == names


@pytest.mark.parametrize("place", ["images/val2017", "images", "."])
def test_coco_photographs_elsewhere(coco, place):
    expected = labels_of(read_source(coco))
    (coco / "val2017").rename(coco / "moved")
    (coco / place).mkdir(parents=True, exist_ok=True)
    for path in (coco / "moved").iterdir():
        path.rename(coco / place / path.name)
    assert labels_of(read_source(coco / "annotations" / "instances_val2017.json")) == expected


def test_coco_splits(coco):
    write_coco(coco, coco_data(), "train2017")
    assert "has the splits train2017, val2017; name one" in message_of(read_source, coco)
    assert len(read_source(f"{coco}@val2017")) == 3
    assert "name one" in message_of(read_source, f"{coco}@minival")
    assert "is one split already" in message_of(read_source, f"{coco}/annotations/instances_val2017.json@val2017")


def test_coco_without_segmentation_has_no_mask(coco):
    data = coco_data()
    data["annotations"][0]["segmentation"] = []
    write_coco(coco, data)
    assert [sample.mask is None for sample in read_source(coco)] == [True, False, True]


@pytest.mark.parametrize(
    "segmentation, complaint",
    [
        ([[1, 2, 3, 4]], "three points or more"),
        ([[1, 2, 3, 4, 5]], "no polygon or RLE"),
        ([[1, 2, 3, 4, 5, float("nan")]], "three points or more"),
        ([1, 2, 3, 4, 5], "no polygon or RLE"),
        ([["a", "b"]], "no polygon or RLE"),
        ({"size": [W, H], "counts": [H * W]}, "its size is"),
        ({"size": [H, W], "counts": [5]}, "fill 5 pixels"),
        ({"counts": [5]}, "no polygon or RLE"),
    ],
)
def test_coco_bad_segmentation(coco, segmentation, complaint):
    data = coco_data()
    data["annotations"][0]["segmentation"] = segmentation
    write_coco(coco, data)
    message = message_of(read_source(coco)[0].mask.read)
    assert complaint in message and "instances_val2017.json image 1" in message


def test_coco_polygon_far_outside_is_clipped(coco):
    data = coco_data()
    del data["annotations"][1:]
    data["annotations"][0]["segmentation"] = rectangle(2, 2, 1e12, 1e12)
    write_coco(coco, data)
    np.testing.assert_array_equal(read_source(coco)[0].mask.read(), regions((1, 2, 2, H, W)))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda data: data["annotations"][5].update(category_id=99), "image 2 has the unknown category 99"),
        (lambda data: data["annotations"][5].update(NO_AREA), "image 2 has an annotation without an area"),
        (
            lambda data: data["annotations"][5].update(NO_AREA, bbox=[0, 0, 0.5, 1]),
            "the bbox [0, 0, 0.5, 1] in fractions",
        ),
        (lambda data: data["annotations"][5].update(NO_AREA, segmentation=rectangle(0, 0, 0.5, 1)), "are fractions"),
        (lambda data: data["images"][1].update(file_name="x" * 300), "which is missing"),
        (lambda data: data["images"][1].update(file_name="/"), "which is missing"),
        (lambda data: data["annotations"].extend([data["annotations"][5]] * 255), "image 2 has the count 256"),
        (lambda data: data["images"][1].update(file_name="gone.jpg"), "gone.jpg, which is missing"),
    ],
)
def test_coco_bad_image_is_one_problem(coco, change, complaint):
    data = coco_data()
    change(data)
    write_coco(coco, data)
    assert complaint in message_of(read_source, coco)
    problems = []
    assert (
        list(labels_of(read_source(coco, problems.append))) == ["000000000001", "000000000003"] and len(problems) == 1
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda data: data.pop("annotations"), "holds no list of annotations"),
        (lambda data: data.update(images=[]), "holds no list of images"),
        (lambda data: data["categories"].append({"id": 3}), "categories[9] needs id and name"),
        (lambda data: [image.update(file_name="x") for image in data["images"]], "are in none of"),
        (lambda data: [a.update(image_id=7) for a in data["annotations"]], "6 of 6 annotations in"),
        (lambda data: data["images"].append(data["images"][0]), "has several images of the id 1"),
        (lambda data: data["categories"].append(data["categories"][0]), "has several categories of the id 1"),
    ],
)
def test_coco_bad_file(coco, change, complaint):
    data = coco_data()
    change(data)
    write_coco(coco, data)
    assert complaint in message_of(read_source, coco)


def test_coco_counts_need_no_categories(coco):
    data = coco_data()
    expected = labels_of(read_source(f"{coco}@count"))
    del data["categories"]
    write_coco(coco, data)
    assert labels_of(read_source(f"{coco}@count")) == expected == labels_of(read_source(f"{coco}@val2017,count"))


def test_coco_is_not_json(coco):
    (coco / "annotations" / "instances_val2017.json").write_text("{")
    assert "is not JSON" in message_of(read_source, coco)
    assert "cannot read" in message_of(read_source, coco / "nowhere.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: [a.update(image_id=str(a["image_id"])) for a in data["annotations"]],
        lambda data: [image.update(id=float(image["id"])) for image in data["images"]],
        lambda data: [a.update(category_id=str(a["category_id"])) for a in data["annotations"]],
        lambda data: [a.pop("area") for a in data["annotations"]],
        lambda data: [a.update(area=None) for a in data["annotations"]],
        lambda data: [a.update(area=0) for a in data["annotations"]],
        lambda data: [a.update(iscrowd=str(a["iscrowd"])) for a in data["annotations"]],
        lambda data: [image.update(height="32", width="48") for image in data["images"]],
        lambda data: [image.update(height=0) for image in data["images"]],
        lambda data: [image.pop("width") for image in data["images"]],
        lambda data: [image.update(file_name=f"..\\val2017\\{image['file_name']}") for image in data["images"]],
        lambda data: [image.update(file_name=f"/home/me/set/{image['file_name']}") for image in data["images"]],
        lambda data: [image.update(file_name=image["file_name"].replace("jpg", "JPG")) for image in data["images"]],
        lambda data: data["annotations"][0].update(segmentation=rectangle(2, 2, 22, 22)[0]),
    ],
)
def test_coco_dialects(coco, change):
    """Variants of the file that other tools write give the same labels and masks."""
    expected = read_source(coco)
    data = coco_data()
    change(data)
    write_coco(coco, data)
    found = read_source(coco)
    assert labels_of(found) == labels_of(expected)
    for sample in (0, 1):
        np.testing.assert_array_equal(found[sample].mask.read(), expected[sample].mask.read())


def test_coco_area_of_the_bbox(coco):
    data = coco_data()
    for annotation in data["annotations"]:
        annotation.update(area=None, segmentation=[[]], bbox=[1, 1, 10, 10])
    write_coco(coco, data)
    assert [(s.count, s.mask) for s in read_source(coco)] == [(4, None), (1, None), (None, None)]
    data["annotations"][0]["bbox"] = [11, 11, -10, 10]
    write_coco(coco, data)
    assert "image 1 has the bbox [11, 11, -10, 10], which ends before it begins" in message_of(read_source, coco)


def test_coco_masks_follow_a_changed_file(coco):
    assert len(np.unique(read_source(coco)[1].mask.read())) == 2
    data = coco_data()
    data["annotations"][5]["segmentation"] = rectangle(0, 0, 3, 3)
    write_coco(coco, data)
    assert (read_source(coco)[1].mask.read() > 0).sum() == 9


def test_coco_a_crowd_has_an_unknown_count(coco):
    data = coco_data()
    data["annotations"] = [data["annotations"][4] | {"category_id": 7}]
    write_coco(coco, data)
    assert labels_of(read_source(coco))["000000000001"] == ((), None)


def test_coco_annotations_without_an_image(coco, capsys):
    data = coco_data()
    data["annotations"][5]["image_id"] = 9
    write_coco(coco, data)
    assert labels_of(read_samples([coco]))["000000000002"] == (None, None)
    assert "1 of 6 annotations in" in capsys.readouterr().err
    assert check.main([str(coco)]) == 1


@pytest.mark.parametrize(
    "file, photographs, name",
    [
        ("train/_annotations.coco.json", "train", ""),
        ("annotations/train.JSON", "images", ""),
        ("annotations/train.json", "train", ""),
        ("annotations.json", "JPEGImages", "JPEGImages/"),
        ("result.json", "images", "images\\"),
        ("labels.json", "data", ""),
    ],
)
def test_coco_in_other_layouts(tmp_path, file, photographs, name):
    """Roboflow, hand-made, labelme2coco, Label Studio, FiftyOne."""
    data = coco_data()
    for image in data["images"]:
        photograph(tmp_path / "set" / photographs / image["file_name"])
        image["file_name"] = name + image["file_name"]
    path = tmp_path / "set" / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(data).encode())
    roboflow = path.parent.name == "train"
    for source in (path, path.parent if roboflow else tmp_path / "set", f"{tmp_path / 'set'}@train"):
        if roboflow or not str(source).endswith("@train") or "train" in file:
            assert labels_of(read_source(source))["000000000001"] == ((CAT, PERSON), 3)
    if roboflow:
        assert f"name one of the folders in it: {path.parent}" in message_of(read_source, tmp_path / "set")


# Sources and merging


def labels_csv(folder, text, size=(W, H)):
    for line in text.split()[1:]:
        photograph(folder / "images" / line.split(",")[0], size)
    (folder / "labels.csv").write_text(text)
    return folder


def test_layouts_are_recognized(voc, ilso, coco, tmp_path):
    labels_csv(tmp_path / "csv", "image,count\na.jpg,1\n")
    expected = {
        voc: "PASCAL VOC",
        ilso: "ILSO",
        coco: "COCO",
        tmp_path / "csv": "labels.csv",
        ilso / "images": "photographs",
        ilso / "images" / "*.jpg": "photographs",
    }
    assert {path: find_source(path).layout.name for path in expected} == expected
    photographs = read_source(ilso / "images")
    assert photographs == [Sample(ilso / "images" / f"{stem}.jpg") for stem in "abc"]


def test_unknown_sources(ilso, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        assert f"there is no {path / 'labels.csv'} nor another known layout" in message_of(read_source, path)
    assert "names the split val, but" in message_of(read_source, f"{ilso}@val")
    assert "two things at once" in message_of(read_source, f"{ilso}@classes,count")
    assert "two things at once" in message_of(read_source, f"{ilso}@train,val")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", forbidden)
    assert f"cannot read {tmp_path} (Permission denied)" in message_of(find_source, tmp_path)


def test_an_at_sign_in_a_folder_name(ilso):
    ilso.rename(ilso.with_name("mine@home"))
    assert len(read_source(ilso.with_name("mine@home"))) == 3
    assert labels_of(read_source(str(ilso.with_name("mine@home")) + "@count"))["a"] == (None, 3)


def test_classes_from_one_and_counts_from_another(voc, tmp_path):
    counts = labels_csv(tmp_path / "counts", "image,count\n2007_1.jpg,5\n")
    samples = read_samples([f"{voc}@classes", counts])
    assert labels_of(samples) == {"2007_2": ((DOG,), None), "2007_1": ((CAT, PERSON), 5)}
    assert samples[1].path == voc / "VOC2012/JPEGImages/2007_1.jpg"
    classes = labels_csv(tmp_path / "classes", "image,classes,count\n2007_1.jpg,sofa,9\n")
    assert labels_of(read_samples([counts, f"{classes}@classes"])) == {"2007_1": ((17,), 5)}


def test_conflicts_name_both_sources(voc, tmp_path):
    other = labels_csv(tmp_path / "other", "image,classes,count\n2007_1.jpg,person,2\n")
    message = message_of(read_samples, [voc, other])
    assert "share a name" in message and "JPEGImages/2007_1.jpg" in message and "other/images/2007_1.jpg" in message
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(voc / "VOC2012" / "JPEGImages")
    (tmp_path / "linked" / "labels.csv").write_text("image,count\n2007_1.jpg,7\n")
    message = message_of(read_samples, [voc, tmp_path / "linked"])
    assert f"{voc} and {tmp_path / 'linked'} disagree on the count of" in message and "(2 and 7)" in message


def test_the_same_file_may_come_twice(voc):
    assert read_samples([voc, f"{voc}@Main/train"])[:2] == read_samples([voc])
    assert len(read_samples([voc, f"{voc}@Main/train", voc / "VOC2012" / "JPEGImages"])) == 4


def test_different_photographs_of_one_name(tmp_path, capsys):
    a = labels_csv(tmp_path / "a", "image,classes\nx.jpg,cat\n")
    b = labels_csv(tmp_path / "b", "image,count\nx.jpg,1\n", size=(W, H + 1))
    assert "share a name but not a size" in message_of(read_samples, [a, b])
    photograph(tmp_path / "c" / "x.jpg")
    photograph(tmp_path / "c" / "y.jpg")
    assert labels_of(read_samples([a, tmp_path / "c"])) == {"x": ((CAT,), None), "y": (None, None)}
    assert f"{tmp_path}/c/x.jpg is left out, as {a}/images/x.jpg shares its name" in capsys.readouterr().err
    assert "share a name" in message_of(read_samples, [tmp_path / "c", a]), "labels are not left out"
    photograph(tmp_path / "c" / "x.png")
    assert "repeats the name x of" in message_of(read_samples, [tmp_path / "c"])


def test_merge_reports_and_keeps_the_first(tmp_path):
    samples = [[Sample(tmp_path / name / "x.jpg", (1,), count)] for name, count in (("a", 1), ("b", 2))]
    problems = []
    assert merge(dict(zip("ab", samples, strict=True)), problems.append) == samples[0] and len(problems) == 1


def test_ground_truth_of_every_layout(voc, ilso, coco, tmp_path):
    assert [sample.stem for sample in read_ground_truth(voc)] == ["2007_1"]
    assert [sample.stem for sample in read_ground_truth(ilso)] == ["a", "b"]
    assert len(read_ground_truth(f"{coco}@val2017")) == 2
    (ilso / "labels.csv").write_text("image,count\na.jpg,1\n")
    assert [sample.stem for sample in read_ground_truth(ilso)] == ["a", "b"], "whatever labels.csv lists"
    assert "instance_masks is not a folder" in message_of(read_ground_truth, ilso / "images")
    assert "has no instance masks" in message_of(read_ground_truth, f"{voc}@val")


def test_list_ground_truth(voc, ilso):
    for source in (ilso, ilso / "gt"):
        masks = list_ground_truth(source)
        assert list(masks) == ["a", "b"] and str(masks["a"]) == str(ilso / "gt" / "a.png")
    assert list(list_ground_truth(voc / "VOC2012" / "SegmentationObject")) == list(list_ground_truth(voc)) == ["2007_1"]
    assert message_of(list_ground_truth, "nowhere").startswith("nowhere is not a folder")
    assert "has no instance masks" in message_of(list_ground_truth, f"{voc}@val")


# Training with unknown labels


def test_select_cam_samples(tmp_path):
    path = tmp_path / "x.jpg"
    cat, nothing, unknown_count = Sample(path, (CAT,), 1), Sample(path, (), 0), Sample(path, (CAT,))
    left_out = [Sample(path), Sample(path, None, 2), Sample(path, (), 2), Sample(path, (), None)]
    assert select_cam_samples([cat, *left_out, nothing, unknown_count]) == [cat, nothing, unknown_count]
    assert "no photograph has classes" in message_of(select_cam_samples, [nothing, *left_out])


def test_photographs_of_one_stem_have_labels_of_their_own(tmp_path):
    folder = labels_csv(tmp_path, "image,classes\ncats/1.png,cat\ndogs/1.png,dog\n")
    for kind in ("saliency", "classes"):
        (tmp_path / "labels" / kind).mkdir(parents=True)
    for sample in read_samples([folder]):
        cams = np.ones((1, 16, 16), np.float32)
        write_pseudo_labels(tmp_path / "labels", sample, cams, sample.classes, 16, SPREAD, use_crf=False)
    found = [read_label_map(tmp_path / "labels" / "classes" / f"{name}_1.png", 16).max() for name in ("cats", "dogs")]
    assert found == [CAT + 1, DOG + 1]


def test_unknown_labels_leave_the_count_losses_out(tmp_path):
    item = TrainingImages([Sample(photograph(tmp_path / "x.png"))], 32)[0]
    assert item["count"] == 0 and not item["classes"].any()
    offsets = torch.randn(1, 2, 8, 8, requires_grad=True)
    salient = torch.ones(1, 8, 8, dtype=torch.bool)
    for count, learns in ((item["count"], False), (torch.tensor(2.0), True)):
        instances = torch.from_numpy(split_labels_by_count(salient[0].numpy() * 1, int(count)))
        loss = subitizing_loss(offsets, salient, count[None], 2.0) + centroid_target_loss(offsets, instances[None])
        assert (torch.autograd.grad(loss, offsets)[0] != 0).any() == learns


# python -m datasets.check


def test_check_of_valid_data(voc, ilso, coco, capsys):
    assert check.main([f"{voc}@Main/train", str(coco), str(ilso)]) == 0
    text = capsys.readouterr().out
    for line in (
        f"{voc}@Main/train: PASCAL VOC",
        "images   3",
        "classes  cat: 1, person: 1, dog: 1",
        "counts   1: 1, 2: 1, unknown: 1",
        "others   giraffe: 2",
        "masks    1",
        "problems 0",
        "classes  unknown: 3",
        "counts   1: 1, 3: 1, unknown: 1",
        "all together:",
        "images   9",
    ):
        assert line in text, line


def test_check_names_every_problem(tmp_path, capsys):
    folder = labels_csv(tmp_path / "mine", "image,classes,count\na.jpg,cat,1\nb.jpg,cat,1\nc.jpg,cat,1\nd.jpg,elk,1\n")
    (folder / "images" / "b.jpg").write_bytes(b"text")
    save(np.ones((H, W + 1), np.uint8), folder / "instance_masks" / "c.png")
    assert check.main([str(folder)]) == 1
    text = capsys.readouterr().out
    assert "images   1" in text and "problems 3" in text
    for problem in ("line 5 has the unknown class 'elk'", "b.jpg is not an image", "c.jpg is 32 x 48 but its mask"):
        assert problem in text, problem


def test_check_refuses_masks_without_instances(tmp_path, capsys):
    folder = labels_csv(tmp_path / "mine", "image,count\na.jpg,1\nb.jpg,1\n")
    save(regions((255, 3, 3, 9, 9)), folder / "instance_masks" / "a.png")
    save(regions((1, 3, 3, 9, 9)), folder / "instance_masks" / "b.png")
    assert check.main([str(folder)]) == 1
    assert "a.png shows nothing but void" in capsys.readouterr().out


def test_check_reads_pixels_unless_quick(tmp_path, capsys):
    path = photograph(tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    assert check.main([str(tmp_path), "--quick"]) == 0
    assert check.main([str(tmp_path)]) == 2, "the only image is broken"
    assert "cut.jpg is truncated or damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", ["a.txt", "labels.txt", "a.json", "labels.xlsx", "Labels.ods", "annotations.csv", "a.xml"]
)
def test_labels_of_other_tools_are_named(tmp_path, capsys, file):
    """YOLO, labelme, spreadsheets: trainings and the check print that they are not read."""
    photograph(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    for name in ("images/README.txt", "predictions.json"):
        (tmp_path / name).touch()
    assert check.main([str(tmp_path)]) == 0 and read_samples([tmp_path]) and not capsys.readouterr().err
    for folder in (tmp_path, tmp_path / "images", tmp_path / "labels"):
        (folder / file).write_text("{}")
        for source in (tmp_path, tmp_path / "images"):
            assert labels_of(read_samples([source])) == {"a": (None, None)}
            assert f"{folder / file} may hold labels, which are not read" in capsys.readouterr().err
        assert check.main([str(tmp_path)]) == 1
        (folder / file).unlink()


def test_a_coco_file_that_is_not_read_is_named(coco, capsys):
    file = coco / "annotations" / "instances_val2017.json"
    for place in (file, coco / "val2017.json"):
        file = file.rename(place)
        read_samples([coco / "val2017"])
        assert f"{place} may hold labels, which are not read" in capsys.readouterr().err


def test_photographs_in_other_folders_are_named(tmp_path, capsys):
    for name in ("images/a.jpg", "images/more/b.jpg", "c.jpg", "dogs/d.jpg"):
        photograph(tmp_path / "set" / name)
    assert list(labels_of(read_samples([tmp_path / "set"]))) == ["a"]
    folders = ", ".join(str(tmp_path / "set" / name) for name in ("", "dogs", "images/more"))
    assert f"the photographs in {folders} are not read" in capsys.readouterr().err
    assert check.main([str(tmp_path / "set")]) == 1
    for name in ("a.jpg", "b.jpg"):
        photograph(tmp_path / "yolo" / "images" / name[0] / name)
    message = message_of(read_source, tmp_path / "yolo")
    assert f"name one of the folders in it: {tmp_path}/yolo/images/a, {tmp_path}/yolo/images/b" in message


def test_labels_without_photographs_are_named(tmp_path):
    (tmp_path / "labels.xlsx").touch()
    assert "labels.xlsx may hold labels, which are not read" in message_of(read_source, tmp_path)
    assert "labels.xlsx is no photograph" in message_of(read_source, tmp_path / "labels.xlsx")


def test_brackets_in_folder_names(tmp_path):
    folder = labels_csv(tmp_path / "[2024] Holiday", "image,count\na.jpg,1\n")
    write_coco(folder / "coco", coco_data())
    photograph(folder / "coco" / "val2017" / "000000000001.jpg")
    assert labels_of(read_source(folder)) == {"a": (None, 1)} == labels_of(read_source(folder / "labels.csv"))
    assert labels_of(read_source(folder / "images")) == {"a": (None, None)}
    assert len(read_source(folder / "coco", [].append)) == 1


def test_a_home_with_an_at_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    labels_csv(tmp_path / "mine@home", "image,count\na.jpg,1\n")
    assert len(read_source("~/mine@home")) == len(read_source("~/mine@home@count")) == 1


def test_label_maps_of_names_that_are_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe4\xff.png")
    save(VOC_LABELS, tmp_path / "map.png").rename(path)
    np.testing.assert_array_equal(read_label_map(path), VOC_LABELS)
    for content in (b"", b"no picture"):
        (tmp_path / "map.png").write_bytes(content)
        assert "map.png is missing or broken" in message_of(read_label_map, tmp_path / "map.png")
    assert "gone.png is missing or broken" in message_of(read_label_map, tmp_path / "gone.png")


def test_check_of_sources_that_disagree(voc, tmp_path, capsys):
    other = labels_csv(tmp_path / "other", "image,classes,count\n2007_1.jpg,person,2\n")
    assert check.main([str(voc), str(other), str(tmp_path / "absent")]) == 1
    text = capsys.readouterr().out
    assert "share a name" in text and "absent: cannot be read" in text
    assert check.main([str(tmp_path / "absent")]) == 2


def test_check_with_an_unknown_option():
    assert "unrecognized arguments: --fast" in message_of(check.main, ["x", "--fast"])


def test_check_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "datasets.check", tmp_path],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert done.returncode == 2 and "nor another known layout" in done.stdout and not done.stderr


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_image_size_is_that_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("jpg", "png"):
        path = photograph(tmp_path / f"x.{suffix}", exif=exif)
        assert image_size(path) == read_image(path).shape[:2]
