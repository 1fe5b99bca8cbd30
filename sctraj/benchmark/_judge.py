"""Compare a restoration with the observed cells: distances in each space, from all cells and from half-samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from ..flow.distance import LARGEST_EXACT, median_distance, sinkhorn_divergence
from ..flow.judgement import distances
from ._course import Course, Prepared
from ._methods import Cloud
from ._representation import Array, to_common

METRICS = (
    "w1", "w2", "mmd", "energy", "energy_about_mean", "sinkhorn", "variance_ratio",
    "w1_unweighted", "energy_unweighted",
)  # fmt: skip
GENES = ("gene_mean", "gene_variance")  # if points can be decoded: strict units, in the fold's own space
COMPOSITION = "composition"  # if there are labels
POINT = -1  # value of `bootstrap` for an estimate from all cells
EPSILON = 0.05  # for the Sinkhorn divergence, in squared median distances among the observed cells
DIVERGENCES = 8  # half-samples for the divergence, which takes longer than all other distances together
NEIGHBOURS = 5  # nearest kept cells, whose labels are assigned to a restored cell


@dataclass(frozen=True)
class Restored:
    """One held-out snapshot as restored with one seed, in the fold's space.

    Attributes
    ----------
    prepared
        The fold.
    number
        Numbers of the fold in the task, and of the held-out snapshot in the fold.
    seed
        Seed of the unit.
    cloud
        The restoration.
    half
        For the noise reference: which of the held-out cells stand for the restoration, ``(m,)``; the others are the
        observed ones.
    split
        Seed that the fold itself depends on; 0 if it depends on none.
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

    def spaces(self, course: Course) -> Iterator[tuple[str, Judge]]:
        """Yield the spaces in which to judge, each with the clouds to compare."""
        fold, recipe = self.prepared.fold, self.prepared.recipe
        rows, kept = fold.held_out[self.number[1]], np.concatenate(fold.kept)
        if recipe is not None:
            assert course.raw is not None
            assert course.recipe is not None
            observed = recipe.project(course.raw[rows])
            near = np.concatenate([x.double().numpy() for x in self.prepared.snapshots.points])
            yield "own", Judge.of(self, course, observed, near, self.cloud.points)
            carried = to_common(self.cloud.points, recipe, course.recipe)
        else:
            carried = self.cloud.points
        yield "common", Judge.of(self, course, course.points[rows], course.points[kept], carried)


@dataclass(frozen=True)
class Judge:
    """A restoration and the observed cells, in one space.

    Attributes
    ----------
    restored, mass
        Restored cells ``(n, d)`` and their masses ``(n,)``.
    observed
        Observed cells ``(m, d)``.
    shares, true_labels
        Shares of the labels for each restored cell, ``(n, L)``, and the held-out cells' labels, ``(m, L)``; None
        without labels.
    genes
        Log-expression ``(., g)`` of restored cells, of measured cells, and of held-out cells seen through the
        components; None if points cannot be decoded.
    parts
        Number of restored cells from each snapshot that was moved.
    width
        Median distance among all observed cells (for the noise reference, among its observed half), so that kernel and
        entropy are the same for all half-samples.
    """

    restored: Array
    mass: Array
    observed: Array
    shares: Array | None
    true_labels: Array | None
    genes: tuple[Array, Array, Array] | None
    parts: tuple[int, ...]
    width: float

    def half(self, restored: NDArray[np.intp], observed: NDArray[np.intp]) -> Judge:
        """Restrict to these rows; every snapshot that was moved keeps its share of the mass."""
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
    def of(cls, one: Restored, course: Course, observed: Array, near: Array, points: Array) -> Judge:
        """Assemble what is to be judged; ``near`` are the kept cells in the same space."""
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
        if recipe is not None and points is one.cloud.points:  # only in the own space
            assert course.raw is not None
            measured = recipe.expression(course.raw[rows])[others]
            genes = recipe.decode(points), measured, recipe.decode(observed[others])
        seen = observed[others]
        parts, width = one.cloud.parts, median_distance(seen)
        return cls(points, one.cloud.mass, seen, shares, true_labels, genes, parts, width)


# --- distances
class _Value(NamedTuple):
    value: float
    error: float


def measure(judge: Judge, one: Restored, bootstraps: int) -> Iterator[dict[str, object]]:
    """Yield metrics from all cells and from half-samples of them."""
    for b in range(POINT, bootstraps):
        part = judge if b == POINT else judge.half(*half_sample(one, len(judge.observed), b))
        for metric, (value, error) in _distances(part, divergence=b < DIVERGENCES).items():
            yield {"metric": metric, "value": value, "error": error or float("nan"), "bootstrap": b}


def _distances(judge: Judge, *, divergence: bool) -> dict[str, _Value]:
    """Return the distances of `flow.judgement`, and the metrics that only benchmarks have."""
    x, y, mass, width = judge.restored, judge.observed, judge.mass, judge.width
    estimates = distances(x, y, weights_x=mass, bandwidth=width)
    found = {name: _Value(one.value, one.error) for name, one in estimates.items()}
    if divergence and max(len(x), len(y)) <= LARGEST_EXACT:
        found["sinkhorn"] = _Value(_divergence(x, y, EPSILON * width**2, mass), 0.0)
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
    except RuntimeError:  # not converged, which does not affect the other distances
        return float("nan")


def _variance(x: Array, mass: Array) -> Array:
    """Return the unbiased variance of each column."""
    return mass @ (x - mass @ x) ** 2 / (1 - mass @ mass)


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


# --- half-samples
def half_sample(one: Restored, m: int, b: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Draw half of the restored and half of the ``m`` observed cells, without replacement; return their rows.

    Which cells of a snapshot are drawn depends only on the snapshot and on ``b``. All methods and seeds thus get the
    same cells, and so do folds, whether the snapshot is held out or moved. Half of each snapshot that was moved is
    drawn; if it is not known which snapshots these were, restored cells count, by their position, as those of the
    snapshot before. The two sides of the noise reference are restricted to the cells drawn from the held-out snapshot.
    """
    fold = one.prepared.fold
    times = sorted({*fold.times, *fold.held_out_times})

    def of_snapshot(n: int, time: float) -> NDArray[np.bool_]:
        return random_half(n, np.random.default_rng([0, one.split, times.index(time), b]))

    if one.half is not None:
        drawn = of_snapshot(len(one.half), one.held_out)
        return _pair(drawn[one.half]), _pair(drawn[~one.half])
    origins = one.cloud.origins or (max(time for time in fold.times if time < one.held_out),)
    restored = [of_snapshot(n, time) for n, time in zip(one.cloud.parts, origins, strict=True)]
    return _pair(np.concatenate(restored)), _pair(of_snapshot(m, one.held_out))


def _pair(drawn: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the rows drawn or, if there are fewer than two, the first two, since one cell has no distances within."""
    rows = np.flatnonzero(drawn)
    return rows if len(rows) > 1 else np.arange(2)


def random_half(n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose half of ``n`` items at random, rounded down; return a mask ``(n,)``."""
    chosen = np.zeros(n, bool)
    chosen[rng.permutation(n)[: n // 2]] = True
    return chosen
