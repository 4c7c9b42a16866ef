"""CUDA graphs: all kernels of a network started by one call, where the CPU would take longer to launch than the GPU to
compute."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

CALLS_BEFORE = 2  # of a shape; they choose the kernels, and a shape that is seen no more often is not worth a capture
MOST_SHAPES = 4  # each graph keeps the memory of a pass


class Graphed:
    """A function of tensors on a GPU that is captured as a CUDA graph at its third call with inputs of some shapes.

    Results are the same. function: it returns a tree of tensors whose shapes depend on those of the inputs alone, and
    never waits for the GPU; it is called without gradients. Where it cannot be captured it is called as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: dict[Any, int] = {}
        self.graphs: dict[Any, Callable[..., Any] | None] = {}
        self.lock = threading.Lock()  # a graph has one place for its inputs

    def __call__(self, *inputs: Tensor) -> Any:
        key = *((value.shape, value.dtype) for value in inputs), torch.is_autocast_enabled("cuda")
        with self.lock:
            self.calls[key] = self.calls.get(key, 0) + 1
            if key not in self.graphs and self.calls[key] > CALLS_BEFORE and len(self.graphs) < MOST_SHAPES:
                self.graphs[key] = self._capture(*inputs)
            run = self.graphs.get(key)
            return run(*inputs) if run else self.function(*inputs)

    def _capture(self, *inputs: Tensor) -> Callable[..., Any] | None:
        places = [torch.empty_like(value).copy_(value) for value in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.device(places[0].device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self.function(*places)
        except RuntimeError:
            return None

        def replay(*inputs: Tensor) -> Any:
            for place, value in zip(places, inputs, strict=True):
                place.copy_(value, non_blocking=True)
            graph.replay()
            return pytree.tree_map(torch.clone, outputs)  # the next replay writes over them

        return replay
