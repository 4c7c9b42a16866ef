"""Speed and memory of infer.py, stage by stage and as a whole, and of the cross-layer attention.

    python benchmarks/bench_infer.py                      the bundled weights on 20 photographs from samples/
    python benchmarks/bench_infer.py --growth             also over photographs, processes, sizes, instances, batches
    python benchmarks/bench_infer.py --gpu 0 --backbone resnet50 --size 512 --batch-size 16

Results are checked first: a batch against its photographs one by one, the folded attention against the literal one.
Times are medians over `--repeats` interleaved runs, in milliseconds; memory is the rise of the peak over one call, in
MiB, of the GPU where one is used. The stages are timed one after another; infer.py shares photographs among processes.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import cv2
import numpy as np
import torch
from measure import (
    CPU,
    Call,
    Row,
    check,
    compare,
    device_name,
    peak_memory,
    plot,
    record,
    synchronize,
    timed,
    write_records,
    write_section,
)

import ops
from datasets.images import read_image
from datasets.listing import list_images
from engine.inference import write_all
from engine.post_processing import Prediction
from engine.predictor import ROOT, Predictor, default_batch_size
from engine.results import PICTURES, Results, write_results
from export import run_onnx, to_onnx
from models import AMP
from models.attention import CrossLayerFeatureMixing
from models.wsid_net import NetConfig, WSIDNet, load_network, save_weights
from utils.cli import add_gpu_option, select_device

OPERATORS = ("converge_centroids", "boundary_affinity", "random_walk")

T = TypeVar("T")


def make_predictor(args: argparse.Namespace, folder: Path, device: torch.device) -> Predictor:
    """The Predictor of --weights, or of an untrained network with --backbone, for timing only."""
    weights = args.weights
    if args.backbone:
        weights = folder / "untrained.pt"
        save_weights(WSIDNet(NetConfig(backbone=args.backbone)), weights)
    predictor = Predictor(weights, device, amp=args.amp)
    if args.size:
        predictor.net.config = replace(predictor.net.config, size=args.size)
    return predictor


def photographs(folder: Path, count: int) -> list[Path]:
    """``count`` copies of the photographs in samples/, in turn, under different names in ``folder``."""
    samples = islice(cycle(list_images(ROOT / "samples")), count)
    return [Path(shutil.copy(path, folder / f"{i}_{path.name}")) for i, path in enumerate(samples)]


# ---- the cases ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def bench_attention(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """CFM, folded and literal, on features of the size of a ResNet-50's at 512x512, channels last as in infer.py."""
    channels, sides = (64, 256, 512, 1024, 2048), (256, 128, 64, 32, 32)
    torch.manual_seed(0)
    last: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
    features = [torch.rand(1, c, side, side).to(**last) for c, side in zip(channels, sides)]
    mixing = CrossLayerFeatureMixing(channels, 256).to(**last)
    pairs = zip(mixing(features, (128, 128)), mixing.forward_literal(features, (128, 128)))
    print("\nCross-layer feature mixing")
    # Convolutions on CUDA round their inputs to TF32.
    check("folded against literal", max((a - b).abs().max().item() for a, b in pairs), 1e-4 if device == CPU else 5e-2)
    return compare(
        "Cross-layer feature mixing 128x128, 256 channels",
        {
            "folded": lambda: mixing(features, (128, 128)),
            "literal (Fig. 7)": lambda: mixing.forward_literal(features, (128, 128)),
        },
        args.repeats,
        device,
    )


def check_batch(predictor: Predictor, images: Sequence[np.ndarray], trained: bool) -> None:
    """A batch against its photographs one by one: the outputs of a WSID-Net, as a student's may differ in number, and
    the masks of trained networks only, as an untrained S is near 0.5."""
    print("\nA batch against single photographs")
    if isinstance(predictor.net, WSIDNet):
        inputs = [predictor.prepare(image) for image in images]
        together, alone = predictor.network(inputs), [predictor.network([one])[0] for one in inputs]
        for name in ("saliency", "boundary", "offsets"):
            a, b = (torch.stack([getattr(maps, name) for maps in each]) for each in (together, alone))
            # Other batches may take other kernels; bfloat16 keeps 8 bits.
            bound = 1e-1 if predictor.bf16 else 1e-4 if predictor.device == CPU else 1e-2
            check(name, ((a - b).abs().max() / b.abs().max()).item(), bound)
    if not trained:
        return
    differ = [
        (a.masks.any(0) != b.masks.any(0)).mean()
        for a, b in zip(predictor.predict_batch(images), map(predictor.predict, images))
    ]
    check("fraction of pixels that differ", max(differ), 0.1 if predictor.bf16 else 0.01)


def bench_network(args: argparse.Namespace, predictor: Predictor, images: Sequence[np.ndarray], size: int) -> list[Row]:
    """The network alone, on a batch of ``size`` that is already on its device; a single photograph on the CPU also in
    onnxruntime, where that is installed."""
    config, device = predictor.net.config, predictor.device
    batch = predictor.batch([predictor.prepare(image) for image in islice(cycle(images), size)])

    @torch.no_grad()
    def run(bf16: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            predictor.net(*batch)

    precisions = [True, False] if predictor.bf16 else [False]
    contenders: dict[str, Call] = {"bfloat16" if bf16 else "float32": partial(run, bf16) for bf16 in precisions}
    if size == 1 and device == CPU and find_spec("onnxruntime"):
        net = load_network(predictor.weights)
        net.config = config  # with another --size
        call = run_onnx(to_onnx(net))
        contenders["onnxruntime, float32"] = lambda: call(*batch)
    title = f"Network, {config.backbone} {config.size}x{config.size}, batch of {size}"
    return compare(title, contenders, args.repeats, device, count=size)


def write(out: Path, path: Path, image: np.ndarray, prediction: Prediction) -> Any:
    """Write the pictures that infer.py writes for one photograph."""
    return write_results(out, path, PICTURES, image, prediction)


def run_stages(predictor: Predictor, paths: Sequence[Path], out: Path) -> dict[str, float]:
    """The stages one after another, photograph by photograph: {stage: ms per photograph}."""
    spent = dict.fromkeys(("load", "network", "operators", "rest of the fusion", "draw and write"), 0.0)

    def watch(stage: str, function: Callable[..., T], *args: Any) -> T:
        synchronize(predictor.device)
        start = time.perf_counter()
        result = function(*args)
        synchronize(predictor.device)
        spent[stage] += (time.perf_counter() - start) * 1e3 / len(paths)
        return result

    def load(path: Path) -> tuple[np.ndarray, Any]:
        image = read_image(path)
        return image, predictor.prepare(image)

    with ExitStack() as stack:
        for name in OPERATORS:
            stack.enter_context(patch.object(ops, name, partial(watch, "operators", getattr(ops, name))))
        for path in paths:
            image, inputs = watch("load", load, path)
            (maps,) = watch("network", predictor.network, [inputs])
            prediction = watch("rest of the fusion", predictor.instances, maps, image.shape[:2])
            watch("draw and write", write, out, path, image, prediction)
    spent["rest of the fusion"] -= spent["operators"]
    return spent


def bench_stages(args: argparse.Namespace, predictor: Predictor, paths: Sequence[Path], out: Path) -> list[Row]:
    """The time of each stage and its fraction of the whole."""
    run_stages(predictor, paths[:2], out)
    runs = [run_stages(predictor, paths, out) for _ in range(args.repeats)]
    total = statistics.median(sum(run.values()) for run in runs)
    title = f"Stages, one after another, fractions of the time ({len(paths)} photographs)"
    print(f"\n{title}\n{'':34}{'median ms':>11}{'best ms':>10}{'of total':>10}")
    rows: list[Row] = []
    fraction: dict[str, float] = {}
    for stage in runs[0]:
        times = [run[stage] for run in runs]
        fraction[stage] = statistics.median(times) / total
        rows.append(record(title, stage, times, ratio=fraction[stage]))
        print(f"  {stage:32}{statistics.median(times):11.2f}{min(times):10.2f}{fraction[stage]:10.1%}")
    both = fraction["operators"] + fraction["rest of the fusion"]
    print(f"  operators and fusion: {both:.1%} of the time (goal: under 10 %)")
    return rows


def write_whole(args: argparse.Namespace, predictor: Predictor, paths: Sequence[Path], out: Path, workers: int) -> None:
    """What infer.py does with photographs, from files to files of a new folder in ``out``."""
    results = Results(Path(tempfile.mkdtemp(dir=out)), "benchmark")
    for result in write_all(paths, predictor, results, args.batch_size, workers):
        assert isinstance(result, list)


def bench_whole(args: argparse.Namespace, predictor: Predictor, paths: Sequence[Path], out: Path) -> list[Row]:
    """infer.py from files to files in one process and in several, whose start counts, without loading the weights."""
    run = partial(write_whole, args, predictor, paths, out)
    contenders: dict[str, Call] = {
        "one process": partial(run, 1),
        f"{args.workers} processes": partial(run, args.workers),
        "one after another": lambda: run_stages(predictor, paths, out),
    }
    title = f"infer.py on {len(paths)} photographs, batches of {args.batch_size}"
    return compare(title, contenders, args.repeats, predictor.device, count=len(paths))


@torch.no_grad()
def growth(args: argparse.Namespace, predictor: Predictor, paths: Sequence[Path], out: Path) -> list[Row]:
    """Time and memory over the number and the size of photographs, processes, instances, batch size and, on the CPU,
    threads."""
    rows: list[Row] = []
    device = predictor.device

    def measure(what: str, value: int, call: Call, count: int | None = None) -> None:
        call()
        memory = peak_memory(call, device)
        times = [timed(call, device) for _ in range(max(3, args.repeats // 2))]
        rows.append(record(what, value, times, memory=memory, count=count))
        print(f"  {what:34}{value:8}{rows[-1]['median_ms']:11.2f} ms{memory:10.1f} MiB")

    print("\nGrowth")
    most = len(paths)
    for count in sorted({max(1, most // part) for part in (1, 2, 4, 8)}):
        measure("infer.py, photographs", count, partial(write_whole, args, predictor, paths[:count], out, 1), count)
    for workers in sorted({1, args.workers}):
        measure("infer.py, processes", workers, partial(write_whole, args, predictor, paths, out, workers), most)
    image = read_image(paths[0])
    for side in (250, 500, 1000, 2000, 4000):
        resized = cv2.resize(image, (side, side * 3 // 4), interpolation=cv2.INTER_AREA)
        measure("photograph, longer side", side, partial(predictor.predict, resized), 1)
    (maps,) = predictor.network([predictor.prepare(image)])
    for number in (1, 2, 4, 8, 16):
        call = partial(predictor.post_process, maps, image.shape[:2], number)
        measure("instances, after the network", number, call)
    images = [predictor.prepare(read_image(path)) for path in paths[:8]]

    def network(batch: int) -> None:
        predictor.network(list(islice(cycle(images), batch)))

    for batch in (1, 2, 4, 8) if device == CPU else (1, 2, 4, 8, 16, 32):
        measure("network, batch", batch, partial(network, batch), batch)
    if device == CPU:
        threads = torch.get_num_threads()
        for count in sorted({2**i for i in range(threads.bit_length())} | {threads}):
            torch.set_num_threads(count)
            measure("network, threads", count, partial(network, args.batch_size), args.batch_size)
    return rows


def main() -> None:
    """Run the benchmarks that are asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_option(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--workers", type=int, default=max(2, torch.get_num_threads()), help="processes, as for infer.py"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--photographs", type=int, default=20, help="number of copies of those in samples/")
    parser.add_argument("--batch-size", type=int, help="default: as infer.py")
    parser.add_argument("--weights", type=Path, help="default: as infer.py")
    parser.add_argument("--backbone", help="time an untrained network of 256 channels instead of --weights")
    parser.add_argument("--size", type=int, help="input square of the network in pixels; default: the weights'")
    parser.add_argument("--amp", choices=AMP, default="auto", help="as for infer.py")
    parser.add_argument(
        "--only", choices=("attention", "infer"), help="only the cross-layer attention or only infer.py"
    )
    parser.add_argument(
        "--growth", action="store_true", help="also over photographs, processes, sizes, instances and batches"
    )
    parser.add_argument("--csv", type=Path, help="write all tables to this file")
    parser.add_argument("--json", type=Path, help="the same as JSON")
    parser.add_argument(
        "--page", type=Path, help="Markdown file that gets the table as a section, and the plot beside it"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = select_device(args.gpu)
    args.batch_size = args.batch_size or default_batch_size(device)
    print(device_name(device))
    rows: list[Row] = []
    over_sizes: list[Row] = []
    if args.only != "infer":
        rows += bench_attention(args, device)
    if args.only != "attention":
        with tempfile.TemporaryDirectory() as folder:
            paths, out = photographs(Path(folder), args.photographs), Path(folder)
            predictor = make_predictor(args, out, device)
            images = [read_image(path) for path in paths[:8]]
            check_batch(predictor, images[: args.batch_size], trained=not args.backbone)
            for batch in sorted({1, args.batch_size}):
                rows += bench_network(args, predictor, images, batch)
            rows += bench_stages(args, predictor, paths, out)
            rows += bench_whole(args, predictor, paths, out)
            if args.growth:
                over_sizes = growth(args, predictor, paths, out)
                picture = (args.page or Path("infer")).with_suffix(f".{predictor.weights.stem}.svg")
                plot(over_sizes, picture)
            if args.page:
                title = f"infer.py, {predictor.weights.stem}"
                write_section(rows, args.page, title, device, picture.name if args.growth else "")
    for path in filter(None, (args.csv, args.json)):
        write_records(rows + over_sizes, path)


if __name__ == "__main__":
    main()
