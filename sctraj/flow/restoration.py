"""Restorations: a population moved to another time, by a field from one or several snapshots or along a plan's pairs.

Also the controls: restorations with some of their variance removed, to see which distances reward shrinkage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .coupling import SparsePlan
from .euclidean import distances
from .integrate import Field, Integration, transport
from .plans import Plans
from .snapshots import Interval, Snapshots
from .starts import Origin


@dataclass(frozen=True)
class Restoration:
    """A predicted snapshot: points ``(n, d)`` and their masses ``(n,)``, None if all weigh the same."""

    points: Tensor
    mass: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """Masses that sum to one, ``(n,)`` float64."""
        if self.mass is None:
            return torch.full((len(self.points),), 1 / len(self.points), dtype=torch.float64)
        return self.mass / self.mass.sum()


def gathered(
    field: Field,
    snapshots: Sequence[Snapshots],
    asked: Sequence[Sequence[Origin]],
    times: Sequence[float],
    how: Integration,
    *,
    jitter: float = 0.0,
) -> list[Restoration]:
    """Move each member's snapshots to its time and combine them by their shares, all members at once.

    Parameters
    ----------
    field
        M members.
    snapshots, asked, times
        For each of the M members: its snapshots, which of them are moved with what shares, and the time to move to.
    how
        Solver, steps in each gap that is crossed, tolerance.
    jitter
        See `moved`. Each snapshot has its own noise, the same for all members.
    """
    parts: list[list[Restoration]] = [[] for _ in asked]
    # by gaps crossed and side, in the order of `origins`, so that no member's steps depend on another's
    ways = [
        {(origin.gaps, own.times[origin.snapshot] > time): origin for origin in some}
        for own, some, time in zip(snapshots, asked, times, strict=True)
    ]
    for way in sorted(set().union(*ways)):
        now = [own.get(way, some[0]) for own, some in zip(ways, asked)]  # if none, its first moves again
        cells = [(own.points[origin.snapshot], own.mass[origin.snapshot]) for own, origin in zip(snapshots, now)]
        t0 = [own.times[origin.snapshot] for own, origin in zip(snapshots, now)]
        all_the_way = replace(how, n_steps=how.n_steps * way[0])
        there = moved(field, cells, t0, times, all_the_way, jitter=jitter, seeds=[origin.snapshot for origin in now])
        for part, own, restoration in zip(parts, ways, there):
            if way in own:
                part.append(restoration)
    return [mixed(own, [origin.share for origin in some]) for own, some in zip(parts, asked)]


def mixed(parts: Sequence[Restoration], shares: Sequence[float]) -> Restoration:
    """Combine restorations into one, in which each has its share of the mass."""
    if len(parts) == 1:
        return parts[0]
    mass = torch.cat([share * part.weights for part, share in zip(parts, shares, strict=True)])
    return Restoration(torch.cat([part.points for part in parts]), mass)


def moved(
    field: Field,
    cells: Sequence[tuple[Tensor, Tensor]],
    t0: Sequence[float],
    t1: Sequence[float],
    how: Integration,
    *,
    jitter: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[Restoration]:
    """Move each member's cells from its time ``t0`` to ``t1``, all members at once.

    Parameters
    ----------
    field
        M members.
    cells
        Points ``(n, d)`` and masses ``(n,)`` of every member; the numbers of cells may differ.
    t0, t1
        Real times, M each.
    how
        Solver, steps on the whole way, tolerance.
    jitter
        Standard deviation of normal noise added to the cells, in bandwidths of a closed-form field. If the kernel is
        the path's own, the flow keeps the law of its pairs from starts as wide as the kernel, that is at 1; for a local
        kernel, 1 is too much.
    seeds
        Seeds of the members' jitter, M if there is any: the snapshot's number, as the noise belongs to the data.

    Returns
    -------
    One per member; masses are None if all cells weigh the same.
    """
    dtype, device = field.scale.dtype, field.scale.device
    points = [x.to(device, dtype) for x, _ in cells]
    largest = max(len(x) for x in points)
    # smaller snapshots are padded with their first cell, as no cell's path depends on another's
    padded = torch.stack([torch.cat([x, x[:1].expand(largest - len(x), -1)]) for x in points])
    start, end = (torch.tensor(times).double() for times in (t0, t1))
    if jitter:
        noise = torch.zeros(padded.shape, dtype=dtype)
        for own, x, seed in zip(noise, points, seeds, strict=True):
            own[: len(x)] = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        padded = padded + jitter * field.bandwidth(start[:, None, None], padded) * noise.to(device)
    there = transport(field, padded, start, end, how)
    restorations = []
    for (_, mass), x, log_mass in zip(cells, there.points.cpu(), there.log_mass.cpu().double()):
        n = len(mass)
        weighted = mass.cpu() * log_mass[:n].exp()
        same = bool((weighted == weighted[0]).all())
        restorations.append(Restoration(x[:n], None if same else weighted / weighted.sum()))
    return restorations


def interpolated(interval: Interval, time: float, plans: Plans) -> Restoration:
    """Move every pair of the exact plan along its chord to the time's fraction of the gap (McCann 1997).

    The plan's masses are the weights. At a time outside the interval the chords are extended.
    """
    plan = plans.couple(interval, None, "ot-cfm")
    assert isinstance(plan, SparsePlan)
    s = (time - interval.t0) / interval.length
    return Restoration((1 - s) * interval.x0[plan.i] + s * interval.x1[plan.j], plan.mass)


# Controls: an interpolation with variance removed, each in its own way. None restores anything better, so a distance by
# which one of them looks better rewards shrinkage.
SHRUNK = 0.8  # deviations from the mean are multiplied by this
FLATTENED = 4  # the first d / 4 of the d principal components, rounded up, are kept
SMOOTHED = 10  # number of nearest other points towards whose mean each point is moved half-way


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
