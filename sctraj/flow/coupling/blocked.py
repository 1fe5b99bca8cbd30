"""Exact couplings within random blocks, for snapshots too large for one plan (mini-batch optimal transport)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..snapshots import Interval
from ..threads import at_once
from .exact import SparsePlan, exact

logger = logging.getLogger(__name__)

BLOCK = 3000  # cells: above this the network simplex over the whole snapshot takes longer than a fit


def blocked(interval: Interval, rng: torch.Generator, *, block: int = BLOCK) -> SparsePlan:
    """Couple exactly within random blocks of about ``block`` cells a side (more if weights are uneven).

    Both marginals are exact, whatever the weights. The cost is at least the optimal one (Fatras et al. 2021 on
    mini-batch optimal transport). Snapshots of at most ``block`` cells get the exact plan.
    """
    parts = list(blocks(interval, rng, block=block))
    plans = at_once(exact, [(part,) for _, _, part, _ in parts])
    i, j, mass, cost = [], [], [], 0.0
    for (rows, columns, _, share), plan in zip(parts, plans):
        i.append(rows[plan.i])
        j.append(columns[plan.j])
        mass.append(plan.mass * share)
        cost += plan.cost * share
    return SparsePlan(torch.cat(i), torch.cat(j), torch.cat(mass), cost)


def blocks(
    interval: Interval, rng: torch.Generator, *, block: int = BLOCK
) -> Iterator[tuple[Tensor, Tensor, Interval, float]]:
    """Yield the blocks of an interval, each itself an interval; the whole if it has at most ``block`` cells a side.

    Only cells with mass are counted, and the geometric mean of both ends' numbers is taken. The cells of larger
    snapshots are put in random order and cut at the same fractions of their mass; a cell at a cut is shared between its
    two blocks. Cells without mass are in no block.

    Yields
    ------
    Indices of the block's cells at the start ``(m0,)`` and at the end ``(m1,)``; the block, with masses that sum to
    one; and its share of all mass.
    """
    ends, side = (interval.mass0, interval.mass1), cells_a_side(interval)
    if side <= block:
        yield torch.arange(len(interval.x0)), torch.arange(len(interval.x1)), interval, 1.0
        return
    n_blocks = math.ceil(side / (block - 1))  # a block may contain one more, shared cell
    logger.info(
        "coupling from %g to %g: %d and %d cells in %d blocks", interval.t0, interval.t1, *map(len, ends), n_blocks
    )
    order0, order1 = (torch.randperm(len(m), generator=rng) for m in ends)
    parts = zip(_cut(interval.mass0[order0], n_blocks), _cut(interval.mass1[order1], n_blocks), strict=True)
    for (k0, m0), (k1, m1) in parts:
        rows, columns = order0[k0], order1[k1]
        growth = None if interval.growth0 is None else interval.growth0[rows]
        part = replace(interval, x0=interval.x0[rows], x1=interval.x1[columns], mass0=m0, mass1=m1, growth0=growth)
        yield rows, columns, part, 1 / n_blocks


def cells_a_side(interval: Interval) -> float:
    """Return the geometric mean of both numbers of cells with mass, so that no block has almost none at one end."""
    return math.sqrt(int((interval.mass0 > 0).sum()) * int((interval.mass1 > 0).sum()))


def _cut(mass: Tensor, n_blocks: int) -> list[tuple[Tensor, Tensor]]:
    """Cut masses ``(n,)`` into blocks of equal mass; return each block's positions and their shares of its mass."""
    end = mass.cumsum(0) / mass.sum()
    start = torch.cat([end.new_zeros(1), end[:-1]])
    cuts = []
    for b in range(n_blocks):
        inside = end.clamp(max=(b + 1) / n_blocks) - start.clamp(min=b / n_blocks)  # (n,) mass within the cuts
        kept = torch.nonzero(inside > 1e-12 * end[-1] / len(mass)).squeeze(1)
        cuts.append((kept, inside[kept] / inside[kept].sum()))
    return cuts
