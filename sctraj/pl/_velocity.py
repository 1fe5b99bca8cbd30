from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sctraj import get
from sctraj._adata import VELOCITY, check_cells, stored

from ._basis import find_basis, projection, thin
from ._cells import axes_or_new, check_color, draw_cells, ink, make_room, shrinkage, time_range, times_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

Kind = Literal["arrows", "stream"]
GRID = {"arrows": 28, "stream": 40}  # grid points along either axis at density 1
# of the weights, in grid spacings at density 1; wider for streamlines, which end at the first gap
BANDWIDTH = {"arrows": 0.7, "stream": 1.2}
USUAL_LENGTH, LONGEST = 1.7, 2.5  # grid cells spanned by the 95th percentile of the arrows, and by the longest


def velocity(
    adata: AnnData,
    *,
    basis: str | None = None,
    kind: Kind = "arrows",
    color: str | None = None,
    dims: tuple[int, int] = (0, 1),
    key: str = "flow",
    density: float = 1.0,
    min_mass: float = 0.03,
    ax: Axes | None = None,
) -> Axes:
    """Draw the velocity of the cells, averaged on a grid, over the cells.

    The average is taken over the cells of all times, with Gaussian weights about as wide as the default grid's spacing.

    Cells whose times or coordinates differ from those at the fit are refused. For a part of the cells, or for shuffled
    ones, this is checked by computing the stored velocities of some of them again. If the field is your own module,
    this is not possible, and only the times are checked.

    Parameters
    ----------
    adata
        Annotated cells with a fit, from :func:`sctraj.tl.fit_flow`.
    basis
        A matrix in ``adata.obsm``, such as "umap"; the representation of the fit if None.
    kind
        "arrows", with lengths in proportion to the velocity (the few longest are cut to about one and a half times the
        95th percentile), or "stream", streamlines that are thicker where the velocity is higher.
    color
        A column of ``adata.obs`` or a gene by which to colour the cells; the time of the fit if None. The colours of
        the fit's growth are centred at 0 and end at the 98th percentile, as do those of its velocities' deviation.
        Categories take the colours in ``adata.uns[color + "_colors"]``, if there are any. A gene is shown by its values
        in ``adata.X``.
    dims
        Which two columns of the basis.
    key
        The fit's name, its ``key_added``.
    density
        Arrows or streamlines per unit length, relative to the default; above 0.
    min_mass
        Grid points are left empty if fewer cells lie there than this fraction of the number at the densest points (the
        99th percentile of the grid); from 0 to 1.
    ax
        Axes to draw in; they shrink to make room for a legend or colour bar. None: those of a new figure. Small panels
        look best in a figure with ``layout="constrained"``.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        No such fit or basis; a `color` that is neither a column of ``adata.obs`` nor a gene.
    ValueError
        Other times or coordinates than at the fit; an unknown `kind`; a `color` without a finite value; `dims` that the
        basis lacks; a `density` or `min_mass` out of range.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} should be one of {list(get_args(Kind))}.")
    if not (isinstance(density, Real) and 0 < density < np.inf):
        raise ValueError(f"density={density!r} should be a number above 0; 1 is the default, 2 draws twice as many.")
    if not (isinstance(min_mass, Real) and 0 <= min_mass <= 1):
        raise ValueError(f"min_mass={min_mass!r} should be a fraction from 0 to 1; 0.03 is the default.")
    params = stored(adata, key)["params"]
    check_color(adata, color)
    check_cells(adata, key)
    plane = find_basis(adata, basis, dims=dims, use_rep=params["use_rep"])
    velocities = np.asarray(get.written(adata, VELOCITY.format(key=key), "tl.fit_flow"))
    representation = get.representation(adata, key=key)
    finite = [np.isfinite(matrix).all(1) for matrix in (velocities, representation, plane.cells)]
    rows = np.flatnonzero(np.logical_and.reduce(finite))
    rows = rows[thin(rows.size)]
    project = projection(plane, representation, dims=dims)
    arrows = project.velocities(representation[rows], velocities[rows])
    n_grid = max(2, round(GRID[kind] * density))
    bandwidth = BANDWIDTH[kind] * (n_grid - 1) / (GRID[kind] - 1)  # a length: the estimate is the same at any density
    x, y, mean = grid_average(plane.cells[rows], arrows, n_grid=n_grid, bandwidth=bandwidth, min_mass=min_mass)

    norm = time_range(adata, key, times_of(adata, params["time_key"]))
    ax = axes_or_new(ax)
    small = shrinkage(ax)  # before a colour bar or a legend takes part of the panel
    draw_cells(ax, adata, plane, color=color, time_key=params["time_key"], norm=norm, alpha=0.35, key=key)
    make_room(ax)
    if kind == "arrows":
        _draw_arrows(ax, x, y, mean)
    else:
        _draw_stream(ax, x, y, mean, density, small)
    return ax


def grid_average(
    places: np.ndarray, arrows: np.ndarray, *, n_grid: int, bandwidth: float, min_mass: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average arrows over the cells around every point of a grid.

    Parameters
    ----------
    places, arrows
        Positions of the cells and their velocities there, n x 2 each.
    n_grid
        Grid points along either axis.
    bandwidth
        Standard deviation of the Gaussian weights, in grid spacings.
    min_mass
        Fraction of the densest grid points' mass below which a point is empty.

    Returns
    -------
    The x and y of the grid, n_grid each, and the mean velocity, n_grid (y) x n_grid (x) x 2, NaN where empty.
    """
    x, y = np.linspace(places.min(0), places.max(0), n_grid).T
    # a Gaussian is a product over the axes, so the sums over cells are matrix products and need no neighbour search
    near_x, near_y = (
        np.exp(-0.5 * ((at[:, None] - g) / (bandwidth * _spacing(g))) ** 2) for at, g in zip(places.T, (x, y))
    )
    mass = near_y.T @ near_x
    total = np.stack([(near_y * one[:, None]).T @ near_x for one in arrows.T], axis=-1)
    mean = total / np.maximum(mass, np.finfo(float).tiny)[..., None]
    mean[mass < min_mass * np.percentile(mass, 99)] = np.nan
    return x, y, mean


def _spacing(grid: np.ndarray) -> float:
    return max(grid[1] - grid[0], np.finfo(float).tiny)


def _draw_arrows(ax: Axes, x: np.ndarray, y: np.ndarray, mean: np.ndarray) -> None:
    filled = np.isfinite(mean).all(-1)
    u, v = mean[filled].T
    at_x, at_y = (at[filled] for at in np.meshgrid(x, y))
    # one stray cell in a gap must not shrink all other arrows, so the few longest are cut
    length = np.hypot(u / _spacing(x), v / _spacing(y))
    usual = np.percentile(length, 95) or 1.0
    scale = usual / USUAL_LENGTH
    cut = np.minimum(1.0, LONGEST * scale / np.maximum(length, np.finfo(float).tiny))
    u, v = u * cut, v * cut
    ax.update_datalim(np.column_stack([at_x + u / scale, at_y + v / scale]))  # quiver itself leaves room for tails only
    style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "width": 0.0028, "headwidth": 4.5, "headlength": 5.5}
    ax.quiver(at_x, at_y, u, v, scale=scale, color=ink(ax), zorder=3, **style)
    ax.autoscale_view()


def _draw_stream(ax: Axes, x: np.ndarray, y: np.ndarray, mean: np.ndarray, density: float, small: float) -> None:
    u, v = np.moveaxis(np.ma.masked_invalid(mean), -1, 0)
    speed = np.ma.hypot(u / _spacing(x), v / _spacing(y))
    width = small * (0.4 + 1.4 * (speed / (speed.max() or 1.0)).filled(0.0))
    view = ax.get_xlim(), ax.get_ylim()
    ax.streamplot(x, y, u, v, density=1.4 * density * small, linewidth=width, color=ink(ax), arrowsize=small, zorder=3)
    ax.set(xlim=view[0], ylim=view[1])  # streamplot reduces the view to its grid
