"""Cells so far from all others that they decide what a fit is like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .._log import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from .._adata import Cells

FAR = 100.0  # times the median distance from the snapshot's median: no tail of real cells is that long
SAMPLE = 1000  # cells that medians are taken of, which a few more or less do not move
NAMED = 5


def warn_of_outliers(adata: AnnData, cells: Cells) -> None:
    """Log the names of cells that are absurdly far from their snapshot's others; nothing is changed."""
    found = []
    for t, x, rows in zip(cells.snapshots.times, cells.snapshots.points, cells.index):
        times_median = _times_median(x)
        found += [(times_median[k], adata.obs_names[rows[k]], t) for k in np.flatnonzero(times_median > FAR)]
    if found:
        found.sort(reverse=True)
        told = ", ".join(f"{name} (time {t:g}, {times:.2g} times)" for times, name, t in found[:NAMED])
        logger.warning(
            f"{len(found)} of {cells.n_obs} cells are more than {FAR:g} times the median distance from the middle of "
            f"their snapshot: {told}{', ...' if len(found) > NAMED else ''}; by default they widen sigma, and paths "
            f"lead to them: leave them out unless they are real"
        )


def _times_median(x: torch.Tensor) -> NDArray[np.float64]:
    """Return cells' distances ``(n,)`` from their coordinates' medians, in units of the median one; 0 where that is."""
    some = x[torch.linspace(0, len(x) - 1, min(len(x), SAMPLE), dtype=torch.float64).round().long()]
    middle = some.median(0).values
    scale = float(torch.linalg.vector_norm(some - middle, dim=1).median())
    if not scale:  # most cells at one place: nothing to go by
        return np.zeros(len(x))
    return torch.linalg.vector_norm(x - middle, dim=1).double().numpy() / scale
