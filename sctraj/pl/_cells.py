"""The cells of a plot: points in the plane, coloured by time or by a column of obs, with their legend or colour bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.colorbar import Colorbar

    from ._basis import Basis

# Okabe and Ito's colours, told apart by colour-blind readers too; the yellow comes last, as it is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
GREY = "#d4d4d4"


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes to draw in: those given, or a new figure's."""
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, matplotlib.axes.Axes):
        shape = f" of shape {ax.shape}" if isinstance(ax, np.ndarray) else ""
        raise TypeError(f"ax should be one Axes, found {type(ax).__name__}{shape}. Pass one of them, such as axes[0].")
    return ax


def ink(ax: Axes) -> Any:
    """The colour of the axes' own writing, which is seen on a dark background too."""
    return ax.xaxis.label.get_color()


def palette(ax: Axes) -> list[str]:
    """`PALETTE`, its black replaced by `ink`."""
    return [ink(ax) if color == "#000000" else color for color in PALETTE]


def time_colormap() -> Colormap:
    """Viridis without its last yellow, which is lost on white paper."""
    return LinearSegmentedColormap.from_list("time", matplotlib.colormaps["viridis"](np.linspace(0, 0.93, 256)))


def times_of(adata: AnnData, time_key: str) -> np.ndarray:
    """The cells' real times, n_obs; raises if the column is not there or is not numeric."""
    if time_key not in adata.obs:
        raise KeyError(f"adata.obs has no time column {time_key!r}, by which the flow was fitted.")
    try:
        return adata.obs[time_key].astype(float).to_numpy()
    except (TypeError, ValueError) as error:
        raise ValueError(f"adata.obs[{time_key!r}] is not numeric. Run sctraj.pp.parse_time first.") from error


def time_label(adata: AnnData, time_key: str) -> str:
    """The time column's name, with its unit where ``adata.uns[time_key]`` holds one that is known."""
    record = adata.uns.get(time_key)
    unit = str(record.get("unit") or "unknown") if isinstance(record, Mapping) else "unknown"
    return time_key if unit == "unknown" else f"{time_key} ({unit})"


def check_color(adata: AnnData, color: str | None) -> None:
    """Raise if `color` is not a column of obs that holds values to draw."""
    if color is None:
        return
    if not isinstance(color, str):
        raise ValueError(f"color={color!r} should be the name of one column of adata.obs; draw one plot for each.")
    if color not in adata.obs:
        raise KeyError(f"color={color!r} is not a column of adata.obs; present are {list(adata.obs.columns)}.")
    column = adata.obs[color]
    if not (np.isfinite(_numbers(column)) if _is_numeric(column) else column.notna()).any():
        raise ValueError(
            f"color={color!r} should have values to draw, but in adata.obs[{color!r}] all {len(column)} are "
            "missing or infinite. Fill it, or choose another column."
        )


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _numbers(column: pd.Series) -> np.ndarray:
    """The column with NaN wherever there is no finite number."""
    values = column.to_numpy(dtype=float, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def draw_points(
    ax: Axes, basis: Basis, colors: np.ndarray | str, *, rows: np.ndarray | None = None, **artist: Any
) -> PathCollection:
    """Scatter the cells (of `rows`), smaller the more there are, shuffled so that no group hides another.

    Numbers or RGBA in `colors` have a row for every cell, whichever are drawn.
    """
    n = len(basis.cells)
    order = np.random.default_rng(0).permutation(np.arange(n) if rows is None else rows)
    chosen = colors if isinstance(colors, str) else colors[order]
    size = float(np.clip(16_000 / max(n, 1), 0.3, 16))
    x, y = basis.cells[order].T
    points = ax.scatter(x, y, c=chosen, s=size, linewidths=0, rasterized=True, **artist)
    label_plane(ax, basis)
    return points


def draw_cells(
    ax: Axes, adata: AnnData, basis: Basis, *, color: str | None, time_key: str, norm: Normalize, alpha: float
) -> None:
    """Scatter the cells coloured by time (`color` None) or by a column of obs, with a colour bar or a legend."""
    if color is None or color == time_key:
        draw_points(ax, basis, times_of(adata, time_key), norm=norm, cmap=time_colormap(), alpha=alpha)
        color_bar(ax, norm, time_colormap(), time_label(adata, time_key))
        return
    column = adata.obs[color]
    if _is_numeric(column):
        values = _numbers(column)
        scale = Normalize(np.nanmin(values), np.nanmax(values))
        cmap = matplotlib.colormaps["cividis"].with_extremes(bad=GREY)
        draw_points(ax, basis, values, norm=scale, cmap=cmap, alpha=alpha, plotnonfinite=True)
        color_bar(ax, scale, cmap, color)
        return
    category = pd.Categorical(column)
    colors = _category_colors(ax, adata, color, category)
    rgba = matplotlib.colors.to_rgba_array([*colors, GREY])
    draw_points(ax, basis, rgba[category.codes], alpha=alpha)  # code -1, missing, is the grey at the end
    category_legend(ax, color, [str(name) for name in category.categories], colors)


def _category_colors(ax: Axes, adata: AnnData, color: str, category: pd.Categorical) -> list[str]:
    n = len(category.categories)
    chosen = adata.uns.get(f"{color}_colors")  # scanpy's slot: a cluster keeps its colour from plot to plot
    if chosen is not None and len(chosen) >= n:
        return [str(one) for one in chosen[:n]]
    if n <= len(PALETTE):
        return palette(ax)[:n]
    return [matplotlib.colors.to_hex(one) for one in matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, n))]


def legend_dot(name: str, color: str) -> Line2D:
    """A dot for a legend, of one size however small the cells are drawn."""
    return Line2D([], [], ls="", marker="o", ms=6, color=color, label=name)


def category_legend(ax: Axes, title: str, names: list[str], colors: list[str]) -> None:
    """A legend of coloured dots to the right of the axes, where it covers no cell."""
    dots = [legend_dot(name, color) for name, color in zip(names, colors)]
    ax.legend(
        handles=dots,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        alignment="left",
        handletextpad=0.2,
        ncols=-(-len(dots) // 16),
    )


def color_bar(ax: Axes, norm: Normalize, cmap: Colormap, label: str, **bar: Any) -> Colorbar:
    """An opaque colour bar beside the axes, past their legend."""
    engine = ax.figure.get_layout_engine()
    if engine is None or engine.colorbar_gridspec:  # else, in a constrained layout, the bar keeps clear by itself
        bar["pad"] = min(0.05 + _overhang(ax)[0], 0.5)
    drawn = ax.figure.colorbar(ScalarMappable(norm, cmap), ax=ax, label=label, shrink=0.7, aspect=22, **bar)
    drawn.outline.set_visible(False)
    return drawn


def make_room(ax: Axes) -> None:
    """Shrink a subplot that no layout engine looks after until its legend ends where it did, as colour bars do.

    It keeps a third of its width and height, however large the legend; axes placed by hand stay as they are.
    """
    place = ax.get_subplotspec()
    if place is None or ax.figure.get_layout_engine() is not None:
        return
    right, top = (min(over, 2 / 3) for over in _overhang(ax))
    ratios = {"width_ratios": (1 - right, right), "height_ratios": (top, 1 - top)}
    ax.set_subplotspec(place.subgridspec(2, 2, wspace=0, hspace=0, **ratios)[1, 0])


def _overhang(ax: Axes) -> tuple[float, float]:
    """How far the legend reaches beyond the right and the top of the axes, as fractions of their width and height."""
    legend = ax.get_legend()
    if legend is None:
        return 0.0, 0.0
    box = legend.get_window_extent().transformed(ax.transAxes.inverted())
    return max(box.x1 - 1, 0.0), max(box.y1 - 1, 0.0)


def label_plane(ax: Axes, basis: Basis) -> None:
    """Name the axes; an embedding's ticks are dropped, for its units mean nothing."""
    ax.set(xlabel=basis.labels[0], ylabel=basis.labels[1])
    ax.spines[["top", "right"]].set_visible(False)
    if basis.is_embedding:
        ax.set(xticks=[], yticks=[])
