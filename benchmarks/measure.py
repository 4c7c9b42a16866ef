"""How the benchmarks measure and report. Import it before the repository's own modules: it makes them importable."""

import csv
import ctypes
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CPU = torch.device("cpu")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call, device):
    """Milliseconds of one call, everything it queued on the device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _status(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))


def peak_memory(call, device):
    """MiB by which the peak (of the GPU's memory, else of the process's) rises over what is held before the call;
    NaN where the system does not say."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0.0)
    except (OSError, AttributeError, StopIteration):
        return math.nan


def check(name, error, bound):
    """Print whether ``error`` is within ``bound``; SystemExit where it is not: wrong results are not timed."""
    print(f"  {name:46} error {error:.1e}  {'ok' if error <= bound else 'WRONG (bound ' + format(bound, '.0e') + ')'}")
    if not error <= bound:
        raise SystemExit(f"error: {name} is wrong; nothing was timed")


def record(case, contender, times, *, ratio=None, memory=None, count=None):
    """One row of the tables on disk. times: ms; ratio: to ours, or a share; memory: MiB; count: photographs a call."""
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


def compare(title, contenders, repeats, device, flop=0, moved=0, limits=None, count=None):
    """contenders: {name: call}, the first one is ours. Prints one table and returns its rows.

    count: photographs in a call, where photographs per second are wanted.
    """
    for call in contenders.values():  # the first call also pays for loading and set-up
        call()
    memory = {name: peak_memory(call, device) for name, call in contenders.items()}
    times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            times[name].append(timed(call, device))
    rows, ours = [], None
    header = f"{'':34}{'median ms':>11}{'best ms':>10}{'ours is':>10}{'peak MiB':>10}"
    print(f"\n{title}\n{header}{'photos/s':>10}" if count else f"\n{title}\n{header}")
    for name, values in times.items():
        median = statistics.median(values)
        ours = ours or median
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


def write_records(rows, path):
    """The rows as CSV, or as JSON where ``path`` ends so."""
    with open(path, "w", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=1)
            return
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
