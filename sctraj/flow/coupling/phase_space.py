"""Where cells are and where they are going: a cost under which pairs are near that a path need not bend to join."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..snapshots import Interval


def in_phase_space(
    interval: Interval, velocity0: Tensor | None, velocity1: Tensor | None, *, time: float | None = None
) -> Interval:
    """Return the interval with cells in more coordinates, whose squared distances are a pair's work.

    With ``h`` the interval's length, ``x(t)`` the straight way and ``y(t)`` the cubic with the given velocities at its
    ends, the work is ``h integral |x'|^2 dt + h time^2 integral |y''|^2 dt``: as if speeding up cost, over that time,
    what moving does. The second is the cost of splines through distributions (Chen, Conforti & Georgiou 2018,
    Measure-valued spline curves; Benamou, Gallouet & Vialard 2019, Second-order models for optimal transport),

        ``(time / h)^2 (12 |(x1 - h v1 / 2) - (x0 + h v0 / 2)|^2 + h^2 |v1 - v0|^2)``,

    and ``(time / h)^2 3 |(x1 - h v1) - x0|^2`` where the first velocity is left free, as natural splines do. Whoever
    solves for squared Euclidean distances solves for these; the first ``d`` coordinates are the cells' own, centred
    where there are more.

    Parameters
    ----------
    interval
        The two snapshots, cells ``(n0, d)`` and ``(n1, d)``.
    velocity0, velocity1
        Of these, per unit of time; None where they are not known.
    time
        The interval's length by default.

    Returns
    -------
    The same with cells ``(n0, D)`` and ``(n1, D)``, ``D`` being ``3 d``, ``2 d`` with one velocity and ``d`` with none.
    """
    h, scale = interval.length, 1.0 if time is None else time / interval.length
    centre = interval.x0.mean(0)  # of numbers far from zero sums and multiples are rounded as they are large
    x0, x1 = interval.x0 - centre, interval.x1 - centre
    if velocity0 is not None and velocity1 is not None:
        step0, step1, weight = h * velocity0, h * velocity1, math.sqrt(12) * scale
        x0 = torch.cat([x0, weight * (x0 + step0 / 2), scale * step0], 1)
        x1 = torch.cat([x1, weight * (x1 - step1 / 2), scale * step1], 1)
    elif velocity0 is not None:
        weight = math.sqrt(3) * scale
        x0, x1 = torch.cat([x0, weight * (x0 + h * velocity0)], 1), torch.cat([x1, weight * x1], 1)
    elif velocity1 is not None:
        weight = math.sqrt(3) * scale
        x0, x1 = torch.cat([x0, weight * x0], 1), torch.cat([x1, weight * (x1 - h * velocity1)], 1)
    else:
        return interval
    return replace(interval, x0=x0, x1=x1)
