"""Velocities of the cells at their own snapshots, from their kin before and after: what curved paths go through."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .coupling import GrowingPlan
from .snapshots import Snapshots

COHERENCE = 0.7  # length of the mean of two directions (of one for a straight course) below which speed is taken off


def tangents(snapshots: Snapshots, plans: Sequence[GrowingPlan]) -> tuple[Tensor | None, ...]:
    """Return the velocity of every cell of every interior snapshot ``(n_k, d)``; None for the first and the last.

    With the velocity ``a`` from a cell's mean ancestors to it over the gap ``h0``, and ``b`` from it to its mean
    descendants over ``h1``: the direction is that of a parabola, ``h1 a/|a| + h0 b/|b|``, and the speed is the
    geometric mean of both. A course that turns keeps its speed so (the mean of two directions is shorter than either),
    and one slow and one fast gap do not make each other overshoot. Where the two directions all but cancel, as
    at a turning point between even gaps, the speed goes to zero.

    Parameters
    ----------
    snapshots
        The kept snapshots.
    plans
        One per interval.
    """
    found: list[Tensor | None] = [None] * len(snapshots)
    gaps = [interval.length for interval in snapshots.intervals()]
    for k in range(1, len(snapshots) - 1):
        x = snapshots.points[k].double()
        before = (x - plans[k - 1].ancestors) / gaps[k - 1]
        after = (plans[k].descendants - x) / gaps[k]
        speed = [v.norm(dim=1, keepdim=True).clamp(min=1e-300) for v in (before, after)]
        share = gaps[k] / (gaps[k - 1] + gaps[k])  # the nearer neighbour counts for more
        direction = share * before / speed[0] + (1 - share) * after / speed[1]
        coherence = direction.norm(dim=1, keepdim=True)
        pace = (speed[0] * speed[1]).sqrt() * (coherence / COHERENCE).clamp(max=1)
        found[k] = (direction / coherence.clamp(min=1e-300) * pace).to(snapshots.points[k].dtype)
    return tuple(found)
