"""Exact transport over a short list of pairs, to which pairs are added until the plan is proven optimal among all.

The network simplex spends its time looking for a pair to bring in. An optimal plan has at most ``n + m - 1`` pairs, and
for good potentials all of these have a small reduced cost ``C_ij - f_i - g_j``; over a few dozen such pairs per cell
the simplex takes a tenth of the time or less. The potentials of that plan then show either that no pair left out would
lower the cost, or which pairs would (column generation; Gottschlich & Schuhmacher 2014, Schmitzer 2016 on short lists).

Reduced costs change the cost of every plan by the same amount, ``a @ f + b @ g``. So the simplex is given reduced
costs: it then starts from the potentials, and takes a half to a quarter of the time.
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

SMALLEST = 2**17  # number of all pairs from which a list pays
PAIRS = 30  # per cell of either side: on the list at first, and at most to add of those that would lower the cost
TIGHT = 10  # per cell, to add of those that come closest to lowering it
SHARPNESS = (1 / 4, 1 / 16, 1 / 64, 1 / 256)  # epsilons of the potentials that choose them, in sd of the cost
ITERATIONS = 10  # of Sinkhorn's algorithm at each epsilon
ROUNDS = 6  # of adding pairs; if distant groups of cells differ in mass, it may take longer than all pairs at once
PROVEN = 1e-12  # gap between cost and dual value, relative to the largest cost, that is mere rounding
SAMPLE = 2**15  # number of reduced costs from which the list's threshold is estimated


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
    Indices ``i, j`` of its pairs, row by row, and their masses; None if optimality was not proven in ``ROUNDS``.
    """
    f, _ = near_potentials(cost, a, b)
    reduced = cost - f[:, None]
    g = reduced.amin(0)  # the largest potentials that all pairs allow, given f
    reduced -= g
    listed = reduced <= _threshold(reduced, PAIRS)
    listed[_staircase(a, b)] = True  # so that a plan exists
    tolerance = PROVEN * float(cost.max())
    for _ in range(ROUNDS):
        i, j = torch.nonzero(listed, as_tuple=True)
        arcs = coo_array((reduced[i, j].numpy(), (i.numpy(), j.numpy())), shape=tuple(cost.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solver's warnings are also in its log
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
        # only the worst if there are many: the next potentials settle most of the others
        listed |= reduced < min(0.0, _threshold(reduced, PAIRS))
        reduced += g - best
        g = best
        listed |= reduced <= _threshold(reduced, TIGHT)  # as few at a time would take many rounds
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
    """Return the reduced cost below which there are about so many pairs per cell, estimated on an even sample."""
    step = max(1, reduced.numel() // SAMPLE)
    while math.gcd(step, reduced.shape[1]) > 1:  # else only some columns would be sampled
        step += 1
    some = reduced.flatten()[::step].numpy()
    rank = min(len(some) - 1, int(pairs * sum(reduced.shape) / reduced.numel() * len(some)))
    return float(np.partition(some, rank)[rank])


def _staircase(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of the plan that fills cells in their order (the north-west corner rule)."""
    ends = [m.cumsum(0) / m.sum() for m in (a, b)]
    cuts = torch.cat([end[:-1] for end in ends] + [a.new_tensor([0.5])]).sort().values
    # a cut that both sides share may be rounded either way, so the cells on both sides of it are paired
    sides = [[torch.searchsorted(end, cuts + s).clamp_(max=len(end) - 1) for s in (-1e-12, 1e-12)] for end in ends]
    return tuple(torch.cat([sides[k][s] for s in order]) for k, order in ((0, (0, 0, 1, 1)), (1, (0, 1, 0, 1))))  # type: ignore[return-value]


def _pairs(plan: coo_array) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of a sparse plan that have mass, row by row."""
    order = np.lexsort((plan.col, plan.row))
    mass: NDArray[np.float64] = plan.data[order]
    kept = mass > 0
    i, j = (index[order][kept].astype(np.int64) for index in (plan.row, plan.col))
    return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(mass[kept])
