"""Weighted pairs: the pairs of cells that carry a plan's mass, with a mass at each end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightedPairs:
    """Pairs of cells, each with a mass that changes linearly from one end of its interval to the other.

    At the fraction ``s`` of the interval a pair's mass is ``(1 - s) mass0 + s mass1``; the total is always one. Its
    growth rate is ``(mass1 - mass0) / ((1 - s) mass0 + s mass1) / (t1 - t0)``, relative to the population's total,
    about which snapshots of sampled cells say nothing. For a balanced plan ``mass0`` is ``mass1`` and nothing grows.

    Attributes
    ----------
    i, j
        Indices of the pairs at the start and at the end, ``(n_pairs,)`` int64; no pair occurs twice.
    mass0
        Mass at the start, ``(n_pairs,)`` float64; the pairs of a source cell sum to its weight.
    mass1
        Mass at the end, ``(n_pairs,)`` float64; the pairs of a target cell sum to its weight.
    """

    i: Tensor
    j: Tensor
    mass0: Tensor
    mass1: Tensor

    @property
    def middle(self) -> Tensor:
        """Masses at mid-interval, ``(n_pairs,)``."""
        return (self.mass0 + self.mass1) / 2

    @property
    def contrast(self) -> Tensor:
        """Change of mass over the interval, relative to the mass at its middle: from -2 (dies) to 2 (is new)."""
        return (self.mass1 - self.mass0) / self.middle


def rescaled(mass: Tensor, index: Tensor, marginal: Tensor) -> Tensor:
    """Rescale masses of pairs ``(n_pairs,)`` so that those of cell ``index`` sum to its weight in ``marginal``."""
    total = torch.zeros_like(marginal).index_add_(0, index, mass)
    return mass * (marginal / total)[index]
