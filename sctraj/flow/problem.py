"""What a fit is given: snapshots, a coupling for each interval and a probability path."""

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
LISTED = ("uot-cfm", "ot-cfm")  # whose couplings list their pairs; the others' are drawn, by a member's seed
PATHS = ("hermite", "straight", "land", "rbf")
WITH_PATH = ("uot-cfm", "ot-cfm", "i-cfm")  # methods that leave the path open

# sigma, where none is given, as a fraction of the displacement per root of the mean gap: scale- and unit-free
STRAIGHT_FRACTION = 0.1
BRIDGE_FRACTION = 0.3
HELD_BACK = 0.1  # of each snapshot's cells, where early stopping is asked for
DISPLACEMENT_CELLS = 1000  # cells a side at most from which the displacement is estimated
SLOW = 1 / 16  # tempo of a network's clock on a growing plan: the faster, the more of one snapshot's own it learns
ROUNDS = 2  # of finding velocities and pairing by them: further ones changed little
LONG = 8.0  # times the shorter gap beside it, an interval's length from which on velocities fade: at 6 they still tell
DATA_SEED = 0  # of cells held back: they belong to the data, whoever is trained on it
DRAWN_PAIRS = 4  # per cell, where a coupling has too many pairs to list


@dataclass(frozen=True)
class Problem:
    """One member's data: the pairs of cells it may see and the path between them.

    Attributes
    ----------
    snapshots
        The kept snapshots; of large ones the cells that take part in couplings (see `taking_part`).
    couplings
        One per interval.
    path
        The law of x_t between the two ends of a pair.
    seed
        Of the member's own random stream: first weights, pairs, times and noise depend on it and on the kept
        snapshots alone, never on the other members.
    tangents
        For curved paths: velocities at their ends; None for others.
    spreads
        Spread of the paths beside ``path.sigma``, a length for each interval; between two snapshots alone that of a
        Brownian bridge half-way. Empty, where sigma is all.
    """

    snapshots: Snapshots
    couplings: tuple[Coupling, ...]
    path: ProbabilityPath
    seed: int
    tangents: Tangents | None = None
    spreads: tuple[float, ...] = ()

    @property
    def std(self) -> float:
        """What the score is measured in: a bridge's largest standard deviation on an interval as long as the mean gap.

        On a longer one it has a larger. Zero for other paths, of which no score is learned.
        """
        if isinstance(self.path, BrownianBridge):
            return self.path.sigma * math.sqrt(self.snapshots.mean_gap) / 2
        return 0.0

    @property
    def tempo(self) -> float:
        """Factor on the time, in mean gaps, that a network is given.

        Slow on a growing plan's pairs: they all but follow a map, so that cells at one place move alike all through
        an interval, and what changes faster is more often one sample's age or composition than the course. Such a
        field need not hit every kept snapshot. The other methods' fields are held to what they are defined by.
        """
        return SLOW if self.grows else 1.0

    @property
    def farther(self) -> float:
        """How much a snapshot counts beside the next nearer one, in a population that is moved to another time."""
        return farther_share(len(self.snapshots), None if self.tangents is None else self.tangents.reliability)

    @property
    def grows(self) -> bool:
        """Whether pairs change their mass on the way."""
        return any(isinstance(coupling, GrowingPlan) for coupling in self.couplings)

    def pairs(self, k: int, i: Tensor, j: Tensor) -> Pairs:
        """Return pairs of interval ``k`` by their indices at both ends, ``(n,)``: their ends and velocities there."""
        interval = self.snapshots.intervals()[k]
        x0, x1 = interval.x0.index_select(0, i), interval.x1.index_select(0, j)
        velocities = () if self.tangents is None else self.tangents.at(k, i, j, (x1 - x0) / interval.length)
        return Pairs(x0, x1, interval.t0, interval.t1, *velocities)

    def listed(self, k: int) -> WeightedPairs:
        """Return the pairs of interval ``k``: all that the coupling lists, else a sample with equal masses."""
        coupling, interval = self.couplings[k], self.snapshots.intervals()[k]
        if isinstance(coupling, (GrowingPlan, SparsePlan)):
            return coupling.pairs
        n = DRAWN_PAIRS * (len(interval.x0) + len(interval.x1))
        rng = torch.Generator(interval.x0.device).manual_seed(self.seed)
        i, j = coupling.sample(n, rng)
        mass = torch.full((n,), 1 / n, dtype=torch.float64, device=i.device)
        return WeightedPairs(i, j, mass, mass)

    def sample(self, n_steps: int, n_pairs: int, rng: torch.Generator) -> Sample:
        """Draw ``n_steps`` batches of ``n_pairs`` pairs, shared evenly among the intervals."""
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
        # a pair's mass at s over that at 1/2, by which it was drawn, and its growth rate d log(mass) / dt
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
        Of each pair's interval, ``(n_pairs, 1)``.
    weight
        Mass of the pair at its time relative to what it was drawn by, ``(..., 1)``; None where nothing grows.
    growth
        Growth rate of the pair, ``(..., 1)`` per unit of time; None where nothing grows.
    """

    path: PathSample
    length: Tensor
    weight: Tensor | None
    growth: Tensor | None


def taking_part(snapshots: Snapshots, method: str, path: str | None, plans: Plans) -> Snapshots:
    """Return the snapshots with the cells that a method's problems are made of: all, or at most 6,000 of each.

    Fewer for ``"uot-cfm"``, ``"ot-cfm"`` and curved paths, whose pairs or kin are met in blocks, see
    `Plans.taking_part`.
    """
    return plans.taking_part(snapshots) if method in ("uot-cfm", "ot-cfm") or path == "hermite" else snapshots


def displacement(snapshots: Snapshots, plans: Plans) -> float:
    """Root mean square displacement per coordinate under the exact coupling, over the kept intervals.

    Of snapshots with more than 1,000 cells an evenly spaced thousand stands for the whole.
    """
    squares = at_once(partial(_mean_square, plans=plans), [(interval,) for interval in snapshots.intervals()])
    return math.sqrt(sum(squares) / len(squares) / snapshots.dimension)


def measured_whole(interval: Interval, plans: Plans) -> bool:
    """Whether the displacement over an interval is that of the exact coupling of all its cells."""
    return max(len(interval.x0), len(interval.x1)) <= min(DISPLACEMENT_CELLS, plans.block or DISPLACEMENT_CELLS)


def _mean_square(interval: Interval, plans: Plans) -> float:
    """Return the mean square displacement over an interval, in all coordinates together."""
    if measured_whole(interval, plans):
        plan = plans.couple(interval, None, "ot-cfm")
        assert isinstance(plan, SparsePlan)
        return plan.cost
    rows, columns = (evenly(len(x), DISPLACEMENT_CELLS).to(x.device) for x in (interval.x0, interval.x1))
    m0, m1 = interval.mass0[rows], interval.mass1[columns]
    thinned = replace(interval, x0=interval.x0[rows], x1=interval.x1[columns], mass0=m0, mass1=m1)
    return blocked(thinned, torch.Generator(), block=DISPLACEMENT_CELLS).cost


def default_sigma(snapshots: Snapshots, method: str, plans: Plans) -> float:
    """Return the sigma of a method where none is given, from the kept snapshots alone.

    A bridge's is a diffusivity, ``BRIDGE_FRACTION`` of the rms displacement per root of the mean gap; the others' is
    a length, ``STRAIGHT_FRACTION`` of the rms displacement over the mean gap.
    """
    moved = displacement(snapshots, plans)
    if method != "sb-cfm":
        return STRAIGHT_FRACTION * moved
    if not moved > 0:
        raise ValueError(
            "expected snapshots that differ, to take the sigma of sb-cfm from, found the same cells; pass one"
        )
    return BRIDGE_FRACTION * moved / math.sqrt(snapshots.mean_gap)


def default_spreads(snapshots: Snapshots, couplings: Sequence[Coupling], plans: Plans) -> tuple[float, ...]:
    """Return the spreads of ``"uot-cfm"``'s paths beside sigma where none is given, lengths, one for each interval.

    With three snapshots or more cells are told what to do beside their paths, see `spread_between`. Between two alone
    nothing tells which way a cell took: paths are Brownian bridges, as wide for how far their pairs go as those of
    ``"sb-cfm"``: half-way ``BRIDGE_FRACTION / 2`` of the rms displacement.
    """
    if len(snapshots) > 2:
        return tuple(spread_between(interval, plans) for interval in snapshots.intervals())
    (interval,), (coupling,) = snapshots.intervals(), couplings
    assert isinstance(coupling, GrowingPlan)
    pairs = coupling.pairs
    squares = (interval.x1[pairs.j] - interval.x0[pairs.i]).double().square().mean(1)
    return (BRIDGE_FRACTION / 2 * math.sqrt(float(pairs.middle @ squares / pairs.middle.sum())),)


def spread_between(interval: Interval, plans: Plans) -> float:
    """Return the spread of an interval's paths beside sigma, a length: how far apart the cells at its ends are.

    Between the cells that were sampled there are as many that were not, and where no path is a network learns nothing.
    The rms distance of a point from its path is the mean of both snapshots' median distances to the 5th nearest other
    cell (`clouds.spacing`), in each coordinate that over ``sqrt(d)``. It falls with the number of cells.
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
        raise ValueError(f"expected no prior of growth for {method}, which conserves mass; take method='uot-cfm'")
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"expected a finite sigma of at least 0, found {sigma}")
    if sigma == 0 and method == "sb-cfm":
        raise ValueError(f"expected a positive sigma for sb-cfm, found {sigma}; its limit at 0 is method='ot-cfm'")


def make_path(snapshots: Snapshots, method: str, path: str | None, sigma: float) -> ProbabilityPath:
    """Return a method's probability path; ``path`` is for the methods that leave a choice (see `make_problems`)."""
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
    """Put together the problems of members that share their snapshots: sigma, path and couplings, one per seed.

    Parameters
    ----------
    snapshots
        At least two; all else is computed from these (kept) snapshots alone.
    method
        ``"uot-cfm"``: coupling of a growing population (`growing`). ``"i-cfm"``: independent coupling. ``"ot-cfm"``:
        exact coupling (in blocks where snapshots are large). ``"sb-cfm"``: entropic coupling, Brownian bridge.
        ``"vp-cfm"``: independent coupling, trigonometric path. The last four after Tong et al. 2023, table 1.
    path
        Of the first three methods: ``"straight"``, ``"hermite"`` (curved through neighbouring snapshots; pairs of
        ``"uot-cfm"`` are then found by the cells' velocities too, `paired_by_velocity`), or learned to keep to the
        cells under the metric ``"land"`` or ``"rbf"``; None: hermite for ``"uot-cfm"``, else straight.
    sigma
        Spread of the path in the user's units (a length; for ``"sb-cfm"`` a length per root of time); None for
        ``default_sigma``, and for ``"uot-cfm"`` the `default_spreads` beside it.
    seeds
        Of the members' own random streams.
    validate
        Whether to hold back a tenth of each snapshot's cells.
    plans
        Of other snapshots with which these share intervals, and how to solve them; none by default.

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
    parts: tuple[Snapshots, ...] = (snapshots,)
    if validate:
        parts = hold_back(snapshots, fraction=HELD_BACK, rng=torch.Generator().manual_seed(DATA_SEED))
    problems: list[list[Problem]] = [[], []]
    share: float | None = None
    spreads: tuple[float, ...] | None = None if sigma is None and method == "uot-cfm" else ()
    for part, cells in zip(problems, parts):
        plans.prepare(cells.intervals(), method)
        couplings = tuple(plans.couple(interval, law, method) for interval in cells.intervals())
        if isinstance(law, Straight) and path in ("land", "rbf"):  # learned once, on the cells to train on
            law = _learned(cells, couplings, "land" if path == "land" else "rbf", law.sigma)
        bends = None
        if isinstance(law, Hermite):
            plans.prepare(cells.intervals(), "uot-cfm")
            kin: Sequence[GrowingPlan] = [plans.growing(i) for i in cells.intervals()]  # whatever the couplings are
            # as the cells to train on have it, and by places alone: who is paired by velocity seems to turn reliably
            share = reliability(cells, kin) if share is None else share
            if method == "uot-cfm":
                couplings = kin = _by_velocity(cells, kin, plans)
            bends = tangents(cells, kin, couplings, share)
        if spreads is None:  # the training cells', for those that are held back too
            spreads = default_spreads(cells, couplings, plans)
        couplings = tuple(c.pairs_alone if isinstance(c, GrowingPlan) else c for c in couplings)
        part.extend(Problem(cells, couplings, law, seed, bends, spreads) for seed in seeds)
    return problems[0], problems[1]


def _learned(snapshots: Snapshots, couplings: Sequence[Coupling], metric: Metric, sigma: float) -> ProbabilityPath:
    """Return paths learned to keep to the cells, whatever the members' seeds."""
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
    """Return plans by where cells go as well as by where they are, which their kin tell, and so on, a few times.

    Cells of the first and the last snapshot have no velocity. Over a long interval beside a very short one velocities
    are noise: it is in proportion to ``1 / g`` where the gap is ``g``, and adds to squared distances as ``(h / g)^2``
    where the interval's length is ``h``. So where that is more than ``LONG`` times ``g``, speeding up costs as over
    ``(LONG g)^2 / h`` instead of ``h``, by which what is added falls as ``(g / h)^2``.
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
        else:  # blocks of an interval are solved at once
            kin = [solve(*asked) for asked in zip(kin, intervals, *zip(*ends), times)]
    return tuple(kin)
