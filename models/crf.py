"""The dense CRF that aligns coarse maps with the image (Sec. 4.1; Kraehenbuehl and Koltun, 2011)."""

import cv2
import numpy as np
import pydensecrf.densecrf as dcrf

# Of pseudo labels (Sec. 4.1).
W1, SIGMA_ALPHA, SIGMA_BETA = 4.0, 49.0, 5.0  # bilateral kernel: weight, pixels, grey levels
W2, SIGMA_GAMMA = 3.0, 3.0  # smoothness kernel: weight, pixels
ITERATIONS = 10
PAPER_SIZE = 512  # the sigmas in pixels are those of a 512x512 image and are scaled for other sizes
# Of the masks of a student network, chosen on val: the bilateral kernel's weight, fraction of the window's side and
# grey levels; pixels of the Gaussian.
MASK_WEIGHT, MASK_SIGMA_ALPHA, MASK_SIGMA_BETA, MASK_SIGMA_GAMMA = 8.0, 0.4, 10.0, 1.2


def crf(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Refine label probabilities with the image.

    image: uint8 RGB [H,W,3]; probabilities: [L,H,W], positive. Returns float32 [L,H,W] that sums to 1 over L.
    """
    scale = max(image.shape[:2]) / PAPER_SIZE
    bilateral, smoothness = (W1, SIGMA_ALPHA * scale, SIGMA_BETA), (W2, SIGMA_GAMMA * scale)
    return _mean_field(image, np.clip(probabilities, 1e-4, 1), bilateral, smoothness, ITERATIONS)


def _mean_field(
    image: np.ndarray,
    probabilities: np.ndarray,
    bilateral: tuple[float, float, float],
    smoothness: tuple[float, float] | None,
    iterations: int,
) -> np.ndarray:
    """The CRF with these kernels, as above, for probabilities above 0."""
    labels, height, width = probabilities.shape
    model = dcrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities).reshape(labels, -1), np.float32))
    if smoothness:
        weight, gamma = smoothness
        model.addPairwiseGaussian(sxy=gamma, compat=weight)
    weight, alpha, beta = bilateral
    model.addPairwiseBilateral(sxy=alpha, srgb=beta, rgbim=np.ascontiguousarray(image), compat=weight)
    return np.array(model.inference(iterations), dtype=np.float32).reshape(probabilities.shape)


def refine_mask(image: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Align the mask of one instance with the image: float [H,W] in 0..1 -> float32 [H,W] in 0..1 [ours].

    One mean-field iteration, which compares each pixel with all those of similar colour, and a Gaussian, which removes
    the specks. image: uint8 RGB [H,W,3], the window around the instance.
    """
    bilateral = MASK_WEIGHT, MASK_SIGMA_ALPHA * max(image.shape[:2]), MASK_SIGMA_BETA
    probabilities = np.clip(np.stack([1 - probability, probability]), 0.02, 0.98)
    return cv2.GaussianBlur(_mean_field(image, probabilities, bilateral, None, 1)[1], (0, 0), MASK_SIGMA_GAMMA)


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
