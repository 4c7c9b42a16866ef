"""Work beside the main thread: processes for the CRF and the fusion of a training, threads that work ahead."""

import multiprocessing
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait

import torch


class WorkerPool:
    """A pool that holds back the producer: at most four tasks a worker wait, so memory stays bounded.

    An error in a worker is raised by the next ``submit`` or at the end of the ``with`` block. With workers=0
    everything runs in this process.
    """

    def __init__(self, workers):
        self.limit = 4 * workers
        # spawn: forking a process that has started torch's threads can deadlock. One thread each: they are many.
        options = {"initializer": torch.set_num_threads, "initargs": (1,)}
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, **options) if workers else None
        self.pending = set()

    def submit(self, function, *args):
        """Run ``function(*args)`` in a worker, waiting while too many tasks are under way."""
        if self.pool is None:
            function(*args)
            return
        if len(self.pending) >= self.limit:
            done, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
        self.pending.add(self.pool.submit(function, *args))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if self.pool is None:
            return
        try:
            if kind is None:
                for future in self.pending:
                    future.result()
        finally:
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
