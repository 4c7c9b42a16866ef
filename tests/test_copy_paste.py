"""Objects pasted into other photographs: what is cut out, where it goes, and that the labels say so."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import call

import train_branches
from datasets.copy_paste import FIRST, cut_out, paste
from datasets.labels import IGNORE
from datasets.training import TrainingImages, read_samples
from utils import checkpoint

SIZE = 64


def disc(center, radius, size=SIZE):
    yy, xx = np.mgrid[:size, :size]
    return (yy - center[0]) ** 2 + (xx - center[1]) ** 2 < radius * abs(radius)


def photograph(center, radius, colour=(200, 0, 0)):
    """A disc on black: image, classes (5 inside), saliency."""
    inside = disc(center, radius)
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[inside] = colour
    return image, np.where(inside, 5, 0).astype(np.uint8), np.where(inside, 255, 0).astype(np.uint8)


def test_cut_out_is_the_object_alone():
    sizes = []
    for seed in range(30):
        image, mask = cut_out(*photograph((30, 34), 12), np.random.default_rng(seed))
        assert image.shape[:2] == mask.shape and (image[mask > 0.9] > (150, -1, -1)).all()
        assert mask[0, 0] < 0.5 < mask[mask.shape[0] // 2, mask.shape[1] // 2]
        sizes.append(mask.sum() / SIZE**2)
    assert min(sizes) < 0.04 and 0.1 < max(sizes) < 0.27


def test_cut_out_refuses_what_is_not_seen_whole_or_clearly():
    rng = np.random.default_rng(0)
    assert cut_out(*photograph((30, 34), 12), rng)
    assert cut_out(*photograph((2, 30), 14), rng) is None  # beyond the rim
    assert cut_out(*photograph((30, 30), 2), rng) is None  # too small
    assert cut_out(*photograph((30, 30), -1), rng) is None  # nothing
    image, classes, saliency = photograph((30, 34), 12)
    classes[disc((30, 34), 18) & ~disc((30, 34), 12)] = IGNORE
    assert cut_out(image, classes, saliency, rng) is None  # no clear contour


def test_pasted_object_is_in_all_maps_and_leaves_the_others_half():
    source = photograph((32, 32), 11, (0, 250, 0))
    placed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        before = photograph((30, 34), 12)
        image, classes, saliency = (array.copy() for array in before)
        if not paste(image, classes, saliency, cut_out(*source, rng), FIRST, rng):
            assert all((a == b).all() for a, b in zip(before, (image, classes, saliency), strict=True))
            continue
        placed += 1
        new = classes == FIRST
        inner = cv2.erode(new.astype(np.uint8), np.ones((5, 5))) > 0
        assert new.any() and (saliency[new] > 127).all() and (image[inner, 1] > 200).all()
        assert (image[cv2.dilate(new.astype(np.uint8), np.ones((7, 7))) == 0, 1] == 0).all()
        assert (classes == 5).sum() >= (before[1] == 5).sum() / 2
        assert ((classes == 5) | new == (saliency > 127)).mean() > 0.99
    assert placed > 25


def test_nothing_is_pasted_beside_nothing():
    rng = np.random.default_rng(0)
    cut = cut_out(*photograph((32, 32), 11), rng)
    assert not paste(*photograph((30, 34), -1), cut, FIRST, rng)


@pytest.fixture
def dataset(photographs):
    """TrainingImages over discs whose labels are right, by the mean number of pasted objects."""
    samples = read_samples([photographs])
    maps = {name: photographs / name for name in ("pseudo_classes", "pseudo_saliency")}
    for folder in maps.values():
        folder.mkdir()
    for sample in samples:
        found = (cv2.imread(str(sample.path))[..., 2] == 200).astype(np.uint8)
        checkpoint.save_png(found, maps["pseudo_classes"] / f"{sample.stem}.png")
        checkpoint.save_png(255 * found, maps["pseudo_saliency"] / f"{sample.stem}.png")
    return lambda number, samples=samples: TrainingImages(samples, SIZE, paste=number, maps=maps, seed=1)


def test_the_count_grows_with_what_is_pasted(dataset):
    plain, pasting = dataset(0), dataset(1.5)
    more = []
    for pasting.epoch in range(10):
        for index in range(len(plain)):
            item = pasting[index]
            labels = np.unique(item["pseudo_classes"][item["pseudo_classes"] >= FIRST])
            more.append(float(item["count"] - plain[index]["count"]))
            assert more[-1] <= 3 and len(labels) == more[-1]
    assert 0.5 < np.mean(more) < 2


def test_pasting_depends_on_seed_epoch_and_index_alone(dataset):
    a, b = dataset(1.0), dataset(1.0)
    b[3], b[1]
    for key, value in a[2].items():
        assert torch.equal(value, b[2][key])
    b.epoch = 1
    assert any(not torch.equal(a[index]["image"], b[index]["image"]) for index in range(6))


def test_a_photograph_without_count_stays_as_it_is(dataset):
    samples = [replace(sample, count=None) if index else sample for index, sample in enumerate(dataset(0).samples)]
    plain, pasting = dataset(0, samples), dataset(3.0, samples)
    for index in range(1, 6):
        assert torch.equal(plain[index]["image"], pasting[index]["image"]) and pasting[index]["count"] == 0


@pytest.mark.parametrize("number", ["-1", "nan", "inf"])
def test_a_number_of_pasted_objects_that_is_none(number, tmp_path, capsys):
    assert call(train_branches.main, "--paste", number, "--out", tmp_path / "run", "--gpu", -1) == 2
    assert "--paste" in capsys.readouterr().err and not (tmp_path / "run").exists()
