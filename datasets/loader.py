"""Batches in an order that a stopped training finds again, and the processes that load them."""

import multiprocessing
from contextlib import contextmanager

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from utils import distributed
from utils.cli import InputError
from utils.parallel import leave_signals_to_parent


class ResumableSampler:
    """Batches of indices from iteration ``start`` on: the shuffles of all epochs, each a function of (seed, epoch).

    Sets ``dataset.epoch`` through the indices it hands out, so that it also reaches the loader's processes.
    """

    def __init__(self, length, batch_size, epochs, seed, start=0):
        if length < 1:
            raise InputError("there is no image to train on; check --data")
        self.length, self.batch_size, self.epochs, self.seed, self.start = length, batch_size, epochs, seed, start
        self.per_epoch = max(1, length // batch_size)

    def __len__(self):
        return self.per_epoch * self.epochs - self.start

    def __iter__(self):
        for epoch in range(self.start // self.per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            order = np.resize(order, max(self.length, self.batch_size))  # fewer images than a batch: some come twice
            for step in range(self.per_epoch):
                if epoch * self.per_epoch + step >= self.start:
                    batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                    yield [(epoch, int(index)) for index in batch]


class ShareOfBatches:
    """Of every batch of a sampler, the share of this process (utils.distributed)."""

    def __init__(self, sampler):
        self.sampler, self.share = sampler, distributed.share_of_batch(sampler.batch_size)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        first = distributed.rank() * self.share
        return (batch[first : first + self.share] for batch in self.sampler)


class _ByEpoch(Dataset):
    """Lets the sampler say which epoch an item is drawn for. An InputError is returned, for ``_collate``."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        self.dataset.epoch, index = key
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def _begin(_):
    leave_signals_to_parent()  # before it ends the loader's processes, the training saves


def _collate(items):
    """A batch; or the InputError of an item, which would not pass between processes as the one sentence it is."""
    errors = [item for item in items if isinstance(item, InputError)]
    return errors[0] if errors else default_collate(items)


@contextmanager
def training_loader(dataset, *, batch_size, epochs, workers, start=0, pin=False):
    """Within it, an iterator over all epochs of ``dataset`` from iteration ``start`` on: this process's share of each
    batch, a dict of tensors.

    pin: whether batches come in memory that a GPU copies from while it computes. Iterating raises the InputError that
    loading an image raised. What happens to the loader's processes (``workers``) is an InputError wherever in the block
    it comes to light, and they end with the block, whatever ends that.
    """
    sampler = ResumableSampler(len(dataset), batch_size, epochs, dataset.seed, start)
    loader = DataLoader(
        _ByEpoch(dataset),
        batch_sampler=ShareOfBatches(sampler),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_collate,
        worker_init_fn=_begin,
    )
    others, batches = set(multiprocessing.active_children()), None
    try:
        batches = iter(loader)
        yield _raising(batches)
    except (RuntimeError, OSError) as error:
        if sentence := _sentence(error):
            raise InputError(sentence) from error
        raise
    finally:
        try:
            if batches and workers:
                # At once: a traceback would keep the iterator alive, and Python waits for the processes when it ends.
                batches._shutdown_workers()
        finally:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()


def _raising(batches):
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _sentence(error):
    """What an error about the loader's processes means, as the sentence of an InputError; None for other errors."""
    message = str(error)
    for lack in ("Too many open files", "Cannot allocate memory", "Resource temporarily unavailable"):
        if lack in message:
            return f"the machine does not bear the processes that load images ({lack}); give fewer --workers, or 0"
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
