"""Worker processes for the parts that no GPU speeds up: the CRF and the fusion."""

import multiprocessing
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait


class WorkerPool:
    """A pool that holds back the producer: at most four tasks a worker wait, so memory stays bounded.

    An error in a worker is raised by the next ``submit`` or at the end of the ``with`` block. With workers=0
    everything runs in this process.
    """

    def __init__(self, workers):
        self.limit = 4 * workers
        # spawn: forking a process that has started torch's threads can deadlock
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context) if workers else None
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
