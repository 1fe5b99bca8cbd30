"""From which snapshots a population is moved to another time, and how much each of them counts there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal, NamedTuple

Start = Literal["both", "before"]
ONE_MORE = 8  # snapshots for each one on a side beside the nearest: of fewer, noise and course are too hard to tell
MOST = 3  # on a side: nothing was measured beyond, and the way grows longer
FAINT = 0.05  # of the nearest one's share, below which a snapshot is not worth its way


class Origin(NamedTuple):
    """A snapshot that is moved, by its index; its share of the population; how many gaps it crosses."""

    snapshot: int
    share: float
    gaps: int


def origins(times: Sequence[float], time: float, start: Start, *, farther: float) -> list[Origin]:
    """Return the snapshots that a population at ``time`` is moved from; their shares sum to one.

    ``"before"``: the snapshot before alone. ``"both"``: at the fraction ``s`` of the gap those before count ``1 - s``
    in all and those after ``s``. On each side that is the nearest, and up to `reach` in all, each with ``farther``
    times the share of the one nearer, as long as that is not below ``FAINT`` of the nearest one's. Never a snapshot at
    the time itself.

    Parameters
    ----------
    times
        Of the snapshots, increasing; one of them is before ``time``, and for ``"both"`` one after.
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
    """Return how many snapshots on a side a population is moved from at most, of a course with this many."""
    return min(MOST, 1 + (n_snapshots + 1) // ONE_MORE)


def farther_share(n_snapshots: int, reliability: float | None) -> float:
    """Return how much a snapshot counts beside the next nearer one on its side, from 0 to 1.

    What a sample is off by (an age, a composition, a batch of its own) travels with its cells, and of several samples
    the more cancels the more evenly they count; over a longer way the field's own errors grow. Where differences
    between snapshots are noise, all count the same; where they are the course, the nearest alone: the share is that of
    the population's accelerations which is noise, ``1 - reliability`` (`tangents.reliability`), or 0 where that is
    below ``FAINT`` or snapshots are too few to `reach` beyond the nearest.

    Parameters
    ----------
    n_snapshots
        That the field was made from.
    reliability
        None where it was not asked for, as for straight paths; the share is then 0.
    """
    if reliability is None or reach(n_snapshots) == 1 or 1.0 - reliability < FAINT:
        return 0.0
    return 1.0 - reliability
