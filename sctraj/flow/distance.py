"""Distances between two weighted clouds of cells.

All take points ``(n, d)`` and ``(m, d)`` (arrays or tensors), compute in float64 and return a float. Weights need not
be normalised; uniform where not given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import ot
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .coupling import entropic, optimal_plan
from .snapshots import Interval

TILE = 2**22  # entries of a distance matrix held at once


@dataclass(frozen=True)
class Restored:
    """How a restoration meets the observed cells in the optimal plan for W1.

    Attributes
    ----------
    distance
        W1.
    share
        Each observed cell's share ``(m,)``: its mean over the cells (weighted by their masses) is W1.
    barycentre
        Where the plan puts the prediction for each observed cell, ``(m, d)``.
    """

    distance: float
    share: Tensor
    barycentre: Tensor


def wasserstein(
    x: ArrayLike, y: ArrayLike, *, p: int = 1, weights_x: ArrayLike | None = None, weights_y: ArrayLike | None = None
) -> float:
    """Exact Wasserstein distance ``(min_P sum P_ij |x_i - y_j|^p)^(1/p)``: the root for ``p=2``, in units of x.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``.
    p
        1 or 2.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Raises
    ------
    ValueError
        If p is neither 1 nor 2, or shapes do not fit.
    """
    if p not in (1, 2):
        raise ValueError(f"expected p of 1 or 2, found {p}")
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    return optimal_plan(a.points, b.points, a.mass, b.mass, p=p).cost ** (1 / p)


def restoration_plan(x: Tensor, y: Tensor, *, weights_x: Tensor | None, weights_y: Tensor | None) -> Restored:
    """Return W1 between restored ``x`` ``(n, d)`` and observed ``y`` ``(m, d)``, cell by observed cell."""
    (x, a), (y, b) = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    plan = optimal_plan(x, y, a, b, p=1)
    length = (x[plan.i] - y[plan.j]).norm(dim=1)
    share = torch.zeros_like(b).index_add_(0, plan.j, plan.mass * length) / b
    barycentre = torch.zeros_like(y).index_add_(0, plan.j, plan.mass[:, None] * x[plan.i]) / b[:, None]
    return Restored(plan.cost, share, barycentre)


def sliced_wasserstein(
    x: ArrayLike,
    y: ArrayLike,
    *,
    p: int = 2,
    n_projections: int = 200,
    rng: int | np.random.Generator = 0,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> float:
    """Sliced Wasserstein distance: the p-th root of the mean of 1-D ``W_p^p`` over directions (Bonneel et al. 2015).

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``.
    p
        Power of the distance.
    n_projections
        Random directions, uniform on the sphere: a Monte Carlo estimate.
    rng
        Of the directions.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    directions = np.random.default_rng(rng).standard_normal((a.points.shape[1], n_projections))
    directions /= np.linalg.norm(directions, axis=0)
    arrays = (t.numpy() for t in (a.points, b.points, a.mass, b.mass))
    return float(ot.sliced_wasserstein_distance(*arrays, p=p, projections=directions))


def energy_distance(
    x: ArrayLike, y: ArrayLike, *, weights_x: ArrayLike | None = None, weights_y: ArrayLike | None = None
) -> float:
    """Energy distance ``2 E|X-Y| - E|X-X'| - E|Y-Y'|`` (Szekely & Rizzo 2013), in units of x.

    The U-statistic: X, X' are distinct cells, so two samples of one law give zero on average, and a single value may
    be below zero. Not the square root.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    return 2 * _mean(a, b, _identity) - _mean_distinct(a, _identity) - _mean_distinct(b, _identity)


def mmd(
    x: ArrayLike,
    y: ArrayLike,
    *,
    bandwidth: float | None = None,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> float:
    """Squared maximum mean discrepancy, kernel ``exp(-|x-y|^2 / (2 bandwidth^2))`` (Gretton et al. 2012, eq. 3).

    The U-statistic: two samples of one law give zero on average, and a single value may be below zero. Squared.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each; ``y`` the observed ones.
    bandwidth
        By default the median distance among ``y``, the observed cells alone, so that it is the same for every
        restoration of them.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    h = median_distance(y) if bandwidth is None else float(bandwidth)
    if not h > 0:
        raise ValueError(f"expected a positive bandwidth, found {h}; are all observed cells the same?")

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-distance.square() / (2 * h * h))

    return _mean_distinct(a, kernel) + _mean_distinct(b, kernel) - 2 * _mean(a, b, kernel)


def median_distance(y: ArrayLike, *, n_cells: int = 3000) -> float:
    """Median distance between distinct cells of ``y`` ``(m, d)``; of more than ``n_cells``, an even selection."""
    points = _cloud(y, None).points
    thinned = points[torch.linspace(0, len(points) - 1, min(len(points), n_cells)).round().long()]
    return float(torch.pdist(thinned).median()) if len(thinned) > 1 else 0.0


def sinkhorn_divergence(
    x: ArrayLike,
    y: ArrayLike,
    *,
    epsilon: float | None = None,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> float:
    """Sinkhorn divergence ``OT(x,y) - OT(x,x)/2 - OT(y,y)/2`` for the cost ``|x-y|^2`` (Feydy et al. 2019, eq. 3).

    Squared units of x. A plug-in (V-)statistic: zero for equal clouds, positive on average for two samples of one law.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``.
    epsilon
        Strength of the entropy in squared units of x; by default 0.05 of the squared median distance among ``y``.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    eps = 0.05 * median_distance(y) ** 2 if epsilon is None else float(epsilon)

    def cost(u: _Cloud, v: _Cloud) -> float:
        plan = entropic(Interval(0.0, 1.0, u.points, v.points, u.mass, v.mass), epsilon=eps, tolerance=1e-4)
        return float(u.mass @ plan.f + v.mass @ plan.g)  # the dual value

    return cost(a, b) - cost(a, a) / 2 - cost(b, b) / 2


def variance_ratio(
    x: ArrayLike, y: ArrayLike, *, weights_x: ArrayLike | None = None, weights_y: ArrayLike | None = None
) -> float:
    """Trace of the covariance of the restored ``x`` over that of the observed ``y``, both unbiased: 1 is right.

    Below one: shrunk, which W1 alone rewards.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """

    def trace(cloud: _Cloud) -> float:
        deviation = cloud.points - cloud.mass @ cloud.points
        return float(cloud.mass @ deviation.square().sum(1)) / _distinct(cloud)

    return trace(_cloud(x, weights_x)) / trace(_cloud(y, weights_y, like=x))


class _Cloud(NamedTuple):
    """Points ``(n, d)`` and their masses ``(n,)``, summing to one; float64 on the CPU."""

    points: Tensor
    mass: Tensor


def _cloud(x: ArrayLike, weights: ArrayLike | None, *, like: ArrayLike | None = None) -> _Cloud:
    points = _double(x)
    if points.dim() != 2 or len(points) == 0 or not bool(points.isfinite().all()):
        raise ValueError(f"expected finite points (n, d), found shape {tuple(points.shape)}")
    if like is not None and points.shape[1] != (d := _double(like).shape[1]):
        raise ValueError(f"expected points of one dimension, found {d}, {points.shape[1]}")
    if weights is None:
        return _Cloud(points, torch.full((len(points),), 1 / len(points), dtype=torch.float64))
    mass = _double(weights)
    if mass.shape != (len(points),) or not bool((mass >= 0).all()) or not 0 < float(mass.sum()) < math.inf:
        raise ValueError(f"expected {len(points)} non-negative weights, some above zero, found {tuple(mass.shape)}")
    return _Cloud(points, mass / mass.sum())


def _double(values: ArrayLike) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().double().cpu()
    # a copy: torch takes neither negative strides nor, without a warning, what is read-only; lists it takes as float32
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _identity(distance: Tensor) -> Tensor:
    return distance


def _mean(a: _Cloud, b: _Cloud, kernel: Callable[[Tensor], Tensor]) -> float:
    """Weighted mean of the kernel over all pairs, tile by tile."""
    total = 0.0
    for points, mass in zip(*(v.split(max(1, TILE // len(b.points))) for v in a)):
        distance = torch.cdist(points, b.points, compute_mode="donot_use_mm_for_euclid_dist")
        total += float(mass @ kernel(distance) @ b.mass)
    return total


def _mean_distinct(cloud: _Cloud, kernel: Callable[[Tensor], Tensor]) -> float:
    """Weighted mean of the kernel over pairs of distinct points: all pairs less each point with itself."""
    itself = float(kernel(torch.zeros(1, dtype=torch.float64))) * float(cloud.mass.square().sum())
    return (_mean(cloud, cloud, kernel) - itself) / _distinct(cloud)


def _distinct(cloud: _Cloud) -> float:
    """Probability that two draws are distinct points: ``1 - 1/n`` for equal masses."""
    share = 1 - float(cloud.mass.square().sum())
    if not share > 1e-12:
        raise ValueError("expected at least two points with mass, found one; an unbiased distance needs pairs")
    return share
