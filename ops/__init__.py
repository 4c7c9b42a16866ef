"""Operators on the stride-4 grid: converged centroids, boundary affinities, pair losses, random walk.

They run compiled (`ops/csrc`) on CPU and CUDA. Where the extension is not built, `ops.reference` computes the same on
the CPU in plain PyTorch, after one warning; a CUDA tensor without CUDA kernels raises a RuntimeError with the remedy.

All maps live on the same grid, stride 4 of the network input; offsets are (dy, dx) and points (y, x) in its pixels.
"""

import functools
import math
import numbers
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import compiled, reference
from .reference import path_offsets

__all__ = [
    "boundary_pair_loss",
    "boundary_affinity",
    "converge_centroids",
    "displacement_pair_loss",
    "pair_counts",
    "path_offsets",
    "random_walk",
]


def _check(name: str, tensor: Any, dims: int, channels: int | None = None) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() != dims:
        raise ValueError(f"{name} must be a tensor with {dims} dimensions, not {_shape(tensor)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, not {tensor.dtype}")
    if channels is not None and tensor.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, not {_shape(tensor)}")
    _check_storage(name, tensor)


def _check_storage(name: str, tensor: Tensor) -> None:
    """Pixel indices are 32-bit on CUDA, and coordinates must be exact in float32."""
    height, width = tensor.shape[-2:]
    if max(height, width) > 2**24 or height * width > 2**30:
        raise ValueError(f"{name} may have 2^24 rows, 2^24 columns and 2^30 pixels a map at most, not {_shape(tensor)}")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(f"{name} must be a dense tensor that holds values, not {tensor.layout} on {tensor.device}")


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _whole(name: str, value: Any, least: int, most: int) -> int:
    number: Any = value if isinstance(value, numbers.Real) else math.nan
    if not least <= number <= most or number != int(number):
        raise ValueError(f"{name} must be an integer in {least}..{most}, not {value}")
    return int(number)


def _positive(name: str, value: Any) -> float:
    number: Any = value if isinstance(value, numbers.Real) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a number above 0, not {value}")
    return float(number)


def _check_radius(radius: Any) -> int:
    return _whole("radius", radius, 1, 64)


def _full_precision(*tensors: Any) -> list[Any]:
    """Half precision, as under autocast, is computed in float32: coordinates and high powers need it."""
    half = (torch.float16, torch.bfloat16)
    return [t.float() if isinstance(t, Tensor) and t.dtype in half else t for t in tensors]


@functools.cache
def _warn_not_built() -> None:
    warnings.warn(
        f"the compiled operators cannot be used ({compiled.reason}); the slower PyTorch versions stand in. "
        f"To build them: {compiled.BUILD}",
        RuntimeWarning,
        stacklevel=4,
    )


def _implementation(tensor: Tensor) -> ModuleType:
    """The module that computes on this tensor's device; RuntimeError where there is none."""
    device = tensor.device.type
    if compiled.has_kernels(device):
        return compiled
    if device == "cuda":
        raise RuntimeError(
            "the operators have no CUDA kernels here: build them with a CUDA toolkit and a CUDA build of PyTorch, "
            f"FORCE_CUDA=1 {compiled.BUILD}, or compute on the CPU"
        )
    if not compiled.available:
        _warn_not_built()
    return reference


def converge_centroids(offsets: Tensor, max_iters: int = 300, tol: float = 1e-3) -> Tensor:
    """The point that each pixel converges to in the offset field (Eq. 1, Sec. 3.1).

    c_0 = p, then c <- clip(c + V(c)) with V sampled bilinearly from the fixed field. A pixel stops after the first move
    shorter than `tol` (that move is still made), or after `max_iters` moves.

    offsets: float32 or float64 [N, 2, H, W], (dy, dx) in grid pixels, any N, H, W including 0; half precision is
        computed in float32.
    max_iters: maximal number of moves, integer >= 0. tol: length in grid pixels, >= 0.
    Returns the points (y, x) as [N, 2, H, W], in 0..H-1 and 0..W-1; no gradient. A pixel stops before a move that is
    NaN or infinite.
    Raises ValueError for another shape, type or number.
    """
    (offsets,) = _full_precision(offsets)
    _check("offsets", offsets, 4, channels=2)
    max_iters = _whole("max_iters", max_iters, 0, 2**31 - 1)
    tol = float(tol) if isinstance(tol, numbers.Real) and tol == 0 else _positive("tol", tol)
    return _implementation(offsets).converge_centroids(offsets.detach(), max_iters, tol)


def boundary_affinity(boundary: Tensor, radius: int) -> Tensor:
    """Affinity of each pixel to its neighbours: a(p, q) = 1 - max of B over the path from p to q (Sec. 3.2).

    boundary: float32 or float64 [N, H, W], boundary strength, normally 0..1; half precision is computed in float32.
    radius: integer 1..64; neighbours are less than this many grid pixels away.
    Returns [N, K, H, W] for the K offsets of `path_offsets(radius)`: entry k at pixel p belongs to the pair
    (p, p + offsets[k]), in 0..1 for boundaries in 0..1, and is 0 where p + offsets[k] is outside the image.
    Differentiable once: the gradient goes to the pixel that holds the maximum, the first on the path where several
    do. NaN counts as +infinity: every path that crosses it has affinity -infinity.
    Raises ValueError for another shape, type or radius.
    """
    (boundary,) = _full_precision(boundary)
    _check("boundary", boundary, 3)
    return _implementation(boundary).boundary_affinity(boundary, _check_radius(radius))


def _pair_labels(labels: Any, ignore_index: int, dtype: torch.dtype, of: Tensor | None = None) -> Tensor:
    """The labels in the precision of the map ``of``, if given, which they must fit; NaN where undecided."""
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dim() != 3:
        raise ValueError(f"labels must be a tensor of integers [N, H, W], not {_shape(labels)}")
    _check_storage("labels", labels)
    if of is not None and (labels.shape != of.shape[:1] + of.shape[-2:] or labels.device != of.device):
        raise ValueError(f"labels {_shape(labels)} and the map {_shape(of)} must agree in images, size and device")
    return torch.where(labels == ignore_index, torch.nan, labels.to(dtype))


def pair_counts(labels: Tensor, radius: int, ignore_index: int = 255) -> Tensor:
    """The number of pairs of ``boundary_affinity`` whose first pixel is p, with the same and with different labels.

    labels: integers [N, H, W], 0 background, 1 and more foreground (up to 2^24), ``ignore_index`` undecided; pairs with
        an undecided pixel are not counted (Sec. 4.2).
    radius: integer 1..64.
    Returns int32 [N, 2, H, W]: same, different.
    Raises ValueError for another shape, type or radius.
    """
    labels = _pair_labels(labels, ignore_index, torch.float32)
    return _implementation(labels).pair_counts(labels, _check_radius(radius))


def boundary_pair_loss(boundary: Tensor, labels: Tensor, radius: int, ignore_index: int = 255) -> Tensor:
    """The cross entropy of the affinities of labelled pairs, summed at the first pixel of each pair (L_B) [IRN].

    boundary: as for ``boundary_affinity``, in 0..1. labels, radius, ignore_index: as for ``pair_counts``.
    Returns [N, 2, H, W], with a = a(p, q): the sum of -log(a + 1e-5) over the pairs with the same label, and of
    -log(1 + 1e-5 - a) over those with different labels; NaN where a logarithm does not exist. Differentiable once in
    the boundary, as the affinity. Nothing is stored per pair, forward or backward.
    Raises ValueError for another shape, type or radius.
    """
    (boundary,) = _full_precision(boundary)
    _check("boundary", boundary, 3)
    labels = _pair_labels(labels, ignore_index, boundary.dtype, boundary)
    return _implementation(boundary).boundary_pair_loss(boundary, labels, _check_radius(radius))


def displacement_pair_loss(offsets: Tensor, labels: Tensor, radius: int, ignore_index: int = 255) -> Tensor:
    """The displacement error of pairs with the same label, summed at the first pixel of each pair (L_V) [IRN].

    offsets: V [N, 2, H, W], as for ``converge_centroids``. labels, radius, ignore_index: as for ``pair_counts``.
    Returns [N, H, W], in grid pixels: the sum of |V(p) - V(q) - (q - p)|_1 in the foreground, where both pixels should
    point to the same centroid, and of |V(p) - V(q)|_1 in the background. Differentiable once in the offsets; nothing is
    stored per pair.
    Raises ValueError for another shape, type or radius.
    """
    (offsets,) = _full_precision(offsets)
    _check("offsets", offsets, 4, channels=2)
    labels = _pair_labels(labels, ignore_index, offsets.dtype, offsets)
    return _implementation(offsets).displacement_pair_loss(offsets, labels, _check_radius(radius))


def random_walk(
    x: Tensor, affinity: Tensor, radius: int, power: float, steps: int, method: str = "auto", tol: float = 1e-4
) -> Tensor:
    """Propagate maps by random walks on the affinity graph: M^steps x (Eq. 9, 10, Sec. 4.2).

    M = D^-1 H^power: H is the symmetric affinity of `boundary_affinity`, 1 on the diagonal, 0 outside the image,
    raised element by element; D holds the row sums. The rows of M sum to 1, so constant maps stay constant.

    x: float32 or float64 [N, C, H, W], one map per instance, any values; any N, C, H, W including 0.
    affinity: [N, K, H, W] of the same radius and precision, in 0..1. radius: as given to `boundary_affinity`.
    power: > 0. steps: integer in 0..10^5.
    method: "power" applies M step by step; "chebyshev" evaluates the same power as a Chebyshev series in the
        symmetric matrix similar to M, whose degree is about sqrt(steps); "auto" takes the cheaper one.
    tol: error of the series: at most tol x the norm of x in the root mean square weighted with D, and in practice at
        any pixel, relative to max |x|; float rounding is added to it.
    Returns [N, C, H, W]; no gradient. NaN and infinity spread to the pixels that the walk reaches from them.
    Raises ValueError for other shapes or types, numbers out of range or an unknown method.
    """
    x, affinity = _full_precision(x, affinity)
    _check("x", x, 4)
    radius = _check_radius(radius)
    _check("affinity", affinity, 4, channels=reference.pair_count(radius))
    if affinity.shape[0] != x.shape[0] or affinity.shape[2:] != x.shape[2:]:
        raise ValueError(f"x {_shape(x)} and affinity {_shape(affinity)} must agree in images, height and width")
    if affinity.dtype != x.dtype or affinity.device != x.device:
        raise ValueError("x and affinity must have the same precision and live on the same device")
    if method not in ("auto", "power", "chebyshev"):
        raise ValueError(f"method must be auto, power or chebyshev, not {method}")
    steps, power, tol = _whole("steps", steps, 0, 10**5), _positive("power", power), _positive("tol", tol)
    return _implementation(x).random_walk(x.detach(), affinity.detach(), radius, power, steps, method, tol)
