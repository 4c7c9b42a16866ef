"""The dense CRF that aligns coarse maps with the image (Sec. 4.1; Kraehenbuehl and Koltun, 2011)."""

import numpy as np
import pydensecrf.densecrf as dcrf

W1, SIGMA_ALPHA, SIGMA_BETA = 4.0, 49.0, 5.0  # bilateral kernel: weight, pixels, grey levels
W2, SIGMA_GAMMA = 3.0, 3.0  # smoothness kernel: weight, pixels
ITERATIONS = 10
PAPER_SIZE = 512  # the sigmas in pixels are those of a 512x512 image and are scaled for other sizes


def crf(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Refine label probabilities with the image.

    image: uint8 RGB [H,W,3]; probabilities: [L,H,W], positive. Returns float32 [L,H,W] that sums to 1 over L.
    """
    height, width = image.shape[:2]
    labels = len(probabilities)
    scale = max(height, width) / PAPER_SIZE
    unary = -np.log(np.clip(probabilities, 1e-4, 1)).reshape(labels, -1).astype(np.float32)
    model = dcrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(unary))
    model.addPairwiseGaussian(sxy=SIGMA_GAMMA * scale, compat=W2)
    model.addPairwiseBilateral(sxy=SIGMA_ALPHA * scale, srgb=SIGMA_BETA, rgbim=np.ascontiguousarray(image), compat=W1)
    return np.array(model.inference(ITERATIONS), dtype=np.float32).reshape(labels, height, width)


def refine_saliency(image: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Refine a foreground probability: float [H,W] in 0..1 -> float32 [H,W] in 0..1. image: uint8 RGB [H,W,3]."""
    return crf(image, np.stack([1 - foreground, foreground]))[1]


def refine_labels(image: np.ndarray, labels: np.ndarray, count: int, confidence: float = 0.7) -> np.ndarray:
    """Refine a label map: int [H,W] in 0..count-1 -> int64 [H,W] in the same range. image: uint8 RGB [H,W,3].

    confidence: the probability that each label is given before the CRF [IRN].
    """
    if count < 2:
        return np.zeros(labels.shape, np.int64)
    one_hot = np.arange(count)[:, None, None] == labels
    return crf(image, np.where(one_hot, confidence, (1 - confidence) / (count - 1))).argmax(0)
