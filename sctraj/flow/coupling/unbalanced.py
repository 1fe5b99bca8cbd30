"""The unbalanced coupling: entropic transport between marginals that hold only softly, for populations that grow."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..snapshots import Interval
from .entropic import (
    ANNEALING,
    SHARPEST,
    Costs,
    annealing,
    conjugate_gradients,
    fits,
    prepare,
    split,
    squared_distances,
    tiles,
)
from .independent import draw
from .pairs import WeightedPairs, heaviest, rescaled

logger = logging.getLogger(__name__)

NEWTON_EVERY = 5  # iterations to a Newton step: a third fewer iterations than at 10, at the same time or less


@dataclass(frozen=True)
class UnbalancedPlan:
    """An unbalanced plan as its dual potentials: ``Q_ij = a_i b_j exp((f_i + g_j - |x0_i - x1_j|^2) / epsilon)``.

    Its marginals ``r = Q 1`` and ``c = Q^T 1`` are not those of the snapshots: what lacks was cheaper to make and to
    destroy than to move. Weighted anew at both ends, ``m0 = diag(a / r) Q`` (where a source cell's mass goes) and
    ``m1 = Q diag(b / c)`` (where a target cell's mass comes from), its pairs carry one population to the other: at
    the fraction ``s`` of the interval a pair has the mass ``(1 - s) m0 + s m1``.

    Attributes
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_mass0, log_mass1
        Logarithms of the snapshots' weights ``a`` ``(n0,)`` and ``b`` ``(n1,)``.
    f, g
        Potentials ``(n0,)`` and ``(n1,)``, float64, in units of cost.
    log_ratio0, log_ratio1
        ``log(r / a)`` ``(n0,)`` and ``log(c / b)`` ``(n1,)``: the plan's marginals against the snapshots'.
    log_growth0
        ``log(sum_j m1_ij / a_i)`` ``(n0,)``: by how much a source cell's descendants outweigh it, over the interval
        and relative to the population's total; known for cells without mass too.
    log_growth1
        ``log(b_j / sum_i m0_ij)`` ``(n1,)``: by how much a target cell outweighs its ancestors.
    epsilon, penalty
        Strengths of the entropy and of the marginals, in units of cost.
    residual
        L1 distance of ``c`` from ``b exp(-g / penalty)``, relative to the plan's mass; zero at the optimum.
    n_iterations
        Sinkhorn iterations made at this epsilon.
    """

    x0: Tensor
    x1: Tensor
    log_mass0: Tensor
    log_mass1: Tensor
    f: Tensor
    g: Tensor
    log_ratio0: Tensor
    log_ratio1: Tensor
    log_growth0: Tensor
    log_growth1: Tensor
    epsilon: float
    penalty: float
    residual: float
    n_iterations: int
    cumulative: Tensor | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole = fits(self.x0, self.x1)
        middle = [self._middle(rows) for rows in tiles(self.x0, self.x1)] if whole else []
        object.__setattr__(self, "cumulative", torch.cat(middle).flatten().cumsum(0) if whole else None)

    def matrix(self) -> Tensor:
        """Return the whole plan ``Q``, ``(n0, n1)`` float64."""
        return torch.cat([self._log_rows(rows).exp() for rows in tiles(self.x0, self.x1)])

    def pairs(self, *, share: float = 0.99) -> WeightedPairs:
        """Return the pairs that carry a share of every row's ``m0`` and of every column's ``m1``.

        What is left out is made up by the pairs of the same row (``m0``) or column (``m1``), so that both marginals
        are the snapshots' to rounding; it changes a pair's ``log(m1 / m0)`` by at most ``-log(share)``.

        Parameters
        ----------
        share
            Fraction of the mass of each row and column; above 0, at most 1, which leaves out rounding alone.

        Raises
        ------
        ValueError
            If the share is not in that range.
        """
        cells = tiles(self.x0, self.x1), tiles(self.x1, self.x0)
        i, j, log_mass = heaviest(self._log_rows, self._log_columns, cells, share=share)
        mass0 = rescaled((log_mass - self.log_ratio0[i]).exp(), i, self.log_mass0.exp())
        mass1 = rescaled((log_mass - self.log_ratio1[j]).exp(), j, self.log_mass1.exp())
        return WeightedPairs(i, j, mass0, mass1)

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs by their mass at mid-interval, ``(m0 + m1) / 2``: indices at both ends, each ``(n,)``."""
        if self.cumulative is not None:
            pairs = draw(self.cumulative, n, rng)
            return pairs // len(self.x1), pairs % len(self.x1)
        device = self.x0.device
        # half of the mass is m0, a source cell and where it goes; half m1, a target cell and where it comes from
        forwards = torch.rand(n, generator=rng, device=device) < 0.5
        i, j = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
        i[forwards] = draw(self.log_mass0.exp().cumsum(0), int(forwards.sum()), rng)
        j[forwards] = _partners(self._log_rows, i[forwards], len(self.x1), rng)
        j[~forwards] = draw(self.log_mass1.exp().cumsum(0), int((~forwards).sum()), rng)
        i[~forwards] = _partners(self._log_columns, j[~forwards], len(self.x0), rng)
        return i, j

    def descendants(self, values: Tensor) -> Tensor:
        """Return the mean of target cells' values ``(n1, k)`` over where each source cell's mass goes, ``(n0, k)``."""
        parts = []
        for rows in tiles(self.x0, self.x1):
            cost = squared_distances(self.x0[rows], self.x1)
            parts.append(torch.softmax((self.g[None, :] - cost) / self.epsilon + self.log_mass1, 1) @ values)
        return torch.cat(parts)

    def ancestors(self, values: Tensor) -> Tensor:
        """Return the mean of source cells' values ``(n0, k)`` over where target cells' mass comes from, ``(n1, k)``."""
        parts = []
        for columns in tiles(self.x1, self.x0):
            cost = squared_distances(self.x1[columns], self.x0)
            parts.append(torch.softmax((self.f[None, :] - cost) / self.epsilon + self.log_mass0, 1) @ values)
        return torch.cat(parts)

    def _middle(self, rows: Tensor) -> Tensor:
        """Return the rows' masses at mid-interval, ``(len(rows), n1)``."""
        log_mass = self._log_rows(rows)
        return ((log_mass - self.log_ratio0[rows, None]).exp() + (log_mass - self.log_ratio1[None, :]).exp()) / 2

    def _log_rows(self, rows: Tensor) -> Tensor:
        """Return the logarithm of the plan's rows, ``(len(rows), n1)``."""
        exponent = (self.f[rows, None] + self.g[None, :] - squared_distances(self.x0[rows], self.x1)) / self.epsilon
        return exponent + self.log_mass0[rows, None] + self.log_mass1[None, :]

    def _log_columns(self, columns: Tensor) -> Tensor:
        """Return the logarithm of the plan's columns, ``(len(columns), n0)``."""
        cost = squared_distances(self.x1[columns], self.x0)
        exponent = (self.g[columns, None] + self.f[None, :] - cost) / self.epsilon
        return exponent + self.log_mass1[columns, None] + self.log_mass0[None, :]


def unbalanced(
    interval: Interval,
    *,
    epsilon: float,
    penalty: float,
    tolerance: float = 1e-6,
    max_iterations: int = 2000,
    device: torch.device | None = None,
) -> UnbalancedPlan:
    """Couple an interval's ends by entropic unbalanced transport for the cost ``C_ij = |x0_i - x1_j|^2``.

    Minimises ``<C, P> + epsilon KL(P | a x b) + penalty (KL(P 1 | a) + KL(P^T 1 | b))`` over positive measures (Liero,
    Mielke & Savare 2018; Chizat et al. 2018), where ``KL(p | q) = sum p log(p / q) - p + q``. Between two single cells
    the mass ``exp(-C / (epsilon + 2 penalty))`` moves, the rest is destroyed and made; a large penalty gives the
    entropic coupling. Potentials are float64; epsilon is lowered by steps from the cost's own scale; cells are met in
    tiles, so memory grows as ``n0 + n1`` where the plan does not fit.

    Parameters
    ----------
    interval
        The two snapshots, ``(n0, d)`` and ``(n1, d)`` cells.
    epsilon
        Strength of the entropy, in units of cost (squared units of the cells).
    penalty
        Strength of the marginals, in units of cost.
    tolerance
        Largest ``residual`` of the plan that counts as converged.
    max_iterations
        Iterations at the final epsilon after which the solver gives up.
    device
        Where to compute; the cells' own by default. ``mps`` has no float64, so the CPU is used instead, and said.

    Raises
    ------
    ValueError
        If epsilon or penalty is not positive and finite, or epsilon too small against the data's scale.
    RuntimeError
        If the potentials have not converged.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"expected a positive, finite epsilon, found {epsilon}; take about 0.02 of the exact cost")
    if not 0 < penalty < math.inf:
        raise ValueError(
            f"expected a positive, finite penalty, found {penalty}; the limit of infinity is the entropic coupling"
        )
    x0, x1, log_a, log_b, scale = prepare(interval, device)
    if epsilon < SHARPEST * scale:
        raise ValueError(
            f"expected an epsilon of at least {SHARPEST * scale:.3g} ({SHARPEST:g} of the mean squared distance), "
            f"found {epsilon:.3g}: rounding would rule; take a larger epsilon"
        )
    costs = Costs(x0, x1)
    g, iterations, residual = torch.zeros_like(log_b), 0, math.inf
    for eps in annealing(scale, epsilon):
        softness = penalty / (penalty + eps)  # one where the marginals are hard
        for iterations in range(1, (max_iterations if eps == epsilon else ANNEALING) + 1):
            # Chizat et al. 2018, scaling algorithms: the rows' marginal is now a exp(-f / penalty)
            f = softness * costs.soft_minimum(g, log_b, eps, rows=True)
            s = costs.soft_minimum(f, log_a, eps, rows=False)  # the columns' is b exp((g - s) / eps)
            weight = torch.softmax(log_b - g / penalty, 0)
            residual = float(weight @ torch.expm1((g - s) / eps + g / penalty).abs())
            if residual < tolerance:
                break
            if iterations % NEWTON_EVERY:
                g = softness * s
                # the best of all (f + shift, g - shift), which share one plan (Sejourne et al. 2022)
                log_masses = [torch.logsumexp(log_m - h / penalty, 0) for log_m, h in ((log_a, f), (log_b, g))]
                g = g - penalty / 2 * (log_masses[0] - log_masses[1])
            else:
                g = _newton(costs, f, g, log_a, log_b, eps, penalty)
    if not residual < tolerance:
        raise RuntimeError(
            f"unbalanced Sinkhorn: expected marginals optimal to within {tolerance:g}, found {residual:.3g} after "
            f"{iterations} iterations at epsilon = {epsilon:.3g}, penalty = {penalty:.3g}; take a larger epsilon, "
            "more iterations or a larger tolerance"
        )
    logger.debug("unbalanced Sinkhorn: residual %.2g after %d iterations", residual, iterations)
    # m0 has the potentials (f / softness, g) and m1 (f, s): their other marginals are one soft minimum away
    growth0 = (f - costs.soft_minimum(s, log_b, epsilon, rows=True)) / epsilon
    growth1 = (costs.soft_minimum(f / softness, log_a, epsilon, rows=False) - g) / epsilon
    ratios = -f / penalty, (g - s) / epsilon
    return UnbalancedPlan(x0, x1, log_a, log_b, f, g, *ratios, growth0, growth1, epsilon, penalty, residual, iterations)


def _newton(costs: Costs, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float, penalty: float) -> Tensor:
    """Take one Newton step on the semi-dual, which is concave; return the new ``g``.

    Up to a constant it is ``F(g) = -(penalty + epsilon) <a, e^(-f(g) / penalty)> - penalty <b, e^(-g / penalty)>``.
    Sinkhorn alone approaches the masses of well separated groups of cells by a factor of ``1 - 2 epsilon / penalty``
    an iteration, and the best shift speeds only what all groups share (Brauer et al. 2017 for the balanced problem).
    """
    softness = penalty / (penalty + epsilon)
    r, target = (log_a - f / penalty).exp(), (log_b - g / penalty).exp()  # marginals, the columns' as it should be
    plan = costs.plan(f, g, log_a, log_b, epsilon)
    c = plan.columns(torch.ones_like(r))
    gradient = target - c
    diagonal = (c + epsilon / penalty * target).clamp(min=1e-300)

    def hessian(v: Tensor) -> Tensor:  # -epsilon F'', positive definite
        return diagonal * v - softness * plan.columns(plan.rows(v) / r.clamp(min=1e-300))

    step = epsilon * conjugate_gradients(hessian, gradient, diagonal)
    slope = float(gradient @ step)
    for halving in range(12):
        change = step / 2**halving
        f_trial = softness * costs.soft_minimum(g + change, log_b, epsilon, rows=True)
        # F's difference, not F's values: those cancel where the penalty is large
        loss0 = (penalty + epsilon) * float(r @ torch.expm1((f - f_trial) / penalty))
        loss1 = penalty * float(target @ torch.expm1(-change / penalty))
        if -(loss0 + loss1) >= 0.1 * slope / 2**halving:
            return softness * costs.soft_minimum(f_trial, log_a, epsilon, rows=False)
    return softness * costs.soft_minimum(f, log_a, epsilon, rows=False)


def _partners(log_plan: Callable[[Tensor], Tensor], cells: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw for each cell ``(m,)`` one of its ``n`` partners by the plan's masses, in tiles; returns ``(m,)`` int64."""
    drawn = [
        torch.multinomial(torch.softmax(log_plan(part), 1), 1, generator=rng).squeeze(1) for part in split(cells, n)
    ]
    return torch.cat(drawn)
