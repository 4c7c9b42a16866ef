"""Clips: reading, linking of instances, the files infer.py writes, and the study of tracking on made clips."""

import json
import struct
import tracemalloc
from dataclasses import replace
from functools import partial

import conftest
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import infer
from datasets.clips import Clip
from datasets.copy_paste import CutOut
from datasets.listing import CLIP_SUFFIXES, list_images
from datasets.masks import decode_rle, read_instance_mask
from engine import video, visualize
from engine.post_processing import Prediction
from engine.tracking import Tracker, TrackingConfig
from experiments import video_tracking
from experiments.made_clips import make_clip
from experiments.video_tracking import ALL, ALONE, ROWS, evaluate_tracks, track
from utils import files
from utils.cli import InputError

call = partial(conftest.call, infer.main)
SIZE = 96
COLOURS = ((230, 40, 40), (40, 60, 230))  # of the two discs


def disc(centre, radius, size=SIZE):
    yy, xx = np.mgrid[:size, :size]
    return (yy - centre[0]) ** 2 + (xx - centre[1]) ** 2 < radius**2


def picture(discs, size=SIZE):
    """A frame with (centre, radius, colour) discs, later ones in front, on a textured background."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(60, 120, (size // 4, size // 4, 3)).astype(np.uint8), (size, size))
    for centre, radius, colour in discs:
        image[disc(centre, radius, size)] = colour
    return image


def predicted(masks, scores=None):
    masks = np.array(masks, bool).reshape(len(masks), SIZE, SIZE)
    scores = np.linspace(0.9, 0.5, len(masks)) if scores is None else np.array(scores)
    return Prediction(masks, scores.astype(np.float32), np.zeros((len(masks), 2)), np.zeros((SIZE, SIZE)))


def numbers_of(config, frames):
    """For each (image, masks), the numbers that the masks get; masks that were carried over come last."""
    tracker = Tracker(config)
    return [[t.number for t in tracker.update(image, predicted(masks))] for image, masks in frames]


# ---- linking


def test_numbers_do_not_depend_on_the_order_of_the_instances():
    frames = []
    for time in range(6):
        first, second = (30, 20 + 3 * time), (65, 70 - 3 * time)
        masks = [disc(first, 12), disc(second, 12)]
        frames.append((picture([(first, 12, COLOURS[0]), (second, 12, COLOURS[1])]), masks[:: (-1) ** time]))
    assert numbers_of(TrackingConfig(), frames) == [[1, 2], [2, 1]] * 3


def test_flow_follows_what_moves_by_most_of_its_width():
    frames, texture = [], np.random.default_rng(3).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    for time in range(5):
        centre, image = (48, 20 + 11 * time), picture([])
        square = np.s_[centre[0] - 8 : centre[0] + 8, centre[1] - 8 : centre[1] + 8]
        image[square] = cv2.resize(texture, (16, 16), interpolation=cv2.INTER_CUBIC)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[square] = True
        frames.append((image, [mask]))
    assert numbers_of(replace(ALONE, flow=True), frames) == [[1]] * 5
    assert numbers_of(ALONE, frames) == [[1], [2], [3], [4], [5]]


def test_appearance_decides_between_masks_of_similar_overlap():
    before = picture([((48, 30), 14, COLOURS[0]), ((48, 62), 14, COLOURS[1])])
    # Each now overlaps the places of both about as much, and that of the other a little more.
    after = picture([((34, 45), 14, COLOURS[1]), ((62, 47), 14, COLOURS[0])])
    frames = [(before, [disc((48, 30), 14), disc((48, 62), 14)]), (after, [disc((34, 45), 14), disc((62, 47), 14)])]
    config = replace(ALONE, min_iou=0.01)
    assert numbers_of(replace(config, appearance=0.5), frames) == [[1, 2], [2, 1]]
    assert numbers_of(config, frames) == [[1, 2], [1, 2]]


def test_hidden_objects_keep_their_numbers():
    """A disc passes behind a wide one for some frames, while another colour appears where it was."""
    frames = []
    for time in range(20):
        centre = (48, 8 + 4 * time)
        mask = disc(centre, 8) & (abs(np.arange(SIZE) - 48) > 20)
        image = picture([(centre, 8, COLOURS[0])])
        image[:, 28:69] = 90
        frames.append((image, [mask] if mask.sum() > 30 else []))
    hidden = sum(not masks for _, masks in frames)
    assert hidden >= 6
    seen = [numbers for numbers in numbers_of(TrackingConfig(window=1), frames) if numbers]
    assert seen == [[1]] * (20 - hidden)
    assert [2] in numbers_of(TrackingConfig(window=1, wait=hidden - 2), frames)
    # Another colour at the same place is another object.
    other = [(image[..., ::-1].copy() if time > 10 else image, masks) for time, (image, masks) in enumerate(frames)]
    assert numbers_of(TrackingConfig(window=1), other)[-1] == [2]


def test_an_instance_missing_in_one_frame_is_carried_over():
    tracker, carried = Tracker(), None
    for time in range(9):
        first, second = (30, 20 + 4 * time), (70, 70 - 4 * time)
        masks = [disc(first, 12), disc(second, 12)]
        image = picture([(first, 12, COLOURS[0]), (second, 12, COLOURS[1])])
        found = tracker.update(image, predicted(masks[:1] if time == 6 else masks))
        assert [t.number for t in found] == [1, 2]
        if time == 6:
            carried = found[1]
            union, shared = (masks[1] | carried.mask).sum(), (masks[1] & carried.mask).sum()
    assert carried.score is None and shared / union > 0.7
    assert not any(t.score is None for t in found)


def test_a_merged_instance_is_divided_between_its_tracks():
    tracker = Tracker()
    centres = ((48, 36), (48, 60))
    masks = [disc(centre, 11) for centre in centres]
    image = picture([(centre, 11, colour) for centre, colour in zip(centres, COLOURS)])
    for _ in range(5):
        tracker.update(image, predicted(masks))
    found = tracker.update(image, predicted([masks[0] | masks[1]]))
    assert sorted(t.number for t in found) == [1, 2]
    for number, mask, _ in found:
        assert (mask == masks[number - 1]).mean() > 0.99


def test_an_object_at_rest_is_found_after_a_merger():
    """The network merges a disc with a larger one for some frames, and then finds it alone."""
    small, large = disc((48, 34), 11), disc((48, 62), 15)
    image = picture([((48, 34), 11, COLOURS[0]), ((48, 62), 15, COLOURS[1])])
    frames = [(image, [small, large])] * 4 + [(image, [small | large])] * 6 + [(image, [small])]
    numbers = numbers_of(TrackingConfig(window=1), frames)
    assert numbers[:4] == [[1, 2]] * 4 and numbers[4:] == [[2]] * 6 + [[1]]


def test_an_object_that_leaves_is_not_carried_for_ever():
    tracker, image, masks = Tracker(), picture([((48, 48), 12, COLOURS[0])]), [disc((48, 48), 12)]
    for _ in range(12):
        tracker.update(image, predicted(masks))
    lengths = [len(tracker.update(image, predicted([]))) for _ in range(12)]
    assert lengths[0] == 1 and lengths[-1] == 0
    for _ in range(TrackingConfig().wait):
        tracker.skip()
    assert not tracker.tracks, "tracks that have waited long enough end, so that memory does not grow"


def test_tracked_masks_are_disjoint_at_any_size():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 200), (40, 60)):
        tracker = Tracker()
        for _ in range(6):
            labels = rng.integers(0, 4, (height, width))
            masks = np.array([labels == k for k in range(1, 4)])[: rng.integers(0, 4)]
            prediction = Prediction(masks, np.ones(len(masks), np.float32), np.zeros((3, 2)), np.zeros((height, width)))
            found = tracker.update(rng.integers(0, 255, (height, width, 3)).astype(np.uint8), prediction)
            assert sum(t.mask.astype(int) for t in found).max(initial=0) <= 1 if found else True


# ---- the metrics and the made clips


def test_track_metrics_on_tracks_made_by_hand():
    labels = np.zeros((4, 10, 10), np.uint8)
    labels[:, :5, :5], labels[:, 6:, 6:] = 1, 2
    masks = [labels[0] == 1, labels[0] == 2]

    def frames(numbers):
        return [
            ([video.Tracked(n, mask, 0.9) for n, mask in zip(row, masks) if n], gt) for row, gt in zip(numbers, labels)
        ]

    perfect = evaluate_tracks(frames([(1, 2)] * 4))
    assert perfect.switches == 0 and perfect.tracks == 2 and perfect.result.hits[0].all()
    swapped = evaluate_tracks(frames([(1, 2), (1, 2), (1, 2), (2, 1)]))
    assert swapped.switches == 2
    # Track 1: 3 x 25 of 91 pixels on object 1, of 100: IoU 75/116, three of the ten thresholds. Track 2: 48/89, one.
    assert swapped.result.hits.sum(0).tolist() == [3, 1]
    half = evaluate_tracks(frames([(1, 2), (1, 2), (3, 2), (3, 2)]))
    assert half.switches == 1 and half.tracks == 3
    assert half.result.hits[0].sum() == 2, "IoU .5 of one half of the track counts, once"
    assert half.result.scores.tolist() == pytest.approx([0.9, 0.45, 0.45])
    short = evaluate_tracks(frames([(1, 2), (1, 2), (1, 2), (3, 2)]), min_frames=2)
    assert short.tracks == 2 and short.switches == 0


def objects():
    rng = np.random.default_rng(1)
    return [
        CutOut(np.clip(np.array(colour) + rng.integers(-30, 30, (20, 20, 1)), 0, 255).astype(np.uint8), mask)
        for colour, mask in ((COLOURS[0], np.ones((20, 20), np.float32)), (COLOURS[1], np.ones((20, 20), np.float32)))
    ]


def test_made_clips_have_exact_masks():
    clip = make_clip(objects(), picture([]), 12, np.random.default_rng(0))
    assert clip.images.shape == (12, SIZE, SIZE, 3) and clip.labels.shape == (12, SIZE, SIZE)
    for image, labels in zip(clip.images.astype(int), clip.labels):
        for k, colour in enumerate(COLOURS, 1):
            near = np.abs(image - colour).max(2) < 45
            assert ((labels == k) & near).sum() > 0.8 * (labels == k).sum()
    places = [np.argwhere(labels == 2).mean(0) for labels in clip.labels]
    assert np.linalg.norm(places[-1] - places[0]) > 0.3 * SIZE


def test_all_parts_together_beat_iou_alone():
    outcomes = {ALL: [], "IoU alone": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        clip = make_clip(objects(), picture([]), 24, rng)
        predictions = [video_tracking.with_errors(labels, rng) for labels in clip.labels]
        for name, found in outcomes.items():
            found.append(track(clip, predictions, ROWS[name]))
    switches = {name: sum(outcome.switches for outcome in found) for name, found in outcomes.items()}
    hits = {name: sum(outcome.result.hits[0].sum() for outcome in found) for name, found in outcomes.items()}
    assert switches[ALL] < switches["IoU alone"] / 2 and hits[ALL] > hits["IoU alone"]


def test_the_study_prints_its_table(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "instance_masks").mkdir()
    for number in range(4):
        labels = np.zeros((SIZE, SIZE), np.uint8)
        labels[disc((26, 26), 14)] = 1
        image = picture([((26, 26), 14, COLOURS[number % 2])])
        files.save_png(image, tmp_path / "images" / f"{number}.png")
        files.save_png(labels, tmp_path / "instance_masks" / f"{number}.png")
    options = ("--data", tmp_path, "--clips", 2, "--frames", 6, "--size", 64)
    assert conftest.call(video_tracking.main, *options) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(ROWS) and all(any(line.startswith(name) for line in table) for name in ROWS)


# ---- files


class Discs:
    """In place of the Predictor: finds the two colours of ``COLOURS``, in turn the first and the second at the top."""

    weights = "discs"
    device = torch.device("cpu")
    map_kinds = ()

    def __init__(self, *args, **options):
        self.calls = 0

    def identity(self):
        return {"discs": 1}

    def prepare(self, image):
        return image

    def network(self, inputs):
        self.calls += len(inputs)
        return list(inputs)

    def fuse_batch(self, outputs, sizes, saliencies):
        return [partial(self.instances, *each) for each in zip(outputs, sizes, saliencies, strict=True)]

    def instances(self, image, size, saliency=None):
        masks = [np.abs(image.astype(int) - colour).sum(2) < 150 for colour in COLOURS]
        masks = np.array([mask for mask in masks if mask.sum() > 20][:: (-1) ** self.calls]).reshape(-1, *size)
        scores = np.linspace(0.9, 0.8, len(masks))
        centroids = np.array([np.argwhere(mask).mean(0) for mask in masks]).reshape(-1, 2)
        return Prediction(masks, scores.astype(np.float32), centroids, np.zeros(size, np.float32))


@pytest.fixture
def discs(monkeypatch):
    monkeypatch.setattr("engine.inference.Predictor", Discs)


def positions(time):
    return (30, 20 + 2 * time), (65, 76 - 2 * time)


def write_clip(path, frames=20, codec="mp4v", size=SIZE, noise=0):
    """A clip of two discs that move past each other, and back after 27 frames; returns its path."""
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 12.0, (size, size))
    for time in range(frames):
        image = picture(
            [(centre, 12, colour) for centre, colour in zip(positions(27 - abs(27 - time % 54)), COLOURS)], size
        )
        image = np.clip(image + rng.integers(-noise, noise + 1, image.shape), 0, 255).astype(np.uint8)
        writer.write(image[..., ::-1].copy())
    writer.release()
    return path


def tracks_of(path):
    return json.loads(path.read_text())


def test_a_clip_beside_a_photograph(discs, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip.mp4")
    Image.fromarray(picture([((40, 40), 15, COLOURS[0])])).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    assert call("--img", clip, tmp_path / "photo.png", "--out", out) == 0
    names = {path.name for path in out.iterdir() if not path.name.startswith("finished")}
    photo = {"photo_instances.png", "photo_overlay.jpg", "predictions.json"}
    assert names == {"clip_instances.mp4", "clip_tracks.json", "clip"} | photo

    drawn = Clip(out / "clip_instances.mp4")
    assert drawn.size == (SIZE, SIZE) and drawn.fps == 12
    pictures = [frame.image for frame in drawn.frames()]
    assert len(pictures) == 20
    data = tracks_of(out / "clip_tracks.json")
    (record,) = data["videos"]
    assert (record["width"], record["height"], record["length"], record["fps"]) == (SIZE, SIZE, 20, 12)
    assert record["file_names"] == [f"clip/{index:06d}.png" for index in range(20)]
    assert [found["id"] for found in data["annotations"]] == [1, 2]
    colours = visualize.instance_colours(2)
    for found in data["annotations"]:
        assert len(found["segmentations"]) == len(found["scores"]) == 20 and found["score"] == pytest.approx(
            0.85, abs=0.06
        )
        for index, rle in enumerate(found["segmentations"]):
            mask = decode_rle(rle)
            labels = read_instance_mask(out / record["file_names"][index])
            assert np.array_equal(labels == found["id"], mask)
            assert found["areas"][index] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert found["bboxes"][index] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    first = decode_rle(data["annotations"][0]["segmentations"][0])
    which = 0 if disc(positions(0)[0], 12)[first].mean() > 0.9 else 1  # the disc that has number 1
    for time in range(20):
        place = [int(value) for value in positions(time)[which]]
        own = decode_rle(data["annotations"][0]["segmentations"][time])
        assert own[disc(positions(time)[which], 10)].mean() > 0.9, "the same disc in all frames"
        inside = pictures[time][place[0] + 7, place[1]].astype(float)
        assert np.abs(inside - (0.35 * colours[0] + 0.65 * np.array(COLOURS[which]))).max() < 60
    assert Image.open(out / "clip" / "000000.png").mode == "P"

    capsys.readouterr()
    assert call("--img", clip, "--out", out) == 0
    assert "clip.mp4 is finished and skipped" in capsys.readouterr().out
    (out / "clip" / "000013.png").unlink()
    assert call("--img", clip, "--out", out) == 0
    assert "skipped" not in capsys.readouterr().out and len(list((out / "clip").iterdir())) == 20
    write_clip(clip, frames=6)
    assert call("--img", clip, "--out", out) == 0
    assert tracks_of(out / "clip_tracks.json")["videos"][0]["length"] == 6
    assert sorted(path.name for path in (out / "clip").iterdir()) == [f"{index:06d}.png" for index in range(6)]


@pytest.mark.parametrize("suffix, codec", [(".avi", "MJPG"), (".mkv", "mp4v"), (".mov", "mp4v"), (".webm", "VP80")])
def test_containers(discs, tmp_path, suffix, codec):
    clip = write_clip(tmp_path / f"clip{suffix}", 5, codec)
    assert call("--img", clip, "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out" / "clip").glob("*.png"))) == 5


def test_clips_of_phones_are_turned_upright(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the track's header: a quarter turn clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned = next(Clip(write_clip(tmp_path / "plain.mp4", 3)).frames()).image
    path.write_bytes(data)
    assert np.abs(next(Clip(path).frames()).image.astype(int) - np.rot90(turned, -1)).mean() < 2


def test_broken_frames_cost_themselves(discs, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip.mp4", 40, noise=20)
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + len(data) // 20] = bytes(len(data) // 20)
    clip.write_bytes(data)
    broken = [frame.index for frame in Clip(clip).frames() if frame.image is None]
    assert broken
    assert call("--img", clip, "--out", tmp_path / "out") == 1
    assert f"{len(broken)} of " in (error := capsys.readouterr().err) and error.count("error:") == 1
    data = tracks_of(tmp_path / "out" / "clip_tracks.json")
    length = data["videos"][0]["length"]
    assert length == 40 == len(list((tmp_path / "out" / "clip").iterdir()))
    for found in data["annotations"]:
        assert len(found["segmentations"]) == length
        assert all(found[name][broken[0]] is None for name in ("segmentations", "bboxes", "areas", "scores"))
    assert any(found["segmentations"][0] and found["segmentations"][-1] for found in data["annotations"])
    assert (
        len([frame for frame in Clip(tmp_path / "out" / "clip_instances.mp4").frames() if frame.image is not None])
        == 40
    )
    assert call("--img", clip, "--out", tmp_path / "out") == 1, "what is missing is reported by the next run too"


def test_a_clip_that_is_cut_off_ends_early(discs, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip.avi", 40, "MJPG")
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert call("--img", clip, "--out", tmp_path / "out") == 1
    assert "of 40 frames are missing" in capsys.readouterr().err
    assert 5 < tracks_of(tmp_path / "out" / "clip_tracks.json")["videos"][0]["length"] < 35


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"no clip at all", "convert it: ffmpeg")])
def test_files_that_are_no_clips(discs, tmp_path, capsys, content, message):
    (tmp_path / "clip.mp4").write_bytes(content)
    assert call("--img", tmp_path / "clip.mp4", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "clip.mp4" in error and error.count("\n") == 1
    good = write_clip(tmp_path / "good.mp4", 4)
    assert call("--img", tmp_path / "clip.mp4", good, "--out", tmp_path / "out") == 1


def test_without_a_codec_the_tracks_are_written(discs, tmp_path, capsys, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", 4)
    monkeypatch.setattr(video, "CODECS", ("XXXX",))
    assert call("--img", clip, "--out", tmp_path / "out") == 1
    assert "none of the codecs XXXX" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"clip", "clip_tracks.json"}
    monkeypatch.setattr(video, "CODECS", ("XXXX", "mp4v"))
    assert call("--img", clip, "--out", tmp_path / "out") == 0
    assert Clip(tmp_path / "out" / "clip_instances.mp4").size == (SIZE, SIZE)


def test_odd_sizes_and_short_tracks(discs, tmp_path):
    """Codecs take even sizes only; and a disc that is there in two frames of twelve is no track."""
    picture_of = partial(picture, size=97)
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.0, (98, 97))
    for time in range(12):
        shown = [((30, 30), 12, COLOURS[0])] + ([((70, 70), 10, COLOURS[1])] if time in (5, 6) else [])
        writer.write(np.pad(picture_of(shown), ((0, 0), (0, 1), (0, 0)))[..., ::-1].copy())
    writer.release()
    clip = Clip(tmp_path / "clip.avi")
    assert call("--img", clip.path, "--out", tmp_path / "out") == 0
    data = tracks_of(tmp_path / "out" / "clip_tracks.json")
    assert len(data["annotations"]) == 1
    drawn = Clip(tmp_path / "out" / "clip_instances.mp4")
    assert drawn.size == tuple(side + side % 2 for side in clip.size)
    assert video._even(np.zeros((97, 63, 3), np.uint8)).shape == (98, 64, 3)


def test_results_replace_neither_inputs_nor_each_other(discs, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    first, second = write_clip(tmp_path / "clip.mp4", 3), write_clip(tmp_path / "a" / "clip.avi", 3, "MJPG")
    assert call("--img", first, second, "--out", tmp_path / "out") == 1
    assert "would write the same files" in capsys.readouterr().err
    write_clip(tmp_path / "clip_instances.mp4", 3)
    before = (tmp_path / "clip_instances.mp4").read_bytes()
    assert call("--img", first, tmp_path / "clip_instances.mp4", "--out", tmp_path) == 1
    assert "would replace an input" in capsys.readouterr().err
    assert (tmp_path / "clip_instances.mp4").read_bytes() == before
    assert call("--img", first, "--saliency-dir", tmp_path, "--out", tmp_path / "out") == 2


def test_what_options_write_for_photographs_alone_is_not_silently_left_out(discs, tmp_path, capsys):
    clip, out = write_clip(tmp_path / "clip.mp4", 3), tmp_path / "out"
    options = ("--cutouts", "--labelme", "--visualize", "--coco", tmp_path / "salient.json")
    Image.fromarray(picture([((40, 40), 15, COLOURS[0])])).save(tmp_path / "photo.png")
    assert call("--img", clip, "--out", out, *options) == 2
    assert "only clips are given" in (error := capsys.readouterr().err)
    assert "--visualize, --cutouts, --coco, --labelme" in error and not out.exists()
    assert call("--img", clip, tmp_path / "photo.png", "--out", out, *options[:2]) == 0
    assert "--cutouts, --labelme: written for the photographs, not for the clips" in capsys.readouterr().err
    assert (out / "photo_cutout1.png").exists() and (out / "clip_tracks.json").exists()


def test_results_of_clips_in_a_folder_are_no_inputs(discs, tmp_path):
    clip = write_clip(tmp_path / "clip.MP4", 3)
    assert call("--img", clip, "--out", tmp_path) == 0
    every = partial(list_images, suffixes=(".png", *CLIP_SUFFIXES), report=pytest.fail)
    assert every(tmp_path / "*") == [clip]
    assert every(str(tmp_path / "**")) == [clip]
    with pytest.raises(InputError, match="holds no images"):
        list_images(tmp_path)


def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks = []
    for frames in (20, 80):
        clip = write_clip(tmp_path / f"clip{frames}.avi", frames, "MJPG")
        tracemalloc.start()
        video.process_clip(clip, tmp_path, Discs(), 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000, "60 frames of 28 kB and their masks would be more"
