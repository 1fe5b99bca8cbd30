"""Warnings about doubtful data, logged before a fit or before cells are followed to groups; nothing is changed."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._log import logger
from ..flow.clouds import evenly

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from .._adata import Cells
    from ..flow.snapshots import Snapshots

# embeddings that do not preserve distances
TO_LOOK_AT = re.compile("(x_)?(umap|tsne|phate|draw_graph|fle|mde|pacmap|trimap)(?![a-z])", re.IGNORECASE)
ALONE = 0.99  # share of one dimension in the sum of all squared widths
FOLD = 20.0  # log of the factor by which one cell may outgrow another over a gap; more suggests another unit of time
FAINT = 0.05  # the same: a contrast below this changes nothing
FAR = 100.0  # times the median distance from the snapshot's median; no tail of real cells reaches that far
LOOKED_AT = 300  # cells by which a representation is judged
SAMPLE = 1000  # cells from which medians are computed; a few more or fewer do not change them
NAMED = 5
MISSING = 0.1  # share of cells without a group that is said
PLACEHOLDERS = ("", "nan", "na", "n/a", "none", "<na>", "unknown", "unassigned")


def say_doubts(adata: AnnData, cells: Cells, use_rep: str, growth_key: str | None) -> None:
    """Log what makes a flow through these cells doubtful: outliers, the representation or the growth prior."""
    _doubt_representation(cells.snapshots, use_rep)
    if growth_key is not None:
        _doubt_prior(cells.snapshots, growth_key)
    _name_outliers(adata, cells)


def _doubt_representation(snapshots: Snapshots, use_rep: str) -> None:
    if TO_LOOK_AT.match(use_rep):
        logger.warning(
            f'"{use_rep}" is made to be looked at: its distances and directions are not those of the cells, and so a '
            f'flow in it is not theirs either; fit in principal components, and draw that flow with basis="{use_rep}"'
        )
    part = max(3, LOOKED_AT // len(snapshots))
    some = torch.cat([x[evenly(len(x), part)] for x in snapshots.points])
    if use_rep == "X" and bool(((some == some.round()) & (some >= 0)).all()):
        logger.warning("X holds whole numbers, as raw counts are; normalise them and take logarithms before a fit")
    ordered = some.sort(0).values
    low, high = (ordered[round(share * (len(some) - 1))] for share in (0.1, 0.9))  # unaffected by a few extreme cells
    squares = (high - low).double().square()
    if len(squares) > 2 and float(squares.min()) > 0 and float(squares.max()) > ALONE * float(squares.sum()):
        logger.warning(
            f'one dimension of "{use_rep}" ({int(squares.argmax())}; the first is 0) is so much wider than all other '
            f"{len(squares) - 1} together that distances are all but its own; scale it, unless that is meant"
        )


def _doubt_prior(snapshots: Snapshots, growth_key: str) -> None:
    ranges = [float(rate.max() - rate.min()) for rate in snapshots.growth[:-1]]  # those of the last one are not used
    if not max(ranges) > 0:
        logger.warning(
            f'obs["{growth_key}"] is the same for all cells of a snapshot (but the last one, whose rates serve '
            f"nothing), and so without effect"
        )
    longest = max(interval.length * one for interval, one in zip(snapshots.intervals(), ranges))
    if 0 < longest < FAINT:
        logger.warning(
            f'by obs["{growth_key}"] no cell outgrows another by more than {math.expm1(longest):.1%} from one snapshot '
            f"to the next, which is next to nothing; are these rates per the unit of the times?"
        )
    if longest > FOLD:
        logger.warning(
            f'by obs["{growth_key}"] one cell would outgrow another e^{longest:.0f}-fold from one snapshot to the '
            f"next; are these rates per the unit of the times?"
        )


def _name_outliers(adata: AnnData, cells: Cells) -> None:
    """Log the names of cells that are absurdly far from the other cells of their snapshot."""
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
    """Return cells' distances ``(n,)`` from their coordinatewise median, over the median distance; 0 if that is 0."""
    some = x[evenly(len(x), SAMPLE)]
    middle = some.median(0).values
    scale = float(torch.linalg.vector_norm(some - middle, dim=1).median())
    if not scale:  # most cells are at one place, so there is no scale
        return np.zeros(len(x))
    return torch.linalg.vector_norm(x - middle, dim=1).double().numpy() / scale


def doubt_groups(labels: pd.Series, n_neighbors: int, groupby: str, at: str) -> None:
    """Log what makes the groups of a snapshot's cells doubtful as fates.

    Parameters
    ----------
    labels
        Groups of the cells, categorical.
    n_neighbors, groupby
        As in `sctraj.tl.fates`.
    at
        The snapshot's time, as it is shown.
    """
    sizes, missing = labels.value_counts(), float(labels.isna().mean())
    if missing > MISSING:
        logger.warning(
            f'{missing:.0%} of the cells of time {at} have no group in obs["{groupby}"]; cells that end among them are '
            f"given the groups of the nearest cells that have one: give them a group of their own, if they are of none "
            f"of these"
        )
    if absent := [str(group) for group in sizes.index if str(group).strip().lower() in PLACEHOLDERS]:
        logger.warning(
            f'obs["{groupby}"] has groups {absent} by name; if these are cells without a group, make them NaN'
        )
    if len(sizes) == 1:
        logger.warning(
            f'all cells of time {at} are of one group in obs["{groupby}"], so that all fates are that one; pass '
            f"another time or column"
        )
    elif small := [str(group) for group, n in sizes.items() if n < n_neighbors]:
        logger.warning(
            f"{len(small)} of {len(sizes)} groups at time {at} have fewer cells than n_neighbors={n_neighbors}, which "
            f"blurs them: {', '.join(small[:NAMED])}{', ...' if len(small) > NAMED else ''}; pass a smaller one, "
            f"or read the others alone"
        )
