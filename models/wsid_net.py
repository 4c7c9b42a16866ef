"""WSID-Net: the saliency net and the boundary-centroid net together, and the file they travel in (Fig. 2)."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from models.branches import BoundaryCentroidNet, SaliencyNet
from models.count_head import MAX_COUNT, CountNet
from models.fusion import FusionConfig
from models.saliency_prior import SaliencyPrior
from utils import checkpoint, digest
from utils.cli import InputError

# Names in files of earlier versions: what each is called now, None where it is gone.
FORMER_CONFIG = {"counting": "count_head", "number": "count_net", "opinion": "saliency_prior"}
FORMER_FUSION = {
    "sink": "sink_thresh",
    "region": "centroid_region",
    "salient": "saliency_thresh",
    "share": "mask_rule",
    "background": "mask_thresh",
    "smallest": "min_area",
    "unsure": "min_score",
    "doubt": "count_aware_scores",
    "likeness": None,
}
FORMER_KEYS = {
    "number.counting.": "count_net.count_head.",
    "number.": "count_net.",
    "branches.counting.": "branches.count_head.",
    "opinion.odds": "saliency_prior.weights",
    "opinion.": "saliency_prior.",
}


class NetOutput(NamedTuple):
    """The maps of a batch of N photographs, on the stride-4 grid [H,W] of the input square.

    saliency: S [N,H,W] and boundary: B [N,H,W], both in 0..1. offsets: V [N,2,H,W], (dy, dx) in pixels of the grid.
    count_probs: [N,MAX_COUNT], the probabilities of 1, 2, ... salient objects, the last one of MAX_COUNT or more; all 0
    for a network without a count head.
    """

    saliency: torch.Tensor
    boundary: torch.Tensor
    offsets: torch.Tensor
    count_probs: torch.Tensor


@dataclass(frozen=True)
class NetConfig:
    """What the two networks are made of; stored with their weights.

    size: the input square in pixels. channels: width of the CA module and the ASPP. mixing: the CFM unit;
    attention: the MA unit, "parallel", "s-c", "c-s" or "none"; enhancement: the BE module; canny: its edges.
    counting: whether it tells the number of objects, by a head on the branches' backbone. number: and a CountNet that
    looks at a square of so many pixels, the mean of both; opinion: whether a SaliencyPrior on S does; 0 without.
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
    count_net: int = 0
    saliency_prior: int = 0

    def build_branches(self):
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

    def build_saliency(self):
        return SaliencyNet(self.backbone, self.output_stride, self.channels)

    def build_count_net(self):
        return CountNet(self.backbone, self.output_stride, self.count_net)

    def build_saliency_prior(self):
        return SaliencyPrior(self.backbone, self.output_stride, self.saliency_prior)


class WSIDNet(nn.Module):
    """S, B, V and how many objects there may be, of a batch of images.

    fusion: the settings by which instances are made of these, unless others are named. training_record: what it was
    trained with, {"preset": name, stage: {setting: value}}; empty where its file does not say.
    """

    def __init__(self, config, fusion=None):
        super().__init__()
        self.config, self.fusion = config, fusion or FusionConfig()
        self.branches = config.build_branches()
        self.saliency = config.build_saliency()
        self.count_net = config.build_count_net() if config.count_net else None
        self.saliency_prior = config.build_saliency_prior() if config.saliency_prior else None
        self.training_record: dict[str, Any] = {}

    def forward(self, image, edges):
        """image: RGB [N,3,size,size] in 0..1; edges: Canny map [N,1,size,size].

        Returns a NetOutput.
        """
        maps = self.branches(image, edges)
        count_probs = maps.count_probs
        if self.count_net:
            count_probs = (count_probs + self.count_net(image)) / 2
        elif count_probs is None:
            count_probs = image.new_zeros(len(image), MAX_COUNT)
        saliency = self.saliency.logits(image)
        if self.saliency_prior:
            saliency = self.saliency_prior(image, saliency)
        return NetOutput(saliency.sigmoid()[:, 0], maps.boundary[:, 0], maps.offsets, count_probs)


def with_parts(net, **parts):
    """The WSIDNet ``net`` with others of its ``parts``: a CountNet as number, a SaliencyPrior as opinion."""
    whole = WSIDNet(replace(net.config, **{name: part.size for name, part in parts.items()}), net.fusion)
    for name, part in {**dict(net.named_children()), **parts}.items():
        getattr(whole, name).load_state_dict(part.state_dict())
    whole.training_record = net.training_record
    return whole


def save_weights(net, path, note="", start=None):
    """Write a WSIDNet to ``path`` in half precision, with its configuration, the settings of its fusion and a line on
    its origin; start: the ``digest_of_weights`` that it was trained from, for ``goes_on_from``."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    saved = {"config": asdict(net.config), "fusion": asdict(net.fusion), "state": state, "note": note, "start": start}
    saved["training"] = net.training_record
    checkpoint.save(saved, path)


def digest_of_weights(path):
    """The digest of the weights in a file of ``save_weights``; None for what it did not write."""
    return _digest_of(checkpoint.load(path))


def _digest_of(saved):
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
    return read_weights(path, device)[0]


def read_weights(path, device="cpu"):
    """As ``load_weights``, and the ``digest_of_weights`` of the file: (WSIDNet, digest)."""
    saved = checkpoint.load(path, device)
    try:
        config = NetConfig(**_renamed(dict(saved)["config"], FORMER_CONFIG))
        if not all(isinstance(getattr(config, field.name), field.type) for field in fields(config)):
            raise TypeError("settings of other types")
        net = WSIDNet(config, FusionConfig(**_fusion_of(saved.get("fusion", {}))))
        net.load_state_dict({_key_of(key): value for key, value in saved["state"].items()})
        # Sums, because they are the quickest way to see every number.
        finite = all(value.sum(dtype=torch.float32).isfinite() for value in saved["state"].values())
    except Exception as error:  # odd content of the file shows as almost anything
        raise InputError(f"{path} does not hold the weights of a whole WSID-Net; give a weights.pt of a run") from error
    if not finite:
        raise InputError(f"{path} holds weights that are not finite numbers; use those before, or train them again")
    record = saved.get("training")
    net.training_record = record if isinstance(record, dict) else {}
    return net.eval().to(device, memory_format=torch.channels_last), _digest_of(saved)


def _renamed(settings, names):
    """The settings under the names of this version; those that are gone are left out."""
    return {names.get(name, name): value for name, value in settings.items() if names.get(name, name)}


def _fusion_of(saved):
    """The settings of the fusion of a file, whatever version wrote it."""
    settings = _renamed(saved, FORMER_FUSION)
    if "share" in saved:
        settings["mask_rule"] = {"rival": "relative"}.get(saved["share"], saved["share"])
        settings["grouping"] = "count"
    if "doubt" in saved:
        settings["count_aware_scores"] = saved["doubt"] > 0
    return settings


def _key_of(key):
    """The name of a tensor in a file, as this version has it."""
    for before, now in FORMER_KEYS.items():
        if key.startswith(before):
            return now + key[len(before) :]
    return key
