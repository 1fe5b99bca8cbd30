"""One unit of a benchmark: all folds and seeds of a method on a task of a data set, as a table of distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..flow.hold_out import NOISE_REFERENCE
from ._course import Course, Prepared, prepare, read_course, read_labels
from ._judge import Restored, measure, random_half
from ._methods import Cloud, Query, call, check_settings, find_method, restore_own
from ._representation import check_expression
from ._tasks import Task, find_task

if TYPE_CHECKING:
    from anndata import AnnData

COLUMNS = (
    "data", "task", "method", "strict", "start", "held_out", "seed", "space", "metric", "value", "error", "bootstrap",
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One planned batch, which is computed, stored and resumed as a whole.

    Attributes
    ----------
    data
        Name of the data set.
    task
        Name of a task in ``TASKS``.
    method
        Name of a method (`_methods.known`), or "package.module:function".
    settings
        Keyword arguments of the method, sorted.
    strict
        Whether the representation is fitted anew in every fold, on the kept cells only.
    start
        Which snapshots are moved to the held-out time: those on "both" sides, the one "before", or the "first".
    seeds
        For each of them, every fold is fitted once.
    """

    data: str
    task: str
    method: str
    settings: tuple[tuple[str, str | int | float | bool], ...]
    strict: bool
    start: str
    seeds: tuple[int, ...]

    @property
    def label(self) -> str:
        """Name of the method in tables, with its settings if there are any, so that different ones are not averaged."""
        told = ", ".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.method} ({told})" if told else self.method


def evaluate(
    unit: Unit,
    adata: AnnData,
    *,
    time_key: str,
    use_rep: str,
    n_dims: int | None,
    labels: str | None = None,
    device: str = "cpu",
    bootstraps: int = 0,
) -> pd.DataFrame:
    """Restore all snapshots that a unit holds out, and measure how far off the restorations are.

    All folds and seeds of one of sctraj's own methods are trained in one batch. If a unit is strict, every fold has a
    space of its own, fitted on its kept cells (log-normalisation if X holds counts, highly variable genes, scaling,
    ``n_dims`` principal components, standardisation). Methods work in this space, and held-out cells are only projected
    into it. Distances are measured there ("own") and, after the restored points are carried over through the genes, in
    the space of all cells ("common"; see `_representation.to_common` for what that loses). If a unit is not strict, the
    representation has seen the held-out cells, and "common" is the only space.

    Parameters
    ----------
    unit
        What to compute.
    adata
        Annotated cells; for a strict unit with counts or log-expression in X.
    time_key
        Column of ``obs`` with real times, as numbers.
    use_rep
        Representation of a unit that is not strict: a key of ``obsm``, or ``"X"``.
    n_dims
        Strict: number of principal components; None for as many as `use_rep` has dimensions. Not strict: number of
        leading dimensions of `use_rep`, standardised over all cells (the published protocol); None for `use_rep` as it
        is.
    labels
        Column of ``obs`` with cell types, for the error of the composition.
    device
        Where to train: "cpu", "cuda", ...
    bootstraps
        Number of half-samples of the cells for each interval (see `_uncertainty`); 0 for none. ``sinkhorn`` is computed
        for the first few only.

    Returns
    -------
    Tidy table with columns ``data``, ``task``, ``method`` (with its settings), ``strict``, ``start``, ``held_out``
    (real time), ``seed``, ``space`` ("own", "common"), ``metric``, ``value``, ``error`` (standard error of an estimated
    distance; nan if it is exact) and ``bootstrap`` (-1 for the estimate from all cells).

    Metrics weighted by the restoration's masses: ``w1``, ``w2``, ``mmd`` (squared, unbiased), ``energy`` (unbiased),
    ``energy_about_mean`` (both clouds centred at their own means: the error in shape), ``sinkhorn`` (divergence; nan if
    its iterations do not converge, as with cells far from all others) and ``variance_ratio``. Unweighted:
    ``w1_unweighted`` and ``energy_unweighted``. ``composition`` is the total variation between the label shares of the
    restored cells (those of the kept cells nearest to each) and of the held-out cells. ``gene_mean`` and
    ``gene_variance`` are the root mean square over genes of the error in the mean of log-expression (compared with the
    cells as measured) and in its variance (compared with the held-out cells seen through the same components, since a
    restoration in d dimensions has no other variance).

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        A course that is too short for the task; a start that does not suit it; no seed; a strict unit of data without
        expression; a method that is unknown, or returns something that cannot be used.
    TypeError
        Settings that a method does not have.
    """
    check(unit, adata, use_rep=use_rep, n_dims=n_dims, bootstraps=bootstraps, labels=labels)
    task = find_task(unit.task)
    course = read_course(adata, time_key, use_rep, n_dims, labels, strict=unit.strict)
    task.check(len(course.times), unit.start)
    rows: list[dict[str, object]] = []
    known: dict[object, list[dict[str, object]]] = {}  # results that do not depend on the seed are measured once
    for one in restorations(unit, course, task, device=device):
        half = None if one.half is None else one.half.tobytes()
        key = (one.number, one.split, one.cloud.points.tobytes(), one.cloud.mass.tobytes(), half)
        if key not in known:
            known[key] = [
                {"held_out": one.held_out, "space": space} | row
                for space, judge in one.spaces(course)
                for row in measure(judge, one, bootstraps)
            ]
        rows += [row | {"seed": one.seed} for row in known[key]]
    fixed = {name: getattr(unit, name) for name in ("data", "task", "strict", "start")} | {"method": unit.label}
    return pd.DataFrame([fixed | row for row in rows], columns=list(COLUMNS))


def check(
    unit: Unit, adata: AnnData, *, use_rep: str, n_dims: int | None, bootstraps: int, labels: str | None = None
) -> None:
    """Raise the errors of `evaluate` that can be recognised quickly, before anything is computed."""
    find_task(unit.task)
    if not unit.seeds or len(set(unit.seeds)) < len(unit.seeds):
        raise ValueError(f"expected at least one seed, each once, found {unit.seeds}")
    if bootstraps < 0:
        raise ValueError(f"expected bootstraps of at least 0, found {bootstraps}")
    find_method(unit.method)
    check_settings(unit.method, dict(unit.settings))
    read_labels(adata, labels)
    if unit.strict:
        check_expression(adata)
    elif n_dims and use_rep in adata.obsm and n_dims > (size := adata.obsm[use_rep].shape[1]):
        raise ValueError(f'expected n_dims up to {size}, the size of "{use_rep}", found {n_dims}')


# --- restorations
def restorations(unit: Unit, course: Course, task: Task, *, device: str) -> list[Restored]:
    """Restore every held-out snapshot with every seed, in the folds' own spaces."""
    splits = unit.seeds if task.by_seed else (0,)
    prepared = {s: [prepare(course, fold) for fold in task.folds(course.times, course.index, s)] for s in splits}
    # queries of one fold are consecutive, so that what they share is computed once
    work = [
        (n, seed, prepared[seed if task.by_seed else 0][n])
        for n in range(len(prepared[splits[0]]))
        for seed in unit.seeds
    ]
    queries = [Query(one.snapshots, one.fold.held_out_times, seed) for _, seed, one in work]
    method, settings = find_method(unit.method), dict(unit.settings)
    halves: list[list[NDArray[np.bool_] | None]] = [[None] * len(query.times) for query in queries]
    if unit.method == NOISE_REFERENCE:
        halves = [
            [random_half(len(rows), np.random.default_rng([seed, n, k])) for k, rows in enumerate(one.fold.held_out)]
            for n, seed, one in work
        ]
        clouds = [_of_halves(course, one, half) for (_, _, one), half in zip(work, halves)]
    elif method is None:
        clouds = restore_own(unit.method, queries, settings, start=unit.start, device=device)
    else:
        clouds = [
            call(method, query, np.random.default_rng([seed, n]), settings, name=unit.method)
            for query, (n, seed, _) in zip(queries, work)
        ]
    return [
        Restored(one, (n, k), seed, cloud, half, seed if task.by_seed else 0)
        for (n, seed, one), some, half_of in zip(work, clouds, halves)
        for k, (cloud, half) in enumerate(zip(some, half_of))
    ]


def _of_halves(course: Course, one: Prepared, halves: Sequence[NDArray[np.bool_] | None]) -> list[Cloud]:
    """Return the cells of the chosen halves of held-out snapshots, in the fold's space."""
    clouds = []
    for rows, half in zip(one.fold.held_out, halves):
        chosen = rows[half]
        if one.recipe is None:
            points = course.points[chosen]
        else:
            assert course.raw is not None
            points = one.recipe.project(course.raw[chosen])
        clouds.append(Cloud(points, np.full(len(points), 1 / len(points)), (len(points),)))
    return clouds
