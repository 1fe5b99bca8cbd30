"""The exact optimal transport coupling of two whole snapshots (OT-CFM of Tong et al. 2023).

Among all ways to move the mass of one snapshot onto the other, it is the one with the smallest mean squared distance.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..euclidean import distances
from ..snapshots import Interval
from .independent import draw
from .pairs import WeightedPairs
from .shortlist import SMALLEST, near_potentials, shortlisted

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SparsePlan:
    """A plan, given by the pairs that carry mass, of which an optimal one has at most ``n0 + n1 - 1``.

    Attributes
    ----------
    i, j
        Indices of the pairs at the start and at the end, ``(n_pairs,)`` int64.
    mass
        Mass of each pair, ``(n_pairs,)`` float64, summing to one.
    cost
        Total transport cost: the sum over pairs of mass times ``|x0 - x1|^p``.
    """

    i: Tensor
    j: Tensor
    mass: Tensor
    cost: float
    cumulative: Tensor = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cumulative", self.mass.cumsum(0))

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs: indices at the start and at the end, each ``(n,)``."""
        pairs = draw(self.cumulative, n, rng)
        return self.i[pairs], self.j[pairs]

    @property
    def pairs(self) -> WeightedPairs:
        """Every pair that carries mass; ``mass0`` is ``mass1``."""
        return WeightedPairs(self.i, self.j, self.mass, self.mass)


def optimal_plan(x0: Tensor, x1: Tensor, mass0: Tensor, mass1: Tensor, *, p: int) -> SparsePlan:
    """Solve the Kantorovich problem for the cost ``|x0 - x1|^p`` exactly (network simplex, in float64 on the CPU).

    Large problems are solved over a short list of pairs, the plan being proven optimal among all pairs, unless that
    takes too long.

    Parameters
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``.
    mass0, mass1
        Weights ``(n0,)`` and ``(n1,)``, each summing to one.
    p
        Power of the Euclidean distance, 1 or 2.

    Raises
    ------
    RuntimeError
        If the solver reports that the plan is not optimal.
    """
    cost = distances(x0.double().cpu(), x1.double().cpu()).pow_(p).numpy()  # (n0, n1)
    unit = math.ldexp(1.0, math.frexp(float(cost.mean()))[1])  # the simplex's tolerances are absolute, in units of cost
    cost /= unit
    a, b = (m.double().cpu().numpy() for m in (mass0, mass1))
    a, b = a / a.sum(), b / b.sum()
    found = _among_few(cost, a, b) if cost.size >= SMALLEST else None
    i, j, mass = _among_all(cost, a, b) if found is None else found
    i0, i1, share = (torch.from_numpy(v) for v in (i, j, mass / mass.sum()))
    return SparsePlan(i0, i1, share, unit * float((mass * cost[i, j]).sum()))


def _among_few(cost: Array, a: Array, b: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], Array] | None:
    """Return the pairs and masses of the plan, found on a short list and proven optimal; None if that took too long."""
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    if len(rows) < len(a) or len(columns) < len(b):
        cost = cost[np.ix_(rows, columns)]
    found = shortlisted(*(torch.from_numpy(v) for v in (cost, a[rows], b[columns])))
    if found is None:
        return None
    i, j, mass = (v.numpy() for v in found)
    return rows[i], columns[j], mass


def _among_all(cost: Array, a: Array, b: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Return the pairs and masses of the optimal plan, sought among all pairs, from good potentials if it is large."""
    near = None
    if cost.size >= SMALLEST:  # and the short list was not enough
        near = tuple(v.numpy() for v in near_potentials(*(torch.from_numpy(v) for v in (cost, a, b))))
    plan, log = ot.emd(a, b, cost, numItermax=10_000_000, log=True, potentials_init=near)
    if log["warning"] is not None:
        raise RuntimeError(f"expected an optimal plan of {cost.shape} cells, found: {log['warning']}; use fewer cells")
    i, j = np.nonzero(plan)
    return i, j, plan[i, j]


def exact(interval: Interval) -> SparsePlan:
    """Couple an interval's ends by exact optimal transport for the cost ``|x0 - x1|^2`` (Tong et al. 2023, eq. 17)."""
    return optimal_plan(interval.x0, interval.x1, interval.mass0, interval.mass1, p=2)
