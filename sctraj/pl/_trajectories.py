from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from sctraj import get
from sctraj._adata import check_cells

from ._basis import find_basis, fit_params, projection
from ._cells import axes_or_new, check_color, color_bar, draw_cells, make_room, time_colormap, time_label, times_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def trajectories(
    adata: AnnData,
    *,
    basis: str | None = None,
    color: str | None = None,
    n_cells: int = 50,
    dims: tuple[int, int] = (0, 1),
    key: str = "flow",
    rng: int | np.random.Generator | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the paths of some cells over all cells.

    The paths are coloured by time along the way. In another basis than the flow's own they are the kernel-weighted
    mean place of the nearest cells; read no more into them than that, for an embedding has no paths of its own.

    Cells with other times or coordinates than at the fit are refused. Of a part of the cells, or of shuffled ones, the
    stored velocities of some are computed again; with a field that is your own module this cannot be done, and only
    their times are checked.

    Parameters
    ----------
    adata
        Annotated cells with trajectories, from :func:`sctraj.tl.trajectories`.
    basis
        A matrix in ``adata.obsm``, such as "umap"; the representation of the fit if None.
    color
        A column of ``adata.obs`` that colours the cells; the time of the fit if None. Colours of the fit's growth are
        centred at 0, and end, as those of its velocities' spread, at the 98th percentile. Categories have the colours
        of ``adata.uns[color + "_colors"]``, where they are there.
    n_cells
        How many cells, drawn at random, to show the paths of.
    dims
        Which two columns of the basis.
    key
        The fit's name, its ``key_added``.
    rng
        Seed or generator for the choice of cells.
    ax
        Axes to draw in, which shrink to make room for a legend or colour bar; a new figure's if None. Small panels look
        best in a figure with ``layout="constrained"``.

    Returns
    -------
    The axes. The paths are its one ``LineCollection``.

    Raises
    ------
    KeyError
        No such fit, trajectories, basis or column of ``adata.obs``.
    ValueError
        Other times or coordinates than at the fit; a `color` without a finite value; `dims` that the basis lacks; an
        `n_cells` that is no whole number from 0 up.
    """
    if not isinstance(n_cells, Integral) or n_cells < 0:
        raise ValueError(f"n_cells={n_cells!r} should be a whole number of at least 0, of cells to show the paths of.")
    params = fit_params(adata, key)
    check_color(adata, color)
    check_cells(adata, key)
    time_key = params["time_key"]
    plane = find_basis(adata, basis, dims=dims, use_rep=params["use_rep"])
    chosen = np.sort(np.random.default_rng(rng).choice(adata.n_obs, size=min(n_cells, adata.n_obs), replace=False))
    table = get.trajectories(adata, rows=chosen.tolist(), key=key)
    times = table.index.get_level_values("time").to_numpy(dtype=float)[: len(table) // max(chosen.size, 1)]
    project = projection(plane, get.representation(adata, key=key), dims=dims)
    paths = project(table.to_numpy()).reshape(chosen.size, times.size, 2)

    observed = times_of(adata, time_key)
    norm = Normalize(np.nanmin([*times, np.nanmin(observed)]), np.nanmax([*times, np.nanmax(observed)]))
    ax = axes_or_new(ax)
    draw_cells(ax, adata, plane, color=color, time_key=time_key, norm=norm, alpha=0.3, key=key)
    make_room(ax)
    _draw_paths(ax, paths, times, norm)
    if color not in (None, time_key):
        color_bar(ax, norm, time_colormap(), time_label(adata, time_key))
    return ax


def _draw_paths(ax: Axes, paths: np.ndarray, times: np.ndarray, norm: Normalize) -> None:
    segments = np.stack([paths[:, :-1], paths[:, 1:]], axis=2)  # n x (n_times - 1) x 2 ends x 2
    middle = np.broadcast_to((times[:-1] + times[1:]) / 2, segments.shape[:2])
    finite = np.isfinite(segments).all((2, 3))
    lines = LineCollection(list(segments[finite]), cmap=time_colormap(), norm=norm, lw=0.9, capstyle="round", zorder=3)
    lines.set_array(middle[finite])
    ax.add_collection(lines)
    ax.autoscale_view()
