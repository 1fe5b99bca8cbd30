"""Replayed steps where there is no CUDA device: a recording that is acted out (test_cuda.py has real ones)."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sctraj.flow import replay
from sctraj.flow.replay import WARM_UP, Replayed

CPU = torch.device("cpu")


class Graph:
    """Does again, to the same tensors, what was done while it was recorded; the first time it has been done."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        if self.replays:
            self.found.copy_(self.act(*self.inputs))
        self.replays += 1


@pytest.fixture
def recorded(monkeypatch):
    """The recordings that are made."""
    made: list[Graph] = []

    @contextmanager
    def graph(one, **_):
        made.append(one)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        CUDAGraph=Graph, graph=graph, Stream=lambda device: stream, current_stream=lambda: stream,
        device=lambda device: nullcontext(), stream=lambda stream: nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(replay, "torch", SimpleNamespace(cuda=cuda, _foreach_copy_=torch._foreach_copy_))
    return made


def test_a_step_is_recorded_once_and_taken_at_every_call(recorded):
    state, seen = torch.zeros(2), []

    def act(x, y):
        state.add_(x)
        return state * y

    run = Replayed(act, CPU)
    for k in range(WARM_UP + 4):
        x, y = torch.full((2,), float(k)), torch.tensor([2.0, -1.0])
        if recorded:
            recorded[0].act, recorded[0].inputs, recorded[0].found = act, run.inputs, run.found
        seen.append(run(x, y).clone())
        assert torch.equal(x, torch.full((2,), float(k)))  # the caller's own are left alone
    sums = torch.arange(float(WARM_UP + 4)).cumsum(0)
    assert torch.equal(torch.stack(seen), sums[:, None] * torch.tensor([2.0, -1.0]))
    assert len(recorded) == 1
    assert recorded[0].replays == 4
