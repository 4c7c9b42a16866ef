"""Instances of consecutive frames linked to tracks [ours]: the same object keeps its number through a clip.

A track and an instance of the next frame are compared by the IoU of their masks, that of the track moved by optical
flow, and by their colour histograms; the assignment maximises the sum (Hungarian algorithm). Tracks that are not found
wait, and are found by appearance and position. Where a frame has fewer instances than its neighbours have on average,
masks of tracks that are missing are carried over by the flow. Only Predictions are used, so the network that made them
does not matter.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from datasets.masks import centroids_of

if TYPE_CHECKING:
    from engine.post_processing import Prediction

BINS = (12, 6, 6)  # of hue, saturation and value
NEVER = -1e6  # affinity of pairs that may not be assigned
MIN_CARRIED = 0.3  # fraction of its last mask that a carried mask keeps beside the instances of the frame
UPDATE = 0.2  # weight of the newest frame in the mean histogram, velocity and area of a track


@dataclass(frozen=True)
class TrackingConfig:
    """Settings of the linking.

    flow_side: the longer side, in pixels, of the grid on which optical flow is computed and masks are compared.
    flow: whether masks are moved by the flow before they are compared.
    min_iou: the least IoU, 0..1, of a mask with that of its track in the frame before.
    appearance: weight of the similarity of colour histograms (0..1) beside the IoU; 0: the IoU alone, and
    tracks that wait are found by position alone.
    wait: frames that a track without an instance waits before it ends; 0: it ends at once.
    min_similarity: the least similarity, 0..1, of an instance and a waiting track.
    reach: the largest distance of their centres, in units of the square root of the larger area.
    window: frames over which the number of instances is averaged; 1: no mask is carried over.
    min_frames: tracks found in fewer frames are dropped; all of them in clips that are shorter.
    """

    flow_side: int = 256
    flow: bool = True
    min_iou: float = 0.2
    appearance: float = 0.5
    wait: int = 25
    min_similarity: float = 0.8
    reach: float = 2.0
    window: int = 9
    min_frames: int = 3


class Tracked(NamedTuple):
    """An instance of one frame with the number of its track.

    number: 1, 2, ... in the order in which tracks begin. mask: bool [H,W]. score: that of the instance, in 0..1; None
    where the mask was carried over from the frame before.
    """

    number: int
    mask: np.ndarray
    score: float | None


@dataclass
class _Track:
    number: int
    mask: np.ndarray  # bool [H,W], of the last frame in which there is one
    histogram: np.ndarray  # float32 [bins], with a sum of 1
    centre: np.ndarray  # (y, x) in pixels
    velocity: np.ndarray  # pixels a frame
    area: float  # pixels, mean
    found: int = 1  # frames in which it was an instance
    missing: int = 0  # frames since then
    current: bool = False  # whether it has a mask in the frame before


class Tracker:
    """Links the Predictions of consecutive frames; all frames have one size, H x W pixels.

    Memory depends on the number of objects in view, not on the length of the clip.
    """

    def __init__(self, config: TrackingConfig | None = None) -> None:
        self.config = config or TrackingConfig()
        self.tracks: list[_Track] = []
        self.created = 0
        self.counts: deque[int] = deque(maxlen=self.config.window)
        self.grey: np.ndarray | None = None  # the frame before, on the grid

    def skip(self) -> None:
        """A frame that cannot be read: the next is compared to the one before."""
        self._age(set(), {track.number for track in self.tracks if track.current})

    def update(self, image: np.ndarray, prediction: "Prediction") -> list[Tracked]:
        """The instances of the next frame with their numbers, and masks that were carried over; disjoint.

        image: uint8 RGB [H,W,3]. prediction: its disjoint masks bool [n,H,W] and scores [n].
        """
        masks = list(prediction.masks)
        histograms = _histograms(image, masks)
        centres = list(centroids_of(masks))
        flow = self._flow(image)
        self.counts.append(len(masks))

        owners = self._link_by_overlap(masks, histograms, flow)
        self._link_by_appearance(masks, histograms, centres, owners)
        for index, mask in enumerate(masks):
            if index in owners:
                self._found(owners[index], mask, histograms[index], centres[index])
            else:
                owners[index] = self._begin(mask, histograms[index], centres[index])
        carried = self._carry(masks, owners, flow)
        for index, track in owners.items():
            track.mask = masks[index]
        found = {track.number for track in owners.values()}
        self._age(found, found | {track.number for track in carried})
        tracked = [
            Tracked(owners[index].number, mask, float(prediction.scores[index])) for index, mask in enumerate(masks)
        ]
        return tracked + [Tracked(track.number, track.mask, None) for track in carried]

    def _flow(self, image: np.ndarray) -> np.ndarray:
        """The displacement (dx, dy) in pixels of the grid from each pixel to the frame before, float32 [h,w,2]."""
        scale = self.config.flow_side / max(image.shape[:2])
        height, width = (max(32, round(scale * side)) for side in image.shape[:2])  # the flow needs a few pixels
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        before, self.grey = self.grey, cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        if before is None or not self.config.flow:
            return np.zeros((height, width, 2), np.float32)
        method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        return method.calc(self.grey, before, None)  # type: ignore[call-overload]

    def _link_by_overlap(
        self, masks: list[np.ndarray], histograms: list[np.ndarray], flow: np.ndarray
    ) -> dict[int, _Track]:
        """{index of the instance: its track} by the masks of the frame before, moved by the flow, and by the last masks
        of tracks that wait, where they were: objects at rest that were hidden, or that the network merged with others.
        """
        before = [_on_grid(track.mask, flow) for track in self.tracks]
        before = [_moved(mask, flow) if track.current else mask for mask, track in zip(before, self.tracks)]
        affinity = np.full((len(masks), len(self.tracks)), NEVER)
        for i, mask in enumerate(masks):
            small = _on_grid(mask, flow)
            for j, track in enumerate(self.tracks):
                iou, similarity = _iou(small, before[j]), _similarity(histograms[i], track.histogram)
                if iou >= self.config.min_iou and (track.current or self._alike(similarity)):
                    affinity[i, j] = iou + self.config.appearance * similarity
        return _assign(affinity, self.tracks, range(len(masks)))

    def _alike(self, similarity: float) -> bool:
        """Whether an instance of this similarity may be that of a track that waits."""
        return not self.config.appearance or similarity >= self.config.min_similarity

    def _link_by_appearance(
        self,
        masks: list[np.ndarray],
        histograms: list[np.ndarray],
        centres: list[np.ndarray],
        owners: dict[int, _Track],
    ) -> None:
        """Add the instances of tracks that wait, or that were in the frame before at another place, to ``owners``."""
        taken = {track.number for track in owners.values()}
        tracks = [track for track in self.tracks if track.number not in taken] if self.config.wait else []
        free = [index for index in range(len(masks)) if index not in owners]
        affinity = np.full((len(free), len(tracks)), NEVER)
        for i, index in enumerate(free):
            for j, track in enumerate(tracks):
                reach = self.config.reach * np.sqrt(max(1, masks[index].sum(), track.area))
                # The motion goes on while the object is hidden.
                ahead = track.centre + (track.missing + 1) * track.velocity
                distance = min(np.linalg.norm(centres[index] - place) for place in (track.centre, ahead)) / reach
                similarity = _similarity(histograms[index], track.histogram)
                if distance <= 1 and self._alike(similarity):
                    affinity[i, j] = bool(self.config.appearance) * similarity - 0.5 * distance
        owners |= _assign(affinity, tracks, free)

    def _begin(self, mask: np.ndarray, histogram: np.ndarray, centre: np.ndarray) -> _Track:
        self.created += 1
        self.tracks.append(_Track(self.created, mask, histogram, centre, np.zeros(2), mask.sum()))
        return self.tracks[-1]

    def _found(self, track: _Track, mask: np.ndarray, histogram: np.ndarray, centre: np.ndarray) -> None:
        track.area = (1 - UPDATE) * track.area + UPDATE * mask.sum()
        track.histogram = (1 - UPDATE) * track.histogram + UPDATE * histogram
        step = (centre - track.centre) / (track.missing + 1)
        track.velocity = step if track.found == 1 else (1 - UPDATE) * track.velocity + UPDATE * step
        track.centre, track.found, track.missing = centre, track.found + 1, 0

    def _carry(self, masks: list[np.ndarray], owners: dict[int, _Track], flow: np.ndarray) -> list[_Track]:
        """Tracks whose masks are carried over by the flow, as many as the frame lacks; changes ``masks`` in place.

        An instance gives up the pixels that only the carried mask accounts for: two objects that the network merges
        in a frame stay apart.
        """
        lacking = round(float(np.mean(self.counts))) - len(masks)
        taken = {track.number for track in owners.values()}
        lost = [
            track
            for track in self.tracks
            if track.number not in taken and track.current and track.found >= self.config.min_frames
        ]
        if lacking <= 0 or not lost:
            return []
        covered = np.zeros(masks[0].shape if masks else lost[0].mask.shape, bool)
        for index, track in owners.items():
            own = masks[index] & _moved(track.mask, flow) if track.current else masks[index]
            covered |= own if own.any() else masks[index]
        carried: list[_Track] = []
        for track in sorted(lost, key=lambda track: (track.missing, -track.found)):
            mask = _moved(track.mask, flow) & ~covered
            if len(carried) < lacking and mask.sum() >= MIN_CARRIED * max(1, track.mask.sum()):
                masks[:] = [instance & ~mask for instance in masks]
                covered |= mask
                track.mask = mask
                carried.append(track)
        return carried

    def _age(self, found: set[int], visible: set[int]) -> None:
        """Count the frames that tracks are missing, and end those that have waited long enough.

        found, visible: the numbers of the tracks that are an instance, and that have a mask, in this frame.
        """
        for track in self.tracks:
            track.current = track.number in visible
            track.missing += track.number not in found
        self.tracks = [track for track in self.tracks if track.current or track.missing <= self.config.wait]


def _on_grid(mask: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """A mask bool [H,W] on the grid of the flow, bool [h,w]."""
    small = cv2.resize(mask.astype(np.uint8), flow.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return small.astype(bool)


def _moved(mask: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """A mask of the frame before, bool [H,W], where the flow [h,w,2] has moved it."""
    height, width = mask.shape
    if flow.shape[:2] != mask.shape:
        scale = np.array([width, height], np.float32) / flow.shape[1::-1]
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) * scale.astype(np.float32)
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return cv2.remap(mask.astype(np.uint8), x, y, cv2.INTER_NEAREST).astype(bool)


def _assign(affinity: np.ndarray, tracks: list[_Track], indices: "range | list[int]") -> dict[int, _Track]:
    """{index: track} of the assignment of highest affinity [len(indices), len(tracks)], without pairs of NEVER."""
    rows, columns = linear_sum_assignment(affinity, maximize=True)
    return {indices[i]: tracks[j] for i, j in zip(rows, columns) if affinity[i, j] > NEVER}


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0


def _similarity(first: np.ndarray, second: np.ndarray) -> float:
    """The Bhattacharyya coefficient of two histograms with a sum of 1, in 0..1."""
    return float(np.sqrt(first * second).sum())


def _histograms(image: np.ndarray, masks: list[np.ndarray]) -> list[np.ndarray]:
    """The colours of each mask, float32 [bins] with a sum of 1, in HSV."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    limits = [0, 180, 0, 256, 0, 256]
    counts = [cv2.calcHist([hsv], [0, 1, 2], mask.astype(np.uint8), list(BINS), limits).ravel() for mask in masks]
    return [count / max(count.sum(), 1) for count in counts]


def track_score(total: float, frames: int) -> float:
    """The score of a track, 0..1: the ``total`` of its scores over the number of frames of its clip.

    A frame in which it was not found counts as 0, so that short tracks rank behind long ones.
    """
    return total / max(1, frames)
