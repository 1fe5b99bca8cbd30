"""Where the mass of single cells goes under an entropic plan: means and draws over its rows, computed in tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..exponential import exp_
from .independent import draw_each
from .kernel import Room, split


def conditional_means(here: Tensor, there: Tensor, weight: Tensor, epsilon: float, values: Tensor) -> Tensor:
    """Return, for each cell ``here``, the mean of values ``(n, k)`` weighted by where its mass goes; ``(m, k)``.

    Parameters
    ----------
    here, there
        Cells ``(m, d)`` and ``(n, d)``. Up to a factor, ``exp(weight_j - |here_i - there_j|^2 / epsilon)`` of the mass
        of ``here_i`` goes to ``there_j``.
    weight
        Logarithmic weights of the cells ``there``, ``(n,)``.
    epsilon
        Strength of the entropy, in units of cost.
    values
        Values of the cells ``there``.
    """
    parts = [here.new_zeros(0, values.shape[1])]
    parts.extend(mass @ values / mass.sum(1, keepdim=True) for mass in _masses(here, there, weight, epsilon))
    return torch.cat(parts)


def partners(here: Tensor, there: Tensor, weight: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """Draw for each cell ``here`` one of the cells ``there`` (see `conditional_means`); return ``(m,)`` int64."""
    parts = [torch.empty(0, dtype=torch.int64, device=here.device)]
    parts.extend(draw_each(mass, rng) for mass in _masses(here, there, weight, epsilon))
    return torch.cat(parts)


def _masses(here: Tensor, there: Tensor, weight: Tensor, epsilon: float) -> Iterator[Tensor]:
    """Yield the conditional masses, the largest of each row being 1, in tiles ``(rows, n)``; each replaces the last."""
    room = Room(here)
    weight = weight - there.square().sum(1) / epsilon  # the squares of `here` cancel
    for cells in split(here, len(there)):
        exponent = torch.addmm(weight, cells, there.T, alpha=2 / epsilon, out=room(len(cells), len(there)))
        yield exp_(exponent.sub_(exponent.amax(1, keepdim=True)))
