"""What each part of the linking of video instances contributes, on made clips with exact masks.

    python -m experiments.video_tracking --data data/val                       # ground-truth masks with random errors
    python -m experiments.video_tracking --data data/val --clips 10 --predict  # masks of the bundled network
    python -m experiments.video_tracking --data data/val --weights runs/mine/weights_pts.pt --clips 10 --predict

Objects of the photographs move over parts of others without objects (``experiments.made_clips``). Each row changes one
part of ``engine.tracking``. AP is YouTube-VIS's at IoU 0.5: the IoU of two tracks is the sum of the intersections of
their masks over all frames divided by the sum of the unions. A switch is a frame in which an object has another number
than in the last frame before in which it had one (IoU of the masks 0.5 or more). The standard error, in brackets, is
that of the difference from the row of all parts, over bootstrap draws of the clips.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np

from datasets.labels import collect_into
from datasets.sources import read_ground_truth
from engine.bootstrap import ap_of_draws, draw_images, standard_errors
from engine.metrics import ImageResult, match_ious, pooled_ap
from engine.post_processing import Prediction
from engine.predictor import Predictor
from engine.tracking import Tracked, Tracker, TrackingConfig, track_score
from experiments.made_clips import MadeClip, clip_of_photographs
from utils.cli import InputError, Parser, integer, path_of, select_device
from utils.progress import tqdm
from utils.script import report_problems, run

FULL = TrackingConfig()
ALONE = TrackingConfig(flow=False, appearance=0, wait=0, window=1, min_frames=1)
ALL = "all parts"
ROWS = {
    "IoU alone": ALONE,
    "IoU alone, tracks wait": replace(ALONE, wait=FULL.wait),
    ALL: FULL,
    "without optical flow": replace(FULL, flow=False),
    "without appearance": replace(FULL, appearance=0),
    "without waiting": replace(FULL, wait=0),
    "without averaged number": replace(FULL, window=1),
    "without dropping short tracks": replace(FULL, min_frames=1),
}
# Probabilities of errors of the ground-truth masks: an object is missing, two that touch are merged, a part of the
# background is an instance. The masks' contours are shifted by up to SHIFT of the side.
MISSING, MERGED, FALSE, SHIFT = 0.12, 0.3, 0.08, 0.02


class Outcome(NamedTuple):
    """One clip: its tracks matched to the objects as the instances of an image are, the number of identity switches,
    and that of tracks."""

    result: ImageResult
    switches: int
    tracks: int


def with_errors(labels: np.ndarray, rng: np.random.Generator) -> Prediction:
    """A Prediction of one frame, made of its ground truth uint8 [H,W] with random errors, in random order."""
    size = labels.shape
    masks = []
    for number in np.setdiff1d(labels, 0):
        mask = (labels == number).astype(np.uint8)
        width = max(1, round(SHIFT * size[0] * rng.random()))
        mask = (cv2.dilate if rng.random() < 0.5 else cv2.erode)(mask, np.ones((width, width), np.uint8))
        masks.append(np.roll(mask, rng.integers(-width, width + 1, 2), (0, 1)).astype(bool))
    if len(masks) > 1 and rng.random() < MERGED:
        first, second = rng.permutation(len(masks))[:2]
        if (cv2.dilate(masks[first].astype(np.uint8), np.ones((9, 9))).astype(bool) & masks[second]).any():
            masks[first] = masks[first] | masks[second]
            del masks[second]
    masks = [mask for mask in masks if rng.random() >= MISSING]
    if rng.random() < FALSE:
        mask = np.zeros(size, np.uint8)
        place = tuple(int(value) for value in rng.integers(0, size[0], 2))
        masks.append(cv2.circle(mask, place, int(size[0] * rng.uniform(0.06, 0.14)), 1, -1).astype(bool))
    masks = [masks[index] for index in rng.permutation(len(masks))]
    covered = np.zeros(size, bool)
    for index, mask in enumerate(masks):
        masks[index], covered = mask & ~covered, covered | mask
    masks = [mask for mask in masks if mask.sum() > 20]
    scores = rng.uniform(0.3, 1, len(masks)).astype(np.float32)
    stack = np.stack(masks) if masks else np.zeros((0, *size), bool)
    return Prediction(stack, scores, np.zeros((len(masks), 2)), np.zeros(size, np.float32))


def evaluate_tracks(frames: Iterable[tuple[Sequence[Tracked], np.ndarray]], min_frames: int = 1) -> Outcome:
    """Compare the tracks of a clip to its objects.

    frames: of each frame the Tracked instances, and the ground truth uint8 [H,W], 0 background, k the k-th object.
    min_frames: tracks found in fewer frames do not count.
    """
    inside: Counter[tuple[int, int]] = Counter()  # pixels of a track on an object
    of_tracks: Counter[int] = Counter()
    of_objects: Counter[int] = Counter()
    scores: defaultdict[int, list[float]] = defaultdict(list)
    seen: list[dict[int, int]] = []  # of each frame, {object: track} where the IoU is 0.5 or more
    for tracked, labels in frames:
        areas = np.bincount(labels.ravel(), minlength=256)
        of_objects.update({int(k): int(areas[k]) for k in np.flatnonzero(areas) if k})
        seen.append({})
        for number, mask, score in tracked:
            overlap, area = np.bincount(labels[mask], minlength=256), int(mask.sum())
            of_tracks[number] += area
            inside.update({(number, int(k)): int(overlap[k]) for k in np.flatnonzero(overlap) if k})
            scores[number] += [] if score is None else [score]
            best = int(overlap[1:].argmax()) + 1
            if 2 * overlap[best] >= area + areas[best] - overlap[best]:
                seen[-1][best] = number
    kept = [number for number in of_tracks if len(scores[number]) >= min(min_frames, len(seen))]
    ious = np.zeros((len(kept), len(of_objects)))
    for i, number in enumerate(kept):
        for j, k in enumerate(sorted(of_objects)):
            shared = inside[number, k]
            ious[i, j] = shared / (of_tracks[number] + of_objects[k] - shared)
    switches, last = 0, dict[int, int]()
    for pairs in seen:
        for k, number in pairs.items():
            if number in kept:
                switches += last.setdefault(k, number) != number
                last[k] = number
    ranking = np.array([track_score(sum(scores[number]), len(seen)) for number in kept])
    return Outcome(match_ious(ious, ranking), switches, len(kept))


def track(clip: MadeClip, predictions: Sequence[Prediction], config: TrackingConfig) -> Outcome:
    """The Outcome of one clip, whose frames have these Predictions."""
    tracker = Tracker(config)
    frames = (
        (tracker.update(image, prediction), labels)
        for image, prediction, labels in zip(clip.images, predictions, clip.labels, strict=True)
    )
    return evaluate_tracks(frames, config.min_frames)


def format_rows(rows: dict[str, list[Outcome]]) -> str:
    """{row: the Outcomes of the same clips} as text: AP in percent, and means of switches and tracks."""
    draws = draw_images(len(rows[ALL]))
    aps = {name: ap_of_draws([outcome.result for outcome in outcomes], draws) for name, outcomes in rows.items()}
    switches = {name: np.array([outcome.switches for outcome in outcomes]) for name, outcomes in rows.items()}
    lines = [f"{'':32}{'AP at IoU 0.5 (%)':>20}{'switches a clip':>20}{'tracks a clip':>15}"]
    for name, outcomes in rows.items():
        ap = f"{100 * pooled_ap([outcome.result for outcome in outcomes])[0]:.1f}"
        switch = f"{switches[name].mean():.2f}"
        if name != ALL:
            ap += f" ({100 * standard_errors(aps[ALL], aps[name])['pooled']['0.5']:.1f})"
            switch += f" ({(draws @ (switches[name] - switches[ALL]) / len(outcomes)).std():.2f})"
        tracks = np.mean([outcome.tracks for outcome in outcomes])
        lines.append(f"{name:32}{ap:>20}{switch:>20}{tracks:15.1f}")
    return "\n".join(lines)


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m experiments.video_tracking", description=__doc__)
    parser.add_argument("--data", default="data/val", metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument("--clips", type=integer(2, 10000), default=100, help="number of clips")
    parser.add_argument("--frames", type=integer(2, 1000), default=36, help="frames of each")
    parser.add_argument("--size", type=integer(64, 2048), default=256, help="side of the frames in pixels")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the clips and of the errors")
    parser.add_argument("--predict", action="store_true", help="masks of a network instead of the ground truth")
    parser.add_argument("--weights", type=path_of, help="with --predict; as for infer.py")
    parser.add_argument("--gpu", type=integer(-1), default=-1, help="with --predict: CUDA device; -1 is the CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    if args.weights and not args.predict:
        raise InputError("--weights has no meaning without --predict; leave it out or add --predict")
    predictor = Predictor(args.weights, select_device(args.gpu)) if args.predict else None
    problems: list[InputError] = []
    samples = read_ground_truth(args.data, collect_into(problems))
    rows: dict[str, list[Outcome]] = {name: [] for name in ROWS}
    for seed in tqdm(range(args.seed, args.seed + args.clips), "clips", unit="clip"):
        rng = np.random.default_rng([seed, 1])
        try:
            clip = clip_of_photographs(samples, int(rng.integers(2, 4)), args.frames, args.size, seed)
        except ValueError as error:
            raise InputError(f"{args.data}: {error}; name a folder with more photographs") from error
        if predictor:
            predictions = [predictor.predict(image) for image in clip.images]
        else:
            predictions = [with_errors(labels, rng) for labels in clip.labels]
        for name, config in ROWS.items():
            rows[name].append(track(clip, predictions, config))
    print(format_rows(rows))
    return report_problems(problems)


if __name__ == "__main__":
    run(main)
