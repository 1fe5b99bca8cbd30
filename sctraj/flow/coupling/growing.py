"""The coupling of a population whose parts grow unlike each other (UOT-CFM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median_low

import torch
from torch import Tensor

from ..snapshots import Interval
from ..threads import at_once
from .blocked import blocks, cells_a_side
from .exact import exact
from .independent import draw
from .pairs import WeightedPairs, rescaled
from .phase_space import in_phase_space
from .sinkhorn import SHARPEST
from .unbalanced import UnbalancedPlan, unbalanced

# of the plan that growth and kin are read from, in units of the exact plan's cost: each cell has some ten partners
EPSILON = 0.05
# on marginals that differ from the snapshots': the exact plan's cost and so many times a snapshot's total variance. The
# variance is the course's own, whatever the time between snapshots (the squared length of the dynamic problem, Chizat
# et al. 2018). By the cost alone more of each move is read as growth the nearer snapshots are; by the variance alone,
# the farther they are
PENALTY = 8.0
LEAST = 1e-6  # of a cell's mass takes part whatever it costs: the network simplex loses masses at its rounding
UNIT_BLOCKS = 3  # that the unit is taken from, and of small ones as many as come to a usual one
WHOLE = 1500  # cells a side that are met whole
BLOCK = 1000  # of larger snapshots: those of 1,500, or whole snapshots, take longer and restore nothing better


@dataclass(frozen=True)
class Block:
    """Cells of both snapshots that are coupled with each other alone, and how much of each takes part.

    Attributes
    ----------
    i, j
        Indices of the cells at the start ``(m0,)`` and at the end ``(m1,)``.
    part
        The cells, with masses that sum to one.
    share
        Of all mass.
    marginal0, marginal1
        What takes part of them, each summing to one: the marginals of the pairs' exact plan.
    """

    i: Tensor
    j: Tensor
    part: Interval
    share: float
    marginal0: Tensor
    marginal1: Tensor


@dataclass(frozen=True)
class GrowingPlan:
    """Pairs with a mass at each end, and every cell's mean ancestors and descendants.

    Attributes
    ----------
    pairs
        Of the plan; at most ``n0 + n1 - 1`` a block.
    descendants
        Mean of the cells that a source cell's mass goes to, ``(n0, d)`` float64; of one that no block has, as it has no
        mass, the cell itself.
    ancestors
        Mean of the cells that a target cell's mass comes from, ``(n1, d)``, likewise.
    blocks
        Who was coupled with whom, one of all cells where the snapshots are not in blocks.
    unit
        Of entropy, and the cost in the penalty, where cells are paired by velocity, once they are.
    """

    pairs: WeightedPairs
    descendants: Tensor
    ancestors: Tensor
    blocks: tuple[Block, ...] = ()
    unit: float | None = None

    def choose(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw ``n`` pairs by their mass at mid-interval, as indices ``(n,)`` into ``pairs``."""
        return draw(self.pairs.middle.cumsum(0), n, rng)

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs by their mass at mid-interval: indices at the start and at the end, each ``(n,)``."""
        chosen = self.choose(n, rng)
        return self.pairs.i[chosen], self.pairs.j[chosen]

    @cached_property
    def pairs_alone(self) -> GrowingPlan:
        """The plan without kin and blocks, which of large snapshots are most of it."""
        return GrowingPlan(self.pairs, self.descendants[:0], self.ancestors[:0])


def growing(
    interval: Interval,
    rng: torch.Generator,
    *,
    epsilon: float = EPSILON,
    penalty: float = PENALTY,
    block: int | None = None,
    exact_cost: float | None = None,
) -> GrowingPlan:
    """Couple an interval's ends where parts of the population grow or shrink relative to each other.

    Entropic unbalanced transport says how much of each cell's mass takes part, its marginals ``r`` and ``c``, and which
    cells are whose kin. The exact plan ``P`` between these pairs the cells, and both ends are weighted back: a pair has
    the mass ``P_ij a_i / r_i`` at the start and ``P_ij b_j / c_j`` at the end, so that the population starts and ends
    as the snapshots are. A prior of growth (``interval.growth0``) makes ``a exp(growth length)`` the marginal that the
    plan is held to, as in Schiebinger et al. 2019. Snapshots of more than ``block`` cells are met in random blocks.

    Parameters
    ----------
    interval
        The two snapshots.
    rng
        Of the blocks.
    epsilon
        Entropy of the unbalanced plan, in units of the exact plan's cost (where there are blocks, the median of a few).
    penalty
        On its marginals: the exact plan's cost and so many times the mean of both snapshots' total variances.
    block
        Cells a side; by default snapshots of up to 1,500 cells are met whole, larger ones in blocks of at
        most 1,000.
    exact_cost
        Of the exact plan, where it is known; it serves where snapshots are met whole and without a prior of growth.
    """
    if block is None:
        block = WHOLE if cells_a_side(interval) <= WHOLE else BLOCK
    cut = list(blocks(interval, rng, block=block))
    held = [_held(part) for _, _, part, _ in cut]
    unit = _unit(held, epsilon, exact_cost if held[0] is interval else None)
    solve = partial(_met, epsilon=epsilon * unit, penalty=_strength(interval, penalty, unit))
    found = at_once(solve, [(own, part) for own, (_, _, part, _) in zip(held, cut)])
    coupled = tuple(Block(*one, *both) for one, (both, _) in zip(cut, found))
    kin = _of_all(interval, coupled, [own for _, own in found])
    return GrowingPlan(_pairs(coupled, held), *kin, coupled)


def paired_by_velocity(
    plan: GrowingPlan,
    interval: Interval,
    velocity0: Tensor | None,
    velocity1: Tensor | None,
    *,
    time: float | None = None,
    kin_alone: bool = False,
    epsilon: float = EPSILON,
    penalty: float = PENALTY,
) -> GrowingPlan:
    """Couple the same cells anew by where they go as well as by where they are: the cost is `in_phase_space`.

    What takes part of each cell stays, so that growth is read from places alone, and so does who is met. Of a plan that
    was paired by other velocities the unit of cost stays too.

    Parameters
    ----------
    plan
        Of the interval, from `growing` or this.
    interval
        The two snapshots.
    velocity0, velocity1
        The cells', ``(n0, d)`` and ``(n1, d)`` per unit of time; None where they are not known.
    time
        Over which speeding up costs what moving does; the interval's length by default.
    kin_alone
        Whether mean ancestors and descendants are all that is asked for; the pairs are then as they were.
    epsilon
        Of the plan that mean ancestors and descendants are taken from, in units of the exact plan's cost in the first
        phase space.
    penalty
        On its marginals, as in `growing`, of variances and cost in phase space.

    Raises
    ------
    ValueError
        If the plan is one of pairs alone.
    """
    if not plan.blocks:
        raise ValueError("expected a plan as `growing` makes it, found one of pairs alone; couple the interval first")
    space = in_phase_space(interval, velocity0, velocity1, time=time)
    held = [_within(space, one) for one in plan.blocks]
    unit = _unit(held, epsilon, plan.unit)
    solve = partial(_kin, epsilon=epsilon * unit, penalty=_strength(space, penalty, unit))
    kin = _of_all(interval, plan.blocks, at_once(solve, [(b.part, own) for b, own in zip(plan.blocks, held)]))
    pairs = plan.pairs if kin_alone else _pairs(plan.blocks, held)
    return GrowingPlan(pairs, *kin, plan.blocks, unit)


def _unit(held: Sequence[Interval], epsilon: float, known: float | None) -> float:
    """Return the unit of entropy, and the cost in the penalty: of the exact plan, of blocks the median of a few.

    A few do, since blocks are of one law, and by the (lower) median a cell far away in one of them changes nothing;
    where most of them are copies, the largest. Of a snapshot and its copy the cost is zero: then what rounding allows.
    A cost that is known serves instead, if rounding allows it.
    """
    largest = max(len(held[0].x0), len(held[0].x1))
    few = held[: max(UNIT_BLOCKS, BLOCK // largest)]
    costs = [known] if known is not None else at_once(_cost, [(part,) for part in few])
    least = 2 * SHARPEST / epsilon * max(map(_spread, held))
    return max(median_low(costs) or max(costs), least) or 1.0  # all in one place: any will do


def _cost(part: Interval) -> float:
    return exact(part).cost


def _held(part: Interval) -> Interval:
    """Return a block with the marginals that its plans are held to: where there is a prior of growth, grown by it."""
    if part.growth0 is None:
        return part
    exponent = part.growth0 * part.length
    grown = part.mass0 * (exponent - exponent.max()).exp()
    return replace(part, mass0=grown * (part.mass0.sum() / grown.sum()), growth0=None)  # equal rates change no bit


def _strength(interval: Interval, penalty: float, cost: float) -> float:
    """Return the penalty on marginals in units of cost: that of the exact plan and so many times the ends' variance."""
    ends = ((x.double(), m.double()) for x, m in ((interval.x0, interval.mass0), (interval.x1, interval.mass1)))
    variance = sum(float(m @ (x - m @ x).square().sum(1)) for x, m in ends) / 2
    return cost + penalty * variance


Marginals = tuple[Tensor, Tensor]
Kin = tuple[Tensor, Tensor]


def _met(held: Interval, part: Interval, *, epsilon: float, penalty: float) -> tuple[Marginals, Kin]:
    """Return how much of each cell of a block takes part, ``(m0,)`` and ``(m1,)``, each summing to one; and its kin."""
    plan = unbalanced(held, epsilon=epsilon, penalty=penalty)
    # marginals that sum to one, however little of a block that is far from usual takes part
    r, c = ((m.log() + ratio).softmax(0) for m, ratio in ((held.mass0, plan.log_ratio0), (held.mass1, plan.log_ratio1)))
    r, c = torch.maximum(r, LEAST * part.mass0), torch.maximum(c, LEAST * part.mass1)
    return (r / r.sum(), c / c.sum()), _related(plan, part)


def _kin(part: Interval, held: Interval, *, epsilon: float, penalty: float) -> Kin:
    """Return the kin of a block's cells where ``held`` has them in a space in which squared distances are the cost."""
    return _related(unbalanced(held, epsilon=epsilon, penalty=penalty), part)


def _related(plan: UnbalancedPlan, part: Interval) -> Kin:
    """Return the mean descendants ``(m0, d)`` and ancestors ``(m1, d)`` of a block's cells, where they are."""
    return plan.descendants(part.x1.double()), plan.ancestors(part.x0.double())


def _within(space: Interval, block: Block) -> Interval:
    """Return a block's cells where they are in a space, with the marginals that its plans are held to."""
    return _held(replace(block.part, x0=space.x0[block.i], x1=space.x1[block.j]))


def _pairs(coupled: Sequence[Block], held: Sequence[Interval]) -> WeightedPairs:
    """Pair what takes part of each cell by the exact plan within every block, as indices of all cells.

    ``held`` are the blocks' cells where squared distances are the cost.
    """
    found = at_once(_paired, list(zip(coupled, held)))
    columns = zip(*((p.i, p.j, p.mass0 * b.share, p.mass1 * b.share) for p, b in zip(found, coupled)))
    return WeightedPairs(*map(torch.cat, columns))


def _paired(block: Block, held: Interval) -> WeightedPairs:
    best = exact(replace(held, mass0=block.marginal0, mass1=block.marginal1))
    mass0, mass1 = rescaled(best.mass, best.i, block.part.mass0), rescaled(best.mass, best.j, block.part.mass1)
    return WeightedPairs(block.i[best.i], block.j[best.j], mass0, mass1)


def _of_all(interval: Interval, coupled: Sequence[Block], found: Sequence[Kin]) -> Kin:
    """Return the mean descendants ``(n0, d)`` and ancestors ``(n1, d)`` of all cells from those of every block's."""
    descendants, ancestors = zip(*found)
    return (
        _averaged([(b.i, b.part.mass0) for b in coupled], descendants, interval.x0),
        _averaged([(b.j, b.part.mass1) for b in coupled], ancestors, interval.x1),
    )


def _averaged(end: Sequence[tuple[Tensor, Tensor]], means: Sequence[Tensor], cells: Tensor) -> Tensor:
    """Return the mean kin of all cells ``(n, d)`` from those of each block's own, of which masses are given too."""
    if len(end) == 1:
        return means[0]
    total, weight = torch.zeros_like(cells, dtype=torch.float64), torch.zeros(len(cells), 1, dtype=torch.float64)
    for (index, mass), mean in zip(end, means):
        total.index_add_(0, index, mass[:, None] * mean)  # a cell that two blocks share has kin in both
        weight.index_add_(0, index, mass[:, None])
    return torch.where(weight > 0, total / weight, cells)


def _spread(interval: Interval) -> float:
    """Return the cost's scale as `unbalanced` measures it (twice the mean square about a mean); zero for one place."""
    x0, x1 = interval.x0.double(), interval.x1.double()
    centre = x0.mean(0)
    squares = (m @ (x - centre).square().sum(1) for x, m in ((x0, interval.mass0), (x1, interval.mass1)))
    return float(sum(squares))
