"""Which snapshots are moved to another time to predict the population there, and how much each of them counts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal, NamedTuple

Start = Literal["both", "before"]
ONE_MORE = 8  # snapshots for each one on a side beyond the nearest; with fewer, noise is too hard to tell from course
MOST = 3  # snapshots on a side: no more were tried, and the way grows longer
FAINT = 0.05  # share, relative to the nearest snapshot's, below which a snapshot is not worth moving


class Origin(NamedTuple):
    """The index of a snapshot that is moved, its share of the population, and how many gaps it crosses."""

    snapshot: int
    share: float
    gaps: int


def origins(times: Sequence[float], time: float, start: Start, *, farther: float) -> list[Origin]:
    """Return the snapshots from which the population at ``time`` is predicted; their shares sum to one.

    ``"before"``: the snapshot before alone. ``"both"``: at the fraction ``s`` of the gap, the snapshots before count
    ``1 - s`` in all and those after ``s``. On each side these are the nearest one and farther ones, up to `reach` in
    all. Each has ``farther`` times the share of the next nearer one, and is left out if that is below ``FAINT`` of the
    nearest one's share. A snapshot at the time itself is never used.

    Parameters
    ----------
    times
        The snapshots' times, increasing; at least one is before ``time`` and, for ``"both"``, one after.
    farther
        From 0 to 1, see `farther_share`.

    Returns
    -------
    The nearest before, the nearest after, then the next two, and so on.

    Raises
    ------
    ValueError
        If there is no snapshot before ``time``, or for ``"both"`` none after it.
    """
    before, after = bisect_left(times, time) - 1, bisect_right(times, time)
    if before < 0 or (start == "both" and after == len(times)):
        raise ValueError(
            f"expected a time with a snapshot before it, and one after it to move both, found {time:g} of snapshots at "
            f"{times[0]:g} to {times[-1]:g}; take a time between them"
        )
    if start == "before":
        return [Origin(before, 1.0, 1)]
    s = (time - times[before]) / (times[after] - times[before])
    found = []
    for nearest, step, whole in ((before, -1, 1 - s), (after, 1, s)):
        side = [k for n in range(reach(len(times))) if 0 <= (k := nearest + step * n) < len(times)]
        weights = [w for n in range(len(side)) if (w := farther**n) >= FAINT]
        found += [Origin(k, whole * w / sum(weights), n) for n, (k, w) in enumerate(zip(side, weights), 1)]
    return sorted(found, key=lambda origin: origin.gaps)  # a stable order: before, after


def reach(n_snapshots: int) -> int:
    """Return how many snapshots on each side are moved at most, on a course of this many."""
    return min(MOST, 1 + (n_snapshots + 1) // ONE_MORE)


def farther_share(n_snapshots: int, reliability: float | None) -> float:
    """Return the weight of a snapshot relative to the next nearer one on its side, from 0 to 1.

    What a sample is off by (its own age, composition or batch) travels with its cells; over several samples it cancels,
    the more so the more evenly they count. On the other hand, the field's own errors grow with the way. If differences
    between snapshots are noise, all should count the same; if they are the course, only the nearest. So the weight is
    the share of the population's accelerations that is noise, ``1 - reliability`` (see `tangents.reliability`); it is 0
    if that is below ``FAINT`` or there are too few snapshots to `reach` beyond the nearest.

    Parameters
    ----------
    n_snapshots
        Number of snapshots to which the field was fitted.
    reliability
        None if it was not measured, as for straight paths; the weight is then 0.
    """
    if reliability is None or reach(n_snapshots) == 1 or 1.0 - reliability < FAINT:
        return 0.0
    return 1.0 - reliability
