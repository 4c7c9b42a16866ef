"""The student network: its labels, augmentation, training and weights file, in infer.py and evaluate.py too."""

import json
import pickle
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import call, make_data
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

import evaluate
import export
import infer
import train_branches
import train_student
from datasets.copy_paste import cut_out, paste
from datasets.instances import InstanceImages
from datasets.masks import centroids_of
from datasets.training import read_label_map, read_samples
from engine import student
from engine.config import Machine, Schedule
from engine.post_processing import PostProcessor, Prediction
from engine.predictor import BUNDLED_STUDENT, Predictor
from engine.trainer import train
from experiments import oracle_study
from models import mask_rcnn
from models.detections import GRID, Detections, best_set, disjoint, pasted, ranked, refined, saliency_of
from models.mask_rcnn import MaskRCNN, StudentConfig, mask_scores, save_student, targets_of
from models.wsid_net import NetConfig, WSIDNet, load_network, save_weights
from utils import checkpoint, digest, files, provenance
from utils.cli import InputError, make_folder

NET = ("--backbone", "mobilenetv2_100", "--size", "64", "--channels", "32", "--gpu", "-1", "--workers", "0")
CONFIG = StudentConfig("mobilenetv2_100", 64, 32, 32, 32, 1)


@pytest.fixture(autouse=True)
def random_backbone(monkeypatch):
    """No test needs ImageNet weights. A random backbone has denormal activations, which are slow; they are flushed in
    this thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(student, "load_pretrained", lambda backbone, file: None)
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def grid_of(found):
    """The masks of Detections of a network of 64 pixels on the grid that they are compared on."""
    return pasted(found, 64, (GRID, GRID))


@pytest.fixture
def labelled(tmp_path):
    """A data folder of two photographs of discs with their instance labels as in OUT/r1/labels/instances."""
    data = make_data(tmp_path / "data", count=2)
    labels = tmp_path / "labels"
    labels.mkdir()
    yy, xx = np.mgrid[:72, :96]
    for i in range(2):
        label = np.zeros((72, 96), np.uint8)
        for k in range(i + 1):
            label[(yy - 36) ** 2 + (xx - 25 - 45 * k) ** 2 < 300] = k + 1
        files.save_png(label, labels / f"photo{i}.png")
    return data, labels


def finish_labels(out, data, labels, teacher):
    """Put finished labels into the run ``out``, as label_photographs leaves them."""
    folder = out / "r1" / "labels"
    folder.mkdir(parents=True)
    notes = provenance.describe_photographs(read_samples([data]), "count")
    provenance.bind(folder, {}, {"the teacher": digest.of_file(teacher)}, notes)
    shutil.copytree(labels, folder / "instances")


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "teacher.pt"
    save_student(MaskRCNN(CONFIG), path)
    return path


def square(x0, y0, x1, y1, score):
    return (x0, y0, x1, y1), score


def detections(*squares, count=1):
    boxes, scores = zip(*squares, strict=True) if squares else ((), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.ones((len(boxes), 28, 28), np.float32),
        np.float32(np.arange(5) == count),
    )


def test_targets_are_boxes_and_masks_of_instances_without_void():
    labels = torch.zeros(32, 32, dtype=torch.uint8)
    labels[2:12, 4:20], labels[20:30, 8:16], labels[0, 0], labels[13:19, :] = 3, 7, 9, 255
    empty = torch.zeros(32, 32, dtype=torch.uint8)
    targets, without = targets_of(torch.stack([labels, empty]))  # 9 is too small for a box
    assert targets["boxes"].tolist() == [[4, 2, 20, 12], [8, 20, 16, 30]]
    assert targets["masks"].sum((1, 2)).tolist() == [160, 80]
    assert [part.shape for part in without.values()] == [(0, 4), (0,), (0, 32, 32)]
    assert targets_of(empty[None])[0]["boxes"].shape == (0, 4)


def test_shapes_of_losses_and_detections():
    torch.manual_seed(0)
    net, labels = MaskRCNN(CONFIG), torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[0, 8:40, 8:40] = 1  # the other photograph is a negative
    terms = net.train().losses(torch.rand(2, 3, 64, 64), labels)
    assert set(terms) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask", "count"}
    assert all(term.dim() == 0 and term.isfinite() for term in terms.values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net.eval()(torch.rand(2, 3, 64, 64))
    assert all(part.dtype == torch.float32 for one in found for part in one[:4])
    for one in found:
        n = len(one.scores)
        assert one.boxes.shape == (n, 4) and one.masks.shape == (n, 28, 28) and n <= 12
        assert (one.scores.diff() <= 0).all() and one.count_probs.sum().item() == pytest.approx(1, abs=1e-5)


def test_items_keep_labels_with_their_pixels(labelled):
    data, labels = labelled
    dataset = InstanceImages(read_samples([data]), labels, 64, copy_paste=0, jitter=0)
    for epoch in range(6):
        dataset.epoch = epoch
        item = dataset[1]
        red = item["image"][0] - item["image"][2] > 0.4
        assert item["labels"].dtype == torch.uint8 and item["labels"].shape == (64, 64)
        assert ((item["labels"] > 0) == red).float().mean() > 0.95
        repeated = dataset[1]
        assert all(torch.equal(item[key], repeated[key]) for key in item)


def test_exposure_changes_the_photograph_and_not_its_labels(labelled):
    data, labels = labelled
    plain, exposed = (
        InstanceImages(read_samples([data]), labels, 64, crop=1, copy_paste=0, jitter=0, exposure=stops)
        for stops in (0, 3)
    )
    ratios = []
    for plain.epoch in range(30):
        exposed.epoch = plain.epoch
        before, after = plain[1], exposed[1]
        assert torch.equal(before["labels"], after["labels"])
        ratios.append(float(after["image"].mean() / before["image"].mean()))
    assert 5 < ratios.count(1) < 25 and min(ratios) < 0.6 and max(ratios) > 1.3


def test_copy_paste_adds_instances(labelled):
    data, labels = labelled
    dataset = InstanceImages(read_samples([data]), labels, 64, crop=1, copy_paste=3)
    numbers = []
    for dataset.epoch in range(10):
        numbers.append(len(np.setdiff1d(dataset[1]["labels"].numpy(), (0, 255))))
    assert 2 < max(numbers) <= 5


def disc(center, radius, size=64):
    yy, xx = np.mgrid[:size, :size]
    return (yy - center[0]) ** 2 + (xx - center[1]) ** 2 < radius**2


def coloured(mask, colour):
    return np.where(mask[..., None], np.uint8(colour), np.uint8(0))


def test_cut_out_is_the_instance_alone():
    mask, sizes = disc((30, 34), 12), []
    for seed in range(30):
        image, soft = cut_out(coloured(mask, (200, 0, 0)), mask, np.random.default_rng(seed))
        assert image.shape[:2] == soft.shape and (image[soft > 0.9] > (150, -1, -1)).all()
        assert soft[0, 0] < 0.5 < soft[soft.shape[0] // 2, soft.shape[1] // 2]
        sizes.append(soft.sum() / 64**2)
    assert min(sizes) < 0.04 and 0.1 < max(sizes) < 0.27


@pytest.mark.parametrize("center, radius", [((2, 30), 14), ((30, 30), 2), ((30, 30), 0), ((32, 32), 30)])
def test_cut_out_refuses_what_is_cut_off_or_of_another_size(center, radius):
    mask = disc(center, radius)
    assert cut_out(coloured(mask, (200, 0, 0)), mask, np.random.default_rng(0)) is None


def test_a_pasted_instance_leaves_the_others_half():
    source, present, placed = disc((32, 32), 11), disc((30, 34), 12), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, labels = coloured(present, (200, 0, 0)), np.where(present, 5, 0).astype(np.uint8)
        before = image.copy(), labels.copy()
        if not paste(image, labels, cut_out(coloured(source, (0, 250, 0)), source, rng), 9, rng):
            assert np.array_equal(image, before[0]) and np.array_equal(labels, before[1])
            continue
        placed += 1
        new = (labels == 9).astype(np.uint8)
        inner = cv2.erode(new, np.ones((5, 5))) > 0
        assert new.any() and (image[inner, 1] > 200).all()
        assert (image[cv2.dilate(new, np.ones((7, 7))) == 0, 1] == 0).all()
        assert (labels == 5).sum() >= present.sum() / 2
    assert placed > 25


def test_a_label_of_another_size_is_named(labelled):
    data, labels = labelled
    files.save_png(np.ones((10, 10), np.uint8), labels / "photo0.png")
    with pytest.raises(InputError, match="photo0.png has another size"):
        InstanceImages(read_samples([data]), labels, 64)[0]


def test_masks_are_pasted_as_torchvision_does():
    corners = np.random.default_rng(0).uniform(0, 64, (20, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    boxes[0, 2:] = boxes[0, :2] + 0.3  # less than a pixel
    masks = np.random.default_rng(1).random((20, 28, 28), np.float32)
    found = Detections(boxes, np.ones(20, np.float32), masks, np.ones(5, np.float32))
    for height, width in ((64, 64), (37, 150)):
        scaled = torch.from_numpy(boxes) * torch.tensor([width, height, width, height]) / 64
        expected = paste_masks_in_image(torch.from_numpy(masks)[:, None], scaled, (height, width))[:, 0].numpy()
        assert np.allclose(pasted(found, 64, (height, width)), expected, atol=1e-5) and expected.any((1, 2)).sum() > 15
        assert np.array_equal(ranked(found, 64, (height, width)).masks, pasted(found, 64, (height, width)) >= 0.5)


def test_a_disjoint_set_takes_each_object_once():
    found = detections(
        square(0, 0, 30, 30, 0.9),
        square(0, 2, 30, 32, 0.8),
        square(34, 0, 62, 28, 0.7),
        square(0, 34, 30, 62, 0.6),
        count=2,
    )
    masks, scores = disjoint(found, grid_of(found), 64, (48, 96))
    assert masks.shape == (2, 48, 96) and masks.sum(0).max() == 1 and scores.tolist() == pytest.approx([0.9, 0.7])
    assert len(disjoint(found, grid_of(found), 64, (48, 96), count=3)[0]) == 3
    masks, scores = ranked(found, 64, (48, 96))
    assert len(masks) == 4 and masks.sum(0).max() == 2
    rows, columns = np.nonzero(masks[2])
    assert abs(columns.min() - 51) <= 2 and abs(rows.max() - 21) <= 2  # x 34 of 64 is 51 of 96, y 28 is 21 of 48


def test_the_best_set_follows_scores_and_count_head():
    whole, left, right = np.zeros((3, 10, 20), bool)
    whole[:, 2:18], left[:, 2:9], right[:, 11:18] = True, True, True
    masks, even = np.stack([whole, left, right]), np.full(5, 0.2)

    def chosen(scores, count_probs=even, count=0, masks=masks):
        return best_set(np.array(scores), masks, np.array(count_probs), count)

    assert chosen([0.9, 0.6, 0.7]) == [2, 1], "two masks of two objects are better than one of both"
    assert chosen([0.9, 0.4, 0.5]) == [0] and chosen([0.9, 0.1, 0.95]) == [2]
    assert chosen([0.9, 0.55, 0.55], [0, 0.01, 0.9, 0, 0]) == [1, 2] and chosen([0.9, 0.55, 0.55], [0, 1, 0, 0, 0]) == [
        0
    ]
    assert chosen([0.9, 0.1, 0.2], count=2) == [2, 1] == chosen([0.9, 0.1, 0.2], count=5)
    assert chosen([0.9, 0.6, 0.7], count=1) == [0]
    assert chosen([0.05, 0.02, 0.02]) == [0], "an answer, however low its score"
    separate = np.eye(6, dtype=bool)[:, None]
    assert chosen([0.9] * 6, masks=separate) == [0, 1, 2, 3, 4, 5], "more objects than the count head has numbers for"
    assert chosen([0.9, 0.8, 0.7], masks=np.stack([whole & False, left, right])) == [1, 2], "one mask is empty"
    assert chosen([], masks=masks[:0]) == []


def test_refined_masks_follow_the_contours_in_the_photograph():
    truth = disc((30, 34), 14)
    image = np.where(truth[..., None], np.uint8((220, 60, 40)), np.uint8((40, 90, 60)))
    plain = detections(square(20, 16, 45, 44, 0.9), square(0, 0, 6, 6, 0.1))  # the disc is 28 pixels wide
    plain = plain._replace(masks=0.75 * plain.masks)
    found = plain._replace(image=image.transpose(2, 0, 1))
    before, after = (ranked(one, 64, (64, 64)).masks[0] for one in (plain, found))
    assert iou(before, truth) < 0.75 and iou(after, truth) > 0.85, "a square, too narrow by three pixels"
    (instance,), _ = disjoint(found, grid_of(found), 64, (128, 128), 1)
    assert iou(instance, disc((60.5, 68.5), 28, 128)) > 0.85
    assert np.array_equal(refined(plain, 64).masks, plain.masks), "without the photograph"


def test_refined_masks_at_the_rim_and_below_a_pixel():
    truth = disc((2, 30), 16)
    image = coloured(truth, (220, 220, 40)).transpose(2, 0, 1)
    found = detections(square(13, 0, 46, 18, 0.9), square(10.2, 10.2, 10.6, 10.6, 0.5), square(63.9, 0, 64, 64, 0.4))
    found = found._replace(image=image, masks=0.75 * found.masks)
    masks, _ = ranked(found, 64, (64, 64))
    assert masks.shape == (3, 64, 64) and iou(masks[0], truth) > 0.88 and masks[0, 0, 20:40].all()
    assert refined(detections()._replace(image=image), 64).masks.shape == (0, 28, 28)


def test_an_uncertain_mask_without_contours_is_not_lost():
    found = detections(square(20, 16, 45, 44, 0.3))._replace(image=np.full((3, 64, 64), 128, np.uint8))
    found = found._replace(masks=0.55 * found.masks)
    (mask,), _ = disjoint(found, grid_of(found), 64, (64, 64))
    assert 300 < mask.sum() < 750


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_uncertain_masks_have_lower_scores():
    masks = torch.zeros(3, 28, 28)
    masks[0, :14], masks[1, 4:9], masks[1, 9:14] = 0.6, 1.0, 0.4
    scores = mask_scores(torch.tensor([0.9, 0.8, 0.5]), masks)
    assert scores.tolist() == pytest.approx([0.54, 0.8, 0]), "the mean probability of pixels above .5"


def test_all_images_at_once_give_the_detections_of_torchvision():
    torch.manual_seed(0)
    net, images = MaskRCNN(CONFIG).eval(), torch.rand(3, 3, 64, 64)
    torch.nn.init.normal_(net.roi_heads.box_predictor.module.cls_score.weight, std=0.5)  # else all scores are equal
    net.rpn.nms_thresh = 0.3  # so that boxes of two levels would suppress each other
    with torch.no_grad():
        pyramid, count = net.features(images)
        coarse = {name: level for name, level in pyramid.items() if name != "0"}
        listed = ImageList(images, [(64, 64)] * 3)
        expected, _ = net.roi_heads(pyramid, net.rpn(listed, coarse)[0], listed.image_sizes)
        found = net(images)
    assert {len(one["boxes"]) for one in expected} == {12}
    for ours, theirs, probs in zip(found, expected, count.softmax(1), strict=True):
        masks = theirs["masks"][:, 0]
        scores, order = mask_scores(theirs["scores"], masks).sort(descending=True)
        for one, other in zip(ours, (theirs["boxes"][order], scores, masks[order], probs)):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


class Copies(TorchDispatchMode):
    """Counts the operators with tensors on two devices."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        self.number += len(devices) > 1
        return result


def test_what_is_made_a_cuda_graph_copies_nothing_from_the_cpu():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # computes shapes alone, without a GPU
        images, edges = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64)
        net, wsid_net = MaskRCNN(CONFIG).eval(), WSIDNet(NetConfig("mobilenetv2_100", size=64, channels=16)).eval()
        net.candidates(images)  # torchvision copies its anchors once
        with Copies() as copies:
            found = net.candidates(images)
            wsid_net(images, edges)
            assert copies.number == 0
            net.rpn.box_coder.decode(found.deltas.flatten(0, 1), list(found.anchors))
            assert copies.number > 0, "what detect does is found"


def test_suppression_of_all_images_in_one_call_is_that_of_each():
    corners = 50 * torch.rand(4, 80, 2, generator=torch.Generator().manual_seed(0))
    boxes, scores = torch.cat([corners, corners + 12], 2), torch.linspace(1, 0, 80).repeat(4, 1)
    scores[1, ::3], scores[2] = -torch.inf, -torch.inf
    groups = torch.arange(80.0) % 3
    kept = mask_rcnn._nms_by_image(boxes, scores, groups, 0.3)
    assert torch.equal(kept, mask_rcnn._nms_in_one_call(boxes, scores, groups, 0.3))
    assert not kept[2].any() and 0.2 < kept[0].float().mean() < 0.9 and not kept[1, ::3].any()


def test_a_photograph_without_hypotheses():
    found = detections()
    for masks, scores in (ranked(found, 64, (20, 30)), disjoint(found, grid_of(found), 64, (20, 30))):
        assert masks.shape == (0, 20, 30) and len(scores) == 0 and centroids_of(masks).shape == (0, 2)
    saliency = saliency_of(found, grid_of(found), (20, 30))
    assert saliency.shape == (20, 30) and not saliency.any()


IMAGE = np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)


def test_a_predictor_takes_the_weights_file(teacher):
    net = load_network(teacher)
    assert isinstance(net, MaskRCNN) and net.config == CONFIG and not net.training
    prediction = Predictor(teacher).predict(IMAGE)
    assert prediction.saliency.shape == (50, 70) and prediction.boundary is None and prediction.offsets is None
    assert prediction.masks.shape[1:] == (50, 70) and prediction.masks.sum(0).max(initial=0) <= 1
    assert prediction.ranked is None
    copy = pickle.loads(pickle.dumps(Predictor(teacher, ranked=True)))
    masks, scores = copy.predict(IMAGE).ranked
    assert masks.shape == (len(scores), 50, 70) and len(scores) >= len(prediction.scores)


def test_masks_are_refined_unless_told_otherwise(tmp_path, teacher):
    default, plain = Predictor(teacher), pickle.loads(pickle.dumps(Predictor(teacher, refine=False)))
    inputs = [default.prepare(IMAGE)]
    assert torch.equal(default.network(inputs)[0].image, inputs[0][0][0]) and plain.network(inputs)[0].image is None
    assert default.identity() != plain.identity()
    data, image, written = make_data(tmp_path / "data", count=1), tmp_path / "data/images/photo0.png", []
    make_folder(data / "instance_masks")
    files.save_png((cv2.imread(str(image))[..., 2] == 200).astype(np.uint8), data / "instance_masks/photo0.png")
    for option in ((), ("--no-refine",)):
        args, predicted = ("--weights", BUNDLED_STUDENT, "--gpu", -1, *option), tmp_path / "predictions.json"
        assert call(infer.main, "--img", image, "--out", tmp_path / "out", *args) == 0
        assert call(evaluate.main, "--data", data, "--save-pred", predicted, *args) == 0
        label_map = cv2.imread(str(tmp_path / "out/photo0_instances.png"), cv2.IMREAD_UNCHANGED)
        written.append((label_map.tobytes(), predicted.read_text()))
    assert all(with_crf != without for with_crf, without in zip(*written, strict=True))


def test_what_does_not_apply_to_a_student_network(tmp_path, teacher, capsys):
    for options, named in (({"method": "components"}, "method"), ({"settings": ["power=3"]}, "fusion")):
        with pytest.raises(InputError, match=f"a student network, which has no choice of {named}"):
            Predictor(teacher, **options)
    with pytest.raises(InputError, match="takes no saliency map"):
        Predictor(teacher).predict(IMAGE, np.zeros((50, 70), np.float32))
    assert call(export.main, "--weights", teacher, "--out", tmp_path / "x.pt2") == 2
    assert "is a student network, which torch.export does not take; add --onnx" in capsys.readouterr().err
    assert call(train_branches.main, "--init", teacher, "--out", tmp_path / "run", "--gpu", -1) == 2
    assert "does not hold the weights of a whole WSID-Net" in capsys.readouterr().err
    assert call(oracle_study.main, "--weights", teacher, "--fusion", "power=3", "--gpu", -1) == 2
    assert "a student network, which has no choice of fusion" in capsys.readouterr().err


def test_a_damaged_weights_file_is_one_sentence(teacher):
    saved = torch.load(teacher, weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"channels": 64}}, teacher)
    with pytest.raises(InputError, match="does not hold the weights"):
        load_network(teacher)
    saved["state"]["count.bias"][0] = float("nan")
    torch.save(saved, teacher)
    with pytest.raises(InputError, match="not finite"):
        load_network(teacher)


def test_photographs_with_another_number_of_instances_than_counted_are_left_out(tmp_path, monkeypatch, teacher, capsys):
    data, counts = make_data(tmp_path / "data", count=4), []

    def post_process(self, output, size, count=0, saliency=None):
        counts.append(count)
        assert output.image is None, "training labels are not refined"
        masks = np.zeros((1, *size), bool)  # one, whatever the count
        masks[0, 20:40, 20:40] = True
        return Prediction(masks, np.ones(1), np.zeros((1, 2)), masks[0].astype(np.float32))

    monkeypatch.setattr(PostProcessor, "__call__", post_process)
    trained = []
    started, initialize = [], student.initialize
    monkeypatch.setattr(student, "train", lambda model, dataset, *args, **options: trained.append(dataset))
    monkeypatch.setattr(student, "initialize", lambda run, *_: started.append(run.init) or initialize(run, *_))
    args = ("--data", data, "--teacher", teacher, "--out", tmp_path / "run", "--init", teacher, *NET)
    assert call(train_student.main, *args) == 0
    assert counts == [1, 2, 1, 2] and [sample.stem for sample in trained[0].samples] == ["photo0", "photo2"]
    assert "in 2 of 4 photographs" in capsys.readouterr().out
    assert read_label_map(tmp_path / "run/r1/labels/instances/photo1.png").max() == 1
    assert call(train_student.main, *args, "--rounds", 2) == 0, "a round is added"
    assert counts[4:] == [1, 2, 1, 2] and len(trained) == 2, "the first round is finished"
    assert started[1:] == [str(teacher), "teacher"], "a round continues from the weights of the one before"
    assert call(train_student.main, *args, "--crop", 0.5) == 2
    assert "crop 0.6 -> 0.5" in capsys.readouterr().err
    args = ("--data", data, "--teacher", teacher, "--out", tmp_path / "low", *NET)
    assert call(train_student.main, *args, "--rounds", 2, "--resolution", 0.5) == 0
    assert [dataset.resolution for dataset in trained[2:]] == [1, 0.5], "the labels of a round come from the one before"


def test_it_learns_two_photographs_and_is_evaluated(tmp_path, labelled, teacher, monkeypatch, capsys):
    data, labels = labelled
    # pictures at each of the many epochs take long
    monkeypatch.setattr(student.tensorboard, "show_student", lambda *_, **__: None)
    out = tmp_path / "run"
    finish_labels(out, data, labels, teacher)
    args = "--epochs 25 --batch-size 2 --lr 3e-3 --backbone-lr 1 --freeze 0 --warmup 5 --average 0.9 --copy-paste 0"
    more = ("--exposure", 0, "--crop", 0.9, "--init", "imagenet", "--freeze-depthwise")
    assert call(train_student.main, "--data", data, "--teacher", teacher, "--out", out, *NET, *args.split(), *more) == 0
    shutil.copytree(labels, data / "instance_masks")
    weights = out / "weights.pt"
    assert call(evaluate.main, "--data", data, "--weights", weights, "--json", out / "f.json", "--log", out) == 0
    figures = json.loads((out / "f.json").read_text())
    assert list(figures) == ["weights (mask_rcnn), ranked", "weights (mask_rcnn), disjoint"]
    row, disjoint_row = figures.values()
    assert row["mAP"]["pooled"]["0.5"] > 0.6 and row["predictions"] >= disjoint_row["predictions"]
    pictures = tmp_path / "pictures"
    assert call(infer.main, "--img", data / "images", "--weights", weights, "--out", pictures, "--visualize") == 0
    names = {path.name for path in pictures.glob("photo1_*")}
    assert names == {f"photo1_{file}" for file in ("instances.png", "overlay.jpg", "saliency.png")}


def stop_after(steps):
    """The losses of engine.student, with Ctrl-C after so many batches."""
    calls, losses = [], student.losses

    def interrupted(model, batch, progress):
        calls.append(progress)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return losses(model, batch, progress)

    return interrupted


def test_a_stopped_training_ends_with_the_same_weights(tmp_path, labelled, teacher, monkeypatch):
    data, labels = labelled
    states = []
    for name in ("whole", "stopped"):
        out = tmp_path / name
        finish_labels(out, data, labels, teacher)
        args = ("--data", data, "--teacher", teacher, "--out", out, *NET, "--epochs", 3, "--batch-size", 1)
        args += ("--save-seconds", 0, "--freeze", 3, "--freeze-depthwise")
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(student, "losses", stop_after(3))
                assert call(train_student.main, *args) == 130
        assert call(train_student.main, *args) == 0
        states.append(torch.load(out / "weights.pt", weights_only=True)["state"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_result_is_the_moving_average_after_a_warmup(tmp_path):
    """One weight, pulled up by 1 with plain SGD: its path is the sum of the rates."""
    model, path = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(model.weight)
    dataset = [{"image": torch.zeros(1)}] * 4

    def losses(model, batch, progress):
        path.append(model.weight.item())
        return {"loss": -model.weight.sum()}

    schedule = Schedule(5, 4, 0.1, "adamw", warmup=3, average=0.5)
    train(model, Items(dataset), losses, schedule, Machine(-1, 0), folder=tmp_path, device=torch.device("cpu"))
    steps = np.diff(path)  # of AdamW under a constant gradient: the rates, up to the weight decay
    assert steps == pytest.approx([0.1 * (1 - k / 5) ** 0.9 * min(1, (k + 1) / 4) for k in range(4)], rel=1e-3)
    last = path[4] + 0.1 * 0.2**0.9
    average = path[1]
    for number, weight in enumerate([*path[2:], last], 1):
        average += max(0.5, 9 / (10 + number)) * (weight - average)
    assert model.weight.item() == pytest.approx(average, rel=1e-3) and average < 0.99 * last


class Items(list):
    seed = epoch = 0


@pytest.mark.parametrize("kind", ["the teacher", "a WSID-Net", "a student"])
def test_no_other_network_is_overwritten(tmp_path, capsys, labelled, kind):
    data, out = labelled[0], make_folder(tmp_path / "run")
    if kind == "a WSID-Net":
        save_weights(WSIDNet(NetConfig("mobilenetv2_100", size=64, channels=16)), out / "weights.pt")
    else:
        save_student(MaskRCNN(CONFIG), out / "weights.pt")
    before, teacher = (out / "weights.pt").read_bytes(), out / "weights.pt"
    if kind != "the teacher":
        save_student(MaskRCNN(CONFIG), teacher := tmp_path / "teacher.pt")
    if kind == "a student":  # of an earlier call of the same command
        checkpoint.require_own(out / "weights.pt", mask_rcnn.is_student, teacher)
        assert call(train_student.main, "--data", data, "--teacher", "no.pt", "--out", out, *NET) == 2
        assert "no.pt" in capsys.readouterr().err
    else:
        assert call(train_student.main, "--data", data, "--teacher", teacher, "--out", out, *NET) == 2
        assert (out / "weights.pt").read_bytes() == before
        assert "weights.pt would be overwritten" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path, capsys, teacher):
    data = make_data(tmp_path / "data", count=2)
    args = ("--out", tmp_path / "run", *NET)
    assert call(train_student.main, "--data", data, "--teacher", tmp_path / "no.pt", *args) == 2
    assert "no.pt" in capsys.readouterr().err
    assert call(train_student.main, "--data", data, "--teacher", teacher, *args, "--channels", 40) == 2
    assert "multiple of 16" in capsys.readouterr().err
    (data / "labels.csv").write_text("image,classes\nphoto0.png,cat\nphoto1.png,dog\n")
    assert call(train_student.main, "--data", data, "--teacher", teacher, *args) == 2
    assert "no photograph has a count above 0" in capsys.readouterr().err
