"""Restorations without a model: a copy of a neighbouring snapshot, or optimal transport interpolation between both."""

from __future__ import annotations

from .plans import Plans
from .restoration import Restoration, interpolated
from .snapshots import Interval, Snapshots

PREVIOUS, NEXT, INTERPOLATION = BASELINES = ("previous", "next", "ot-interpolation")


def neighbours(snapshots: Snapshots, time: float) -> tuple[int | None, int | None]:
    """Return the nearest snapshots before and after a time, never one at the time itself; None if there is none."""
    before = [k for k, t in enumerate(snapshots.times) if t < time]
    after = [k for k, t in enumerate(snapshots.times) if t > time]
    return (before[-1] if before else None), (after[0] if after else None)


def baseline(kept: Snapshots, time: float, name: str, plans: Plans) -> Restoration:
    """Restore the population at a time from kept snapshots.

    Parameters
    ----------
    kept
        The snapshots without the one that is restored.
    time
        Real time.
    name
        ``"previous"`` and ``"next"`` copy a neighbour, ``"ot-interpolation"`` is `interpolated` between the two.
    plans
        Couplings solved so far, which may include that between the two neighbours.

    Raises
    ------
    ValueError
        If the name is unknown, or if the neighbour to copy or the snapshots needed for the interpolation do not exist.
    """
    if name not in BASELINES:
        raise ValueError(f"expected a baseline of {', '.join(BASELINES)}, found {name!r}")
    if name == INTERPOLATION:
        return interpolated(bridge(plans.taking_part(kept), time), time, plans)
    before, after = neighbours(kept, time)
    k, side = (before, "before") if name == PREVIOUS else (after, "after")
    if k is None:
        raise ValueError(f"expected a kept snapshot {side} time {time:g} to copy, found none; leave this baseline out")
    return Restoration(kept.points[k], kept.mass[k])


def bridge(kept: Snapshots, time: float) -> Interval:
    """Return the interval between the snapshots next to a time; the last interval for a time after all of them."""
    before, after = neighbours(kept, time)
    if before is None or (after is None and before == 0):
        fewest = "one kept snapshot" if after is not None else "two kept snapshots"
        raise ValueError(f"expected at least {fewest} before time {time:g}, found too few; leave this baseline out")
    if after is None:
        return kept.intervals()[before - 1]
    apart = kept.without(before + 1) if after - before == 2 else kept  # without a snapshot at the time itself
    return apart.intervals()[before]
