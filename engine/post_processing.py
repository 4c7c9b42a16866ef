"""From the output of a network for photographs to their salient instances, without the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.masks import centroids_of
from models import STUDENT, detections
from models.count_head import expected_count, one_hot_count
from models.detections import Detections
from models.fusion import group, instance_masks, walks
from models.fusion_config import FusionConfig
from models.grouping import Clusters, connected_components
from models.scoring import CountHypothesis, count_hypotheses


@dataclass
class Prediction:
    """The salient instances of one photograph of H x W pixels, by descending score.

    masks: bool [n,H,W], disjoint. scores: float32 [n] in (0, 1]. centroids: float [n,2], (y, x) in pixels of the
    photograph. saliency, boundary: S and B, float32 [H,W] in 0..1. offsets: V, float32 [2,h,w], (dy, dx) in pixels of
    the network's stride-4 grid h x w. A student network has neither B nor V: both are None.
    ranked: masks bool [m,H,W], overlapping, and scores float32 [m] of all hypotheses of a student network, where the
    Predictor was made with ``ranked``; else None.
    """

    masks: np.ndarray
    scores: np.ndarray
    centroids: np.ndarray
    saliency: np.ndarray
    boundary: np.ndarray | None = None
    offsets: np.ndarray | None = None
    ranked: tuple[np.ndarray, np.ndarray] | None = None


class Maps(NamedTuple):
    """The network's output for one photograph, float32 on the stride-4 grid: S [h,w], B [h,w], V [2,h,w].

    count_probs: [M], the probabilities of 1, 2, ... M objects; all 0 for a network without a count head. ready: the
    CUDA event after which the tensors hold their values, None on the CPU.
    """

    saliency: Tensor
    boundary: Tensor
    offsets: Tensor
    count_probs: Tensor
    ready: Any = None


@dataclass(frozen=True)
class PostProcessor:
    """From the output of a network for one photograph to its instances: the fusion of S, B and V, or the best set of a
    student's hypotheses. It holds no weights, so that it can be sent to another process.

    method, settings, ranked: as of ``Predictor``; method is "student" for a student network. side: of the input square
    of the network, pixels.
    """

    method: str
    settings: FusionConfig
    side: int
    ranked: bool = False

    def __call__(
        self, output: Any, size: tuple[int, int], count: int = 0, saliency: np.ndarray | None = None
    ) -> Prediction:
        """The Prediction of a photograph of ``size`` (H, W).

        output: Maps or Detections, tensors, or what ``to_arrays`` made of them. count: the number of objects, 0 where
        it is not known. saliency: float [H,W] in 0..1 that replaces S of a WSID-Net, or None.
        """
        return self.of_batch([output], [size], count, [saliency])[0]()

    @torch.no_grad()
    def of_batch(
        self,
        outputs: Sequence[Any],
        sizes: Sequence[tuple[int, int]],
        count: int = 0,
        saliencies: Sequence[np.ndarray | None] = (),
    ) -> list[Callable[[], Prediction]]:
        """The same for several photographs, whose random walks are computed in one call.

        Returns functions that compute the Predictions, each for itself, as all of them may take much memory.
        """
        if self.method == STUDENT:
            return [
                partial(self._of_detections, to_arrays(found), size, count)
                for found, size in zip(outputs, sizes, strict=True)
            ]
        outputs = [_to_tensors(maps) for maps in outputs]
        given = saliencies or [None] * len(outputs)
        s = torch.stack([_saliency_of(maps, instead) for maps, instead in zip(outputs, given, strict=True)])
        b, v, count_probs = (torch.stack(part) for part in zip(*(maps[1:4] for maps in outputs), strict=True))
        arrays = list(zip(*(part.cpu().numpy() for part in (s, b, v)), strict=True))
        hypotheses: list[list[CountHypothesis]] = [[]] * len(outputs)
        soft: Sequence[Tensor | np.ndarray]
        if self.method == "components":
            clusters = [connected_components(saliency, self.settings) for saliency, *_ in arrays]
            soft = [found.masks for found in clusters]
        else:
            count_probs = one_hot_count(count).expand(len(outputs), -1) if count else count_probs.cpu()
            hypotheses = [
                count_hypotheses(saliency, offsets, probs, self.settings)
                for (saliency, _, offsets), probs in zip(arrays, count_probs, strict=True)
            ]
            by_count = count or self.settings.grouping == "count"
            numbers = expected_count(count_probs).tolist() if by_count else [0] * len(outputs)
            clusters = [
                group(saliency, offsets, self.settings, int(number), known)
                for (saliency, *_), offsets, number, known in zip(arrays, v, numbers, hypotheses, strict=True)
            ]
            soft = walks([found.masks for found in clusters], s, b, self.settings)
        parts = zip(arrays, s, clusters, soft, hypotheses, sizes, strict=True)
        return [partial(self._of_soft_maps, *part) for part in parts]

    @torch.no_grad()
    def _of_soft_maps(
        self,
        arrays: Sequence[np.ndarray],
        on_device: Tensor,
        clusters: Clusters,
        soft: Tensor | np.ndarray,
        hypotheses: Sequence[CountHypothesis],
        size: tuple[int, int],
    ) -> Prediction:
        saliency, boundary, offsets = arrays
        masks, scores, kept = instance_masks(soft, on_device, size, self.settings, hypotheses)
        height, width = size
        # Pixel centres of the grid to pixel centres of the photograph.
        centroids = (clusters.centroids[kept] + 0.5) * (np.array(size) / saliency.shape) - 0.5
        saliency, boundary = (
            cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in (saliency, boundary)
        )
        return Prediction(masks, scores, centroids, np.clip(saliency, 0, 1), boundary, offsets)

    def _of_detections(self, found: Detections, size: tuple[int, int], count: int) -> Prediction:
        small = detections.pasted(found, self.side, (detections.GRID, detections.GRID))
        if self.ranked:
            found = detections.refined(found, self.side)  # once, for all and for the disjoint ones
        masks, scores = detections.disjoint(found, small, self.side, size, count)
        ranked = detections.ranked(found, self.side, size) if self.ranked else None
        saliency = detections.saliency_of(found, small, size)
        return Prediction(masks, scores, centroids_of(masks), saliency, ranked=ranked)


def _saliency_of(maps: Maps, instead: np.ndarray | None) -> Tensor:
    """S [h,w] of the network, or a map of any size that replaces it on its grid."""
    if instead is None:
        return maps.saliency
    replacement = torch.from_numpy(np.ascontiguousarray(instead, np.float32))[None, None].to(maps.saliency.device)
    small = F.interpolate(replacement, maps.saliency.shape, mode="bilinear", align_corners=False, antialias=True)
    return small[0, 0].clamp(0, 1)


def to_arrays(output: Maps | Detections) -> Any:
    """Maps or Detections with NumPy arrays in place of tensors, which pass to another process without shared memory."""
    values = output[:4] if isinstance(output, Maps) else output
    kind: Any = type(output)
    return kind(*(value.cpu().numpy() if isinstance(value, Tensor) else value for value in values))


def _to_tensors(maps: Maps) -> Maps:
    """The inverse of ``to_arrays``."""
    return maps if isinstance(maps.count_probs, Tensor) else Maps(*map(torch.from_numpy, maps[:4]))
