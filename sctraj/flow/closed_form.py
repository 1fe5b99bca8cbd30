"""The closed-form field: a kernel average of the pairs' velocities, without training.

For pairs with masses ``m_p(t)`` and Gaussian paths ``N(mu_p(t), h^2)``, the conditional flow matching objective has the
minimiser ``v(t, x) = sum_p w_p(t, x) u_p(t, x)``, with ``w_p`` proportional to ``m_p(t) N(x; mu_p(t), h^2)`` (Tong et
al. 2023, eq. 9). If ``h`` is the path's own spread, this is the exact minimiser on the empirical coupling. It is so for
a bridge; for the other paths a local bandwidth is used, and the field is a kernel estimator of the velocity given the
place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .metric_path import MetricPath
from .probability_path import BrownianBridge, Hermite, Moments, Pairs, ProbabilityPath, Straight, Trigonometric
from .problem import Problem
from .snapshots import applied
from .vector_field import FieldSample, Leg, VectorField, scaling

NEIGHBOURS = 5  # the bandwidth is the distance to the 5th nearest path point
FLOOR = 0.05  # smallest bandwidth, as a fraction of the interval's rms displacement
TILE = 2**22  # queries times pairs handled at once on a CPU
TILE_ON_GPU = 2**26  # on a GPU, which dozens of queries still fill if there are a million pairs
COLUMNS = 64  # pairs in a block of which the smallest distance is found first
KINDS = {kind.__name__: kind for kind in (Straight, Hermite, BrownianBridge, Trigonometric, MetricPath)}


@dataclass(frozen=True)
class IntervalPairs:
    """One interval's pairs and their masses.

    Attributes
    ----------
    pairs
        Ends ``(n_pairs, d)``, relative to the member's origin, and real times.
    mass0, mass1
        Masses at the start and at the end, ``(n_pairs,)``; linear in between.
    floor
        Smallest bandwidth, a length.
    """

    pairs: Pairs
    mass0: Tensor
    mass1: Tensor
    floor: float


@dataclass(frozen=True)
class _Member:
    """One member: its path, its intervals in temporal order, and the origin ``(d,)`` of their coordinates."""

    path: ProbabilityPath
    intervals: tuple[IntervalPairs, ...]
    origin: Tensor


class ClosedFormField(VectorField):
    """Kernel averages of velocities, scores and growth rates over the pairs of an interval; nothing is trained.

    At a snapshot's time the field is that of the following interval; at the last snapshot, that of the last interval.
    It is evaluated in tiles of queries times pairs, which bound the memory.

    Parameters
    ----------
    members
        Paths and pairs.
    scales
        Root mean square deviation of each member's data.
    """

    def __init__(self, members: Sequence[_Member], scales: Sequence[float]) -> None:
        super().__init__()
        self._parts = tuple(members)
        self._grows = any(not torch.equal(s.mass0, s.mass1) for part in members for s in part.intervals)
        dtype = members[0].origin.dtype
        self.register_buffer("scale", torch.tensor(scales, dtype=dtype).reshape(-1, 1, 1))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move the pairs with the module (``to``, ``cpu``, ``cuda``, ``double``)."""
        super()._apply(fn, recurse)
        self._parts = applied(self._parts, fn)
        return self

    @property
    def dimension(self) -> int:
        """Number of coordinates d."""
        return len(self._parts[0].origin)

    @property
    def has_score(self) -> bool:
        """Whether there is a score: where the bandwidth is the path's own, which is so for a bridge."""
        return not _local(self._parts[0].path)

    @property
    def grows(self) -> bool:
        """Whether the mass of pairs changes."""
        return self._grows

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        """Return velocity, score (that of the kernel density estimate) and growth; ``t`` holds one time per member."""
        each = [_evaluate(part, time, points) for part, time, points in zip(self._parts, self._times(t), x)]
        velocity, score, growth = (torch.stack([e[n] for e in each]) for n in range(3))
        return FieldSample(velocity, score if self.has_score else None, growth if self.grows else None)

    def bandwidth(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the kernel's standard deviation ``(M, B, 1)`` at one time per member and points ``(M, B, d)``."""
        return torch.stack(
            [_bandwidth(part, time, points) for part, time, points in zip(self._parts, self._times(t), x)]
        )

    def legs(self, t0: Tensor, t1: Tensor) -> Sequence[Leg]:
        """Return the ways from ``t0`` to ``t1``, ``(M,)`` each, cut at the snapshots, where the field jumps.

        On each leg the field is that of the leg's own interval, at both of its ends too; so at a snapshot where a leg
        ends, it is not yet that of the following interval. A member with fewer legs than another stays where it has
        arrived.
        """
        cuts = [_cut(part, *ends) for part, *ends in zip(self._parts, t0.tolist(), t1.tolist(), strict=True)]
        legs = []
        for k in range(max(map(len, cuts)) - 1):
            ends = [(cut[min(k, len(cut) - 1)], cut[min(k + 1, len(cut) - 1)]) for cut in cuts]
            inside = copy.copy(self)
            inside._parts = tuple(_between(part, *own) for part, own in zip(self._parts, ends))
            legs.append(Leg(inside, *torch.tensor(ends, dtype=torch.float64).T))
        return legs

    def _times(self, t: Tensor | float) -> list[float]:
        return torch.as_tensor(t, dtype=torch.float64).expand(self.members, 1, 1)[:, 0, 0].tolist()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return paths, pairs and scales as arrays; the names of a member's arrays begin with its number."""
        arrays = {"scale": self.scale.flatten().cpu().numpy()}
        for m, part in enumerate(self._parts):
            arrays[f"{m}.origin"] = part.origin.cpu().numpy()
            for name, value in _values(part.path).items():
                arrays[f"{m}.path.{type(part.path).__name__}.{name}"] = value
            for k, interval in enumerate(part.intervals):
                held = {**_values(interval.pairs), **_values(interval)}
                arrays |= {f"{m}.{k}.{name}": value for name, value in held.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ClosedFormField:
        """Rebuild a field from the arrays of ``to_arrays``."""
        members = []
        scales = np.atleast_1d(np.asarray(arrays["scale"])).tolist()
        for m in range(len(scales)):
            own = {name.split(".", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{m}.")}
            path = {name.split(".", 2)[2]: _value(own[name]) for name in own if name.startswith("path.")}
            kind = next(name.split(".")[1] for name in own if name.startswith("path."))
            law = KINDS[kind](**_gathered(path))
            intervals: list[IntervalPairs] = []
            while f"{len(intervals)}.mass0" in own:
                start = f"{len(intervals)}."
                held: dict[str, Any] = {n.removeprefix(start): _value(v) for n, v in own.items() if n.startswith(start)}
                rest = {name: held.pop(name) for name in ("mass0", "mass1", "floor")}
                intervals.append(IntervalPairs(Pairs(**held), **rest))
            members.append(_Member(law, tuple(intervals), torch.as_tensor(np.asarray(own["origin"]))))
        return cls(members, scales)


def closed_form(problems: Sequence[Problem], *, device: torch.device, dtype: torch.dtype) -> ClosedFormField:
    """Assemble the closed-form field of the members' pairs.

    Parameters
    ----------
    problems
        One per member.
    device, dtype
        Where to compute, and in what precision.

    Raises
    ------
    ValueError
        If there is no member.
    """
    if not problems:
        raise ValueError("expected at least one problem, found none")
    members, scales = [], []
    for problem in problems:
        measured = scaling(problem.snapshots, std=0.0)
        origin = measured.shift
        intervals = []
        for k in range(len(problem.couplings)):
            listed = problem.listed(k)
            pairs = problem.pairs(k, listed.i, listed.j)
            displacement = (pairs.x1 - pairs.x0).double().square().sum(1)
            floor = FLOOR * math.sqrt(float(listed.middle @ displacement))
            ends = [
                None if v is None else v.to(dtype)
                for v in (pairs.x0 - origin, pairs.x1 - origin, pairs.velocity0, pairs.velocity1)
            ]
            assert ends[0] is not None
            assert ends[1] is not None
            relative = Pairs(ends[0], ends[1], pairs.t0, pairs.t1, ends[2], ends[3])
            intervals.append(IntervalPairs(relative, listed.mass0.to(dtype), listed.mass1.to(dtype), floor))
        path = problem.path
        if isinstance(path, Trigonometric):
            path = Trigonometric(path.sigma, (0 if path.centre is None else path.centre) - origin)
        if isinstance(path, MetricPath):
            path = replace(path, shift=path.shift - origin)
        members.append(_Member(path, tuple(intervals), origin.to(dtype)))
        scales.append(measured.scale)
    return ClosedFormField(members, scales).to(device)


def _cut(part: _Member, first: float, last: float) -> list[float]:
    """Return a way's ends and the snapshots' times between, in its order; times equal up to rounding count once."""
    inner = []
    for interval in part.intervals[1:]:
        rounding = 1e-6 * float(interval.pairs.length)
        if min(first, last) + rounding < float(interval.pairs.t0) < max(first, last) - rounding:
            inner.append(float(interval.pairs.t0))
    return [first, *(inner if first < last else inner[::-1]), last]


def _between(part: _Member, first: float, last: float) -> _Member:
    """Return a member with only the interval that contains the middle of a leg."""
    middle = (first + last) / 2
    k = max(sum(float(interval.pairs.t0) <= middle for interval in part.intervals) - 1, 0)
    return replace(part, intervals=part.intervals[k : k + 1])


class _Now(NamedTuple):
    """A member's pairs at one time: moments of their paths, masses ``(n_pairs,)``, growth rates, and the floor."""

    at: Moments
    mass: Tensor
    rate: Tensor
    floor: float

    @classmethod
    def of(cls, part: _Member, t: float, dtype: torch.dtype) -> _Now:
        # all times in the points' precision, as equal times must not differ by rounding
        now, *starts = torch.tensor(
            [t, *(float(interval.pairs.t0) for interval in part.intervals)], dtype=dtype
        ).tolist()
        interval = part.intervals[max(sum(start <= now for start in starts) - 1, 0)]
        pairs, path = interval.pairs, part.path
        length = float(pairs.length)
        there = min(max((t - float(pairs.t0)) / length, 0.0), 1.0)
        s = min(max(there, path.margin), 1 - path.margin)
        at = path.moments(pairs, interval.mass0.new_full((1, 1), s, dtype=dtype))
        if s != there:  # only the spread keeps the margin: at a snapshot a cell is at its pairs' means
            at = replace(at, mean=at.mean + (there - s) * length * at.mean_rate)
        mass = ((1 - s) * interval.mass0 + s * interval.mass1).clamp(min=1e-30)
        rate = (interval.mass1 - interval.mass0) / mass / length
        return cls(at, mass, rate, max(interval.floor, path.sigma / 10))

    def tiles(self, path: ProbabilityPath, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield points ``(n, d)``, their squared distances to the pairs ``(n, n_pairs)`` and bandwidths ``(n, 1)``."""
        mean, squares = self.at.mean, self.at.mean.square().sum(1)
        most = TILE if x.device.type == "cpu" else TILE_ON_GPU
        for points in x.split(max(1, most // len(mean))):
            distance2 = torch.addmm(squares, points, mean.T, alpha=-2)
            distance2.add_(points.square().sum(1, keepdim=True)).clamp_(min=0)
            if _local(path):
                width2 = _nearest(distance2, NEIGHBOURS).clamp(min=self.floor**2)
            else:
                width2 = self.at.std.square().expand(len(points), 1)
            yield points, distance2, width2


def _bandwidth(part: _Member, t: float, x: Tensor) -> Tensor:
    """Return one member's bandwidths ``(B, 1)`` at points ``(B, d)``."""
    now = _Now.of(part, t, x.dtype)
    return torch.cat([width2.sqrt() for _, _, width2 in now.tiles(part.path, x - part.origin)])


def _evaluate(part: _Member, t: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return velocity ``(B, d)``, score ``(B, d)`` and growth ``(B, 1)`` of one member at points ``(B, d)``."""
    now = _Now.of(part, t, x.dtype)
    at, log_mass = now.at, now.mass.log()
    values = torch.cat([at.mean, at.mean_rate, now.rate[:, None]], 1).to(x)  # (n_pairs, 2 d + 1)
    # with a multiple of 16 columns a CPU multiplies up to five times faster
    d, values = x.shape[1], torch.nn.functional.pad(values, (0, -values.shape[1] % 16))
    results = []
    for points, distance2, width2 in now.tiles(part.path, x - part.origin):
        weight = torch.softmax(distance2.div_(-2 * width2).add_(log_mass), 1)
        average = weight @ values
        pull = average[:, :d] - points
        velocity = average[:, d : 2 * d]
        if not _local(part.path):
            # u_p(t, x) = mean_p' + std' / std (x - mean_p) (Tong et al. 2023, theorem 2.1)
            velocity = velocity - at.std_rate / at.std * pull
        results.append((velocity, pull / width2, average[:, 2 * d : 2 * d + 1]))
    velocity, score, growth = (torch.cat(column) for column in zip(*results))
    return velocity, score, growth


def _nearest(distance2: Tensor, k: int) -> Tensor:
    """Return the ``k``-th smallest entry of every row, or the largest if there are fewer, ``(n, 1)``.

    The ``k`` smallest are in those ``k`` blocks of columns whose minima are smallest, so only these are searched.
    """
    m = distance2.shape[1]
    whole = m // COLUMNS * COLUMNS
    if whole <= k * COLUMNS:
        return distance2.topk(min(k, m), largest=False).values[:, -1:]
    blocks = distance2[:, :whole].unflatten(1, (-1, COLUMNS))
    best = blocks.amin(2).topk(k, largest=False).indices
    near = blocks.gather(1, best[:, :, None].expand(-1, -1, COLUMNS)).flatten(1)
    return torch.cat([near, distance2[:, whole:]], 1).topk(k, largest=False).values[:, -1:]


def _local(path: ProbabilityPath) -> bool:
    """Say whether the bandwidth is local: where the path's own spread is constant, and so a mere smoothing."""
    return not path.margin > 0


def _values(record: object) -> dict[str, np.ndarray]:
    """Return a record's numbers and tensors as arrays; entries that are None or records are left out."""
    held = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    rows = {name: value for name, value in held.items() if isinstance(value, tuple)}
    held |= {f"{name}.{n}": one for name, value in rows.items() for n, one in enumerate(value)}
    return {
        name: value.cpu().numpy() if isinstance(value, Tensor) else np.array(float(value))
        for name, value in held.items()
        if isinstance(value, (Tensor, float, int))
    }


def _gathered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo how `_values` takes tuples apart: put ``name.0``, ``name.1``, ... together into a tuple."""
    whole: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for name in {name.split(".")[0] for name in values if "." in name}:
        whole[name] = tuple(values[f"{name}.{n}"] for n in range(sum(k.startswith(f"{name}.") for k in values)))
    return whole


def _value(array: np.ndarray | float) -> Tensor | float:
    """Convert an array back to the number or tensor that it was."""
    array = np.asarray(array)
    return float(array) if array.ndim == 0 else torch.as_tensor(array)
