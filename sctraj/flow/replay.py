"""Steps recorded once and replayed: of a small network's step on a GPU most is the launching of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, in which libraries load what they need


class Replayed:
    """A function of tensors whose shapes stay the same, recorded as a CUDA graph and replayed.

    What the function changes in place, every call changes. It must not have the host wait for the device, and must do
    the same whatever the tensors' values. Its first calls run as they are.

    Parameters
    ----------
    act
        Maps tensors on one CUDA device to one.
    """

    def __init__(self, act: Callable[..., Tensor]) -> None:
        self.act, self.calls = act, 0
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call the function; the result is overwritten by the next call."""
        if self.calls == 0:
            self.inputs = [v.clone() for v in inputs]
            self.stream = torch.cuda.Stream(inputs[0].device)
        torch._foreach_copy_(self.inputs, inputs)
        self.calls += 1
        if self.calls <= WARM_UP:
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                found = self.act(*self.inputs)
            current.wait_stream(self.stream)
            return found
        if self.calls == WARM_UP + 1:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self.act(*self.inputs)
        self.graph.replay()
        return self.found
