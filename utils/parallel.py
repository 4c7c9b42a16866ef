"""Work beside the main thread: processes for the CRF and the fusion of a training, threads that prefetch."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, TypeVar

import torch

from utils.cli import InputError
from utils.script import raise_on_sigterm

T = TypeVar("T")
R = TypeVar("R")

# Most of what a worker process imports, and most of the time that it takes to start.
LIBRARIES = ["cv2", "numpy", "PIL.Image", "torch"]

GPU_BATCH, GPU_LOADERS = 16, 6  # photographs in a pass of a network that is not trained; threads that load them


def leave_signals_to_parent() -> None:
    """In a worker process: ignore SIGINT and SIGTERM, which reach all processes of a job, and end with the parent, even
    when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _start_worker(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    leave_signals_to_parent()
    torch.set_num_threads(1)  # one core per worker
    if initializer:
        initializer(*initargs)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Context that delays SIGINT and SIGTERM; processes started within it never receive them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _processes() -> BaseContext:
    """How processes are started: not by forking this one, since a process that has started torch's threads can then
    deadlock, but, where the system can, by forking one that has only imported the libraries, once for all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


class WorkerPool:
    """A pool of processes whose queue is bounded to four tasks per worker, which bounds the memory.

    workers: number of processes; with 0 everything runs in this process. initializer(*initargs) is called first in each
    of them. Use it in a ``with`` block. An error in a worker is raised by the next ``submit`` or at the end of the
    block, as InputError when a worker process has died. An error in the block, Ctrl-C and SIGTERM (``Stopped``) end the
    workers at once.
    """

    def __init__(
        self, workers: int, initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()
    ) -> None:
        self.limit = 4 * workers
        start = partial(_start_worker, initializer, initargs)
        self.pool = ProcessPoolExecutor(workers, mp_context=_processes(), initializer=start) if workers else None
        self.pending: set[Future] = set()
        self.others = set(multiprocessing.active_children())

    def submit(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function(*args)`` in a worker; waits while the queue is full."""
        if self.pool is None:
            function(*args)
            return
        if len(self.pending) >= self.limit:
            done, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
            self._raise_errors(done)
        with self._explaining_death(), _signals_blocked():
            self.pending.add(self.pool.submit(function, *args))

    def map(self, function: Callable[..., R], tasks: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        """Yield ``function(*task)`` of every task, in their order; up to ``limit`` are ahead of the yielded one."""
        assert self.pool
        ahead: deque[Future[R]] = deque()
        with self._explaining_death():
            for task in tasks:
                with _signals_blocked():
                    ahead.append(self.pool.submit(function, *task))
                if len(ahead) >= self.limit:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _raise_errors(self, futures: Iterable[Future]) -> None:
        with self._explaining_death():
            for future in futures:
                future.result()

    @contextmanager
    def _explaining_death(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died, mostly because the memory did not suffice; give fewer --workers (0 does their "
                "work in the script's own process), and the same command continues"
            ) from error

    def __enter__(self) -> "WorkerPool":
        self.stop = raise_on_sigterm()
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.pool:
                self._raise_errors(self.pending)
                self.pool.shutdown()
        finally:
            if self.pool:
                self._end(self.pool)
            self.stop.__exit__(None, None, None)

    def _end(self, pool: ProcessPoolExecutor) -> None:
        for worker in set(multiprocessing.active_children()) - self.others:
            worker.kill()
        pool.shutdown(cancel_futures=True)


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[R]:
    """Yield ``function(item)`` of every item, in order, computed in ``workers`` threads beside the caller's.

    ahead: how many items (0 or more) may be under way or done beyond the yielded one. ``items`` is iterated in the
    caller's thread, no further than that, and may be endless. An error is raised in the place of its item and ends the
    iteration. Meant for work that releases the interpreter lock (decoding, OpenCV, torch); torch uses one core in each
    thread.
    """
    torch.get_num_threads()  # fixes the caller's number of threads, which the workers would otherwise change
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches_ahead(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[list[R]]:
    """``function(item)`` of every item, in lists of the size of a batch for a network that is not trained.

    On a GPU these are of ``GPU_BATCH`` items, and threads compute the next two meanwhile. On the CPU, which has no time
    to spare beside the network, it is one item, in the caller's thread: other threads change how many threads torch
    uses afterwards, and with it the last digits of a training in the same process.
    """
    if device.type == "cpu":
        yield from ([function(item)] for item in items)
        return
    results = map_ahead(function, items, GPU_LOADERS, 2 * GPU_BATCH)
    while batch := list(islice(results, GPU_BATCH)):
        yield batch
