"""infer.py behind its options: photographs and clips to the files of the output folder, in one process or several."""

import argparse
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.listing import CLIP_SUFFIXES
from engine.predictions import coco_ids
from engine.predictor import Predictor, default_batch_size, default_threads, process
from engine.results import Results
from utils import digest, distributed
from utils.cli import InputError, make_folder
from utils.lazy import gc_disabled
from utils.parallel import WorkerPool
from utils.script import report_problems

LISTED = 10  # the files written are printed one by one up to so many photographs
MOST_ON_GPU = 8  # processes that share a GPU, each of which needs half a gigabyte of its memory for CUDA alone
FOR_PHOTOGRAPHS = ("visualize", "cutouts", "coco", "coco_ids", "labelme")  # of no effect on clips
SECONDS_TO_START = 5.0  # of processes: the imports and the network
# What a photograph takes beside the network, roughly: in one process, whose threads share the rest among the cores, it
# keeps all but one core, or the GPU, waiting.
SECONDS_BESIDE = {"cpu": 0.025, "cuda": 0.02}

Outcome = list[Path] | InputError  # the files of a photograph, or why there are none


def infer(args: argparse.Namespace, paths: list[Path], failed: list[InputError]) -> int:
    """Write the results of the photographs and clips ``paths``; returns the exit code.

    args: of ``infer.get_args_parser``. failed: the errors of the sources that could not be used. The code is 0, 1 when
    a part of what was asked for failed, or 2 when all of it did.
    """
    requested = len(paths) + len(failed)
    clips = [path for path in paths if path.suffix.lower() in CLIP_SUFFIXES]
    paths = [path for path in paths if path not in clips]
    if clips and args.saliency_dir:
        raise InputError("--saliency-dir has maps for photographs alone; leave it out, or leave out the clips")
    unused = [f"--{name.replace('_', '-')}" for name in FOR_PHOTOGRAPHS if clips and getattr(args, name)]
    if unused and len(clips) == requested:
        raise InputError(f"only clips are given, for which {', '.join(unused)} writes nothing; leave it out")
    with gc_disabled():  # the network imports much
        device = distributed.init(args.gpu)
        # One list for all processes, whose shares would overlap if a photograph was added between two listings.
        paths, clips, failed = distributed.run_on_main(lambda: (paths, clips, failed))
        requested = len(paths) + len(clips) + len(failed)
        options = {name: getattr(args, name) for name in ("method", "count", "amp", "refine")}
        predictor = Predictor(args.weights, device, settings=args.fusion, **options)
    ids = partial(coco_ids, args.coco_ids) if args.coco_ids else None
    identity = [predictor.identity(), args.coco_ids and digest.of_file(args.coco_ids)]
    kinds = ["instances"]
    kinds += ["overlay"] if args.overlay else []
    kinds += predictor.map_kinds if args.visualize else []
    kinds += ["cutouts"] if args.cutouts else []
    kinds += ["labelme"] if args.labelme else []
    results = Results(make_folder(args.out), identity, kinds, args.saliency_dir, ids, args.coco, args.coco_polygons)
    paths, clashes = distributed.run_on_main(results.without_clashes, paths)
    failed += clashes
    if clips:
        from engine import video

        clips, clashes = video.without_clashes(clips, paths, results.folder)
        failed += clashes
    if ids:
        ids([path.stem for path in paths])  # raises its InputError before the work begins
    own = distributed.shard(paths)
    todo = results.unfinished(own)
    if distributed.is_main():
        print(f"weights: {predictor.weights}")
        if unused:
            print(f"{', '.join(unused)}: written for the photographs, not for the clips", file=sys.stderr)
    if len(todo) < len(own):
        print(
            f"{len(own) - len(todo)} of {len(own)} photographs are finished and skipped; to compute them anew delete "
            f"{results.folder / results.name}*.jsonl"
        )

    batch_size = args.batch_size or default_batch_size(device)
    found = write_all(todo, predictor, results, batch_size, args.workers)
    written: list[list[Path]] = []
    errors: list[InputError] = []
    problems: list[InputError] = []  # of clips whose results lack some frames
    silent = len(paths) < 2 or not distributed.is_main()
    try:
        with closing(found):
            # disable=None: a progress bar on a terminal only.
            for result in tqdm(found, total=len(todo), disable=silent or None, mininterval=1):
                if isinstance(result, InputError):
                    errors.append(result)
                else:
                    written.append(result)
        for clip in distributed.shard(clips):
            try:
                of_clip, lacking = video.process_clip(clip, results.folder, predictor, batch_size, default_threads())
            except InputError as error:
                errors.append(error)
            else:
                written.append(of_clip)
                problems += lacking
    except BaseException:
        results.save(paths)
        raise
    results.close()
    written, errors = distributed.gather(written), distributed.gather(errors)
    problems = distributed.gather(problems)
    if not distributed.is_main():
        return 0

    failed += errors
    all_failed, lists = len(failed) == requested, []
    failed += problems
    try:
        lists = results.save(paths)
    except InputError as error:
        failed.append(error)
    if len(written) > LISTED:
        print(f"{args.out}: pictures of {len(written)} photographs")
        written = []
    for file in [*sum(written, []), *lists]:
        print(file)
    code = report_problems(failed)
    return 2 if all_failed else code


def write_all(
    paths: Sequence[Path], predictor: Predictor, results: Results, batch_size: int, workers: int | None = None
) -> Generator[Outcome, None, None]:
    """The ``Outcome`` of every photograph of ``paths``, in their order, as they are finished.

    workers: processes that share the photographs, each with a network of its own; None: ``processes_for``. With 1 they
    are computed in this process. A process that dies is an InputError.
    """
    workers = workers or processes_for(len(paths), predictor.device)
    if workers == 1:
        yield from process(paths, predictor, results.add, batch_size, default_threads(), results.saliency_dir)
        return
    # Whole batches, and a few tasks for each process, so that all end at the same time.
    size = batch_size * max(1, min(4, len(paths) // (4 * workers * batch_size)))
    tasks = [(paths[first : first + size], batch_size) for first in range(0, len(paths), size)]
    with WorkerPool(workers, _start, (predictor, results)) as pool:
        for outcomes in pool.map(_write_some, tasks):
            results.written |= any(isinstance(outcome, list) for outcome in outcomes)
            yield from outcomes


def processes_for(photographs: int, device: torch.device) -> int:
    """How many processes finish so many photographs soonest: they must save more time than their start takes."""
    if distributed.world_size() > 1:  # torchrun has started as many as were asked for
        return 1
    seconds = SECONDS_BESIDE.get(device.type, 0.02) * photographs
    if device.type == "cpu":
        cores = torch.get_num_threads()
        return cores if seconds * (1 - 1 / cores) > SECONDS_TO_START else 1
    return max(1, min(MOST_ON_GPU, (os.cpu_count() or 1) // 2, int(seconds / SECONDS_TO_START)))


_state: tuple[Predictor, Results]  # of a worker process


def _start(predictor: Predictor, results: Results) -> None:
    global _state
    _state = predictor, results


def _write_some(paths: Sequence[Path], batch_size: int) -> list[Outcome]:
    """In a worker process: what ``write_all`` yields for some of the photographs."""
    predictor, results = _state
    return list(process(paths, predictor, results.add, batch_size, 1, results.saliency_dir))
