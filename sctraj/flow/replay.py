"""Training steps recorded once as a CUDA graph and replayed.

On a GPU most of the time of a small network's step goes into launching its kernels; a replay launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, during which libraries load what they need


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's one stream for recordings: libraries reserve memory for every stream that they have used."""
    return torch.cuda.Stream(device)


class Replayed:
    """A function of tensors whose shapes stay the same, recorded as a CUDA graph and replayed.

    What the function changes in place is changed by every call. It must not make the host wait for the device, and must
    run the same operations whatever the tensors' values. The first calls are not recorded.

    Parameters
    ----------
    act
        Function that maps tensors on one CUDA device to one tensor.
    device
        That device.
    """

    def __init__(self, act: Callable[..., Tensor], device: torch.device) -> None:
        self.act, self.device, self.calls = act, device, 0
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call the function; the result is overwritten by the next call."""
        with torch.cuda.device(self.device):
            if self.calls == 0:
                self.inputs = [v.clone() for v in inputs]
            torch._foreach_copy_(self.inputs, inputs)
            self.calls += 1
            if self.calls <= WARM_UP:
                return self._as_it_is()
            if self.calls == WARM_UP + 1:
                self.graph = torch.cuda.CUDAGraph()
                # other threads may do what is forbidden during a recording
                with torch.cuda.graph(self.graph, stream=_stream(self.device), capture_error_mode="thread_local"):
                    self.found = self.act(*self.inputs)
            self.graph.replay()
            return self.found

    def _as_it_is(self) -> Tensor:
        """Call the function without a recording, on the stream on which it will be recorded."""
        current, stream = torch.cuda.current_stream(), _stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            found = self.act(*self.inputs)
        current.wait_stream(stream)
        return found
