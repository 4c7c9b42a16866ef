"""Several processes, one a device, as ``torchrun`` starts them; a single process is the case of one.

    torchrun --nproc_per_node=4 train_branches.py --batch-size 24

--batch-size is the effective batch, whatever the number of processes: each takes an equal share of every batch, and
the learning rate stays that of the batch.
"""

import atexit
import os

import torch
import torch.distributed as dist

from utils.cli import InputError, select_device


def start(gpu):
    """Join the processes torchrun started, if it did. Returns the torch.device of this one.

    gpu: as for ``select_device``; with several processes, process n of a machine takes the n-th GPU from there on.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return select_device(gpu)
    device = select_device(gpu + int(os.environ["LOCAL_RANK"]) if gpu >= 0 else -1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # Its threads may still let go of what they sent; one that does so while Python shuts down aborts the process.
    atexit.register(dist.destroy_process_group)
    return device


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


def mine(items):
    """This process's share of a list: every size()-th item."""
    return items[rank() :: size()]


def share_of_batch(batch_size):
    """Images of a batch that each process takes; InputError when they do not come out even."""
    if batch_size % size():
        raise InputError(f"--batch-size {batch_size} is not a multiple of the {size()} processes; make it one")
    return batch_size // size()


def mean_over_processes(count):
    """The mean of a scalar tensor over the processes, without a gradient.

    A loss that divides its sum by this mean, instead of by its own process's count, has the gradient of the whole
    batch once the gradients of all processes are averaged.
    """
    count = count.detach()
    if dist.is_initialized():
        count = count.float().clone()
        dist.all_reduce(count)
        count /= size()
    return count


def anywhere(flag):
    """Whether the bool ``flag`` is set in any process: all act on it at the same step."""
    if not dist.is_initialized():
        return flag
    flags = [None] * size()
    dist.all_gather_object(flags, flag)
    return any(flags)


def gather(items):
    """The lists of all processes as one list, in the first process; empty in the others."""
    if not dist.is_initialized():
        return list(items)
    parts = [None] * size() if is_first() else None
    dist.gather_object(items, parts)
    return [item for part in parts for item in part] if is_first() else []
