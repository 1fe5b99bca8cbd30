"""Couplings: joint laws of (x0, x1) over one interval, computed once and sampled many times.

Each is a record with one method, ``sample(n, rng) -> (i, j)``: ``n`` pairs of cells, as indices into the snapshots
at the interval's two ends.
"""

from typing import Protocol

import torch
from torch import Tensor

from .blocked import blocked
from .entropic import EntropicPlan, entropic
from .exact import SparsePlan, exact, optimal_plan
from .independent import IndependentPlan, independent

__all__ = [
    "Coupling",
    "EntropicPlan",
    "IndependentPlan",
    "SparsePlan",
    "blocked",
    "entropic",
    "exact",
    "independent",
    "optimal_plan",
]


class Coupling(Protocol):
    """A joint law of the cells at an interval's two ends."""

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs (with replacement): indices ``(n,)`` at the start and ``(n,)`` at the end."""
