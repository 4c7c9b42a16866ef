"""The settings of a training as frozen dataclasses: one for every stage, and a ``Preset`` of all of them.

Values are checked when a configuration is made; an InputError names the setting and the values it may have. Settings
marked [ours] are not in the paper, those marked [IRN] come from Ahn et al., CVPR 2019.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from datasets.transforms import parse_canny
from models.attention import MutualAttention
from models.backbones import BACKBONES
from models.fusion_config import FusionConfig
from models.wsid_net import NetConfig
from utils.cli import InputError, integer, number, one_of

LARGEST_SEED = 2**32 - 1
OPTIMIZERS = ("sgd", "adamw")
# Settings that former runs do not record: left out of a record where they are 0, so that those runs stay valid.
ADDED_LATER = ("warmup", "average")

Config = TypeVar("Config")


def multiple_of(step: int, least: int, most: int, why: str) -> Callable[[str], int]:
    """The ``type=`` of an option that is a multiple of ``step`` from ``least`` to ``most``; why: for the message."""

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else 0
        if not least <= value <= most or value % step:
            raise ArgumentTypeError(f"{text!r} does not fit; give a multiple of {step}, from {least} to {most}, {why}")
        return value

    return parse


# What the settings may be, as the ``type=`` of their options. The limits keep a training finite and within memory.
LIMITS: dict[str, Callable[[str], Any]] = {
    "epochs": integer(0),
    "batch_size": integer(1, 2**16),
    "lr": number(None, 1000, above=0),
    "optimizer": one_of(*OPTIMIZERS),
    "backbone_lr": number(0, 1000),
    "freeze": integer(0, 5),
    "warmup": integer(0),
    "average": number(0, below=1),
    "backbone": one_of(*BACKBONES),
    "output_stride": lambda text: int(one_of("8", "16", "32")(text)),
    "size": multiple_of(32, 64, 4096, "which the backbones can halve five times"),
    "channels": multiple_of(4, 4, 4096, "for group normalisation"),
    "attention": one_of(*MutualAttention.ORDERS),
    "canny": parse_canny,
    "scales": number(0.1, 8),
    "radius": integer(1, 64),
    "lsu_weight": number(0, 1000),
    "lsu_form": one_of("mse", "huber"),
    "centroid_target_weight": number(0, 1000),
    "iterations": integer(1),
    "saliency_weight": number(0, 1),
    "init_mask_weight": number(0, below=1),
    "rounds": integer(1, 100),
    "pyramid_channels": multiple_of(16, 32, 1024, "for group normalisation"),
    "crop": number(0.1, 1),
    "copy_paste": number(0, 3),
    "exposure": number(0, 6),
    "resolution": number(0.1, 1),
    "gpu": integer(-1),
    "workers": integer(0, 256),
    "amp": one_of("off", "bf16"),
    "accumulate": integer(1),
    "save_seconds": number(0),
    "seed": integer(0, LARGEST_SEED),
}


def check(config: Any) -> None:
    """InputError when a field of a dataclass has a value that ``LIMITS`` does not admit."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name not in LIMITS or value is None:
            continue
        for part in value if isinstance(value, tuple) else (value,):
            try:
                LIMITS[entry.name](str(part))
            except ArgumentTypeError as error:
                raise InputError(f"the setting {entry.name}: {error}") from error


class _Checked:
    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Machine(_Checked):
    """What a training is computed with: nothing here changes what is learned, up to rounding.

    gpu: CUDA device, -1 is the CPU, None the first GPU where there is one. workers: processes that load images and run
    the CRF. amp: "off", or "bf16" for the network in bfloat16. accumulate: parts that a batch is computed in, one after
    another. compile: whether torch.compile fuses the network. deterministic: the same weights every time on a GPU too,
    as far as PyTorch can. save_seconds: time between two checkpoints.
    """

    gpu: int | None = None
    workers: int = 2
    amp: str = "off"
    accumulate: int = 1
    compile: bool = False
    deterministic: bool = False
    save_seconds: float = 60.0

    @property
    def precision_of_labels(self) -> dict[str, str]:
        """``amp`` as a setting that labels depend on; none for float32, so that records without it stay valid."""
        return {} if self.amp == "off" else {"amp": self.amp}


@dataclass(frozen=True)
class Schedule(_Checked):
    """How long and how fast a stage trains, with the poly schedule (Sec. 4.1).

    batch_size: images per step of the optimizer, over all processes and parts. lr: initial learning rate of the new
    layers; pretrained ones take lr * backbone_lr. freeze: pretrained levels f1..f<freeze> that are not trained.
    warmup: iterations in which the learning rate rises linearly. average: decay per iteration of an exponential moving
    average of the weights, which then is the result; 0 for the last weights [both ours].
    """

    epochs: int
    batch_size: int = 6
    lr: float = 0.01
    optimizer: str = "sgd"
    backbone_lr: float = 0.1
    freeze: int = 1
    warmup: int = 0
    average: float = 0.0


@dataclass(frozen=True)
class CamConfig(_Checked):
    """The CAM classifier and the stage ``cam``. size: of the training square and of the pseudo labels, pixels."""

    schedule: Schedule
    backbone: str = "resnet50"
    output_stride: int = 16
    size: int = 512


@dataclass(frozen=True)
class LabelConfig(_Checked):
    """Pseudo labels from class activation maps, the stage ``labels`` (Sec. 4.2).

    scales: sizes at which activations are computed, times ``CamConfig.size``. spread: whether activations are
    propagated along a feature-affinity matrix [ours]. crf: whether the CRF refines the saliency masks (Table 7).
    """

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    spread: bool = False
    crf: bool = True


@dataclass(frozen=True)
class BranchesConfig(_Checked):
    """The stage ``branches``: L_B + L_V + lsu_weight L_su + centroid_target_weight L_target (Sec. 3.1, 3.2, 4.2).

    radius: of pixel pairs in L_B and L_V, stride-4 pixels. lsu_form: "mse" is Eq. 3 with the gradient of Eq. 4;
    "huber" is square up to one object too many or too few and linear beyond [ours]. centroid_target_weight: of the
    loss that points every pixel of a counted instance to its centre [ours]; 0 leaves it out.
    """

    schedule: Schedule
    radius: int = 10
    lsu_weight: float = 1.0
    lsu_form: str = "mse"
    centroid_target_weight: float = 0.0


@dataclass(frozen=True)
class SaliencyConfig(_Checked):
    """The stage ``saliency``: DeepLab on the saliency pseudo masks (Sec. 3)."""

    schedule: Schedule


@dataclass(frozen=True)
class PtsConfig(_Checked):
    """The progressive training scheme (Sec. 3.4, Algorithm 1).

    iterations: R; schedule.epochs: E, 0 makes labels alone. size: input square of the labels and of the saliency
    branch, pixels; None is that of the network. fusion: of the instances whose union is the next pseudo mask.
    The CRF refines the mean of this union and of S, the latter with weight saliency_weight [ours]; of that and the
    initial pseudo mask, the latter with weight init_mask_weight [ours]. instance_labels: whether instances are written
    too, which the branches can be trained on [ours].
    """

    schedule: Schedule
    iterations: int = 6
    size: int | None = None
    fusion: FusionConfig = FusionConfig()
    saliency_weight: float = 0.0
    init_mask_weight: float = 0.0
    instance_labels: bool = False


@dataclass(frozen=True)
class StudentTrainingConfig(_Checked):
    """The student network of ``engine.student``: a Mask R-CNN trained on the instances of a trained network [ours].

    schedule: of a round. rounds: of labelling and training. backbone; size: of the input square, pixels;
    pyramid_channels: width of the feature pyramid and of the mask head. freeze_depthwise: whether the depthwise
    filters of the backbone are not trained, because their gradients are slow on a CPU. crop: the smallest fraction of
    each side that a random crop keeps. copy_paste: instances of other photographs pasted into each, on average.
    exposure: the largest change of the exposure of a photograph, EV. resolution: the smallest fraction of ``size`` to
    which photographs are reduced in the last round, before they are compressed and enlarged; 1 for none.
    """

    schedule: Schedule = Schedule(12, 8, 4e-4, "adamw", 0.25, 2, warmup=200, average=0.998)
    rounds: int = 1
    backbone: str = "resnet50"
    size: int = 512
    pyramid_channels: int = 256
    freeze_depthwise: bool = False
    crop: float = 0.6
    copy_paste: float = 0.7
    exposure: float = 3.0
    resolution: float = 1.0


@dataclass(frozen=True)
class Preset:
    """All settings of a training. ``network`` is that of the branches and of the saliency branch.

    fusion: the settings that the network's file gets. student: of the student network that the instances of the
    network train at the end [ours]; None: the preset goes without it.
    """

    name: str
    cam: CamConfig
    labels: LabelConfig
    network: NetConfig
    branches: BranchesConfig
    saliency: SaliencyConfig
    pts: PtsConfig
    fusion: FusionConfig = field(default_factory=FusionConfig)
    student: StudentTrainingConfig | None = None

    def __post_init__(self) -> None:
        check(self.network)


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """A dataclass with other values: {name of a field: value}, in all dataclasses within it that have such a field.

    So {"epochs": 1} is the length of every stage of a Preset. The settings of the fusion have names of their own and
    stay as they are.
    """
    changes = {}
    for entry in fields(config):  # type: ignore[arg-type]
        value = getattr(config, entry.name)
        if entry.name in values:
            changes[entry.name] = values[entry.name]
        elif is_dataclass(value) and not isinstance(value, FusionConfig):
            changes[entry.name] = override(value, values)
    return replace(config, **changes)  # type: ignore[type-var]


def settings_of(*configs: Any, **more: Any) -> dict[str, Any]:
    """The fields of dataclasses, and of those within them, and ``more``, as one {name: plain value}.

    Those of ``ADDED_LATER`` are left out where they are 0, as in ``as_recorded``.
    """
    found: dict[str, Any] = {}
    for config in configs:
        for entry in fields(config):
            value = getattr(config, entry.name)
            if is_dataclass(value):
                found |= settings_of(value)
            elif value or entry.name not in ADDED_LATER:
                found[entry.name] = value
    return found | more


def as_recorded(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, {name of a field: value}."""
    return asdict(
        config, dict_factory=lambda pairs: {name: value for name, value in pairs if value or name not in ADDED_LATER}
    )
