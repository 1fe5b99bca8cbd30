"""The recipe from genes to a few dimensions, fitted on some cells and applied to others.

Its steps are log-normalised expression, highly variable genes, scaling, principal components and standardisation. In
the strict form of the benchmark, it is fitted in every fold on the kept cells only (the fold's own space) and once on
all cells (the common space); held-out cells are only ever projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigh

from .. import _adata

if TYPE_CHECKING:
    from anndata import AnnData

TOTAL = 1e4  # total counts per cell after scaling; fixed, so that a cell's expression depends only on that cell
N_GENES = 2000  # highly variable genes; all genes if there are no more

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """A map from genes to coordinates and back.

    Attributes
    ----------
    counts
        Whether it was fitted on counts, so that cells are log-normalised first.
    genes
        Columns of the genes in use, ``(g,)``.
    mean, std
        Mean and standard deviation of each gene's log-expression, ``(g,)``.
    components
        Orthonormal principal components, ``(g, d)``.
    scale
        Standard deviation of each component, ``(d,)``.
    """

    counts: bool
    genes: NDArray[np.intp]
    mean: Array
    std: Array
    components: Array
    scale: Array

    def expression(self, raw: NDArray) -> Array:
        """Return log-expression of the genes in use, ``(n, g)``, for raw cells ``(n, all genes)``."""
        return (log_normalised(raw) if self.counts else raw)[:, self.genes].astype(np.float64)

    def project(self, raw: NDArray) -> Array:
        """Return the coordinates ``(n, d)`` of raw cells ``(n, all genes)``."""
        return ((self.expression(raw) - self.mean) / self.std) @ self.components / self.scale

    def decode(self, points: Array) -> Array:
        """Return log-expression of the genes in use, ``(n, g)``, for points ``(n, d)``; what was left out is 0."""
        return (points * self.scale) @ self.components.T * self.std + self.mean


def fit_recipe(raw: NDArray, n_dims: int, *, n_genes: int = N_GENES) -> Recipe:
    """Fit the recipe on cells ``(n, all genes)``, counts or log-expression; which of these is judged by these cells."""
    counts = holds_counts(raw)
    values = (log_normalised(raw) if counts else raw).astype(np.float64)
    spread = np.ptp(values, axis=0)
    genes = np.flatnonzero(spread > 4 * np.finfo(values.dtype).eps * np.abs(values).max(axis=0))
    if len(genes) > n_genes:
        genes = genes[_highly_variable(values[:, genes], n_genes)]
    most = min(len(genes), len(raw) - 1)
    if not 1 <= n_dims <= most:
        raise ValueError(
            f"expected n_dims from 1 to {most}, for {len(genes)} genes that vary among {len(raw)} kept cells, found "
            f"{n_dims}; take fewer dimensions"
        )
    values = values[:, genes]
    mean, std = values.mean(axis=0), values.std(axis=0)
    scaled = (values - mean) / std
    g = len(genes)
    variance, components = eigh(scaled.T @ scaled / len(scaled), subset_by_index=[g - n_dims, g - 1])
    variance, components = variance[::-1], components[:, ::-1]
    # orient each axis such that its largest entry is positive, so that folds agree
    components = components * np.sign(components[np.abs(components).argmax(axis=0), range(n_dims)])
    if not variance[-1] > 1e-9 * variance[0]:
        raise ValueError(f"expected {n_dims} components with variance, found fewer; take fewer dimensions")
    return Recipe(counts, genes, mean, std, components, np.sqrt(variance))


def to_common(points: Array, own: Recipe, common: Recipe) -> Array:
    """Carry points ``(n, d)`` from one recipe's space to another's, through the genes.

    This loses information. A point stands for the genes that its d components predict, so variation in the common space
    outside the span of the fold's own components is missing (restored cells vary a little less than they should). So is
    that of genes that are in use only in the common space, which stay at their common mean. Every restoration loses
    this, including those of the baselines and the noise reference.
    """
    values = np.tile(common.mean, (len(points), 1))
    _, of_common, of_own = np.intersect1d(common.genes, own.genes, assume_unique=True, return_indices=True)
    values[:, of_common] = own.decode(points)[:, of_own]
    return ((values - common.mean) / common.std) @ common.components / common.scale


def holds_counts(raw: NDArray) -> bool:
    """Return whether all values are non-negative whole numbers."""
    return bool((raw >= 0).all()) and bool((raw == np.round(raw)).all())


def log_normalised(counts: NDArray) -> Array:
    """Return log1p of counts scaled to a total of ``TOTAL`` per cell; nothing is fitted."""
    total = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log1p(counts * (TOTAL / np.maximum(total, 1)))


def check_expression(adata: AnnData) -> None:
    """Raise an error that says why, if the recipe cannot be fitted anew."""
    if adata.n_vars == 0 or adata.X is None:
        raise ValueError(
            "expected expression of genes in X, to fit the representation anew in every fold without the held-out "
            "cells; found a finished representation alone, which was computed on all cells at once. Leave strict out "
            "and use_rep='recipe' (the published form has seen the held-out cells and says so), or give data with genes"
        )
    values = adata.X.data if sparse.issparse(adata.X) else np.asarray(adata.X)
    if (values < 0).any():
        raise ValueError(
            "expected counts or log-expression in X, not below zero; found negative values: scaled or centred, with "
            "what was computed on all cells, held-out ones included. Put the expression before scaling into X, or "
            "leave strict out and use_rep='recipe'"
        )


def read_expression(adata: AnnData) -> NDArray:
    """Return counts or log-expression, n_obs x n_vars; see `check_expression`."""
    check_expression(adata)
    return _adata.read_rep(adata, "X")


def _highly_variable(values: Array, n_genes: int) -> NDArray[np.intp]:
    """Return the columns of the most variable genes, by dispersion given the mean (Satija et al. 2015), like scanpy."""
    import anndata as ad
    import scanpy as sc

    found = sc.pp.highly_variable_genes(ad.AnnData(values), n_top_genes=n_genes, flavor="seurat", inplace=False)
    return np.flatnonzero(found["highly_variable"].to_numpy())
