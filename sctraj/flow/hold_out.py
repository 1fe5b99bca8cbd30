"""Leave-one-timepoint-out: the problems, the restorations, the baselines and the noise reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .clouds import Estimate, median_distance
from .coupling import SparsePlan
from .coupling.blocked import at_once
from .distance import variance_ratio
from .distance_estimates import estimated_wasserstein, restoration_plan
from .euclidean import distances
from .integrate import Field, Solver, transport
from .pairwise_estimates import estimated_pairwise, within
from .plans import Plans
from .problem import DATA_SEED, DISPLACEMENT_CELLS, Problem, make_problems, taking_part
from .snapshots import Interval, Snapshots
from .starts import Origin, Start, origins

METRICS = ("w1", "w2", "mmd", "energy", "variance_ratio")
UNWEIGHTED = ("w1", "energy")  # of these also without the restoration's own masses, all its points weighing the same
BASELINES = ("previous", "next", "ot-interpolation")
NOISE_REFERENCE = "noise-reference"
SMALLEST_HELD_OUT = 4  # cells: two halves of two, so that the noise reference's distances can be taken
JUDGED_ENTRIES = 2**27  # of the cost matrices of restorations judged at once, a GiB; a plan takes a few times that


@dataclass(frozen=True)
class Restoration:
    """A predicted snapshot: points ``(n, d)`` and their masses ``(n,)``, None where all weigh the same."""

    points: Tensor
    mass: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """Masses that sum to one, ``(n,)`` float64."""
        if self.mass is None:
            return torch.full((len(self.points),), 1 / len(self.points), dtype=torch.float64)
        return self.mass / self.mass.sum()


def interior(snapshots: Snapshots) -> range:
    """Return the snapshots that can be held out and restored: all but the first and the last."""
    if len(snapshots) < 3:
        raise ValueError(f"expected at least three snapshots to leave one out, found {len(snapshots)}")
    return range(1, len(snapshots) - 1)


def hold_out_problems(
    snapshots: Snapshots,
    *,
    method: str,
    path: str | None,
    sigma: float | None,
    seeds: Sequence[int],
    validate: bool,
    plans: Plans | None = None,
) -> tuple[list[int], list[Problem], list[Problem]]:
    """Build the problems of all folds and seeds: for every interior snapshot ``k``, those of the data without it.

    Returns
    -------
    The snapshot that each member has not seen, the problems, and those of held-back cells (see ``make_problems``).
    """
    held_out, problems, validation = [], [], []
    plans = plans or Plans()
    few = taking_part(snapshots, method, path, plans)  # of all folds, which share couplings of the same cells
    folds = {k: few.without(k) for k in interior(few)}
    intervals = [interval for kept in folds.values() for interval in kept.intervals()]
    if sigma is None:
        measured = [i for i in intervals if max(len(i.x0), len(i.x1)) <= DISPLACEMENT_CELLS]
        plans.prepare(measured, "ot-cfm", torch.get_num_threads())
    if not validate and method in ("ot-cfm", "uot-cfm"):
        plans.prepare(intervals, method, torch.get_num_threads())
    for k, kept in folds.items():
        members, held_back = make_problems(
            kept, method=method, path=path, sigma=sigma, seeds=seeds, validate=validate, plans=plans
        )
        held_out += [k] * len(members)
        problems += members
        validation += held_back
    plans.forget_velocities()  # folds alone share them
    return held_out, problems, validation


def restore(
    field: Field,
    snapshots: Snapshots,
    held_out: Sequence[int],
    *,
    start: Start,
    solver: Solver,
    n_steps: int,
    tolerance: float,
    farther: Sequence[float] = (),
    jitter: float = 0.0,
) -> list[Restoration]:
    """Move kept cells to each member's held-out time, all members at once, with the mass that they gain or lose.

    Parameters
    ----------
    field
        M members.
    held_out
        The snapshot that each member has not seen, ``M`` indices.
    start
        ``"before"``: all cells of the snapshot before (the published protocol). ``"both"``: those of the snapshot
        after as well, backwards in time, and of more of them on each side, see `origins`.
    n_steps
        In each gap that is crossed.
    farther
        Each member's share of snapshots beyond the nearest, see `farther_share`; without, none have any.
    jitter
        See `moved`.

    Returns
    -------
    One per member; masses are None where all cells weigh the same.
    """
    rng = torch.Generator().manual_seed(DATA_SEED)
    asked = []
    for k, share in zip(held_out, farther or [0.0] * len(held_out), strict=True):
        kept = [i for i in range(len(snapshots)) if i != k]
        found = origins([snapshots.times[i] for i in kept], snapshots.times[k], start, farther=share)
        asked.append([origin._replace(snapshot=kept[origin.snapshot]) for origin in found])
    return gathered(
        field,
        [snapshots] * len(asked),
        asked,
        [snapshots.times[k] for k in held_out],
        solver=solver,
        n_steps=n_steps,
        tolerance=tolerance,
        jitter=jitter,
        rng=rng,
    )


def gathered(
    field: Field,
    snapshots: Sequence[Snapshots],
    asked: Sequence[Sequence[Origin]],
    times: Sequence[float],
    *,
    solver: Solver,
    n_steps: int,
    tolerance: float,
    jitter: float = 0.0,
    rng: torch.Generator | None = None,
) -> list[Restoration]:
    """Move each member's snapshots to its time and put them together by their shares, all members at once.

    Parameters
    ----------
    field
        M members.
    snapshots, asked, times
        M each: a member's snapshots, which of them are moved and how much each counts, and the time they are moved to.
    n_steps
        In each gap that is crossed.
    """
    parts: list[list[Restoration]] = [[] for _ in asked]
    # by way and side, which is the order of `origins`, so that no member's steps depend on another's
    ways = [
        {(origin.gaps, own.times[origin.snapshot] > time): origin for origin in some}
        for own, some, time in zip(snapshots, asked, times, strict=True)
    ]
    for way in sorted(set().union(*ways)):
        now = [own.get(way, some[0]) for own, some in zip(ways, asked)]  # who has no such snapshot goes along once more
        cells = [(own.points[origin.snapshot], own.mass[origin.snapshot]) for own, origin in zip(snapshots, now)]
        t0 = [own.times[origin.snapshot] for own, origin in zip(snapshots, now)]
        steps = n_steps * way[0]
        there = moved(
            field, cells, t0, times, solver=solver, n_steps=steps, tolerance=tolerance, jitter=jitter, rng=rng
        )
        for part, own, restoration in zip(parts, ways, there):
            if way in own:
                part.append(restoration)
    return [mixed(own, [origin.share for origin in some]) for own, some in zip(parts, asked)]


def mixed(parts: Sequence[Restoration], shares: Sequence[float]) -> Restoration:
    """Put restorations together, each weighing its share in all."""
    if len(parts) == 1:
        return parts[0]
    mass = torch.cat([share * part.weights for part, share in zip(parts, shares, strict=True)])
    return Restoration(torch.cat([part.points for part in parts]), mass)


def moved(
    field: Field,
    cells: Sequence[tuple[Tensor, Tensor]],
    t0: Sequence[float],
    t1: Sequence[float],
    *,
    solver: Solver,
    n_steps: int,
    tolerance: float,
    jitter: float = 0.0,
    rng: torch.Generator | None = None,
) -> list[Restoration]:
    """Move each member's cells from its time ``t0`` to ``t1``, all members at once.

    Parameters
    ----------
    field
        M members.
    cells
        Points ``(n, d)`` and masses ``(n,)`` of every member; numbers of cells may differ.
    t0, t1
        Real times, M each.
    jitter
        Standard deviation of normal noise on the cells, in bandwidths of a closed-form field. Its flow keeps the law of
        its pairs from starts as wide as its kernel, 1; cells themselves, 0, end up a little too close together.
    rng
        Of the jitter, on the CPU; there must be one if there is jitter.

    Returns
    -------
    One per member; masses are None where all cells weigh the same.
    """
    dtype, device = field.scale.dtype, field.scale.device
    points = [x.to(device, dtype) for x, _ in cells]
    largest = max(len(x) for x in points)
    # shorter snapshots are filled up with their first cell: no cell's path depends on another's
    padded = torch.stack([torch.cat([x, x[:1].expand(largest - len(x), -1)]) for x in points])
    start, end = (torch.tensor(times).double() for times in (t0, t1))
    if jitter:
        noise = torch.randn(padded.shape, generator=rng, dtype=dtype)
        padded = padded + jitter * field.bandwidth(start[:, None, None], padded) * noise.to(device)
    there = transport(field, padded, start, end, solver=solver, n_steps=n_steps, tolerance=tolerance)
    restorations = []
    for (_, mass), x, log_mass in zip(cells, there.points.cpu(), there.log_mass.cpu().double()):
        n = len(mass)
        weighted = mass.cpu() * log_mass[:n].exp()
        same = bool((weighted == weighted[0]).all())
        restorations.append(Restoration(x[:n], None if same else weighted / weighted.sum()))
    return restorations


def baseline(snapshots: Snapshots, k: int, name: str, plans: Plans | None = None) -> Restoration:
    """Restore snapshot ``k`` without a model, from its kept neighbours.

    ``"previous"`` and ``"next"`` copy a neighbour, ``"ot-interpolation"`` is `interpolated` between the two, by their
    plan if it is among ``plans``.
    """
    kept = snapshots.without(k)
    if name == "previous":
        return Restoration(kept.points[k - 1], kept.mass[k - 1])
    if name == "next":
        return Restoration(kept.points[k], kept.mass[k])
    plans = plans or Plans()
    return interpolated(across(snapshots, k, plans), snapshots.times[k], plans)


def across(snapshots: Snapshots, k: int, plans: Plans) -> Interval:
    """Return the interval that bridges snapshot ``k``, between the cells that take part in couplings."""
    return plans.taking_part(snapshots).without(k).intervals()[k - 1]


def interpolated(interval: Interval, time: float, plans: Plans) -> Restoration:
    """Move every pair of the exact plan along its chord to the real fraction of the gap (McCann 1997).

    The plan's masses are the weights. At a time outside the interval chords are drawn out.
    """
    plan = plans.couple(interval, None, "ot-cfm")
    assert isinstance(plan, SparsePlan)
    s = (time - interval.t0) / interval.length
    return Restoration((1 - s) * interval.x0[plan.i] + s * interval.x1[plan.j], plan.mass)


def halves(cells: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split cells ``(n, d)`` into two random halves, ``(n // 2, d)`` and the rest: what noise alone amounts to."""
    order = torch.randperm(len(cells), generator=rng)
    return cells[order[: len(cells) // 2]], cells[order[len(cells) // 2 :]]


@dataclass(frozen=True)
class Judgement:
    """A restoration's distances by the names of ``METRICS``, and each observed cell's share and barycentre.

    ``unweighted`` has those of ``UNWEIGHTED`` with all points of the restoration weighing the same, ``errors`` the
    standard errors of distances of either that were estimated, because there are too many points to meet at once.
    """

    values: dict[str, float]
    unweighted: dict[str, float]
    share: Tensor
    barycentre: Tensor
    errors: dict[str, float]


class Observed:
    """The cells of a held-out snapshot, ``points`` ``(m, d)`` and their ``mass``, and what all restorations share."""

    def __init__(self, points: Tensor, mass: Tensor | None = None) -> None:
        self.points, self.mass = points, mass

    @cached_property
    def bandwidth(self) -> float:
        """Median distance: of the kernel of the MMD."""
        return median_distance(self.points)

    @cached_property
    def within(self) -> NDArray[np.float64] | None:
        """Means over the pairs of these cells alone."""
        return within(self.points, bandwidth=self.bandwidth, weights=self.mass)


def judge(restoration: Restoration, observed: Observed, *, rng: int = 0) -> Judgement:
    """Measure the distances between a restoration and the observed cells of the held-out snapshot.

    Where there are many points some are estimates (see `distance.Estimate`), from blocks that ``rng`` draws.
    """
    x, y, weights = restoration.points, observed.points, [restoration.mass]
    if restoration.mass is not None and not bool((restoration.mass == restoration.mass[0]).all()):
        weights.append(None)
    plan = restoration_plan(x, y, weights_x=restoration.mass, weights_y=observed.mass, rng=rng)
    both = {"weights_x": restoration.mass, "weights_y": observed.mass}
    pairwise = estimated_pairwise(
        x,
        y,
        bandwidth=observed.bandwidth,
        weights_x=weights,
        weights_y=observed.mass,
        rng=rng,
        within_y=observed.within,
    )
    found = {
        "w1": Estimate(plan.distance, plan.error, 0),
        "w2": estimated_wasserstein(x, y, p=2, rng=rng, **both),
        "mmd": pairwise[0].mmd,
        "energy": pairwise[0].energy,
    }
    equal = {name: found[name] for name in UNWEIGHTED}
    if len(weights) > 1:
        equal = {"w1": estimated_wasserstein(x, y, weights_y=observed.mass, rng=rng), "energy": pairwise[1].energy}
    values = {name: estimate.value for name, estimate in found.items()}
    values["variance_ratio"] = variance_ratio(x, y, **both)
    errors = found | {f"{name}_unweighted": estimate for name, estimate in equal.items()}
    return Judgement(
        values,
        {name: estimate.value for name, estimate in equal.items()},
        plan.share,
        plan.barycentre,
        {name: estimate.error for name, estimate in errors.items() if estimate.error > 0},
    )


def judge_all(tasks: Sequence[tuple[Restoration, Tensor]]) -> list[Judgement]:
    """Judge restorations, each beside its observed cells, on torch's number of threads; the number changes no bit.

    Restorations beside the same tensor share what is its own.
    """
    observed = {id(cells): Observed(cells) for _, cells in tasks}
    largest = max((len(restoration.points) * len(cells) for restoration, cells in tasks), default=1)
    parts = [(restoration, observed[id(cells)]) for restoration, cells in tasks]
    return at_once(judge, parts, max(1, min(torch.get_num_threads(), JUDGED_ENTRIES // largest)))


# Controls: an interpolation with variance taken away, each in its own way. None restores anything better, so a distance
# by which one gains rewards shrinkage.
SHRUNK = 0.8  # deviations from the mean are multiplied by this
FLATTENED = 4  # of the d principal components the first d / 4, rounded up, are kept
SMOOTHED = 10  # nearest other points, half-way to whose mean each point goes


def shrunk(restoration: Restoration) -> Restoration:
    """Pull all points towards their mean by the factor ``SHRUNK``."""
    points = restoration.points.double()
    mean = restoration.weights.to(points) @ points
    return Restoration(mean + SHRUNK * (points - mean), restoration.mass)


def flattened(restoration: Restoration) -> Restoration:
    """Set all but the first quarter of the restoration's own principal components to their mean."""
    points, mass = restoration.points.double(), restoration.weights.to(restoration.points.device)
    mean = mass @ points
    deviation = points - mean
    axes = torch.linalg.eigh(deviation.T @ (mass[:, None] * deviation)).eigenvectors  # least variance first
    kept = axes[:, -math.ceil(points.shape[1] / FLATTENED) :]
    return Restoration(mean + deviation @ kept @ kept.T, restoration.mass)


def smoothed(restoration: Restoration) -> Restoration:
    """Move every point half-way to the mean of the ``SMOOTHED`` other points of the restoration nearest to it."""
    points = restoration.points.double().cpu()
    distance = distances(points, points).fill_diagonal_(math.inf)
    nearest = distance.topk(min(SMOOTHED, len(points) - 1), largest=False).indices
    return Restoration((points + points[nearest].mean(1)) / 2, restoration.mass)


CONTROLS = {"shrunk": shrunk, "flattened": flattened, "smoothed": smoothed}
