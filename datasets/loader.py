"""Batches in a reproducible order, from which a training can be resumed, and the processes that load them."""

import multiprocessing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from utils import distributed
from utils.cli import InputError
from utils.parallel import leave_signals_to_parent


class ResumableSampler:
    """Batches of (epoch, index) from iteration ``start`` on; the order of an epoch depends on (seed, epoch) alone.

    length: number of images; batch_size: images per batch, repeated when there are fewer; an incomplete last batch is
    dropped. The epoch travels with the index, so that it also reaches the loader's processes. Raises InputError when
    there is no image.
    """

    def __init__(self, length: int, batch_size: int, epochs: int, seed: int, start: int = 0) -> None:
        if length < 1:
            raise InputError("there is no image to train on; check --data")
        self.length, self.batch_size, self.epochs, self.seed, self.start = length, batch_size, epochs, seed, start
        self.per_epoch = max(1, length // batch_size)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            order = np.resize(order, max(self.length, self.batch_size))
            for step in range(self.per_epoch):
                if epoch * self.per_epoch + step >= self.start:
                    batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                    yield [(epoch, int(index)) for index in batch]


class LocalBatches:
    """The part of every batch of a sampler that this process loads (utils.distributed)."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self.sampler, self.size = sampler, distributed.local_batch_size(sampler.batch_size)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = distributed.rank() * self.size
        return (batch[first : first + self.size] for batch in self.sampler)


class _EpochDataset(Dataset):
    """Sets the epoch of ``dataset`` from the sampler's keys. An InputError is returned, for ``_collate``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        self.dataset.epoch, index = key
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def _start_worker(_: int) -> None:
    leave_signals_to_parent()  # the training saves first, then ends the loader's processes


def _collate(items: list[Any]) -> Any:
    """A batch, or the InputError of an item: raised in a worker it would arrive with that worker's traceback."""
    errors = [item for item in items if isinstance(item, InputError)]
    return errors[0] if errors else default_collate(items)


@contextmanager
def training_loader(
    dataset: Any, *, batch_size: int, epochs: int, workers: int, start: int = 0, pin: bool = False
) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """Context with an iterator over all epochs of ``dataset`` from iteration ``start`` on: this process's part of each
    batch, a dict of tensors.

    dataset: has ``seed`` and ``epoch``, as TrainingImages; batch_size: of all processes together; workers: loading
    processes, 0 for none; pin: whether batches are in pinned memory. Iterating raises the InputError that loading an
    image raised. The death of a loading process, and a lack of memory or file handles, are InputErrors anywhere in the
    block. The processes end with the block.
    """
    sampler = ResumableSampler(len(dataset), batch_size, epochs, dataset.seed, start)
    loader = DataLoader(
        _EpochDataset(dataset),
        batch_sampler=LocalBatches(sampler),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
    )
    others = set(multiprocessing.active_children())
    batches: Any = None
    try:
        batches = iter(loader)
        yield _raise_errors(batches)
    except (RuntimeError, OSError) as error:
        if message := _explain(error):
            raise InputError(message) from error
        raise
    finally:
        try:
            if batches and workers:
                # Explicitly: a traceback would keep the iterator alive, and Python waits for its processes at exit.
                batches._shutdown_workers()
        finally:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()


def _raise_errors(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _explain(error: Exception) -> str | None:
    """The message for an error of the loader's processes; None for other errors."""
    message = str(error)
    for lack in ("Too many open files", "Cannot allocate memory", "Resource temporarily unavailable"):
        if lack in message:
            return f"the machine cannot run the processes that load images ({lack}); give fewer --workers, or 0"
    if "out of shared memory" in message or "</torch_" in message:
        return (
            "the shared memory (/dev/shm) does not hold the batches that the loader's processes prepare; give "
            "--workers 0 or fewer, or start the container with more, such as --shm-size 8g (Docker) or --ipc host"
        )
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return (
            "a process that loads images died, mostly because the memory did not suffice; give fewer --workers "
            "(0 loads in the script's own process), and the same command continues"
        )
    return None
