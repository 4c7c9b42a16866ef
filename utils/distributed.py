"""Several processes, one a device, as ``torchrun`` starts them; a single process is the case of one.

    torchrun --nproc_per_node=4 train_branches.py --batch-size 24

--batch-size is the effective batch, whatever the number of processes: each takes an equal share of every batch, and
the learning rate stays that of the batch.
"""

import atexit
import os
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from utils.cli import InputError, select_device

MEET = timedelta(minutes=5)  # for all processes to come
WAIT = timedelta(days=1)  # for one that has more to do than the others; torchrun ends them where one has failed


def start(gpu):
    """Join the processes torchrun started, if it did. Returns the torch.device of this one.

    gpu: as for ``select_device``; with several processes, process n of a machine takes the n-th GPU from there on.
    Raises InputError where the environment is not one that torchrun makes, and where the others do not come.
    """
    if dist.is_initialized() or not is_launched():
        return select_device(gpu)
    device = select_device(gpu + int(os.environ["LOCAL_RANK"]) if gpu >= 0 else -1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    number, of = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        _store().set(f"here/{number}", "")
        _store().wait([f"here/{other}" for other in range(of)], MEET)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=_store(), rank=number, world_size=of, timeout=WAIT
        )
        _store().set_timeout(WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        cause = str(error).partition("\n")[0]
        raise InputError(f"the processes do not find each other at {where} ({cause}); start them anew") from error
    # Its threads may still let go of what they sent; one that does so while Python shuts down aborts the process.
    atexit.register(dist.destroy_process_group)
    return device


def is_launched():
    """Whether torchrun started this process; InputError for an environment that is only half one of torchrun."""
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not any(name in os.environ for name in numbers):
        return False
    missing = [name for name in (*numbers, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    sound = all(os.environ.get(name, "0").isdecimal() for name in (*numbers, "MASTER_PORT"))
    if missing or not sound or int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        given = ", ".join(f"{name}={os.environ[name]}" for name in numbers if name in os.environ)
        what = f"without {', '.join(missing)}" if missing else "which do not fit together"
        raise InputError(f"the environment has {given} {what}; start several processes with torchrun, or unset these")
    return True


@cache
def _store():
    """What the processes tell each other by beside their collectives."""
    store, *_ = next(dist.rendezvous("env://", timeout=MEET))
    return store


def first_to_fail():
    """Whether this process, which is about to end with an error, is the first of all to.

    Of the rest, some fail of the same, and some because they miss this one in the middle of what they do together.
    """
    if not (dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return True
    try:
        return _store().add("failures", 1) == 1
    except (RuntimeError, ValueError, KeyError, OSError):  # the process that kept the count is gone
        return True


def rank():
    """The number of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    return rank() == 0


def wait_for_all():
    """Return once every process is here: what one wrote before, the others can read now."""
    if dist.is_initialized():
        dist.barrier()


def from_first(function, *args):
    """What ``function(*args)`` returns in the first process, in all of them; its InputError is raised in all.

    No process goes on before the first has the answer.
    """
    outcome = [None]
    if is_first():
        try:
            outcome = [(function(*args), "")]
        except InputError as error:
            outcome = [(None, str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    value, error = outcome[0]
    if error:
        raise InputError(error)
    return value


def shard(items):
    """This process's share of a list: every size()-th item."""
    return items[rank() :: size()]


def share_of_batch(batch_size):
    """Images of a batch that each process takes; InputError when they do not come out even."""
    if batch_size % size():
        raise InputError(f"--batch-size {batch_size} is not a multiple of the {size()} processes; make it one")
    return batch_size // size()


def mean_over_processes(values):
    """The mean of a float tensor over the processes, without a gradient."""
    values = values.detach()
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= size()
    return values


def any_rank(flag):
    """Whether the bool ``flag`` is set in any process: all act on it at the same step."""
    return any(_of_all(flag))


@contextmanager
def together():
    """An InputError in the block of any process is raised in all of them, where each would wait for the others."""
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    if errors := list(filter(None, _of_all(error))):
        raise errors[0]


def _of_all(value):
    if not dist.is_initialized():
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def gather(items):
    """The lists of all processes as one list, in the first process; empty in the others."""
    if not dist.is_initialized():
        return list(items)
    parts = [None] * size() if is_first() else None
    dist.gather_object(items, parts)
    return [item for part in parts for item in part] if is_first() else []
