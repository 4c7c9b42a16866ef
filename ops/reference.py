"""The operators in plain PyTorch: the reference of the tests and the fallback of the compiled extension.

All maps live on one grid (stride 4 of the network input); points are (y, x), offsets (dy, dx), in pixels of that
grid. No N x N matrix and no tensor with one entry per path pixel is ever allocated. The public functions in
`ops/__init__.py` document and check the arguments.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def path_offsets(radius: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The offsets between pairs of pixels within `radius`, and the pixels on the path of each (Sec. 3.2) [IRN].

    radius: integer >= 1. Returns (offsets, paths): offsets is an int64 array [K, 2] of (dy, dx) in the half plane
    {(0, 1..R-1)} + {(1..R-1, -(R-1)..R-1) : dy^2 + dx^2 < R^2}, row by row; paths[k] is an int64 array [L, 2] of the
    integer points (y, x) in the bounding rectangle of (0, 0) and offsets[k] that lie less than one pixel off the
    straight line, (dy x - dx y)^2 / |d|^2 < 1, both ends included, ordered from (0, 0) to offsets[k].
    34 offsets with 242 path pixels at radius 5, 152 with 2134 at radius 10. The arrays are shared and read-only.
    """
    pairs = [(0, dx) for dx in range(1, radius)]
    pairs += [
        (dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius) if dy * dy + dx * dx < radius * radius
    ]
    paths = []
    for dy, dx in pairs:
        y, x = np.mgrid[: dy + 1, min(dx, 0) : max(dx, 0) + 1].reshape(2, -1)
        path = np.stack([y, x], 1)[(dy * x - dx * y) ** 2 < dy * dy + dx * dx]
        paths.append(path[np.argsort(path @ (dy, dx), kind="stable")])
    offsets = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    for array in (offsets, *paths):
        array.flags.writeable = False
    return offsets, paths


def pair_count(radius: int) -> int:
    """K, the number of offsets in path_offsets(radius), in arithmetic that torch.compile can trace."""
    return radius - 1 + sum(2 * math.isqrt(radius * radius - 1 - dy * dy) + 1 for dy in range(1, radius))


# ---- centroids ---------------------------------------------------------------------------------------------------


def converge_centroids(offsets: Tensor, max_iters: int = 300, tol: float = 1e-3) -> Tensor:
    """See ops.converge_centroids. The iteration continues with the pixels that still move."""
    n, _, height, width = offsets.shape
    device, dtype = offsets.device, offsets.dtype
    field = offsets.detach().permute(0, 2, 3, 1).reshape(-1, 2)
    limit = torch.tensor([height - 1, width - 1], device=device, dtype=dtype)
    grid = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    points = torch.stack(grid, -1).to(dtype).expand(n, height, width, 2).reshape(-1, 2).clone()
    base = torch.arange(n, device=device).repeat_interleave(height * width) * (height * width)
    active = torch.arange(len(points), device=device)
    current = points
    for _ in range(max_iters):
        if not len(active):
            break
        corner = current.floor()
        weight = current - corner
        y0, x0 = corner.long().unbind(1)
        down = torch.where(y0 + 1 < height, width, 0)
        right = torch.where(x0 + 1 < width, 1, 0)
        index = base + y0 * width + x0
        wy, wx = weight[:, :1], weight[:, 1:]
        top, bottom = field[index], field[index + down]
        top = top + wx * (field[index + right] - top)
        bottom = bottom + wx * (field[index + down + right] - bottom)
        move = top + wy * (bottom - top)
        target = torch.minimum((current + move).clamp_min(0), limit)
        target = torch.where(move.isfinite().all(1, keepdim=True), target, current)
        step = target - current
        points[active] = target
        moving = (step[:, 0] * step[:, 0] + step[:, 1] * step[:, 1] >= tol * tol).nonzero().squeeze(1)
        active, base, current = active[moving], base[moving], target[moving]
    return points.reshape(n, height, width, 2).permute(0, 3, 1, 2).contiguous()


# ---- affinity ----------------------------------------------------------------------------------------------------


def _windows(offset: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the pixels p for which p + offset is inside the image, as ranges; may be empty."""
    dy, dx = int(offset[0]), int(offset[1])
    return (0, max(height - dy, 0)), (max(-dx, 0), max(width - max(dx, 0), max(-dx, 0)))


def boundary_affinity_forward(boundary: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Affinity [N, K, H, W] and, uint8, the position on the path of the first pixel that reaches the maximum."""
    n, height, width = boundary.shape
    offsets, paths = path_offsets(radius)
    boundary = torch.where(boundary.isnan(), math.inf, boundary)
    affinity = boundary.new_zeros(n, len(offsets), height, width)
    winner = torch.zeros(affinity.shape, dtype=torch.uint8, device=boundary.device)
    for k, (offset, path) in enumerate(zip(offsets, paths)):
        (top, bottom), (left, right) = _windows(offset, height, width)
        if bottom <= top or right <= left:
            continue
        best = boundary[:, top:bottom, left:right].clone()
        index = torch.zeros(best.shape, dtype=torch.uint8, device=boundary.device)
        for i, (y, x) in enumerate(path.tolist()[1:], 1):
            value = boundary[:, top + y : bottom + y, left + x : right + x]
            # i only grows, so the last improvement has the largest: byte arithmetic is faster than a masked fill.
            torch.maximum(index, (value > best).view(torch.uint8).mul_(i), out=index)
            torch.maximum(best, value, out=best)
        affinity[:, k, top:bottom, left:right] = 1 - best
        winner[:, k, top:bottom, left:right] = index
    return affinity, winner


def boundary_affinity_backward(grad: Tensor, winner: Tensor, radius: int) -> Tensor:
    """Gradient [N, H, W] of the boundary: minus the gradient of each entry, added at the maximum of its path."""
    n, _, height, width = grad.shape
    offsets, paths = path_offsets(radius)
    result = grad.new_zeros(n * height * width)
    start = torch.arange(n * height * width, device=grad.device).reshape(n, height, width)
    for k, (offset, path) in enumerate(zip(offsets, paths)):
        (top, bottom), (left, right) = _windows(offset, height, width)
        if bottom <= top or right <= left:
            continue
        shift = torch.from_numpy(path[:, 0] * width + path[:, 1]).to(grad.device)
        window = (slice(None), slice(top, bottom), slice(left, right))
        index = shift[winner[:, k][window].int()] + start[window]
        result.index_add_(0, index.reshape(-1), grad[:, k][window].reshape(-1), alpha=-1)
    return result.reshape(n, height, width)


class _BoundaryAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boundary, radius):
        affinity, winner = boundary_affinity_forward(boundary, radius)
        ctx.save_for_backward(winner)
        ctx.radius = radius
        return affinity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (winner,) = ctx.saved_tensors
        return boundary_affinity_backward(grad, winner, ctx.radius), None


def boundary_affinity(boundary: Tensor, radius: int) -> Tensor:
    """See ops.boundary_affinity. One running maximum over shifted views per offset."""
    return _BoundaryAffinity.apply(boundary, radius)


# ---- pairs of labelled pixels ------------------------------------------------------------------------------------


def _pairs(labels: Tensor, radius: int) -> Iterator[tuple[int, tuple[int, int], tuple, tuple, Tensor, Tensor]]:
    """For every offset that has pairs: k, the offset, the windows of the first pixels p and of their partners q, and
    for each pair whether its labels are the same and whether they differ; neither where one is NaN (undecided)."""
    height, width = labels.shape[-2:]
    for k, (dy, dx) in enumerate(path_offsets(radius)[0].tolist()):
        (top, bottom), (left, right) = _windows((dy, dx), height, width)
        if bottom <= top or right <= left:
            continue
        p = (..., slice(top, bottom), slice(left, right))
        q = (..., slice(top + dy, bottom + dy), slice(left + dx, right + dx))
        here, there = labels[p], labels[q]
        yield k, (dy, dx), p, q, here == there, (here < there) | (here > there)


def _add(total: Tensor, p: tuple, values: Tensor) -> Tensor:
    """total + values in the window p. Not in place: autograd would copy the whole tensor for every offset."""
    rows, columns = p[1:]
    height, width = total.shape[-2:]
    return total + F.pad(values, (columns.start, width - columns.stop, rows.start, height - rows.stop))


def _zeros(maps: Tensor) -> Tensor:
    """Zeros whose gradient for the maps is 0, so that sums without any pair have a gradient, too."""
    return maps.masked_fill(torch.ones_like(maps, dtype=torch.bool), 0)


class _Once(torch.autograd.Function):
    """The identity, differentiable once."""

    @staticmethod
    def forward(ctx, maps):
        return maps.view_as(maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def pair_counts(labels: Tensor, radius: int) -> Tensor:
    """See ops.pair_counts."""
    n, height, width = labels.shape
    counts = torch.zeros(n, 2, height, width, dtype=torch.int32, device=labels.device)
    for _, _, p, _, same, different in _pairs(labels, radius):
        counts[p] += torch.stack([same, different], 1)
    return counts


def boundary_pair_loss(boundary: Tensor, labels: Tensor, radius: int) -> Tensor:
    """See ops.boundary_pair_loss."""
    affinity, total = boundary_affinity(boundary, radius).unbind(1), torch.stack([_zeros(boundary)] * 2, 1)
    for k, _, p, _, same, different in _pairs(labels, radius):
        a = affinity[k][p]
        factors = torch.stack([torch.where(same, a + 1e-5, 1), torch.where(different, 1 + 1e-5 - a, 1)], 1)
        total = _add(total, p, -torch.log(factors))
    return total


def displacement_pair_loss(offsets: Tensor, labels: Tensor, radius: int) -> Tensor:
    """See ops.displacement_pair_loss."""
    offsets = _Once.apply(offsets)
    total = _zeros(offsets[:, 0])
    for _, step, p, q, same, _ in _pairs(labels, radius):
        expected = (labels[p] > 0)[:, None] * offsets.new_tensor(step).view(1, 2, 1, 1)
        error = torch.where(same[:, None], offsets[p] - offsets[q] - expected, 0)
        total = _add(total, p, error.abs().sum(1))
    return total


# ---- random walk -------------------------------------------------------------------------------------------------


@functools.cache
def chebyshev_coefficients(steps: int, tol: float) -> tuple[float, ...]:
    """Coefficients c_0..c_d of x^steps ~ sum_k c_k T_k(x) on [-1, 1], as few as `tol` allows.

    They are exact: c_k = 2^(1-t) binomial(t, (t-k)/2) for k of the parity of t = steps, half of it for k = 0, 0
    otherwise. They are positive and sum to 1, so the error on the spectrum is at most the sum of the omitted ones,
    which is kept under tol / 50. The factor 50 relates the spectrum to single pixels: for the worst map in [-1, 1] the
    error was up to 47 times the omitted sum (radius 2 to 10, 64 to 256 steps, no boundaries; less with boundaries), on
    ordinary maps about 3 times.
    """
    scale = omitted = 2**steps
    k, binomial = steps % 2, math.comb(steps, steps // 2)
    coefficients = [0.0] * k
    while True:
        term = binomial * (2 if k else 1)
        coefficients.append(term / scale)
        omitted -= term
        if omitted / scale <= tol / 50:
            return tuple(coefficients)
        coefficients.append(0.0)
        below = (steps - k) // 2
        k, binomial = k + 2, binomial * below // (steps - below + 1)


def walk_coefficients(steps: int, method: str, tol: float) -> tuple[float, ...] | None:
    """The coefficients of the series, or None for plain power iteration."""
    if method == "power":
        return None
    coefficients = chebyshev_coefficients(int(steps), float(tol))
    # A term costs a little more than a step, so the series must be clearly shorter.
    return coefficients if method == "chebyshev" or len(coefficients) - 1 < 0.8 * steps else None


def random_walk(
    x: Tensor, affinity: Tensor, radius: int, power: float, steps: int, method: str = "auto", tol: float = 1e-4
) -> Tensor:
    """See ops.random_walk. M = D^-1/2 S D^1/2 with S symmetric, so the weights of one half plane suffice."""
    coefficients = walk_coefficients(steps, method, tol)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for image in range(len(x)):
        result[image] = _walk_image(x[image], affinity[image], radius, power, steps, coefficients)
    return result


def _walk_image(
    x: Tensor, affinity: Tensor, radius: int, power: float, steps: int, coefficients: tuple[float, ...] | None
) -> Tensor:
    channels, height, width = x.shape
    offsets, _ = path_offsets(radius)
    # Rows are padded with radius - 1 columns of zero weight: every shift is then one contiguous range.
    stride = width + radius - 1
    length = height * stride
    weights = affinity.new_zeros(len(offsets), height, stride, dtype=torch.float64)
    for weight, values, offset in zip(weights, affinity, offsets):
        (top, bottom), (left, right) = _windows(offset, height, width)
        weight[top:bottom, left:right] = values[top:bottom, left:right].double() ** power
    shifts = [int(dy) * stride + int(dx) for dy, dx in offsets]
    weights = weights.reshape(len(shifts), length)
    degree = weights.new_ones(length)
    pairs = [(weight[: length - shift], shift) for weight, shift in zip(weights, shifts) if shift < length]
    for weight, shift in pairs:
        degree[: length - shift] += weight
        degree[shift:] += weight
    root = degree.rsqrt()
    pairs = [((weight * root[: length - shift] * root[shift:]).to(x.dtype), shift) for weight, shift in pairs]
    # The diagonal absorbs the rounding of the other weights, so that constant maps stay constant.
    centre = degree.sqrt()
    for weight, shift in pairs:
        centre[: length - shift] -= weight / root[shift:]
        centre[shift:] -= weight / root[: length - shift]
    centre = (centre * root).to(x.dtype)
    root = root.to(x.dtype)

    def apply(v: Tensor) -> Tensor:
        # Summed in groups, the diagonal last: one long float32 sum would round the same way at every step and drift.
        out = torch.zeros_like(v)
        for group in range(0, len(pairs), radius):
            part = torch.zeros_like(v)
            for weight, shift in pairs[group : group + radius]:
                part[:, : length - shift].addcmul_(v[:, shift:], weight)
                part[:, shift:].addcmul_(v[:, : length - shift], weight)
            out += part
        out.addcmul_(v, centre)
        out.view(channels, height, stride)[:, :, width:] = 0  # a weight of 0 does not stop NaN
        return out

    v = x.new_zeros(channels, height, stride)
    v[:, :, :width] = x
    v = v.reshape(channels, length) / root
    if coefficients is None:
        for _ in range(steps):
            v = apply(v)
    else:
        v = _chebyshev(apply, v, coefficients)
    return (v * root).reshape(channels, height, stride)[:, :, :width]


def _chebyshev(apply: Callable[[Tensor], Tensor], v: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """sum_k c_k T_k(S) v by the three-term recurrence T_k+1 = 2 S T_k - T_k-1."""
    total = v * coefficients[0]
    before = now = v
    for k, coefficient in enumerate(coefficients[1:], 1):
        step = apply(now)
        before, now = now, step if k == 1 else step.mul_(2).sub_(before)
        if coefficient:
            total.add_(now, alpha=coefficient)
    return total
