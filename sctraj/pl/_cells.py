"""The cells of a plot: points coloured by time, a column of obs or a gene, with their legend or colour bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from sctraj._adata import GROWTH, VELOCITY_SD

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.colorbar import Colorbar

    from ._basis import Basis

# colours of Okabe and Ito, which colour-blind readers can tell apart; yellow comes last, as it is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
GREY = "#d4d4d4"
OPAQUE = 0.75  # opacity of cells coloured by a column, where the colours matter most
ROBUST = 98  # percentile at which the colours end for columns that a flow wrote
SMALLEST = 0.6  # least size of text in small panels, relative to its usual size
WIDEST = 0.4  # largest fraction of a panel's width for the names of categories
LINE = 1.5  # height of a line in their legend, relative to that of the text
FEWEST = 6  # letters of a name that are always shown
BAR = 7.0  # height of a colour bar below the axes, in points


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the axes to draw in: those given, or those of a new figure."""
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, matplotlib.axes.Axes):
        shape = f" of shape {ax.shape}" if isinstance(ax, np.ndarray) else ""
        raise TypeError(f"ax should be one Axes, found {type(ax).__name__}{shape}. Pass one of them, such as axes[0].")
    return ax


def ink(ax: Axes) -> Any:
    """Return the colour of the axes' own text, which is visible on a dark background too."""
    return ax.xaxis.label.get_color()


def palette(ax: Axes) -> list[str]:
    """Return `PALETTE` with `ink` in place of black."""
    return [ink(ax) if color == "#000000" else color for color in PALETTE]


def time_colormap() -> Colormap:
    """Return viridis without its final yellow, which is hard to see on white paper."""
    return LinearSegmentedColormap.from_list("time", matplotlib.colormaps["viridis"](np.linspace(0, 0.93, 256)))


def times_of(adata: AnnData, time_key: str) -> np.ndarray:
    """Return the cells' real times, n_obs; raise if the column is missing or not numeric."""
    if time_key not in adata.obs:
        raise KeyError(f"adata.obs has no time column {time_key!r}, by which the flow was fitted.")
    try:
        return adata.obs[time_key].astype(float).to_numpy()
    except (TypeError, ValueError) as error:
        raise ValueError(f"adata.obs[{time_key!r}] is not numeric. Run sctraj.pp.parse_time first.") from error


def time_range(adata: AnnData, key: str, observed: np.ndarray) -> Normalize:
    """Return the colour range of all snapshots of a fit, so that a part of the cells has the same colours as all."""
    times = np.concatenate([np.asarray(adata.uns[key]["times"], dtype=float), observed])
    return Normalize(np.nanmin(times), np.nanmax(times))


def time_label(adata: AnnData, time_key: str) -> str:
    """Return the time column's name, with its unit if ``adata.uns[time_key]`` holds a known one."""
    record = adata.uns.get(time_key)
    unit = str(record.get("unit") or "unknown") if isinstance(record, Mapping) else "unknown"
    return time_key if unit == "unknown" else f"{time_key} ({unit})"


def check_color(adata: AnnData, color: str | None) -> None:
    """Raise if `color` is neither a column of obs nor a gene, or holds no values to draw."""
    if color is None:
        return
    if not isinstance(color, str):
        raise ValueError(f"color={color!r} should be the name of one column of adata.obs; draw one plot for each.")
    column = column_of(adata, color)
    if not (np.isfinite(_numbers(column)) if _is_numeric(column) else column.notna()).any():
        raise ValueError(
            f"color={color!r} should have values to draw, but in adata.obs[{color!r}] all {len(column)} are "
            "missing or infinite. Fill it, or choose another column."
        )


def column_of(adata: AnnData, color: str) -> pd.Series:
    """Return a column of obs or, if there is none of that name, a gene's values in X."""
    if color in adata.obs:
        return adata.obs[color]
    if color not in adata.var_names or adata.X is None or adata.var_names.tolist().count(color) > 1:
        raise KeyError(
            f"color={color!r} is neither a column of adata.obs nor one gene in adata.var_names; columns are "
            f"{list(adata.obs.columns)}."
        )
    return pd.Series(adata.obs_vector(color), index=adata.obs_names)


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _numbers(column: pd.Series) -> np.ndarray:
    """Return the column with NaN wherever there is no finite number."""
    values = column.to_numpy(dtype=float, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def draw_points(
    ax: Axes, basis: Basis, colors: np.ndarray | str, *, rows: np.ndarray | None = None, **artist: Any
) -> PathCollection:
    """Scatter the cells (of `rows`), the smaller the more there are, shuffled so that no group hides another.

    Numbers or RGBA in `colors` have one row for every cell, including those that are not drawn.
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
    ax: Axes, adata: AnnData, basis: Basis, *, color: str | None, time_key: str, norm: Normalize, alpha: float, key: str
) -> None:
    """Scatter the cells coloured by time (`color` None) or by a column of obs, with a colour bar or a legend."""
    if color is None or color == time_key:
        draw_points(ax, basis, times_of(adata, time_key), norm=norm, cmap=time_colormap(), alpha=alpha)
        color_bar(ax, norm, time_colormap(), time_label(adata, time_key))
        return
    column = column_of(adata, color)
    if _is_numeric(column):
        values = _numbers(column)
        scale, name, extend = _scale(values, color, key)
        cmap = matplotlib.colormaps[name].with_extremes(bad=GREY)
        draw_points(ax, basis, values, norm=scale, cmap=cmap, alpha=OPAQUE, plotnonfinite=True)
        color_bar(ax, scale, cmap, color, extend=extend)
        return
    category = pd.Categorical(column)
    colors = [*_category_colors(ax, adata, color, category), GREY]
    draw_points(ax, basis, matplotlib.colors.to_rgba_array(colors)[category.codes], alpha=OPAQUE)  # code -1 is missing
    names = [*(str(name) for name in category.categories), *["missing"] * bool((category.codes < 0).any())]
    category_legend(ax, color, names, colors)


def _scale(values: np.ndarray, color: str, key: str) -> tuple[Normalize, str, str]:
    """Return the range of a column's colours, their map, and at which ends some cells exceed the range.

    For columns that a flow wrote, the range excludes the few most extreme cells, which are often at the edges, and
    that of growth is centred at zero. A column of the user's is shown over its whole range.
    """
    if color == GROWTH.format(key=key):
        limit = np.nanpercentile(np.abs(values), ROBUST) or 1.0
        return Normalize(-limit, limit), "coolwarm", "both"
    if color == VELOCITY_SD.format(key=key):
        return Normalize(np.nanmin(values), np.nanpercentile(values, ROBUST)), "cividis", "max"
    return Normalize(np.nanmin(values), np.nanmax(values)), "cividis", "neither"


def _category_colors(ax: Axes, adata: AnnData, color: str, category: pd.Categorical) -> list[str]:
    n = len(category.categories)
    chosen = adata.uns.get(f"{color}_colors")  # scanpy's slot, so that a cluster keeps its colour in all plots
    if chosen is not None and len(chosen) >= n:
        return [str(one) for one in chosen[:n]]
    if n <= len(PALETTE):
        return palette(ax)[:n]
    from scanpy.plotting import palettes  # takes a second or two to load

    many = (palettes.default_20, palettes.default_28, palettes.default_102)
    colors = next((one for one in many if n <= len(one)), many[-1])
    return [colors[i % len(colors)] for i in range(n)]


def legend_dot(name: str, color: str, size: float = 6) -> Line2D:
    """Return a dot for a legend, whose size does not depend on that of the cells."""
    return Line2D([], [], ls="", marker="o", ms=size, color=color, label=name)


def panel(ax: Axes) -> tuple[float, float]:
    """Return the width and height, in inches, that the figure provides for the axes."""
    figure: Any = ax.figure  # or a subfigure
    place = ax.get_subplotspec()
    box = ax.get_position() if place is None else place.get_position(figure)
    return box.width * figure.bbox.width / figure.dpi, box.height * figure.bbox.height / figure.dpi


def shrinkage(ax: Axes) -> float:
    """Return the factor for sizes in points in a panel smaller than an ordinary figure's, as in a paper."""
    width, height = panel(ax)
    return float(np.clip(min(width / 4.6, height / 3.5), SMALLEST, 1.0))


def legend_size(ax: Axes | None) -> float:
    """Return the size of a legend's text in points, smaller in small panels; for None the usual size."""
    usual = matplotlib.rcParams["legend.fontsize"]  # noqa: TID251 - read alone
    return (1.0 if ax is None else shrinkage(ax)) * FontProperties(size=usual).get_size_in_points()


def legend_beside(ax: Axes, *handles: Any, size: float | None = None, **style: Any) -> None:
    """Draw a legend to the right of the axes, where it covers no cells."""
    ax.legend(
        handles=list(handles),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        alignment="left",
        prop={"size": size or legend_size(ax)},
        title_fontproperties={"size": size or legend_size(ax)},
        **style,
    )


def category_legend(ax: Axes, title: str, names: list[str], colors: list[str]) -> None:
    """Draw a legend of dots in columns no taller than the axes; names too wide are cut but stay distinct."""
    width, height = (72 * inches for inches in panel(ax))
    tried = []
    for size in legend_size(ax) * np.array([1.0, 0.9, 0.8, 0.65, 0.5]):
        rows = max(1, int(0.8 * height / (LINE * size)) - 1)  # the rest is for a colour bar below the axes
        columns = -(-len(names) // rows)
        room = WIDEST * width / columns - 2.5 * size  # for a name, beside its dot
        tried.append((size, columns, room, max(_width(name, size) for name in names) <= room))
    whole = (one for one in tried[:3] if one[3])
    cut = (one for one in tried if one[2] > 5 * one[0])
    size, columns, room, _ = next(whole, next(cut, tried[-1]))
    dots = [legend_dot(name, color, 0.6 * size) for name, color in zip(_told_apart(names, room, size), colors)]
    style: dict[str, Any] = {"handletextpad": 0.1, "handlelength": 1.2, "columnspacing": 0.6, "labelspacing": 0.3}
    legend_beside(ax, *dots, size=size, title=_shortened(title, WIDEST * width, size), ncols=columns, **style)


def _told_apart(names: list[str], room: float, size: float) -> list[str]:
    """Return the names, shortened to `room` points as long as they stay different from each other.

    If some would become the same, what all begin or end with is left out first; if that does not help, all stay whole.
    """
    short = [_shortened(name, room, size) for name in names]
    if len({*short}) == len({*names}):
        return short
    start = _shared(names)
    end = min(_shared([name[::-1] for name in names]), min(map(len, names)) - start)
    start, end = (n if n > 2 else 0 for n in (start, end))  # an ellipsis for fewer letters would save nothing
    cores = [name[start : len(name) - end] for name in names]
    short = [f"{'…' if start else ''}{_shortened(core, room, size)}{'…' if end else ''}" for core in cores]
    return short if len({*short}) == len({*names}) else names


def _shared(texts: Sequence[str]) -> int:
    """Return the number of letters with which all texts begin."""
    return sum(1 for _ in takewhile(lambda letters: len({*letters}) == 1, zip(*texts)))


def _shortened(text: str, room: float, size: float) -> str:
    """Shorten a text to at most `room` points by leaving out its middle, since names often differ at their ends."""
    short, kept = text, len(text)
    while kept > FEWEST and _width(short, size) > room:
        kept -= 1
        short = f"{text[: kept - kept // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}"
    return short


def _width(text: str, size: float) -> float:
    """Return the width of a text in points."""
    return float(TextPath((0, 0), text, size=size).get_extents().width) if text.strip() else 0.0


def color_bar(ax: Axes, norm: Normalize, cmap: Colormap, label: str, **bar: Any) -> Colorbar:
    """Draw an opaque colour bar beside the axes, or below them if there is a legend, which must be placed by then."""
    below, loose = _overhang(ax)[0] > 0, not _arranges(ax)
    width, height = (72 * pixels / ax.figure.dpi for pixels in ax.bbox.size)
    bar |= {"location": "bottom" if below else "right", "shrink": 0.8 if below else 0.7, "aspect": 22}
    if loose and below:  # in a constrained layout the bar keeps its distance by itself
        labels = ax.xaxis.get_tightbbox()
        reach = 0.0 if labels is None else (ax.bbox.y0 - labels.y0) / ax.bbox.height
        bar |= {"pad": min(reach + 6 / height, 0.5), "fraction": min(BAR / height, 0.1), "aspect": 0.8 * width / BAR}
    elif loose:
        bar["pad"] = 0.05
    legend = ax.get_legend()  # it takes room, so the panel is now smaller than the one by which its sizes were chosen
    small = float(legend.get_texts()[0].get_fontsize()) / legend_size(None) if below and legend else shrinkage(ax)
    if norm.vmin is not None and norm.vmin == norm.vmax:  # matplotlib invents limits around a single value
        bar["ticks"] = [norm.vmin]
    drawn = ax.figure.colorbar(ScalarMappable(norm, cmap), ax=ax, **bar)
    drawn.set_label(label, size=small * float(ax.xaxis.label.get_fontsize()))
    drawn.ax.tick_params(labelsize=small * float(drawn.long_axis.get_major_ticks(1)[0].label1.get_fontsize()))
    drawn.outline.set_visible(False)
    return drawn


def _arranges(ax: Axes) -> bool:
    """Return whether a layout engine keeps colour bars from overlapping anything."""
    engine = ax.figure.get_layout_engine()
    return engine is not None and not engine.colorbar_gridspec


def make_room(ax: Axes) -> None:
    """Shrink a subplot without a layout engine until its legend ends where the subplot did, as colour bars do.

    It keeps at least a third of its width and height, however large the legend; axes placed by hand are not changed.
    """
    place = ax.get_subplotspec()
    if place is None or ax.figure.get_layout_engine() is not None:
        return
    right, top = (min(over, 2 / 3) for over in _overhang(ax))
    ratios = {"width_ratios": (1 - right, right), "height_ratios": (top, 1 - top)}
    ax.set_subplotspec(place.subgridspec(2, 2, wspace=0, hspace=0, **ratios)[1, 0])


def _overhang(ax: Axes) -> tuple[float, float]:
    """Return how far the legend extends beyond the right and top of the axes, as fractions of their size."""
    legend = ax.get_legend()
    if legend is None:
        return 0.0, 0.0
    box = legend.get_window_extent().transformed(ax.transAxes.inverted())
    return max(box.x1 - 1, 0.0), max(box.y1 - 1, 0.0)


def label_plane(ax: Axes, basis: Basis) -> None:
    """Label the axes; an embedding's ticks are dropped, because its units mean nothing."""
    ax.set(xlabel=basis.labels[0], ylabel=basis.labels[1])
    ax.spines[["top", "right"]].set_visible(False)
    if basis.is_embedding:
        ax.set(xticks=[], yticks=[])
    else:  # ticks that do not depend on the axes' size, which a constrained layout changes after measuring them
        ax.locator_params(nbins=5, steps=(1, 2, 5, 10))
