"""Timing, memory and tables of the benchmarks. Import it first: it puts the repository on the import path."""

import csv
import ctypes
import json
import math
import platform
import re
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
    """The name of a GPU, or of the CPU with its instruction set and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        (name,) = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:1]
    except (OSError, ValueError):
        pass  # another system, or an ARM processor
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


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


def write_section(rows: Sequence[Row], path: Path, title: str, device: torch.device, plot: str = "") -> None:
    """Write the rows as a table to a section of the Markdown file ``path``, in place of the section of this title and
    machine if there is one, else at the end.

    Times are relative to the first row of a case, with milliseconds on a GPU only. plot: the name of a picture to be
    shown below the table.
    """
    heading = f"## {title}: {device_name(device)}"
    on_gpu = device.type == "cuda"
    version = torch.__version__.partition("+")[0]
    about = "times are relative to the first row of their block, memory is that of one process"
    lines = [heading, "", f"PyTorch {version}, {time.strftime('%B %Y')}; {about}.", ""]
    lines += ["| | | time | MiB |" + " ms | photographs/s |" * on_gpu, "|---|---|---:|---:|" + "---:|---:|" * on_gpu]
    case = ""
    for row in rows:
        cells = [row["case"] if row["case"] != case else "", row["contender"]]
        cells += [f"{value:.3g}" if value is not None else "" for value in (row["ratio"], row["peak_mib"])]
        if on_gpu:
            cells += [f"{row['median_ms']:.3g}", f"{row['per_second'] or 0:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
        case = row["case"]
    growth = "Growth of time (blue) and memory (orange), relative to the first value"
    lines += ["", f"![{growth}]({plot})", ""] if plot else [""]
    page = path.read_text() if path.exists() else ""
    start = page.find(heading)
    end = page.find("\n## ", start + 1) + 1 if start >= 0 else 0
    before, after = (page, "") if start < 0 else (page[:start], page[end:] if end else "")
    text = before.rstrip("\n") + "\n\n" * bool(before.strip()) + "\n".join(lines) + ("\n" + after if after else "")
    path.write_text(text)


def write_records(rows: Sequence[Row], path: Path) -> None:
    """Write the rows to ``path``, as JSON if its name ends in .json, else as CSV."""
    with open(path, "w", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=1)
            return
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Small log-log panels as SVG, one per case: time (blue) and memory (orange) relative to the first value."""
    cases: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append((row["contender"], row["median_ms"], max(row["peak_mib"] or 0, 0.1)))
    parts, wide, high = [], 230, 190
    for i, (case, points) in enumerate(item for item in cases.items() if len(item[1]) > 1):
        left, top = i % 4 * wide + 45, i // 4 * high + 40
        values, *measured = zip(*points)
        xs = [math.log2(value / values[0]) for value in values]
        curves = [[math.log2(value / curve[0]) for value in curve] for curve in measured]
        low, span = min(map(min, curves)), max(max(map(max, curves)) - min(map(min, curves)), 1)
        across, up = 130 / xs[-1], 110 / span
        parts.append(f'<text x="{left}" y="{top - 16}" font-weight="bold">{case}</text>')
        parts.append(f'<path d="M{left} {top}V{top + 120}H{left + 140}" fill="none" stroke="#888"/>')
        for curve, colour in zip(curves, ("#06c", "#c60")):
            dots = [(left + across * x, top + 115 - up * (y - low)) for x, y in zip(xs, curve)]
            line = " ".join(f"{x:.0f},{y:.0f}" for x, y in dots)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>' for x, y in dots]
            times, shift = 2 ** curve[-1], -4 if curve[-1] == max(c[-1] for c in curves) else 12
            parts.append(
                f'<text x="{left + 137}" y="{dots[-1][1] + shift:.0f}" fill="{colour}">'
                f"{times:.{0 if times > 9.5 else 1}f}x</text>"
            )
        parts += [
            f'<text x="{left + across * x:.0f}" y="{top + 135}" text-anchor="middle">{value:g}</text>'
            for x, value in zip(xs, values)
        ]
    rows_high = (len(cases) + 3) // 4 * high + 20
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{4 * wide + 40}" height="{rows_high}" '
        f'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )
