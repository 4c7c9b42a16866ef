"""Clips: the instances of every frame with steady numbers.

The file is read twice: for the predictions, which are linked to tracks, and to draw them, when it is clear which tracks
are kept. Between the two the masks lie run-length encoded in a file, so memory does not grow with the length of a clip.
"""

import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pycocotools.mask

from datasets.clips import Clip, Frame
from datasets.masks import centroids_of, decode_rle, encode_rle
from engine import visualize
from engine.post_processing import Prediction
from engine.predictor import Predictor, process
from engine.tracking import Tracked, Tracker, TrackingConfig, track_score
from models import MAX_INSTANCES
from utils import digest, files
from utils.cli import InputError, make_folder
from utils.progress import tqdm

CODECS = ("mp4v", "vp09", "MJPG")  # the first that OpenCV can write is used; VP9 is encoded 80 times more slowly
Rle = dict[str, Any]


def results_of(path: Path, folder: Path) -> tuple[Path, Path, Path]:
    """What ``process_clip`` writes for a clip: the drawn clip, the folder of label maps, and the tracks."""
    return folder / f"{path.stem}_instances.mp4", folder / path.stem, folder / f"{path.stem}_tracks.json"


def without_clashes(
    clips: Sequence[Path], photographs: Sequence[Path], folder: Path
) -> tuple[list[Path], list[InputError]]:
    """The ``clips`` whose results replace neither those of others nor an input, and an InputError for the rest."""
    inputs = {os.path.realpath(path) for path in clips}
    inputs |= {os.path.dirname(os.path.realpath(path)) for path in photographs}
    kept: dict[str, Path] = {}
    errors = []
    for path in clips:
        overwritten = [result for result in results_of(path, folder) if os.path.realpath(result) in inputs]
        if path.stem in kept:
            errors.append(
                InputError(
                    f"{path} and {kept[path.stem]} would write the same files, and it was left out; rename it or give "
                    "it another --out"
                )
            )
        elif overwritten:
            errors.append(
                InputError(
                    f"the result {overwritten[0]} would replace an input, so {path} was left out; choose another --out"
                )
            )
        else:
            kept[path.stem] = path
    return list(kept.values()), errors


def process_clip(
    path: Path,
    folder: Path,
    predictor: Predictor,
    batch_size: int,
    workers: int = 1,
    settings: TrackingConfig | None = None,
) -> tuple[list[Path], list[InputError]]:
    """Write the results of a clip into an existing ``folder``; returns their paths and what is missing in them.

    batch_size, workers: as for ``engine.predictor.process``. Results of the same clip, weights and settings are kept as
    they are. Frames that cannot be decoded have no masks. Raises InputError when the clip cannot be read, or the
    results cannot be written.
    """
    settings = settings or TrackingConfig()
    video, labels, tracks = results_of(path, folder)
    clip = Clip(path)
    status = os.stat(path)
    identity = digest.of_value([predictor.identity(), asdict(settings), status.st_size, status.st_mtime_ns])
    before = _info(tracks)
    expected = [video, *(labels / _frame_name(index) for index in range(before.get("length", 0)))]
    if before.get("identity") == identity and all(map(files.is_complete, expected)):
        print(f"{path} is finished and skipped; delete {tracks} to compute it anew")
        return [video, labels, tracks], [InputError(text) for text in before["problems"]]
    with suppress(OSError):
        tracks.unlink(missing_ok=True)  # it is written last, and stands for the label maps beside it
    make_folder(labels)
    with closing(MaskStore(folder / f".{path.stem[-60:]}.masks.partial")) as store:
        broken, length = _find(clip, predictor, batch_size, workers, Tracker(settings), store)
        problems = _problems(clip, broken, length)
        store.number_tracks(min(settings.min_frames, length - len(broken)))
        drawn = _draw(clip, store, video, labels, length)
        _delete_from(labels, length)
        if not drawn:
            problems.append(
                f"OpenCV has none of the codecs {', '.join(CODECS)} here, so {video} was not written; install "
                "opencv-python-headless"
            )
        info = {"identity": identity, "length": length, "problems": problems}
        files.write_atomically(tracks, lambda file: _write_tracks(file, info, clip, labels.name, store, length))
    return [*([video] if drawn else []), labels, tracks], [InputError(text) for text in problems]


class MaskStore:
    """The masks of all tracks of a clip in a file, in the order of frames or of tracks; ``close`` deletes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.unlink(missing_ok=True)
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute("pragma journal_mode = off")
            self.db.execute("pragma synchronous = off")
            self.db.execute("create table masks (frame integer, track integer, score real, rle text)")
            self.db.execute("create table numbers (track integer primary key, number integer, score real)")

    def close(self) -> None:
        self.db.close()
        self.path.unlink(missing_ok=True)

    def add(self, frame: int, tracked: Iterable[Tracked]) -> None:
        """Add the instances of a frame."""
        with self._errors():
            rows = [(frame, number, score, json.dumps(encode_rle(mask))) for number, mask, score in tracked]
            self.db.executemany("insert into masks values (?, ?, ?, ?)", rows)

    def number_tracks(self, min_frames: int) -> None:
        """Number the tracks found in at least ``min_frames`` frames 1, 2, ... as they begin; others are left out."""
        with self._errors():
            self.db.execute("create index by_frame on masks (frame)")
            self.db.execute("create index by_track on masks (track, frame)")
            kept = self.db.execute(
                "select track, total(score) from masks group by track having count(score) >= ? order by track",
                [min_frames],
            ).fetchall()
            rows = [(track, number, total) for number, (track, total) in enumerate(kept, 1)]
            self.db.executemany("insert into numbers values (?, ?, ?)", rows)

    def tracks(self) -> list[tuple[int, float]]:
        """(number, sum of the scores) of all numbered tracks."""
        with self._errors():
            return self.db.execute("select number, score from numbers order by number").fetchall()

    def of_frame(self, frame: int) -> list[tuple[int, Rle]]:
        """(number, RLE) of the masks of a frame."""
        query = "select number, rle from masks join numbers using (track) where frame = ? order by number"
        with self._errors():
            return [(number, json.loads(rle)) for number, rle in self.db.execute(query, [frame])]

    def of_track(self, number: int) -> Iterator[tuple[int, Rle, float | None]]:
        """(frame, RLE, score or None) of the masks of a numbered track, one in memory at a time."""
        query = "select frame, rle, masks.score from masks join numbers using (track) where number = ? order by frame"
        with self._errors():
            for frame, rle, score in self.db.execute(query, [number]):
                yield frame, json.loads(rle), score

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"cannot write {self.path} ({error}); free some space or choose another --out") from error


def _find(
    clip: Clip, predictor: Predictor, batch_size: int, workers: int, tracker: Tracker, store: MaskStore
) -> tuple[list[int], int]:
    """Predict and link all frames; returns the indices of those that cannot be decoded, and the number of frames."""
    broken, length = [], 0
    with closing(process(clip.frames(), predictor, _keep, batch_size, workers, read=_pixels)) as found:
        for index, result in enumerate(tqdm(found, clip.path.name, total=clip.count, unit="frame")):
            length = index + 1
            if isinstance(result, InputError):
                broken.append(index)
                tracker.skip()
            else:
                store.add(index, tracker.update(*result))
    return broken, length


def _pixels(frame: Frame) -> np.ndarray:
    if frame.image is None:
        raise InputError(f"{frame} cannot be decoded")
    return frame.image


def _keep(frame: Frame, image: np.ndarray, prediction: Prediction) -> tuple[np.ndarray, Prediction]:
    return image, prediction


def _problems(clip: Clip, broken: list[int], length: int) -> list[str]:
    problems = []
    if broken:
        problems.append(
            f"{clip.path}: {len(broken)} of {length} frames cannot be decoded, frame {broken[0]} the first, and have "
            "no masks; copy or convert the clip anew"
        )
    if missing := clip.shortage(length):
        problems.append(
            f"{clip.path}: {missing} of {clip.count} frames are missing, and the results are those of the others; copy "
            "or convert the clip anew"
        )
    return problems


def _draw(clip: Clip, store: MaskStore, video: Path, labels: Path, length: int) -> bool:
    """Write the label maps and the drawn clip; returns whether there is a codec for the latter."""
    partial = video.with_name(f".{video.name[-60:-4]}.partial.mp4")
    writer = _open_writer(partial, clip)
    picture = np.zeros((*clip.size, 3), np.uint8)
    try:
        for frame in clip.frames():
            if frame.index >= length:
                break
            found = store.of_frame(frame.index)
            masks = [decode_rle(rle) for _, rle in found]
            label_map = np.zeros(clip.size, np.uint8)
            for (number, _), mask in zip(found, masks, strict=True):
                if number <= MAX_INSTANCES:
                    label_map[mask] = number
            files.save_label_png(label_map, labels / _frame_name(frame.index))
            if writer and frame.image is not None:  # else the picture before is repeated, and the clip keeps its time
                numbers = [number for number, _ in found]
                picture = visualize.overlay(
                    frame.image, np.array(masks, bool), np.ones(len(masks)), centroids_of(masks), numbers
                )
            if writer:
                writer.write(_even(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)))
        if writer:
            writer.release()
            if not partial.exists() or partial.stat().st_size < length:
                raise InputError(f"cannot write {video}; free some space or choose another --out")
            os.replace(partial, video)
    except OSError as error:
        raise files.write_error(video, error) from error
    finally:
        if writer:
            writer.release()
        partial.unlink(missing_ok=True)
    return writer is not None


def _open_writer(path: Path, clip: Clip) -> cv2.VideoWriter | None:
    height, width = (side + side % 2 for side in clip.size)
    for codec in CODECS:
        code = cv2.VideoWriter.fourcc(*codec)
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, clip.fps, (width, height))
        if writer.isOpened():
            return writer
    return None


def _even(picture: np.ndarray) -> np.ndarray:
    """A picture with its last row and column repeated where their number is odd, which codecs do not take."""
    height, width = picture.shape[:2]
    return cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)


def _frame_name(index: int) -> str:
    return f"{index:06d}.png"


def _delete_from(labels: Path, length: int) -> None:
    """Delete the label maps of frames that a former, longer clip of the same name had."""
    for index in itertools.count(length):
        try:
            (labels / _frame_name(index)).unlink()
        except OSError:
            break


def _write_tracks(file: BinaryIO, info: dict[str, Any], clip: Clip, folder: str, store: MaskStore, length: int) -> None:
    """Write the tracks as YouTube-VIS does, track by track and frame by frame; ``info`` alone on the first line."""
    height, width = clip.size

    def write(text: str) -> None:
        file.write(text.encode())

    def write_list(values: Iterable[Any]) -> None:
        write("[")
        for index, value in enumerate(values):
            write(f"{', ' * bool(index)}{json.dumps(value)}")
        write("]")

    def per_frame(number: int, value: Callable[[Rle, float | None], Any]) -> Iterator[Any]:
        frame = 0
        for index, rle, score in store.of_track(number):
            yield from [None] * (index - frame)
            yield value(rle, score)
            frame = index + 1
        yield from [None] * (length - frame)

    size = {"width": width, "height": height, "length": length}
    write(f'{{"info": {json.dumps(info)},\n')
    write(f' "videos": [{json.dumps({"id": 1, "name": clip.path.name, "fps": clip.fps} | size)[:-1]}, "file_names": ')
    write_list(f"{folder}/{_frame_name(index)}" for index in range(length))
    write('}],\n "categories": [{"id": 1, "name": "salient object"}],\n "annotations": [')
    columns: dict[str, Callable[[Rle, float | None], Any]] = {
        "segmentations": lambda rle, score: rle,
        "bboxes": lambda rle, score: pycocotools.mask.toBbox(rle).tolist(),
        "areas": lambda rle, score: int(pycocotools.mask.area(rle)),
        "scores": lambda rle, score: score,
    }
    for place, (number, total) in enumerate(store.tracks()):
        track = {"id": number, "video_id": 1, "category_id": 1, "iscrowd": 0, "score": track_score(total, length)}
        write(f"{',' * bool(place)}\n  {json.dumps(track | size)[:-1]}")
        for name, value in columns.items():
            write(f',\n   "{name}": ')
            write_list(per_frame(number, value))
        write("}")
    write("\n ]\n}\n")


def _info(tracks: Path) -> dict[str, Any]:
    """The info of a finished file of tracks, from its first line; {} where there is none."""
    with suppress(OSError, ValueError, KeyError), open(tracks, encoding="utf-8") as file:
        info = json.loads(file.readline().rstrip(",\n") + "}")["info"]
        if isinstance(info, dict) and isinstance(info.get("problems"), list) and isinstance(info.get("length"), int):
            return info
    return {}
