"""Exact transport over a short list of pairs, to which pairs are added until the plan is proven optimal among all.

The network simplex spends its time looking for a pair to bring in. An optimal plan has at most ``n + m - 1`` pairs, all
of them where the reduced cost ``C_ij - f_i - g_j`` of good potentials is small; over a few dozen such pairs a cell the
simplex alone takes a tenth of the time or less. The potentials of that plan then either show that no pair left out
would lower the cost, or which would (column generation; Gottschlich & Schuhmacher 2014, Schmitzer 2016 on short lists).

A plan's reduced cost is its cost less ``a @ f + b @ g``, the same for all plans, so the simplex is given reduced costs:
it then begins where the potentials are, and takes a half to a quarter of the time.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from torch import Tensor

from ..exponential import exp_

SMALLEST = 2**17  # pairs in all, from which a list pays
PAIRS = 30  # a cell of either side, to begin with, and of those that would lower the cost, to add at most
TIGHT = 10  # a cell, of those that are next to do so, to add
SHARPNESS = (1 / 4, 1 / 16, 1 / 64, 1 / 256)  # of the potentials that choose them, in standard deviations of the cost
ITERATIONS = 10  # of Sinkhorn's algorithm at each
ROUNDS = 6  # of adding pairs; where groups of cells far apart differ in mass it may take more than all pairs at once
PROVEN = 1e-12  # gap between cost and dual value, over the largest cost, that is rounding
SAMPLE = 2**15  # reduced costs by which the list's threshold is found


def shortlisted(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find an optimal plan between masses ``a`` ``(n,)`` and ``b`` ``(m,)``, all positive, with equal sums.

    Parameters
    ----------
    cost
        ``(n, m)``, float64.
    a, b
        Masses, float64.

    Returns
    -------
    Indices ``i, j`` of its pairs, row by row, and their masses; None where optimality was not proven in ``ROUNDS``.
    """
    f, _ = near_potentials(cost, a, b)
    reduced = cost - f[:, None]
    g = reduced.amin(0)  # with f the largest potentials that all pairs allow
    reduced -= g
    listed = reduced <= _threshold(reduced, PAIRS)
    listed[_staircase(a, b)] = True  # so that there is a plan at all
    tolerance = PROVEN * float(cost.max())
    for _ in range(ROUNDS):
        i, j = torch.nonzero(listed, as_tuple=True)
        arcs = coo_array((reduced[i, j].numpy(), (i.numpy(), j.numpy())), shape=tuple(cost.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the solver has to say is in the log too
            plan, log = ot.emd(a.numpy(), b.numpy(), arcs, numItermax=10_000_000, log=True)
        if log["warning"] is not None:
            return None
        paid = log["cost"] + float(a @ f + b @ g)
        f, g = (h + torch.from_numpy(np.asarray(log[name], dtype=np.float64)) for h, name in ((f, "u"), (g, "v")))
        torch.sub(cost, f[:, None], out=reduced)
        best = reduced.amin(0)
        if paid - float(a @ f + b @ best) <= tolerance:
            return _pairs(plan)
        reduced -= g
        # of many the worst: the next potentials set most others right
        listed |= reduced < min(0.0, _threshold(reduced, PAIRS))
        reduced += g - best
        g = best
        listed |= reduced <= _threshold(reduced, TIGHT)  # or a few at a time would take many rounds
    return None


def near_potentials(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return nearly optimal potentials ``(n,)``, ``(m,)``: a few iterations of Sinkhorn's algorithm, in float32."""
    single, a, b = cost.float(), a.float(), b.float()
    kernel, g, spread = torch.empty_like(single), torch.zeros_like(b), float(single.std())
    for epsilon in (sharpness * spread for sharpness in SHARPNESS):
        if not epsilon > 0:
            break
        torch.sub(single, g, out=kernel)
        exp_(kernel.neg_().add_(kernel.amax(1, keepdim=True).neg_()).div_(epsilon))  # every row's largest entry is 1
        scaling = torch.ones_like(b)
        for _ in range(ITERATIONS):
            rows = 1 / (kernel @ (scaling * b)).clamp_(min=1e-30)
            scaling = 1 / ((rows * a) @ kernel).clamp_(min=1e-30)
        g = g + epsilon * scaling.log()
    g = g.double()
    return (cost - g).amin(1), g


def _threshold(reduced: Tensor, pairs: int) -> float:
    """Return the reduced cost below which there are about so many pairs a cell, found on an even sample."""
    step = max(1, reduced.numel() // SAMPLE)
    while math.gcd(step, reduced.shape[1]) > 1:  # or some columns alone would be met
        step += 1
    some = reduced.flatten()[::step].numpy()
    rank = min(len(some) - 1, int(pairs * sum(reduced.shape) / reduced.numel() * len(some)))
    return float(np.partition(some, rank)[rank])


def _staircase(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of the plan that fills cells up in their order (the north-west corner rule)."""
    ends = [m.cumsum(0) / m.sum() for m in (a, b)]
    cuts = torch.cat([end[:-1] for end in ends] + [a.new_tensor([0.5])]).sort().values
    # at a cut that both share, rounding may put it on either side of it: the cells on both sides are paired
    sides = [[torch.searchsorted(end, cuts + s).clamp_(max=len(end) - 1) for s in (-1e-12, 1e-12)] for end in ends]
    return tuple(torch.cat([sides[k][s] for s in order]) for k, order in ((0, (0, 0, 1, 1)), (1, (0, 1, 0, 1))))  # type: ignore[return-value]


def _pairs(plan: coo_array) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sparse plan's pairs with mass, row by row."""
    order = np.lexsort((plan.col, plan.row))
    mass: NDArray[np.float64] = plan.data[order]
    kept = mass > 0
    i, j = (index[order][kept].astype(np.int64) for index in (plan.row, plan.col))
    return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(mass[kept])
