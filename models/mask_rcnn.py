"""The student network: class-agnostic Mask R-CNN (He et al., ICCV 2017), trained on instances of a WSID-Net [ours].

Weakly supervised methods end with a standard instance segmentation network trained on their labels, as IRN does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from datasets.masks import VOID
from models import STUDENT
from models.backbones import Backbone
from models.count_head import MAX_COUNT, CountHead
from models.detections import MAX_DETECTIONS, Detections
from utils import checkpoint

MIN_SIDE = 4  # pixels of the input square, of the box of a training instance


@dataclass(frozen=True)
class StudentConfig:
    """The architecture of the network; stored with its weights.

    backbone: a name of ``models.backbones.BACKBONES``. size: side of the input square, pixels. channels: width of the
    feature pyramid, mask_width: of the mask head, both multiples of 16. box_width: width of the two layers of the box
    head. mask_layers: convolutions of the mask head.
    """

    backbone: str = "tf_efficientnet_lite2"
    size: int = 320
    channels: int = 96
    box_width: int = 256
    mask_width: int = 96
    mask_layers: int = 3


class Candidates(NamedTuple):
    """The K anchors of N images with the highest scores at each level, from which ``MaskRCNN.detect`` chooses regions.

    pyramid: as of ``MaskRCNN.features``. count_probs: [N,MAX_COUNT + 1]. scores: logits [N,K]. deltas: [N,K,4], as of
    torchvision's BoxCoder; anchors: [N,K,4], (x0, y0, x1, y1) in pixels of the input square. levels: float [K].
    """

    pyramid: dict[str, Tensor]
    count_probs: Tensor
    scores: Tensor
    deltas: Tensor
    anchors: Tensor
    levels: Tensor


class _Float32(nn.Module):
    """A module with outputs in float32: losses and boxes need more digits than bfloat16 has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return _to_float32(self.module(*inputs))


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else type(value)(map(_to_float32, value))


class MaskRCNN(nn.Module):
    """Mask R-CNN with one foreground class on a feature pyramid, and a count head on f4 and f5 of its backbone.

    The input is a square, as that of WSID-Net. Regions are proposed on the levels of stride 8 and above, because a
    salient object is rarely smaller than a tenth of the square's side; box and mask features come from stride 4 on.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, output_stride=32)
        widths, channels = self.backbone.channels[1:], config.channels
        norm = partial(nn.GroupNorm, 16)
        self.pyramid = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool(), norm_layer=norm)
        sides = [config.size * fraction for fraction in (1 / 8, 1 / 4, 1 / 2, 0.85)]
        anchors = AnchorGenerator([(side, side * 2**0.5) for side in sides], [(0.5, 1.0, 2.0)] * 4)
        self.rpn = RegionProposalNetwork(
            anchors,
            _Float32(RPNHead(channels, anchors.num_anchors_per_location()[0])),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=128,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 400, "testing": 300},
            post_nms_top_n={"training": 150, "testing": 100},
            nms_thresh=0.7,
        )
        levels = ["0", "1", "2", "3"]
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, 7, 2),
            TwoMLPHead(channels * 49, config.box_width),
            _Float32(FastRCNNPredictor(config.box_width, 2)),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=48,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.02,
            nms_thresh=0.5,
            detections_per_img=MAX_DETECTIONS,
            mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
            mask_head=MaskRCNNHeads(channels, [config.mask_width] * config.mask_layers, 1, norm_layer=norm),
            mask_predictor=_Float32(MaskRCNNPredictor(config.mask_width, config.mask_width, 2)),
        )
        self.count = nn.Linear(sum(self.backbone.channels[3:]), MAX_COUNT + 1)

    def features(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """RGB [N,3,size,size] in 0..1 -> the pyramid {"0".."3", "pool"} of [N,C,h,w] at strides 4 to 64, float32, and
        the logits of 0..MAX_COUNT objects [N,MAX_COUNT + 1]."""
        levels = self.backbone(image)
        pyramid = self.pyramid({str(i): level for i, level in enumerate(levels[1:])})
        return {name: level.float() for name, level in pyramid.items()}, self.count(CountHead.pool(levels)).float()

    def losses(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of Mask R-CNN and 0.2 times the cross entropy of the count, each a scalar.

        image: RGB [N,3,size,size] in 0..1. labels: uint8 [N,size,size], 0 background, 1..254 instances, 255 void.
        """
        targets = targets_of(labels)
        pyramid, count = self.features(image)
        images = ImageList(image, [tuple(image.shape[-2:])] * len(image))
        coarse = {name: level for name, level in pyramid.items() if name != "0"}
        proposals, terms = self.rpn(images, coarse, targets)
        _, of_regions = self.roi_heads(pyramid, proposals, images.image_sizes, targets)
        numbers = torch.tensor([len(target["boxes"]) for target in targets]).to(image.device, non_blocking=True)
        of_count = 0.2 * F.cross_entropy(count, numbers.clamp(max=MAX_COUNT))
        return {name.removeprefix("loss_"): term for name, term in (terms | of_regions | {"count": of_count}).items()}

    def forward(self, image: Tensor) -> list[Detections]:
        """RGB [N,3,size,size] in 0..1 -> the Detections of each image, on the CPU.

        It computes what torchvision's Mask R-CNN does, for all images at once: a GPU then does not wait for the launch
        of many small kernels.
        """
        return self.detect(self.candidates(image))

    def candidates(self, image: Tensor) -> Candidates:
        """RGB [N,3,size,size] in 0..1 -> the boxes from which the regions are chosen. All shapes depend on those of the
        input alone, and nothing is copied from the CPU, so that this part can be a CUDA graph."""
        pyramid, count = self.features(image)
        coarse = [level for name, level in pyramid.items() if name != "0"]
        of_levels, of_deltas = self.rpn.head(coarse)
        numbers = [one[0].numel() for one in of_levels]
        objectness, deltas = concat_box_prediction_layers(of_levels, of_deltas)
        by_level = zip(
            objectness.view(len(image), -1).split(numbers, 1),
            deltas.view(len(image), -1, 4).split(numbers, 1),
            self.rpn.anchor_generator(ImageList(image, [tuple(image.shape[-2:])]), coarse)[0].split(numbers),
            strict=True,
        )
        best = []
        for level, (of_level, delta, anchors) in enumerate(by_level):
            scores, *values = _top(of_level, self.rpn.pre_nms_top_n(), delta, anchors.expand_as(delta))
            best.append((scores, *values, torch.full_like(scores[:1], level)))
        scores, deltas, anchors, levels = (torch.cat(part, 1) for part in zip(*best, strict=True))
        return Candidates(pyramid, count.softmax(1), scores, deltas, anchors, levels[0])

    def detect(self, candidates: Candidates) -> list[Detections]:
        """The Detections of each image, on the CPU."""
        pyramid, count_probs, scores, deltas, anchors, levels = candidates
        number, heads = len(scores), self.roi_heads
        sizes = [(self.config.size, self.config.size)] * number
        boxes = self.rpn.box_coder.decode(deltas.flatten(0, 1), list(anchors)).view_as(deltas)
        boxes = clip_boxes_to_image(boxes, sizes[0])
        scores = scores.masked_fill(~_larger(boxes, self.rpn.min_size), -torch.inf)
        scores = scores.masked_fill(~_not_suppressed(boxes, scores, levels, self.rpn.nms_thresh), -torch.inf)
        scores, boxes = _top(scores, self.rpn.post_nms_top_n(), boxes)
        proposed = scores > -torch.inf

        regions = list(boxes)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(pyramid, regions, sizes)))
        boxes = heads.box_coder.decode(deltas, regions)[:, 1].view(number, -1, 4)
        boxes = clip_boxes_to_image(boxes, sizes[0])
        scores = logits.softmax(1)[:, 1].view(number, -1)
        usable = proposed & (scores > heads.score_thresh) & _larger(boxes, 1e-2)
        scores = scores.masked_fill(~usable, -torch.inf)
        one_class = torch.zeros_like(scores[0])
        scores = scores.masked_fill(~_not_suppressed(boxes, scores, one_class, heads.nms_thresh), -torch.inf)
        scores, boxes = _top(scores, heads.detections_per_img, boxes)

        # The same number of boxes for each image up to here; the mask head, whose cost counts, sees the real ones.
        pooled = heads.mask_roi_pool(pyramid, list(boxes), sizes)
        found = (scores.flatten() > -torch.inf).nonzero()[:, 0]
        masks = heads.mask_predictor(heads.mask_head(pooled[found])).sigmoid()[:, 1].float()
        scores, order = mask_scores(scores.flatten()[found], masks).sort(descending=True)
        boxes, masks, image = boxes.flatten(0, 1)[found][order], masks[order], found[order] // heads.detections_per_img
        boxes, scores, masks, image, count_probs = (v.cpu() for v in (boxes, scores, masks, image, count_probs))
        rows = (image == index for index in range(number))
        return [Detections(boxes[row], scores[row], masks[row], count_probs[i]) for i, row in enumerate(rows)]


def _top(scores: Tensor, most: int, *values: Tensor) -> tuple[Tensor, ...]:
    """The ``most`` highest scores [N,K] of each image, descending, and the values [N,K,4] at their places."""
    scores, index = scores.topk(min(most, scores.shape[1]), 1)
    places = index[..., None].expand(-1, -1, 4)
    return scores, *(value.gather(1, places) for value in values)


def _larger(boxes: Tensor, side: float) -> Tensor:
    """Whether boxes [N,K,4] are at least ``side`` wide and high: bool [N,K]."""
    return (boxes[..., 2:] - boxes[..., :2] >= side).all(-1)


def _not_suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Non-maximum suppression within the groups of each image: which boxes stay, bool [N,K].

    boxes: [N,K,4], not negative; scores: [N,K], -inf where there is no box; groups: the group of each place, [K].
    """
    suppression = _nms_by_image if boxes.device.type == "cpu" else _nms_in_one_call
    return suppression(boxes, scores, groups, iou)


def _nms_by_image(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    kept = []
    for of_image, score in zip(boxes, scores, strict=True):
        rows = (score > -torch.inf).nonzero()[:, 0]
        rows = rows[batched_nms(of_image[rows], score[rows], groups[rows], iou)]
        kept.append(torch.zeros_like(score).scatter(0, rows, 1) > 0)
    return torch.stack(kept)


def _nms_in_one_call(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """On a GPU, which waits for every call. The groups are moved so far apart that none overlaps another; in double
    precision that leaves the IoUs as they are. Places without a box come last, so they suppress none that has one."""
    group = groups + (groups.max() + 1) * torch.arange(len(boxes), device=boxes.device)[:, None]
    apart = boxes.double() + (group * (boxes.max() + 1)).double()[..., None]
    rows = nms(apart.flatten(0, 1), scores.double().flatten(), iou)
    kept = torch.zeros_like(scores.flatten()).scatter(0, rows, 1)
    return (kept.view_as(scores) > 0) & (scores > -torch.inf)


def mask_scores(scores: Tensor, masks: Tensor) -> Tensor:
    """Scores [M] multiplied by the mean probability inside each mask [M,28,28], as in SOLO (Wang et al., ECCV 2020), so
    that hypotheses with uncertain contours rank lower."""
    inside = masks > 0.5
    return scores * (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)


def targets_of(labels: Tensor) -> list[dict[str, Tensor]]:
    """The targets of torchvision's detectors for label maps, uint8 [N,H,W] (0 background, 1..254 instances, 255 void).

    Returns for each map boxes float32 [n,4], labels int64 [n] (all 1) and masks uint8 [n,H,W] of the instances that are
    at least MIN_SIDE pixels wide and high. All maps at once: a GPU waits twice for a batch, not for every instance.
    """
    most = int(labels.masked_fill(labels == VOID, 0).max())
    masks = labels[:, None] == torch.arange(1, most + 1, device=labels.device)[:, None, None]
    sides = []
    for present in (masks.any(2), masks.any(3)):  # columns, rows
        first, last = (flags.to(torch.uint8).argmax(2) for flags in (present, present.flip(2)))
        sides.append((first, torch.where(present.any(2), present.shape[2] - last, 0)))  # from pixel, to the one after
    boxes = torch.stack([side[of] for of in (0, 1) for side in sides], 2).float()
    large = ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(2)
    found = [flags.nonzero()[:, 0].to(labels.device, non_blocking=True) for flags in large.cpu()]
    return [
        {"boxes": box[kept], "labels": torch.ones_like(kept), "masks": mask[kept].to(torch.uint8)}
        for box, mask, kept in zip(boxes, masks, found, strict=True)
    ]


def save_student(net: MaskRCNN, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write ``net`` to ``path`` in half precision, with its configuration and the settings that it was trained with.

    Raises InputError when the file cannot be written.
    """
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    training = {"student": dict(settings or {})}
    checkpoint.save({"kind": STUDENT, "config": asdict(net.config), "training": training, "state": state}, path)


def is_student(saved: Mapping[str, Any]) -> bool:
    """Whether ``saved``, the content of a weights file, is of ``save_student``."""
    return saved.get("kind") == STUDENT


def student_of(saved: Mapping[str, Any]) -> MaskRCNN:
    """The MaskRCNN in what ``save_student`` wrote and ``utils.checkpoint.load`` has read."""
    net = MaskRCNN(StudentConfig(**saved["config"]))
    net.load_state_dict(saved["state"])
    return net
