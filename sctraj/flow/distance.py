"""Distances between two weighted clouds of cells.

All take points ``(n, d)`` and ``(m, d)`` (arrays or tensors) and compute in float64. Weights need not be normalised;
uniform where not given. Most return a float and use every pair; the ``estimated_`` ones are for clouds so large that
this takes too long, and return an `Estimate`: the value that all pairs would give, and its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import ot
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .coupling import entropic, optimal_plan
from .snapshots import Interval

TILE = 2**20  # entries of a distance matrix held at once: what a CPU's caches hold

# Points a side (the geometric mean of the two numbers). The network simplex over 4,000 x 4,000 takes 5 to 10 s on one
# core, over 10,000 x 10,000 one to two minutes and 4 GiB, over 20,000 x 20,000 eight times as long and 16 GiB.
LARGEST_EXACT = 5_000  # above, an estimate takes seconds
LARGEST_PLAN = 20_000  # above, no exact plan is tried
LARGEST_PAIRWISE = 10_000  # all pairs take some 10 s, and four times as long for twice the points
SIZES = (125, 250, 500, 1000)  # points a side of the blocks from which a larger W is extrapolated, doubling
GROUPS = 12  # blocks of the largest size, each with all smaller ones within it
SMALLEST_BLOCKS = 1000  # at most: enough for a standard error below a thousandth
PLAN_BLOCK = 500  # points a side of a block of a large restoration's plan
PARTITIONS = 8  # of all points into blocks, for distances that average over pairs
PAIR_BLOCK = 200  # points a side of such a block


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
    error
        Standard error of the distance; 0 where the plan is the optimal one.
    """

    distance: float
    share: Tensor
    barycentre: Tensor
    error: float = 0.0


class Estimate(NamedTuple):
    """A distance between two clouds, as measured or as estimated.

    Attributes
    ----------
    value
        What all points of both clouds give.
    error
        Its standard error: 0 where all points were used.
    n_points
        Points a side (the geometric mean of both) that were met at once: of all of both clouds where the value is
        exact, else of a block.
    """

    value: float
    error: float
    n_points: int


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
        If p is neither 1 nor 2, shapes do not fit, or there are more than ``LARGEST_PLAN`` points a side.
    """
    if p not in (1, 2):
        raise ValueError(f"expected p of 1 or 2, found {p}")
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    if (side := _side(a, b)) > LARGEST_PLAN:
        raise ValueError(
            f"expected at most {LARGEST_PLAN} points a side for an exact plan, found {side:.0f}; call "
            f"estimated_wasserstein, which takes any number and says how far it may be off"
        )
    return optimal_plan(a.points, b.points, a.mass, b.mass, p=p).cost ** (1 / p)


def estimated_wasserstein(
    x: ArrayLike,
    y: ArrayLike,
    *,
    p: int = 1,
    rng: int | np.random.Generator = 0,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> Estimate:
    """Wasserstein distance of clouds of any size: exact up to ``LARGEST_EXACT`` points a side, else extrapolated.

    What is estimated is the exact distance between the two clouds as they are, bias of finite samples included: it
    depends on the number of points, in many dimensions strongly (as ``n^(-1/d)``; Fournier & Guillin 2015). Both
    clouds are cut at random into blocks; the mean distance over blocks of m points falls with m towards the distance
    of all, because the plans within blocks together are one plan of the whole. It is measured at 125 points, on blocks
    that together hold up to 125,000; what doubling m takes off is measured on the same points at both sizes, up to
    1,000; and the law ``c m^(-b)``, fitted to these differences, gives what is left to take off up to all points.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``.
    p
        1 or 2.
    rng
        Seed or Generator of the blocks.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Returns
    -------
    Value, in units of x (for ``p=2`` the root), its standard error, and the points a side of the largest block. The
    error has three parts: between the smallest blocks, between the measured differences, and, of the extrapolation,
    how far the same law misses the largest blocks' own distance when it is fitted to the smaller ones.

    Raises
    ------
    ValueError
        If p is neither 1 nor 2, or shapes do not fit.
    """
    if p not in (1, 2):
        raise ValueError(f"expected p of 1 or 2, found {p}")
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    if (side := _side(a, b)) <= LARGEST_EXACT:
        return Estimate(optimal_plan(a.points, b.points, a.mass, b.mass, p=p).cost ** (1 / p), 0.0, round(side))
    stream = np.random.default_rng(rng)
    smallest = [_cost(*block, p) for block in _some_blocks(a, b, SIZES[0], SMALLEST_BLOCKS, stream)]
    cost = _extrapolated(a, b, SIZES[0], smallest, p, stream)
    value = cost.value ** (1 / p)
    return Estimate(value, cost.error / (p * value ** (p - 1)), cost.n_points)


def restoration_plan(
    x: Tensor,
    y: Tensor,
    *,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    rng: int | np.random.Generator = 0,
) -> Restored:
    """Return W1 between restored ``x`` ``(n, d)`` and observed ``y`` ``(m, d)``, cell by observed cell.

    Up to ``LARGEST_EXACT`` points a side from the optimal plan. Above, W1 is estimated as in `estimated_wasserstein`;
    the plan is the one that is optimal within random blocks of ``PLAN_BLOCK`` points a side, whose cost is higher, so
    that shares are rescaled, all by one factor, to average to the estimate; barycentres are those of the blocks' plans
    (they keep the restored mean, and scatter more about the observed cell than those of the optimal plan).

    Parameters
    ----------
    x, y
        Restored and observed cells.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``, or None.
    rng
        Seed or Generator of the blocks.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    share, barycentre = torch.zeros_like(b.mass), torch.zeros_like(b.points)
    stream = np.random.default_rng(rng)
    large = (side := _side(a, b)) > LARGEST_EXACT
    costs = []
    for part0, part1 in _blocks(a, b, round(side / PLAN_BLOCK) if large else 1, stream):
        plan = optimal_plan(part0.points, part1.points, part0.mass, part1.mass, p=1)
        part = part0.whole * plan.mass  # the block's part in the whole plan
        length = (part0.points[plan.i] - part1.points[plan.j]).norm(dim=1)
        share.index_add_(0, part1.rows[plan.j], part * length)
        barycentre.index_add_(0, part1.rows[plan.j], part[:, None] * part0.points[plan.i])
        costs.append(plan.cost)
    share, barycentre = share / b.mass, barycentre / b.mass[:, None]
    if not large:
        return Restored(costs[0], share, barycentre)
    estimate, mean = _extrapolated(a, b, PLAN_BLOCK, costs, 1, stream), float(np.mean(costs))
    return Restored(estimate.value, share * (estimate.value / mean if mean else 1.0), barycentre, estimate.error)


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


def estimated_energy_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    rng: int | np.random.Generator = 0,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> Estimate:
    """Energy distance of clouds of any size: all pairs up to ``LARGEST_PAIRWISE`` points a side, else pairs in blocks.

    Both clouds are cut at random into blocks of ``PAIR_BLOCK`` points, ``PARTITIONS`` times anew: every point enters
    each time, but only the pairs within blocks do. An incomplete U-statistic (Blom 1976), unbiased for the whole one.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    rng
        Seed or Generator of the blocks.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Returns
    -------
    Value, in units of x, its standard error (between partitions), and the points a side of a block.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    return _estimated_pairwise(a, b, _identity, 1.0, rng)


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
    kernel = _gaussian(median_distance(y) if bandwidth is None else float(bandwidth))
    return -(2 * _mean(a, b, kernel) - _mean_distinct(a, kernel) - _mean_distinct(b, kernel))


def estimated_mmd(
    x: ArrayLike,
    y: ArrayLike,
    *,
    rng: int | np.random.Generator = 0,
    bandwidth: float | None = None,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> Estimate:
    """Squared maximum mean discrepancy of clouds of any size, estimated as in `estimated_energy_distance`.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each; ``y`` the observed ones.
    rng
        Seed or Generator of the blocks.
    bandwidth
        Of the kernel; by default as in `mmd`.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Returns
    -------
    Value, squared as that of `mmd`, its standard error (between partitions), and the points a side of a block.
    """
    a, b = _cloud(x, weights_x), _cloud(y, weights_y, like=x)
    kernel = _gaussian(median_distance(y) if bandwidth is None else float(bandwidth))
    return _estimated_pairwise(a, b, kernel, -1.0, rng)


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


def _gaussian(bandwidth: float) -> Callable[[Tensor], Tensor]:
    if not bandwidth > 0:
        raise ValueError(f"expected a positive bandwidth, found {bandwidth}; are all observed cells the same?")
    return lambda distance: torch.exp(-distance.square() / (2 * bandwidth * bandwidth))


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


# --- large clouds
class _Block(NamedTuple):
    """A part of a cloud: which rows ``(k,)``, their points, their masses in it, and its part of the whole's mass."""

    rows: Tensor
    points: Tensor
    mass: Tensor
    whole: float

    @property
    def cloud(self) -> _Cloud:
        return _Cloud(self.points, self.mass)


def _side(a: _Cloud, b: _Cloud) -> float:
    """Points a side: the geometric mean of the numbers of points with mass."""
    return math.sqrt(int((a.mass > 0).sum()) * int((b.mass > 0).sum()))


def _blocks(a: _Cloud, b: _Cloud, n_blocks: int, rng: np.random.Generator) -> Iterator[tuple[_Block, _Block]]:
    """Put both clouds in random order and cut them at the same fractions of their mass, ``n_blocks`` in all.

    A point at a cut belongs to both blocks with a part of its mass each, so that the plans of all blocks together have
    the clouds' own marginals, whatever the weights.
    """
    if n_blocks <= 1:
        yield tuple(_Block(torch.arange(len(c.mass)), c.points, c.mass, 1.0) for c in (a, b))  # type: ignore[misc]
        return
    cut = [_cut(cloud, n_blocks, rng) for cloud in (a, b)]
    yield from zip(*cut, strict=True)


def _cut(cloud: _Cloud, n_blocks: int, rng: np.random.Generator) -> Iterator[_Block]:
    order = torch.from_numpy(rng.permutation(len(cloud.mass)))
    order = order[cloud.mass[order] > 0]
    end = cloud.mass[order].cumsum(0)
    end = end / end[-1]
    start = torch.cat([end.new_zeros(1), end[:-1]])
    bounds = torch.linspace(0, 1, n_blocks + 1, dtype=end.dtype)
    # a sliver at a cut is rounding, not mass
    sliver = 1e-9 / len(order)
    first = torch.searchsorted(end, bounds[:-1] + sliver, right=True).clamp(max=len(order) - 1)
    last = torch.searchsorted(start, bounds[1:] - sliver).clamp(min=1)
    for low, high, i, j in zip(bounds[:-1], bounds[1:], first.tolist(), last.tolist()):
        mass = end[i:j].clamp(max=high) - start[i:j].clamp(min=low)
        rows = order[i:j]
        yield _Block(rows, cloud.points[rows], mass / mass.sum(), 1 / n_blocks)


def _some_blocks(
    a: _Cloud, b: _Cloud, size: int, most: int, rng: np.random.Generator
) -> Iterator[tuple[_Cloud, _Cloud]]:
    """Yield at most so many of the blocks of about ``size`` points a side."""
    for part0, part1 in islice(_blocks(a, b, round(_side(a, b) / size), rng), most):
        yield part0.cloud, part1.cloud


def _cost(a: _Cloud, b: _Cloud, p: int) -> float:
    return optimal_plan(a.points, b.points, a.mass, b.mass, p=p).cost


def _extrapolated(
    a: _Cloud, b: _Cloud, size: int, found: Sequence[float], p: int, rng: np.random.Generator
) -> Estimate:
    """Carry the costs found in blocks of ``size`` points on to that of both clouds whole."""
    costs = np.array(  # (groups, sizes): the mean over the blocks of each size within the group
        [
            [np.mean([_cost(*block, p) for block in _some_blocks(*group, m, SIZES[-1] // m, rng)]) for m in SIZES]
            for group in _some_blocks(a, b, SIZES[-1], GROUPS, rng)
        ]
    )
    drops = costs[:, :-1] - costs[:, 1:]
    rest = drops[:, SIZES.index(size) :].sum(1)
    tail = _tail(drops, SIZES, _side(a, b))
    # the same law, fitted without the largest blocks, against these: how far it misses, per unit carried on
    foreseen = _tail(drops[:, :-1], SIZES[:-1], SIZES[-1])
    missed = np.sqrt(np.mean((drops[:, -1] - foreseen) ** 2)) / max(abs(foreseen), abs(drops[:, -1].mean()), 1e-300)
    of_tail = tail * min(missed, 1.0)
    nearest = float((a.mass @ a.points - b.mass @ b.points).norm()) ** p  # no plan costs less (Jensen)
    return Estimate(
        max(float(np.mean(found) - rest.mean()) - tail, nearest),
        math.sqrt(np.var(found) / len(found) + rest.var(ddof=1) / len(costs) + of_tail**2),
        SIZES[-1],
    )


def _tail(drops: NDArray, sizes: Sequence[int], side: float) -> float:
    """Fit ``c m^(-b)`` to what each doubling takes off ``(groups, sizes - 1)``; return what is left up to ``side``."""
    mean, size = drops.mean(0), np.array(sizes, dtype=float)
    spread = drops.std(0, ddof=1) / math.sqrt(len(drops)) + 0.03 * np.abs(mean).max()  # no difference counts for all
    best, tail = math.inf, 0.0
    for power in np.geomspace(0.01, 1.5, 200):
        unit = size[:-1] ** -power - size[1:] ** -power
        c = max(0.0, float((unit * mean / spread**2).sum() / (unit**2 / spread**2).sum()))
        misfit = float((((mean - c * unit) / spread) ** 2).sum())
        if misfit < best:
            best, tail = misfit, c * (size[-1] ** -power - side**-power)
    return float(tail)


def _estimated_pairwise(
    a: _Cloud, b: _Cloud, kernel: Callable[[Tensor], Tensor], sign: float, rng: int | np.random.Generator
) -> Estimate:
    """``sign (2 E k(X, Y) - E k(X, X') - E k(Y, Y'))`` over distinct points."""
    if (side := _side(a, b)) <= LARGEST_PAIRWISE:
        value = 2 * _mean(a, b, kernel) - _mean_distinct(a, kernel) - _mean_distinct(b, kernel)
        return Estimate(sign * value, 0.0, round(side))
    stream = np.random.default_rng(rng)
    itself = float(kernel(torch.zeros(1, dtype=torch.float64)))
    values = []
    for _ in range(PARTITIONS):
        total, pairs = np.zeros(3), np.zeros(3)  # of the pairs x-y, x-x, y-y within blocks
        for u, v in zip(*(_by_number(cloud, round(side / PAIR_BLOCK), stream) for cloud in (a, b))):
            squares = [float(part.mass.square().sum()) for part in (u, v)]
            within = [_mean(part, part, kernel) - itself * square for part, square in zip((u, v), squares)]
            of_u, of_v = float(u.mass.sum()), float(v.mass.sum())
            total += [_mean(u, v, kernel), *within]
            pairs += [of_u * of_v, of_u**2 - squares[0], of_v**2 - squares[1]]
        cross, of_x, of_y = total / pairs
        values.append(sign * (2 * cross - of_x - of_y))
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(PARTITIONS), PAIR_BLOCK)


def _by_number(cloud: _Cloud, n_blocks: int, rng: np.random.Generator) -> Iterator[_Cloud]:
    """Cut a cloud in random order into equal numbers of points, so that all pairs are met equally likely."""
    for rows in torch.from_numpy(rng.permutation(len(cloud.mass))).tensor_split(n_blocks):
        yield _Cloud(cloud.points[rows], cloud.mass[rows])
