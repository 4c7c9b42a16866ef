"""Speed and memory of the operators, compared with other implementations.

    python benchmarks/bench_ops.py                 acceptance sizes: 128x128, 4 instances, radius 5, 256 steps
    python benchmarks/bench_ops.py --growth        also time and memory over sizes; writes a table and a plot
    python benchmarks/bench_ops.py --dense         also the dense walk matrix (at 128x128 on a GPU, on a CPU at 64x64)
    python benchmarks/bench_ops.py --gpu -1        on the CPU also where there is a GPU; NumPy and SciPy always are

The result of every contender is compared with ours before it is timed. Times are medians over `--repeats` interleaved
runs, in milliseconds; memory is the rise of the peak of the process over one call, in MiB. FLOP: a step of the walk is
2 x (2K+1) x H x W x C (one product and one sum per neighbour). Bytes: what must be read and written at least once. The
limits of the machine are measured in the same run: a float32 matrix product and a copy.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import scipy.sparse
import torch
import torch.nn.functional as F
from measure import (
    Row,
    check,
    compare,
    device_name,
    peak_memory,
    plot,
    record,
    timed,
    write_records,
    write_section,
)
from torch import Tensor

import ops
from ops import compiled, reference
from utils.cli import add_gpu_option, select_device

# ---- the machine -------------------------------------------------------------------------------------------------


def machine_limits(device: torch.device) -> tuple[float, float]:
    """(GFLOP/s of a float32 matrix product, GB/s of a copy, bytes read and written both counted)."""
    size = 1024 if device.type == "cpu" else 8192
    a, source = torch.rand(size, size, device=device), torch.rand(2**24, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ a, device) for _ in range(5))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * size**3 / product / 1e6, 2 * source.numel() * 4 / copy / 1e6


# ---- other implementations -----------------------------------------------------------------------------------------


def transition_matrix(affinity: Tensor, radius: int, power: float) -> scipy.sparse.csr_array:
    """M of an affinity [K,H,W] as a sparse matrix [HW,HW] in float64."""
    height, width = affinity.shape[-2:]
    pixel = np.arange(height * width).reshape(height, width)
    rows, columns, values = [pixel.ravel()], [pixel.ravel()], [np.ones(pixel.size)]
    for k, (dy, dx) in enumerate(ops.path_offsets(radius)[0]):
        window = np.s_[: height - dy, max(0, -dx) : width - max(0, dx)]
        p, q = pixel[window].ravel(), (pixel[window] + dy * width + dx).ravel()
        value = affinity[k].double().numpy()[window].ravel() ** power
        rows += [p, q]
        columns += [q, p]
        values += [value, value]
    matrix = scipy.sparse.csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))))
    return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / matrix.sum(1)) @ matrix)


def scipy_walk(matrix: scipy.sparse.csr_array, x: np.ndarray, steps: int) -> np.ndarray:
    """The walk on x [C,H,W], step by step, with SciPy."""
    v = x.reshape(len(x), -1).T
    for _ in range(steps):
        v = matrix @ v
    return v.T.reshape(x.shape)


def torch_csr_walk(matrix: Tensor, x: Tensor, steps: int) -> Tensor:
    """The walk on x [C,H,W], step by step, with a sparse matrix of PyTorch."""
    v = x.flatten(1).T.contiguous()
    for _ in range(steps):
        v = matrix @ v
    return v.T.reshape(x.shape)


def gather_and_max(height: int, width: int, radius: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The affinity as in IRN: all path pixels of all offsets of equal length at once, then the maximum. Returns the
    function of the boundary; the indices are computed once, as in IRN."""
    offsets, paths = ops.path_offsets(radius)
    reach = radius - 1  # IRN crops: every start pixel whose partners are all inside
    rows = torch.arange(height - reach)[:, None]
    columns = torch.arange(reach, width - reach)[None]
    start = (rows * width + columns).flatten()
    groups: dict[int, list[int]] = {}
    indices = []
    for k, path in enumerate(paths):
        groups.setdefault(len(path), []).append(k)
    for length, members in groups.items():
        steps = torch.tensor(np.stack([paths[k] @ (width, 1) for k in members]))
        indices.append((length, members, (steps[:, :, None] + start).flatten().to(device)))

    def compute(boundary: Tensor) -> Tensor:
        flat = boundary.flatten(1)
        result = boundary.new_empty(len(boundary), len(offsets), start.numel())
        for length, members, index in indices:
            values = flat[:, index].reshape(len(flat), len(members), length, -1)
            result[:, members] = 1 - values.amax(2) if not boundary.requires_grad else 1 - values.max(2).values
        return result.reshape(len(boundary), len(offsets), height - reach, width - 2 * reach)

    return compute


def sums_over_all_pairs(boundary: Tensor, field: Tensor, labels: Tensor, radius: int) -> Tensor:
    """The sums of L_B and L_V as in IRN, with one tensor entry per pair. Returns the sum of both."""
    height, width = labels.shape[-2:]
    offsets = torch.tensor(ops.path_offsets(radius)[0])

    def partners(maps: Tensor, value: float) -> Tensor:
        padded = F.pad(maps, (radius, radius, 0, radius), value=value)
        return torch.stack([padded[..., dy : dy + height, radius + dx : radius + dx + width] for dy, dx in offsets], 1)

    here, there = labels[:, None], partners(labels, 255)
    decided = (here != 255) & (there != 255)
    same, different = decided & (here == there), decided & (here != there)
    affinity = ops.boundary_affinity(boundary, radius)
    boundary_sum = (same * -torch.log(affinity + 1e-5) + different * -torch.log(1 + 1e-5 - affinity)).sum()
    expected = (here > 0)[:, :, None] * offsets.to(field)[None, :, :, None, None]
    error = (field[:, None] - partners(field, 0) - expected).abs().sum(2)
    return boundary_sum + (same * error).sum()


def numpy_centroids(field: np.ndarray, iterations: int = 300) -> np.ndarray:
    """Converged points [2,H,W] by the loop over whole arrays of IRN, with bilinear sampling."""
    height, width = field.shape[1:]
    y, x = np.meshgrid(np.arange(height, dtype=field.dtype), np.arange(width, dtype=field.dtype), indexing="ij")
    for _ in range(iterations):
        y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
        y1, x1 = np.minimum(y0 + 1, height - 1), np.minimum(x0 + 1, width - 1)
        wy, wx = y - y0, x - x0
        top = field[:, y0, x0] * (1 - wx) + field[:, y0, x1] * wx
        bottom = field[:, y1, x0] * (1 - wx) + field[:, y1, x1] * wx
        move = top * (1 - wy) + bottom * wy
        y, x = np.clip(y + move[0], 0, height - 1), np.clip(x + move[1], 0, width - 1)
    return np.stack([y, x])


def scipy_centroids(field: np.ndarray, iterations: int = 300) -> np.ndarray:
    """Converged points [2,H,W] by the same loop with ``map_coordinates``."""
    height, width = field.shape[1:]
    limit = np.array([height - 1, width - 1], field.dtype)[:, None, None]
    points = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype(field.dtype)
    for _ in range(iterations):
        move = np.stack([scipy.ndimage.map_coordinates(v, points, order=1, mode="nearest") for v in field])
        points = np.clip(points + move, 0, limit)
    return points


# ---- inputs ------------------------------------------------------------------------------------------------------


def scene(size: int, instances: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A boundary map [1,H,W] of soft circles with noise, offsets [1,2,H,W] to their centres, one map per circle
    [1,C,H,W]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    boundary = 0.1 * random.random((size, size), dtype=np.float32)
    offsets = np.zeros((2, size, size), np.float32)
    maps = np.zeros((instances, size, size), np.float32)
    for i in range(instances):
        cy, cx = random.uniform(0.2 * size, 0.8 * size, 2)
        radius = size * random.uniform(0.08, 0.2)
        distance = np.hypot(y - cy, x - cx)
        boundary = np.maximum(boundary, 0.9 * np.exp(-((distance - radius) ** 2) / 4))
        inside = distance < 1.5 * radius
        offsets[:, inside] = 0.3 * np.stack([cy - y, cx - x])[:, inside]
        maps[i] = (distance < 0.6 * radius) * (1 - boundary)
    return tuple(torch.from_numpy(array)[None].float() for array in (boundary, offsets, maps))  # type: ignore


# ---- the cases ---------------------------------------------------------------------------------------------------


def bench_walk(args: argparse.Namespace, device: torch.device, limits: tuple[float, float]) -> list[Row]:
    """The random walk against sparse matrices."""
    boundary, _, x = scene(128, 4)
    affinity = ops.boundary_affinity(boundary, 5)
    matrix = transition_matrix(affinity[0], 5, 10)
    exact = torch.from_numpy(scipy_walk(matrix, x[0].double().numpy(), 256))
    single = matrix.astype(np.float32)
    csr = torch.sparse_csr_tensor(
        torch.from_numpy(single.indptr),
        torch.from_numpy(single.indices),
        torch.from_numpy(single.data),
        matrix.shape,
        device=device,
    )
    print("\nRandom walk, 256 steps, against a float64 matrix")
    xd, ad, first = x.to(device), affinity.to(device), x[0].numpy()
    walk = {m: ops.random_walk(xd, ad, 5, 10, 256, m)[0].cpu() for m in ("power", "chebyshev")}
    double = ops.random_walk(xd.double(), ad.double(), 5, 10, 256)[0].cpu()
    plain = (torch_csr_walk(csr, xd[0], 256).cpu() - exact).abs().max().item()
    check("ours, float64, auto", (double - exact).abs().max().item(), 1e-4)
    check("ours, float32, power", (walk["power"] - exact).abs().max().item(), max(plain, 1e-5))
    check("ours, float32, chebyshev", (walk["chebyshev"] - exact).abs().max().item(), 1e-4)
    check("torch.sparse CSR, float32", plain, 1e-3)
    terms = len(reference.chebyshev_coefficients(256, 1e-4)) - 1
    contenders = {
        "ours, auto (Chebyshev)": lambda: ops.random_walk(xd, ad, 5, 10, 256),
        "ours, power": lambda: ops.random_walk(xd, ad, 5, 10, 256, "power"),
        "PyTorch reference, auto": lambda: reference.random_walk(xd, ad, 5, 10, 256),
        "torch.sparse CSR (matrix given)": lambda: torch_csr_walk(csr, xd[0], 256),
        "scipy CSR (matrix given)": lambda: scipy_walk(single, first, 256),
    }
    flop = 2 * (2 * 34 + 1) * 128 * 128 * 4 * terms
    rows = compare(
        f"Random walk 128x128, 4 instances, radius 5, 256 steps ({terms} terms)",
        contenders,
        args.repeats,
        device,
        flop=flop,
        limits=limits,
    )
    if device.type == "cuda":
        queued = timed(lambda: [ops.random_walk(xd, ad, 5, 10, 256) for _ in range(30)], device) / 30
        print(f"  ours, 30 walks queued one after another: {queued:.3f} ms each")
    return rows


def bench_dense(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The random walk against a dense matrix that is squared."""
    size = 64 if device.type == "cpu" else 128
    boundary, _, x = scene(size, 4)
    affinity = ops.boundary_affinity(boundary, 5)
    dense = torch.from_numpy(transition_matrix(affinity[0], 5, 10).toarray().astype(np.float32)).to(device)
    x, affinity = x.to(device), affinity.to(device)

    def squared() -> Tensor:
        m = dense
        for _ in range(8):
            m = m @ m
        return m @ x[0].flatten(1).T

    error = (squared().T.reshape(x[0].shape) - ops.random_walk(x, affinity, 5, 10, 256)[0]).abs().max().item()
    print(f"\nDense matrix, squared 8 times, at {size}x{size}")
    check("dense against ours", error, 1e-3)
    return compare(
        f"Random walk {size}x{size}, 4 instances, radius 5, 256 steps",
        {"ours, auto (Chebyshev)": lambda: ops.random_walk(x, affinity, 5, 10, 256), "dense, squared 8 times": squared},
        min(args.repeats, 3),
        device,
    )


def bench_affinity(args: argparse.Namespace, device: torch.device, limits: tuple[float, float]) -> list[Row]:
    """The boundary affinity, forward at radius 5, forward and backward at radius 10."""
    rows = []
    for radius, batch, train in ((5, 1, False), (10, 6, True)):
        boundary = torch.cat([scene(128, 4, seed)[0] for seed in range(batch)]).to(device)
        reach, gather = radius - 1, gather_and_max(128, 128, radius, device)
        inner = ops.boundary_affinity(boundary, radius)[:, :, :-reach, reach:-reach]
        print(f"\nAffinity, radius {radius}, batch {batch}")
        check("gather-and-max against ours", (gather(boundary) - inner).abs().max().item(), 0)
        leaf = boundary.clone().requires_grad_(train)

        def run(compute: Callable[..., Tensor], *radius: int, leaf: Tensor = leaf, train: bool = train) -> None:
            result = compute(leaf, *radius)
            if train:
                leaf.grad = None
                result.backward(torch.ones_like(result))

        entries = inner.numel() // inner[0, 0].numel() * 128 * 128
        what = "forward+backward" if train else "forward"
        rows += compare(
            f"Affinity 128x128, radius {radius}, batch {batch}, {what}",
            {
                "ours": partial(run, ops.boundary_affinity, radius),
                "PyTorch reference": partial(run, reference.boundary_affinity, radius),
                "gather-and-max (IRN, cropped)": partial(run, gather),
            },
            args.repeats,
            device,
            moved=entries * (4 + 10 * train) + boundary.numel() * (4 + 4 * train),
            limits=limits,
        )
    return rows


def bench_pairs(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The sums of L_B and L_V over pairs, forward and backward."""
    radius, scenes = 10, [scene(128, 4, seed) for seed in range(6)]
    boundary, field = (torch.cat([parts[i] for parts in scenes]).to(device).requires_grad_() for i in (0, 1))
    labels = torch.cat([maps.amax(1) > 0 for _, _, maps in scenes]).long().to(device)
    labels[:, :4] = 255

    def summed(operators: Any) -> Tensor:
        given = labels if operators is ops else torch.where(labels == 255, torch.nan, labels.float())
        boundary_sums = operators.boundary_pair_loss(boundary, given, radius)
        return boundary_sums.sum() + operators.displacement_pair_loss(field, given, radius).sum()

    totals = {
        "ours": lambda: summed(ops),
        "PyTorch reference": lambda: summed(reference),
        "all pairs at once (IRN)": lambda: sums_over_all_pairs(boundary, field, labels, radius),
    }

    def gradients(total: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total(), (boundary, field))

    print("\nPairs of labelled pixels, radius 10, batch 6")
    ours = gradients(totals["ours"])
    for name in list(totals)[1:]:
        error = max((g - o).abs().max().item() / o.abs().max().item() for g, o in zip(gradients(totals[name]), ours))
        check(f"{name}, gradients against ours", error, 1e-3)
    return compare(
        "Sums of L_B and L_V 128x128, radius 10, batch 6, forward+backward",
        {name: partial(gradients, total) for name, total in totals.items()},
        args.repeats,
        device,
    )


def bench_centroids(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The converged centroids against loops over whole arrays."""
    _, offsets, _ = scene(128, 4)
    field = offsets[0].numpy()
    ours = ops.converge_centroids(offsets.to(device))[0].cpu()
    print("\nCentroids, 300 iterations at most")
    check("ours against the reference", (ours - reference.converge_centroids(offsets)[0]).abs().max().item(), 1e-6)
    # The loops continue where ours stops after a move below 1e-3; how far depends on the field.
    close = np.mean(np.abs(numpy_centroids(field) - ours.numpy()).max(0) < 0.05)
    check("fraction of pixels where the NumPy loop differs", 1 - close, 0.02)
    offsets = offsets.to(device)
    return compare(
        "Centroids 128x128",
        {
            "ours": lambda: ops.converge_centroids(offsets),
            "PyTorch reference": lambda: reference.converge_centroids(offsets),
            "NumPy loop, 300 steps": lambda: numpy_centroids(field),
            "map_coordinates, 300 steps": lambda: scipy_centroids(field),
        },
        min(args.repeats, 5),
        device,
    )


def growth(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time and memory of our operators over one size at a time."""
    rows: list[Row] = []

    def measure(what: str, value: int, operator: Callable[..., Tensor], *arguments: Any) -> None:
        def call() -> None:
            operator(*arguments)

        memory = peak_memory(call, device)
        rows.append(record(what, value, [timed(call, device) for _ in range(max(3, args.repeats // 3))], memory=memory))
        print(f"  {what:34}{value:8}{rows[-1]['median_ms']:11.2f} ms{memory:10.1f} MiB")

    def inputs(
        size: int = 128, instances: int = 4, batch: int = 1, radius: int = 5
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [torch.cat(p).to(device) for p in zip(*(scene(size, instances, s) for s in range(batch)))]
        return parts[1], parts[0], ops.boundary_affinity(parts[0], radius), parts[2]

    print("\nGrowth")
    for size in (64, 128, 256, 512):
        offsets, boundary, affinity, x = inputs(size)
        measure("walk, resolution", size, ops.random_walk, x, affinity, 5, 10, 256)
        measure("affinity, resolution", size, ops.boundary_affinity, boundary, 5)
        measure("centroids, resolution", size, ops.converge_centroids, offsets)
    for instances in (1, 2, 4, 8, 16, 32):
        _, _, affinity, x = inputs(instances=instances)
        measure("walk, instances", instances, ops.random_walk, x, affinity, 5, 10, 256)
    for batch in (1, 2, 4, 8):
        offsets, boundary, affinity, x = inputs(batch=batch)
        measure("walk, batch", batch, ops.random_walk, x, affinity, 5, 10, 256)
        measure("affinity, batch", batch, ops.boundary_affinity, boundary, 5)
        measure("centroids, batch", batch, ops.converge_centroids, offsets)
    for radius in (2, 3, 5, 7, 10):
        _, boundary, affinity, x = inputs(radius=radius)
        measure("walk, radius", radius, ops.random_walk, x, affinity, radius, 10, 256)
        measure("affinity, radius", radius, ops.boundary_affinity, boundary, radius)
    _, _, affinity, x = inputs()
    for steps in (16, 64, 256, 1024):
        measure("walk, steps", steps, ops.random_walk, x, affinity, 5, 10, steps)
    return rows


def main() -> None:
    """Run the benchmarks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_option(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dense", action="store_true", help="also the dense matrix")
    parser.add_argument("--growth", action="store_true", help="also time and memory over sizes")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for the table and the plot"
    )
    parser.add_argument(
        "--page", type=Path, help="Markdown file that gets the table as a section, and the plot beside it"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse")
    torch.set_num_threads(args.threads)
    device = select_device(args.gpu)
    built = "compiled" if compiled.has_kernels(device.type) else f"NOT BUILT ({compiled.reason})"
    limits = machine_limits(device)
    name = device_name(device)
    print(f"{name}; operators {built}; float32 product {limits[0]:.0f} GFLOP/s, copy {limits[1]:.1f} GB/s")
    rows = bench_walk(args, device, limits)
    if args.dense:
        rows += bench_dense(args, device)
    rows += bench_affinity(args, device, limits)
    rows += bench_pairs(args, device)
    rows += bench_centroids(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    over_sizes: list[Row] = []
    if args.growth:
        over_sizes = growth(args, device)
        plot(over_sizes, args.page.with_suffix(".svg") if args.page else args.out / "growth.svg")
    write_records(rows + over_sizes, args.out / "ops.csv")
    if args.page:
        picture = args.page.with_suffix(".svg").name if args.growth else ""
        write_section(rows, args.page, "Operators", device, picture)


if __name__ == "__main__":
    main()
