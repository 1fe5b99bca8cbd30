"""Snapshots: the cells sampled at each time, the intervals between them, and samples of their cells."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

COARSEST = 2e-6  # gap over time, at which rounding in single precision puts a time off by a twentieth of the gap

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Interval:
    """Two consecutive kept snapshots.

    Attributes
    ----------
    t0, t1
        Real times, ``t0 < t1``.
    x0, x1
        Cells, ``(n0, d)`` and ``(n1, d)``.
    mass0, mass1
        Weights of the cells, ``(n0,)`` and ``(n1,)``, float64, each summing to one.
    growth0
        Prior growth rates of the cells at the start, ``(n0,)`` per unit of time; None where there is no prior.
    """

    t0: float
    t1: float
    x0: Tensor
    x1: Tensor
    mass0: Tensor
    mass1: Tensor
    growth0: Tensor | None = None

    @property
    def length(self) -> float:
        """The interval's length in real time."""
        return self.t1 - self.t0


@dataclass(frozen=True)
class Snapshots:
    """Samples of a population at increasing real times.

    Parameters
    ----------
    times
        ``T`` real times, strictly increasing; gaps may be uneven.
    points
        One floating-point tensor ``(n_k, d)`` per time.
    mass
        One tensor ``(n_k,)`` of non-negative weights per time; uniform by default. Normalised to sum to one.
    growth
        One tensor ``(n_k,)`` of prior growth rates per time (log mass change per unit of time), or none.

    Raises
    ------
    ValueError
        If times do not increase, are not finite or are too close together for single precision; if the numbers of times
        and snapshots differ, or dimensions differ; if a snapshot is empty; if a weight is negative or all are zero; or
        if a growth rate is not finite.
    """

    times: tuple[float, ...]
    points: tuple[Tensor, ...]
    mass: tuple[Tensor, ...] = ()
    growth: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        times, points = tuple(float(t) for t in self.times), tuple(self.points)
        if len(times) != len(points) or not points:
            raise ValueError(f"expected one snapshot per time and at least one, found {len(times)}, {len(points)}")
        if any(not b > a for a, b in pairwise(times)) or not all(abs(t) < float("inf") for t in times):
            raise ValueError(f"expected finite, strictly increasing times, found {times}; merge or sort the snapshots")
        for a, b in pairwise(times):
            if b - a < COARSEST * max(abs(a), abs(b)):
                raise ValueError(
                    f"expected times that single precision tells apart, found {a!r} and {b!r}: if they are one time, "
                    f"round the times, or else subtract the first time from all"
                )
        shapes = [tuple(x.shape) for x in points]
        if any(len(s) != 2 or s[0] == 0 or s[1] != shapes[0][1] for s in shapes):
            raise ValueError(f"expected non-empty snapshots (n_k, d) of one dimension d, found shapes {shapes}")
        if any(not x.is_floating_point() for x in points):
            raise ValueError(f"expected floating-point cells, found {[x.dtype for x in points]}; convert them first")
        mass = self.mass or tuple(x.new_ones(len(x), dtype=torch.float64) for x in points)
        for k, (m, x) in enumerate(zip(mass, points, strict=True)):
            if m.shape != (len(x),) or not bool((m >= 0).all()) or not float(m.sum()) > 0:
                raise ValueError(f"expected {len(x)} non-negative weights with a positive sum in snapshot {k}")
        for k, (g, x) in enumerate(zip(self.growth, points, strict=bool(self.growth))):
            if g.shape != (len(x),) or not bool(g.isfinite().all()):
                raise ValueError(f"expected {len(x)} finite growth rates in snapshot {k}, found shape {tuple(g.shape)}")
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "mass", tuple(m.double() / m.double().sum() for m in mass))

    def __len__(self) -> int:
        return len(self.times)

    @property
    def dimension(self) -> int:
        """Number of coordinates ``d``."""
        return self.points[0].shape[1]

    @property
    def mean_gap(self) -> float:
        """Mean length of the intervals, in units of time."""
        return (self.times[-1] - self.times[0]) / (len(self) - 1)

    def without(self, k: int) -> Snapshots:
        """Return the same data without snapshot ``k``: the only way in which anything is held out."""
        if not 0 <= k < len(self):
            raise IndexError(f"expected a snapshot from 0 to {len(self) - 1}, found {k}")
        fields = self.times, self.points, self.mass, self.growth
        return Snapshots(*((*field[:k], *field[k + 1 :]) for field in fields))

    def intervals(self) -> tuple[Interval, ...]:
        """Return the ``T - 1`` intervals between consecutive snapshots."""
        rows = zip(self.times, self.points, self.mass, self.growth or [None] * len(self))
        return tuple(Interval(t0, t1, x0, x1, m0, m1, g0) for (t0, x0, m0, g0), (t1, x1, m1, _) in pairwise(rows))


def hold_back(snapshots: Snapshots, *, fraction: float, rng: torch.Generator) -> tuple[Snapshots, Snapshots]:
    """Split every snapshot's cells at random into training cells and a ``fraction`` of validation cells."""
    train, validation = [], []
    for x in snapshots.points:
        n = min(max(1, round(fraction * len(x))), len(x) - 1)
        order = torch.randperm(len(x), generator=rng).to(x.device)
        validation.append(order[:n].sort().values)
        train.append(order[n:].sort().values)
    return _cells(snapshots, train), _cells(snapshots, validation)


def resampled(snapshots: Snapshots, seed: int) -> Snapshots:
    """Return a bootstrap: each cell weighs as often as it is drawn, of as many draws with replacement as cells."""
    rng = torch.Generator().manual_seed(seed)
    mass = []
    for m in snapshots.mass:
        drawn = torch.multinomial(m.cpu(), len(m), replacement=True, generator=rng)
        mass.append(torch.bincount(drawn, minlength=len(m)).to(m))
    return dataclasses.replace(snapshots, mass=tuple(mass))


def sampled(mass: Tensor, most: int) -> Tensor:
    """Choose at random ``most`` of the cells with mass, or all of these if there are no more; return sorted indices.

    The choice depends on the weights ``(n,)`` alone, and a larger sample contains every smaller one.
    """
    order = torch.randperm(len(mass), generator=torch.Generator().manual_seed(len(mass))).to(mass.device)
    return order[mass[order] > 0][:most].sort().values


def thinned(snapshots: Snapshots, most: int) -> Snapshots:
    """Return the snapshots, those of more than ``most`` cells thinned to ``most`` cells with mass (see `sampled`).

    Snapshots that lose no cell stay the same tensors, by which couplings are recognised.
    """
    chosen = [torch.arange(len(m)) if len(m) <= most else sampled(m, most) for m in snapshots.mass]
    fewer = [None if len(rows) == len(m) else rows for rows, m in zip(chosen, snapshots.mass)]
    return snapshots if fewer == [None] * len(fewer) else _cells(snapshots, fewer)


def _cells(snapshots: Snapshots, chosen: Sequence[Tensor | None]) -> Snapshots:
    """Return the snapshots with only the chosen cells of each, indices ``(m_k,)``; None: with all, as they are."""
    columns = (
        tuple(values if rows is None else values[rows] for values, rows in zip(column, chosen))
        for column in (snapshots.points, snapshots.mass, snapshots.growth)
    )
    return Snapshots(snapshots.times, *columns)


def applied(record: _Record, fn: Callable[[Tensor], Tensor]) -> _Record:
    """Return a record with a function applied to all of its tensors, including those of nested records and tuples.

    The result is not checked again: checks make the host wait for a GPU, and compute in float64.
    """
    if isinstance(record, Tensor):
        return fn(record)  # type: ignore[return-value]
    if isinstance(record, tuple):
        return tuple(applied(value, fn) for value in record)  # type: ignore[return-value]
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        other = copy.copy(record)
        for name, value in vars(record).items():  # cached properties included
            object.__setattr__(other, name, applied(value, fn))
        return other
    return record


def to_device(record: _Record, device: torch.device) -> _Record:
    """Move every tensor of a record (and of nested records and tuples) to a device; the rest stays as it is."""

    def moved(values: Tensor) -> Tensor:
        # mps has no float64
        single = device.type == "mps" and values.dtype == torch.float64
        return values.to(device, torch.float32 if single else values.dtype)

    return applied(record, moved)
