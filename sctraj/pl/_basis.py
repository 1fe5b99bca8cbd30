"""The plane of a plot, and the projection into it from the space of the flow."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sklearn.neighbors import NearestNeighbors

from sctraj._adata import is_ours

if TYPE_CHECKING:
    from anndata import AnnData

MOST_CELLS = 20_000  # at most so many cells are searched for neighbours and averaged over for arrows
N_NEIGHBORS = 30
STEP = 0.1  # length of a finite difference, as a fraction of the cells' rms distance from their mean

Projection = Callable[[np.ndarray], np.ndarray]  # m x d -> m x 2


class Basis(NamedTuple):
    """Position of every cell in the plane of the plot, and names of its two axes."""

    cells: np.ndarray  # n_obs x 2
    labels: tuple[str, str]
    is_embedding: bool  # a space other than the flow's, whose units mean nothing


def find_basis(adata: AnnData, basis: str | None, *, dims: tuple[int, int], use_rep: str) -> Basis:
    """Look up two coordinates of every cell.

    Parameters
    ----------
    adata
        Annotated cells.
    basis
        A matrix in ``adata.obsm``, with or without the prefix ``X_``; None for `use_rep`.
    dims
        Two of its columns.
    use_rep
        The representation that the flow was fitted in: a key of ``adata.obsm``, or "X".

    Raises
    ------
    KeyError
        If there is no such basis; the message lists those present.
    ValueError
        If `dims` are not two of its columns.
    """
    present = [name for name, matrix in adata.obsm.items() if np.ndim(matrix) == 2]
    wanted = use_rep if basis is None else basis
    name = next((name for name in (wanted, f"X_{wanted}") if name in present or name == "X" == use_rep), None)
    if name is None:
        offered = [one for one in present if not is_ours(adata, one)]
        raise KeyError(f"basis={wanted!r} is not in adata.obsm; present are {offered}. Pass one of them, or no basis.")
    matrix = adata.X if name == "X" else adata.obsm[name]
    n = matrix.shape[1]
    if np.size(dims) != 2 or not all(isinstance(one, Integral) and 0 <= one < n for one in dims):
        raise ValueError(f"dims={dims!r} should be two columns of {name!r}, which has {n} (the first is 0).")
    return Basis(_columns(matrix, dims), _labels(adata, name, dims), is_embedding=name != use_rep)


def _columns(matrix: Any, dims: tuple[int, int]) -> np.ndarray:
    matrix = matrix.iloc if hasattr(matrix, "iloc") else matrix
    chosen = matrix[:, list(dims)]
    return np.asarray(chosen.toarray() if hasattr(chosen, "toarray") else chosen, dtype=float)


def _labels(adata: AnnData, name: str, dims: tuple[int, int]) -> tuple[str, str]:
    if name == "X":
        return str(adata.var_names[dims[0]]), str(adata.var_names[dims[1]])
    short = name.removeprefix("X_")
    short = {"pca": "PC", "umap": "UMAP", "tsne": "tSNE"}.get(short, f"{short} ")
    return f"{short}{dims[0] + 1}", f"{short}{dims[1] + 1}"


def projection(basis: Basis, representation: np.ndarray, *, dims: tuple[int, int]) -> Projection:
    """Return the map from the flow's space to the plane of the plot.

    If the plane consists of two columns of the representation, the map is a slice. Otherwise it is the Nadaraya-Watson
    estimate from the cells, whose positions are known in both spaces: Gaussian weights over the nearest `N_NEIGHBORS`,
    with half the distance to the furthest of them as bandwidth. Unlike a local linear fit, a weighted mean never leaves
    the embedding.

    Parameters
    ----------
    basis
        The plane.
    representation
        The cells in the flow's space, n_obs x d.
    dims
        The columns that make up the plane, if it is a slice.
    """
    columns = list(dims)
    if max(dims) < representation.shape[1] and np.allclose(representation[:, columns], basis.cells, equal_nan=True):
        return lambda points: np.asarray(points, dtype=float)[:, columns]
    known = np.flatnonzero(np.isfinite(representation).all(1) & np.isfinite(basis.cells).all(1))
    known = known[thin(known.size)]
    targets = basis.cells[known]
    # brute force is a matrix product, in ten dimensions eight times as fast as the tree that "auto" would build, but
    # only if cells and queries have the same dtype
    search = NearestNeighbors(n_neighbors=min(N_NEIGHBORS, known.size), algorithm="brute")
    search.fit(representation[known].astype(float))

    def project(points: np.ndarray) -> np.ndarray:
        projected = np.full((len(points), 2), np.nan)
        finite = np.isfinite(points).all(1)
        if finite.any():
            distance, neighbor = search.kneighbors(np.asarray(points, dtype=float)[finite])  # both m x k
            bandwidth = np.maximum(distance[:, -1:] / 2, np.finfo(float).tiny)
            weight = np.exp(-0.5 * (distance / bandwidth) ** 2)
            projected[finite] = np.einsum("mk,mkc->mc", weight / weight.sum(1, keepdims=True), targets[neighbor])
        return projected

    return project


def project_velocity(project: Projection, points: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Project velocities into the plane, by a central difference along each.

    All differences span the same length, whatever the speed, so that directions of slow cells are as accurate as those
    of fast ones.

    Parameters
    ----------
    project
        The map to the plane.
    points, velocity
        Positions and velocities in the flow's space, m x d each.

    Returns
    -------
    The velocities in the plane, m x 2, per unit time.
    """
    points, velocity = np.asarray(points, dtype=float), np.asarray(velocity, dtype=float)
    speed = np.linalg.norm(velocity, axis=1, keepdims=True)
    direction = np.divide(velocity, speed, out=np.zeros_like(velocity), where=speed > 0)
    spread = np.sqrt(np.nanmean(np.sum((points - np.nanmean(points, axis=0)) ** 2, axis=1)))
    step = STEP * (spread or 1.0) * direction
    return (project(points + step) - project(points - step)) / (2 * STEP * (spread or 1.0)) * speed


def thin(n: int) -> np.ndarray:
    """Choose at most `MOST_CELLS` of n rows, evenly spaced: not random, and fair if snapshots are stored in turn."""
    return np.linspace(0, n - 1, min(n, MOST_CELLS)).astype(int)
