"""Learned paths that stay near the data: Metric Flow Matching (Kapusniak et al. 2024, arXiv 2405.14780).

A path bends away from its chord so as to lower its kinetic energy under a metric in which moving is cheap where there
are cells and costly where there are none. The bend is given by a perceptron, which is trained once on the kept
snapshots, before the flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from scipy.optimize import nnls
from torch import Tensor

from .coupling import Coupling
from .probability_path import Moments, Pairs, ProbabilityPath
from .snapshots import Snapshots
from .vector_field import Scaling, scaling

Metric = Literal["land", "rbf"]

N_STEPS = 300  # of training, which take a second or two; with 600, simulated courses were restored no better
BATCH_SIZE = 64  # pairs per step, of all intervals together; up to here the cost of a step hardly grows
WIDTH = 64  # of both hidden layers; a bend is a smooth function of few directions
LEARNING_RATE = 1e-2  # initial; it falls to zero along a cosine, so that the result does not depend on the last batch
REFERENCE_CELLS = 1000  # at most, of all snapshots together; the metric is computed from these at every step
NEIGHBOUR = 10  # gamma is the median distance to the 10th nearest cell: it covers some tens of cells in any dimension
CENTRES = 100  # of the rbf metric, at most, as in the authors' code; each has on average at least ten cells
KAPPA = 1.0  # reach of a centre, relative to the root mean square distance of its cells
LLOYD = 20  # iterations of k-means; the centres need only cover the cells
EPSILON = 1e-2  # added to h, in units of its mean at cells: the costliest place costs a hundred times the usual


@dataclass(frozen=True)
class MetricPath(ProbabilityPath):
    """A learned curve with constant spread: ``N((1-s) x0 + s x1 + s (1-s) phi(x0, x1, s, t0), sigma^2)``.

    These are the interpolants of Kapusniak et al. 2024 (algorithm 1), except that here ``phi`` is also given its
    interval, by ``t0``; `metric_path` trains one. The path passes exactly through its ends whatever ``phi`` is.
    ``sigma`` is a length.

    Attributes
    ----------
    weights, biases
        Weights and biases of the layers of ``phi``, ``(n, m)`` and ``(m,)``, in standardised units.
    shift
        Centre of the cells, ``(d,)``.
    scale
        Root mean square deviation per coordinate, in units of x.
    origin, gap
        First time and mean gap of the snapshots, in units of time.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    shift: Tensor
    scale: float
    origin: float
    gap: float

    def moments(self, pairs: Pairs, s: Tensor) -> Moments:
        """Return mean, standard deviation and their rates at the fraction ``s`` of an interval."""
        x0, x1 = pairs.x0, pairs.x1
        shape = torch.broadcast_shapes(x0.shape[:-1], s.shape[:-1])
        s = s.expand(*shape, 1)
        y0, y1 = ((x - self.shift.to(x)) / self.scale for x in (x0, x1))
        start = torch.as_tensor((pairs.t0 - self.origin) / self.gap, dtype=x0.dtype, device=x0.device)
        inputs = [s, *(part.expand(*shape, -1) for part in (y0, y1, start.reshape(start.shape or (1,))))]
        phi, phi_rate = self._phi(torch.cat(inputs, -1))
        bend = s * (1 - s) * self.scale * phi
        bend_rate = ((1 - 2 * s) * phi + s * (1 - s) * phi_rate) * self.scale
        mean, rate = (1 - s) * x0 + s * x1 + bend, (x1 - x0 + bend_rate) / pairs.length
        return Moments(mean, rate, torch.full_like(s, self.sigma), torch.zeros_like(s))

    def _phi(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Map standardised ``(s, x0, x1, t0)``, ``(..., 2 d + 2)``, to ``phi`` and its rate in ``s``, ``(..., d)``.

        The exact derivative is propagated forwards together with the value, so that neither needs a graph.
        """
        rate = torch.zeros_like(h)
        rate[..., 0] = 1
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h, rate = h @ weight.to(h) + bias.to(h), rate @ weight.to(h)
            if layer < last:  # SiLU is smooth, and so is the velocity
                gate = torch.sigmoid(h)
                h, rate = h * gate, rate * gate * (1 + h * (1 - gate))
        return h, rate


class DiagonalMetric(Protocol):
    """The cost of moving at a place: a diagonal metric ``G``, the inverse of ``h + epsilon``."""

    def density(self, x: Tensor) -> Tensor:
        """Return ``h`` at points ``(n, d)``: ``(n, d)``, or ``(n, 1)`` if all coordinates share it."""


@dataclass(frozen=True)
class Land:
    """Local variances of the cells: ``h_a(x) = sum_i m_i (x_i^a - x^a)^2 exp(-|x - x_i|^2 / (2 gamma^2))``.

    The LAND metric of Arvanitidis et al. 2016, as in Kapusniak et al. 2024, with the cells' weights. At a distance of a
    few ``gamma`` from all cells it is flat, so a chord across a wide hole may stay in the hole.

    Attributes
    ----------
    cells, mass
        Reference cells ``(n, d)`` and their weights ``(n,)``.
    gamma
        Reach, a length: the median distance of a cell to its tenth nearest cell.
    """

    cells: Tensor
    mass: Tensor
    gamma: float

    def density(self, x: Tensor) -> Tensor:
        """Return ``h`` at points ``(n, d)``: ``(n, d)``."""
        near = self.mass * torch.exp(-_squared_distances(x, self.cells) / (2 * self.gamma**2))  # (n, n_cells)
        # expanded, to avoid an (n, n_cells, d) tensor
        spread = near @ self.cells.square() - 2 * x * (near @ self.cells) + x.square() * near.sum(1, keepdim=True)
        return spread.clamp(min=0)


@dataclass(frozen=True)
class Rbf:
    """Closeness to the cells: ``h(x) = sum_k w_k exp(-lambda_k / 2 |x - c_k|^2)``, fitted to be one at the cells.

    The RBF metric of Kapusniak et al. 2024, with one ``h`` for all coordinates as in the authors' code.

    Attributes
    ----------
    centres
        Centres ``c`` found by k-means, ``(k, d)``.
    precision
        ``lambda = 1 / (kappa r_k)^2``, ``(k,)``, with ``r_k`` the root mean square distance of a centre's cells: the
        whole distance, not that per coordinate, so that ``kappa`` means the same in any dimension.
    weights
        ``w``, ``(k,)``, non-negative.
    """

    centres: Tensor
    precision: Tensor
    weights: Tensor

    def density(self, x: Tensor) -> Tensor:
        """Return ``h`` at points ``(n, d)``: ``(n, 1)``."""
        return torch.exp(-self.precision / 2 * _squared_distances(x, self.centres)) @ self.weights[:, None]


def metric_path(
    snapshots: Snapshots,
    couplings: Sequence[Coupling],
    *,
    metric: Metric,
    sigma: float,
    n_steps: int,
    batch_size: int,
    width: int,
    learning_rate: float,
    rng: torch.Generator,
) -> MetricPath:
    """Learn paths of low kinetic energy ``E |x_s'|^2_G`` under a metric of the cells, over pairs and uniform ``s``.

    This is algorithm 1 of Kapusniak et al. 2024, for all intervals at once. Cells and times are standardised first, and
    everything that the metric needs is measured on the (kept) snapshots, so that the result follows any shift or change
    of unit of both. Before training, paths are straight.

    Parameters
    ----------
    snapshots
        At least two; everything is computed from these alone. If there are more than ``REFERENCE_CELLS`` cells, an
        evenly spaced subset of each snapshot stands for the whole in the metric.
    couplings
        One per interval.
    metric
        ``"land"`` or ``"rbf"``: see `Land` and `Rbf`.
    sigma
        Spread of the paths, a length; the energy is that of their means.
    n_steps, batch_size, width, learning_rate
        Training steps, pairs per step (at least one per interval), width of the two hidden layers, and Adam's initial
        step size, which falls to zero along a cosine.
    rng
        Generator on the cells' device, for initial weights, centres, pairs and times.

    Raises
    ------
    ValueError
        If there are fewer than two snapshots, if there is not one coupling per interval, if the metric is unknown or a
        number not positive, if there are fewer pairs than intervals, or if the cells do not differ.
    RuntimeError
        If the energy becomes infinite or undefined.
    """
    _check(snapshots, couplings, metric, n_steps, batch_size, width, learning_rate)
    units = scaling(snapshots, std=0.0)
    cost = diagonal_metric(snapshots, units, metric, rng)
    usual = float(cost.density(_reference(snapshots, units)[0]).mean())
    path = _straight(snapshots, units, width, rng)
    learnt = [p.requires_grad_() for p in (*path.weights, *path.biases)]
    optimiser = torch.optim.Adam(learnt, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for step, pairs in enumerate(_batches(snapshots, couplings, n_steps, batch_size, rng)):
        with torch.enable_grad():
            at = path.sample(pairs, rng)  # points on the mean, as sigma is zero here
            y, rate = (at.x - path.shift) / path.scale, at.velocity * pairs.length / path.scale
            # E |x'|^2_G, G = diag(h + eps)^-1, h in units of its mean at the cells
            energy = (rate.square() / (cost.density(y) / usual + EPSILON)).sum(-1).mean()
        if not math.isfinite(float(energy.detach())):
            raise RuntimeError(
                f"metric path: expected a finite energy, found {float(energy.detach())} at step {step + 1} of "
                f"{n_steps}; take a learning_rate below {learning_rate:g}, and look for cells far from all others"
            )
        optimiser.zero_grad()
        energy.backward()
        optimiser.step()
        schedule.step()
    weights, biases = (tuple(p.detach() for p in parameters) for parameters in (path.weights, path.biases))
    return MetricPath(sigma, weights, biases, path.shift, path.scale, path.origin, path.gap)


def diagonal_metric(snapshots: Snapshots, units: Scaling, metric: Metric, rng: torch.Generator) -> Land | Rbf:
    """Return a metric of the kept cells, in standardised units; ``rng`` is for the centres of ``"rbf"``."""
    cells, mass = _reference(snapshots, units)
    if metric == "land":
        k = min(NEIGHBOUR, len(cells) - 1)
        near = torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values  # self: 0
        return Land(cells, mass, float(near.median()))
    centres, nearest = _k_means(cells, max(1, min(CENTRES, len(cells) // 10)), rng)
    squares = (cells - centres[nearest]).square().sum(1)
    n = torch.bincount(nearest, minlength=len(centres)).clamp(min=1)
    radius = torch.zeros_like(centres[:, 0]).index_add_(0, nearest, squares) / n
    radius = radius.clamp(min=float(squares.mean()) / 10)  # squared; a centre with a single cell has a reach too
    precision = 1 / (KAPPA**2 * radius)
    basis = torch.exp(-precision / 2 * _squared_distances(cells, centres))  # (n_cells, k)
    root = mass.sqrt()  # least squares for h(x_i) = 1, weighted by the cells' masses
    weights, _ = nnls((root[:, None] * basis).double().cpu().numpy(), root.double().cpu().numpy())
    return Rbf(centres, precision, torch.as_tensor(weights).to(cells))


def _reference(snapshots: Snapshots, units: Scaling) -> tuple[Tensor, Tensor]:
    """Return an evenly spaced subset of each snapshot: standardised cells ``(n, d)`` and weights ``(n,)``."""
    share = max(1, REFERENCE_CELLS // len(snapshots))
    cells, mass = [], []
    for x, m in zip(snapshots.points, snapshots.mass):
        rows = torch.linspace(0, len(x) - 1, min(len(x), share), device=x.device, dtype=torch.float64).round().long()
        cells.append((x[rows] - units.shift) / units.scale)
        mass.append(m[rows] / m[rows].sum() / len(snapshots))
    return torch.cat(cells), torch.cat(mass).to(cells[0])


def _k_means(cells: Tensor, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return centres ``(k, d)`` and each cell's nearest centre, ``(n,)``, by Lloyd's algorithm from random cells."""
    centres = cells[torch.randperm(len(cells), generator=rng, device=cells.device)[:k]]
    for _ in range(LLOYD):
        nearest = _squared_distances(cells, centres).argmin(1)
        n = torch.bincount(nearest, minlength=k)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, cells) / n.clamp(min=1)
        centres = torch.where(n > 0, means, centres)  # a centre without cells stays
    return centres, _squared_distances(cells, centres).argmin(1)


def _straight(snapshots: Snapshots, units: Scaling, width: int, rng: torch.Generator) -> MetricPath:
    """Return a path without spread along the chord: its last layer is zero, the others are random."""
    d, like = snapshots.dimension, snapshots.points[0]
    weights, biases = [], []
    for n, m in pairwise((2 * d + 2, width, width, d)):
        draws = torch.rand(n + 1, m, generator=rng, device=like.device, dtype=torch.float64)
        both = ((2 * draws - 1) / math.sqrt(n)).to(like.dtype)
        weights.append(both[:-1].clone())
        biases.append(both[-1].clone())
    weights[-1].zero_()
    biases[-1].zero_()
    return MetricPath(0.0, tuple(weights), tuple(biases), units.shift, units.scale, units.origin, units.gap)


def _batches(
    snapshots: Snapshots, couplings: Sequence[Coupling], n_steps: int, n_pairs: int, rng: torch.Generator
) -> Iterator[Pairs]:
    """Yield pairs for every step, divided evenly among the intervals."""
    intervals = snapshots.intervals()
    share, rest = divmod(n_pairs, len(intervals))
    t0, length, drawn = [], [], []
    for k, (interval, coupling) in enumerate(zip(intervals, couplings)):
        n = share + (k < rest)
        drawn.append(tuple(index.reshape(n_steps, n) for index in coupling.sample(n_steps * n, rng)))
        t0.append(interval.x0.new_full((n, 1), interval.t0))
        length.append(interval.x0.new_full((n, 1), interval.length))
    start, end = torch.cat(t0), torch.cat(t0) + torch.cat(length)
    for step in range(n_steps):
        x0 = torch.cat([interval.x0[i[step]] for interval, (i, _) in zip(intervals, drawn)])
        x1 = torch.cat([interval.x1[j[step]] for interval, (_, j) in zip(intervals, drawn)])
        yield Pairs(x0, x1, start, end)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return squared Euclidean distances, ``(n, m)``, of points that lie about the origin."""
    return (x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * x @ y.T).clamp(min=0)


def _check(
    snapshots: Snapshots,
    couplings: Sequence[Coupling],
    metric: str,
    n_steps: int,
    batch_size: int,
    width: int,
    learning_rate: float,
) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"expected a metric of {get_args(Metric)}, found {metric!r}")
    n = len(snapshots) - 1
    if n < 1:
        raise ValueError(f"expected at least two snapshots, found {len(snapshots)}; a path runs between them")
    if len(couplings) != n:
        raise ValueError(f"expected one coupling for each of {n} intervals, found {len(couplings)}")
    if n_steps < 1 or width < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(
            "expected n_steps and width of at least 1 and a finite learning_rate above 0, "
            f"found {n_steps}, {width} and {learning_rate}"
        )
    if batch_size < n:
        raise ValueError(f"expected a batch_size of at least one pair for each of {n} intervals, found {batch_size}")
