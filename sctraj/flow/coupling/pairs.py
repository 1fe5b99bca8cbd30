"""Weighted pairs: the pairs of cells that carry nearly all of a plan's mass, with a mass at each end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 1e-6  # in log mass: a pair's mass met by rows and met by columns differs by rounding


@dataclass(frozen=True)
class WeightedPairs:
    """Pairs of cells, each with a mass that goes in a straight line from one end of its interval to the other.

    At the fraction ``s`` of the interval a pair's mass is ``(1 - s) mass0 + s mass1``, always one in total, and its
    growth rate ``(mass1 - mass0) / ((1 - s) mass0 + s mass1) / (t1 - t0)``: relative to the population's total, of
    which snapshots of sampled cells say nothing. Of a balanced plan ``mass0`` is ``mass1`` and nothing grows.

    Attributes
    ----------
    i, j
        Indices of the pairs at the start and at the end, ``(n_pairs,)`` int64; no pair comes twice.
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
        """Change of mass over the interval, relative to that at its middle: from -2 (dies) to 2 (is new)."""
        return (self.mass1 - self.mass0) / self.middle


def heaviest(
    log_rows: Callable[[Tensor], Tensor],
    log_columns: Callable[[Tensor], Tensor],
    tiles: tuple[Iterable[Tensor], Iterable[Tensor]],
    *,
    share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the fewest pairs that carry a share of every row's mass, and the fewest for every column's: all of both.

    Parameters
    ----------
    log_rows, log_columns
        Indices ``(m,)`` -> logarithm of the plan's rows ``(m, n1)``, or of its columns ``(m, n0)``.
    tiles
        The rows' and the columns' indices, in tiles small enough to be met at once.
    share
        Fraction of each row's and column's mass; above 0, at most 1.

    Returns
    -------
    ``i, j, log_mass``, each ``(n_pairs,)``; none of a cell without mass.

    Raises
    ------
    ValueError
        If the share is not in that range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share above 0 and at most 1, found {share}; 0.99 leaves out the lightest pairs")
    # thresholds of the columns first, (n1,): pairs then come from the rows alone, sorted and none twice
    least = torch.cat([_least(log_columns(columns), share) for columns in tiles[1]])
    found = []
    for rows in tiles[0]:
        log_mass = log_rows(rows)  # (tile, n1)
        kept = (log_mass >= _least(log_mass, share)[:, None]) | (log_mass >= least[None, :])
        i, j = torch.nonzero(kept & (log_mass > -math.inf), as_tuple=True)
        found.append((rows[i], j, log_mass[i, j]))
    i, j, log_mass = (torch.cat(parts) for parts in zip(*found, strict=True))
    return i, j, log_mass


def rescaled(mass: Tensor, index: Tensor, marginal: Tensor) -> Tensor:
    """Rescale masses of pairs ``(n_pairs,)`` so that those of cell ``index`` sum to its weight in ``marginal``."""
    total = torch.zeros_like(marginal).index_add_(0, index, mass)
    return mass * (marginal / total)[index]


def _least(log_mass: Tensor, share: float) -> Tensor:
    """Return the lightest log mass that each row ``(m, n)`` needs to make up its share, ``(m,)``."""
    ordered = log_mass.sort(1, descending=True).values
    short = (torch.softmax(ordered, 1).cumsum(1) < share).sum(1)  # heaviest pairs that are not yet enough
    return ordered.gather(1, short.clamp(max=log_mass.shape[1] - 1)[:, None]).squeeze(1) - SLACK
