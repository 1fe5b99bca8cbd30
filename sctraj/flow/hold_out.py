"""Leave-one-timepoint-out: the problems, the restorations, the baselines and the noise reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coupling import blocked
from .distance import energy_distance, median_distance, mmd, restoration_plan, variance_ratio, wasserstein
from .integrate import Field, Solver, push
from .problem import Problem, make_problems
from .snapshots import Interval, Snapshots

METRICS = ("w1", "w2", "mmd", "energy", "variance_ratio")
BASELINES = ("previous", "next", "ot-interpolation")
NOISE_REFERENCE = "noise-reference"


@dataclass(frozen=True)
class Restoration:
    """A predicted snapshot: points ``(n, d)`` and their masses ``(n,)``, None where all weigh the same."""

    points: Tensor
    mass: Tensor | None = None


def interior(snapshots: Snapshots) -> range:
    """Return the snapshots that can be held out and restored: all but the first and the last."""
    if len(snapshots) < 3:
        raise ValueError(f"expected at least three snapshots to leave one out, found {len(snapshots)}")
    return range(1, len(snapshots) - 1)


def hold_out_problems(
    snapshots: Snapshots, *, method: str, sigma: float | None, seeds: Sequence[int], validate: bool
) -> tuple[list[int], list[Problem], list[Problem]]:
    """Build the problems of all folds and seeds: for every interior snapshot ``k``, those of the data without it.

    Returns
    -------
    The snapshot that each member has not seen, the problems, and those of held-back cells (see ``make_problems``).
    """
    held_out, problems, validation = [], [], []
    for k in interior(snapshots):
        members, held_back = make_problems(
            snapshots.without(k), method=method, sigma=sigma, seeds=seeds, validate=validate
        )
        held_out += [k] * len(members)
        problems += members
        validation += held_back
    return held_out, problems, validation


def restore(
    field: Field, snapshots: Snapshots, held_out: Sequence[int], *, solver: Solver, n_steps: int, tolerance: float
) -> list[Tensor]:
    """Push all cells of the snapshot before each member's held-out one to the held-out time, all members at once.

    Parameters
    ----------
    field
        M members.
    held_out
        The snapshot that each member has not seen, ``M`` indices.

    Returns
    -------
    One tensor ``(n, d)`` per member.
    """
    dtype, device = field.scale.dtype, field.scale.device
    cells = [snapshots.points[k - 1].to(device, dtype) for k in held_out]
    largest = max(len(x) for x in cells)
    # shorter snapshots are filled up with their first cell: no cell's path depends on another's
    padded = torch.stack([torch.cat([x, x[:1].expand(largest - len(x), -1)]) for x in cells])
    t0, t1 = (torch.tensor([snapshots.times[k + shift] for k in held_out]).double() for shift in (-1, 0))
    moved = push(field, padded, t0, t1, solver=solver, n_steps=n_steps, tolerance=tolerance)
    return [y[: len(x)].cpu() for x, y in zip(cells, moved)]


def baseline(snapshots: Snapshots, k: int, name: str) -> Restoration:
    """Restore snapshot ``k`` without a model, from its kept neighbours.

    ``"previous"`` and ``"next"`` copy a neighbour. ``"ot-interpolation"`` takes the exact plan between the two and
    moves every pair along its chord to the real fraction of the gap, the plan's masses as weights (McCann 1997).
    """
    kept = snapshots.without(k)
    if name == "previous":
        return Restoration(kept.points[k - 1], kept.mass[k - 1])
    if name == "next":
        return Restoration(kept.points[k], kept.mass[k])
    interval: Interval = kept.intervals()[k - 1]
    plan = blocked(interval, torch.Generator().manual_seed(0))
    s = (snapshots.times[k] - interval.t0) / interval.length
    return Restoration((1 - s) * interval.x0[plan.i] + s * interval.x1[plan.j], plan.mass)


def halves(cells: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split cells ``(n, d)`` into two random halves, ``(n // 2, d)`` and the rest: what noise alone amounts to."""
    order = torch.randperm(len(cells), generator=rng)
    return cells[order[: len(cells) // 2]], cells[order[len(cells) // 2 :]]


@dataclass(frozen=True)
class Judgement:
    """A restoration's distances by the names of ``METRICS``, and each observed cell's share and barycentre."""

    values: dict[str, float]
    share: Tensor
    barycentre: Tensor


def judge(restoration: Restoration, observed: Tensor, *, mass: Tensor | None = None) -> Judgement:
    """Measure the distances between a restoration and the observed cells ``(m, d)`` of the held-out snapshot."""
    points, weights = restoration.points, {"weights_x": restoration.mass, "weights_y": mass}
    plan = restoration_plan(points, observed, **weights)
    values = {
        "w1": plan.distance,
        "w2": wasserstein(points, observed, p=2, **weights),
        "mmd": mmd(points, observed, bandwidth=median_distance(observed), **weights),
        "energy": energy_distance(points, observed, **weights),
        "variance_ratio": variance_ratio(points, observed, **weights),
    }
    return Judgement(values, plan.share, plan.barycentre)
