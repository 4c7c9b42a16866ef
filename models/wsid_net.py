"""WSID-Net: the saliency net and the boundary-centroid net together, and their weights file (Fig. 2)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from models import STUDENT
from models.branches import BoundaryCentroidNet, SaliencyNet
from models.count_head import MAX_COUNT
from models.fusion_config import FusionConfig
from utils import checkpoint, digest
from utils.cli import InputError

if TYPE_CHECKING:
    from models.mask_rcnn import MaskRCNN

Network = TypeVar("Network", bound=nn.Module)


class NetOutput(NamedTuple):
    """The maps of a batch of N images, on the stride-4 grid [H,W] of the input square.

    saliency: S [N,H,W] and boundary: B [N,H,W], both in 0..1. offsets: V [N,2,H,W], (dy, dx) in pixels of the grid.
    count_probs: [N,MAX_COUNT], the probabilities of 1, 2, ... salient objects, the last one of MAX_COUNT or more; all 0
    for a network without a count head.
    """

    saliency: Tensor
    boundary: Tensor
    offsets: Tensor
    count_probs: Tensor


@dataclass(frozen=True)
class NetConfig:
    """The architecture of the networks; stored with their weights.

    backbone: a name of ``models.backbones.BACKBONES``. size: side of the input square, pixels. channels: width of the
    CA module and the ASPP. mixing: whether there is a CFM unit; attention: the MA unit, "parallel", "s-c", "c-s" or
    "none"; enhancement: whether there is a BE module; canny: its edges.
    count_head: whether there is a CountHead on the branches' backbone [ours].
    """

    backbone: str = "resnet50"
    output_stride: int = 16
    size: int = 512
    channels: int = 256
    mixing: bool = True
    attention: str = "parallel"
    enhancement: bool = True
    canny: str = "auto"
    count_head: bool = True

    def build_branches(self) -> BoundaryCentroidNet:
        """The boundary and the centroid branch, untrained."""
        return BoundaryCentroidNet(
            self.backbone,
            self.output_stride,
            self.channels,
            mixing=self.mixing,
            attention=self.attention,
            enhancement=self.enhancement,
            canny=self.canny,
            count_head=self.count_head,
        )

    def build_saliency(self) -> SaliencyNet:
        """The saliency branch, untrained."""
        return SaliencyNet(self.backbone, self.output_stride, self.channels)


class WSIDNet(nn.Module):
    """The whole network: S, B, V and the number of salient objects of a batch of images.

    fusion: the settings that its instances are made with by default. training_record: what it was trained with,
    {"preset": name, stage: {setting: value}}; empty where its file does not record it.
    """

    def __init__(self, config: NetConfig, fusion: FusionConfig | None = None) -> None:
        super().__init__()
        self.config, self.fusion = config, fusion or FusionConfig()
        self.training_record: dict[str, Any] = {}
        self.branches = config.build_branches()
        self.saliency = config.build_saliency()

    def forward(self, image: Tensor, edges: Tensor) -> NetOutput:
        """image: RGB [N,3,size,size] in 0..1; edges: Canny map [N,1,size,size] of 0 and 1. Returns a NetOutput."""
        maps = self.branches(image, edges)
        count_probs = maps.count_probs
        if count_probs is None:
            count_probs = image.new_zeros(len(image), MAX_COUNT)
        return NetOutput(self.saliency(image)[:, 0], maps.boundary[:, 0], maps.offsets, count_probs)


def save_weights(net: WSIDNet, path: Path, note: str = "", start: str | None = None) -> None:
    """Write ``net`` to ``path`` in half precision, with its configuration, fusion settings and training record.

    note: one line on its origin; start: ``digest_of_weights`` of the file that it was trained from (``goes_on_from``).
    Raises InputError when the file cannot be written.
    """
    saved = {
        "config": asdict(net.config),
        "fusion": asdict(net.fusion),
        "training": net.training_record,
        "state": {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()},
        "note": note,
        "start": start,
    }
    checkpoint.save(saved, path)


def digest_of_weights(path: Path) -> str | None:
    """The digest of the weights and the fusion settings in a file of ``save_weights``; None for any other file."""
    return _digest_of(checkpoint.load(path))


def _digest_of(saved: Any) -> str | None:
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return None
    return digest.of_value([digest.of_state(saved["state"]), saved.get("fusion")])


def goes_on_from(path: Path, start: Path) -> bool:
    """Whether the network in the file ``path`` was trained from the one in ``start``, with its fusion settings; True if
    that is not recorded."""
    saved = checkpoint.load(path)
    noted = saved.get("start") if isinstance(saved, dict) else None
    return noted is None or noted == digest_of_weights(start)


def load_weights(path: Path, device: torch.device | str = "cpu") -> WSIDNet:
    """Read a file of ``save_weights`` as a WSIDNet in evaluation mode, float32.

    Raises InputError when the file is missing, damaged or of another kind, or holds weights that are not finite.
    """
    return read_weights(path, device)[0]


def read_weights(path: Path, device: torch.device | str = "cpu") -> tuple[WSIDNet, str | None]:
    """``load_weights`` and ``digest_of_weights`` of a file that is read once."""
    saved = checkpoint.load(path, device)
    return _restore(_wsid_net_of, saved, path, device), _digest_of(saved)


def load_network(path: Path, device: torch.device | str = "cpu") -> "WSIDNet | MaskRCNN":
    """``load_weights`` for a file of ``models.mask_rcnn.save_student`` too, which holds a MaskRCNN."""
    saved = checkpoint.load(path, device)
    if isinstance(saved, dict) and saved.get("kind") == STUDENT:
        from models.mask_rcnn import student_of  # here, because torchvision's detectors take long to import

        return _restore(student_of, saved, path, device)
    return _restore(_wsid_net_of, saved, path, device)


def _restore(build: Callable[[Any], Network], saved: Any, path: Path, device: torch.device | str) -> Network:
    """The network that ``build`` makes of a weights file's content, in evaluation mode; InputError as above."""
    try:
        net = build(saved)
        finite = checkpoint.is_finite(saved["state"])
    except Exception as error:  # a file of another kind raises almost anything
        raise InputError(f"{path} does not hold the weights of a whole WSID-Net; give a weights.pt of a run") from error
    if not finite:
        raise InputError(f"{path} holds weights that are not finite; use earlier ones, or train them anew")
    return net.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _wsid_net_of(saved: Any) -> WSIDNet:
    config = NetConfig(**dict(saved)["config"])
    if not all(isinstance(getattr(config, field.name), type(field.default)) for field in fields(config)):
        raise TypeError("settings of other types")
    net = WSIDNet(config, FusionConfig(**saved.get("fusion", {})))
    net.training_record = dict(saved.get("training") or {})
    net.load_state_dict(saved["state"])
    return net
