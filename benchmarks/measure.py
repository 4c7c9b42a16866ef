"""Timing, memory and tables of the benchmarks. Import it first: it puts the repository on the import path."""

import csv
import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CPU = torch.device("cpu")

Call = Callable[[], Any]
Row = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device) -> float:
    """Milliseconds of one call, including everything it queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _status(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB by which the peak memory (of the GPU, else of the process) exceeds the memory in use before the call; NaN
    where the system does not report it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would hide that of the call
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0.0)
    except (OSError, AttributeError, StopIteration):
        return math.nan


def check(name: str, error: float, bound: float) -> None:
    """Print whether ``error`` is within ``bound``; SystemExit where it is not: wrong results are not timed."""
    print(f"  {name:46} error {error:.1e}  {'ok' if error <= bound else 'WRONG (bound ' + format(bound, '.0e') + ')'}")
    if not error <= bound:
        raise SystemExit(f"error: {name} is wrong; nothing was timed")


def record(
    case: str,
    contender: str | int,
    times: Sequence[float],
    *,
    ratio: float | None = None,
    memory: float | None = None,
    count: int | None = None,
) -> Row:
    """One row of the tables on disk.

    times: ms; ratio: to ours, or a fraction of the whole; memory: MiB; count: photographs per call.
    """
    median = statistics.median(times)
    return {
        "case": case,
        "contender": contender,
        "median_ms": round(median, 3),
        "best_ms": round(min(times), 3),
        "ratio": None if ratio is None else round(ratio, 3),
        "peak_mib": None if memory is None or math.isnan(memory) else round(memory, 1),
        "per_second": None if count is None else round(1e3 * count / median, 2),
    }


def compare(
    title: str,
    contenders: Mapping[str, Call],
    repeats: int,
    device: torch.device,
    flop: float = 0,
    moved: float = 0,
    limits: tuple[float, float] | None = None,
    count: int | None = None,
) -> list[Row]:
    """Time and memory of ``contenders``, {name: call} with ours first; prints one table and returns its rows.

    flop, moved: operations and bytes of one call of ours, for its rates relative to the machine's ``limits``
    (GFLOP/s, GB/s). count: photographs per call, for photographs per second.
    """
    for call in contenders.values():  # warm-up: the first call includes loading and set-up
        call()
    memory = {name: peak_memory(call, device) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            times[name].append(timed(call, device))
    rows: list[Row] = []
    ours = statistics.median(next(iter(times.values())))
    header = f"{'':34}{'median ms':>11}{'best ms':>10}{'ours is':>10}{'peak MiB':>10}"
    print(f"\n{title}\n{header}{'photos/s':>10}" if count else f"\n{title}\n{header}")
    for name, values in times.items():
        median = statistics.median(values)
        line = f"  {name:32}{median:11.3f}{min(values):10.3f}{median / ours:9.1f}x{memory[name]:10.1f}"
        print(f"{line}{1e3 * count / median:10.2f}" if count else line)
        rows.append(record(title, name, values, ratio=median / ours, memory=memory[name], count=count))
    if limits:
        gflops, gbytes = limits
        if flop:
            rate = flop / ours / 1e6
            print(f"  ours: {flop / 1e6:.0f} MFLOP, {rate:.1f} GFLOP/s, {rate / gflops:.0%} of a matrix product's")
        if moved:
            rate = moved / ours / 1e6
            print(f"  ours: {moved / 1e6:.1f} MB, {rate:.1f} GB/s, {rate / gbytes:.0%} of a copy's")
    return rows


def write_records(rows: Sequence[Row], path: Path) -> None:
    """Write the rows to ``path``, as JSON if its name ends in .json, else as CSV."""
    with open(path, "w", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=1)
            return
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
