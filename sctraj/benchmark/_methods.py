"""The methods that a benchmark compares: sctraj's own, baselines, and any callable, by name.

A method is a callable ``(snapshots, time, rng, **settings) -> points`` or ``-> (points, weights)``. It is given the
kept `Snapshots`, the real time to restore and a numpy Generator, and returns points ``(n, d)`` and, optionally, weights
``(n,)``. It sees nothing of the held-out cells.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import tl
from ..flow.baselines import BASELINES, baseline, neighbours
from ..flow.fields import distinct_seeds, farther_shares, make_field
from ..flow.flow_matching import Training, pick_device
from ..flow.hold_out import NOISE_REFERENCE
from ..flow.integrate import AS_PUBLISHED
from ..flow.plans import Plans
from ..flow.problem import METHODS, Problem, check_method, make_problems
from ..flow.restoration import gathered
from ..flow.snapshots import Snapshots
from ..flow.starts import Origin, Start, origins
from ..flow.vector_field import VectorField
from ..tl._field import check_field, finds_kin
from ..tl._seeds import member_seeds

Method = Callable[..., Any]
Setting = str | int | float | bool
REFERENCES = (*BASELINES, NOISE_REFERENCE)  # included in every table in addition to the methods


@dataclass(frozen=True)
class Cloud:
    """Restored cells, float64: points ``(n, d)`` and masses ``(n,)`` that sum to one.

    Attributes
    ----------
    parts
        Number of points from each snapshot that was moved, in order.
    origins
        Times of these snapshots, whose cells the points are, in their order; empty if they are not known.
    """

    points: NDArray[np.float64]
    mass: NDArray[np.float64]
    parts: tuple[int, ...]
    origins: tuple[float, ...] = ()


@dataclass(frozen=True)
class Query:
    """The task of one member of a batch: snapshots to learn from, times to restore, and a seed."""

    snapshots: Snapshots
    times: tuple[float, ...]
    seed: int


# --- the registry
_REGISTERED: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Register a callable as a method of the benchmark under a name, in this process.

    Newly started processes do not know it, so `run_grid` refuses it; there, specify the method as
    "package.module:function" instead.

    Parameters
    ----------
    name
        Name other than those of built-in methods, and without ":".
    method
        The callable; for its form see the module's docstring.

    Raises
    ------
    ValueError
        If the name is taken.
    TypeError
        If the method is not callable.
    """
    if name in (*METHODS, *REFERENCES) or ":" in name or not name:
        raise ValueError(f'expected a name of your own without ":", found {name!r}; there are {", ".join(known())}')
    if not callable(method):
        raise TypeError(f"expected a callable (snapshots, time, rng), found {type(method).__name__}")
    _REGISTERED[name] = method


def known() -> tuple[str, ...]:
    """Return the names of all methods: sctraj's own, baselines and noise reference, and registered ones."""
    return (*METHODS, *REFERENCES, *_REGISTERED)


def is_known_here_alone(name: str) -> bool:
    """Return whether a method can be found in this process but not in a newly started one."""
    return name in _REGISTERED or name.startswith("__main__:")


def find_method(name: str) -> Method | None:
    """Find a callable by name or "package.module:function"; None for sctraj's own methods and the noise reference."""
    if name in METHODS or name == NOISE_REFERENCE:
        return None
    if name in _BASELINES:
        return _BASELINES[name]
    if name in _REGISTERED:
        return _REGISTERED[name]
    if ":" not in name:
        raise ValueError(f'expected a method of {", ".join(known())}, or "package.module:function", found {name!r}')
    try:
        method = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as reason:
        raise ValueError(
            f'expected a method "package.module:function" that can be imported, found {name!r}: {reason}. Install its '
            f"package, or add its folder to PYTHONPATH, wherever units are computed"
        ) from reason
    if not callable(method):
        raise TypeError(f"expected {name!r} to be callable (snapshots, time, rng), found {type(method).__name__}")
    return method


def call(
    method: Method,
    query: Query,
    rng: np.random.Generator,
    settings: Mapping[str, Setting],
    *,
    name: str,
) -> list[Cloud]:
    """Call a method for each of a query's times, and check what it returns."""
    clouds = []
    for time in query.times:
        # copies, so that in-place changes by a method do not affect the next time, seed or judgement
        answer = method(deepcopy(query.snapshots), time, rng, **settings)
        points, weights = answer if isinstance(answer, tuple) else (answer, None)
        # the first two baselines are copies of whole snapshots
        copied = dict(zip(BASELINES, neighbours(query.snapshots, time))).get(name)
        origins = () if copied is None else (query.snapshots.times[copied],)
        clouds.append(replace(_checked(points, weights, query.snapshots.dimension, name), origins=origins))
    return clouds


def _checked(points: Any, weights: Any, d: int, name: str) -> Cloud:
    x = np.array(_plain(points), dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != d or len(x) < 2:
        raise ValueError(f"expected at least two points (n, {d}) from {name}, found shape {x.shape}")
    if bad := int((~np.isfinite(x)).any(1).sum()):
        raise ValueError(f"expected finite points from {name}, found {bad} of {len(x)} with NaN or inf")
    mass = np.full(len(x), 1.0) if weights is None else np.array(_plain(weights), dtype=np.float64)
    if mass.shape != (len(x),) or not (mass >= 0).all() or not 0 < mass.sum() < math.inf:
        raise ValueError(f"expected {len(x)} weights, not below zero, from {name}, found shape {mass.shape}")
    return Cloud(x, mass / mass.sum(), (len(x),))


def _plain(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


# --- baselines
def _without_a_model(name: str) -> Method:
    def restored(snapshots: Snapshots, time: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        found = baseline(snapshots, time, name, Plans())
        return found.points, found.weights

    return restored


_BASELINES: dict[str, Method] = {name: _without_a_model(name) for name in BASELINES}


# --- settings
def check_settings(name: str, settings: Mapping[str, Setting]) -> None:
    """Raise a TypeError or ValueError for settings with which the named method cannot be called."""
    method = find_method(name)
    if method is not None:
        try:
            inspect.signature(method).bind(None, None, None, **settings)
        except TypeError as reason:
            raise TypeError(
                f"expected {name} to be callable with (snapshots, time, rng) and its settings, found: {reason}"
            ) from reason
    elif name != NOISE_REFERENCE:
        own_settings(name, settings)
    elif settings:
        raise TypeError(f"expected no settings for {name}, found {', '.join(settings)}")


def own_settings(method: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return all settings of one of sctraj's own methods, with the defaults of `sctraj.tl.leave_one_out`."""
    names = ("field", "path", "sigma", "frame", "block", *(f.name for f in fields(Training) if f.name != "module"))
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise TypeError(f"expected settings of {', '.join(names)} for {method}, found {', '.join(unknown)}")
    defaults = inspect.signature(tl.leave_one_out).parameters
    complete = {name: settings.get(name, defaults[name].default) for name in names}
    for setting, value in settings.items():
        kind, words = (str, "text") if setting in ("field", "path", "frame") else ((int, float), "a number")
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"expected {words} for {setting} of {method}, found {value!r}")
    # the following calls serve only to raise their errors
    check_field(complete["field"], None)
    Plans(complete["block"], frame=complete["frame"])
    Training(module=None, **{f.name: complete[f.name] for f in fields(Training) if f.name != "module"})
    check_method(method, path=complete["path"], sigma=complete["sigma"], prior=False)
    if complete["frame"] != defaults["frame"].default and not finds_kin(method, complete["path"]):
        raise ValueError(
            f"expected no frame for {method} with path={complete['path']!r}, which needs no kin, found "
            f"{complete['frame']!r}; leave it out"
        )
    return complete


# --- sctraj's own
def restore_own(
    method: str, queries: Sequence[Query], settings: Mapping[str, Setting], *, start: str, device: str
) -> list[list[Cloud]]:
    """Restore all times of all queries by one of sctraj's own methods, trained as ONE batch.

    Queries with the same snapshots must be consecutive. Couplings are computed once for folds that share an interval's
    tensors. A closed-form field that does not depend on a seed is computed once for such queries.
    """
    chosen = own_settings(method, settings)
    field, path, sigma, frame, block = (chosen.pop(name) for name in ("field", "path", "sigma", "frame", "block"))
    training = Training(module=None, **chosen)
    validate, where = training.patience is not None and field == "neural", pick_device(device)
    problems: list[Problem] = []
    validation: list[Problem] = []
    member, members = [], []  # the member that serves each query; one query of each member
    plans, known = Plans(block, where, frame), set[int]()
    for group in _by_snapshots(queries):
        seeds = [member_seeds(query.seed, 1)[0] for query in group]
        some = distinct_seeds(field, method, seeds)
        cells = {id(x) for x in group[0].snapshots.points}
        if not cells & known:  # strict folds, each in a space of its own: nothing is shared, so nothing need be kept
            plans = Plans(block, where, frame)
        known |= cells
        made = make_problems(
            group[0].snapshots, method=method, path=path, sigma=sigma, seeds=some, validate=validate, plans=plans
        )
        member += [len(problems) + n % len(some) for n in range(len(group))]
        problems += made[0]
        validation += made[1]
        members += group[: len(some)]
    del plans  # not needed once the problems are made
    fitted = make_field(field, problems, validation, training, where, progress=False).vector_field
    restored = restore_members(fitted, members, start=start, farther=farther_shares(field, problems))
    return [restored[m] for m in member]


def _by_snapshots(queries: Sequence[Query]) -> list[list[Query]]:
    groups: list[list[Query]] = []
    for query in queries:
        if groups and groups[-1][0].snapshots is query.snapshots:
            groups[-1].append(query)
        else:
            groups.append([query])
    return groups


def restore_members(
    field: VectorField, queries: Sequence[Query], *, start: str, farther: Sequence[float]
) -> list[list[Cloud]]:
    """Move kept cells to each member's times, all members at once.

    They are moved from the snapshot before (``"before"``), from the first one (``"first"``), or from ``"both"`` sides,
    where ``farther`` is each member's share for snapshots beyond the nearest (`flow.starts`). Each interval is
    integrated in the published number of steps.
    """
    clouds: list[list[Cloud]] = [[] for _ in queries]
    for n in range(max(len(query.times) for query in queries)):
        # members with fewer times are moved to their last one again
        times = [query.times[min(n, len(query.times) - 1)] for query in queries]
        if start == "first":
            gaps = max(sum(t < time for t in query.snapshots.times) for query, time in zip(queries, times))
            asked = [[Origin(0, 1.0, gaps)] for _ in queries]
        else:
            side: Start = "both" if start == "both" else "before"
            asked = [
                origins(query.snapshots.times, time, side, farther=share)
                for query, time, share in zip(queries, times, farther, strict=True)
            ]
        snapshots = [query.snapshots for query in queries]
        restored = gathered(field, snapshots, asked, times, AS_PUBLISHED)
        for query, own, moved, whole in zip(queries, clouds, asked, restored):
            if n < len(query.times):
                mass = whole.weights.numpy()
                own.append(
                    Cloud(
                        whole.points.double().numpy(),
                        mass / mass.sum(),
                        parts=tuple(len(query.snapshots.points[one.snapshot]) for one in moved),
                        origins=tuple(query.snapshots.times[one.snapshot] for one in moved),
                    )
                )
    return clouds
