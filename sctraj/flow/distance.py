"""Distances between two weighted clouds of cells.

They say how near a restoration comes to the cells that were observed. All take points ``(n, d)`` and ``(m, d)`` (arrays
or tensors; sparse ones are made dense) and compute in float64. Weights need not be normalised, and are uniform by
default. Most return a float and use every pair. The ``estimated_`` ones (`distance_estimates`, `pairwise_estimates`)
are for clouds so large that this takes too long; they return an `Estimate` of the value that all pairs would give, with
its standard error.
"""

from __future__ import annotations

import math

import numpy as np
import ot
from numpy.typing import ArrayLike

from .clouds import (
    Cloud,
    Estimate,
    Kernel,
    as_cloud,
    centred,
    distinct,
    distinct_means,
    gaussian,
    identity,
    mean_kernels,
    median_distance,
    points_a_side,
)
from .coupling import entropic, optimal_plan
from .distance_estimates import LARGEST_EXACT, Restored, estimated_wasserstein, restoration_plan
from .pairwise_estimates import LARGEST_PAIRWISE, estimated_energy_distance, estimated_mmd
from .snapshots import Interval

__all__ = [
    "LARGEST_EXACT",
    "LARGEST_PAIRWISE",
    "Estimate",
    "Restored",
    "energy_distance",
    "estimated_energy_distance",
    "estimated_mmd",
    "estimated_wasserstein",
    "median_distance",
    "mmd",
    "restoration_plan",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "variance_ratio",
    "wasserstein",
]

LARGEST_PLAN = 20_000  # points a side (the geometric mean of both) above which no exact plan is computed


def wasserstein(
    x: ArrayLike, y: ArrayLike, *, p: int = 1, weights_x: ArrayLike | None = None, weights_y: ArrayLike | None = None
) -> float:
    """Compute the exact Wasserstein distance ``(min_P sum P_ij |x_i - y_j|^p)^(1/p)``, with the root, in units of x.

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
        If p is neither 1 nor 2, if shapes do not fit, or if there are more than ``LARGEST_PLAN`` points a side.
    """
    if p not in (1, 2):
        raise ValueError(f"expected p of 1 or 2, found {p}")
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    if (side := points_a_side(a, b)) > LARGEST_PLAN:
        raise ValueError(
            f"expected at most {LARGEST_PLAN} points a side for an exact plan, found {side:.0f}; call "
            f"estimated_wasserstein, which takes any number and says how far it may be off"
        )
    return optimal_plan(a.points, b.points, a.mass, b.mass, p=p).cost ** (1 / p)


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
    """Estimate the sliced Wasserstein distance, the root of the mean ``W_p^p`` over directions (Bonneel et al. 2015).

    The points are projected on each direction; ``W_p^p`` is that of the projections, and the root is the p-th.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``.
    p
        Power of the distance, at least 1.
    n_projections
        Number of random directions, uniform on the sphere: a Monte Carlo estimate.
    rng
        Seed or Generator of the directions.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Raises
    ------
    ValueError
        If p or n_projections is below 1, or shapes do not fit.
    """
    if not 1 <= p < math.inf:
        raise ValueError(f"expected a finite p of at least 1, found {p}; 1 and 2 are the usual ones")
    if not 1 <= n_projections < math.inf or n_projections != int(n_projections):
        raise ValueError(f"expected a whole number of projections, at least 1, found {n_projections}")
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    directions = np.random.default_rng(rng).standard_normal((a.points.shape[1], int(n_projections)))
    directions /= np.linalg.norm(directions, axis=0)
    arrays = (t.numpy() for t in (a.points, b.points, a.mass, b.mass))
    return float(ot.sliced_wasserstein_distance(*arrays, p=p, projections=directions))


def energy_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
    about_mean: bool = False,
) -> float:
    """Compute the energy distance ``2 E|X-Y| - E|X-X'| - E|Y-Y'|`` (Szekely & Rizzo 2013), in units of x.

    This is the U-statistic: X, X' are distinct cells, so two samples of one law give zero on average, and a single
    value may be negative. The square root is not taken.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    about_mean
        Whether each cloud is centred on its own mean, so that only differences in shape count. A sample is narrower
        about its own mean than about that of its law; where X is compared with Y, deviations are stretched accordingly,
        as for an unbiased variance, so that two samples of one normal law give zero on average. Two samples of distant
        clusters do not: each has somewhat more of one cluster or another, which shifts its mean, and so the clusters
        themselves come to lie beside each other. Two samples of 100 points in two clusters, 10 apart and of sd .3, give
        .25 on average, and of 400 points .07. What to expect can be seen from two halves of one sample (the noise
        reference).
    """
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    return _difference(a, b, identity, about_mean=about_mean)


def mmd(
    x: ArrayLike,
    y: ArrayLike,
    *,
    bandwidth: float | None = None,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> float:
    """Compute the squared MMD for the kernel ``exp(-|x-y|^2 / (2 bandwidth^2))`` (Gretton et al. 2012, eq. 3).

    The maximum mean discrepancy, squared, as a U-statistic: two samples of one law give zero on average, and a single
    value may be negative.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each; ``y`` the observed ones.
    bandwidth
        Bandwidth of the kernel; by default the median distance among ``y``, the observed cells alone, so that it is the
        same for every restoration of them (if most pairs of these are at one place, the median among the other pairs).
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    kernel = gaussian(median_distance(y) if bandwidth is None else float(bandwidth))
    return -_difference(a, b, kernel)


def sinkhorn_divergence(
    x: ArrayLike,
    y: ArrayLike,
    *,
    epsilon: float | None = None,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> float:
    """Compute the Sinkhorn divergence ``OT(x,y) - OT(x,x)/2 - OT(y,y)/2`` (Feydy et al. 2019, eq. 3).

    The cost is ``|x-y|^2``, so values are in squared units of x. A plug-in (V-)statistic: zero for equal clouds, and
    positive on average for two samples of one law.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``.
    epsilon
        Strength of the entropy in squared units of x; by default 0.05 of the squared median distance among ``y``.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    """
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    eps = 0.05 * median_distance(y) ** 2 if epsilon is None else float(epsilon)

    def cost(u: Cloud, v: Cloud) -> float:
        interval = Interval(0.0, 1.0, u.points, v.points, u.mass, v.mass)
        try:
            plan = entropic(interval, epsilon=eps, tolerance=1e-4)
        except (ValueError, RuntimeError) as error:  # whose message is about a bridge
            raise type(error)(
                f"expected an epsilon at which Sinkhorn converges, found {eps:.3g}, too small for points that lie so "
                f"far apart; pass a larger one, or leave points far from all others out"
            ) from error
        return float(u.mass @ plan.f + v.mass @ plan.g)  # the dual value

    return cost(a, b) - cost(a, a) / 2 - cost(b, b) / 2


def variance_ratio(
    x: ArrayLike, y: ArrayLike, *, weights_x: ArrayLike | None = None, weights_y: ArrayLike | None = None
) -> float:
    """Divide the trace of the covariance of the restored ``x`` by that of the observed ``y``, both unbiased.

    A ratio of 1 is right. Below one the restoration is shrunk, which W1 rewards in many dimensions.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Raises
    ------
    ValueError
        If there are fewer than two points, or the points of ``y`` are all at one place.
    """

    def trace(cloud: Cloud) -> float:
        deviation = cloud.points - cloud.mass @ cloud.points
        return float(cloud.mass @ deviation.square().sum(1)) / distinct(cloud)

    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    of_a, of_b = trace(a), trace(b)
    seen = b.points[b.mass > 0]
    if of_b == 0 or bool((seen == seen[0]).all()):  # then any variance is rounding of the mean
        raise ValueError(
            f"expected observed points that vary, found {len(seen)} at one place: there is no ratio to a variance of "
            f"zero; compare such cells by energy_distance or wasserstein"
        )
    return of_a / of_b


def _difference(a: Cloud, b: Cloud, kernel: Kernel, *, about_mean: bool = False) -> float:
    """Return ``2 E k(X, Y) - E k(X, X') - E k(Y, Y')`` over distinct points."""
    of_a, of_b = distinct_means([a], [kernel]), distinct_means([b], [kernel])
    cross = mean_kernels(*([centred(a)], [centred(b)]) if about_mean else ([a], [b]), [kernel])
    return float((2 * cross - of_a - of_b)[0, 0])
