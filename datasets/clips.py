"""Video clips as streams of uint8 RGB frames, by OpenCV's FFmpeg."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.cli import InputError

TRIES = 30  # frames in a row that may fail before the clip counts as ended

# FFmpeg and OpenCV print every broken block of a frame; what it costs is reported in one sentence instead.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


@dataclass(frozen=True)
class Frame:
    """One frame of a clip: its index from 0, and uint8 RGB [H,W,3], or None where it cannot be decoded."""

    index: int
    image: np.ndarray | None

    def __str__(self) -> str:
        return f"frame {self.index}"


class Clip:
    """A video file.

    fps: frames a second, 25 where the file does not say. size: (H, W) of the first frame in pixels, upright. count: the
    number of frames according to the file's header, an estimate in some containers; 0 where it is not given.
    Raises InputError when the file is missing, is no clip, or has no frame that OpenCV decodes.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        if not os.path.isfile(path):
            raise InputError(f"there is no clip {path}; check the path")
        if os.path.getsize(path) == 0:
            raise InputError(f"the clip {path} is empty (0 bytes); copy it again or leave it out")
        with closing(_Capture(path)) as capture:
            fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
            first = next((image for image in capture.images() if image is not None), None)
        if first is None:
            raise _undecodable(path)
        self.size: tuple[int, int] = first.shape[:2]
        self.fps = float(fps) if 0 < fps < 1000 else 25.0
        self.count = int(count) if 0 < count < 2**31 else 0

    def frames(self) -> Iterator[Frame]:
        """The frames in order, one in memory at a time.

        A frame that cannot be decoded, or that has another size than the first, has no image. After the last frame that
        can be decoded nothing follows, so a clip that is cut off ends early.
        """
        with closing(_Capture(self.path)) as capture:
            for index, image in enumerate(capture.images()):
                yield Frame(index, image if image is not None and image.shape[:2] == self.size else None)

    def shortage(self, read: int) -> int:
        """How many frames of the header's count are missing when ``read`` were there; 0 within its precision of 2 %."""
        missing = self.count - read
        return missing if missing > 1 + self.count // 50 else 0


class _Capture:
    """cv2.VideoCapture of one file."""

    def __init__(self, path: Path) -> None:
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            self.capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not self.capture.isOpened():
            raise _undecodable(path)

    def get(self, name: int) -> float:
        return self.capture.get(name)

    def close(self) -> None:
        self.capture.release()

    def images(self) -> Iterator[np.ndarray | None]:
        """uint8 RGB [H,W,3] of each frame, None for those that fail before another that does not."""
        failed = 0
        while failed < TRIES:
            # The decoder reports a broken frame like the end of the file, and goes on behind it when asked once more.
            found, image = self.capture.read()
            if found and image is not None:
                yield from [None] * failed
                failed = 0
                yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            else:
                failed += 1


def _undecodable(path: Path) -> InputError:
    return InputError(
        f"the clip {path} is damaged or of a codec that OpenCV does not read here; convert it: "
        "ffmpeg -i CLIP -c:v libx264 NEW.mp4"
    )
