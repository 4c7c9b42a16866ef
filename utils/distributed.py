"""Several processes, one per device, started by ``torchrun``; a single process is the case of one.

    torchrun --nproc_per_node=4 train_branches.py --batch-size 24

--batch-size is the total batch of all processes: each takes an equal part of every batch, and the learning rate is that
of the total batch.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.cli import InputError, select_device

T = TypeVar("T")

START_TIMEOUT = timedelta(minutes=5)  # until all processes have started
WAIT_TIMEOUT = timedelta(days=1)  # for a process with more work than the others; torchrun ends all when one fails


def init(gpu: int | None) -> torch.device:
    """Join the processes that torchrun started, if any, and return the device of this one.

    gpu: as for ``select_device``; with several processes, process n of a machine takes GPU ``gpu`` + n, or GPU n by
    default.
    Raises InputError for an incomplete environment of torchrun, and when the other processes do not start.
    """
    if dist.is_initialized() or not is_launched():
        return select_device(gpu)
    device = select_device(gpu, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        _store().set(f"here/{number}", "")
        _store().wait([f"here/{other}" for other in range(count)], START_TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(),
            rank=number,
            world_size=count,
            timeout=WAIT_TIMEOUT,
        )
        _store().set_timeout(WAIT_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        cause = str(error).partition("\n")[0]
        raise InputError(f"the processes do not find each other at {where} ({cause}); start them anew") from error
    # The group's threads may still release buffers; one that does so while Python shuts down aborts the process.
    atexit.register(dist.destroy_process_group)
    return device


def is_launched() -> bool:
    """Whether torchrun started this process; InputError for an incomplete or inconsistent environment."""
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not any(name in os.environ for name in numbers):
        return False
    missing = [name for name in (*numbers, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    valid = all(os.environ.get(name, "0").isdecimal() for name in (*numbers, "MASTER_PORT"))
    if missing or not valid or int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        given = ", ".join(f"{name}={os.environ[name]}" for name in numbers if name in os.environ)
        what = f"without {', '.join(missing)}" if missing else "which do not fit together"
        raise InputError(f"the environment has {given} {what}; start several processes with torchrun, or unset these")
    return True


@cache
def _store() -> dist.Store:
    """The key-value store that the processes share beside their collectives."""
    store, *_ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    return store


def first_to_fail() -> bool:
    """Whether this process, which is about to end with an error, is the first of all to fail.

    The others fail of the same error, or because this process is missing in a collective.
    """
    if not (dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return True
    try:
        return _store().add("failures", 1) == 1
    except (RuntimeError, ValueError, KeyError, OSError):  # the process that held the store is gone
        return True


def is_lost_connection(error: Exception) -> bool:
    """Whether an exception of a collective says that another process, or its machine, is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def rank() -> int:
    """The number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes the files."""
    return rank() == 0


def barrier() -> None:
    """Return once every process has reached this call: files written before can then be read by all."""
    if dist.is_initialized():
        dist.barrier()


def run_on_main(function: Callable[..., T], *args: Any) -> T:
    """The result of ``function(*args)``, run in the main process, in all processes; its InputError is raised in all."""
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [(function(*args), "")]
        except InputError as error:
            outcome = [(None, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    value, message = outcome[0]
    if message:
        raise InputError(message)
    return value


def context_on_main(make: Callable[..., AbstractContextManager[T]], *args: Any) -> AbstractContextManager[T | None]:
    """The context ``make(*args)`` in the main process; in the others one that does nothing and returns None."""
    return make(*args) if is_main() else nullcontext()


def shard(items: Sequence[T]) -> list[T]:
    """Every world_size()-th item, beginning with item rank(): the items of this process."""
    return list(items[rank() :: world_size()])


def local_batch_size(batch_size: int) -> int:
    """Images of a batch that each process takes; InputError when the number of processes does not divide it."""
    if batch_size % world_size():
        raise InputError(f"--batch-size {batch_size} is not a multiple of the {world_size()} processes; make it one")
    return batch_size // world_size()


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of a float tensor over the processes, without a gradient."""
    values = values.detach()
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set in any process; all get the same answer at the same step."""
    return any(_all_gather(flag))


@contextmanager
def raise_in_all() -> Iterator[None]:
    """Context whose InputError, in any process, is raised in all of them, so that none waits for a failed one."""
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    if errors := list(filter(None, _all_gather(error))):
        raise errors[0]


def _all_gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(items: Iterable[T]) -> list[T]:
    """The items of all processes as one list, in the main process; an empty list in the others."""
    if not dist.is_initialized():
        return list(items)
    parts: Any = [None] * world_size() if is_main() else None
    dist.gather_object(list(items), parts)
    return [item for part in parts for item in part] if is_main() else []
