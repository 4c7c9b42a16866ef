"""Pictures in rows of equal height, as one file: the figure of the README.

python infer.py --img samples --amp off --out output
python -m experiments.contact_sheet output/*_overlay.jpg docs/results.jpg
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from datasets.images import read_image
from utils.cli import InputError
from utils.files import write_atomically
from utils.script import run

HEIGHT, WIDTH, GAP = 220, 1400, 6  # of a row, of the whole and between pictures, in pixels


def contact_sheet(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """uint8 RGB pictures [H,W,3] of any size -> one, WIDTH pixels wide, rows filled from left to right."""
    rows: list[list[np.ndarray]] = []
    row: list[np.ndarray] = []
    for picture in pictures:
        width = round(picture.shape[1] * HEIGHT / picture.shape[0])
        row.append(cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA))
        if sum(p.shape[1] for p in row) >= WIDTH * 0.8:
            rows.append(row)
            row = []
    rows += [row] if row else []
    return np.concatenate([_fill(row) for row in rows])


def _fill(row: list[np.ndarray]) -> np.ndarray:
    """The pictures side by side with gaps, WIDTH pixels wide; a short last row is padded, not enlarged."""
    strip = np.concatenate([np.pad(p, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for p in row], 1)
    if strip.shape[1] < WIDTH * 0.8:
        return np.pad(strip, ((0, 0), (0, WIDTH - strip.shape[1]), (0, 0)), constant_values=255)
    return cv2.resize(strip, (WIDTH, round(strip.shape[0] * WIDTH / strip.shape[1])), interpolation=cv2.INTER_AREA)


def main() -> None:
    if len(sys.argv) < 3:
        raise InputError("give the pictures and then the file to write, as in the description of this module")
    *pictures, out = map(Path, sys.argv[1:])
    if out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise InputError(f"{out} has no picture suffix; end it in .jpg or .png")
    sheet = contact_sheet([read_image(path) for path in pictures])
    encoded = cv2.imencode(out.suffix, sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    write_atomically(out, lambda file: file.write(encoded.tobytes()))


if __name__ == "__main__":
    run(main)
