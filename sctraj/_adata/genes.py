"""Decode a flow's representation to genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._memory import size_of

if TYPE_CHECKING:
    from anndata import AnnData

CLOSE = 1e-2  # tolerated difference of recomputed components, relative to the largest one
SLAB = 2**26  # bytes of genes that are decoded at once


@dataclass(frozen=True)
class Decoder:
    """Genes as a linear function of coordinates.

    Attributes
    ----------
    genes
        Their positions in ``var``, ``(g,)``.
    mean
        Their values at the origin of the representation, ``(g,)``.
    loadings
        Change of the genes per unit of each coordinate, ``(g, d)``.
    held
        Share of their variance that the components hold; None for some genes alone, or if scanpy has not written it.
    """

    genes: np.ndarray
    mean: np.ndarray
    loadings: np.ndarray
    held: float | None

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the genes' values ``(n, g)`` float32 at points ``(n, d)``."""
        values = np.empty((len(points), len(self.genes)), np.float32)
        rows = max(1, SLAB // max(1, size_of((1, len(self.genes)), "float64")))
        for start in range(0, len(points), rows):
            part = points[start : start + rows].astype(np.float64)
            values[start : start + rows] = part @ self.loadings.T + self.mean
        return values

    def only(self, adata: AnnData, names: Sequence[str]) -> Decoder:
        """Return the decoder for some genes, in the order of the given names."""
        numbers = gene_numbers(adata, names)
        rows = {gene: row for row, gene in enumerate(self.genes)}
        if left := [name for name, gene in zip(names, numbers) if gene not in rows]:
            raise KeyError(
                f"Expected genes that the components were computed from; {', '.join(left[:5])} "
                f"{'has' if len(left) == 1 else 'have'} no loading. Recompute the PCA with them."
            )
        chosen = [rows[gene] for gene in numbers]
        parts = {"genes": self.genes[chosen], "mean": self.mean[chosen], "loadings": self.loadings[chosen]}
        return replace(self, **parts, held=None)


@dataclass(frozen=True)
class Columns:
    """Genes that are themselves coordinates of the representation.

    Attributes
    ----------
    genes
        Their positions in ``var``, ``(g,)``.
    """

    genes: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the genes' values ``(n, g)`` at points ``(n, d)``."""
        return points[:, self.genes]


def way_to_genes(adata: AnnData, use_rep: str, names: Sequence[str]) -> Decoder | Columns:
    """Return the way from a representation to some genes, in the order of their names; raise an error without one."""
    if use_rep == "X":
        return Columns(gene_numbers(adata, names))
    decoder, why_not = read_decoder(adata, use_rep)
    if decoder is None:
        raise ValueError(
            f"Expected a flow from which there is a way back to genes; found none: {why_not}. Fit one in "
            f'obsm["X_pca"] beside its varm["PCs"], or leave genes out.'
        )
    return decoder.only(adata, names)


def gene_numbers(adata: AnnData, names: Sequence[str]) -> np.ndarray:
    """Return the genes' positions in ``var``, in the order of the names; raise a KeyError for unknown names."""
    twice = {*adata.var_names[adata.var_names.duplicated()]} & {*names}
    if twice:
        raise ValueError(
            f"Expected genes of one name each; {', '.join(sorted(twice))} stand twice. Call "
            f"adata.var_names_make_unique()."
        )
    found = adata.var_names.get_indexer_for(list(names))
    if (found < 0).any():
        absent = [str(name) for name, number in zip(names, found) if number < 0]
        raise KeyError(f"Expected names of genes; not in adata.var_names: {', '.join(absent[:5])}. Pass others.")
    return found


def read_decoder(adata: AnnData, use_rep: str) -> tuple[Decoder | None, str]:
    """Return the decoder for scanpy's principal components, standardised or not, or text that says why there is none.

    scanpy does not store the means, so they are computed again from ``X``. It is checked that ``(X - mean) PCs`` gives
    ``X_pca``, up to the mean of ``X_pca``, which is not zero if cells were left out after the PCA.

    Raises
    ------
    ValueError
        If the components cannot be computed again from ``X``.
    """
    record = adata.uns.get(use_rep)
    standardised = isinstance(record, Mapping) and str(record.get("use_rep")) == "X_pca" and "std" in record
    if use_rep != "X_pca" and not standardised:
        return None, f'the flow is in "{use_rep}"; from "X_pca" and what is standardised from it there is a way back'
    if "PCs" not in adata.varm or "X_pca" not in adata.obsm:
        return None, 'no varm["PCs"]' if "X_pca" in adata.obsm else 'no obsm["X_pca"]'
    d = np.shape(adata.obsm[use_rep])[1]
    scores = np.asarray(adata.obsm["X_pca"], dtype=np.float64)[:, :d]
    loadings = np.asarray(adata.varm["PCs"], dtype=np.float64)[:, :d]
    genes = np.flatnonzero(np.abs(loadings).any(axis=1))
    loadings, centre = loadings[genes], scores.mean(axis=0)
    mean, reason = _mean_behind(adata.X, genes, loadings, scores - centre)
    if mean is None:
        if standardised:  # of unscaled components the user expects genes, and must ask to do without
            return None, reason
        raise ValueError(
            f"Expected X and varm['PCs'] to reproduce obsm['X_pca'], to decode cells to genes; found: {reason} "
            f"(X was changed or scaled after the PCA, or genes were removed?). Recompute the PCA, or do without genes: "
            f"decode=False, where that is an option."
        )
    mean = mean - loadings @ centre
    if standardised:
        assert isinstance(record, Mapping)
        mean, loadings = mean + loadings @ np.asarray(record["mean"]), loadings * np.asarray(record["std"])
    return Decoder(genes, mean, loadings, _held(adata, d)), ""


def _mean_behind(
    matrix: Any, genes: np.ndarray, loadings: np.ndarray, deviations: np.ndarray
) -> tuple[np.ndarray | None, str]:
    """Return the genes' means ``(g,)`` if ``X`` about them gives the components' ``deviations``, or why it does not."""
    if matrix is None or loadings.shape[1] != deviations.shape[1]:
        return None, "X is missing or PCs has fewer components than X_pca"
    if len(deviations) < 2:
        return None, "a single cell, by which that cannot be told"
    matrix = matrix[:, genes]
    mean = np.asarray(matrix.mean(axis=0)).ravel().astype(np.float64)
    projected = np.asarray(matrix @ loadings) - mean @ loadings
    worst = np.abs(projected - deviations).max() / np.abs(deviations).max()
    if not worst < CLOSE:
        return None, f"(X - mean) PCs differs from X_pca by up to {worst:.2g} of its largest value"
    return mean, ""


def _held(adata: AnnData, d: int) -> float | None:
    record = adata.uns.get("pca")
    ratio = np.asarray(record.get("variance_ratio", ()) if isinstance(record, Mapping) else ())
    return float(ratio[:d].sum()) if len(ratio) >= d else None
