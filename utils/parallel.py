"""Work beside the main thread: processes for the CRF and the fusion of a training, threads that work ahead."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from utils.cli import InputError, stop_at_once


def leave_signals_to_parent():
    """In a worker process: Ctrl-C and a scheduler's SIGTERM reach all processes of a job, and what then becomes of this
    one its parent decides; it ends when that ends, however hard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _begin():
    leave_signals_to_parent()
    torch.set_num_threads(1)  # the workers are many


@contextmanager
def _signals_later():
    """Ctrl-C and SIGTERM wait meanwhile; processes that are started meanwhile never see them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """A pool that holds back the producer: at most four tasks a worker wait, so memory stays bounded.

    An error in a worker is raised by the next ``submit`` or at the end of the ``with`` block, InputError where a worker
    itself is gone. An error in the block, Ctrl-C and SIGTERM (Stopped) end the workers at once. With workers=0
    everything runs in this process.
    """

    def __init__(self, workers):
        self.limit = 4 * workers
        # spawn: forking a process that has started torch's threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) if workers else None
        self.pending, self.others = set(), set(multiprocessing.active_children())

    def submit(self, function, *args):
        """Run ``function(*args)`` in a worker, waiting while too many tasks are under way."""
        if self.pool is None:
            function(*args)
            return
        if len(self.pending) >= self.limit:
            done, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
            self._collect(done)
        with self._naming_the_loss(), _signals_later():
            self.pending.add(self.pool.submit(function, *args))

    def _collect(self, futures):
        with self._naming_the_loss():
            for future in futures:
                future.result()

    @contextmanager
    def _naming_the_loss(self):
        try:
            yield
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died, mostly because the memory did not suffice; give fewer --workers (0 does their "
                "work in the script's own process), and the same command continues"
            ) from error

    def __enter__(self):
        self.stop = stop_at_once()
        self.stop.__enter__()
        return self

    def __exit__(self, kind, value, trace):
        try:
            if kind is None and self.pool:
                self._collect(self.pending)
                self.pool.shutdown()
        finally:
            if self.pool:
                self._end()
            self.stop.__exit__(None, None, None)

    def _end(self):
        for worker in set(multiprocessing.active_children()) - self.others:
            worker.kill()
        self.pool.shutdown(cancel_futures=True)


def map_ahead(function, items, workers, ahead):
    """Yield ``function(item)`` of every item, in order, computed in ``workers`` threads beside the caller's.

    When a value is yielded at most ``ahead`` items (0 or more) are under way or done; ``items`` is taken from no
    further, in the caller's thread, and may be endless. The first error is raised in its item's place and ends the
    rest. Meant for work that leaves Python (decoding, OpenCV, torch); torch uses one core in each thread.
    """
    torch.get_num_threads()  # settles the caller's number, which the workers' would otherwise become
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
