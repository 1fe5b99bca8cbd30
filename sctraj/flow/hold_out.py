"""Leave-one-timepoint-out: the problems without a snapshot, its restorations, the baselines and the noise reference.

Each interior snapshot is held out in turn, a field is fitted to the others, and cells of the kept snapshots are moved
to the held-out time. Holding out means building the data without that snapshot; the trainer knows nothing of folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import baselines
from .baselines import INTERPOLATION
from .integrate import Field, Integration
from .plans import Plans
from .problem import Problem, make_problems, measured_whole, taking_part
from .restoration import Restoration, gathered
from .snapshots import Interval, Snapshots
from .starts import Start, origins

NOISE_REFERENCE = "noise-reference"
SMALLEST_HELD_OUT = 4  # cells: two halves of two, the fewest for the noise reference's distances


def interior(snapshots: Snapshots) -> range:
    """Return the snapshots that can be held out and restored: all but the first and the last."""
    if len(snapshots) < 3:
        raise ValueError(f"expected at least three snapshots to leave one out, found {len(snapshots)}")
    return range(1, len(snapshots) - 1)


class Folds(NamedTuple):
    """The members of all folds, the seeds of a fold following each other.

    Attributes
    ----------
    held_out
        The snapshot that each member has not seen.
    problems
        What each is trained on.
    validation
        The problems of held-back cells, one per member, or none.
    """

    held_out: list[int]
    problems: list[Problem]
    validation: list[Problem]

    def firsts(self) -> list[int]:
        """Return each fold's first member; what does not depend on a seed is the others' too."""
        return [self.held_out.index(k) for k in dict.fromkeys(self.held_out)]


def hold_out_problems(
    snapshots: Snapshots,
    *,
    method: str,
    path: str | None,
    sigma: float | None,
    seeds: Sequence[int],
    validate: bool,
    plans: Plans | None = None,
) -> Folds:
    """Build the problems of all folds and seeds: for every interior snapshot ``k``, those of the data without it.

    Arguments are those of `make_problems`.
    """
    held_out, problems, validation = [], [], []
    plans = plans or Plans()
    few = taking_part(snapshots, method, path, plans)  # the same cells in all folds, which share couplings
    folds = {k: few.without(k) for k in interior(few)}
    intervals = [interval for kept in folds.values() for interval in kept.intervals()]
    if sigma is None:
        plans.prepare([interval for interval in intervals if measured_whole(interval, plans)], "ot-cfm")
    if not validate:
        plans.prepare(intervals, method)
    for k, kept in folds.items():
        members, held_back = make_problems(
            kept, method=method, path=path, sigma=sigma, seeds=seeds, validate=validate, plans=plans
        )
        held_out += [k] * len(members)
        problems += members
        validation += held_back
    plans.forget_velocities()  # folds alone share them
    return Folds(held_out, problems, validation)


def restore(
    field: Field,
    snapshots: Snapshots,
    held_out: Sequence[int],
    how: Integration,
    *,
    start: Start,
    farther: Sequence[float] = (),
    jitter: float = 0.0,
) -> list[Restoration]:
    """Move kept cells, with the mass that they gain or lose, to each member's held-out time, all members at once.

    Parameters
    ----------
    field
        M members.
    held_out
        The snapshot that each member has not seen, ``M`` indices.
    how
        Solver, steps in each gap that is crossed, tolerance.
    start
        ``"before"``: all cells of the snapshot before (the published protocol). ``"both"``: also those of the snapshot
        after, backwards in time, and possibly of farther snapshots on each side, see `origins`.
    farther
        Weight of snapshots beyond the nearest, one number per member, see `farther_share`; by default 0.
    jitter
        See `moved`.

    Returns
    -------
    One per member; masses are None where all cells weigh the same.
    """
    asked = []
    for k, share in zip(held_out, farther or [0.0] * len(held_out), strict=True):
        kept = [i for i in range(len(snapshots)) if i != k]
        found = origins([snapshots.times[i] for i in kept], snapshots.times[k], start, farther=share)
        asked.append([origin._replace(snapshot=kept[origin.snapshot]) for origin in found])
    times = [snapshots.times[k] for k in held_out]
    return gathered(field, [snapshots] * len(asked), asked, times, how, jitter=jitter)


def baseline(snapshots: Snapshots, k: int, name: str, plans: Plans | None = None) -> Restoration:
    """Restore snapshot ``k`` from its kept neighbours without a model, see `baselines.baseline`."""
    plans = plans or Plans()
    few = plans.taking_part(snapshots) if name == INTERPOLATION else snapshots  # known tensors: no new plan
    return baselines.baseline(few.without(k), snapshots.times[k], name, plans)


def across(snapshots: Snapshots, k: int, plans: Plans) -> Interval:
    """Return the interval across snapshot ``k``, between the cells of its neighbours that take part in couplings."""
    return plans.taking_part(snapshots).without(k).intervals()[k - 1]


def halves(cells: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split cells ``(n, d)`` into two random halves, ``(n // 2, d)`` and the rest; their distance is noise alone."""
    order = torch.randperm(len(cells), generator=rng)
    return cells[order[: len(cells) // 2]], cells[order[len(cells) // 2 :]]
