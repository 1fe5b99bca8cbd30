"""Exact optimal transport within random blocks, for snapshots whose whole plan does not fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..snapshots import Interval
from .exact import SparsePlan, exact, optimal_plan

BLOCK = 3000  # cells: above this the network simplex over the whole snapshot takes longer than a fit


def blocked(interval: Interval, rng: torch.Generator, *, block: int = BLOCK) -> SparsePlan:
    """Couple exactly within random blocks of about ``block`` cells a side (more where weights are uneven).

    Both snapshots are put in random order and cut at the same fractions of their mass, a cell at a cut being shared
    between its two blocks; so both marginals are kept exactly, whatever the weights. The cost is at least the optimal
    one (Fatras et al. 2021 on mini-batch optimal transport). Snapshots of at most ``block`` cells get the exact plan.
    """
    largest = max(len(interval.x0), len(interval.x1))
    if largest <= block:
        return exact(interval)
    n_blocks = math.ceil(largest / (block - 1))  # a block may hold one shared cell more
    order0, order1 = (torch.randperm(len(m), generator=rng) for m in (interval.mass0, interval.mass1))
    i, j, mass, cost = [], [], [], 0.0
    parts = zip(_cut(interval.mass0[order0], n_blocks), _cut(interval.mass1[order1], n_blocks), strict=True)
    for (k0, m0), (k1, m1) in parts:
        rows, columns = order0[k0], order1[k1]
        plan = optimal_plan(interval.x0[rows], interval.x1[columns], m0, m1, p=2)
        i.append(rows[plan.i])
        j.append(columns[plan.j])
        mass.append(plan.mass / n_blocks)
        cost += plan.cost / n_blocks
    return SparsePlan(torch.cat(i), torch.cat(j), torch.cat(mass), cost)


def _cut(mass: Tensor, n_blocks: int) -> list[tuple[Tensor, Tensor]]:
    """Cut masses ``(n,)`` into blocks of equal mass: for each, the positions in it and their shares of its mass."""
    end = mass.cumsum(0) / mass.sum()
    start = torch.cat([end.new_zeros(1), end[:-1]])
    blocks = []
    for b in range(n_blocks):
        inside = end.clamp(max=(b + 1) / n_blocks) - start.clamp(min=b / n_blocks)  # (n,) mass within the cuts
        kept = torch.nonzero(inside > 1e-12 * end[-1] / len(mass)).squeeze(1)
        blocks.append((kept, inside[kept] / inside[kept].sum()))
    return blocks
