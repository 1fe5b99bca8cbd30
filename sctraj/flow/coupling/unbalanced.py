"""Unbalanced entropic transport, whose marginals hold only softly, for populations that grow.

Where moving mass is too costly it is destroyed and made instead, at a penalty (Liero, Mielke & Savare 2018; Chizat et
al. 2018).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..exponential import exp_
from ..snapshots import Interval
from .conditional import conditional_means
from .kernel import squared_distances, tiles
from .sinkhorn import SHARPEST, prepare, sinkhorn

logger = logging.getLogger(__name__)

NEWTON_EVERY = 5  # iterations per Newton step: a third fewer iterations than at 10, in the same time or less


@dataclass(frozen=True)
class UnbalancedPlan:
    """An unbalanced plan by its dual potentials: ``Q_ij = a_i b_j exp((f_i + g_j - |x0_i - x1_j|^2) / epsilon)``.

    Its marginals ``r = Q 1`` and ``c = Q^T 1`` are not those of the snapshots: the difference was cheaper to make and
    to destroy than to move. So it is not a coupling of them, but says how much of each cell takes part in one
    (`growing`).

    Attributes
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_mass0, log_mass1
        Logarithms of the snapshots' weights ``a`` ``(n0,)`` and ``b`` ``(n1,)``.
    f, g
        Potentials ``(n0,)`` and ``(n1,)``, float64, in units of cost.
    log_ratio0, log_ratio1
        ``log(r / a)`` ``(n0,)`` and ``log(c / b)`` ``(n1,)``: the plan's marginals relative to the snapshots'.
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
    epsilon: float
    penalty: float
    residual: float
    n_iterations: int

    def matrix(self) -> Tensor:
        """Return the whole plan ``Q``, ``(n0, n1)`` float64."""
        return torch.cat([exp_(self._log_rows(rows)) for rows in tiles(self.x0, self.x1)])

    def descendants(self, values: Tensor) -> Tensor:
        """Return for each source cell the mean value, of ``(n1, k)``, of the cells its mass goes to, ``(n0, k)``."""
        return conditional_means(self.x0, self.x1, self._weight1, self.epsilon, values)

    def ancestors(self, values: Tensor) -> Tensor:
        """Return for each target cell the mean value, of ``(n0, k)``, of the cells its mass comes from, ``(n1, k)``."""
        return conditional_means(self.x1, self.x0, self._weight0, self.epsilon, values)

    @property
    def _weight0(self) -> Tensor:
        """Source cells' log weights, apart from distances, among the ancestors of a target cell, ``(n0,)``."""
        return self.f / self.epsilon + self.log_mass0

    @property
    def _weight1(self) -> Tensor:
        """Target cells' log weights, apart from distances, among the descendants of a source cell, ``(n1,)``."""
        return self.g / self.epsilon + self.log_mass1

    def _log_rows(self, rows: Tensor) -> Tensor:
        """Return the logarithm of the plan's rows, ``(len(rows), n1)``."""
        exponent = (self.f[rows, None] + self.g[None, :] - squared_distances(self.x0[rows], self.x1)) / self.epsilon
        return exponent + self.log_mass0[rows, None] + self.log_mass1[None, :]


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
    the mass ``exp(-C / (epsilon + 2 penalty))`` moves, and the rest is destroyed and made; a large penalty gives the
    entropic coupling. Potentials are float64; a small epsilon is approached in steps from the cost's own scale. A plan
    too large for memory is computed in tiles, so memory grows as ``n0 + n1``; a tile is float32 if its rounding is at
    most a twentieth of the current error or of the tolerance.

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
        Where to compute; the cells' own device by default. ``mps`` has no float64, so the CPU is used instead, and this
        is logged.

    Raises
    ------
    ValueError
        If epsilon or penalty is not positive and finite, or epsilon is too small for the data's scale.
    RuntimeError
        If the potentials have not converged.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"expected a positive, finite epsilon, found {epsilon}; take about 0.02 of the exact cost")
    if not 0 < penalty < math.inf:
        raise ValueError(
            f"expected a positive, finite penalty, found {penalty}; the limit of infinity is the entropic coupling"
        )
    ends = prepare(interval, device)
    if epsilon < SHARPEST * ends.scale:
        raise ValueError(
            f"expected an epsilon of at least {SHARPEST * ends.scale:.3g} ({SHARPEST:g} of the mean squared distance), "
            f"found {epsilon:.3g}: rounding would rule; take a larger epsilon"
        )
    found = sinkhorn(
        ends,
        epsilon=epsilon,
        penalty=penalty,
        tolerance=tolerance,
        max_iterations=max_iterations,
        newton_every=NEWTON_EVERY,
    )
    if not found.error < tolerance:
        raise RuntimeError(
            f"unbalanced Sinkhorn: expected marginals optimal to within {tolerance:g}, found {found.error:.3g} after "
            f"{found.n_iterations} iterations at epsilon = {epsilon:.3g}, penalty = {penalty:.3g}; take a larger "
            "epsilon, more iterations or a larger tolerance"
        )
    logger.debug("unbalanced Sinkhorn: residual %.2g after %d iterations", found.error, found.n_iterations)
    f, g, best = found.f, found.g, found.best
    return UnbalancedPlan(
        ends.x0,
        ends.x1,
        ends.log_a,
        ends.log_b,
        f,
        g,
        log_ratio0=-f / penalty,
        log_ratio1=(g - best) / epsilon,
        epsilon=epsilon,
        penalty=penalty,
        residual=found.error,
        n_iterations=found.n_iterations,
    )
