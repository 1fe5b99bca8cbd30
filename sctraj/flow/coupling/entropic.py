"""The entropic coupling, which is the static Schroedinger bridge (SB-CFM of Tong et al. 2023).

Entropy spreads each cell's mass over many partners, as if cells moved by Brownian motion.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..exponential import exp_
from ..snapshots import Interval
from .conditional import partners
from .independent import draw
from .kernel import fits, squared_distances, tiles
from .sinkhorn import SHARPEST, prepare, sinkhorn

logger = logging.getLogger(__name__)

NEWTON_EVERY = 10  # Sinkhorn iterations per Newton step


@dataclass(frozen=True)
class EntropicPlan:
    """An entropic plan by its dual potentials: ``P_ij = a_i b_j exp((f_i + g_j - |x0_i - x1_j|^2) / epsilon)``.

    Attributes
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_mass0, log_mass1
        Logarithms of the marginals ``a`` ``(n0,)`` and ``b`` ``(n1,)``.
    f, g
        Potentials ``(n0,)`` and ``(n1,)``, float64, in units of cost. The row marginal is exact, up to rounding.
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

    @cached_property
    def cumulative(self) -> Tensor | None:
        """The cumulative sum of the plan's masses, row by row, ``(n0 n1,)``; None if it does not fit into memory."""
        return self.matrix().flatten().cumsum(0) if fits(self.x0, self.x1) else None

    def matrix(self) -> Tensor:
        """Return the whole plan, ``(n0, n1)`` float64."""
        return torch.cat([exp_(self._log_rows(rows)) for rows in tiles(self.x0, self.x1)])

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs: indices at the start and at the end, each ``(n,)``."""
        if self.cumulative is not None:
            pairs = draw(self.cumulative, n, rng)
            return pairs // len(self.x1), pairs % len(self.x1)
        i = draw(self.log_mass0.exp().cumsum(0), n, rng)
        return i, partners(self.x0[i], self.x1, self.g / self.epsilon + self.log_mass1, self.epsilon, rng)

    def _log_rows(self, rows: Tensor) -> Tensor:
        """Return the logarithm of the plan's rows, ``(len(rows), n1)``."""
        exponent = (self.f[rows, None] + self.g[None, :] - squared_distances(self.x0[rows], self.x1)) / self.epsilon
        return exponent + self.log_mass0[rows, None] + self.log_mass1[None, :]


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
    ``sigma`` (Tong et al. 2023, proposition 3.5). Potentials are float64; epsilon is lowered in steps from the cost's
    own scale. A plan too large for memory is computed in tiles, so memory grows as ``n0 + n1``; a tile is float32 if
    its rounding is at most a twentieth of the current error or of the tolerance.

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
        Where to compute; the cells' own device by default. ``mps`` has no float64, so the CPU is used instead, and this
        is logged.

    Raises
    ------
    ValueError
        If epsilon is not positive, or is too small for the data's scale for Sinkhorn to converge.
    RuntimeError
        If the marginals have not converged.
    """
    if not epsilon > 0:
        raise ValueError(f"expected a positive epsilon, found {epsilon}; the limit of zero is the exact coupling")
    ends = prepare(interval, device)
    if epsilon < SHARPEST * ends.scale:
        raise ValueError(
            f"expected an epsilon of at least {SHARPEST * ends.scale:.3g} ({SHARPEST:g} of the mean squared distance), "
            f"found {epsilon:.3g}: Sinkhorn would not converge. Take a sigma at least "
            f"{1.1 * math.sqrt(SHARPEST * ends.scale / epsilon):.2g} times larger, or the exact coupling "
            "(method='ot-cfm'), the limit of sigma = 0"
        )
    if not fits(ends.x0, ends.x1):
        what = interval.t0, interval.t1, len(ends.x0), len(ends.x1)
        logger.info("coupling from %g to %g: of the plan's %d x %d pairs only dual potentials are kept", *what)
    found = sinkhorn(
        ends,
        epsilon=epsilon,
        penalty=math.inf,
        tolerance=tolerance,
        max_iterations=max_iterations,
        newton_every=NEWTON_EVERY,
    )
    if not found.error < tolerance:
        raise RuntimeError(
            f"Sinkhorn: expected marginals to within {tolerance:g}, found {found.error:.3g} after "
            f"{found.n_iterations} iterations at epsilon = {epsilon:.3g}; take a larger sigma, more iterations or a "
            "larger tolerance"
        )
    logger.debug("Sinkhorn: marginal error %.2g after %d iterations", found.error, found.n_iterations)
    x0, x1, log_a, log_b = ends.x0, ends.x1, ends.log_a, ends.log_b
    return EntropicPlan(x0, x1, log_a, log_b, found.f, found.g, epsilon, found.error, found.n_iterations)
