"""Weighted clouds of cells, means of kernels over all pairs of cells, and how far apart cells are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import Tensor

from .euclidean import distances
from .exponential import exp_

TILE = 2**20  # entries of a distance matrix held at once: what a CPU's caches hold
ASKED = 1000  # at most so many cells have their distance to others measured
NEAREST = 5  # a point's distance from a cloud is that to its 5th nearest cell, as a pair of cells is no cloud

Kernel = Callable[[Tensor], Tensor]  # of distances, which it does not change in place


class Cloud(NamedTuple):
    """Points ``(n, d)`` and their masses ``(n,)``, which sum to one; float64 on the CPU."""

    points: Tensor
    mass: Tensor


class Estimate(NamedTuple):
    """A distance between two clouds, exact or estimated.

    Attributes
    ----------
    value
        The distance between all points of both clouds.
    error
        Its standard error: 0 if all points were used.
    n_points
        Points a side (the geometric mean of both) that were compared at once: all points if the value is exact, else
        those of a block.
    """

    value: float
    error: float
    n_points: int


def as_cloud(x: ArrayLike, weights: ArrayLike | None, *, like: ArrayLike | None = None) -> Cloud:
    """Check points and weights, and normalise the weights; the dimension must be that of ``like``."""
    points = as_double(x)
    if points.dim() != 2 or len(points) == 0:
        raise ValueError(f"expected points (n, d), at least one, found shape {tuple(points.shape)}")
    if bad := int((~points.isfinite().all(1)).sum()):
        raise ValueError(f"expected finite points, found NaN or inf in {bad} of {len(points)}; leave those out")
    if like is not None and points.shape[1] != (d := as_double(like).shape[1]):
        raise ValueError(f"expected points of one dimension, found {d}, {points.shape[1]}")
    if weights is None:
        return Cloud(points, torch.full((len(points),), 1 / len(points), dtype=torch.float64))
    mass = as_double(weights)
    if mass.shape != (len(points),) or not bool((mass >= 0).all()) or not 0 < float(mass.sum()) < math.inf:
        raise ValueError(f"expected {len(points)} non-negative weights, some above zero, found {tuple(mass.shape)}")
    return Cloud(points, mass / mass.sum())


def as_double(values: ArrayLike) -> Tensor:
    """Return values, dense or sparse, as a dense float64 tensor on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().double().cpu().to_dense()
    array: Any = values
    if sparse.issparse(array):
        array = array.toarray()
    # a copy: torch does not accept negative strides, warns of read-only arrays, and reads lists as float32
    return torch.from_numpy(np.array(array, dtype=np.float64))


def centred(cloud: Cloud) -> Cloud:
    """Centre a cloud on its mean and stretch each deviation to the variance that it has about the law's own mean.

    The mean of all points contains a point itself, with its mass ``w``. About that mean, a point from a law of variance
    1 has the variance ``1 - 2 w + sum w^2``: for equal masses ``1 - 1/n``, as in an unbiased variance.
    """
    deviation = cloud.points - cloud.mass @ cloud.points
    variance = 1 - 2 * cloud.mass + cloud.mass.square().sum()
    return cloud._replace(points=deviation / variance.sqrt()[:, None])


def distinct(cloud: Cloud) -> float:
    """Return the probability that two draws are distinct points: ``1 - 1/n`` for equal masses."""
    share = 1 - float(cloud.mass.square().sum())
    if not share > 1e-12:
        raise ValueError("expected at least two points with mass, found one; an unbiased distance needs pairs")
    return share


def median_distance(y: ArrayLike, *, n_cells: int = 3000) -> float:
    """Return the median distance between distinct cells of ``y`` ``(m, d)``, or of an even selection of ``n_cells``.

    If at least half of all pairs are of cells at the same place, it is the median over the other pairs; so it is zero
    only if all cells are at one place.
    """
    points = as_cloud(y, None).points
    distance = torch.pdist(points[evenly(len(points), n_cells)])
    if len(distance) and (median := float(distance.median())) > 0:
        return median
    if not bool(distance.any()):  # all selected cells are at one place
        distance = (points - points[0]).norm(dim=1)
    apart = distance[distance > 0]
    return float(apart.median()) if len(apart) else 0.0


def evenly(n: int, most: int) -> Tensor:
    """Return all of ``n`` indices or, if there are more than ``most``, that many at even distances."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()


def points_a_side(a: Cloud, b: Cloud) -> float:
    """Return the number of points a side: the geometric mean of the numbers of points with mass."""
    return math.sqrt(int((a.mass > 0).sum()) * int((b.mass > 0).sum()))


def identity(distance: Tensor) -> Tensor:
    """Return distances as they are: the kernel of the energy distance."""
    return distance


def gaussian(bandwidth: float) -> Kernel:
    """Return the kernel ``exp(-distance^2 / (2 bandwidth^2))``."""
    if not bandwidth > 0:
        raise ValueError(f"expected a positive bandwidth, found {bandwidth}; are all observed cells the same?")
    return lambda distance: exp_(distance.square().div_(-2 * bandwidth * bandwidth))


def mean_kernels(us: Sequence[Cloud], vs: Sequence[Cloud], kernels: Sequence[Kernel]) -> NDArray[np.float64]:
    """Return weighted means of kernels over all pairs of two clouds, in one pass for all kernels and weightings.

    Parameters
    ----------
    us, vs
        Weightings of each cloud, the same number for both, all of the same points. If ``vs`` is ``us``, the pairs are
        those of one cloud with itself, and each is visited once for both of its orders.
    kernels
        Functions of the distances.

    Returns
    -------
    ``(kernels, weightings)``.
    """
    itself = us is vs
    x, y = us[0].points, vs[0].points
    total, start = np.zeros((len(kernels), len(us))), 0
    while start < len(x):
        first = start if itself else 0  # earlier ones were visited from the other side
        stop = min(len(x), start + max(1, TILE // (len(y) - first)))
        distance = distances(x[start:stop], y[first:])
        for k, kernel in enumerate(kernels):
            values = kernel(distance)
            for w, (u, v) in enumerate(zip(us, vs, strict=True)):
                mass = v.mass[first:]
                if itself and stop < len(x):
                    mass = torch.cat([mass[: stop - start], 2 * mass[stop - start :]])
                total[k, w] += float(u.mass[start:stop] @ values @ mass)
        start = stop
    return total


def distinct_means(us: Sequence[Cloud], kernels: Sequence[Kernel]) -> NDArray[np.float64]:
    """Return such means over pairs of distinct points of one cloud: all pairs except each point with itself."""
    whole = mean_kernels(us, us, kernels)
    zero = torch.zeros(1, dtype=torch.float64)
    itself = np.outer([float(kernel(zero)) for kernel in kernels], [float(u.mass.square().sum()) for u in us])
    return (whole - itself) / [distinct(u) for u in us]


def spacing(cells: Tensor) -> float:
    """Return how far apart cells ``(n, d)`` are: the median distance to the 5th nearest other cell.

    With fewer than ten cells, it is the other cell half-way in the order of nearness. With more than a thousand, an
    evenly chosen thousand have their distances measured. If at least half of the cells share their place with as many
    others, each place counts once; so it is zero only if all cells are at one place.
    """
    cells = cells.cpu().double()
    if len(cells) < 2:
        return 0.0
    k = min(NEAREST, len(cells) // 2)
    found = float(_to_nearest(cells[evenly(len(cells), ASKED)], cells, k + 1).median())  # the nearest is itself
    places = cells if found > 0 else cells.unique(dim=0)
    return found if len(places) == len(cells) else spacing(places)


def share_astray(moved: Tensor, cells: Tensor) -> float:
    """Return the share of points that lie farther from a cloud than any of its own cells does from the others.

    Parameters
    ----------
    moved, cells
        Points ``(n, d)`` and the cloud ``(m, d)``, of at least two cells. What counts is the distance to the 5th
        nearest other cell. Points with NaN are astray.
    """
    cells = cells.cpu().double()
    k = min(NEAREST, len(cells) - 1)
    own = _to_nearest(cells, cells, k + 1)  # the nearest is itself
    near = _to_nearest(moved.cpu().double(), cells, k) <= own.max()
    return 1 - float(near.double().mean())


def _to_nearest(x: Tensor, cells: Tensor, k: int) -> Tensor:
    """Return the distance of points ``(n, d)`` to their ``k``-th nearest cell, ``(n,)``."""
    return distances(x, cells).kthvalue(k, 1).values
