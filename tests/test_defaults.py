"""The numbers that the paper and the README state: options that are left alone, constants, and what a schedule does."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import Dataset

import train_branches
import train_pts
from datasets.transforms import canny_edges
from engine import crf
from engine.cam_labels import SPREAD, class_labels, saliency_mask
from engine.pts import instance_label
from engine.trainer import Schedule, train
from models.backbones import BACKBONES, Backbone
from models.classifier import CAM_SIZE
from models.fusion import FusionConfig
from models.wsid_net import NetConfig

OPTIONS = [
    # The paper: Sec. 4.1, and for the width Sec. 3.3.1.
    (train_branches, {"backbone": "resnet50", "size": 512, "channels": 256, "ma": "parallel", "canny": "auto"}),
    (train_branches, {"optimizer": "sgd", "batch_size": 6, "lr": 0.01, "epochs": 5}),
    (train_pts, {"optimizer": "sgd", "batch_size": 6, "lr": 0.0001, "iters": 6, "epochs": 8}),
    # IRN: pairs nearer than 10, activations at four sizes, a tenth of the rate for layers that know ImageNet.
    (train_branches, {"radius": 10, "cam_scales": (1.0, 0.5, 1.5, 2.0), "backbone_lr": 0.1, "freeze": 1}),
    (train_branches, {"output_stride": 16}),
    # Ours: what the results were measured with. Neither the network nor PTS goes beyond the paper by itself.
    (train_branches, {"lsu_weight": 0.02, "counted_weight": 0.1, "plain_cam": False}),
    (train_branches, {"odds": (0.65, 0.92, -0.75)}),
    (train_branches, {"no_ca": False, "no_cfm": False, "no_be": False, "no_lsu": False, "no_crf": False}),
    (train_pts, {"keep": 1 / 3, "odds": None, "backbone_lr": 1.0, "freeze": 1, "by_class": False}),
]


@pytest.mark.parametrize("script, expected", OPTIONS)
def test_options_that_are_left_alone(script, expected):
    args = vars(script.get_args_parser().parse_args([]))
    found = {name: tuple(args[name]) if isinstance(args[name], list) else args[name] for name in expected}
    assert found == expected


def test_the_network_is_the_paper_s_unless_told_otherwise():
    net = NetConfig()
    assert (net.backbone, net.size, net.channels, net.output_stride) == ("resnet50", 512, 256, 16)
    assert net.mixing and net.attention == "parallel" and net.enhancement and net.canny == "auto"
    assert train_branches.net_config(train_branches.get_args_parser().parse_args([])) == net
    assert CAM_SIZE == 512, "activations are read off at the paper's input size"


def test_settings_of_the_fusion_are_those_of_the_readme():
    settings = FusionConfig()
    assert (settings.theta, settings.power) == (0.5, 5), "README, Differences from the paper"
    assert (settings.radius, settings.steps, settings.sink_thresh) == (5, 256, 2.5), "IRN's"
    assert (
        settings.mask_rule == "relative" and settings.centroid_region == "salient" and settings.saliency_thresh == 0.5
    )
    # Two thirds as much as from the background suffices: share = m / (m + b) > c where m > 2/3 b.
    assert settings.mask_thresh / (1 - settings.mask_thresh) == pytest.approx(2 / 3)
    assert (settings.min_area, settings.min_score, settings.count_aware_scores) == (0.01, 0.1, 1)
    labels = FusionConfig.of(train_pts.MEASURED)
    assert (labels.share, labels.background) == ("peak", 0.5), "PTS: .5 of the peak"


@pytest.mark.parametrize("size", [512, 128])
def test_the_crf_has_the_numbers_of_the_paper(monkeypatch, size):
    """Sec. 4.1: w1 = 4, sigma_alpha = 49, sigma_beta = 5, w2 = 3, sigma_gamma = 3, in pixels of a 512x512 image."""
    calls = {}

    class Recorder:
        def __init__(self, width, height, labels):
            self.shape = labels, height * width

        def setUnaryEnergy(self, unary):
            calls["unary"] = unary[:, 0]

        def addPairwiseGaussian(self, sxy, compat):
            calls["gaussian"] = sxy, compat

        def addPairwiseBilateral(self, sxy, srgb, rgbim, compat):
            calls["bilateral"] = sxy, srgb, compat

        def inference(self, iterations):
            calls["iterations"] = iterations
            return np.zeros(self.shape)

    monkeypatch.setattr(crf.dcrf, "DenseCRF2D", Recorder)
    image, share = np.zeros((size, size, 3), np.uint8), size / 512
    crf.refine_saliency(image, np.full((size, size), 0.2))
    assert calls["gaussian"] == (3 * share, 3) and calls["bilateral"] == (49 * share, 5, 4)
    assert calls["iterations"] == 10
    assert calls["unary"] == pytest.approx([-math.log(0.8), -math.log(0.2)], rel=1e-5)
    crf.refine_labels(image, np.ones((size, size), int), 3)
    assert calls["unary"] == pytest.approx([-math.log(0.15), -math.log(0.7), -math.log(0.15)], rel=1e-5), "IRN's .7"


def test_odds_of_spread_activations_are_those_of_the_readme():
    """README: odds of foreground = (activation / 0.6)^2 before the CRF."""
    values = np.array([0.15, 0.3, 0.6, 0.75, 1.0], np.float32)
    image, cams = np.zeros((5, 5, 3), np.uint8), np.tile(values, (1, 5, 1))
    odds = (values / 0.6) ** 2
    assert np.allclose(saliency_mask(image, cams, SPREAD, use_crf=False), odds / (1 + odds), atol=1e-6)


def test_confident_labels_of_spread_activations_are_those_of_the_readme():
    """README: confident class labels at .7 and .5, here on stripes that the CRF has no reason to move."""
    image, cams = np.zeros((60, 240, 3), np.uint8), np.zeros((1, 60, 240), np.float32)
    for stripe, value in enumerate((0.48, 0.52, 0.68, 0.72)):
        image[:, 60 * stripe : 60 * stripe + 60], cams[..., 60 * stripe : 60 * stripe + 60] = 80 * stripe, value
    labels = class_labels(image, cams, (4,), SPREAD)
    assert [np.unique(labels[:, 60 * s + 15 : 60 * s + 45]).tolist() for s in range(4)] == [[0], [255], [255], [5]]


def test_a_pseudo_label_is_sure_from_six_tenths_and_surely_not_below_three():
    label = np.full((64, 96), 0.05, np.float32)
    label[16:48, 8:40] = 0.95
    label[16:48, 40:48], label[16:48, 48:52], label[16:48, 52:56], label[16:48, 56:60] = 0.62, 0.58, 0.32, 0.28
    found = instance_label(label, (None, torch.zeros(16, 24), torch.zeros(2, 16, 24)), 1, FusionConfig())
    columns = [np.unique(found[24:40, column]).tolist() for column in (30, 42, 50, 53, 58)]
    assert columns == [[1], [1], [255], [255], [0]]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_see_the_statistics_they_were_trained_with(name):
    """EfficientNet-Lite saw (x - 127) / 128 of 8-bit values; the others what timm has on record for their weights."""
    image = torch.linspace(0, 255, 48).round().view(1, 3, 4, 4)
    if "lite" in name:
        expected = (image - 127) / 128
    else:
        tag = BACKBONES[name].tag
        record = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (record.mean, record.std))
        expected = (image / 255 - mean) / std
    assert torch.allclose(Backbone(name)._normalise(image / 255), expected, atol=1e-5)


@pytest.mark.parametrize("step, found", [(33, False), (34, True)])
def test_the_upper_automatic_canny_threshold_is_1_33_of_the_median(step, found):
    """A step of s grey levels has the Sobel gradient 4 s; of the median 100 the threshold is 133."""
    image = np.full((40, 40, 3), 100, np.uint8)
    image[:, 30:] += step
    assert canny_edges(image, "auto").any() == found


@pytest.mark.parametrize("step, found", [(16, False), (17, True)])
def test_the_lower_automatic_canny_threshold_is_0_67_of_the_median(step, found):
    """A weak edge counts where it goes on from a strong one and its gradient 4 s is above 67."""
    image = np.full((60, 40, 3), 100, np.uint8)
    image[:30, 30:] += 60
    image[30:, 30:] += step
    edges = canny_edges(image, "auto")
    assert edges[5:25].any(1).all() and edges[35:55].any() == found


# ---- schedules


class Anything(Dataset):
    seed = 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": torch.tensor(float(index))}


class Two(nn.Module):
    """A pretrained parameter at 5 and a new one at -4, which want to be 3 and -2."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.backbone.weight, 5.0)
        nn.init.constant_(self.head.weight, -4.0)
        self.double()

    def forward(self):
        return self.backbone.weight.sum(), self.head.weight.sum()


def sgd(weight, target, rates):
    """The textbook's: momentum .9, and a weight decay of 1e-4 in the gradient [IRN]."""
    speed = 0.0
    for rate in rates:
        speed = 0.9 * speed + (weight - target) + 1e-4 * weight
        weight -= rate * speed
    return weight


def adamw(weight, target, rates):
    """Loshchilov and Hutter, ICLR 2019, Algorithm 2: the decay of 1e-4 is beside the gradient."""
    first = second = 0.0
    for step, rate in enumerate(rates, 1):
        gradient = weight - target
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        direction = first / (1 - 0.9**step) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weight -= rate * (direction + 1e-4 * weight)
    return weight


RATES = [0.3 * (1 - k / 9) ** 0.9 for k in range(9)]  # three epochs of three batches, from .3 on


def train_two(folder, model, optimizer=sgd, stop_before=math.inf, **more):
    """Train a Two by that schedule, pretrained layers at a quarter; returns the progress at each of its steps."""
    seen = []

    def losses(model, batch, progress, *_):
        if len(seen) == stop_before:
            raise KeyboardInterrupt
        seen.append(progress)
        old, new = model()
        return {"old": (old - 3) ** 2 / 2, "new": (new + 2) ** 2 / 2}

    schedule = Schedule(3, 2, 0.3, optimizer=optimizer.__name__, backbone_lr=0.25, workers=0, save_seconds=0)
    train(model, Anything(), losses, schedule, folder=folder, device=torch.device("cpu"), **more)
    return seen


def assert_trained(model, optimizer=sgd):
    old, new = (weight.item() for weight in model())
    assert old == pytest.approx(optimizer(5.0, 3.0, [0.25 * rate for rate in RATES]), rel=1e-9)
    assert new == pytest.approx(optimizer(-4.0, -2.0, RATES), rel=1e-9)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_training_takes_the_steps_of_its_schedule(tmp_path, optimizer):
    """Sec. 4.1: lr (1 - itr / max_itr)^gamma, gamma .9 [IRN], and that times --backbone-lr for pretrained layers."""
    model = Two()
    assert train_two(tmp_path, model, optimizer) == pytest.approx([k / 9 for k in range(9)])
    assert_trained(model, optimizer)
    again = Two()
    assert train_two(tmp_path, again, optimizer) == [], "it is trained"
    assert_trained(again, optimizer)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_training_that_was_stopped_takes_the_same_steps(tmp_path, optimizer):
    with pytest.raises(KeyboardInterrupt):
        train_two(tmp_path, Two(), optimizer, stop_before=4)
    model = Two()
    assert train_two(tmp_path, model, optimizer) == pytest.approx([k / 9 for k in range(4, 9)])
    assert_trained(model, optimizer)


def test_a_training_reports_its_rate_and_losses(tmp_path):
    scalars, pictures = {}, []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: scalars.setdefault(name, []).append((value, step)))
    train_two(tmp_path, Two(), writer=writer, show=lambda model, writer, step: pictures.append((model.training, step)))
    assert scalars["train/lr"] == [(0.3, 0)] and pictures == [(False, 3), (False, 6), (False, 9)]
    assert scalars["train/old"] == [(2.0, 0)] and scalars["train/new"] == [(2.0, 0)]
    assert scalars["train/gradient_norm"][0][0] == pytest.approx(math.hypot(2, 2))
