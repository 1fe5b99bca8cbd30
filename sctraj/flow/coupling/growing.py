"""The coupling of a population whose parts grow at different rates (UOT-CFM, the default).

Unbalanced transport decides how much of each cell's mass has a counterpart in the other snapshot, and who a cell's kin
are; an exact plan then pairs what takes part. What does not take part becomes growth: a pair's mass changes on its way.

Where a population moves, such a plan takes part of the move for growth: cells behind seem to die, and cells ahead to be
born. In a *moving* frame it is solved again after each cell is put half-way to where its neighbours go. What neighbours
do together is then nearly all movement, and what is left is growth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median_low
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..snapshots import Interval
from ..threads import at_once
from .blocked import blocks, cells_a_side
from .exact import exact
from .independent import draw
from .kernel import split, squared_distances
from .pairs import WeightedPairs, rescaled
from .phase_space import in_phase_space
from .sinkhorn import SHARPEST
from .unbalanced import UnbalancedPlan, unbalanced

# entropy of the plan that gives growth and kin, in units of the exact plan's cost: each cell has some ten partners
EPSILON = 0.05
# a cell and those nearest to it, whose ways are averaged; a quarter of all if they are fewer than 32. 5 or 15 serve too
NEIGHBOURS = 8
LEAST = 1e-6  # of a cell's mass always takes part, as the network simplex loses masses of the order of rounding
UNIT_BLOCKS = 3  # that the unit is taken from; of small blocks, as many as make up a usual one
WHOLE = 1500  # cells a side that are coupled as a whole
BLOCK = 1000  # cells a side, for larger snapshots: blocks of 1,500, or none, take longer and restore nothing better

Frame = Literal["fixed", "moving"]


class Penalty(NamedTuple):
    """A penalty on marginals that differ from the snapshots', in units of cost.

    A variance is the course's own, whatever the time between snapshots (the squared length of the dynamic problem,
    Chizat et al. 2018). With the cost alone, more of each move is read as growth the nearer snapshots are to each
    other; with the variance alone, the farther they are.

    Attributes
    ----------
    variances
        So many times the mean of both snapshots' total variances,
    costs
        plus so many times the exact plan's cost.
    """

    variances: float
    costs: float


PENALTY = Penalty(8.0, 1.0)
MOVING_PENALTY = Penalty(2.0, 0.5)  # softer, as in a moving frame little of a move is taken for growth
MOVES = 2  # of a moving frame; with each, the part of a rigid move that is read as growth falls by the same factor


@dataclass(frozen=True)
class Block:
    """Cells of both snapshots that are coupled only with each other, and how much of each takes part.

    Attributes
    ----------
    i, j
        Indices of the cells at the start ``(m0,)`` and at the end ``(m1,)``.
    part
        The cells, with masses that sum to one.
    share
        The block's share of all mass.
    marginal0, marginal1
        How much of each cell takes part, each summing to one: the marginals of the exact plan that pairs the cells.
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
        The plan's pairs, at most ``n0 + n1 - 1`` per block.
    descendants
        Mean of the cells to which a source cell's mass goes, ``(n0, d)`` float64. For a cell in no block, as it has no
        mass, the cell itself.
    ancestors
        Mean of the cells from which a target cell's mass comes, ``(n1, d)``, likewise.
    blocks
        Which cells were coupled with which; a single block of all cells if the snapshots are not cut into blocks.
    unit
        Unit of entropy, and the cost in the penalty, if the cells are paired by velocity; else None.
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
        """The plan without kin and blocks, which take most of its memory if snapshots are large."""
        return GrowingPlan(self.pairs, self.descendants[:0], self.ancestors[:0])


def growing(
    interval: Interval,
    rng: torch.Generator,
    *,
    frame: Frame = "fixed",
    epsilon: float = EPSILON,
    penalty: Penalty | None = None,
    block: int | None = None,
    exact_cost: float | None = None,
) -> GrowingPlan:
    """Couple an interval's ends when parts of the population grow or shrink relative to each other.

    Entropic unbalanced transport says how much of each cell's mass takes part (its marginals ``r`` and ``c``), and
    which cells are each other's kin. The exact plan ``P`` between these marginals pairs the cells, and both ends are
    then weighted back: a pair has the mass ``P_ij a_i / r_i`` at the start and ``P_ij b_j / c_j`` at the end, so that
    the population starts and ends as the snapshots are. With a prior of growth (``interval.growth0``), the plan is held
    to the marginal ``a exp(growth length)``, as in Schiebinger et al. 2019. Snapshots of more than ``block`` cells are
    coupled in random blocks.

    Parameters
    ----------
    interval
        The two snapshots.
    rng
        Generator of the random blocks.
    frame
        Whether growth is read where cells are (``"fixed"``), or after they have been moved along with their neighbours,
        half of the way from either end (``"moving"``).
    epsilon
        Entropy of the unbalanced plan, in units of the exact plan's cost (with blocks, of the median of a few).
    penalty
        On its marginals; softer by default in a moving frame.
    block
        Cells a side; by default snapshots of up to 1,500 cells are coupled as a whole, larger ones in blocks of at most
        1,000.
    exact_cost
        Cost of the exact plan if it is known; used if there are neither blocks nor a prior of growth.
    """
    if block is None:
        block = WHOLE if cells_a_side(interval) <= WHOLE else BLOCK
    cut = list(blocks(interval, rng, block=block))
    parts = [(i, j, part) for i, j, part, _ in cut]
    held = [_held(part) for _, _, part in parts]
    unit = _unit(held, epsilon, exact_cost if held[0] is interval else None)
    strength = _strength(interval, penalty or (MOVING_PENALTY if frame == "moving" else PENALTY), unit)
    solve = partial(unbalanced, epsilon=epsilon * unit, penalty=strength)
    plans = at_once(solve, [(own,) for own in held])
    if frame == "moving":
        near = at_once(_neighbours, [(interval.x0, interval.mass0), (interval.x1, interval.mass1)])
        for _ in range(MOVES):
            y0, y1 = _moved_along(interval, near, *_kin_of_all(interval, parts, plans))
            plans = at_once(solve, [(replace(own, x0=y0[i], x1=y1[j]),) for own, (i, j, _) in zip(held, parts)])
    coupled = tuple(Block(*one, *_taking_part(own, plan, one[2])) for one, own, plan in zip(cut, held, plans))
    return GrowingPlan(_pairs(coupled, held), *_kin_of_all(interval, parts, plans), coupled)


def paired_by_velocity(
    plan: GrowingPlan,
    interval: Interval,
    velocity0: Tensor | None,
    velocity1: Tensor | None,
    *,
    time: float | None = None,
    kin_alone: bool = False,
    epsilon: float = EPSILON,
    penalty: Penalty = PENALTY,
) -> GrowingPlan:
    """Couple the same cells anew by where they are going as well as by where they are: the cost is `in_phase_space`.

    How much of each cell takes part stays as it was, so growth depends on places alone; the blocks stay, too. If the
    plan was already paired by other velocities, its unit of cost stays as well. No frame moves here.

    Parameters
    ----------
    plan
        The interval's plan, from `growing` or from this function.
    interval
        The two snapshots.
    velocity0, velocity1
        Velocities of the cells, ``(n0, d)`` and ``(n1, d)`` per unit of time; None if they are not known.
    time
        Time over which speeding up costs what moving does; the interval's length by default.
    kin_alone
        Whether only mean ancestors and descendants are to be found; the pairs then stay as they were.
    epsilon
        Entropy of the plan that gives mean ancestors and descendants, in units of the exact plan's cost in the first
        phase space.
    penalty
        On its marginals, as in `growing`, with variances and cost in phase space.

    Raises
    ------
    ValueError
        If the plan has pairs alone.
    """
    if not plan.blocks:
        raise ValueError("expected a plan as `growing` makes it, found one of pairs alone; couple the interval first")
    space = in_phase_space(interval, velocity0, velocity1, time=time)
    held = [_within(space, one) for one in plan.blocks]
    unit = _unit(held, epsilon, plan.unit)
    solve = partial(unbalanced, epsilon=epsilon * unit, penalty=_strength(space, penalty, unit))
    parts = [(b.i, b.j, b.part) for b in plan.blocks]
    kin = _kin_of_all(interval, parts, at_once(solve, [(own,) for own in held]))
    pairs = plan.pairs if kin_alone else _pairs(plan.blocks, held)
    return GrowingPlan(pairs, *kin, plan.blocks, unit)


def _unit(held: Sequence[Interval], epsilon: float, known: float | None) -> float:
    """Return the unit of entropy, also the cost in the penalty: the exact plan's cost, with blocks the median of a few.

    A few are enough, as all blocks have the same law, and the (lower) median is not changed by a cell far away in one
    of them; if most of them are copies, it is the largest cost. For a snapshot and its copy the cost is zero, and the
    unit is what rounding allows. A known cost is used instead, if rounding allows it.
    """
    largest = max(len(held[0].x0), len(held[0].x1))
    few = held[: max(UNIT_BLOCKS, BLOCK // largest)]
    costs = [known] if known is not None else at_once(_cost, [(part,) for part in few])
    least = 2 * SHARPEST / epsilon * max(map(_spread, held))
    return max(median_low(costs) or max(costs), least) or 1.0  # all in one place: any unit will do


def _cost(part: Interval) -> float:
    return exact(part).cost


def _held(part: Interval) -> Interval:
    """Return a block with the marginals to which its plans are held: grown by the prior of growth, if there is one."""
    if part.growth0 is None:
        return part
    exponent = part.growth0 * part.length
    grown = part.mass0 * (exponent - exponent.max()).exp()
    return replace(part, mass0=grown * (part.mass0.sum() / grown.sum()), growth0=None)  # equal rates change no bit


def _strength(interval: Interval, penalty: Penalty, cost: float) -> float:
    """Return the penalty on marginals, in units of cost."""
    ends = ((x.double(), m.double()) for x, m in ((interval.x0, interval.mass0), (interval.x1, interval.mass1)))
    variance = sum(float(m @ (x - m @ x).square().sum(1)) for x, m in ends) / 2
    return penalty.costs * cost + penalty.variances * variance


Part = tuple[Tensor, Tensor, Interval]  # a block: indices of its cells at the start and at the end, and the cells
Marginals = tuple[Tensor, Tensor]
Kin = tuple[Tensor, Tensor]


def _taking_part(held: Interval, plan: UnbalancedPlan, part: Interval) -> Marginals:
    """Return how much of each cell of a block takes part, ``(m0,)`` and ``(m1,)``, each summing to one."""
    # marginals that sum to one, however little of an unusual block takes part
    r, c = ((m.log() + ratio).softmax(0) for m, ratio in ((held.mass0, plan.log_ratio0), (held.mass1, plan.log_ratio1)))
    r, c = torch.maximum(r, LEAST * part.mass0), torch.maximum(c, LEAST * part.mass1)
    return r / r.sum(), c / c.sum()


def _moved_along(
    interval: Interval, near: Sequence[Tensor], descendants: Tensor, ancestors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cells half-way to where those around them go, ``(n0, d)``, or back to where they came from."""
    x0, x1 = interval.x0.double(), interval.x1.double()
    there, back = _mean_of(near[0], descendants - x0, interval.mass0), _mean_of(near[1], ancestors - x1, interval.mass1)
    return x0 + there / 2, x1 + back / 2


def _neighbours(cells: Tensor, mass: Tensor) -> Tensor:
    """Return for each of ``n`` cells the indices of the cells with mass that are nearest to it, ``(n, k)``."""
    k, found = min(NEIGHBOURS, math.ceil(int((mass > 0).sum()) / 4)), []
    centred = cells.double() - cells.double().mean(0)  # as squares lose digits far from the origin
    for some in split(centred, len(cells)):
        squares = squared_distances(some, centred)
        squares[:, mass == 0] = torch.inf
        found.append(squares.topk(k, largest=False).indices)
    return torch.cat(found)


def _mean_of(near: Tensor, values: Tensor, mass: Tensor) -> Tensor:
    """Return the means ``(n, d)``, by mass ``(n,)``, of the values ``(n, d)`` of each cell's neighbours ``(n, k)``."""
    weight = mass[near, None]
    return (weight * values[near]).sum(1) / weight.sum(1)


def _related(plan: UnbalancedPlan, part: Interval) -> Kin:
    """Return the mean descendants ``(m0, d)`` and ancestors ``(m1, d)`` of a block's cells, in the cells' own space."""
    return plan.descendants(part.x1.double()), plan.ancestors(part.x0.double())


def _within(space: Interval, block: Block) -> Interval:
    """Return a block's cells in the given space, with the marginals to which its plans are held."""
    return _held(replace(block.part, x0=space.x0[block.i], x1=space.x1[block.j]))


def _pairs(coupled: Sequence[Block], held: Sequence[Interval]) -> WeightedPairs:
    """Pair what takes part of each cell by the exact plan within every block; the indices are those of all cells.

    ``held`` has the blocks' cells in the space whose squared distances are the cost.
    """
    found = at_once(_paired, list(zip(coupled, held)))
    columns = zip(*((p.i, p.j, p.mass0 * b.share, p.mass1 * b.share) for p, b in zip(found, coupled)))
    return WeightedPairs(*map(torch.cat, columns))


def _paired(block: Block, held: Interval) -> WeightedPairs:
    best = exact(replace(held, mass0=block.marginal0, mass1=block.marginal1))
    mass0, mass1 = rescaled(best.mass, best.i, block.part.mass0), rescaled(best.mass, best.j, block.part.mass1)
    return WeightedPairs(block.i[best.i], block.j[best.j], mass0, mass1)


def _kin_of_all(interval: Interval, parts: Sequence[Part], plans: Sequence[UnbalancedPlan]) -> Kin:
    """Return the mean descendants ``(n0, d)`` and ancestors ``(n1, d)`` of all cells, from their blocks' plans."""
    descendants, ancestors = zip(*at_once(_related, [(plan, part) for plan, (_, _, part) in zip(plans, parts)]))
    return (
        _averaged([(i, part.mass0) for i, _, part in parts], descendants, interval.x0),
        _averaged([(j, part.mass1) for _, j, part in parts], ancestors, interval.x1),
    )


def _averaged(end: Sequence[tuple[Tensor, Tensor]], means: Sequence[Tensor], cells: Tensor) -> Tensor:
    """Return the mean kin ``(n, d)`` of all cells, from each block's indices and masses, and its cells' mean kin."""
    if len(end) == 1:
        return means[0]
    total, weight = torch.zeros_like(cells, dtype=torch.float64), torch.zeros(len(cells), 1, dtype=torch.float64)
    for (index, mass), mean in zip(end, means):
        total.index_add_(0, index, mass[:, None] * mean)  # a cell that two blocks share has kin in both
        weight.index_add_(0, index, mass[:, None])
    return torch.where(weight > 0, total / weight, cells)


def _spread(interval: Interval) -> float:
    """Return the cost's scale as `unbalanced` measures it (twice the mean square about a mean); zero at one place."""
    x0, x1 = interval.x0.double(), interval.x1.double()
    centre = x0.mean(0)
    squares = (m @ (x - centre).square().sum(1) for x, m in ((x0, interval.mass0), (x1, interval.mass1)))
    return float(sum(squares))
