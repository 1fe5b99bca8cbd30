"""The velocities that curved paths follow, and how far to trust the turns of the whole population.

A cell's velocity at its own snapshot is estimated from its kin: its mean ancestors in the snapshot before and its mean
descendants in the one after. `Hermite` paths pass through the cell at this velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .coupling import Coupling, GrowingPlan, WeightedPairs
from .snapshots import Snapshots

COHERENCE = 0.7  # if the mean of the two unit directions (1 on a straight course) is shorter, speed is reduced


@dataclass(frozen=True)
class Tangents:
    """Velocities at both ends of every pair's path, per unit of real time.

    A sample that is off as a whole makes all of its cells turn alike. So turns, which are velocities minus chords, are
    split in two: of their mean, the population's turn, only the share ``reliability`` is taken; what a cell turns
    relative to this mean is taken in full.

    Attributes
    ----------
    velocities
        Every cell's velocity at its snapshot, ``(n_k, d)``; None at the first and the last snapshot, where paths start
        and end along their chord.
    turns
        The population's turns at the start and at the end of each interval, means over its pairs, ``(d,)`` each.
    reliability
        The share of the population's turns that is taken, from 0 to 1.
    """

    velocities: tuple[Tensor | None, ...]
    turns: tuple[tuple[Tensor, Tensor], ...]
    reliability: float

    def at(self, k: int, i: Tensor, j: Tensor, chord: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocities ``(n, d)`` at the start and end of interval ``k`` of pairs with these chords."""
        ends = zip(self.velocities[k : k + 2], (i, j), self.turns[k])
        start, end = (
            chord if velocity is None else velocity.index_select(0, cells) - (1 - self.reliability) * turn
            for velocity, cells, turn in ends
        )
        return start, end


def tangents(
    snapshots: Snapshots,
    plans: Sequence[GrowingPlan],
    couplings: Sequence[Coupling],
    reliability: float,
    *,
    arcs: bool = False,
) -> Tangents:
    """Return the velocities that curved paths through the kept snapshots follow.

    Parameters
    ----------
    snapshots
        The kept snapshots.
    plans
        The plans that say who is whose kin, one per interval.
    couplings
        The couplings from which the paths' pairs are drawn, one per interval; they may be the plans themselves.
    reliability
        The share of the population's turns that is taken.
    arcs
        Whether speeds are those along arcs, where the whole population turns, instead of those along chords.
    """
    found = velocities(snapshots, plans)
    if arcs:
        found = _along_arcs(found, snapshots, plans, reliability)
    turns = []
    for interval, coupling, (first, last) in zip(snapshots.intervals(), couplings, pairwise(found)):
        start, end = interval.mass0, interval.mass1  # the marginals of pairs that conserve mass
        if isinstance(coupling, GrowingPlan):
            start, end = _shares(coupling.pairs, len(interval.x0), len(interval.x1))
        chord = (end @ interval.x1.double() - start @ interval.x0.double()) / interval.length
        means = (chord if v is None else mass @ v.double() for v, mass in ((first, start), (last, end)))
        at_start, at_end = ((mean - chord).to(interval.x0.dtype) for mean in means)
        turns.append((at_start, at_end))
    return Tangents(found, tuple(turns), reliability)


def velocities(snapshots: Snapshots, plans: Sequence[GrowingPlan]) -> tuple[Tensor | None, ...]:
    """Return the velocity of every cell of every interior snapshot ``(n_k, d)``; None for the first and the last.

    Let ``a`` be the velocity from a cell's mean ancestors to it over the gap ``h0``, and ``b`` that from it to its mean
    descendants over ``h1``. The direction is that of a parabola, ``h1 a/|a| + h0 b/|b|``, and the speed the geometric
    mean of both speeds. A course that turns thus keeps its speed (the mean of two directions is shorter than either),
    and a slow gap beside a fast one does not make the paths in either overshoot. Where the two directions almost
    cancel, as at a turning point between even gaps, the speed goes to zero.

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
        before, after = _rates(snapshots, plans, k)
        speed = [v.norm(dim=1, keepdim=True).clamp(min=1e-300) for v in (before, after)]
        share = gaps[k] / (gaps[k - 1] + gaps[k])  # the nearer neighbour counts for more
        direction = share * before / speed[0] + (1 - share) * after / speed[1]
        coherence = direction.norm(dim=1, keepdim=True)
        pace = (speed[0] * speed[1]).sqrt() * (coherence / COHERENCE).clamp(max=1)
        found[k] = (direction / coherence.clamp(min=1e-300) * pace).to(snapshots.points[k].dtype)
    return tuple(found)


def _along_arcs(
    found: Sequence[Tensor | None], snapshots: Snapshots, plans: Sequence[GrowingPlan], reliability: float
) -> tuple[Tensor | None, ...]:
    """Return the velocities with speeds along arcs; an arc's angle is the reliable share of the population's turn."""
    along = list(found)
    for k, velocity in enumerate(found):
        if velocity is not None:
            along[k] = velocity * _arc(reliability * _angle(*_rates(snapshots, plans, k), snapshots.mass[k]))
    return tuple(along)


def reliability(snapshots: Snapshots, plans: Sequence[GrowingPlan]) -> float:
    """Return the share, from 0 to 1, of the population's accelerations that is not noise of single kept snapshots.

    A sample that is off as a whole (an age, a composition, a batch of its own) bends all paths one way at its own time
    and the other way at the snapshots beside it. Suppose that every snapshot has independent noise and that the
    course's accelerations ``c`` are uncorrelated from one snapshot to the next. Then
    ``corr(c_k, c_{k+1}) = (1 - reliability) corr(noise)`` for accelerations measured over even gaps, and nearly so over
    uneven ones; the correlation of white noise follows from the gaps alone (-2/3 if they are even). Accelerations that
    last are correlated, and the noise is then underestimated. ``reliability`` times the measured bend is the best
    linear guess of the true one, as in regression on variables that are measured with errors (Fuller 1987, Measurement
    Error Models, section 1.1).

    ``c_k`` are second differences of cells and their mean kin, averaged over the pairs of the interval between the two
    snapshots. Correlations are cosines, averaged over the intervals between interior snapshots. With few of them in few
    dimensions the estimate is rough: for noise alone it is .15 to .25, and for a course alone .6 to .8, on average over
    four or five snapshots in two to five dimensions. A course that turns by more than a right angle within a gap looks
    like noise. Where the population does not turn, the result may be anything, but it is then a share of nothing. It is
    1 if there are fewer than two interior snapshots.
    """
    found, of_noise = 0.0, 0.0
    times = torch.tensor(snapshots.times, dtype=torch.float64)
    for k in range(1, len(snapshots) - 2):
        shares = _shares(plans[k].pairs, len(snapshots.points[k]), len(snapshots.points[k + 1]))
        found += _cosine(*(mass @ _acceleration(snapshots, plans, at) for mass, at in zip(shares, (k, k + 1))))
        of_noise += _cosine(_second_difference(times, k), _second_difference(times, k + 1))
    return 1 - min(max(found / of_noise, 0.0), 1.0) if of_noise else 1.0


def _shares(pairs: WeightedPairs, n0: int, n1: int) -> tuple[Tensor, Tensor]:
    """Return the cells' shares, at both ends, of the pairs' mass at mid-interval, ``(n0,)`` and ``(n1,)``."""
    mass = pairs.middle
    return mass.new_zeros(n0).index_add(0, pairs.i, mass), mass.new_zeros(n1).index_add(0, pairs.j, mass)


def _rates(snapshots: Snapshots, plans: Sequence[GrowingPlan], k: int) -> tuple[Tensor, Tensor]:
    """Return the velocities of an interior snapshot's cells from their mean ancestors and to their mean descendants."""
    x, before, after = snapshots.points[k].double(), *snapshots.intervals()[k - 1 : k + 1]
    return (x - plans[k - 1].ancestors) / before.length, (plans[k].descendants - x) / after.length


def _angle(before: Tensor, after: Tensor, mass: Tensor) -> float:
    """Return the angle, from 0 to pi, by which a population's velocity turns, as far as its cells move together.

    It is the angle between the mean velocities, times the share of the speeds (root mean squares) that is the means':
    the geometric mean of this share before and after.
    """
    means, squares = (mass @ before, mass @ after), (mass @ before.square().sum(1), mass @ after.square().sum(1))
    together = means[0].norm() * means[1].norm() / (squares[0] * squares[1]).sqrt().clamp(min=1e-300)
    return math.acos(min(max(_cosine(*means), -1.0), 1.0)) * math.sqrt(float(together))


def _arc(angle: float) -> float:
    """Return the speed at which a cubic meets the arc of a circle half-way, as a multiple of the chord's speed.

    The control points of the cubic are ``4/3 tan(angle / 4)`` radii from its ends, as where circles are drawn by Bezier
    curves, and the chord is ``2 sin(angle / 2)`` radii long.
    """
    return 2 * math.tan(angle / 4) / math.sin(angle / 2) if angle > 0 else 1.0


def _acceleration(snapshots: Snapshots, plans: Sequence[GrowingPlan], k: int) -> Tensor:
    """Return the second differences of an interior snapshot's cells and their mean kin, ``(n_k, d)``."""
    before, after = _rates(snapshots, plans, k)
    return 2 * (after - before) / (snapshots.times[k + 1] - snapshots.times[k - 1])


def _second_difference(times: Tensor, k: int) -> Tensor:
    """Return the weights ``(T,)`` with which the snapshots enter the acceleration at snapshot ``k``."""
    h0, h1 = times[k] - times[k - 1], times[k + 1] - times[k]
    weights = torch.zeros_like(times)
    weights[k - 1 : k + 2] = torch.stack([1 / h0, -1 / h0 - 1 / h1, 1 / h1]) * 2 / (h0 + h1)
    return weights


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two vectors; 0 if either is zero."""
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
