"""A course as a benchmark reads it, and its folds, each with its kept cells in the space where methods work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .. import _adata
from ..flow.snapshots import Snapshots
from ._representation import Array, Recipe, fit_recipe, read_expression
from ._tasks import Fold, Rows

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Course:
    """All cells of a course, as `evaluate` reads them.

    Attributes
    ----------
    times, index
        Times of the snapshots, and the rows of their cells.
    points
        Coordinates in the common space, ``(n_obs, d)``.
    raw, n_dims, recipe
        Expression, number of components and the recipe of the common space; None if units are not strict.
    labels
        Label of each cell as a number, and the number of labels; None without labels.
    """

    times: tuple[float, ...]
    index: tuple[Rows, ...]
    points: Array
    raw: NDArray | None = None
    n_dims: int | None = None
    recipe: Recipe | None = None
    labels: tuple[NDArray[np.intp], int] | None = None

    @cached_property
    def snapshots(self) -> tuple[torch.Tensor, ...]:
        """Cells in the common space, float32; all folds get the same tensors, by which couplings are recognised."""
        return tuple(_single(self.points[rows]) for rows in self.index)


def read_course(
    adata: AnnData, time_key: str, use_rep: str, n_dims: int | None, labels: str | None, *, strict: bool
) -> Course:
    """Read times, coordinates or expression, and labels; see `evaluate`."""
    types = read_labels(adata, labels)
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


def read_labels(adata: AnnData, name: str | None) -> tuple[NDArray[np.intp], int] | None:
    """Return the label of each cell as a number, and the number of labels; None if no column is named."""
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
    """A fold in its own space: the cells that methods are given, and the recipe of the space.

    Attributes
    ----------
    fold
        The rows of its cells.
    snapshots
        Kept cells, float32.
    recipe
        Fitted on the kept cells only; None if the representation is given.
    """

    fold: Fold
    snapshots: Snapshots
    recipe: Recipe | None


def prepare(course: Course, fold: Fold) -> Prepared:
    """Map a fold's kept cells into the space where methods work, without using the held-out cells."""
    if course.raw is None:
        whole = dict(zip(course.times, zip(course.index, course.snapshots)))
        recipe, kept = None, []
        for time, rows in zip(fold.times, fold.kept):
            of_snapshot, cells = whole[time]
            kept.append(cells if np.array_equal(rows, of_snapshot) else _single(course.points[rows]))
    else:
        assert course.n_dims is not None
        recipe = fit_recipe(course.raw[np.concatenate(fold.kept)], course.n_dims)
        kept = [_single(recipe.project(course.raw[rows])) for rows in fold.kept]
    return Prepared(fold, Snapshots(fold.times, tuple(kept)), recipe)


def _single(points: Array) -> torch.Tensor:
    return torch.from_numpy(points.astype(np.float32))
