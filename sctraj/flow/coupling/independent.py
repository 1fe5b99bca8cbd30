"""The independent coupling, in which both ends are drawn separately (I-CFM of Tong et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..snapshots import Interval


def draw(cumulative: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw ``n`` indices by inversion of a cumulative mass ``(m,)``; return ``(n,)`` int64."""
    u = torch.rand(n, generator=rng, device=cumulative.device, dtype=cumulative.dtype)
    # the last entry is one up to rounding
    return torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)


def draw_each(mass: Tensor, rng: torch.Generator) -> Tensor:
    """Draw one column for each row of masses ``(m, n)``, in proportion to the masses; return ``(m,)``.

    By inversion, with one random number per row: ``torch.multinomial`` takes one per entry, and makes the host wait.
    """
    cumulative = mass.cumsum(1)
    u = torch.rand(len(mass), 1, generator=rng, device=mass.device, dtype=mass.dtype)
    found = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)
    return found.clamp_(max=mass.shape[1] - 1)


@dataclass(frozen=True)
class IndependentPlan:
    """The product of the two marginals, given by their cumulative masses ``(n0,)`` and ``(n1,)``."""

    cumulative0: Tensor
    cumulative1: Tensor

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs: indices at the start and at the end, each ``(n,)``."""
        return draw(self.cumulative0, n, rng), draw(self.cumulative1, n, rng)


def independent(interval: Interval) -> IndependentPlan:
    """Couple the two ends independently: ``q(x0, x1) = q(x0) q(x1)`` (Tong et al. 2023, eq. 14)."""
    return IndependentPlan(interval.mass0.cumsum(0), interval.mass1.cumsum(0))
