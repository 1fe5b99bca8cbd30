from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.lines import Line2D

from sctraj import get

from ._cells import PALETTE, axes_or_new, ink, legend_beside, make_room, palette

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

WINDOW = 50  # the running mean spans 1 / WINDOW of the steps
VALIDATION = "validation "  # prefix of the validation columns' names


def loss(adata: AnnData, *, key: str = "flow", ax: Axes | None = None) -> Axes:
    """Draw the training loss over the steps.

    One line per member shows a centred running mean over a fiftieth of the steps, on top of the raw values as a faint
    line; the validation loss, if there is one, is dashed and not smoothed. The axis is logarithmic if the smoothed loss
    spans more than a factor of ten.

    Parameters
    ----------
    adata
        Annotated cells with a fit, from :func:`sctraj.tl.fit_flow`.
    key
        The fit's name, its ``key_added``.
    ax
        Axes to draw in; they shrink to make room for a legend or colour bar. None: those of a new figure. Small panels
        look best in a figure with ``layout="constrained"``.

    Returns
    -------
    The axes.
    """
    table = get.loss(adata, key=key)
    members = [name for name in table.columns if not name.startswith(VALIDATION)]
    smooth = table[members].rolling(max(1, len(table) // WINDOW), center=True, min_periods=1).mean()
    ax = axes_or_new(ax)
    for member, color in zip(members, _colors(ax, len(members))):
        ax.plot(table.index, table[member], color=color, lw=0.6, alpha=0.2, rasterized=True)
        ax.plot(table.index, smooth[member], color=color, lw=1.6, label=f"member {member}")
        if VALIDATION + member in table:
            validation = table[VALIDATION + member].dropna()
            ax.plot(validation.index, validation, color=color, lw=1.6, ls="--", label=f"validation, member {member}")
    lowest, highest = np.nanmin(smooth), np.nanmax(smooth)
    ax.set(xlabel="training step", ylabel="flow matching loss", yscale="log" if 0 < 10 * lowest < highest else "linear")
    ax.spines[["top", "right"]].set_visible(False)
    _legend(ax, members, validated=len(members) < table.shape[1])
    make_room(ax)
    return ax


def _colors(ax: Axes, n: int) -> list:
    if n < len(PALETTE):  # all but the yellow
        return palette(ax)[:n]
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, n)))


def _legend(ax: Axes, members: list[str], *, validated: bool) -> None:
    """Add a legend that names the members if there are few, and only the kinds of line if there are many."""
    colors = _colors(ax, len(members)) if len(members) < len(PALETTE) else [ink(ax)]
    names = [f"member {name}" for name in members] if len(colors) > 1 else ["running mean"]
    if len(members) >= len(PALETTE):
        names = [f"running means, {len(members)} members"]
    handles = [Line2D([], [], color=color, lw=1.6, label=name) for color, name in zip(colors, names)]
    handles.append(Line2D([], [], color=colors[0], lw=0.6, alpha=0.4, label="every step"))
    if validated:
        handles.append(Line2D([], [], color=ink(ax), lw=1.6, ls="--", label="validation"))
    legend_beside(ax, *handles)
