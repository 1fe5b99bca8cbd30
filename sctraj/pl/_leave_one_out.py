from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, get_args

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize

from sctraj import get
from sctraj._adata import PROTOCOL, W1, table_name

from ._basis import find_basis
from ._cells import GREY, axes_or_new, color_bar, draw_points, legend_beside, legend_dot, make_room, palette, time_label

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

Kind = Literal["distances", "map"]
NOISE = "noise-reference"
USUAL = "energy"
MARKERS = "osPX*hp<"
BASELINES = {
    "previous": ("v", (0, (1, 1.2))),
    "next": ("^", (0, (4, 1.5))),
    "ot-interpolation": ("D", (0, (6, 1.5, 1, 1.5))),
}
COPIES = ("previous", "next")
MOST, ROOM = 3.0, 1.5  # copies that are farther than so many times the rest are cut off, at so many times the rest
ABOVE = " (above)"
LABELS = {
    "w1": "Wasserstein-1 distance",
    "w2": "Wasserstein-2 distance",
    "mmd": "squared MMD",
    "energy": "energy distance",
    "energy_about_mean": "energy distance about the means",
    "variance_ratio": "variance, restored / observed",
    "w1_unweighted": "Wasserstein-1 distance, cells weighing the same",
    "energy_unweighted": "energy distance, cells weighing the same",
}


def leave_one_out(
    adata: AnnData,
    *,
    metric: str = USUAL,
    kind: Kind = "distances",
    method: str | None = None,
    basis: str | None = None,
    key: str = "flow",
    ax: Axes | None = None,
) -> Axes:
    """Draw how well held-out snapshots were restored.

    Parameters
    ----------
    adata
        Annotated cells, after :func:`sctraj.tl.leave_one_out`.
    metric
        The metric to draw over time: "energy", which is the one to judge by; "w1", which papers report; "w2", "mmd",
        "energy_about_mean", "variance_ratio"; or "w1_unweighted" or "energy_unweighted", for which all restored cells
        have the same weight.
    kind
        "distances": the metric at every held-out time. Each method's line is its mean over seeds, and the bars range
        from the lowest seed to the highest and, where there are so many cells that distances were estimated, a standard
        error beyond. Baselines are grey and dashed; copied neighbours far above everything else are left out, as the
        legend then says. The solid grey line and band are the noise reference, mean and standard deviation over its
        seeds: the distance between two halves of the held-out snapshot.
        "map": every held-out cell, coloured by its distance from the restored cells with which it is paired (the mean
        over a snapshot is its W1); cells of snapshots that were never held out (the first and the last) are grey.
    method
        Name of the method; None: all of them ("distances") or the first ("map").
    basis
        For "map": a matrix in ``adata.obsm``, such as "umap"; the representation of the fit if None.
    key
        The name of the results, their ``key_added``.
    ax
        Axes to draw in; they shrink to make room for a legend or colour bar. None: those of a new figure. Small panels
        look best in a figure with ``layout="constrained"``.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        No such results or basis; for "map", no record of the representation that the results are in.
    ValueError
        An unknown `kind`, `metric` or `method`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} should be one of {list(get_args(Kind))}.")
    if kind == "map":
        if metric not in (USUAL, "w1"):
            raise ValueError(f"metric={metric!r} should be left out for kind='map': cells' shares are those of W1.")
        return _draw_map(adata, method, basis, key, ax)
    if basis is not None:
        raise ValueError(f"basis={basis!r} should be left out for kind='distances', which draws no cells.")
    table = get.leave_one_out(adata, key=key)
    _check("metric", metric, table["metric"].unique())
    known = [name for name in table["method"].unique() if name not in (*BASELINES, NOISE)]
    if method is not None:
        _check("method", method, known)
    errors = table[table["metric"] == f"{metric}_error"].groupby(["method", "time"])["value"].mean()
    table = table[table["metric"] == metric]
    ax = axes_or_new(ax)
    _draw_noise(ax, table[table["method"] == NOISE], metric)
    top = None if metric == "variance_ratio" else _top(table)
    _draw_baselines(ax, table, errors, top)
    looks = zip(known, cycle(palette(ax)), cycle(MARKERS))  # a method keeps its colour and marker when drawn alone
    for name, color, marker in looks:
        if method in (None, name):
            _draw_method(ax, table[table["method"] == name], errors, name, color, marker)
    if top is not None:
        low = float(min(0.0, table["value"].min()))
        ax.set_ylim(low - 0.05 * (top - low), top)
    if metric == "variance_ratio":
        ax.axhline(1.0, color=GREY, lw=1, zorder=0)
    bars = "mean, range over seeds" + "\n± error of estimate" * bool(len(errors))
    _finish(ax, np.sort(table["time"].unique()), time_label(adata, adata.uns[_protocol(key)]["time_key"]), metric, bars)
    return ax


def _check(what: str, found: str, valid: object) -> None:
    valid = [str(one) for one in valid]  # type: ignore[attr-defined]
    if found not in valid:
        raise ValueError(f"{what}={found!r} should be one of {valid}.")


def _draw_noise(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    if table.empty:
        return
    by_time = table.groupby("time")["value"]
    mean, spread = by_time.mean(), by_time.std(ddof=0)
    at = mean.index.to_numpy(dtype=float)
    if at.size == 1:  # a band over a single time would have no width
        at, mean, spread = np.array([at[0] - 0.5, at[0] + 0.5]), mean.repeat(2), spread.repeat(2)
    style: dict[str, Any] = {"color": "#9e9e9e", "zorder": 1}
    (line,) = ax.plot(at, mean, lw=1.3, **style)
    # between halves of the cells, by whose number transport distances fall: a restoration of all can be below
    halves = "\n(of half the cells,\nso it is higher)" if metric.startswith("w") else ""
    if spread.any():
        label = f"noise reference\n(mean ± sd){halves}"
        ax.fill_between(at, mean - spread, mean + spread, alpha=0.35, lw=0, label=label, **style)
    else:  # only one seed
        line.set_label(f"noise reference{halves}")


def _top(table: pd.DataFrame) -> float | None:
    """Return where to end the axis, if copied neighbours would take up most of it; None if they would not."""
    copied = table["method"].isin(COPIES)
    highest, copies = table["value"][~copied].max(), table["value"][copied].max()
    return float(ROOM * highest) if 0 < MOST * highest < copies else None


def _draw_baselines(ax: Axes, table: pd.DataFrame, errors: pd.Series, top: float | None) -> None:
    greys = ("#8c8c8c", "#8c8c8c", "#6b6b6b")
    for grey, (name, (marker, dash)) in zip(greys, BASELINES.items()):
        mean = table[table["method"] == name].groupby("time")["value"].mean()
        if len(mean):
            label = name if top is None or mean.max() <= top else f"{name}{ABOVE}"
            ax.plot(mean.index, mean, color=grey, ls=dash, lw=1.3, marker=marker, ms=4.5, label=label, zorder=2)
            error = _errors(errors, name, mean.index)
            if error.any():
                at = (mean.index.to_numpy(), mean.to_numpy())
                ax.errorbar(*at, error, color=grey, fmt="none", capsize=2, elinewidth=1, zorder=2)


def _errors(errors: pd.Series, name: str, times: pd.Index) -> np.ndarray:
    """Return the standard errors of a method's estimated distances at these times, 0 where they are exact."""
    own = errors[errors.index.get_level_values("method") == name].droplevel("method")
    return own.reindex(times).fillna(0.0).to_numpy(dtype=float)


def _draw_method(ax: Axes, table: pd.DataFrame, errors: pd.Series, name: str, color: str, marker: str) -> None:
    by_time = table.groupby("time")["value"]
    mean = by_time.mean()
    reach = np.stack([mean - by_time.min(), by_time.max() - mean]).clip(min=0) + _errors(errors, name, mean.index)
    style: dict[str, Any] = {"color": color, "lw": 1.8, "marker": marker, "ms": 5.5, "capsize": 3, "elinewidth": 1.2}
    ax.errorbar(mean.index.to_numpy(), mean.to_numpy(), yerr=reach, label=name, zorder=3, **style)


def _finish(ax: Axes, times: np.ndarray, xlabel: str, metric: str, bars: str) -> None:
    ax.set(xlabel=f"held-out {xlabel}", ylabel=LABELS.get(metric, metric))
    if times.size == 1 or np.diff(times).min() > 0.06 * np.ptp(times):  # otherwise their labels would overlap
        ax.set_xticks(times, [f"{time:g}" for time in times])
    ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i].removesuffix(ABOVE) in BASELINES, "noise" in labels[i]))
    # long enough to show the dashes
    legend_beside(ax, *(handles[i] for i in order), title=bars, handlelength=3.0)
    make_room(ax)


def _draw_map(adata: AnnData, method: str | None, basis: str | None, key: str, ax: Axes | None) -> Axes:
    slot = W1.format(key=key)
    if slot not in adata.obsm:
        raise KeyError(f"adata.obsm[{slot!r}] is not there. Run sctraj.tl.leave_one_out(adata, ...) first.")
    shares: pd.DataFrame = adata.obsm[slot]
    method = str(shares.columns[0]) if method is None else method
    _check("method", method, shares.columns)
    plane = find_basis(adata, basis, dims=(0, 1), use_rep=_use_rep(adata, basis, key))
    share = shares[method].to_numpy(dtype=float)
    held_out = np.isfinite(share)
    ax = axes_or_new(ax)
    if not held_out.all():
        draw_points(ax, plane, GREY, rows=np.flatnonzero(~held_out))
    if held_out.any():
        # the colours end at the 99th percentile, so that a few distant cells do not use up the range
        norm = Normalize(share[held_out].min(), np.percentile(share[held_out], 99))
        cmap = matplotlib.colormaps["plasma"]
        draw_points(ax, plane, share, rows=np.flatnonzero(held_out), norm=norm, cmap=cmap)
        color_bar(ax, norm, cmap, f"distance to the restored cells, {method}", extend="max")
    if not held_out.all():
        dot = legend_dot("first and last snapshot", GREY)
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.01), "borderaxespad": 0.0}
        ax.legend(handles=[dot], frameon=False, handletextpad=0.1, **place)
        make_room(ax)
    return ax


def _protocol(key: str) -> str:
    return PROTOCOL.format(table=table_name(key))


def _use_rep(adata: AnnData, basis: str | None, key: str) -> str:
    """Return the representation in which cells were judged; `tl.leave_one_out` does not require a stored fit."""
    records = [adata.uns.get(_protocol(key), {}), adata.uns.get(key, {}).get("params", {})]
    found = next((str(record["use_rep"]) for record in records if "use_rep" in record), basis)
    if found is None:
        raise KeyError(f"Neither adata.uns[{key!r}] nor adata.uns[{_protocol(key)!r}] names use_rep; give basis=.")
    return found
