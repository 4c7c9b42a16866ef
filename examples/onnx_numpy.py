"""Salient instances with an exported student network, without torch: numpy, opencv-python-headless and onnxruntime.

python export.py --onnx && python examples/onnx_numpy.py student.onnx x.jpg  # as infer.py --no-refine: x_instances.png
"""

import os
import sys

import cv2
import numpy as np
import onnxruntime


def paste(box: np.ndarray, mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask R-CNN's 28 x 28 probabilities in a box, as a map of a photograph."""
    centre, half = (box[2:] + box[:2]) / 2, (box[2:] - box[:2]) / 2 * 30 / 28  # with a rim of one pixel of the 28
    (x0, y0), (x1, y1) = (centre - half).astype(int), (centre + half).astype(int)
    mask = cv2.resize(np.pad(mask, 1), (max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)))
    canvas = np.zeros((height, width), np.float32)
    canvas[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = mask[max(-y0, 0) : height - y0, max(-x0, 0) : width - x0]
    return canvas


def instances(session: onnxruntime.InferenceSession, image: np.ndarray) -> np.ndarray:
    """A photograph, uint8 RGB [H,W,3] -> label map uint8 [H,W]: 0 background, 1..n by descending score."""
    (height, width), side = image.shape[:2], session.get_inputs()[0].shape[2]
    shrinks = max(height, width) > side
    square = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    boxes, scores, masks, counts = session.run(None, {"image": square.transpose(2, 0, 1)[None].astype("f4") / 255})
    small = np.array([paste(b * 160, m, 160, 160) >= 0.5 for b, m in zip(boxes, masks)]).reshape(-1, 160 * 160)
    common = small.astype("f4") @ small.T.astype("f4")
    areas = np.maximum(common.diagonal(), 1)
    conflicts = (common > 0.5 * np.minimum(areas, areas[:, None])) & ~np.eye(len(boxes), dtype=bool)
    sets = np.arange(2 ** len(boxes))[:, None] >> np.arange(len(boxes)) & 1  # every set of hypotheses, one a row
    sets = sets[~((sets @ conflicts > 0) & (sets > 0)).any(1) & ~sets[:, common.diagonal() == 0].any(1)]
    numbers = sets.sum(1)
    values = sets @ (scores - 0.25) + 0.1 * np.log(counts[np.minimum(numbers, len(counts) - 1)] + 0.01)
    values[(numbers == 0) & (len(sets) > 1)] = -np.inf  # a salient object is expected
    labels, best = np.zeros((height, width), np.uint8), np.full((height, width), 0.5, np.float32)
    for number, index in enumerate(np.flatnonzero(sets[values.argmax()]), 1):  # hypotheses are sorted by score
        probability = paste(boxes[index] * (width, height, width, height), masks[index], height, width)
        labels[probability >= best] = number
        best = np.maximum(best, probability)
    return labels


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.path.isfile(sys.argv[1]):
        sys.exit("error: give the file that python export.py --onnx writes, and a photograph")
    network, path = sys.argv[1:]
    picture = cv2.imread(path)
    if picture is None:
        sys.exit(f"error: {path} cannot be read; give a JPEG or PNG file")
    try:
        session = onnxruntime.InferenceSession(network)
    except Exception as error:  # of a file that is no ONNX file, any of onnxruntime's errors
        sys.exit(f"error: {network} cannot be read ({error}); give the file that python export.py --onnx writes")
    labels = instances(session, picture[..., ::-1].copy())
    if not cv2.imwrite(out := os.path.splitext(path)[0] + "_instances.png", labels):
        sys.exit(f"error: cannot write {out}; copy the photograph to a folder that can be written to")
    print(f"{labels.max()} instances")
