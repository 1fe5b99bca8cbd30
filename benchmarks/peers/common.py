"""Shared parts of the adapters: peers' random states, their printed output, and the clock that counts snapshots."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global states of numpy and torch, which peers draw from, and put them back afterwards."""
    seed = int(rng.integers(2**31))
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # noqa: TID251
        np.random.seed(seed)  # noqa: NPY002, TID251
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


@contextmanager
def silent() -> Iterator[None]:
    """Drop what is printed, such as the bars of their progress."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def on_snapshot_clock(times: Sequence[float], time: float) -> tuple[int, float]:
    """Return the kept snapshot before a time, and the way from it as a fraction of the gap that the time lies in.

    Where the clock counts kept snapshots every gap is one long, and the sum of both is the time on it. Beyond the last
    snapshot it goes on as in the last gap.
    """
    earlier = [k for k, t in enumerate(times) if t < time]
    if not earlier:
        raise ValueError(f"expected a kept snapshot before time {time:g}, from which cells are moved, found none")
    before = earlier[-1]
    gap = min(before, len(times) - 2)
    return before, (time - times[before]) / (times[gap + 1] - times[gap])
