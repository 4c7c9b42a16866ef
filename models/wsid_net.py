"""WSID-Net: the saliency net and the boundary-centroid net together, and the file they travel in (Fig. 2)."""

from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import nn

from models.branches import BoundaryCentroidNet, SaliencyNet
from models.counting import MOST, NumberNet
from models.fusion import Fusion
from models.opinion import SecondOpinion
from utils import checkpoint, digest
from utils.cli import InputError

# Names in older files of the settings of the fusion: what each is called now, None where there is no such setting.
FORMER = {"likeness": None}


@dataclass(frozen=True)
class NetConfig:
    """What the two networks are made of; stored with their weights.

    size: the input square in pixels. channels: width of the CA module and the ASPP. mixing: the CFM unit;
    attention: the MA unit, "parallel", "s-c", "c-s" or "none"; enhancement: the BE module; canny: its edges.
    counting: whether it tells the number of objects, by a head on the branches' backbone. number: and a NumberNet that
    looks at a square of so many pixels, the mean of both; opinion: whether a SecondOpinion on S does; 0 without.
    """

    backbone: str = "resnet50"
    output_stride: int = 16
    size: int = 512
    channels: int = 256
    mixing: bool = True
    attention: str = "parallel"
    enhancement: bool = True
    canny: str = "auto"
    counting: bool = True
    number: int = 0
    opinion: int = 0

    def boundary_centroid_net(self):
        return BoundaryCentroidNet(
            self.backbone, self.output_stride, self.channels, mixing=self.mixing, attention=self.attention,
            enhancement=self.enhancement, canny=self.canny, counting=self.counting,
        )  # fmt: skip

    def saliency_net(self):
        return SaliencyNet(self.backbone, self.output_stride, self.channels)

    def number_net(self):
        return NumberNet(self.backbone, self.output_stride, self.number)

    def second_opinion(self):
        return SecondOpinion(self.backbone, self.output_stride, self.opinion)


class WSIDNet(nn.Module):
    """S, B, V and how many objects there may be, of a batch of images.

    fusion: the settings by which instances are made of these, unless others are named.
    """

    def __init__(self, config, fusion=None):
        super().__init__()
        self.config, self.fusion = config, fusion or Fusion()
        self.branches = config.boundary_centroid_net()
        self.saliency = config.saliency_net()
        self.number = config.number_net() if config.number else None
        self.opinion = config.second_opinion() if config.opinion else None

    def forward(self, image, edges):
        """image: RGB [N,3,size,size] in 0..1; edges: Canny map [N,1,size,size].

        Returns S [N,H,W], B [N,H,W] in 0..1 and V [N,2,H,W] in pixels, all on the stride-4 grid, and the probabilities
        of 1..MOST objects [N,MOST], all 0 where the network does not tell the number.
        """
        boundary, offsets, shares = self.branches(image, edges)
        if self.number:
            shares = (shares + self.number(image)) / 2
        elif shares is None:
            shares = image.new_zeros(len(image), MOST)
        saliency = self.saliency.logits(image)
        if self.opinion:
            saliency = self.opinion(image, saliency)
        return saliency.sigmoid()[:, 0], boundary[:, 0], offsets, shares


def with_parts(net, **parts):
    """The WSIDNet ``net`` with others of its ``parts``: a NumberNet as number, a SecondOpinion as opinion."""
    whole = WSIDNet(replace(net.config, **{name: part.size for name, part in parts.items()}), net.fusion)
    for name, part in {**dict(net.named_children()), **parts}.items():
        getattr(whole, name).load_state_dict(part.state_dict())
    return whole


def save_weights(net, path, note="", start=None):
    """Write a WSIDNet to ``path`` in half precision, with its configuration, the settings of its fusion and a line on
    its origin; start: the ``digest_of_weights`` that it was trained from, for ``goes_on_from``."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    saved = {"config": asdict(net.config), "fusion": asdict(net.fusion), "state": state, "note": note, "start": start}
    checkpoint.save(saved, path)


def digest_of_weights(path):
    """The digest of the weights in a file of ``save_weights``; None for what it did not write."""
    saved = checkpoint.load(path)
    return digest.of_state(saved["state"]) if isinstance(saved, dict) and isinstance(saved.get("state"), dict) else None


def goes_on_from(path, start):
    """Whether the network in the file ``path`` was trained from that in the file ``start``; True where it does not
    say."""
    saved = checkpoint.load(path)
    noted = saved.get("start") if isinstance(saved, dict) else None
    return noted is None or noted == digest_of_weights(start)


def load_weights(path, device="cpu"):
    """Read what ``save_weights`` wrote as a WSIDNet in evaluation mode, float32.

    Raises InputError when the file is missing, damaged or of another kind, or holds weights that are not finite.
    """
    saved = checkpoint.load(path, device)
    try:
        config = NetConfig(**dict(saved)["config"])
        if not all(isinstance(getattr(config, field.name), field.type) for field in fields(config)):
            raise TypeError("settings of other types")
        fusion = {FORMER.get(name, name): value for name, value in saved.get("fusion", {}).items()}
        fusion.pop(None, None)
        net = WSIDNet(config, Fusion(**fusion))
        net.load_state_dict(saved["state"])
        # Sums, because they are the quickest way to see every number.
        finite = all(value.sum(dtype=torch.float32).isfinite() for value in saved["state"].values())
    except Exception as error:  # odd content of the file shows as almost anything
        raise InputError(f"{path} does not hold the weights of a whole WSID-Net; give a weights.pt of a run") from error
    if not finite:
        raise InputError(f"{path} holds weights that are not finite numbers; use those before, or train them again")
    return net.eval().to(device, memory_format=torch.channels_last)
