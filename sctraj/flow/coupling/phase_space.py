"""Pairing by velocity: a cost under which two cells are near if a path joins them without bending.

The nearest cell need not be the one that a cell becomes, as where lineages cross. With each cell's velocity as further
coordinates, the cost becomes a squared distance again, and the usual solvers apply.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..snapshots import Interval


def in_phase_space(
    interval: Interval, velocity0: Tensor | None, velocity1: Tensor | None, *, time: float | None = None
) -> Interval:
    """Return the interval with cells in more coordinates, in which squared distances are the work of a pair.

    Let ``h`` be the interval's length, ``x(t)`` the straight path and ``y(t)`` the cubic with the given velocities at
    its ends. The work is ``h integral |x'|^2 dt + h time^2 integral |y''|^2 dt``: speeding up over the given time costs
    what moving does. The second term is the cost of splines through distributions (Chen, Conforti & Georgiou 2018,
    Measure-valued spline curves; Benamou, Gallouet & Vialard 2019, Second-order models for optimal transport),

        ``(time / h)^2 (12 |(x1 - h v1 / 2) - (x0 + h v0 / 2)|^2 + h^2 |v1 - v0|^2)``,

    and ``(time / h)^2 3 |(x1 - h v1) - x0|^2`` if the first velocity is left free, as in natural splines. Any solver
    for squared Euclidean distances will do. The first ``d`` coordinates are the cells' own, centred if there are more.

    Parameters
    ----------
    interval
        The two snapshots, cells ``(n0, d)`` and ``(n1, d)``.
    velocity0, velocity1
        Velocities of the cells, per unit of time; None if they are not known.
    time
        Time over which speeding up costs what moving does; the interval's length by default.

    Returns
    -------
    The same with cells ``(n0, D)`` and ``(n1, D)``; ``D`` is ``3 d``, ``2 d`` with one velocity and ``d`` with none.
    """
    h, scale = interval.length, 1.0 if time is None else time / interval.length
    centre = interval.x0.mean(0)  # centred, as the rounding of sums and multiples grows with the distance from zero
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
