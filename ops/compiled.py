"""The compiled operators: loads `_C` where it is built, and gives them fake implementations and autograd.

Build it with `python setup.py build_ext --inplace`; it then registers `torch.ops.wsid.*`. Without it, or where it was
built from other sources or for another PyTorch, `available` is False and `reason` says why; the public functions then
use `reference`.
"""

import importlib
import sys

import torch

from . import reference, sources


def _refuse_second_copy():
    """ImportError where this package is loaded under another name: PyTorch dies of a second registration of wsid."""
    if f"{__package__}._C" in sys.modules or not hasattr(torch.ops.wsid, "random_walk"):
        return
    extensions = [module for name, module in sys.modules.items() if name.endswith("._C")]
    copies = [module.__file__ for module in extensions if hasattr(module, "SOURCES")]
    raise ImportError(
        f"the operators are loaded already, from {' '.join(copies) or 'elsewhere'}, and {__package__} is "
        "another copy of them: import either ops, of the source tree, or wsid_ops, as installed"
    )


def _reason():
    """Why the compiled operators cannot be used, or ""."""
    _refuse_second_copy()
    try:
        built = importlib.import_module("._C", __package__)  # registers torch.ops.wsid
    except ModuleNotFoundError:
        return "they are not built"
    except ImportError as error:
        return f"they were built for another PyTorch or Python than {torch.__version__}: {error}"
    if getattr(built, "TORCH", torch.__version__) != torch.__version__:
        return f"they were built for PyTorch {built.TORCH}, and this is {torch.__version__}"
    if sources.digest() not in (None, getattr(built, "SOURCES", "")):
        return "they were built from other sources than those in ops/csrc"
    return ""


reason = _reason()
available = not reason

_KERNELS = frozenset(
    device_type
    for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if available and torch._C._dispatch_has_kernel_for_dispatch_key("wsid::random_walk", key)
)

BUILD = "python setup.py build_ext --inplace"


def has_kernels(device_type):
    """Whether the compiled operators run on this type of device ('cpu', 'cuda', ...)."""
    return device_type in _KERNELS


def converge_centroids(offsets, max_iters, tol):
    return torch.ops.wsid.converge_centroids(offsets, max_iters, tol)


def boundary_affinity(boundary, radius):
    # Where no gradient is asked for, the winners are neither looked for nor kept.
    with_winner = torch.is_grad_enabled() and boundary.requires_grad
    return torch.ops.wsid.boundary_affinity(boundary, radius, with_winner)[0]


def pair_counts(labels, radius):
    return torch.ops.wsid.pair_counts(labels, radius)


def boundary_pair_loss(boundary, labels, radius):
    return torch.ops.wsid.boundary_pair_loss(boundary, labels, radius)


def displacement_pair_loss(offsets, labels, radius):
    return torch.ops.wsid.displacement_pair_loss(offsets, labels, radius)


def random_walk(x, affinity, radius, power, steps, method, tol):
    coefficients = reference.walk_coefficients(steps, method, tol) or ()  # none: step by step
    return torch.ops.wsid.random_walk(x, affinity, radius, power, steps, coefficients)


def _setup_context(ctx, inputs, output):
    _, ctx.radius, ctx.with_winner = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    if ctx.with_winner:
        ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    if not ctx.with_winner:
        raise RuntimeError("boundary_affinity was asked for a gradient but computed without its winners")
    if grad is None:
        return None, None, None
    return torch.ops.wsid.boundary_affinity_backward(grad, ctx.saved_tensors[0], ctx.radius), None, None


def _keep_inputs(ctx, inputs, output):
    *maps, ctx.radius = inputs
    ctx.save_for_backward(*maps)


def _entropy_backward(ctx, grad):
    return torch.ops.wsid.boundary_pair_loss_backward(grad, *ctx.saved_tensors, ctx.radius), None, None


def _error_backward(ctx, grad):
    return torch.ops.wsid.displacement_pair_loss_backward(grad, *ctx.saved_tensors, ctx.radius), None, None


def _no_second(ctx, *grads):
    raise RuntimeError("the operators are differentiable once: their gradient has no gradient of its own")


if available:

    @torch.library.register_fake("wsid::converge_centroids")
    def _(offsets, max_iters, tol):
        return torch.empty_like(offsets, memory_format=torch.contiguous_format)

    @torch.library.register_fake("wsid::boundary_affinity")
    def _(boundary, radius, with_winner):
        n, height, width = boundary.shape
        shape = (n, reference.pair_count(radius), height, width)
        winner = boundary.new_empty(shape if with_winner else (0,), dtype=torch.uint8)
        return boundary.new_empty(shape), winner

    @torch.library.register_fake("wsid::boundary_affinity_backward")
    def _(grad, winner, radius):
        n, _, height, width = grad.shape
        return grad.new_empty(n, height, width)

    @torch.library.register_fake("wsid::pair_counts")
    def _(labels, radius):
        n, height, width = labels.shape
        return labels.new_empty((n, 2, height, width), dtype=torch.int32)

    @torch.library.register_fake("wsid::boundary_pair_loss")
    def _(boundary, labels, radius):
        n, height, width = boundary.shape
        return boundary.new_empty(n, 2, height, width)

    @torch.library.register_fake("wsid::boundary_pair_loss_backward")
    def _(grad, boundary, labels, radius):
        return boundary.new_empty(boundary.shape)

    @torch.library.register_fake("wsid::displacement_pair_loss")
    def _(offsets, labels, radius):
        return offsets.new_empty(labels.shape)

    @torch.library.register_fake("wsid::displacement_pair_loss_backward")
    def _(grad, offsets, labels, radius):
        return offsets.new_empty(offsets.shape)

    @torch.library.register_fake("wsid::random_walk")
    def _(x, affinity, radius, power, steps, coefficients):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    torch.library.register_autograd("wsid::boundary_affinity", _backward, setup_context=_setup_context)
    torch.library.register_autograd("wsid::boundary_pair_loss", _entropy_backward, setup_context=_keep_inputs)
    torch.library.register_autograd("wsid::displacement_pair_loss", _error_backward, setup_context=_keep_inputs)
    for name in ("boundary_affinity", "boundary_pair_loss", "displacement_pair_loss"):
        torch.library.register_autograd(f"wsid::{name}_backward", _no_second)
