"""The tasks of the benchmark, by name: which cells are kept and which are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..flow.hold_out import SMALLEST_HELD_OUT

Start = Literal["both", "before", "first"]
STARTS = get_args(Start)
SHARE = 5  # one in so many of a snapshot's cells is held out if single cells are

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Fold:
    """One split of the cells: rows of the data that a method sees, and rows that it must restore.

    Attributes
    ----------
    times
        Real times of the kept snapshots, increasing.
    kept
        Rows of each kept snapshot.
    held_out_times
        Real times to restore.
    held_out
        Rows of the held-out cells at each; none of them is in ``kept``.
    """

    times: tuple[float, ...]
    kept: tuple[Rows, ...]
    held_out_times: tuple[float, ...]
    held_out: tuple[Rows, ...]

    @property
    def key(self) -> tuple[tuple[float, ...], bytes]:
        """Key that is the same for all folds with the same kept cells."""
        return self.times, np.concatenate(self.kept).tobytes()


_Splits = Callable[[int], Sequence[tuple[Sequence[int], Sequence[int]]]]


@dataclass(frozen=True)
class Task:
    """A named way to hold cells out.

    Attributes
    ----------
    name
        As in ``TASKS``.
    least
        Number of snapshots that a course must have.
    starts
        Which snapshots may be moved to the held-out time.
    splits
        Function from the number of snapshots to those kept and those held out, fold by fold. If a snapshot is both, a
        random fifth of its cells is held out and the rest kept.
    needs
        Why ``least`` snapshots are needed.
    by_seed
        Whether the folds depend on a seed, as those that hold out a random part of a snapshot do.
    """

    name: str
    least: int
    starts: tuple[Start, ...]
    splits: _Splits
    needs: str
    by_seed: bool = False

    def check(self, n_snapshots: int, start: str) -> None:
        """Raise a ValueError if a course is too short for the task, or the start does not suit it."""
        if n_snapshots < self.least:
            raise ValueError(
                f"expected at least {self.least} snapshots for {self.name} ({self.needs}), found {n_snapshots}; "
                f"take another task or a longer course"
            )
        if start not in self.starts:
            raise ValueError(f"expected a start of {', '.join(self.starts)} for {self.name}, found {start!r}")

    def folds(self, times: Sequence[float], index: Sequence[Rows], seed: int) -> Iterator[Fold]:
        """Yield the folds of a course.

        Parameters
        ----------
        times
            Real times of its snapshots, increasing.
        index
            Rows of each snapshot.
        seed
            Seed of the split if single cells are held out; the folds of other tasks do not depend on it.
        """
        if len(times) < self.least:
            self.check(len(times), self.starts[0])
        for kept, held_out in self.splits(len(times)):
            seen, unseen = {k: index[k] for k in kept}, {k: index[k] for k in held_out}
            for k in seen.keys() & unseen.keys():
                seen[k], unseen[k] = _split(index[k], times[k], np.random.default_rng([seed, k]))
            yield Fold(
                tuple(float(times[k]) for k in seen),
                tuple(seen.values()),
                tuple(float(times[k]) for k in unseen),
                tuple(unseen.values()),
            )


def _split(rows: Rows, time: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Split a snapshot's rows at random into those to keep and a fifth to hold out, each in their original order."""
    n = len(rows) // SHARE
    if n < SMALLEST_HELD_OUT:
        raise ValueError(
            f"expected at least {SHARE * SMALLEST_HELD_OUT} cells in an interior snapshot to hold one in {SHARE} out, "
            f"found {len(rows)} at time {time:g}; merge times or take another task"
        )
    order = rng.permutation(len(rows))
    return rows[np.sort(order[n:])], rows[np.sort(order[:n])]


def _but(n: int, held_out: Sequence[int]) -> tuple[list[int], Sequence[int]]:
    return [k for k in range(n) if k not in held_out], held_out


def _every(step: int) -> _Splits:
    def splits(n: int) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        kept = range(0, n, step)  # snapshots after the last of these are neither kept nor held out
        return [(kept, [k for k in range(kept[-1]) if k not in kept])]

    return splits


_ALL: tuple[Start, ...] = STARTS
_FORWARDS: tuple[Start, ...] = ("before", "first")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        # each interior snapshot in turn
        Task(
            "leave-one-out", 3, _ALL, lambda n: [_but(n, [k]) for k in range(1, n - 1)], "one between two that are kept"
        ),
        # each pair of consecutive interior snapshots: one gap of three intervals, two times to restore in it
        Task(
            "leave-two-out",
            4,
            _ALL,
            lambda n: [_but(n, [k, k + 1]) for k in range(1, n - 2)],
            "two in a row between two that are kept",
        ),
        # the last snapshot from those before it
        Task("extrapolation", 3, _FORWARDS, lambda n: [_but(n, [n - 1])], "an interval to learn from, and one beyond"),
        # every second or fourth snapshot kept, those between them held out
        Task("every-2nd", 3, _ALL, _every(2), "one between the first and the third"),
        Task("every-4th", 5, _ALL, _every(4), "three between the first and the fifth"),
        # a random fifth of each interior snapshot's cells, at a time whose other cells are seen
        Task("cells", 3, _FORWARDS, lambda n: [(range(n), [k]) for k in range(1, n - 1)], "one with two neighbours",
             by_seed=True),
    )
}  # fmt: skip


def find_task(name: str) -> Task:
    """Return a task by its name."""
    if name not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, found {name!r}")
    return TASKS[name]
