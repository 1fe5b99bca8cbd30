from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from sctraj import get
from sctraj._adata import check_cells, stored

from ._basis import Basis, find_basis, projection
from ._cells import (
    axes_or_new,
    check_color,
    color_bar,
    draw_cells,
    make_room,
    time_colormap,
    time_label,
    time_range,
    times_of,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def trajectories(
    adata: AnnData,
    *,
    basis: str | None = None,
    color: str | None = None,
    rows: Sequence[int] | Sequence[bool] | Sequence[str] | None = None,
    n_cells: int = 50,
    dims: tuple[int, int] = (0, 1),
    key: str = "flow",
    rng: int | np.random.Generator | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the paths of some cells over all cells.

    The paths are coloured by the time along them. In a basis other than the flow's own, each point of a path is drawn
    at the kernel-weighted mean position of the cells nearest to it. Read no more into such paths than that, because an
    embedding has no paths of its own: a path that leaves the cells still appears among them. Cells of all times
    that the paths run through must therefore be present; to see the paths of some cells, pass all cells and choose by
    `rows`.

    Cells whose times or coordinates differ from those at the fit are refused. For a part of the cells, or for shuffled
    ones, this is checked by computing the stored velocities of some of them again. If the field is your own module,
    this is not possible, and only the times are checked.

    Parameters
    ----------
    adata
        Annotated cells with trajectories, from :func:`sctraj.tl.trajectories`.
    basis
        A matrix in ``adata.obsm``, such as "umap"; the representation of the fit if None.
    color
        A column of ``adata.obs`` or a gene by which to colour the cells; the time of the fit if None. The colours of
        the fit's growth are centred at 0 and end at the 98th percentile, as do those of its velocities' deviation.
        Categories take the colours in ``adata.uns[color + "_colors"]``, if there are any. A gene is shown by its values
        in ``adata.X``.
    rows
        Cells whose paths are shown: numbers, names or a mask, as in :func:`sctraj.get.trajectories`, such as
        ``adata.obs["time"] == 0``. None: `n_cells` of all cells.
    n_cells
        Show at most this many paths; if there are more cells, or more `rows`, they are chosen at random.
    dims
        Which two columns of the basis.
    key
        The fit's name, its ``key_added``.
    rng
        Seed or generator for the choice of cells.
    ax
        Axes to draw in; they shrink to make room for a legend or colour bar. None: those of a new figure. Small panels
        look best in a figure with ``layout="constrained"``.

    Returns
    -------
    The axes. The paths are their only ``LineCollection``.

    Raises
    ------
    KeyError
        No such fit, trajectories, basis or `rows`; a `color` that is neither a column of ``adata.obs`` nor a gene.
    ValueError
        Other times or coordinates than at the fit; a `color` without a finite value; `dims` that the basis lacks; an
        `n_cells` that is not a whole number of at least 0; in a basis other than the flow's own, snapshots that the
        paths run through but of which no cells are present.
    """
    if not isinstance(n_cells, Integral) or n_cells < 0:
        raise ValueError(f"n_cells={n_cells!r} should be a whole number of at least 0, of cells to show the paths of.")
    params = stored(adata, key)["params"]
    check_color(adata, color)
    check_cells(adata, key)
    time_key = params["time_key"]
    plane = find_basis(adata, basis, dims=dims, use_rep=params["use_rep"])
    among = np.arange(adata.n_obs) if rows is None else get.row_numbers(adata, rows)
    chosen = np.sort(np.random.default_rng(rng).choice(among, size=min(n_cells, among.size), replace=False))
    table = get.trajectories(adata, rows=chosen.tolist(), key=key)
    times = table.index.get_level_values("time").to_numpy(dtype=float)[: len(table) // max(chosen.size, 1)]
    observed = times_of(adata, time_key)
    if plane.is_embedding:
        _check_times_are_there(plane, observed, np.asarray(adata.uns[key]["times"], dtype=float), times, time_key)
    project = projection(plane, get.representation(adata, key=key), dims=dims)
    paths = project(table.to_numpy()).reshape(chosen.size, times.size, 2)

    norm = time_range(adata, key, observed)
    ax = axes_or_new(ax)
    draw_cells(ax, adata, plane, color=color, time_key=time_key, norm=norm, alpha=0.3, key=key)
    make_room(ax)
    _draw_paths(ax, paths, times, norm)
    if color not in (None, time_key):
        color_bar(ax, norm, time_colormap(), time_label(adata, time_key))
    return ax


def _check_times_are_there(
    plane: Basis, observed: np.ndarray, snapshots: np.ndarray, times: np.ndarray, time_key: str
) -> None:
    """Raise a ValueError if no cells are there of a time that paths run through, as others would then stand in."""
    there = np.unique(observed[np.isfinite(plane.cells).all(1)])
    asked = snapshots[(snapshots >= times.min(initial=np.inf)) & (snapshots <= times.max(initial=-np.inf))]
    if (absent := np.setdiff1d(asked, there)).size:
        raise ValueError(
            f"Paths in {plane.labels[0]} and {plane.labels[1]} are placed by the cells near them, and of "
            f"{time_key} {', '.join(f'{t:g}' for t in absent[:5])}{', ...' if absent.size > 5 else ''} there are none "
            f"that have a place there. Pass all cells, and choose those whose paths to see by rows=."
        )


def _draw_paths(ax: Axes, paths: np.ndarray, times: np.ndarray, norm: Normalize) -> None:
    segments = np.stack([paths[:, :-1], paths[:, 1:]], axis=2)  # n x (n_times - 1) x 2 ends x 2
    middle = np.broadcast_to((times[:-1] + times[1:]) / 2, segments.shape[:2])
    finite = np.isfinite(segments).all((2, 3))
    lines = LineCollection(list(segments[finite]), cmap=time_colormap(), norm=norm, lw=0.9, capstyle="round", zorder=3)
    lines.set_array(middle[finite])
    ax.add_collection(lines)
    ax.autoscale_view()
