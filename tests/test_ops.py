"""The operators against dense float64 algebra and brute-force loops on small maps, and their documented properties."""

import math
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

import ops
from ops import compiled, reference


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs on both implementations, through the same public functions."""
    if request.param == "compiled" and not compiled.available:
        pytest.skip("the compiled operators are not built")
    if request.param == "reference":
        monkeypatch.setattr(compiled, "has_kernels", lambda device_type: False)
        monkeypatch.setattr(ops, "_warn_not_built", lambda: None)
    return request.param


def brute_affinity(boundary, radius):
    """[H, W] -> [K, H, W], one Python loop per entry; the path is derived from its definition."""
    height, width = boundary.shape
    offsets = [(0, dx) for dx in range(1, radius)]
    offsets += [(dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius) if dy**2 + dx**2 < radius**2]
    values = boundary.tolist()
    largest = torch.ones(len(offsets), height, width, dtype=boundary.dtype)
    for k, (dy, dx) in enumerate(offsets):
        path = [
            (y, x)
            for y in range(dy + 1)
            for x in range(min(0, dx), max(0, dx) + 1)
            if (dy * x - dx * y) ** 2 / (dy**2 + dx**2) < 1
        ]
        for py in range(height - dy):
            for px in range(max(0, -dx), width - max(0, dx)):
                largest[k, py, px] = max(values[py + y][px + x] for y, x in path)
    return 1 - largest


def dense_transition(affinity, radius, power):
    """[K, H, W] -> M [HW, HW] in float64."""
    _, height, width = affinity.shape
    h = torch.eye(height * width, dtype=torch.float64).numpy()
    affinity = affinity.double().numpy() ** power
    for k, (dy, dx) in enumerate(ops.path_offsets(radius)[0].tolist()):
        for py in range(height - dy):
            for px in range(max(0, -dx), width - max(0, dx)):
                p, q = py * width + px, (py + dy) * width + px + dx
                h[p, q] = h[q, p] = affinity[k, py, px]
    return torch.from_numpy(h / h.sum(1, keepdims=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)


def centre_field(height, width, centre, dtype=torch.float32):
    """V = c - p, as [1, 2, H, W]."""
    y, x = torch.meshgrid(torch.arange(height, dtype=dtype), torch.arange(width, dtype=dtype), indexing="ij")
    return torch.stack([centre[0] - y, centre[1] - x])[None]


# ---- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius, count, pixels", [(5, 34, 242), (10, 152, 2134), (1, 0, 0)])
def test_path_counts(radius, count, pixels):
    offsets, paths = ops.path_offsets(radius)
    assert offsets.shape == (count, 2) and sum(map(len, paths)) == pixels
    assert reference.pair_count(radius) == count


def test_path_order_and_ends():
    offsets, paths = ops.path_offsets(5)
    assert offsets[:5].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [1, -4]]
    for offset, path in zip(offsets, paths):
        assert path[0].tolist() == [0, 0] and (path[-1] == offset).all()
        assert len({tuple(p) for p in path.tolist()}) == len(path)


# ---- centroids ---------------------------------------------------------------------------------------------------


def brute_centroid(field, y, x, max_iters, tol):
    """One pixel of [2, H, W], in Python floats."""
    _, height, width = field.shape
    for _ in range(max_iters):
        y0, x0 = math.floor(y), math.floor(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        wy, wx = y - y0, x - x0
        move = (1 - wy) * ((1 - wx) * field[:, y0, x0] + wx * field[:, y0, x1])
        move += wy * ((1 - wx) * field[:, y1, x0] + wx * field[:, y1, x1])
        ny, nx = min(max(y + move[0].item(), 0), height - 1), min(max(x + move[1].item(), 0), width - 1)
        moved = math.hypot(ny - y, nx - x)
        y, x = ny, nx
        if moved < tol:
            break
    return y, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centre", [(3, 5), (0, 0), (10.5, 2.25)])
def test_pointing_field_converges_exactly(dtype, centre):
    points = ops.converge_centroids(centre_field(12, 17, centre, dtype))
    assert points.dtype == dtype
    assert torch.equal(points[0], torch.tensor(centre, dtype=dtype)[:, None, None].expand(2, 12, 17))


def test_centroids_against_loop():
    field = torch.randn(2, 2, 9, 11, generator=generator(), dtype=torch.float64)
    for iterations in (0, 1, 7):
        points = ops.converge_centroids(field, max_iters=iterations)
        for n in range(2):
            for y in range(9):
                for x in range(11):
                    expected = brute_centroid(field[n], y, x, iterations, 1e-3)
                    assert points[n, :, y, x].tolist() == pytest.approx(expected, abs=1e-9)


def test_centroids_stop_after_a_short_move():
    """A steady drift of 0.5: with tol above it one move is made, with tol below it the border stops it."""
    field = torch.zeros(1, 2, 4, 20)
    field[:, 1] = 0.5
    columns = torch.arange(20.0).expand(4, 20)
    assert torch.equal(ops.converge_centroids(field, tol=0.6)[0, 1], (columns + 0.5).clamp(max=19))
    assert torch.equal(ops.converge_centroids(field, tol=0.4)[0, 1], torch.full((4, 20), 19.0))
    assert torch.equal(ops.converge_centroids(field, max_iters=4, tol=0.4)[0, 1], (columns + 2).clamp(max=19))


def test_centroids_stay_inside_and_skip_moves_that_are_not_finite():
    field = torch.full((1, 2, 6, 7), 1e30)
    assert torch.equal(ops.converge_centroids(field)[0].amax((1, 2)), torch.tensor([5.0, 6.0]))
    assert torch.equal(ops.converge_centroids(-field)[0].amax((1, 2)), torch.zeros(2))
    still = ops.converge_centroids(torch.zeros(1, 2, 6, 7))
    for value in (math.nan, math.inf, -math.inf):
        assert torch.equal(ops.converge_centroids(torch.full((1, 2, 6, 7), value)), still)
        mixed = torch.zeros(1, 2, 6, 7)
        mixed[0, 0, 2, 3] = value
        assert torch.equal(ops.converge_centroids(mixed), still)


# ---- affinity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "radius, height, width", [(5, 9, 12), (10, 11, 12), (5, 3, 4), (10, 1, 20), (5, 20, 1), (1, 3, 3)]
)
def test_affinity_against_loop(radius, height, width):
    boundary = rand(2, height, width)
    affinity = ops.boundary_affinity(boundary, radius)
    for n in range(2):
        assert torch.equal(affinity[n], brute_affinity(boundary[n], radius))
    single = ops.boundary_affinity(boundary.float(), radius)
    assert torch.equal(single, torch.stack([brute_affinity(b.float(), radius) for b in boundary]))


@pytest.mark.parametrize("radius, height, width, fast", [(5, 6, 7, True), (10, 5, 11, True), (3, 2, 4, False)])
def test_affinity_gradcheck(radius, height, width, fast):
    # A shuffled ramp keeps all values further apart than gradcheck's step.
    order = torch.randperm(2 * height * width, generator=generator()).double().reshape(2, height, width)
    boundary = (order / order.numel()).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: ops.boundary_affinity(b, radius), boundary, fast_mode=fast)


def test_affinity_gradient_of_ties_goes_to_the_first_on_the_path():
    boundary = torch.full((1, 4, 6), 0.5, dtype=torch.float64, requires_grad=True)
    affinity = ops.boundary_affinity(boundary, 5)
    affinity.sum().backward()
    inside = torch.ones(1, 4, 6, dtype=torch.float64)
    inside = ops.boundary_affinity(inside * 0, 5).sum(1)  # number of partners of each pixel
    assert torch.equal(boundary.grad, -inside)


def test_affinity_nan_counts_as_infinity():
    boundary = torch.zeros(1, 3, 9)
    boundary[0, 0, 4] = math.nan
    affinity = ops.boundary_affinity(boundary, 3)
    row = affinity[0, 1, 0]  # offset (0, 2)
    assert row.tolist() == [1, 1, -math.inf, -math.inf, -math.inf, 1, 1, 0, 0]


def test_affinity_flip_equivariance():
    """Mirrored left to right, the pair (p, p + (dy, dx)) becomes (p', p' + (dy, -dx))."""
    radius, boundary = 5, rand(1, 8, 10)
    offsets = ops.path_offsets(radius)[0].tolist()
    plain, flipped = ops.boundary_affinity(boundary, radius)[0], ops.boundary_affinity(boundary.flip(2), radius)[0]
    for k, (dy, dx) in enumerate(offsets):
        if dy:
            assert torch.equal(flipped[offsets.index([dy, -dx])], plain[k].flip(1))
        else:
            assert torch.equal(flipped[k][:, : 10 - dx], plain[k][:, : 10 - dx].flip(1))


# ---- pairs of labelled pixels ------------------------------------------------------------------------------------


def some_labels(n, height, width):
    return torch.tensor([0, 0, 1, 2, 255])[torch.randint(0, 5, (n, height, width), generator=generator())]


def brute_pairs(labels, radius):
    """(image, p, q, same) of every pair of decided pixels."""
    for n, y, x in (labels != 255).nonzero().tolist():
        for dy, dx in ops.path_offsets(radius)[0].tolist():
            v, u = y + dy, x + dx
            if v < labels.shape[1] and 0 <= u < labels.shape[2] and labels[n, v, u] != 255:
                yield n, (y, x), (v, u), bool(labels[n, y, x] == labels[n, v, u])


PAIR_SIZES = pytest.mark.parametrize(
    "radius, height, width", [(5, 7, 18), (10, 4, 12), (12, 12, 9), (5, 1, 20), (5, 20, 1), (1, 3, 3)]
)


@PAIR_SIZES
def test_pairs_against_loop(radius, height, width):
    labels, boundary = some_labels(2, height, width), rand(2, height, width)
    field = torch.randn(2, 2, height, width, generator=generator(), dtype=torch.float64) * 3
    affinity = torch.stack([brute_affinity(b, radius) for b in boundary])
    k_of = {tuple(d): k for k, d in enumerate(ops.path_offsets(radius)[0].tolist())}
    counts = torch.zeros(2, 2, height, width, dtype=torch.int32)
    cross_entropy = torch.zeros(counts.shape, dtype=torch.float64)
    error = torch.zeros(labels.shape, dtype=torch.float64)
    for n, p, q, same in brute_pairs(labels, radius):
        step = torch.tensor([q[0] - p[0], q[1] - p[1]])
        a = affinity[n, k_of[tuple(step.tolist())], p[0], p[1]]
        here = (n, int(not same), *p)
        counts[here] += 1
        cross_entropy[here] -= math.log(a + 1e-5 if same else 1 + 1e-5 - a)
        if same:
            difference = field[n, :, p[0], p[1]] - field[n, :, q[0], q[1]] - step * int(labels[n, p[0], p[1]] > 0)
            error[n, p[0], p[1]] += difference.abs().sum()
    assert torch.equal(ops.pair_counts(labels, radius), counts) and (counts.any() or radius == 1)
    assert torch.allclose(ops.boundary_pair_loss(boundary, labels, radius), cross_entropy, atol=1e-9)
    assert torch.allclose(ops.displacement_pair_loss(field, labels, radius), error, atol=1e-9)
    single = ops.boundary_pair_loss(boundary.float(), labels, radius)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), cross_entropy, rtol=1e-4, atol=1e-3)
    assert torch.allclose(
        ops.displacement_pair_loss(field.float(), labels, radius).double(), error, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "radius, height, width",
    [(12, 24, 24), (14, 14, 6), (14, 6, 14), (26, 16, 16), (40, 3, 20), (64, 1, 70), (64, 70, 1)],
)
def test_pairs_survive_products_of_many_small_factors(radius, height, width, dtype):
    """Every factor has its least value, on maps narrower than the radius, too."""
    labels, walls = torch.ones(1, height, width, dtype=torch.int64), torch.ones(1, height, width, dtype=dtype)
    same, different = ops.boundary_pair_loss(walls, labels, radius).unbind(1)
    expected = ops.pair_counts(labels, radius)[:, 0] * -math.log(1e-5)
    assert torch.allclose(same, expected.to(dtype), rtol=1e-5) and not different.any()
    labels[0, ::2, ::3] = 2
    different = ops.boundary_pair_loss(0 * walls, labels, radius)[:, 1]
    expected = ops.pair_counts(labels, radius)[:, 1] * -math.log(1e-5)
    assert torch.allclose(different, expected.to(dtype), rtol=1e-2) and different.any(), "1 + 1e-5 in float32"


@pytest.mark.parametrize("radius, height, width, fast", [(5, 6, 7, True), (10, 5, 11, True), (3, 3, 4, False)])
def test_pairs_gradcheck(radius, height, width, fast):
    labels = some_labels(2, height, width)
    order = torch.randperm(labels.numel(), generator=generator()).double().reshape(labels.shape)
    boundary = ((order + 0.5) / order.numel()).requires_grad_()
    field = (3 * torch.randn(2, 2, height, width, generator=generator(), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: ops.boundary_pair_loss(b, labels, radius), boundary, fast_mode=fast)
    assert torch.autograd.gradcheck(lambda v: ops.displacement_pair_loss(v, labels, radius), field, fast_mode=fast)


def test_pairs_of_undecided_pixels_contribute_nothing():
    labels = torch.full((1, 8, 8), 7)
    field, boundary = torch.randn(1, 2, 8, 8, requires_grad=True), rand(1, 8, 8).requires_grad_()
    total = ops.displacement_pair_loss(field, labels, 3, ignore_index=7).sum()
    total = total + ops.boundary_pair_loss(boundary, labels, 3, ignore_index=7).sum()
    total.backward()
    assert total == 0 and not field.grad.any() and not boundary.grad.any()
    assert not ops.pair_counts(labels, 3, ignore_index=7).any() and ops.pair_counts(labels, 3).any()


def test_pair_losses_of_nan_are_nan():
    labels = torch.ones(1, 8, 9, dtype=torch.int64)
    boundary, field = rand(1, 8, 9), torch.randn(1, 2, 8, 9, generator=generator())
    boundary[0, 4, 4] = field[0, 1, 4, 4] = math.nan
    for found in (ops.boundary_pair_loss(boundary, labels, 3)[0, 0], ops.displacement_pair_loss(field, labels, 3)[0]):
        assert found[4, 4].isnan() and found[3, 4].isnan() and found[7].isfinite().all()


def test_pair_losses_are_exact_for_boundaries_outside_0_to_1():
    labels = torch.ones(1, 12, 12, dtype=torch.int64)
    for value, logarithm in ((-1e30, math.log(1e30)), (-1e-30, math.log(1 + 1e-5)), (-math.inf, math.inf)):
        same = ops.boundary_pair_loss(torch.full((1, 12, 12), value), labels, 10)[:, 0]
        counts = ops.pair_counts(labels, 10)[:, 0]
        assert torch.allclose(same[counts > 0], -counts[counts > 0] * logarithm, rtol=1e-2)
    boundary = torch.full((1, 12, 12), 1.00001, dtype=torch.float64).nextafter(torch.zeros(()).double())
    assert ops.boundary_pair_loss(boundary, labels, 10).isfinite().all(), "factors of 1e-16"


def test_pixels_without_pairs_have_a_gradient_of_zero():
    for radius, side in ((1, 4), (5, 1)):
        boundary, field = rand(1, side, side).requires_grad_(), rand(1, 2, side, side).requires_grad_()
        labels = torch.ones(1, side, side, dtype=torch.int64)
        total = ops.displacement_pair_loss(field, labels, radius).sum()
        total = total + ops.boundary_pair_loss(boundary, labels, radius).sum()
        total.backward()
        assert total == 0 and not boundary.grad.any() and not field.grad.any()


def test_operators_are_differentiable_once():
    labels = some_labels(1, 7, 8)
    for of, maps in (
        (lambda b: ops.boundary_affinity(b, 4), rand(1, 7, 8)),
        (lambda b: ops.boundary_pair_loss(b, labels, 4), rand(1, 7, 8)),
        (lambda v: ops.displacement_pair_loss(v, labels, 4), rand(1, 2, 7, 8)),
    ):
        for reduce in (torch.sum, lambda result: result.square().sum()):
            leaf = maps.clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                (grad,) = torch.autograd.grad(reduce(of(leaf)), leaf, create_graph=True)
                assert grad.any()
                with pytest.raises(RuntimeError, match="once|twice|does not require grad"):
                    grad.square().sum().backward()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not (torch.cuda.is_available() and compiled.has_kernels("cuda")), reason="no GPU, or built without CUDA"
            ),
        ),
    ],
)
def test_deterministic_gradients_are_reproducible(device, implementation):
    if implementation == "reference" and device == "cuda":
        pytest.skip("the public functions compute the reference on the CPU alone")
    labels, found = some_labels(4, 60, 70), []
    boundary = rand(4, 60, 70, dtype=torch.float32).round(decimals=1)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            leaf = boundary.to(device).requires_grad_()
            affinity = ops.boundary_affinity(leaf, 10)
            weight = torch.randn(affinity.shape, generator=generator()).to(device)
            sums = ops.boundary_pair_loss(leaf, labels.to(device), 10)
            found.append(
                [torch.autograd.grad(of, leaf, by)[0].cpu() for of, by in ((affinity, weight), (sums, weight[:, :2]))]
            )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other))
    leaf = boundary.requires_grad_()
    undecided = torch.where(labels == 255, torch.nan, labels.float())
    plain = reference.boundary_affinity(leaf, 10), reference.boundary_pair_loss(leaf, undecided, 10)
    for grad, of, by in zip(found[0], plain, (weight, weight[:, :2])):
        expected = torch.autograd.grad(of, leaf, by.cpu())[0]
        assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_pair_losses_store_nothing_per_pair(implementation):
    if implementation == "reference":
        pytest.skip("the reference computes affinities")
    labels, saved = some_labels(2, 30, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.boundary_pair_loss(rand(2, 30, 40).requires_grad_(), labels, 10)
        ops.displacement_pair_loss(rand(2, 2, 30, 40).requires_grad_(), labels, 10)
    assert sum(t.numel() for t in saved) == 5 * labels.numel(), "the two maps and, twice, the labels"


# ---- random walk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "power", "chebyshev"])
@pytest.mark.parametrize(
    "radius, height, width", [(5, 12, 14), (3, 9, 9), (5, 3, 2), (10, 6, 13), (1, 4, 4), (5, 1, 1)]
)
def test_walk_against_dense(method, radius, height, width):
    affinity = ops.boundary_affinity(rand(2, height, width, dtype=torch.float32) ** 3, radius)
    x = rand(2, 3, height, width, seed=1, dtype=torch.float32)
    transitions = [dense_transition(a, radius, 10) for a in affinity]
    for steps in (0, 1, 5, 256):
        expected = [torch.linalg.matrix_power(m, steps) @ maps.double().flatten(1).T for m, maps in zip(transitions, x)]
        expected = torch.stack([e.T.reshape(3, height, width) for e in expected])
        result = ops.random_walk(x.double(), affinity.double(), radius, 10, steps, method=method)
        assert (result - expected).abs().max() < (1e-11 if method == "power" else 1e-4)
        single = ops.random_walk(x, affinity, radius, 10, steps, method=method)
        assert (single.double() - expected).abs().max() < (2e-5 if method == "power" else 1e-4)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8, 1e-12])
def test_chebyshev_keeps_its_bound(tol):
    """For any map: the row sums of the absolute error matrix are the errors of the worst maps in [-1, 1]."""
    radius, side, steps = 5, 11, 100
    empty, weak, cells = torch.zeros(1, side, side).double(), rand(1, side, side) * 0.5, rand(1, side, side).round()
    for boundary in (empty, weak, cells):
        affinity = ops.boundary_affinity(boundary, radius)
        unit = torch.eye(side * side, dtype=torch.float64).reshape(1, -1, side, side)
        exact = torch.linalg.matrix_power(dense_transition(affinity[0], radius, 10), steps)
        series = ops.random_walk(unit, affinity, radius, 10, steps, method="chebyshev", tol=tol)
        error = (series[0].flatten(1).T - exact).abs().sum(1).max()
        assert error < tol + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["power", "chebyshev"])
def test_constants_are_preserved(dtype, method):
    """Rows of the transition sum to one."""
    affinity = ops.boundary_affinity(rand(1, 20, 30, dtype=dtype), 5)
    x = torch.tensor([1.0, -3.0], dtype=dtype).reshape(1, 2, 1, 1).expand(1, 2, 20, 30)
    for steps in (1, 256):
        result = ops.random_walk(x, affinity, 5, 10, steps, method=method)
        assert torch.allclose(result, x, rtol=1e-4 if method == "chebyshev" and steps > 1 else 2e-5, atol=0)


@pytest.mark.parametrize("method", ["power", "chebyshev"])
def test_full_boundary_is_the_identity(method):
    x = rand(1, 2, 7, 9)
    affinity = ops.boundary_affinity(torch.ones(1, 7, 9, dtype=torch.float64), 5)
    result = ops.random_walk(x, affinity, 5, 10, 256, method=method)
    assert (result - x).abs().max() < (1e-12 if method == "power" else 1e-4)


@pytest.mark.parametrize("method", ["power", "chebyshev"])
def test_closed_wall_never_leaks(method):
    boundary = torch.zeros(1, 12, 15, dtype=torch.float64)
    boundary[:, 3:9, 4] = boundary[:, 3:9, 11] = boundary[:, 3, 4:12] = boundary[:, 8, 4:12] = 1
    inside = torch.zeros(1, 1, 12, 15, dtype=torch.float64)
    inside[:, :, 4:8, 5:11] = 1
    affinity = ops.boundary_affinity(boundary, 5)
    result = ops.random_walk(inside * rand(1, 1, 12, 15), affinity, 5, 10, 256, method=method)
    assert (result[inside == 0] == 0).all() and (result[inside == 1] > 0).all()


@pytest.mark.parametrize("method", ["power", "chebyshev"])
def test_walk_flip_and_transpose_equivariance(method):
    boundary, x = rand(1, 10, 13), rand(1, 2, 10, 13, seed=1)

    def walk(b, v):
        return ops.random_walk(v, ops.boundary_affinity(b, 5), 5, 10, 64, method=method)

    expected = walk(boundary, x)
    for turn in (lambda t: t.flip(-1), lambda t: t.flip(-2), lambda t: t.transpose(-1, -2)):
        assert torch.allclose(walk(turn(boundary), turn(x)), turn(expected), rtol=0, atol=1e-12)


def test_walk_spreads_nan():
    affinity = ops.boundary_affinity(torch.zeros(1, 6, 30), 3)
    x = torch.zeros(1, 1, 6, 30)
    x[0, 0, 2, 3] = math.nan
    result = ops.random_walk(x, affinity, 3, 10, 2)
    assert result[0, 0, 2, 3].isnan() and (result[..., 8:] == 0).all()


@pytest.mark.parametrize("method", ["power", "chebyshev"])
def test_nan_and_infinity_do_not_wrap_around_the_edges(method):
    """Only pixels that the walk reaches are affected; the numbers of rows and columns are odd."""
    for height, width in ((7, 9), (7, 17), (1, 33)):
        affinity = ops.boundary_affinity(torch.zeros(1, height, width), 3)
        for value in (math.nan, math.inf):
            x = torch.zeros(1, 1, height, width)
            x[0, 0, -1, -1] = value
            result = ops.random_walk(x, affinity, 3, 10, 3, method)[0, 0]
            reached = torch.zeros(height, width, dtype=torch.bool)
            reached[max(0, height - 7) :, width - 7 :] = True  # 3 steps of 2 pixels
            assert not result[-1, -1].isfinite() and result[~reached].eq(0).all()


# ---- all operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_inputs(dtype):
    assert ops.converge_centroids(torch.zeros(0, 2, 4, 5, dtype=dtype)).shape == (0, 2, 4, 5)
    assert ops.converge_centroids(torch.zeros(2, 2, 0, 5, dtype=dtype)).shape == (2, 2, 0, 5)
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        boundary = torch.zeros(shape, dtype=dtype, requires_grad=True)
        affinity = ops.boundary_affinity(boundary, 5)
        assert affinity.shape == (shape[0], 34, *shape[1:])
        affinity.sum().backward()
        assert boundary.grad.shape == shape
        x = torch.zeros(shape[0], 3, *shape[1:], dtype=dtype)
        assert ops.random_walk(x, affinity, 5, 10, 256).shape == x.shape
        labels = torch.zeros(shape, dtype=torch.int64)
        field = torch.zeros(shape[0], 2, *shape[1:], dtype=dtype, requires_grad=True)
        sums, errors = ops.boundary_pair_loss(boundary, labels, 5), ops.displacement_pair_loss(field, labels, 5)
        assert ops.pair_counts(labels, 5).shape == sums.shape == field.shape and errors.shape == shape
        (sums.sum() + errors.sum()).backward()
        assert field.grad.shape == field.shape and not field.grad.any()
    x = torch.zeros(1, 0, 4, 5, dtype=dtype)
    assert ops.random_walk(x, torch.zeros(1, 34, 4, 5, dtype=dtype), 5, 10, 256).shape == x.shape


def test_non_contiguous_inputs():
    field = torch.randn(2, 9, 8, 2, generator=generator()).permute(0, 3, 2, 1)
    assert torch.equal(ops.converge_centroids(field, 5), ops.converge_centroids(field.contiguous(), 5))
    boundary = rand(8, 9, 4)[:, :, ::2].permute(2, 1, 0)
    affinity = ops.boundary_affinity(boundary, 5)
    assert torch.equal(affinity, ops.boundary_affinity(boundary.contiguous(), 5))
    labels, grad = some_labels(8, 2, 9).permute(1, 0, 2), rand(9, 8, 2).permute(2, 1, 0)
    for of, maps in ((ops.displacement_pair_loss, field), (lambda *a: ops.boundary_pair_loss(*a)[:, 0], boundary.mT)):
        leaves = maps.clone().requires_grad_(), maps.contiguous().requires_grad_()
        of(leaves[0], labels, 5).backward(grad.to(maps.dtype))
        of(leaves[1], labels.contiguous(), 5).backward(grad.to(maps.dtype).contiguous())
        assert torch.equal(leaves[0].grad, leaves[1].grad) and leaves[0].grad.any()
    x = rand(2, 9, 8, 3).permute(0, 3, 1, 2)
    strided = affinity.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(ops.random_walk(x, strided, 5, 10, 20), ops.random_walk(x.contiguous(), affinity, 5, 10, 20))


def test_half_precision_is_computed_in_float32():
    boundary = rand(1, 6, 6).half()
    affinity = ops.boundary_affinity(boundary, 4)
    assert torch.equal(affinity, ops.boundary_affinity(boundary.float(), 4))
    x = rand(1, 1, 6, 6).bfloat16()
    assert ops.random_walk(x, affinity.bfloat16(), 4, 10, 5).dtype == torch.float32
    assert ops.converge_centroids(torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)).dtype == torch.float32


WALK = {"radius": 5, "power": 10, "steps": 5}


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.converge_centroids(torch.zeros(1, 3, 4, 4)),
        lambda: ops.converge_centroids(torch.zeros(1, 2, 4, 4, dtype=torch.int64)),
        lambda: ops.converge_centroids(torch.zeros(1, 2, 4, 4), max_iters=-1),
        lambda: ops.boundary_affinity(torch.zeros(1, 1, 4, 4), 5),
        lambda: ops.boundary_affinity(torch.zeros(1, 4, 4), 0),
        lambda: ops.pair_counts(torch.zeros(1, 4, 4), 5),
        lambda: ops.pair_counts(torch.zeros(1, 4, 4, dtype=torch.int64), 0),
        lambda: ops.boundary_pair_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.int64), 5),
        lambda: ops.boundary_pair_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), 5),
        lambda: ops.displacement_pair_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), 5),
        lambda: ops.displacement_pair_loss(torch.zeros(2, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), 5),
        lambda: ops.random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 152, 4, 4), 5, 10, 5),
        lambda: ops.random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 34, 4, 5), 5, 10, 5),
        lambda: ops.random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 34, 4, 4).double(), 5, 10, 5),
        lambda: ops.random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 34, 4, 4), 5, 10, -1),
        lambda: ops.random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 34, 4, 4), 5, 10, 5, method="magic"),
        *(
            lambda given=given: ops.random_walk(torch.zeros(1, 1, 4, 4), torch.zeros(1, 34, 4, 4), **WALK | given)
            for given in (
                {"power": 0},
                {"power": math.nan},
                {"power": math.inf},
                {"power": "10"},
                {"steps": 1.5},
                {"steps": math.nan},
                {"steps": 10**9},
                {"steps": None},
                {"tol": 0},
                {"tol": math.nan},
                {"radius": 5.5},
                {"radius": "5"},
                {"radius": math.inf},
                {"radius": None},
            )
        ),
        *(
            lambda given=given: ops.converge_centroids(torch.zeros(1, 2, 4, 4), **given)
            for given in (
                {"max_iters": 2.5},
                {"max_iters": math.nan},
                {"max_iters": math.inf},
                {"tol": -1},
                {"tol": math.nan},
                {"tol": None},
            )
        ),
        lambda: ops.pair_counts(torch.zeros(1, 4, 4, dtype=torch.complex64), 5),
        lambda: ops.boundary_affinity(torch.zeros(1, 4, 4).to_sparse(), 5),
        lambda: ops.converge_centroids(torch.zeros(1, 2, 4, 4, device="meta")),
        lambda: ops.boundary_pair_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64, device="meta"), 5),
        lambda: ops.boundary_affinity([[0.5]], 5),
    ],
)
def test_wrong_arguments_raise_a_value_error(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("height, width", [(2**15 + 1, 2**15), (1, 2**24 + 1), (2**24 + 1, 1)])
def test_maps_too_large_for_their_indices_are_refused(implementation, height, width):
    def large(*channels, dtype=torch.float32):  # one value, expanded
        return torch.zeros((), dtype=dtype).expand(1, *channels, height, width)

    labels = large(dtype=torch.int64)
    for call in (
        lambda: ops.converge_centroids(large(2)),
        lambda: ops.boundary_affinity(large(), 3),
        lambda: ops.pair_counts(labels, 3),
        lambda: ops.boundary_pair_loss(large(), labels, 3),
        lambda: ops.displacement_pair_loss(large(2), labels, 3),
        lambda: ops.random_walk(large(1), large(12), 3, 5, 2),
    ):
        with pytest.raises(ValueError, match="pixels"):
            call()
    if implementation == "reference":
        return
    inner, winner = torch.ops.wsid, large(12, dtype=torch.uint8)
    for call in (
        lambda: inner.converge_centroids(large(2), 3, 1e-3),
        lambda: inner.boundary_affinity(large(), 3, True),
        lambda: inner.boundary_affinity_backward(large(12), winner, 3),
        lambda: inner.pair_counts(large(), 3),
        lambda: inner.boundary_pair_loss(large(), large(), 3),
        lambda: inner.boundary_pair_loss_backward(large(2), large(), large(), 3),
        lambda: inner.displacement_pair_loss(large(2), large(), 3),
        lambda: inner.displacement_pair_loss_backward(large(), large(2), large(), 3),
        lambda: inner.random_walk(large(1), large(12), 3, 5.0, 2, []),
    ):
        with pytest.raises(RuntimeError, match="pixels"):
            call()


# ---- the compiled operators --------------------------------------------------------------------------------------

only_compiled = pytest.mark.parametrize("implementation", ["compiled"], indirect=True)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (torch.cuda.is_available() and compiled.has_kernels("cuda")), reason="no GPU, or built without CUDA"
        ),
    ),
]


def sample(dtype, device, n=2, height=19, width=23):
    field = (torch.randn(n, 2, height, width, generator=generator()) * 2).to(device, dtype)
    return field, rand(n, height, width, dtype=dtype).to(device), rand(n, 5, height, width, dtype=dtype).to(device)


@only_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_equals_reference(device, dtype):
    """Centroids and affinities to the last bit, sums to rounding."""
    field, boundary, x = sample(dtype, device)
    labels, tol = some_labels(*boundary.shape), 1e-4 if dtype == torch.float32 else 1e-9
    assert torch.equal(ops.converge_centroids(field).cpu(), reference.converge_centroids(field.cpu()))
    for radius in (2, 5, 10):
        plain, winner = reference.boundary_affinity_forward(boundary.cpu(), radius)
        leaf = boundary.clone().requires_grad_()
        affinity = ops.boundary_affinity(leaf, radius)
        weight = torch.randn(affinity.shape, generator=generator(), dtype=dtype).to(device)
        (affinity * weight).sum().backward()
        expected = reference.boundary_affinity_backward(weight.cpu(), winner, radius)
        assert torch.equal(affinity.cpu(), plain)
        assert torch.equal(ops.boundary_affinity(boundary, radius), affinity)
        assert torch.equal(ops.pair_counts(labels.to(device), radius).cpu(), ops.pair_counts(labels, radius))
        undecided = torch.where(labels == 255, torch.nan, labels.to(dtype))
        for name, maps in (("boundary_pair_loss", boundary), ("displacement_pair_loss", field)):
            leaves = maps.clone().requires_grad_(), maps.cpu().clone().requires_grad_()
            found = getattr(ops, name)(leaves[0], labels.to(device), radius)
            plain_sums = getattr(reference, name)(leaves[1], undecided, radius)
            assert torch.allclose(found.cpu(), plain_sums, rtol=tol, atol=tol)
            weight = torch.randn(found.shape, generator=generator(), dtype=dtype)
            (found * weight.to(device)).sum().backward()
            (plain_sums * weight).sum().backward()
            assert torch.allclose(leaves[0].grad.cpu(), leaves[1].grad, rtol=tol, atol=tol)
        assert torch.allclose(leaf.grad.cpu(), expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-11)
        for method in ("power", "chebyshev"):
            for power in (10, 2.5):
                result = ops.random_walk(x, affinity, radius, power, 40, method).cpu()
                expected = reference.random_walk(x.cpu(), affinity.detach().cpu(), radius, power, 40, method)
                assert (result - expected).abs().max() < (3e-5 if dtype == torch.float32 else 1e-11)


@only_compiled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, maps, side", [(1, 2, 12), (9, 4, 128), (2, 9, 97), (1, 1, 400), (40, 3, 33)])
def test_walks_of_many_photographs_and_sizes_equal_those_of_each(device, n, maps, side):
    """On a GPU of few large or many photographs, which fit on it in one go or not."""
    x, boundary = rand(n, maps, side, side + 3, dtype=torch.float32), rand(n, side, side + 3, dtype=torch.float32)
    affinity = ops.boundary_affinity(boundary, 5)
    together = ops.random_walk(x.to(device), affinity.to(device), 5, 6, 100).cpu()
    for one in {0, n // 2, n - 1}:
        alone = ops.random_walk(x[one, None].double(), affinity[one, None].double(), 5, 6, 100)
        assert (together[one] - alone[0]).abs().max() < 1e-4


def everything(boundary, labels, field, x, radius):
    """The results of all operators and their gradients, by name."""
    leaf, leaf_field = boundary.clone().requires_grad_(), field.clone().requires_grad_()
    affinity, boundary_sums = ops.boundary_affinity(leaf, radius), ops.boundary_pair_loss(leaf, labels, radius)
    errors = ops.displacement_pair_loss(leaf_field, labels, radius)
    found = {
        "affinity": affinity,
        "boundary sums": boundary_sums,
        "displacement errors": errors,
        "counts": ops.pair_counts(labels, radius),
        "centroids": ops.converge_centroids(field, 20),
    }
    for method in ("power", "chebyshev"):
        found[f"walk by {method}"] = ops.random_walk(x, affinity, radius, 5, 20, method)
    for name, of, to in (
        ("affinity", affinity, leaf),
        ("boundary sums", boundary_sums, leaf),
        ("displacement errors", errors, leaf_field),
    ):
        weight = torch.rand(of.shape, generator=generator(7), dtype=of.dtype)
        (found[f"gradient of the {name}"],) = torch.autograd.grad(of, to, weight)
    return {name: value.detach().double() for name, value in found.items()}


@only_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "radius, height, width",
    [(14, 14, 6), (14, 6, 14), (20, 5, 7), (5, 1, 1), (2, 1, 9), (3, 9, 1), (33, 1, 20), (33, 20, 1)],
)
def test_compiled_agrees_with_reference_on_extreme_inputs(monkeypatch, radius, height, width, dtype):
    """On maps narrower than the radius; values at the limits of their range, outside it, NaN and infinite."""
    labels = some_labels(2, height, width)
    draws = {"ends": rand(2, height, width).round(), "beyond": 100 * rand(2, height, width) - 50}
    for name in (*draws, "nan", "inf"):
        boundary = draws.get(name, rand(2, height, width)).to(dtype)
        field = (3 * torch.randn(2, 2, height, width, generator=generator())).to(dtype)
        x = rand(2, 2, height, width, seed=1, dtype=dtype)
        if name in ("nan", "inf"):
            boundary, field, x = boundary.clone(), field.clone(), x.clone()
            for maps in (boundary, field, x):
                maps[..., -1, -1] = math.nan if name == "nan" else math.inf
                maps[0, ..., 0, 0] = -math.inf if name == "inf" else maps[0, ..., 0, 0]
        found = everything(boundary, labels, field, x, radius)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "has_kernels", lambda device_type: False)
            patch.setattr(ops, "_warn_not_built", lambda: None)
            expected = everything(boundary, labels, field, x, radius)
        for what, value in found.items():
            plain, case = expected[what], f"{what}, {name}"
            if what in ("affinity", "counts", "centroids"):
                assert torch.equal(value.nan_to_num(9e9), plain.nan_to_num(9e9)), case
            else:
                if "walk" in what:  # where infinities meet, the result depends on rounding
                    value, plain = (torch.where(v.isfinite(), v, torch.nan) for v in (value, plain))
                size = plain[plain.isfinite()].abs().amax().clamp(min=1) if plain.isfinite().any() else 1
                tol = 3e-4 if dtype == torch.float32 else 1e-9
                assert torch.allclose(value, plain, rtol=tol, atol=tol * float(size), equal_nan=True), case


@only_compiled
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for dtype in (torch.float32, torch.float64):
        field, boundary, x = sample(dtype, device, height=7, width=9)
        affinity, winner = torch.ops.wsid.boundary_affinity(boundary, 3, True)
        check = torch.library.opcheck
        check(torch.ops.wsid.converge_centroids.default, (field, 5, 1e-3))
        check(torch.ops.wsid.boundary_affinity.default, (boundary, 3, False))
        check(torch.ops.wsid.boundary_affinity.default, (boundary.clone().requires_grad_(), 3, True))
        check(torch.ops.wsid.boundary_affinity_backward.default, (affinity, winner, 3))
        labels = some_labels(*boundary.shape).to(device, dtype)
        both, one = rand(len(x), 2, 7, 9, dtype=dtype).to(device), boundary.clone()
        check(torch.ops.wsid.pair_counts.default, (labels, 3))
        check(torch.ops.wsid.boundary_pair_loss.default, (boundary.clone().requires_grad_(), labels, 3))
        check(torch.ops.wsid.boundary_pair_loss_backward.default, (both, boundary, labels, 3))
        check(torch.ops.wsid.displacement_pair_loss.default, (field.clone().requires_grad_(), labels, 3))
        check(torch.ops.wsid.displacement_pair_loss_backward.default, (one, field, labels, 3))
        check(torch.ops.wsid.random_walk.default, (x, affinity, 3, 10.0, 8, [0.5, 0.0, 0.5]))
        check(torch.ops.wsid.random_walk.default, (x, affinity, 3, 10.0, 8, []))


@only_compiled
def test_torch_compile_and_autocast():
    _, boundary, x = sample(torch.float32, "cpu")

    def spread(logits, maps):
        affinity = ops.boundary_affinity(logits.sigmoid(), 5)
        return affinity.mean(), ops.random_walk(maps, affinity, 5, 10, 16)

    graph = torch.compile(spread, backend="aot_eager", fullgraph=True)
    plain_logits, graph_logits = boundary.clone().requires_grad_(), boundary.clone().requires_grad_()
    plain, expected = spread(plain_logits, x)
    mean, result = graph(graph_logits, x)
    assert torch.allclose(mean, plain) and torch.allclose(result, expected, atol=1e-6)
    plain.backward()
    mean.backward()
    assert torch.allclose(plain_logits.grad, graph_logits.grad)
    with torch.autocast("cpu", torch.bfloat16):
        weight = torch.nn.functional.conv2d(boundary[:, None], torch.ones(1, 1, 1, 1))[:, 0]
        assert weight.dtype == torch.bfloat16 and ops.boundary_affinity(weight, 5).dtype == torch.float32


@only_compiled
def test_thread_count_does_not_matter():
    field, boundary, x = sample(torch.float32, "cpu", n=3, height=40, width=37)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = boundary.clone().requires_grad_()
            affinity = ops.boundary_affinity(leaf, 10)
            (affinity * affinity).sum().backward()
            leaf_field, labels = field.clone().requires_grad_(), some_labels(*boundary.shape)
            sums = ops.boundary_pair_loss(leaf, labels, 10)
            (ops.displacement_pair_loss(leaf_field, labels, 10).sum() + sums.sum()).backward()
            walks = [ops.random_walk(x[:n], affinity[:n], 10, 10, 30, m) for n in (1, 3) for m in ("power", "auto")]
            results.append(
                [
                    ops.converge_centroids(field),
                    affinity,
                    leaf.grad,
                    sums,
                    leaf_field.grad,
                    ops.pair_counts(labels, 10),
                    *walks,
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results))


@only_compiled
@pytest.mark.parametrize(
    "isa",
    [
        "baseline",
        pytest.param(
            "avx2",
            marks=pytest.mark.skipif(
                torch.backends.cpu.get_cpu_capability() != "AVX512", reason="that is the default here"
            ),
        ),
    ],
)
def test_older_instruction_sets(isa):
    """The choice is made once per process, so each is tested in its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "equals_reference"]
    done = subprocess.run(command, env={**os.environ, "WSID_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@only_compiled
def test_compiled_gradient_needs_winners():
    boundary = rand(1, 5, 5).requires_grad_()
    affinity, _ = torch.ops.wsid.boundary_affinity(boundary, 3, False)
    with pytest.raises(RuntimeError, match="without its winners"):
        affinity.sum().backward()


def test_affinity_stores_one_byte_per_entry(implementation):
    boundary = rand(2, 30, 40, dtype=torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        affinity = ops.boundary_affinity(boundary, 10)
    assert sum(t.numel() * t.element_size() for t in saved) == affinity.numel()


# ---- not built ---------------------------------------------------------------------------------------------------


def test_not_built_warns_once_and_still_works(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "available", False)
    monkeypatch.setattr(compiled, "has_kernels", lambda device_type: False)
    monkeypatch.setattr(compiled, "reason", "No module named 'ops._C'")
    ops._warn_not_built.cache_clear()
    field = centre_field(4, 5, (1, 2))
    with pytest.warns(RuntimeWarning, match="build_ext") as caught:
        points = ops.converge_centroids(field)
    assert len(caught) == 1 and torch.equal(points, reference.converge_centroids(field))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.converge_centroids(field)
    ops._warn_not_built.cache_clear()


def test_cuda_without_kernels_says_what_to_do(monkeypatch):
    monkeypatch.setattr(compiled, "has_kernels", lambda device_type: False)
    with pytest.raises(RuntimeError, match="FORCE_CUDA=1"):
        ops._implementation(types.SimpleNamespace(device=torch.device("cuda")))
