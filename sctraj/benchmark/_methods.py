"""The methods that a benchmark compares: sctraj's own, baselines, and any callable, by name.

A method is a callable ``(snapshots, time, rng, **settings) -> points`` or ``-> (points, weights)``: kept `Snapshots`,
the real time to restore, a numpy Generator; points ``(n, d)``, weights ``(n,)``. It sees nothing of the held-out cells.
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
from ..tl._field import check_field
from ..tl._seeds import member_seeds

Method = Callable[..., Any]
Setting = str | int | float | bool
REFERENCES = (*BASELINES, NOISE_REFERENCE)  # what every table holds beside the methods


@dataclass(frozen=True)
class Cloud:
    """Restored cells, float64: points ``(n, d)`` and masses ``(n,)`` that sum to one.

    Attributes
    ----------
    parts
        How many of the points come from each snapshot that was moved, in order.
    origins
        The times of these snapshots, whose cells the points are, in their order; empty where nobody knows.
    """

    points: NDArray[np.float64]
    mass: NDArray[np.float64]
    parts: tuple[int, ...]
    origins: tuple[float, ...] = ()


@dataclass(frozen=True)
class Query:
    """What one member of a batch is asked for: snapshots to learn from, times to restore, and a seed."""

    snapshots: Snapshots
    times: tuple[float, ...]
    seed: int


# --- the registry
_REGISTERED: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Make a callable known to the benchmark under a name, in this process.

    Processes that are started anew do not know it, so that `run_grid` refuses it: for them give the method as
    "package.module:function" instead.

    Parameters
    ----------
    name
        Of no built-in method, and without ":".
    method
        See the module.

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
    """Whether a method can be found in this process and not in one that is started anew."""
    return name in _REGISTERED or name.startswith("__main__:")


def find_method(name: str) -> Method | None:
    """Return a method's callable by its name or as "package.module:function"; None for sctraj's own and the noise's."""
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
    """Ask a callable for each of a query's times, and check what comes back."""
    clouds = []
    for time in query.times:
        # copies: what a method does to its cells in place must not reach the next time, seed or judge
        answer = method(deepcopy(query.snapshots), time, rng, **settings)
        points, weights = answer if isinstance(answer, tuple) else (answer, None)
        # the first two baselines are whole snapshots
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
    """Raise a TypeError or ValueError for settings that a method, by its name, cannot be called with."""
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
    """Return all settings of one of sctraj's own methods, those not given as `sctraj.tl.leave_one_out` has them."""
    names = ("field", "path", "sigma", "block", *(f.name for f in fields(Training) if f.name != "module"))
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise TypeError(f"expected settings of {', '.join(names)} for {method}, found {', '.join(unknown)}")
    defaults = inspect.signature(tl.leave_one_out).parameters
    complete = {name: settings.get(name, defaults[name].default) for name in names}
    for setting, value in settings.items():
        kind, words = (str, "text") if setting in ("field", "path") else ((int, float), "a number")
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"expected {words} for {setting} of {method}, found {value!r}")
    # what follows is for its errors alone
    check_field(complete["field"], None)
    Plans(complete["block"])
    Training(module=None, **{f.name: complete[f.name] for f in fields(Training) if f.name != "module"})
    check_method(method, path=complete["path"], sigma=complete["sigma"], prior=False)
    return complete


# --- sctraj's own
def restore_own(
    method: str, queries: Sequence[Query], settings: Mapping[str, Setting], *, start: str, device: str
) -> list[list[Cloud]]:
    """Restore all times of all queries by one of sctraj's own methods, trained as ONE batch.

    Queries with the same snapshots must follow each other. Couplings of folds that share an interval's tensors are
    computed once. A closed-form field that does not depend on a seed is put together once for them.
    """
    chosen = own_settings(method, settings)
    field, path, sigma, block = (chosen.pop(name) for name in ("field", "path", "sigma", "block"))
    training = Training(module=None, **chosen)
    validate, where = training.patience is not None and field == "neural", pick_device(device)
    problems: list[Problem] = []
    validation: list[Problem] = []
    member, members = [], []  # which member serves a query; one query of each member
    plans, known = Plans(block, where), set[int]()
    for group in _by_snapshots(queries):
        seeds = [member_seeds(query.seed, 1)[0] for query in group]
        some = distinct_seeds(field, method, seeds)
        cells = {id(x) for x in group[0].snapshots.points}
        if not cells & known:  # strict folds, each in a space of its own: no need to keep what is of no use to others
            plans = Plans(block, where)
        known |= cells
        made = make_problems(
            group[0].snapshots, method=method, path=path, sigma=sigma, seeds=some, validate=validate, plans=plans
        )
        member += [len(problems) + n % len(some) for n in range(len(group))]
        problems += made[0]
        validation += made[1]
        members += group[: len(some)]
    del plans  # of no use once problems are made
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

    From the snapshot before (``"before"``) or the first one (``"first"``); or from ``"both"`` sides, where ``farther``
    is each member's share of snapshots beyond the nearest (`flow.starts`). In the published steps for each interval.
    """
    clouds: list[list[Cloud]] = [[] for _ in queries]
    for n in range(max(len(query.times) for query in queries)):
        # members with fewer go along once more
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
