"""The numbers that the paper and the README state: the presets, constants, and what a schedule does."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import Dataset

import evaluate
import infer
import train_branches
import train_pts
import train_student
from datasets.transforms import canny_edges
from engine import options
from engine.cam_labels import PLAIN, SPREAD, class_labels, saliency_mask
from engine.config import Machine, Schedule, as_recorded, override, settings_of
from engine.instance_labels import Maps, instance_label
from engine.presets import BEST, PAPER
from engine.trainer import train
from experiments import oracle_study, prm, tables
from models import crf
from models.backbones import BACKBONES, Backbone
from models.classifier import CAM_SIZE
from models.fusion_config import FusionConfig
from models.wsid_net import NetConfig
from utils import cli
from utils.cli import InputError
from utils.script import report_problems

# Every value of the preset PAPER, and where it comes from: a section of the paper, IRN (Ahn et al., CVPR 2019) where
# that is silent, or "ours" where both are. A setting that is missing here fails the test.
SCHEDULE = {
    "epochs": (5, "Sec. 4.1: we train our WSID-Net for 5 epochs"),
    "batch_size": (6, "Sec. 4.1"),
    "lr": (0.01, "Sec. 4.1"),
    "optimizer": ("sgd", "Sec. 4.1"),
    "backbone_lr": (0.1, "IRN: ten times the rate for new layers"),
    "freeze": (1, "IRN"),
    "warmup": (0, "Sec. 4.1: the poly schedule alone"),
    "average": (0, "Sec. 4.1: no average over iterations"),
}
BACKBONE = {
    "backbone": ("resnet50", "Sec. 4.1: ResNet50 for all three branches"),
    "output_stride": (16, "IRN"),
    "size": (512, "Sec. 4.1"),
}
FUSION = {
    "grouping": ("sinks", "Sec. 3.1.1, Eq. 2"),
    "theta": (0.5, "Sec. 3.1.1 without its value; ours"),
    "sink_thresh": (2.5, "IRN"),
    "centroid_region": ("image", "Sec. 3.1.1: clusters first, then the salient ones"),
    "radius": (5, "IRN"),
    "power": (10, "IRN: the power of H in Eq. 9"),
    "steps": (256, "IRN: the walk of Eq. 10"),
    "saliency_thresh": (0.5, "ours"),
    "mask_rule": ("peak", "IRN"),
    "mask_thresh": (0.5, "ours"),
    "min_area": (0.01, "IRN: fragments below it are no instance"),
    "min_score": (0, "Sec. 4.2: no instance is dropped by its score"),
    "count_aware_scores": (False, "Sec. 4.2: no count distribution"),
}
SOURCES = {
    "name": ("paper", ""),
    "cam": {"schedule": SCHEDULE} | BACKBONE,
    "labels": {
        "scales": ((1.0, 0.5, 1.5, 2.0), "IRN"),
        "spread": (False, "Sec. 4.2: class activation maps via [70]"),
        "crf": (True, "Sec. 4.2"),
    },
    "network": BACKBONE
    | {
        "channels": (256, "Sec. 3.3.1"),
        "mixing": (True, "Sec. 3.3.1, CFM"),
        "attention": ("parallel", "Sec. 3.3.2, Table 3"),
        "enhancement": (True, "Sec. 3.2.1"),
        "canny": ("auto", "Sec. 4.4.4: by the median of the grey image"),
        "count_head": (False, "Sec. 3: three branches, none for the count"),
    },
    "branches": {
        "schedule": SCHEDULE,
        "radius": (10, "IRN"),
        "lsu_weight": (1, "Sec. 4.2: L_su together with L_V, without a weight"),
        "lsu_form": ("mse", "Sec. 3.1.1, Eq. 3 and 4"),
        "centroid_target_weight": (0, "Sec. 4.2: no other loss"),
    },
    "saliency": {"schedule": SCHEDULE},
    "pts": {
        "schedule": SCHEDULE
        | {"epochs": (8, "Sec. 4.1: E"), "lr": (1e-4, "Sec. 4.1"), "backbone_lr": (1, "Sec. 4.1: one rate")},
        "iterations": (6, "Sec. 4.1: R"),
        "size": (None, "Sec. 4.1: that of the network"),
        "fusion": FUSION,
        "saliency_weight": (0, "Algorithm 1, line 8"),
        "init_mask_weight": (0, "Algorithm 1, line 8"),
        "instance_labels": (False, "Sec. 3.4: of the saliency branch alone"),
    },
    "fusion": FUSION,
    "student": (None, "Sec. 3.4: nothing after PTS"),
}


def values_of(sources):
    """The values alone of ``SOURCES``, whose leaves are (value, source)."""
    return {name: values_of(leaf) if isinstance(leaf, dict) else leaf[0] for name, leaf in sources.items()}


def test_every_value_of_the_paper_preset_has_a_source():
    assert asdict(PAPER) == values_of(SOURCES)


def test_scripts_use_the_paper_preset_unless_another_is_named():
    for script in (train_branches, train_pts):
        args = script.get_args_parser().parse_args([])
        assert options.preset_of(args) is PAPER or options.preset_of(args) == PAPER
        assert options.preset_of(script.get_args_parser().parse_args(["--preset", "best"])) == BEST


def test_the_best_preset_has_what_its_figures_were_measured_with():
    assert (BEST.cam.backbone, BEST.cam.output_stride, BEST.cam.size) == ("tf_efficientnet_lite2", 32, 320)
    assert BEST.cam.schedule == Schedule(3, 16, 0.05, "sgd", 0.1, 2)
    assert (BEST.labels.scales, BEST.labels.spread, BEST.labels.crf) == ((1, 2), True, True)
    assert BEST.network == NetConfig("tf_efficientnet_lite2", 16, 256, 64)
    assert BEST.branches.schedule == Schedule(2, 8, 0.001, "adamw", 0.1, 3)
    branches = BEST.branches
    assert (branches.radius, branches.lsu_weight, branches.lsu_form) == (5, 0.02, "huber")
    assert branches.centroid_target_weight == 0.1
    assert BEST.saliency.schedule == Schedule(3, 8, 0.012, "sgd", 0.5, 2)
    assert BEST.pts.schedule == Schedule(1, 8, 0.004, "sgd", 0.5, 2) and BEST.pts.iterations == 2
    assert (BEST.pts.saliency_weight, BEST.pts.init_mask_weight) == (0.5, 1 / 3)
    assert BEST.pts.fusion == FusionConfig(grouping="count", mask_rule="peak", mask_thresh=0.5)
    assert BEST.fusion == FusionConfig(), "the settings that hold on photographs on which nothing was chosen"
    student = BEST.student
    assert student.schedule == Schedule(3, 16, 8e-4, "adamw", 0.25, 3, 100, 0.998)
    assert (student.backbone, student.size, student.pyramid_channels) == ("tf_efficientnet_lite2", 384, 96)
    assert (student.rounds, student.freeze_depthwise, student.resolution) == (4, True, 0.4)
    assert (student.crop, student.copy_paste, student.exposure) == (0.6, 0.7, 3)


OPTIONS = [
    ("--epochs 2", lambda preset: {preset.cam.schedule.epochs, preset.branches.schedule.epochs}, {2}),
    ("--lr 0.5", lambda preset: preset.saliency.schedule.lr, 0.5),
    ("--backbone mobilenetv2_100", lambda preset: {preset.cam.backbone, preset.network.backbone}, {"mobilenetv2_100"}),
    ("--size 96", lambda preset: (preset.cam.size, preset.network.size), (96, 96)),
    ("--radius 4", lambda preset: (preset.branches.radius, preset.fusion.radius), (4, 5)),
    ("--no-be", lambda preset: preset.network.enhancement, False),
    ("--no-cfm --ma s-c", lambda preset: (preset.network.mixing, preset.network.attention), (False, "s-c")),
    ("--no-ca", lambda preset: (preset.network.mixing, preset.network.attention), (False, "none")),
    ("--count-head", lambda preset: preset.network.count_head, True),
    ("--spread-cam --no-crf", lambda preset: (preset.labels.spread, preset.labels.crf), (True, False)),
    ("--cam-scales 1 2", lambda preset: preset.labels.scales, (1.0, 2.0)),
    ("--centroid-target-weight 0.2", lambda preset: preset.branches.centroid_target_weight, 0.2),
    ("--fusion power=7", lambda preset: preset.fusion, replace(PAPER.fusion, power=7)),
    ("--preset best --lsu-weight 0", lambda preset: preset.branches, replace(BEST.branches, lsu_weight=0)),
    ("--preset best --no-count-head", lambda preset: preset.network, replace(BEST.network, count_head=False)),
]


@pytest.mark.parametrize("given, found, expected", OPTIONS)
def test_an_option_changes_its_setting_alone(given, found, expected):
    args = train_branches.get_args_parser().parse_args(given.split())
    assert found(train_branches.resolve(args, None)) == expected


def test_settings_added_later_are_recorded_only_where_they_are_set():
    before = {"epochs": 1, "batch_size": 6, "lr": 0.01, "optimizer": "sgd", "backbone_lr": 0.1, "freeze": 1}
    assert settings_of(Schedule(1)) == as_recorded(Schedule(1)) == before
    changed = Schedule(1, warmup=2, average=0.9)
    assert settings_of(changed) == as_recorded(changed) == before | {"warmup": 2, "average": 0.9}


def test_lsu_weight_0_removes_l_su_and_nothing_else():
    args = train_branches.get_args_parser().parse_args("--preset best --lsu-weight 0".split())
    assert train_branches.resolve(args, None) == replace(BEST, branches=replace(BEST.branches, lsu_weight=0.0))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"size": 100}, "size: '100' does not fit; give a multiple of 32"),
        ({"lr": 0.0}, "lr: '0.0' does not fit; give a number of at most 1000 and above 0"),
        ({"optimizer": "adam"}, "optimizer: 'adam' does not fit; give sgd or adamw"),
        ({"scales": (1.0, -1.0)}, "scales: '-1.0' does not fit"),
        ({"backbone": "vgg"}, "backbone: 'vgg' does not fit"),
    ],
)
def test_a_preset_with_a_wrong_value_is_one_sentence(values, words):
    with pytest.raises(InputError, match=words):
        override(PAPER, values)


def test_the_network_is_the_paper_s_but_for_its_count_head():
    assert replace(NetConfig(), count_head=False) == PAPER.network
    assert CAM_SIZE == 512, "activations are computed at the paper's input size"


def test_settings_of_the_fusion_are_those_of_the_readme():
    settings = FusionConfig()
    assert (settings.theta, settings.power) == (0.5, 5), "README, Differences from the paper"
    assert (settings.radius, settings.steps, settings.sink_thresh) == (5, 256, 2.5), "IRN's"
    assert (
        settings.mask_rule == "relative" and settings.centroid_region == "salient" and settings.saliency_thresh == 0.5
    )
    # instance / (instance + background) > .4 where the instance has two thirds of the background's response.
    assert settings.mask_thresh / (1 - settings.mask_thresh) == pytest.approx(2 / 3)
    assert (settings.min_area, settings.min_score, settings.count_aware_scores) == (0.01, 0.1, True)
    assert settings.grouping == "sinks"


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
    crf.refine_mask(image, np.full((size, size), 0.2))
    assert calls["bilateral"] == (0.4 * size, 10, 8) and calls["iterations"] == 1
    crf.refine_labels(image, np.ones((size, size), int), 3)
    assert calls["unary"] == pytest.approx([-math.log(0.15), -math.log(0.7), -math.log(0.15)], rel=1e-5), "IRN's .7"


@pytest.mark.parametrize("thresholds, even, power", [(PLAIN, 0.25, 1), (SPREAD, 0.6, 2)])
def test_the_unary_of_activations_is_that_of_the_readme(thresholds, even, power):
    """The ratio of foreground to background before the CRF is activation / .25, or (activation / .6)^2 where spread."""
    values = np.array([0.15, 0.3, 0.6, 0.75, 1.0], np.float32)
    image, cams = np.zeros((5, 5, 3), np.uint8), np.tile(values, (1, 5, 1))
    ratio = (values / even) ** power
    assert np.allclose(saliency_mask(image, cams, thresholds, use_crf=False), ratio / (1 + ratio), atol=1e-6)


@pytest.mark.parametrize("thresholds, background, foreground", [(PLAIN, 0.05, 0.3), (SPREAD, 0.5, 0.7)])
def test_confident_labels_have_the_thresholds_of_the_readme(thresholds, background, foreground):
    """IRN's .30 and .05 for plain maps, on stripes that the CRF has no reason to move."""
    image, cams = np.zeros((60, 240, 3), np.uint8), np.zeros((1, 60, 240), np.float32)
    values = (background - 0.02, background + 0.02, foreground - 0.02, foreground + 0.02)
    for stripe, value in enumerate(values):
        image[:, 60 * stripe : 60 * stripe + 60], cams[..., 60 * stripe : 60 * stripe + 60] = 80 * stripe, value
    labels = class_labels(image, cams, (4,), thresholds)
    assert [np.unique(labels[:, 60 * s + 15 : 60 * s + 45]).tolist() for s in range(4)] == [[0], [255], [255], [5]]


def test_a_pseudo_label_is_an_instance_above_six_tenths_and_background_below_three():
    label = np.full((64, 96), 0.05, np.float32)
    label[16:48, 8:40] = 0.95
    label[16:48, 40:48], label[16:48, 48:52], label[16:48, 52:56], label[16:48, 56:60] = 0.62, 0.58, 0.32, 0.28
    maps = Maps(torch.zeros(16, 24), torch.zeros(16, 24), torch.zeros(2, 16, 24))
    found = instance_label(label, maps, 1, FusionConfig())
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


def train_two(folder, model, optimizer=sgd, stop_before=math.inf, weight=1.0, **more):
    """Train a Two by that schedule, pretrained layers at a quarter; returns the progress at each of its steps.

    weight: the loss of the new layer is divided by it, for a training that multiplies it.
    """
    seen = []

    def losses(model, batch, progress, *_):
        if len(seen) == stop_before:
            raise KeyboardInterrupt
        seen.append(progress)
        old, new = model()
        return {"old": (old - 3) ** 2 / 2, "new": (new + 2) ** 2 / 2 / weight}

    schedule = Schedule(3, 2, 0.3, optimizer=optimizer.__name__, backbone_lr=0.25)
    machine = Machine(workers=0, save_seconds=0)
    train(model, Anything(), losses, schedule, machine, folder=folder, device=torch.device("cpu"), **more)
    return seen


def assert_trained(model, optimizer=sgd):
    old, new = (weight.item() for weight in model())
    assert old == pytest.approx(optimizer(5.0, 3.0, [0.25 * rate for rate in RATES]), rel=1e-9)
    assert new == pytest.approx(optimizer(-4.0, -2.0, RATES), rel=1e-9)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_training_takes_the_steps_of_its_schedule(tmp_path, optimizer):
    """Sec. 4.1: lr (1 - itr / max_itr)^gamma, gamma .9 [IRN], times --backbone-lr for pretrained layers."""
    model = Two()
    assert train_two(tmp_path, model, optimizer) == pytest.approx([k / 9 for k in range(9)])
    assert_trained(model, optimizer)
    finished = Two()
    assert train_two(tmp_path, finished, optimizer) == [], "it is trained"
    assert_trained(finished, optimizer)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_training_that_was_stopped_takes_the_same_steps(tmp_path, optimizer):
    with pytest.raises(KeyboardInterrupt):
        train_two(tmp_path, Two(), optimizer, stop_before=4)
    model = Two()
    assert train_two(tmp_path, model, optimizer) == pytest.approx([k / 9 for k in range(4, 9)])
    assert_trained(model, optimizer)


def test_a_training_logs_its_rate_and_its_losses_without_and_with_their_weights(tmp_path):
    scalars, pictures = {}, []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: scalars.setdefault(name, []).append((value, step)))
    model = Two()
    train_two(
        tmp_path,
        model,
        weight=4.0,
        weights={"new": 4.0},
        writer=writer,
        show=lambda model, writer, step: pictures.append((model.training, step)),
    )
    assert scalars["train/lr"] == [(0.3, 0)] and pictures == [(False, 3), (False, 6), (False, 9)]
    assert scalars["train/old"] == [(2.0, 0)] and "train/old_weighted" not in scalars
    assert scalars["train/new"] == [(0.5, 0)] and scalars["train/new_weighted"] == [(2.0, 0)]
    assert scalars["train/gradient_norm"][0][0] == pytest.approx(math.hypot(2, 2))
    assert_trained(model)


def test_the_first_gpu_is_the_default(monkeypatch, capsys):
    cli._print_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert cli.select_device(None) == cli.select_device(None) == torch.device("cuda", 0)
    assert capsys.readouterr().out == "device: cuda:0 (card of cuda:0)\n", "in one line, once"
    assert cli.select_device(-1) == cli.select_device(-1, 1) == torch.device("cpu")
    assert cli.select_device(1) == cli.select_device(None, 1) == cli.select_device(0, 1) == torch.device("cuda", 1)
    for gpu, offset in ((2, 0), (None, 2), (1, 1)):
        with pytest.raises(InputError, match="--gpu 2 was asked for but 2 CUDA devices"):
            cli.select_device(gpu, offset)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.select_device(None) == cli.select_device(None, 1) == torch.device("cpu")
    assert capsys.readouterr().out == "device: cpu (no GPU is visible)\n"


def test_problems_of_single_files_are_printed_and_choose_the_exit_code(capsys):
    problems = [InputError(f"{name} is broken") for name in "abc"]
    assert report_problems([]) == 0 and not capsys.readouterr().err
    assert report_problems(problems) == 1
    assert capsys.readouterr().err == "error: a is broken\nerror: b is broken\nerror: c is broken\n"
    assert report_problems(problems, 1) == 1
    assert capsys.readouterr().err == "error: a is broken\nerror: 2 more such\n"


@pytest.mark.parametrize(
    "script, needed",
    [
        (infer, ("--img", "a")),
        (evaluate, ()),
        (train_branches, ()),
        (train_pts, ()),
        (train_student, ()),
        (tables, ("2",)),
        (prm, ("--classifier", "c", "--data", "d")),
        (oracle_study, ()),
    ],
)
def test_every_script_takes_the_first_gpu_by_default(script, needed):
    parser = script.get_args_parser()
    assert parser.parse_args(list(needed)).gpu is None
    assert parser.parse_args([*needed, "--gpu", "-1"]).gpu == -1
