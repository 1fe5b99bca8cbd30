"""One unit of a benchmark: a method on a task of a data set, all folds and seeds of it, as a table of distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

from .. import _adata
from ..flow.distance import (
    LARGEST_EXACT,
    estimated_energy_distance,
    estimated_mmd,
    estimated_wasserstein,
    median_distance,
    sinkhorn_divergence,
    variance_ratio,
)
from ..flow.hold_out import NOISE_REFERENCE
from ..flow.snapshots import Snapshots
from ._methods import Cloud, Job, call, check_settings, find_method, restore_own
from ._representation import Array, Recipe, check_expression, fit_recipe, read_expression, to_common
from ._tasks import Fold, Rows, Task, find_task

if TYPE_CHECKING:
    from anndata import AnnData

COLUMNS = (
    "data", "task", "method", "strict", "start", "held_out", "seed", "space", "metric", "value", "error", "bootstrap",
)  # fmt: skip
METRICS = ("w1", "w2", "mmd", "energy", "sinkhorn", "variance_ratio", "w1_unweighted", "energy_unweighted")
GENES = ("gene_mean", "gene_variance")  # where points can be decoded: strict, in the fold's own space
COMPOSITION = "composition"  # where there are labels
POINT = -1  # the bootstrap of an estimate from all cells
EPSILON = 0.05  # of the Sinkhorn divergence, times the squared median distance among the observed cells
DIVERGENCES = 8  # half-samples that the divergence is taken of: it takes longer than all other distances together
NEIGHBOURS = 5  # kept cells nearest to a restored one, whose labels are taken for its own


@dataclass(frozen=True)
class Unit:
    """A whole planned batch: what is computed, stored and resumed at once.

    Attributes
    ----------
    data
        Name of the data set.
    task
        Name of a task in ``TASKS``.
    method
        A name (`_methods.known`), or "package.module:function".
    settings
        Keyword arguments of the method, sorted.
    strict
        Whether the representation is fitted anew in every fold, on the kept cells alone.
    start
        What is moved to the held-out time: "both" neighbours, the snapshot "before", or the "first".
    seeds
        One fit of every fold each.
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
        """The method as tables call it: with its settings, where it has any, so that no two are averaged."""
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
    """Restore everything that a unit holds out, and measure how far off the restorations are.

    All folds and seeds of one of sctraj's own methods are trained in one batch. Where a unit is strict, every fold has
    a space of its own, fitted on its kept cells (log-normalisation where X holds counts, highly variable genes,
    scaling, ``n_dims`` principal components, standardisation), in which methods work and held-out cells
    are only projected.
    Distances are taken there ("own") and, restored points carried over through the genes, in the space of all cells
    ("common"; see `_representation.to_common` for what that loses). Where it is not, the representation has seen the
    held-out cells, and "common" is all there is.

    Parameters
    ----------
    unit
        What to compute.
    adata
        Annotated cells; for a strict unit with counts or log-expression in X.
    time_key
        Column of ``obs`` with real times, numbers.
    use_rep
        Representation of a unit that is not strict: a key of ``obsm``, or ``"X"``.
    n_dims
        Strict: principal components; None for as many as `use_rep` has dimensions. Not strict: the first so many
        dimensions of `use_rep`, standardised over all cells (the published protocol); None for `use_rep` as it is.
    labels
        Column of ``obs`` with cell types, for the error of the composition.
    device
        Where to train: "cpu", "cuda", ...
    bootstraps
        Half-samples of the cells behind each interval (see `_uncertainty`); 0 for none. ``sinkhorn`` has the first
        few alone.

    Returns
    -------
    Tidy: ``data``, ``task``, ``method`` (with its settings), ``strict``, ``start``, ``held_out`` (real time), ``seed``,
    ``space`` ("own", "common"), ``metric``, ``value``, ``error`` (standard error of a distance that was estimated; nan
    where exact), ``bootstrap`` (-1 for the estimate from all cells).

    ``w1``, ``w2``, ``mmd`` (squared, unbiased), ``energy`` (unbiased), ``sinkhorn`` (divergence; nan where its
    iterations do not converge, as with cells far from all others), ``variance_ratio``,
    weighted by the restoration's masses; ``w1_unweighted``, ``energy_unweighted``; ``composition``, total variation
    between the label shares of the restored cells (those of the kept cells nearest to each) and of the held-out cells;
    ``gene_mean`` and ``gene_variance``, root mean square over genes of the error of log-expression's mean (against the
    cells as measured) and variance (against the held-out cells seen through the same components: a restoration in d
    dimensions has no other variance).

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        A task that the course is too short for or that the start does not suit; no seed; a strict unit of data without
        expression; a method that is not known, or gives back what cannot be used.
    TypeError
        Settings that a method does not have.
    """
    check(unit, adata, use_rep=use_rep, n_dims=n_dims, bootstraps=bootstraps, labels=labels)
    task = find_task(unit.task)
    course = read_course(adata, time_key, use_rep, n_dims, labels, strict=unit.strict)
    task.check(len(course.times), unit.start)
    rows: list[dict[str, object]] = []
    known: dict[object, list[dict[str, object]]] = {}  # what does not depend on the seed is measured once
    for one in restorations(unit, course, task, device=device):
        half = None if one.half is None else one.half.tobytes()
        key = (one.number, one.split, one.cloud.points.tobytes(), one.cloud.mass.tobytes(), half)
        if key not in known:
            known[key] = [
                {"held_out": one.held_out, "space": space} | row
                for space, judge in one.spaces(course)
                for row in _measured(judge, one, bootstraps)
            ]
        rows += [row | {"seed": one.seed} for row in known[key]]
    fixed = {name: getattr(unit, name) for name in ("data", "task", "strict", "start")} | {"method": unit.label}
    return pd.DataFrame([fixed | row for row in rows], columns=list(COLUMNS))


def check(
    unit: Unit, adata: AnnData, *, use_rep: str, n_dims: int | None, bootstraps: int, labels: str | None = None
) -> None:
    """Raise what `evaluate` would raise, as far as it can be known at a glance: before anything is computed."""
    find_task(unit.task)
    if not unit.seeds or len(set(unit.seeds)) < len(unit.seeds):
        raise ValueError(f"expected at least one seed, each once, found {unit.seeds}")
    if bootstraps < 0:
        raise ValueError(f"expected bootstraps of at least 0, found {bootstraps}")
    find_method(unit.method)
    check_settings(unit.method, dict(unit.settings))
    _read_labels(adata, labels)
    if unit.strict:
        check_expression(adata)
    elif n_dims and use_rep in adata.obsm and n_dims > (size := adata.obsm[use_rep].shape[1]):
        raise ValueError(f'expected n_dims up to {size}, the size of "{use_rep}", found {n_dims}')


# --- the course and its folds
@dataclass(frozen=True)
class Course:
    """All cells: what `evaluate` reads.

    Attributes
    ----------
    times, index
        Of the snapshots, with their rows.
    points
        Coordinates in the common space, ``(n_obs, d)``.
    raw, n_dims, recipe
        Expression, components to take and the recipe of the common space; None where units are not strict.
    labels
        Label of each cell as a number, and how many there are; None without labels.
    """

    times: tuple[float, ...]
    index: tuple[Rows, ...]
    points: Array
    raw: NDArray | None = None
    n_dims: int | None = None
    recipe: Recipe | None = None
    labels: tuple[NDArray[np.intp], int] | None = None


def read_course(
    adata: AnnData, time_key: str, use_rep: str, n_dims: int | None, labels: str | None, *, strict: bool
) -> Course:
    """Read times, coordinates or expression, and labels; see `evaluate`."""
    types = _read_labels(adata, labels)
    if not strict:
        cells = _adata.read_snapshots(adata, time_key, use_rep, least=1)
        points = np.empty((cells.n_obs, cells.snapshots.dimension))
        for x, rows in zip(cells.snapshots.points, cells.index):
            points[rows] = x.numpy()
        if n_dims:
            points = points[:, :n_dims]
            points = (points - points.mean(axis=0)) / points.std(axis=0)
        return Course(cells.snapshots.times, cells.index, points, labels=types)
    raw = read_expression(adata)
    when, which = np.unique(_adata.read_times(adata, time_key), return_inverse=True)
    index = tuple(np.flatnonzero(which == k) for k in range(len(when)))
    if not n_dims:
        if use_rep not in adata.obsm:
            raise ValueError(f'expected n_dims, or a representation "{use_rep}" whose size says it, found neither')
        n_dims = adata.obsm[use_rep].shape[1]
    recipe = fit_recipe(raw, n_dims)
    return Course(tuple(when.tolist()), index, recipe.project(raw), raw, n_dims, recipe, types)


def _read_labels(adata: AnnData, name: str | None) -> tuple[NDArray[np.intp], int] | None:
    if name is None:
        return None
    if name not in adata.obs:
        raise KeyError(f'No column "{name}" in adata.obs; there are: {", ".join(map(str, adata.obs)) or "none"}.')
    codes, known = pd.factorize(adata.obs[name], sort=True)
    if (codes < 0).any():
        raise ValueError(
            f'expected a label for every cell in obs["{name}"]; {(codes < 0).sum()} have none; give them one'
        )
    return codes, len(known)


@dataclass(frozen=True)
class Prepared:
    """A fold in its own space: what methods are given, and how to get there.

    Attributes
    ----------
    fold
        The rows.
    snapshots
        Kept cells, float32.
    recipe
        Fitted on the kept cells alone; None where the representation is given.
    """

    fold: Fold
    snapshots: Snapshots
    recipe: Recipe | None


def prepare(course: Course, fold: Fold) -> Prepared:
    """Put a fold's kept cells into the space that methods work in; held-out cells are not looked at."""
    if course.raw is None:
        recipe, points = None, [course.points[rows] for rows in fold.kept]
    else:
        assert course.n_dims is not None
        recipe = fit_recipe(course.raw[np.concatenate(fold.kept)], course.n_dims)
        points = [recipe.project(course.raw[rows]) for rows in fold.kept]
    kept = tuple(torch.from_numpy(x.astype(np.float32)) for x in points)
    return Prepared(fold, Snapshots(fold.times, kept), recipe)


# --- restorations
@dataclass(frozen=True)
class Restored:
    """One held-out snapshot as restored with one seed, in the fold's space.

    Attributes
    ----------
    prepared
        The fold.
    number
        Of the fold in the task, and of the held-out snapshot in the fold.
    seed
        The unit's.
    cloud
        The restoration.
    half
        Noise reference: which of the held-out cells stand for the restoration, ``(m,)``; the others are the observed
        ones.
    split
        Seed that the fold itself depends on; 0 where it depends on none.
    """

    prepared: Prepared
    number: tuple[int, int]
    seed: int
    cloud: Cloud
    half: NDArray[np.bool_] | None
    split: int

    @property
    def held_out(self) -> float:
        """Real time."""
        return self.prepared.fold.held_out_times[self.number[1]]

    def spaces(self, course: Course) -> Iterator[tuple[str, _Judge]]:
        """Yield the spaces to judge in, each with what to judge."""
        fold, recipe = self.prepared.fold, self.prepared.recipe
        rows, kept = fold.held_out[self.number[1]], np.concatenate(fold.kept)
        if recipe is not None:
            assert course.raw is not None
            assert course.recipe is not None
            observed = recipe.project(course.raw[rows])
            near = np.concatenate([x.double().numpy() for x in self.prepared.snapshots.points])
            yield "own", _Judge.of(self, course, observed, near, self.cloud.points)
            carried = to_common(self.cloud.points, recipe, course.recipe)
        else:
            carried = self.cloud.points
        yield "common", _Judge.of(self, course, course.points[rows], course.points[kept], carried)


def restorations(unit: Unit, course: Course, task: Task, *, device: str) -> list[Restored]:
    """Restore every held-out snapshot with every seed, in the folds' own spaces."""
    splits = unit.seeds if task.by_seed else (0,)
    prepared = {s: [prepare(course, fold) for fold in task.folds(course.times, course.index, s)] for s in splits}
    # jobs of one fold follow each other, so that what they share is computed once
    work = [
        (n, seed, prepared[seed if task.by_seed else 0][n])
        for n in range(len(prepared[splits[0]]))
        for seed in unit.seeds
    ]
    jobs = [Job(one.snapshots, one.fold.held_out_times, seed) for _, seed, one in work]
    method, settings = find_method(unit.method), dict(unit.settings)
    halves: list[list[NDArray[np.bool_] | None]] = [[None] * len(job.times) for job in jobs]
    if unit.method == NOISE_REFERENCE:
        halves = [
            [_half(len(rows), np.random.default_rng([seed, n, k])) for k, rows in enumerate(one.fold.held_out)]
            for n, seed, one in work
        ]
        clouds = [_of_halves(course, one, half) for (_, _, one), half in zip(work, halves)]
    elif method is None:
        clouds = restore_own(unit.method, jobs, settings, start=unit.start, device=device)
    else:
        clouds = [
            call(method, job, np.random.default_rng([seed, n]), settings, name=unit.method)
            for job, (n, seed, _) in zip(jobs, work)
        ]
    return [
        Restored(one, (n, k), seed, cloud, half, seed if task.by_seed else 0)
        for (n, seed, one), some, half_of in zip(work, clouds, halves)
        for k, (cloud, half) in enumerate(zip(some, half_of))
    ]


def _half(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    chosen = np.zeros(n, bool)
    chosen[rng.permutation(n)[: n // 2]] = True
    return chosen


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


# --- judging
@dataclass(frozen=True)
class _Judge:
    """A restoration and what was observed, in one space.

    Attributes
    ----------
    restored, mass
        ``(n, d)`` and ``(n,)``.
    observed
        ``(m, d)``.
    shares, true_labels
        Of each restored cell the shares of the labels, ``(n, L)``, and the held-out cells' labels, ``(m, L)``; None
        without labels.
    genes
        Restored, measured, and held-out cells seen through the components: log-expression ``(., g)``; None where
        points cannot be decoded.
    parts
        How many restored cells come from each snapshot that was moved.
    width
        Median distance among all observed cells: kernel and entropy are the same for all half-samples.
    """

    restored: Array
    mass: Array
    observed: Array
    shares: Array | None
    true_labels: Array | None
    genes: tuple[Array, Array, Array] | None
    parts: tuple[int, ...]
    width: float

    def half(self, restored: NDArray[np.intp], observed: NDArray[np.intp]) -> _Judge:
        """Return what is left of these rows; every snapshot that was moved keeps its share of the mass."""
        mass = np.zeros_like(self.mass)
        mass[restored] = self.mass[restored]
        for part in np.split(np.arange(len(mass)), np.cumsum(self.parts)[:-1]):
            if mass[part].sum() > 0:
                mass[part] *= self.mass[part].sum() / mass[part].sum()
        genes = None if self.genes is None else tuple(g[r] for g, r in zip(self.genes, (restored, observed, observed)))
        return replace(
            self,
            restored=self.restored[restored],
            mass=mass[restored] / mass[restored].sum(),
            observed=self.observed[observed],
            shares=None if self.shares is None else self.shares[restored],
            true_labels=None if self.true_labels is None else self.true_labels[observed],
            genes=genes,  # type: ignore[arg-type]
        )

    @classmethod
    def of(cls, one: Restored, course: Course, observed: Array, near: Array, points: Array) -> _Judge:
        """Put together what is judged; ``near`` are the kept cells in the same space."""
        fold, recipe = one.prepared.fold, one.prepared.recipe
        rows = fold.held_out[one.number[1]]
        others = np.ones(len(rows), bool) if one.half is None else ~one.half
        shares = true_labels = genes = None
        if course.labels is not None:
            codes, n_labels = course.labels
            kept = np.eye(n_labels)[codes[np.concatenate(fold.kept)]]
            k = min(NEIGHBOURS, len(near))
            nearest = KDTree(near).query(points, k=k)[1].reshape(len(points), k)
            shares, true_labels = kept[nearest].mean(axis=1), np.eye(n_labels)[codes[rows]][others]
        if recipe is not None and points is one.cloud.points:  # own space: others have left it
            assert course.raw is not None
            measured = recipe.expression(course.raw[rows])[others]
            genes = recipe.decode(points), measured, recipe.decode(observed[others])
        seen = observed[others]
        parts, width = one.cloud.parts, median_distance(seen)
        return cls(points, one.cloud.mass, seen, shares, true_labels, genes, parts, width)


class _Value(NamedTuple):
    value: float
    error: float


def _measured(judge: _Judge, one: Restored, bootstraps: int) -> Iterator[dict[str, object]]:
    """Yield metrics from all cells, and from half-samples of them."""
    for b in range(POINT, bootstraps):
        part = judge if b == POINT else judge.half(*half_sample(one, len(judge.observed), b))
        for metric, (value, error) in _distances(part, divergence=b < DIVERGENCES).items():
            yield {"metric": metric, "value": value, "error": error or float("nan"), "bootstrap": b}


def _distances(judge: _Judge, *, divergence: bool) -> dict[str, _Value]:
    x, y, mass, width = judge.restored, judge.observed, judge.mass, judge.width
    estimated: dict[str, Callable[[Array | None], tuple[float, float, int]]] = {
        "w1": lambda weights: estimated_wasserstein(x, y, weights_x=weights),
        "w2": lambda weights: estimated_wasserstein(x, y, p=2, weights_x=weights),
        "mmd": lambda weights: estimated_mmd(x, y, bandwidth=width, weights_x=weights),
        "energy": lambda weights: estimated_energy_distance(x, y, weights_x=weights),
    }
    found = {name: _Value(*distance(mass)[:2]) for name, distance in estimated.items()}
    if divergence and max(len(x), len(y)) <= LARGEST_EXACT:
        found["sinkhorn"] = _Value(_divergence(x, y, EPSILON * width**2, mass), 0.0)
    found["variance_ratio"] = _Value(variance_ratio(x, y, weights_x=mass), 0.0)
    for name in ("w1", "energy"):
        same = np.ptp(mass) < 1e-12
        found[f"{name}_unweighted"] = found[name] if same else _Value(*estimated[name](None)[:2])
    if judge.shares is not None and judge.true_labels is not None:
        off = np.abs(mass @ judge.shares - judge.true_labels.mean(axis=0)).sum() / 2  # total variation
        found[COMPOSITION] = _Value(float(off), 0.0)
    if judge.genes is not None:
        restored, measured, seen = judge.genes
        even = np.full(len(seen), 1 / len(seen))
        found["gene_mean"] = _Value(_rms(mass @ restored - measured.mean(axis=0)), 0.0)
        found["gene_variance"] = _Value(_rms(_variance(restored, mass) - _variance(seen, even)), 0.0)
    return found


def _divergence(x: Array, y: Array, epsilon: float, mass: Array) -> float:
    try:
        return sinkhorn_divergence(x, y, epsilon=epsilon, weights_x=mass)
    except RuntimeError:  # not converged: the other distances are none the worse
        return float("nan")


def _variance(x: Array, mass: Array) -> Array:
    """Return the unbiased variance of each column."""
    return mass @ (x - mass @ x) ** 2 / (1 - mass @ mass)


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def half_sample(one: Restored, m: int, b: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Draw half of the restored and half of the ``m`` observed cells, without replacement; return their rows.

    Which cells of a snapshot are drawn depends on the snapshot and on ``b`` alone: all methods and seeds meet the same
    ones, and so do folds, in one of which it is held out and in another moved. Of each snapshot that was moved half is
    drawn; where nobody knows which those were, restored cells count as those of the snapshot before, by their number.
    The noise reference's two sides are those of its cells that are drawn of the held-out snapshot.
    """
    fold = one.prepared.fold
    times = sorted({*fold.times, *fold.held_out_times})

    def of_snapshot(n: int, time: float) -> NDArray[np.bool_]:
        return _half(n, np.random.default_rng([0, one.split, times.index(time), b]))

    if one.half is not None:
        drawn = of_snapshot(len(one.half), one.held_out)
        return _pair(drawn[one.half]), _pair(drawn[~one.half])
    origins = one.cloud.origins or (max(time for time in fold.times if time < one.held_out),)
    restored = [of_snapshot(n, time) for n, time in zip(one.cloud.parts, origins, strict=True)]
    return _pair(np.concatenate(restored)), _pair(of_snapshot(m, one.held_out))


def _pair(drawn: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the rows drawn; the first two where there are fewer, which have no distance among each other."""
    rows = np.flatnonzero(drawn)
    return rows if len(rows) > 1 else np.arange(2)
