"""What each stage passes to the training loop: its photographs, its schedule and its losses.

The scripts run whole except for the iterations: ``train`` is replaced by a function that keeps its arguments.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, make_data

import train_branches
import train_pts
from datasets.training import TrainingImages, read_samples
from datasets.transforms import load_square
from engine import cam_labels, pts, run, stages
from engine.config import Machine, override
from engine.presets import BEST
from models import wsid_net
from models.branches import BranchOutput
from models.classifier import Classifier
from models.losses import boundary_loss, centroid_loss
from utils import checkpoint

NET = dict(backbone="mobilenetv2_100", size=64, channels=16)
QUICK = "--gpu -1 --backbone mobilenetv2_100 --size 64 --channels 16 --workers 0 --cam-scales 1".split()
SETTINGS = (
    "--preset best --output-stride 16 --epochs 3 --batch-size 2 --lr 0.02 --optimizer sgd --backbone-lr 0.3 --freeze 1 "
    "--radius 4 --lsu-weight 0.05 --centroid-target-weight 0.2"
).split()


def keep(given):
    """What stands for ``train``: it keeps its arguments under the name of the stage, and the model stays as it is."""

    def train(model, dataset, losses, schedule, machine, *, weights=None, **rest):
        given.setdefault(rest["name"], []).append(
            SimpleNamespace(
                model=model, dataset=dataset, losses=losses, schedule=schedule, machine=machine, weights=weights or {}
            )
        )

    return train


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """{stage: what it gave to ``train``}, and under "labels" the arguments of each ``write_pseudo_labels``."""
    folder, found, labels = tmp_path_factory.mktemp("stages"), {}, []
    write = cam_labels.write_pseudo_labels

    def note(*args):
        labels.append(args)
        write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cam_labels, "load_pretrained", lambda *args: None)
        patch.setattr(stages, "load_pretrained", lambda *args: None)
        patch.setattr(run, "train", keep(found))
        patch.setattr(cam_labels, "write_pseudo_labels", note)
        data = make_data(folder / "data", count=2)
        assert call(train_branches.main, "--data", data, "--out", folder / "run", *QUICK, *SETTINGS) == 0
    return {name: calls[0] for name, calls in found.items()} | {"labels": labels, "data": data, "run": folder / "run"}


def terms_of(stage, model, batch, progress=0.0):
    """The losses of a stage with their weights, as floats, of a network that is given by its output."""
    terms = stage.losses(model, batch, progress)
    return {name: stage.weights.get(name, 1) * float(term) for name, term in terms.items()}


def test_every_stage_has_the_schedule_that_was_asked_for(given):
    for name in ("cam", "branches", "saliency"):
        schedule = given[name].schedule
        assert (schedule.epochs, schedule.batch_size, schedule.lr, schedule.backbone_lr) == (3, 2, 0.02, 0.3)
        assert schedule.optimizer == "sgd" and schedule.freeze == 1 and given[name].machine.workers == 0


def test_photographs_are_whole_where_their_number_is_learned(given):
    """A count label holds for the whole photograph; what is learned of each pixel holds for a part of it too [ours]."""
    for name, crop in (("cam", 0.5), ("branches", 1), ("saliency", 0.7)):
        dataset = given[name].dataset
        assert (dataset.crop, dataset.jitter, dataset.size) == (crop, 0.2, 64)


def test_pseudo_labels_come_of_spread_activations_on_the_grid_of_a_photograph_of_512_pixels(given):
    assert len(given["labels"]) == 2
    for _, _, cams, classes, size, thresholds, use_crf in given["labels"]:
        assert cams.shape == (len(classes), 128, 128) and size == 64
        assert thresholds == cam_labels.SPREAD and use_crf


def test_the_classifier_learns_each_class_by_itself(given):
    """Multi-label soft margin: the mean over classes of the cross entropy of each class's sigmoid."""
    logits, classes = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 20)
    classes[0, 3] = classes[1, 7] = classes[1, 14] = 1
    sure = 1 / (1 + np.exp(-logits.numpy()))
    expected = -np.where(classes > 0, np.log(sure), np.log(1 - sure)).mean()
    terms = terms_of(given["cam"], lambda image: logits, {"image": None, "classes": classes})
    assert terms == pytest.approx({"classification": expected}, rel=1e-5)


def test_the_saliency_branch_learns_soft_masks(given):
    logits, masks = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[[0.9, 0.3]]])
    sure = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    entropy = [-(m * math.log(s) + (1 - m) * math.log(1 - s)) for s, m in zip(sure, (0.9, 0.3), strict=True)]
    terms = terms_of(
        given["saliency"], SimpleNamespace(logits=lambda image: logits), {"image": None, "pseudo_saliency": masks}
    )
    assert terms == pytest.approx({"saliency": sum(entropy) / 2}, rel=1e-5)


LEFT, RIGHT = np.s_[2:6, 2:6], np.s_[2:6, 8:12]  # two objects of 16 pixels, with centres at (3.5, 3.5) and (3.5, 9.5)


def two_objects(derive):
    """A batch of two photographs of two objects, the second with a count of one; and the maps of a network.

    derive: of the dataset, which adds the rest of a batch.
    """
    generator = torch.Generator().manual_seed(0)
    yy, xx = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    boundary, offsets = torch.rand(1, 16, 16, generator=generator), torch.randn(2, 16, 16, generator=generator)
    classes, saliency = np.zeros((16, 16), np.int64), np.full((16, 16), 0.45, np.float32)
    for place, column in ((LEFT, 4.0), (RIGHT, 6.0)):
        saliency[place], classes[place] = 0.55, 3
        offsets[0][place], offsets[1][place] = 4 - yy[place], column - xx[place]  # to (4, 4) and (4, 6)
    classes[10:, 12:] = 255
    maps, items = {"pseudo_classes": classes, "pseudo_saliency": saliency}, []
    for count in (2, 1):
        arrays = maps | derive(np.zeros((64, 64, 3), np.uint8), maps, count) | {"count": np.float32(count)}
        items.append({name: torch.as_tensor(value) for name, value in arrays.items()})
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]} | {"image": torch.zeros(2)}
    if "divisors" in batch:  # what a training makes of them
        batch["divisors"] = batch["divisors"].mean(0)
    return torch.stack([boundary] * 2), torch.stack([offsets] * 2), batch


@pytest.fixture
def branch_terms(given):
    """A function of the progress of a training: the losses of ``two_objects``."""
    boundary, offsets, batch = two_objects(given["branches"].dataset.derive)
    return lambda progress: terms_of(
        given["branches"], lambda image, edges: BranchOutput(boundary, offsets, None), batch, progress
    )


def test_the_branches_minimise_the_four_losses(branch_terms):
    assert set(branch_terms(0.0)) == {"boundary", "centroid", "subitizing", "centroid_target"}


@pytest.mark.parametrize("progress, bandwidth", [(0.0, 1.5), (0.49, 1.5), (0.51, 0.75), (1.0, 0.75)])
def test_l_su_has_its_weight_and_a_bandwidth_from_coarse_to_fine(branch_terms, progress, bandwidth):
    """h is 12, then 6 pixels of the grid of 512 pixels, so 1.5 and .75 here.

    The 16 pixels of an object point to one place, 2 pixels from that of the other 16: with e = exp(-2^2 / 2 h^2) each
    point has 16 (1 + e) near, and T~ is 2 / (1 + e). Pixels that are not salient would be places more.
    """
    found = 2 / (1 + math.exp(-4 / (2 * bandwidth**2)))
    expected = 0.05 * ((found - 2) ** 2 + (found - 1) ** 2) / 2
    assert branch_terms(progress)["subitizing"] == pytest.approx(expected, rel=1e-4)


def test_centroid_targets_have_their_weight(branch_terms):
    """The first points .5 and .5 beside its centre (3.5, 3.5), the other .5 and 3.5 beside (3.5, 9.5).

    Where the count is one there is one instance, the first of the largest.
    """
    assert branch_terms(0.0)["centroid_target"] == pytest.approx(0.2 * (1 + 4 + 1) / 3, rel=1e-5)


def test_l_b_and_l_v_count_pairs_within_the_radius(given, branch_terms):
    """Both as they are, which tests/test_method_values.py writes out."""
    boundary, offsets, batch = two_objects(given["branches"].dataset.derive)
    for name, loss, maps in (("boundary", boundary_loss, boundary), ("centroid", centroid_loss, offsets)):
        near, far = (loss(maps, batch["pseudo_classes"], radius).item() for radius in (4, 5))
        assert branch_terms(0.0)[name] == pytest.approx(near, rel=1e-5) and abs(near - far) > 1e-3


def test_l_su_takes_other_pixels_in_each_step(branch_terms, monkeypatch):
    def note(*args, seed, **rest):
        seeds.append(seed)
        return torch.tensor(0.0)

    seeds = []
    monkeypatch.setattr(stages, "subitizing_loss", note)
    for step in (0, 1, 2, 1):
        branch_terms(step / 100_000)
    assert len(set(seeds)) == 3 and seeds[1] == seeds[3], "and the same ones where a training is repeated"


class Pointing(torch.nn.Module):
    """Stands for the branches: V of a photograph is its mean colour, red down and green to the right."""

    def __init__(self):
        super().__init__()
        self.centroid = SimpleNamespace(mean_offset=torch.full((1, 2, 1, 1), 9.0))

    def forward(self, image, edges):
        assert not self.training
        return BranchOutput(None, image[:, :2].mean((2, 3), keepdim=True) - self.centroid.mean_offset, None)


def test_the_mean_offset_is_that_of_the_photographs(photographs):
    samples = read_samples([photographs])
    colours = np.mean([load_square(sample.path, 96)[..., :2].mean((0, 1)) / 255 for sample in samples], 0)
    found = stages.mean_offset(Pointing().train(), samples, 96, "auto", torch.device("cpu"))
    assert found.shape == (1, 2, 1, 1) and np.allclose(found.flatten(), colours, atol=1e-5)


@pytest.mark.parametrize(
    "options, subtracted",
    [
        (SETTINGS, 0),
        ((*SETTINGS, "--lsu-weight", "0"), 0),
        ((*SETTINGS, "--centroid-target-weight", "0"), 7),
        (("--preset", "paper"), 7),
    ],
)
def test_the_mean_offset_is_subtracted_where_only_differences_of_v_are_trained(
    given, tmp_path, monkeypatch, options, subtracted
):
    """README: without centroid targets; L_V and L_su leave a constant of V free."""
    monkeypatch.setattr(stages, "load_pretrained", lambda *args: None)
    monkeypatch.setattr(run, "train", keep({}))
    monkeypatch.setattr(stages, "mean_offset", lambda *args: torch.full((1, 2, 1, 1), 7.0))
    labels = given["run"] / "labels"
    command = ["--data", given["data"], "--pseudo-labels", labels, "--stage", "branches", "--out", tmp_path]
    assert call(train_branches.main, *command, *QUICK, *options) == 0
    weights = checkpoint.load(tmp_path / "branches" / "weights.pt")["model"]
    assert (weights["centroid.mean_offset"] == subtracted).all()


@pytest.mark.parametrize(
    "options, terms, count_head",
    [
        ("--preset paper", {"boundary", "centroid", "subitizing"}, False),
        ("--preset paper --lsu-weight 0", {"boundary", "centroid"}, False),
        ("--preset best --lsu-weight 0", {"boundary", "centroid", "centroid_target"}, True),
        ("--preset best --centroid-target-weight 0", {"boundary", "centroid", "subitizing"}, True),
        ("--preset best --no-count-head", {"boundary", "centroid", "subitizing", "centroid_target"}, False),
    ],
)
def test_each_part_of_the_branches_is_a_switch_of_its_own(given, tmp_path, monkeypatch, options, terms, count_head):
    found = {}
    monkeypatch.setattr(stages, "load_pretrained", lambda *args: None)
    monkeypatch.setattr(run, "train", keep(found))
    labels = given["run"] / "labels"
    command = ["--data", given["data"], "--pseudo-labels", labels, "--stage", "branches", "--out", tmp_path]
    assert call(train_branches.main, *command, *QUICK, *options.split()) == 0
    [stage] = found["branches"]
    boundary, offsets, batch = two_objects(stage.dataset.derive)
    assert set(terms_of(stage, lambda image, edges: BranchOutput(boundary, offsets, None), batch)) == terms
    assert (stage.model.count_head is not None) == count_head


def test_some_500_photographs_fix_a_mean():
    for count in (1, 300, 1000, 2600):
        chosen = stages.evenly_spaced(list(range(count)))
        assert min(count, 500) <= len(chosen) < 1000 and len(set(np.diff(chosen))) <= 1, "evenly"


def test_progressive_training_is_algorithm_1(tmp_path, monkeypatch, photographs):
    """Six iterations of eight epochs at 1e-4 (Sec. 4.1), each from where the one before has come to, and from the third
    on alpha w_{r-1} + (1 - alpha) w_r with alpha = r / (r + 1) (Eq. 8). Here an iteration adds 1 to all weights.
    """
    schedules, seeds, crops = [], [], []

    def train(model, dataset, losses, schedule, machine, **rest):
        schedules.append((schedule.epochs, schedule.batch_size, schedule.lr, schedule.backbone_lr, schedule.optimizer))
        crops.append((dataset.crop, dataset.jitter, dataset.size))
        seeds.append(dataset.seed)
        for parameter in model.parameters():
            parameter.data += 1

    net = wsid_net.WSIDNet(wsid_net.NetConfig(**NET))
    wsid_net.save_weights(net, tmp_path / "weights.pt")
    monkeypatch.setattr(pts, "train", train)
    monkeypatch.setattr(pts, "make_labels", lambda run, *rest: run.samples)
    options = ["--data", f"{photographs}@count", "--out", tmp_path, "--gpu", "-1", "--workers", "0"]
    assert call(train_pts.main, *options) == 0
    assert schedules == [(8, 6, 1e-4, 1.0, "sgd")] * 6
    assert crops == [(0.7, 0.2, 64)] * 6 and len(set(seeds)) == 6, "and other crops in each"
    before = wsid_net.load_weights(tmp_path / "weights.pt").saliency.state_dict()
    gone = [1, 2, 2 + 1 / 4, 2 + 1 / 4 + 1 / 5, 2 + 1 / 4 + 1 / 5 + 1 / 6, 2 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7]
    for r, way in enumerate(gone, 1):
        model = checkpoint.load(tmp_path / "pts" / f"r{r}" / "weights.pt")["model"]
        assert (model["aspp.0.0.weight"] - before["aspp.0.0.weight"]).mean().item() == pytest.approx(way, abs=1e-4)
    assert (tmp_path / "weights_pts.pt").exists()


def test_bfloat16_labels_differ_by_the_rounding_of_the_network_alone(photographs):
    samples, found = read_samples([photographs])[:2], []
    classifier = Classifier("mobilenetv2_100").eval()
    net = wsid_net.WSIDNet(wsid_net.NetConfig(**NET)).eval()
    preset = override(BEST, {"size": 64, "scales": (1.0,)})
    for amp in ("off", "bf16"):
        own = run.Run(photographs, samples, preset, Machine(amp=amp), torch.device("cpu"))
        with torch.no_grad():
            cams = [cams for _, cams in cam_labels.class_activations(own, classifier, samples)]
        saliency = [maps[0] for _, _, maps, _ in pts.network_outputs(own, net, samples)]
        assert cams[0].dtype == saliency[0].dtype == np.float32
        found.append((np.stack(cams), np.stack(saliency)))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < np.abs(exact - rounded).max() and np.abs(exact - rounded).mean() < 0.1


def test_every_other_photograph_is_mirrored(photographs):
    dataset = TrainingImages(read_samples([photographs])[:1], 64)
    images = []
    for dataset.epoch in range(64):
        images.append(dataset[0]["image"])
    as_first = [torch.equal(image, images[0]) for image in images]
    assert all(same or torch.equal(image.flip(-1), images[0]) for same, image in zip(as_first, images, strict=True))
    assert 16 < sum(as_first) < 48, "four standard deviations beside the half"
