"""The data of a fit: snapshots, a coupling for each interval and a probability path.

Conditional flow matching (Tong et al. 2023) needs pairs of cells and a path between the cells of a pair; the methods
differ in these two. This file turns the name of a method into a `Problem`, which draws a member's training data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .clouds import evenly
from .coupling import Coupling, GrowingPlan, SparsePlan, WeightedPairs, blocked
from .metric_path import BATCH_SIZE, LEARNING_RATE, N_STEPS, WIDTH, Metric, metric_path
from .plans import Plans
from .probability_path import BrownianBridge, Hermite, Pairs, PathSample, ProbabilityPath, Straight, Trigonometric
from .snapshots import Interval, Snapshots, hold_back
from .starts import farther_share
from .tangents import Tangents, reliability, tangents, velocities
from .threads import at_once

METHODS = ("uot-cfm", "ot-cfm", "i-cfm", "sb-cfm", "vp-cfm")
LISTED = ("uot-cfm", "ot-cfm")  # their couplings list all pairs; those of the others are drawn, by a member's seed
PATHS = ("hermite", "straight", "land", "rbf")
WITH_PATH = ("uot-cfm", "ot-cfm", "i-cfm")  # methods that leave the path open

# default sigma as a fraction of the displacement (a bridge's: per root of the mean gap), free of scale and unit
STRAIGHT_FRACTION = 0.1
BRIDGE_FRACTION = 0.3
HELD_BACK = 0.1  # fraction of each snapshot's cells, if early stopping is asked for
DISPLACEMENT_CELLS = 1000  # at most so many cells a side are used to estimate the displacement
# tempo of a network on growing plans: the faster, the more it learns what is peculiar to one snapshot
SLOW_TEMPO = 1 / 16
ROUNDS = 2  # of finding velocities and pairing by them; further rounds changed little
LONG = 8.0  # length of an interval, in shorter gaps beside it, above which velocities count less; at 6 they still tell
DATA_SEED = 0  # of the cells held back, which belong to the data and are the same for all members
DRAWN_PAIRS = 4  # per cell, if a coupling has too many pairs to list


@dataclass(frozen=True)
class Problem:
    """One member's data: the pairs of cells that it may see and the path between them.

    Attributes
    ----------
    snapshots
        The kept snapshots; of large ones, only the cells that take part in couplings (see `taking_part`).
    couplings
        One per interval.
    path
        The law of x_t given the two ends of a pair.
    seed
        Seed of the member's own random stream: its initial weights, pairs, times and noise depend on this seed and on
        the kept snapshots alone, never on the other members.
    tangents
        Velocities at the ends of curved paths; None for other paths.
    spreads
        Spread of the paths in addition to ``path.sigma``, a length for each interval; if there are only two snapshots,
        the half-way spread of a Brownian bridge. Empty if there is none but sigma.
    """

    snapshots: Snapshots
    couplings: tuple[Coupling, ...]
    path: ProbabilityPath
    seed: int
    tangents: Tangents | None = None
    spreads: tuple[float, ...] = ()

    @property
    def std(self) -> float:
        """Unit of the score: a bridge's largest standard deviation on an interval as long as the mean gap.

        On a longer interval the bridge is wider than this. Zero for other paths, for which no score is learned.
        """
        if isinstance(self.path, BrownianBridge):
            return self.path.sigma * math.sqrt(self.snapshots.mean_gap) / 2
        return 0.0

    @property
    def tempo(self) -> float:
        """Factor by which the time given to a network, in mean gaps, is multiplied.

        It is small for the pairs of a growing plan. These almost follow a map, so that cells at one place move alike
        throughout an interval, and what changes faster is more often the age or composition of a single sample than the
        course. Such a field need not hit every kept snapshot. For the other methods, whose fields are held to what they
        are defined by, it is 1.
        """
        return SLOW_TEMPO if self.grows else 1.0

    @property
    def farther(self) -> float:
        """Weight of a snapshot relative to the next nearer one when a population is moved to another time."""
        return farther_share(len(self.snapshots), None if self.tangents is None else self.tangents.reliability)

    @property
    def grows(self) -> bool:
        """Whether the mass of a pair changes along its path."""
        return any(isinstance(coupling, GrowingPlan) for coupling in self.couplings)

    def pairs(self, k: int, i: Tensor, j: Tensor) -> Pairs:
        """Return pairs of interval ``k``, given by indices ``(n,)`` at both ends, with any velocities at their ends."""
        interval = self.snapshots.intervals()[k]
        x0, x1 = interval.x0.index_select(0, i), interval.x1.index_select(0, j)
        velocities = () if self.tangents is None else self.tangents.at(k, i, j, (x1 - x0) / interval.length)
        return Pairs(x0, x1, interval.t0, interval.t1, *velocities)

    def listed(self, k: int) -> WeightedPairs:
        """Return the pairs of interval ``k``: all, if the coupling lists them, else a sample with equal masses."""
        coupling, interval = self.couplings[k], self.snapshots.intervals()[k]
        if isinstance(coupling, (GrowingPlan, SparsePlan)):
            return coupling.pairs
        n = DRAWN_PAIRS * (len(interval.x0) + len(interval.x1))
        rng = torch.Generator(interval.x0.device).manual_seed(self.seed)
        i, j = coupling.sample(n, rng)
        mass = torch.full((n,), 1 / n, dtype=torch.float64, device=i.device)
        return WeightedPairs(i, j, mass, mass)

    def sample(self, n_steps: int, n_pairs: int, rng: torch.Generator) -> Sample:
        """Draw ``n_steps`` batches of ``n_pairs`` pairs, divided evenly among the intervals."""
        share, rest = divmod(n_pairs, len(self.couplings))
        drawn, contrasts, starts, lengths, spreads = [], [], [], [], []
        for k, (interval, coupling) in enumerate(zip(self.snapshots.intervals(), self.couplings, strict=True)):
            n = share + (k < rest)
            if isinstance(coupling, GrowingPlan):
                chosen = coupling.choose(n_steps * n, rng)
                i, j = coupling.pairs.i[chosen], coupling.pairs.j[chosen]
                contrasts.append(coupling.pairs.contrast[chosen].to(interval.x0.dtype).reshape(n_steps, n, 1))
            else:
                i, j = coupling.sample(n_steps * n, rng)
            pairs = self.pairs(k, i, j)
            ends = [pairs.x0, pairs.x1, pairs.velocity0, pairs.velocity1]
            drawn.append([v.reshape(n_steps, n, -1) for v in ends if v is not None])
            starts.append(interval.x0.new_full((n, 1), interval.t0))
            lengths.append(interval.x0.new_full((n, 1), interval.length))
            if self.spreads:
                spreads.append(interval.x0.new_full((n, 1), self.spreads[k]))
        x0, x1, *velocities = (torch.cat(column, 1) for column in zip(*drawn))
        velocity0, velocity1 = velocities or (None, None)
        start, length = torch.cat(starts), torch.cat(lengths)  # (n_pairs, 1)
        pairs = Pairs(x0, x1, start, start + length, velocity0, velocity1)
        if spreads:
            pairs = replace(pairs, spread=torch.cat(spreads), bridged=len(self.snapshots) == 2)
        path = self.path.sample(pairs, rng)
        if not contrasts:
            return Sample(path, length, weight=None, growth=None)
        contrast = torch.cat(contrasts, 1)
        # weight: a pair's mass at s over that at 1/2, by which it was drawn; growth: d log(mass) / dt
        weight = 1 + ((path.t - start) / length - 0.5) * contrast
        return Sample(path, length, weight=weight, growth=contrast / weight / length)


@dataclass(frozen=True)
class Sample:
    """Training data of one member: leading axes ``(n_steps, n_pairs)``.

    Attributes
    ----------
    path
        Points on the paths and their targets.
    length
        Length of each pair's interval, ``(n_pairs, 1)``.
    weight
        Mass of the pair at its time, relative to the mass by which it was drawn, ``(..., 1)``; None if nothing grows.
    growth
        Growth rate of the pair, ``(..., 1)`` per unit of time; None if nothing grows.
    """

    path: PathSample
    length: Tensor
    weight: Tensor | None
    growth: Tensor | None


def taking_part(snapshots: Snapshots, method: str, path: str | None, plans: Plans) -> Snapshots:
    """Return the snapshots with the cells from which a method's problems are made: all, or at most 6,000 of each.

    The limit holds for ``"uot-cfm"``, ``"ot-cfm"`` and curved paths, whose pairs or kin are found in blocks; see
    `Plans.taking_part`.
    """
    return plans.taking_part(snapshots) if method in ("uot-cfm", "ot-cfm") or path == "hermite" else snapshots


def displacement(snapshots: Snapshots, plans: Plans) -> float:
    """Return the root mean square displacement per coordinate under the exact coupling, over the kept intervals.

    For snapshots of more than 1,000 cells, a thousand evenly spaced ones stand for the whole.
    """
    squares = at_once(partial(_mean_square, plans=plans), [(interval,) for interval in snapshots.intervals()])
    return math.sqrt(sum(squares) / len(squares) / snapshots.dimension)


def measured_whole(interval: Interval, plans: Plans) -> bool:
    """Say whether the displacement over an interval is taken from the exact coupling of all its cells."""
    return max(len(interval.x0), len(interval.x1)) <= min(DISPLACEMENT_CELLS, plans.block or DISPLACEMENT_CELLS)


def _mean_square(interval: Interval, plans: Plans) -> float:
    """Return the mean square displacement over an interval, summed over the coordinates."""
    if measured_whole(interval, plans):
        plan = plans.couple(interval, None, "ot-cfm")
        assert isinstance(plan, SparsePlan)
        return plan.cost
    rows, columns = (evenly(len(x), DISPLACEMENT_CELLS).to(x.device) for x in (interval.x0, interval.x1))
    m0, m1 = interval.mass0[rows], interval.mass1[columns]
    thinned = replace(interval, x0=interval.x0[rows], x1=interval.x1[columns], mass0=m0, mass1=m1)
    return blocked(thinned, torch.Generator(), block=DISPLACEMENT_CELLS).cost


def default_sigma(snapshots: Snapshots, method: str, plans: Plans) -> float:
    """Return the sigma that a method takes by default, computed from the kept snapshots alone.

    For a bridge it is a diffusivity, ``BRIDGE_FRACTION`` of the rms displacement per root of the mean gap; for the
    others a length, ``STRAIGHT_FRACTION`` of the rms displacement over the intervals.
    """
    moved = displacement(snapshots, plans)
    if method != "sb-cfm":
        return STRAIGHT_FRACTION * moved
    if not moved > 0:
        raise ValueError(
            "expected snapshots that differ, to take the sigma of sb-cfm from, found the same cells; pass a sigma"
        )
    return BRIDGE_FRACTION * moved / math.sqrt(snapshots.mean_gap)


def default_spreads(snapshots: Snapshots, couplings: Sequence[Coupling], plans: Plans) -> tuple[float, ...]:
    """Return the default spreads of the paths of ``"uot-cfm"`` in addition to sigma: a length for each interval.

    With three snapshots or more, they teach the field what cells beside the paths do, see `spread_between`. Between
    only two snapshots nothing tells which way a cell took. The paths are then Brownian bridges, as wide relative to
    their pairs' displacement as those of ``"sb-cfm"``: half-way ``BRIDGE_FRACTION / 2`` of the rms displacement.
    """
    if len(snapshots) > 2:
        return tuple(spread_between(interval, plans) for interval in snapshots.intervals())
    (interval,), (coupling,) = snapshots.intervals(), couplings
    assert isinstance(coupling, GrowingPlan)
    pairs = coupling.pairs
    squares = (interval.x1[pairs.j] - interval.x0[pairs.i]).double().square().mean(1)
    return (BRIDGE_FRACTION / 2 * math.sqrt(float(pairs.middle @ squares / pairs.middle.sum())),)


def spread_between(interval: Interval, plans: Plans) -> float:
    """Return the spread of an interval's paths in addition to sigma, a length: how far apart the cells at its ends are.

    Between the cells that were sampled there are as many that were not, and a network learns nothing where no path
    runs. The rms distance of a point from its path is the mean over both snapshots of the median distance to the 5th
    nearest other cell (`clouds.spacing`); the spread is this divided by ``sqrt(d)``, as it is per coordinate. It falls
    with the number of cells.
    """
    return (plans.spacing(interval.x0) + plans.spacing(interval.x1)) / 2 / math.sqrt(interval.x0.shape[1])


def check_method(method: str, *, path: str | None, sigma: float | None, prior: bool) -> None:
    """Raise a ValueError for what no problem can be made of, so that a caller can before any coupling is solved.

    Parameters
    ----------
    method, path, sigma
        As in `make_problems`.
    prior
        Whether there are prior growth rates.
    """
    if method not in METHODS:
        raise ValueError(f"expected a method of {METHODS}, found {method!r}")
    if path not in (None, *PATHS):
        raise ValueError(f"expected a path of {PATHS}, found {path!r}")
    if path is not None and method not in WITH_PATH:
        raise ValueError(f"expected no path for {method}, which has its own, found {path!r}; leave one of them out")
    if prior and method != "uot-cfm":
        raise ValueError(f"expected no prior of growth for {method}, which conserves mass; take uot-cfm")
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"expected a finite sigma of at least 0, found {sigma}")
    if sigma == 0 and method == "sb-cfm":
        raise ValueError(f"expected a positive sigma for sb-cfm, found {sigma}; its limit at 0 is method='ot-cfm'")


def make_path(snapshots: Snapshots, method: str, path: str | None, sigma: float) -> ProbabilityPath:
    """Return a method's probability path; ``path`` is for the methods that allow a choice (see `make_problems`)."""
    if method == "sb-cfm":
        return BrownianBridge(sigma)
    if method == "vp-cfm":
        return Trigonometric(sigma, centre=torch.cat(snapshots.points).mean(0))
    if path == "hermite" or (path is None and method == "uot-cfm"):
        return Hermite(sigma)
    return Straight(sigma)


def make_problems(
    snapshots: Snapshots,
    *,
    method: str,
    path: str | None,
    sigma: float | None,
    seeds: Sequence[int],
    validate: bool,
    plans: Plans | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """Make the problems of members that share their snapshots, one per seed: find sigma, path and couplings.

    Parameters
    ----------
    snapshots
        The kept snapshots, at least two; everything else is computed from these alone.
    method
        ``"uot-cfm"``: coupling of a growing population (`growing`). ``"i-cfm"``: independent coupling. ``"ot-cfm"``:
        exact coupling (in blocks if snapshots are large). ``"sb-cfm"``: entropic coupling, Brownian bridge.
        ``"vp-cfm"``: independent coupling, trigonometric path. The last four are those of Tong et al. 2023, table 1.
    path
        For the first three methods: ``"straight"``; ``"hermite"``, curved through neighbouring snapshots (the pairs of
        ``"uot-cfm"`` are then found by the cells' velocities too, see `paired_by_velocity`); or ``"land"`` or
        ``"rbf"``, learned to stay near the cells under that metric. None: hermite for ``"uot-cfm"``, else straight.
    sigma
        Spread of the path in the user's units (a length; for ``"sb-cfm"`` a length per root of time). None:
        `default_sigma` and, for ``"uot-cfm"``, the `default_spreads` in addition.
    seeds
        Seeds of the members' own random streams.
    validate
        Whether to hold back a tenth of each snapshot's cells.
    plans
        How to solve couplings, and those already solved for other snapshots that share intervals with these; none by
        default.

    Returns
    -------
    The problems to train on, and those of the held-back cells (none unless ``validate``).
    """
    check_method(method, path=path, sigma=sigma, prior=bool(snapshots.growth))
    if len(snapshots) < 2:
        raise ValueError(f"expected at least two snapshots, found {len(snapshots)}; a flow runs between them")
    plans = plans or Plans()
    snapshots = taking_part(snapshots, method, path, plans)
    law = make_path(snapshots, method, path, default_sigma(snapshots, method, plans) if sigma is None else sigma)
    train, held_back = snapshots, None
    if validate:
        train, held_back = hold_back(snapshots, fraction=HELD_BACK, rng=torch.Generator().manual_seed(DATA_SEED))
    metric: Metric | None = "land" if path == "land" else "rbf" if path == "rbf" else None
    put_together = partial(_put_together, method=method, law=law, metric=metric, wider=sigma is None, plans=plans)
    trained = put_together(train)
    problems = [replace(trained, seed=seed) for seed in seeds]
    if held_back is None:
        return problems, []
    validated = put_together(held_back, like=trained)
    return problems, [replace(validated, seed=seed) for seed in seeds]


def _put_together(
    cells: Snapshots,
    *,
    method: str,
    law: ProbabilityPath,
    metric: Metric | None,
    wider: bool,
    plans: Plans,
    like: Problem | None = None,
) -> Problem:
    """Return the problem of some cells, of a seed still to be given.

    Parameters
    ----------
    cells
        The cells to train on, or those that are held back.
    method
        As in `make_problems`.
    law
        The path, if no metric is given by which one is to be learned.
    metric
        Of a learned path.
    wider
        Whether the paths of ``"uot-cfm"`` have the default spreads beside sigma.
    plans
        See `make_problems`.
    like
        For cells that are held back: the problem of those to train on, whose learned path, reliability and spreads are
        theirs too.
    """
    measured = None if like is None else like.tangents
    plans.prepare(cells.intervals(), method)
    couplings = tuple(plans.couple(interval, law, method) for interval in cells.intervals())
    if metric is not None:
        law = _metric_path(cells, couplings, metric, law.sigma) if like is None else like.path
    bends = None
    if isinstance(law, Hermite):
        plans.prepare(cells.intervals(), "uot-cfm")
        kin: Sequence[GrowingPlan] = [plans.growing(i) for i in cells.intervals()]  # whatever the couplings are
        # paired by place alone: cells that are paired by velocity seem to turn reliably
        share = reliability(cells, kin) if measured is None else measured.reliability
        if method == "uot-cfm":
            couplings = kin = _by_velocity(cells, kin, plans)
        bends = tangents(cells, kin, couplings, share, arcs=plans.frame == "moving")
    spreads: tuple[float, ...] = ()
    if wider and method == "uot-cfm":
        spreads = default_spreads(cells, couplings, plans) if like is None else like.spreads
    couplings = tuple(c.pairs_alone if isinstance(c, GrowingPlan) else c for c in couplings)
    return Problem(cells, couplings, law, seed=0, tangents=bends, spreads=spreads)


def _metric_path(snapshots: Snapshots, couplings: Sequence[Coupling], metric: Metric, sigma: float) -> ProbabilityPath:
    """Return paths learned to stay near the cells, the same for all members."""
    return metric_path(
        snapshots,
        couplings,
        metric=metric,
        sigma=sigma,
        n_steps=N_STEPS,
        batch_size=BATCH_SIZE,
        width=WIDTH,
        learning_rate=LEARNING_RATE,
        rng=torch.Generator(snapshots.points[0].device).manual_seed(0),
    )


def _by_velocity(snapshots: Snapshots, kin: Sequence[GrowingPlan], plans: Plans) -> tuple[GrowingPlan, ...]:
    """Couple the cells by where they are going as well as by where they are, in ``ROUNDS`` rounds.

    In each round the kin found so far give velocities, and the velocities give new kin; the last round gives the pairs
    as well. Cells of the first and the last snapshot have no velocity.

    Over a long interval beside a very short one velocities are mostly noise: the noise of a velocity measured over a
    gap ``g`` is proportional to ``1 / g``, and over an interval of length ``h`` it adds to squared distances in
    proportion to ``(h / g)^2``. So where ``h`` is more than ``LONG`` times ``g``, the time over which speeding up costs
    what moving does is ``(LONG g)^2 / h`` instead of ``h``; what noise adds then falls as ``(g / h)^2``.
    """
    kin, intervals = list(kin), snapshots.intervals()
    lengths = [interval.length for interval in intervals]
    beside = [min(lengths[:k][-1:] + lengths[k + 1 : k + 2], default=length) for k, length in enumerate(lengths)]
    times = [length * min(1.0, LONG * gap / length) ** 2 for length, gap in zip(lengths, beside)]
    for left in reversed(range(ROUNDS if len(snapshots) > 2 else 0)):
        ends = tuple(pairwise(velocities(snapshots, kin)))
        solve = partial(plans.by_velocity, kin_alone=left > 0)
        if all(len(plan.blocks) == 1 for plan in kin):
            kin = at_once(solve, list(zip(kin, intervals, *zip(*ends), times)))
        else:  # here the blocks of each interval are solved in parallel
            kin = [solve(*asked) for asked in zip(kin, intervals, *zip(*ends), times)]
    return tuple(kin)
