"""Couplings: joint laws of (x0, x1) over one interval, computed once and sampled many times.

Sequencing destroys cells, so nobody knows which cell of one snapshot became which of the next; a coupling is a guess.
Each is a record with a method ``sample(n, rng) -> (i, j)``: ``n`` pairs of cells, as indices into the snapshots at the
interval's two ends. Exact and growing couplings also list their ``pairs``, those that carry the plan's mass. (The
unbalanced plan is not a coupling itself; growing ones are made from it.)
"""

from typing import Protocol

import torch
from torch import Tensor

from .blocked import blocked
from .entropic import EntropicPlan, entropic
from .exact import SparsePlan, exact, optimal_plan
from .growing import GrowingPlan, growing, paired_by_velocity
from .independent import IndependentPlan, independent
from .pairs import WeightedPairs
from .unbalanced import UnbalancedPlan, unbalanced

__all__ = [
    "Coupling",
    "EntropicPlan",
    "GrowingPlan",
    "IndependentPlan",
    "SparsePlan",
    "UnbalancedPlan",
    "WeightedPairs",
    "blocked",
    "entropic",
    "exact",
    "growing",
    "independent",
    "optimal_plan",
    "paired_by_velocity",
    "unbalanced",
]


class Coupling(Protocol):
    """A joint law of the cells at an interval's two ends."""

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs (with replacement): indices ``(n,)`` at the start and ``(n,)`` at the end."""
