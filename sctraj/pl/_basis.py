"""The plane of a plot, and the projection into it from the space of the flow."""

from __future__ import annotations

from dataclasses import dataclass
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
LEAST_MOVED = 0.2  # share of a way that means over neighbours are taken to move at least; less is noise of few cells
AT_ONCE = 1000  # cells whose neighbours are gathered at once


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
        return Slice(columns)
    known = np.flatnonzero(np.isfinite(representation).all(1) & np.isfinite(basis.cells).all(1))
    known = known[thin(known.size)]
    cells = representation[known].astype(float)
    # brute force is a matrix product, in ten dimensions eight times as fast as the tree that "auto" would build, but
    # only if cells and queries have the same dtype
    search = NearestNeighbors(n_neighbors=min(N_NEIGHBORS, known.size), algorithm="brute").fit(cells)
    return Neighbours(search, cells, basis.cells[known])


@dataclass(frozen=True)
class Slice:
    """The map to a plane of two of the flow's own columns."""

    columns: list[int]

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return places in the plane, m x 2, of points m x d."""
        return np.asarray(points, dtype=float)[:, self.columns]

    def velocities(self, points: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        """Return velocities in the plane, m x 2, of those at points of the flow's space, m x d each."""
        return self(velocity)


@dataclass(frozen=True)
class Neighbours:
    """The map to a plane in which cells have places, by weighted means over the nearest of them."""

    search: NearestNeighbors
    cells: np.ndarray  # n x d, in the flow's space
    places: np.ndarray  # n x 2, in the plane

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return places in the plane, m x 2, of points m x d; NaN where these are not finite."""
        points = np.asarray(points, dtype=float)
        projected, finite = np.full((len(points), 2), np.nan), np.isfinite(points).all(1)
        if finite.any():
            neighbor, weight = self._weights(points[finite])
            projected[finite] = np.einsum("mk,mkc->mc", weight, self.places[neighbor])
        return projected

    def velocities(self, points: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        """Return velocities in the plane, m x 2, of those at points of the flow's space, m x d each.

        They are central differences along each velocity, which all span the same length, whatever the speed, so that
        directions of slow cells are as accurate as those of fast ones. Where cells end on one side, as at the first and
        the last snapshot, weighted means move less than the point does, in both spaces alike; so the difference in the
        plane is divided by how far the mean of the same cells moves in the flow's own space, of the way of the point.
        """
        points, velocity = np.asarray(points, dtype=float), np.asarray(velocity, dtype=float)
        speed = np.linalg.norm(velocity, axis=1, keepdims=True)
        direction = np.divide(velocity, speed, out=np.zeros_like(velocity), where=speed > 0)
        spread = np.sqrt(np.nanmean(np.sum((points - np.nanmean(points, axis=0)) ** 2, axis=1)))
        step = STEP * (spread or 1.0)
        moved = np.full((len(points), 2), np.nan)
        finite = np.flatnonzero(np.isfinite(points).all(1) & np.isfinite(velocity).all(1))
        for rows in np.array_split(finite, max(1, len(finite) // AT_ONCE)):
            at, along = points[rows], direction[rows]
            ahead, behind = (self._along(at + way * along, along) for way in (step, -step))
            in_plane, in_space = ((one - other) / (2 * step) for one, other in zip(ahead, behind))
            moved[rows] = in_plane / np.maximum(in_space, LEAST_MOVED)[:, None]
        return moved * speed

    def _along(self, points: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean place in the plane, m x 2, and the mean coordinate along a direction of each, m."""
        neighbor, weight = self._weights(points)
        places = np.einsum("mk,mkc->mc", weight, self.places[neighbor])
        return places, np.einsum("mk,mkd,md->m", weight, self.cells[neighbor], direction, optimize=True)

    def _weights(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest cells, m x k, and their weights, which sum to one."""
        distance, neighbor = self.search.kneighbors(points)
        bandwidth = np.maximum(distance[:, -1:] / 2, np.finfo(float).tiny)
        weight = np.exp(-0.5 * (distance / bandwidth) ** 2)
        return neighbor, weight / weight.sum(1, keepdims=True)


Projection = Slice | Neighbours


def thin(n: int) -> np.ndarray:
    """Choose at most `MOST_CELLS` of n rows, evenly spaced: not random, and fair if snapshots are stored in turn."""
    return np.linspace(0, n - 1, min(n, MOST_CELLS)).astype(int)
