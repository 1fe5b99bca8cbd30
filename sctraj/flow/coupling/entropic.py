"""The entropic coupling, the static Schroedinger bridge, by Sinkhorn's algorithm in the log domain (SB-CFM)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..snapshots import Interval
from .independent import draw
from .pairs import WeightedPairs, heaviest, rescaled

logger = logging.getLogger(__name__)

WHOLE = 2**24  # entries: a plan up to this size is kept (128 MiB in float64), a larger one is made anew row by row
ANNEALING = 10  # iterations at each epsilon on the way down
NEWTON_EVERY = 10  # Sinkhorn iterations to a Newton step
CONJUGATE_GRADIENTS = 50  # iterations at most within a Newton step
SWEEPS = 100  # rescalings of rows and columns at most to balance the pairs kept of a plan
SHARPEST = 1e-6  # epsilon below this fraction of the mean cost is refused: rounding would rule


@dataclass(frozen=True)
class EntropicPlan:
    """An entropic plan as its dual potentials: ``P_ij = a_i b_j exp((f_i + g_j - |x0_i - x1_j|^2) / epsilon)``.

    Attributes
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_mass0, log_mass1
        Logarithms of the marginals ``a`` ``(n0,)`` and ``b`` ``(n1,)``.
    f, g
        Potentials ``(n0,)`` and ``(n1,)``, float64, in units of cost. The rows' marginal is exact.
    epsilon
        Strength of the entropy, in units of cost.
    marginal_error
        L1 distance between the plan's column marginal and ``b``.
    n_iterations
        Sinkhorn iterations made at this epsilon.
    """

    x0: Tensor
    x1: Tensor
    log_mass0: Tensor
    log_mass1: Tensor
    f: Tensor
    g: Tensor
    epsilon: float
    marginal_error: float
    n_iterations: int
    cumulative: Tensor | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        cumulative = self.matrix().flatten().cumsum(0) if fits(self.x0, self.x1) else None
        object.__setattr__(self, "cumulative", cumulative)

    def matrix(self) -> Tensor:
        """Return the whole plan, ``(n0, n1)`` float64."""
        return torch.cat([self._log_rows(rows).exp() for rows in tiles(self.x0, self.x1)])

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs: indices at the start and at the end, each ``(n,)``."""
        if self.cumulative is not None:
            pairs = draw(self.cumulative, n, rng)
            return pairs // len(self.x1), pairs % len(self.x1)
        i = draw(self.log_mass0.exp().cumsum(0), n, rng)
        columns = []
        for rows in split(i, len(self.x1)):
            conditional = (self._log_rows(rows) - self.log_mass0[rows, None]).exp()  # (tile, n1)
            columns.append(torch.multinomial(conditional, 1, generator=rng).squeeze(1))
        return i, torch.cat(columns)

    def pairs(self, *, share: float = 0.99) -> WeightedPairs:
        """Return the pairs that carry a share of every row's and column's mass, balanced anew; ``mass0`` is ``mass1``.

        The rows' marginal is exact; the columns' comes to within the plan's own ``marginal_error``, or as near as
        ``SWEEPS`` rescalings bring it (to 3e-5 in L1 at the share of 0.99, of 550 and 1000 cells).
        """
        a, b = self.log_mass0.exp(), self.log_mass1.exp()
        cells = tiles(self.x0, self.x1), tiles(self.x1, self.x0)
        i, j, log_mass = heaviest(self._log_rows, self._log_columns, cells, share=share)
        mass = rescaled(log_mass.exp(), i, a)
        for _ in range(SWEEPS):
            if float((torch.zeros_like(b).index_add_(0, j, mass) - b).abs().sum()) <= self.marginal_error:
                break
            mass = rescaled(rescaled(mass, j, b), i, a)
        return WeightedPairs(i, j, mass, mass)

    def _log_rows(self, rows: Tensor) -> Tensor:
        """Return the logarithm of the plan's rows, ``(len(rows), n1)``."""
        exponent = (self.f[rows, None] + self.g[None, :] - squared_distances(self.x0[rows], self.x1)) / self.epsilon
        return exponent + self.log_mass0[rows, None] + self.log_mass1[None, :]

    def _log_columns(self, columns: Tensor) -> Tensor:
        """Return the logarithm of the plan's columns, ``(len(columns), n0)``."""
        cost = squared_distances(self.x1[columns], self.x0)
        exponent = (self.g[columns, None] + self.f[None, :] - cost) / self.epsilon
        return exponent + self.log_mass1[columns, None] + self.log_mass0[None, :]


def entropic(
    interval: Interval,
    *,
    epsilon: float,
    tolerance: float = 1e-3,
    max_iterations: int = 5000,
    device: torch.device | None = None,
) -> EntropicPlan:
    """Couple an interval's ends by entropic optimal transport for the cost ``|x0 - x1|^2``.

    With ``epsilon = 2 sigma^2 (t1 - t0)`` this is the static Schroedinger bridge of a Brownian motion of diffusivity
    ``sigma`` (Tong et al. 2023, proposition 3.5). Potentials are float64; epsilon is lowered by steps from the cost's
    own scale; cells are met in tiles, so memory grows as ``n0 + n1`` where the plan does not fit.

    Parameters
    ----------
    interval
        The two snapshots, ``(n0, d)`` and ``(n1, d)`` cells.
    epsilon
        Strength of the entropy, in units of cost (squared units of the cells).
    tolerance
        Largest L1 error of the plan's marginals that counts as converged; between 0 and 2.
    max_iterations
        Iterations at the final epsilon after which the solver gives up.
    device
        Where to compute; the cells' own by default. ``mps`` has no float64, so the CPU is used instead, and said.

    Raises
    ------
    ValueError
        If epsilon is not positive, or too small against the data's scale for Sinkhorn to converge.
    RuntimeError
        If the marginals have not converged.
    """
    if not epsilon > 0:
        raise ValueError(f"expected a positive epsilon, found {epsilon}; the limit of zero is the exact coupling")
    x0, x1, log_a, log_b, scale = prepare(interval, device)
    if epsilon < SHARPEST * scale:
        raise ValueError(
            f"expected an epsilon of at least {SHARPEST * scale:.3g} ({SHARPEST:g} of the mean squared distance), "
            f"found {epsilon:.3g}: Sinkhorn would not converge. Take a sigma at least "
            f"{1.1 * math.sqrt(SHARPEST * scale / epsilon):.2g} times larger, or the exact coupling (method='ot-cfm'), "
            "the limit of sigma = 0"
        )
    costs = Costs(x0, x1)
    g, iterations, error = torch.zeros_like(log_b), 0, math.inf
    for eps in annealing(scale, epsilon):
        for iterations in range(1, (max_iterations if eps == epsilon else ANNEALING) + 1):
            f = costs.soft_minimum(g, log_b, eps, rows=True)
            g_next = costs.soft_minimum(f, log_a, eps, rows=False)
            # the column marginal of (f, g) is b exp((g - g_next) / eps)
            error = float((log_b.exp() * torch.expm1((g - g_next) / eps).abs()).sum())
            if error < tolerance:
                break
            g = g_next if iterations % NEWTON_EVERY else _newton(costs, f, g, log_a, log_b, eps)
    if not error < tolerance:
        raise RuntimeError(
            f"Sinkhorn: expected marginals to within {tolerance:g}, found {error:.3g} after {iterations} iterations "
            f"at epsilon = {epsilon:.3g}; take a larger sigma, more iterations or a larger tolerance"
        )
    logger.debug("Sinkhorn: marginal error %.2g after %d iterations", error, iterations)
    return EntropicPlan(x0, x1, log_a, log_b, f, g, epsilon, error, iterations)


def prepare(interval: Interval, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return centred cells and log weights, float64 on the device, and the cost's scale (about its mean)."""
    device = device or interval.x0.device
    if device.type == "mps":
        logger.info("entropic coupling: mps has no float64, so Sinkhorn runs on the CPU")
        device = torch.device("cpu")
    x0, x1 = (x.to(device, torch.float64) for x in (interval.x0, interval.x1))
    log_a, log_b = (m.to(device).log() for m in (interval.mass0, interval.mass1))  # -inf where a cell has no mass
    centre = x0.mean(0)
    x0, x1 = x0 - centre, x1 - centre  # squares of small numbers: no cancellation far from the origin
    scale = float((log_a.exp() @ x0.square().sum(1)) + (log_b.exp() @ x1.square().sum(1)))
    return x0, x1, log_a, log_b, scale


def _newton(costs: Costs, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float) -> Tensor:
    """Take one Newton step on the semi-dual ``F(g) = <a, f(g)> + <b, g>``, which is concave; return the new ``g``.

    Sinkhorn alone exchanges mass between well separated groups of cells at a rate of ``exp(-gap / epsilon)``; these
    few slow modes are what conjugate gradients find first (Brauer et al. 2017, the Sinkhorn-Newton method).
    """
    a, b = log_a.exp(), log_b.exp()
    plan = costs.plan(f, g, log_a, log_b, epsilon)
    q = plan.columns(torch.ones_like(a)).clamp(min=1e-300)  # column marginal
    residual = b - q

    def hessian(v: Tensor) -> Tensor:  # (diag(q) - P^T diag(1/a) P) v, positive semi-definite
        return q * v - plan.columns(plan.rows(v) / a.clamp(min=1e-300))

    step = epsilon * conjugate_gradients(hessian, residual, q)

    value, slope = float(a @ f + b @ g), float(residual @ step)
    for halving in range(12):
        trial = g + step / 2**halving
        f_trial = costs.soft_minimum(trial, log_b, epsilon, rows=True)
        if float(a @ f_trial + b @ trial) >= value + 0.1 * slope / 2**halving:
            return costs.soft_minimum(f_trial, log_a, epsilon, rows=False)
    return costs.soft_minimum(f, log_a, epsilon, rows=False)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Solve ``matrix v = right`` for a positive semi-definite matrix, roughly, preconditioned by its diagonal."""
    v, r = torch.zeros_like(right), right.clone()
    z = r / diagonal
    direction, rz = z.clone(), r @ z
    smallest = 1e-4 * float(rz)
    for _ in range(CONJUGATE_GRADIENTS):
        image = matrix(direction)
        alpha = rz / (direction @ image).clamp(min=1e-300)
        v, r = v + alpha * direction, r - alpha * image
        z = r / diagonal
        rz, last = r @ z, rz
        if float(rz) <= smallest:
            break
        direction = z + rz / last * direction
    return v


def annealing(start: float, end: float) -> list[float]:
    """Return epsilons falling by factors of four from the cost's scale to the one asked for."""
    n = max(0, math.ceil(math.log(start / end, 4))) if start > end else 0
    return [end * 4**k for k in range(n, 0, -1)] + [end]


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared Euclidean distances, ``(n0, n1)``."""
    return (x0.square().sum(1)[:, None] + x1.square().sum(1)[None, :] - 2 * x0 @ x1.T).clamp_(min=0)


def fits(x0: Tensor, x1: Tensor) -> bool:
    """Say whether a matrix of all pairs may be kept."""
    return len(x0) * len(x1) <= WHOLE


def split(cells: Tensor, n: int) -> tuple[Tensor, ...]:
    """Split indices of cells such that a part against ``n`` others has at most ``WHOLE`` entries."""
    return cells.split(max(1, WHOLE // n))


def tiles(x0: Tensor, x1: Tensor) -> Iterator[Tensor]:
    """Yield row indices of ``x0`` such that a tile against all of ``x1`` has at most ``WHOLE`` entries."""
    return iter(split(torch.arange(len(x0), device=x0.device), len(x1)))


class Costs:
    """The cost matrix, kept where it fits and made anew in tiles where not."""

    def __init__(self, x0: Tensor, x1: Tensor) -> None:
        self.x0, self.x1 = x0, x1
        self.kept = squared_distances(x0, x1) if fits(x0, x1) else None

    def soft_minimum(self, potential: Tensor, log_mass: Tensor, epsilon: float, *, rows: bool) -> Tensor:
        """Return ``-epsilon log sum_j exp(log_mass_j + (potential_j - C_ij) / epsilon)`` for every row (or column)."""
        weight = log_mass + potential / epsilon
        if self.kept is not None:
            cost = self.kept if rows else self.kept.T
            return -epsilon * torch.logsumexp(weight[None, :] - cost / epsilon, 1)
        here, there = (self.x0, self.x1) if rows else (self.x1, self.x0)
        parts = [
            torch.logsumexp(weight[None, :] - squared_distances(here[tile], there) / epsilon, 1)
            for tile in tiles(here, there)
        ]
        return -epsilon * torch.cat(parts)

    def plan(self, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float) -> _Plan:
        """Return the plan of two potentials as a linear map."""

        def tile(rows: Tensor) -> Tensor:
            cost = squared_distances(self.x0[rows], self.x1) if self.kept is None else self.kept[rows]
            return ((f[rows, None] + g[None, :] - cost) / epsilon + log_a[rows, None] + log_b[None, :]).exp()

        return _Plan(tile, list(tiles(self.x0, self.x1)))


class _Plan:
    """A plan ``P`` ``(n0, n1)`` as a linear map; tiles are made anew each time unless there is only one."""

    def __init__(self, make: Callable[[Tensor], Tensor], tiles: list[Tensor]) -> None:
        self.tiles = tiles
        whole = make(tiles[0]) if len(tiles) == 1 else None
        self.make = make if whole is None else lambda rows: whole

    def rows(self, v: Tensor) -> Tensor:
        """Return ``P v``, ``(n0,)``."""
        return torch.cat([self.make(rows) @ v for rows in self.tiles])

    def columns(self, u: Tensor) -> Tensor:
        """Return ``P^T u``, ``(n1,)``."""
        return torch.stack([u[rows] @ self.make(rows) for rows in self.tiles]).sum(0)
