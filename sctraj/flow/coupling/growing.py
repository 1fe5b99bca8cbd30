"""The coupling of a population whose parts grow unlike each other (UOT-CFM)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..snapshots import Interval
from .blocked import BLOCK, blocks
from .exact import exact
from .independent import draw
from .pairs import WeightedPairs, rescaled
from .unbalanced import SHARPEST, unbalanced

# in units of the exact plan's cost, so that neither units nor numbers of cells matter
EPSILON = 0.05  # entropy of the plans that growth and kin are read from: each cell has some ten partners
# on marginals that differ from the snapshots', where growth is read: softer, and more of a shift is read as growth
PENALTY = 2.0
KIN_PENALTY = 4.0  # where kin are: a soft plan sends mass only to near cells, and so makes every move look short
LEAST = 1e-6  # of a cell's mass takes part whatever it costs: the network simplex loses masses at its rounding


@dataclass(frozen=True)
class GrowingPlan:
    """Pairs with a mass at each end, and every cell's mean ancestors and descendants.

    Attributes
    ----------
    pairs
        Of the plan; at most ``n0 + n1 - 1`` a block.
    descendants
        Mean of the cells that a source cell's mass goes to, ``(n0, d)`` float64.
    ancestors
        Mean of the cells that a target cell's mass comes from, ``(n1, d)`` float64.
    """

    pairs: WeightedPairs
    descendants: Tensor
    ancestors: Tensor

    def choose(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw ``n`` pairs by their mass at mid-interval, as indices ``(n,)`` into ``pairs``."""
        return draw(self.pairs.middle.cumsum(0), n, rng)

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs by their mass at mid-interval: indices at the start and at the end, each ``(n,)``."""
        chosen = self.choose(n, rng)
        return self.pairs.i[chosen], self.pairs.j[chosen]


def growing(
    interval: Interval,
    rng: torch.Generator,
    *,
    epsilon: float = EPSILON,
    penalty: float = PENALTY,
    kin_penalty: float = KIN_PENALTY,
    block: int = BLOCK,
) -> GrowingPlan:
    """Couple an interval's ends where parts of the population grow or shrink relative to each other.

    Entropic unbalanced transport says how much of each cell's mass takes part: its marginals ``r`` and ``c``. The exact
    plan ``P`` between these pairs the cells, and both ends are weighted back: a pair has the mass
    ``P_ij a_i / r_i`` at the start and ``P_ij b_j / c_j`` at the end, so that the population starts and ends as the
    snapshots are. A prior of growth (``interval.growth0``) makes ``a exp(growth length)`` the marginal that the plan
    is held to, as in Schiebinger et al. 2019. Snapshots of more than ``block`` cells are met in random blocks.

    Parameters
    ----------
    interval
        The two snapshots.
    rng
        Of the blocks.
    epsilon, penalty
        Of the unbalanced plan, in units of the exact plan's cost.
    kin_penalty
        Penalty of the stiffer plan that mean ancestors and descendants are taken from, in the same units.
    block
        Cells a side.
    """
    i, j, mass0, mass1 = [], [], [], []
    kin = [torch.zeros(x.shape, dtype=torch.float64) for x in (interval.x0, interval.x1)]
    weight = [torch.zeros(len(x), dtype=torch.float64) for x in (interval.x0, interval.x1)]
    for rows, columns, part, share in blocks(interval, rng, block=block):
        a, b = part.mass0, part.mass1
        held = part
        if part.growth0 is not None:
            exponent = part.growth0 * part.length
            grown = a * (exponent - exponent.max()).exp()
            held = replace(part, mass0=grown * (a.sum() / grown.sum()), growth0=None)  # equal rates change no bit
        # of a snapshot and its copy the cost is zero: what rounding allows
        cost = max(exact(held).cost, 2 * SHARPEST / epsilon * _spread(held)) or 1.0  # all in one place: any will do
        plan = unbalanced(held, epsilon=epsilon * cost, penalty=penalty * cost)
        r, c = held.mass0 * plan.log_ratio0.exp(), held.mass1 * plan.log_ratio1.exp()
        r, c = torch.maximum(r / r.sum(), LEAST * a), torch.maximum(c / c.sum(), LEAST * b)
        r, c = r / r.sum(), c / c.sum()
        best = exact(replace(held, mass0=r, mass1=c))
        i.append(rows[best.i])
        j.append(columns[best.j])
        mass0.append(rescaled(best.mass, best.i, a) * share)
        mass1.append(rescaled(best.mass, best.j, b) * share)
        # a cell that two blocks share has kin in both
        stiff = unbalanced(held, epsilon=epsilon * cost, penalty=kin_penalty * cost)
        means = stiff.descendants(part.x1.double()), stiff.ancestors(part.x0.double())
        for side, (index, mean, m) in enumerate(zip((rows, columns), means, (a, b))):
            kin[side].index_add_(0, index, m[:, None] * mean)
            weight[side].index_add_(0, index, m)
    descendants, ancestors = (
        torch.where(w[:, None] > 0, total / w[:, None], x.double())
        for total, w, x in zip(kin, weight, (interval.x0, interval.x1))
    )
    pairs = WeightedPairs(torch.cat(i), torch.cat(j), torch.cat(mass0), torch.cat(mass1))
    return GrowingPlan(pairs, descendants, ancestors)


def _spread(interval: Interval) -> float:
    """Return the cost's scale as `unbalanced` measures it (twice the mean square about a mean); zero for one place."""
    x0, x1 = interval.x0.double(), interval.x1.double()
    centre = x0.mean(0)
    squares = (m @ (x - centre).square().sum(1) for x, m in ((x0, interval.mass0), (x1, interval.mass1)))
    return float(sum(squares))
