"""Energy distance and MMD, which are means over pairs, for clouds of any size: of large ones over some of the pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .clouds import (
    Cloud,
    Estimate,
    Kernel,
    as_cloud,
    centred,
    distinct_means,
    gaussian,
    identity,
    mean_kernels,
    median_distance,
    points_a_side,
)

LARGEST_PAIRWISE = 10_000  # points a side; for these, all pairs take 2 s, and for twice as many four times as long
PARTITIONS = 8  # of all points into blocks, for distances that average over pairs
PAIR_BLOCK = 200  # points a side of such a block


def estimated_energy_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    rng: int | np.random.Generator = 0,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
    about_mean: bool = False,
) -> Estimate:
    """Estimate the energy distance: from all pairs up to ``LARGEST_PAIRWISE`` points a side, else from those in blocks.

    Both clouds are cut at random into blocks of ``PAIR_BLOCK`` points, ``PARTITIONS`` times anew: each time every point
    is used, but only the pairs within blocks. This is an incomplete U-statistic (Blom 1976), unbiased for the complete
    one. A cloud that is too small to be cut into as many blocks is compared as a whole with every block of the other.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    rng
        Seed or Generator of the blocks.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.
    about_mean
        As in `energy_distance`.

    Returns
    -------
    Value, in units of x, its standard error (between partitions), and the points a side of a block.
    """
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    return _pairwise([a], [b], [identity], rng, about_mean=about_mean)[-1][0]


def estimated_mmd(
    x: ArrayLike,
    y: ArrayLike,
    *,
    rng: int | np.random.Generator = 0,
    bandwidth: float | None = None,
    weights_x: ArrayLike | None = None,
    weights_y: ArrayLike | None = None,
) -> Estimate:
    """Estimate the squared maximum mean discrepancy of clouds of any size, as in `estimated_energy_distance`.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each; ``y`` the observed ones.
    rng
        Seed or Generator of the blocks.
    bandwidth
        Bandwidth of the kernel; by default as in `mmd`.
    weights_x, weights_y
        ``(n,)`` and ``(m,)``.

    Returns
    -------
    Value, squared as that of `mmd`, its standard error (between partitions), and the points a side of a block.
    """
    a, b = as_cloud(x, weights_x), as_cloud(y, weights_y, like=x)
    kernel = gaussian(median_distance(y) if bandwidth is None else float(bandwidth))
    return _negated(_pairwise([a], [b], [kernel], rng)[0][0])


class Pairwise(NamedTuple):
    """The distances that are means over pairs."""

    energy: Estimate
    mmd: Estimate


def estimated_pairwise(
    x: ArrayLike,
    y: ArrayLike,
    *,
    bandwidth: float,
    weights_x: Sequence[ArrayLike | None],
    weights_y: ArrayLike | None,
    rng: int | np.random.Generator,
    within_y: NDArray[np.float64] | None,
) -> tuple[list[Pairwise], Estimate]:
    """Estimate energy distance and MMD under several weightings of ``x``, each as if alone, in one pass over the pairs.

    Parameters
    ----------
    x, y
        Points ``(n, d)`` and ``(m, d)``, at least two each.
    bandwidth
        Bandwidth of the kernel of `mmd`.
    weights_x
        Weightings, each ``(n,)`` or None.
    weights_y
        ``(m,)``.
    rng
        Seed or Generator of the blocks.
    within_y
        The result of `within` for ``y``, if it is already known.

    Returns
    -------
    The distances for each weighting; and the energy distance about the mean under the first one, for which the pairs
    between the clouds are visited once more.
    """
    us, b = [as_cloud(x, weights) for weights in weights_x], as_cloud(y, weights_y, like=x)
    kernels = [identity, gaussian(bandwidth)]
    energy, mmd, shape = _pairwise(us, [b] * len(us), kernels, rng, within_y, about_mean=True)
    return [Pairwise(one, _negated(other)) for one, other in zip(energy, mmd)], shape[0]


def within(y: ArrayLike, *, bandwidth: float, weights: ArrayLike | None) -> NDArray[np.float64] | None:
    """Return ``y``'s own part of energy distance and MMD, the same whatever it is compared with: ``(2, 1)``.

    None for more than ``LARGEST_PAIRWISE`` points, whose pairs are never all used.
    """
    cloud = as_cloud(y, weights)
    if points_a_side(cloud, cloud) > LARGEST_PAIRWISE:
        return None
    return distinct_means([cloud], [identity, gaussian(bandwidth)])


def _pairwise(
    us: Sequence[Cloud],
    vs: Sequence[Cloud],
    kernels: Sequence[Kernel],
    rng: int | np.random.Generator,
    within_v: NDArray[np.float64] | None = None,
    *,
    about_mean: bool = False,
) -> list[list[Estimate]]:
    """Estimate ``2 E k(X, Y) - E k(X, X') - E k(Y, Y')`` over distinct points: a list per kernel, of one per weighting.

    With ``about_mean`` a last list has one estimate, for the first kernel and weighting, with both clouds `centred`
    where they are compared with each other.
    """
    sides = [points_a_side(u, v) for u, v in zip(us, vs, strict=True)]
    most = max(map(_pairs_a_side, us, vs))
    both = [centred(us[0]), centred(vs[0])] if about_mean else []
    if most <= LARGEST_PAIRWISE:
        of_v = distinct_means(vs[:1], kernels) if within_v is None else within_v
        values = _differences(*_cross(us, vs, kernels, both), distinct_means(us, kernels), of_v)
        return [[Estimate(float(v), 0.0, round(side)) for v, side in zip(row, sides)] for row in values]
    n_blocks = round(most / PAIR_BLOCK)
    rows = [np.stack(row) for row in zip(*_partitioned(us, vs[0], kernels, both, n_blocks, rng))]
    found = [(row.mean(0), row.std(0, ddof=1) / math.sqrt(PARTITIONS)) for row in rows]
    return [[Estimate(float(v), float(e), PAIR_BLOCK) for v, e in zip(*row)] for row in found]


def _pairs_a_side(u: Cloud, v: Cloud) -> float:
    """Return the size of two equal clouds that have as many pairs, within each cloud and between both together."""
    n, m = (int((cloud.mass > 0).sum()) for cloud in (u, v))
    return math.sqrt((n * n + n * m + m * m) / 3)


def _cross(
    us: Sequence[Cloud], vs: Sequence[Cloud], kernels: Sequence[Kernel], both: Sequence[Cloud]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means over pairs between the clouds ``(kernels, weightings)``, and between any centred ones, ``(1,)``."""
    means = mean_kernels(us, vs, kernels)
    return means, mean_kernels(both[:1], both[1:], kernels[:1])[0] if both else np.zeros(0)


def _differences(cross: NDArray, shape: NDArray, of_u: NDArray, of_v: NDArray) -> list[NDArray[np.float64]]:
    """Return ``2 E k(X, Y) - E k(X, X') - E k(Y, Y')``: a row per kernel, and any further one about the mean."""
    rows = list(2 * cross - of_u - of_v)
    return [*rows, 2 * shape - of_u[0, 0] - of_v[0, 0]] if len(shape) else rows


def _partitioned(
    us: Sequence[Cloud],
    v: Cloud,
    kernels: Sequence[Kernel],
    both: Sequence[Cloud],
    n_blocks: int,
    rng: int | np.random.Generator,
) -> Iterator[list[NDArray[np.float64]]]:
    """Yield `_differences` for each of the partitions, from the pairs within its blocks alone."""
    stream = np.random.default_rng(rng)
    # clouds with too few points for two in every block are used whole
    few = [len(cloud.mass) < 2 * n_blocks for cloud in (us[0], v)]
    known = [distinct_means(cloud, kernels) if one else None for one, cloud in zip(few, (us, [v]))]
    crossed = _cross(us, [v] * len(us), kernels, both) if any(few) else None  # the same every time
    itself = np.array([float(kernel(torch.zeros(1, dtype=torch.float64))) for kernel in kernels])[:, None]
    for _ in range(PARTITIONS):
        # of the pairs x-y within blocks, x-y about the means, x-x, y-y
        totals, pairs = [np.zeros(1)] * 4, [np.zeros(1)] * 4
        cut = [_in_blocks(len(c.mass), n_blocks, stream, whole=one) for c, one in zip((us[0], v), few)]
        for rows in zip(*cut):
            part_u, (part_v,) = _rows(us, rows[0]), _rows([v], rows[1])
            masses, squares = (
                [np.array([float(f(part.mass)) for part in parts]) for parts in (part_u, [part_v])]
                for f in (torch.sum, lambda mass: mass.square().sum())
            )
            met = masses[0] * masses[1]
            if crossed is None:
                parts_of_both = [one for cloud, own in zip(both, rows) for one in _rows([cloud], own)]
                cross, shape = _cross(part_u, [part_v] * len(part_u), kernels, parts_of_both)
            else:
                cross, shape = crossed[0] * met, crossed[1] * met[: len(crossed[1])]
            inside, weight = [cross, shape], [met, met[: len(shape)]]
            for part, mass, square, whole in zip((part_u, [part_v]), masses, squares, known):
                pairs_met = mass**2 - square
                own = mean_kernels(part, part, kernels) - itself * square if whole is None else whole * pairs_met
                inside.append(own)
                weight.append(pairs_met)
            totals = [total + part for total, part in zip(totals, inside)]
            pairs = [total + part for total, part in zip(pairs, weight)]
        yield _differences(*(total / weight for total, weight in zip(totals, pairs)))


def _in_blocks(n: int, n_blocks: int, rng: np.random.Generator, *, whole: bool) -> Sequence[Tensor]:
    """Cut ``n`` points at random into equal blocks, so that all pairs are equally likely; or take all each time."""
    if whole:
        return [torch.arange(n)] * n_blocks
    return torch.from_numpy(rng.permutation(n)).tensor_split(n_blocks)


def _rows(clouds: Sequence[Cloud], rows: Tensor) -> list[Cloud]:
    """Return some rows of one cloud, under all of its weightings."""
    points = clouds[0].points[rows]
    return [Cloud(points, cloud.mass[rows]) for cloud in clouds]


def _negated(estimate: Estimate) -> Estimate:
    return estimate._replace(value=-estimate.value)
