"""Laws of the optimiser: its steps are those of PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sctraj.flow.optimiser import AdamW, one_cycle


def test_the_rate_rises_over_a_tenth_and_falls_along_a_cosine():
    assert [one_cycle(p) for p in (0.1, 0.325, 0.55, 0.775, 1.0)] == pytest.approx(
        [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]
    )
    assert 0 < one_cycle(0.0) < one_cycle(0.05) < 0.6 < one_cycle(0.09) < 1


def test_the_steps_are_those_of_adamw():
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, theirs, untouched = (nn.Parameter(start.clone()) for _ in range(3))
    own = AdamW([untouched, mine], 0.1)
    other = torch.optim.AdamW([theirs], lr=1.0, weight_decay=0.1)
    for k in range(5):
        other.param_groups[0]["lr"] = rate = 0.1 / (1 + k)
        theirs.grad = (theirs.detach() + k).cos()
        gradient = (mine.detach() + k).cos()
        own.step([None, gradient.T.contiguous().T], rate)  # in whatever order it lies
        other.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    assert torch.equal(untouched, start)
