"""Reports of a benchmark: wide tables like those in papers, and one self-contained page of HTML."""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._uncertainty import leak

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRIC = "energy"  # drawn and compared in pairs: it is unbiased, whereas W1 rewards restorations that are shrunk
PRINTED = ("energy", "w1")  # shown by held-out time, as in papers; the others can be unfolded
BLOCK = ["data", "task", "strict", "start", "space"]
MEANINGS = {
    "energy": "energy distance, unbiased",
    "energy_about_mean": "energy distance about the means: what is off in shape",
    "w1": "Wasserstein-1 distance",
    "w2": "Wasserstein-2 distance",
    "mmd": "squared MMD, unbiased",
    "sinkhorn": "Sinkhorn divergence",
    "variance_ratio": "variance, restored / observed (1 is right)",
    "composition": "shares of labels, total variation",
    "gene_mean": "means of genes, root mean square error",
    "gene_variance": "variances of genes, root mean square error",
}
COLORS = {False: "#b5651d", True: "#1f4e79"}  # markers distinguish them as well
MARKERS = {False: "o", True: "D"}
FORMS = {False: "published", True: "strict"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d1d1f; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h1, h2, li { overflow-wrap: anywhere; } h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.scroll { overflow-x: auto; }
.blocks { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .blocks > div { max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
caption { text-align: left; color: #555; font-size: .92rem; padding-bottom: .2rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { background: #f4f4f5; font-weight: 600; white-space: normal; } .text { text-align: left; }
table.told td { white-space: normal; overflow-wrap: anywhere; max-width: 48rem; vertical-align: top; }
img { max-width: 100%; height: auto; } .note { color: #555; font-size: .92rem; }
summary { cursor: pointer; color: #1f4e79; margin: .6rem 0; }
.failed { border-left: 4px solid #b3261e; padding-left: .8rem; }
"""


# --- tables --------------------------------------------------------------------------------------------------------
def points(table: pd.DataFrame, metric: str | None = None) -> pd.DataFrame:
    """Return the point estimates of one metric or all, without bootstraps."""
    kept = table["bootstrap"] < 0
    return table[kept if metric is None else kept & (table["metric"] == metric)]


def wide(table: pd.DataFrame, *, metric: str = METRIC) -> pd.DataFrame:
    """Return methods x held-out times, mean ± sd over seeds, one block per data, task, form, start and space.

    Parameters
    ----------
    table
        Tidy rows.
    metric
        Distance to show.

    Returns
    -------
    DataFrame of text, in the order of the rows: the block's columns, `method`, one column per held-out time (empty if
    a block has no such time, "-" if a value is not known), and `mean`, the mean over held-out times ± the standard
    deviation over seeds of that mean.
    """
    rows = points(table, metric)
    times = sorted(rows["held_out"].unique())
    named = {t: f"{t:g}" for t in times}
    if len(set(named.values())) < len(times):  # six digits do not distinguish them
        named = {t: repr(float(t)) for t in times}
    out = []
    for names, own in rows.groupby([*BLOCK, "method"], sort=False):
        cells = {named[t]: _mean_sd(values) for t, values in own.groupby("held_out")["value"]}
        row = dict(zip([*BLOCK, "method"], names))
        out.append(row | {name: cells.get(name, "") for name in named.values()} | {"mean": _mean_sd(_by_seed(own))})
    return pd.DataFrame(out, columns=[*BLOCK, "method", *named.values(), "mean"])


def side_by_side(table: pd.DataFrame, *, metric: str = METRIC) -> pd.DataFrame:
    """Return the mean of each method in the published and the strict form, and their difference, the leak.

    If the leak is above zero, the published form looks better than the strict one. Its 95 % interval is given if there
    are half-samples. The forms can be compared only in the "common" space, and only if the published form's
    representation is the strict form's recipe (`Data.use_rep`).
    """
    leaks = leak(table, metric=metric).set_index(["data", "task", "start", "method"])
    rows = points(table, metric)
    rows = rows[rows["space"] == "common"]
    out = []
    for (data, task, start, space, method), own in rows.groupby(
        ["data", "task", "start", "space", "method"], sort=False
    ):
        forms = {form: _by_seed(part) for form, part in own.groupby("strict")}
        row = {"data": data, "task": task, "start": start, "space": space, "method": method}
        row |= {FORMS[form]: _mean_sd(forms[form]) if form in forms else "" for form in (False, True)}
        both = (data, task, start, method) in leaks.index
        found = leaks.loc[(data, task, start, method)] if both else dict.fromkeys(("leak", "low", "high"), np.nan)
        row["strict - published"] = f"{found['leak']:+.3f}" if both else ""
        row["95 % interval"] = "" if np.isnan(found["low"]) else f"{found['low']:+.3f} to {found['high']:+.3f}"
        out.append(row)
    named = ["data", "task", "start", "space", "method"]
    return pd.DataFrame(out, columns=[*named, *FORMS.values(), "strict - published", "95 % interval"])


def _by_seed(rows: pd.DataFrame) -> pd.Series:
    """Return the mean over held-out times for every seed."""
    return rows.groupby("seed")["value"].agg(lambda own: own.mean(skipna=False))


def _mean_sd(values: pd.Series) -> str:
    if values.isna().any():  # a divergence that did not converge
        return "-"
    mean = f"{values.mean():.3f}"
    return mean if np.ptp(values) == 0 else f"{mean} ± {values.std(ddof=1):.3f}"  # without seeds there is no deviation


def as_text(table: pd.DataFrame, *, metric: str = METRIC) -> str:
    """Return the wide tables as text for a terminal."""
    blocks = []
    for names, own in wide(table, metric=metric).groupby(BLOCK, sort=False):
        data, task, strict, start, space = names
        own = own.drop(columns=BLOCK).set_index("method")
        own = own.loc[:, (own != "").any()]
        own.columns = [name if name == "mean" else f"t = {name}" for name in own]
        own.index.name = None
        title = f"{data}, {task}, {FORMS[strict]}, from {start}, {space} space: {MEANINGS.get(metric, metric)}"
        blocks.append(f"{title}\n{own.to_string()}")
    return "\n\n".join(blocks)


# --- the page ------------------------------------------------------------------------------------------------------
def html_report(
    table: pd.DataFrame,
    *,
    title: str,
    summary: pd.DataFrame,
    paired: pd.DataFrame | None,
    protocol: Mapping[str, Any],
    data: pd.DataFrame,
    versions: Mapping[str, str],
    failures: Sequence[Mapping[str, str]] = (),
    published: pd.DataFrame | None = None,
) -> str:
    """Return one HTML page that contains its pictures and styles and loads nothing else.

    Parameters
    ----------
    table
        Tidy rows.
    title
        Title of the page.
    summary, paired
        Tables as returned by `_uncertainty`.
    protocol
        Names and values that describe what was done.
    data
        One row per data set, with its fingerprint.
    versions
        Versions of the libraries.
    failures
        Failed units, with `unit` and `error`.
    published
        Table with published values next to these, if there are any.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if failures:
        items = "".join(f"<li>{html.escape(one['unit'])}: {html.escape(one['error'])}</li>" for one in failures)
        parts.append(f'<div class="failed"><h2>Failed units</h2><ul>{items}</ul></div>')
    if published is not None:
        note = (
            "Mean W1 over held-out times, ± the standard deviation over seeds; distances depend on the data's version."
        )
        parts += ["<h2>Beside the published values</h2>", f'<p class="note">{note}</p>', html_table(published)]
    for (name, task), rows in table.groupby(["data", "task"], sort=False):
        parts.append(f"<h2>{html.escape(f'{name}: {task}')}</h2>")
        parts += _section(rows, *(_of(one, name, task) for one in (summary, paired)))
    told = pd.DataFrame({"": list(protocol), "value": [str(value) for value in protocol.values()]})
    numbers = pd.DataFrame({"": list(versions), "version": list(versions.values())})
    parts += ["<h2>Protocol</h2>", html_table(told, kind="told"), "<h2>Data</h2>", html_table(data)]
    parts += ["<h2>Versions</h2>", html_table(numbers, kind="told")]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _of(table: pd.DataFrame | None, data: str, task: str) -> pd.DataFrame:
    """Return the rows of one data set and task."""
    if table is None:
        return pd.DataFrame()
    return table[(table["data"] == data) & (table["task"] == task)].drop(columns=["data", "task"])


def _section(rows: pd.DataFrame, summary: pd.DataFrame, paired: pd.DataFrame) -> list[str]:
    """Return the page's section on one data set and task."""
    parts = [_picture(rows, summary)] if len(points(rows, METRIC)) else []
    if rows["strict"].nunique() == 2:
        note = (
            "The published form takes a representation that has seen all cells, held-out ones included; the strict "
            "form fits one anew without them, here carried over to one fitted on all cells, which costs it something "
            "of its own. The difference is the leak where the representation is the strict form's recipe; where it "
            "is another, it is that of the two as well, as can be seen from “previous” and “noise-reference”, which "
            "learn nothing."
        )
        parts += ["<h3>Strict beside published</h3>", f'<p class="note">{note}</p>']
        for metric in [name for name in PRINTED if len(points(rows, name))]:
            shown = side_by_side(rows, metric=metric).drop(columns=["data", "task"])
            parts.append(html_table(shown.loc[:, (shown != "").any()], caption=MEANINGS[metric]))
    for metric in [name for name in MEANINGS if name in set(rows["metric"])]:
        meaning = MEANINGS[metric][0].upper() + MEANINGS[metric][1:]
        title = f"{html.escape(meaning)}, by held-out time (mean ± sd over seeds)"
        blocks = f'<div class="blocks">{"".join(_blocks(rows, metric))}</div>'
        folded = f"<details><summary>{title}</summary>{blocks}</details>"
        parts.append(f"<h3>{title}</h3>{blocks}" if metric in PRINTED else folded)
    if len(summary):
        numbers = "Means with 95 % intervals, skill, ranks" if summary["low"].notna().any() else "Means and skill"
        shown = _in_words(summary[summary["metric"].isin(MEANINGS)]).dropna(axis=1, how="all")
        parts.append(f"<details><summary>{numbers}</summary>{html_table(shown)}</details>")
    if len(paired := paired[paired["metric"] == METRIC] if len(paired) else paired):
        title = f"Methods in pairs: difference of {html.escape(MEANINGS[METRIC])}, below zero where the first is better"
        shown = _in_words(paired).dropna(axis=1, how="all")
        parts.append(f"<details><summary>{title}</summary>{html_table(shown)}</details>")
    return parts


def _in_words(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(strict=table["strict"].map(FORMS)).rename(columns={"strict": "form"})


def _blocks(rows: pd.DataFrame, metric: str) -> list[str]:
    """Return one table per form, start and space: methods x held-out times."""
    out = []
    for (_, _, strict, start, space), own in wide(rows, metric=metric).groupby(BLOCK, sort=False):
        shown = own.drop(columns=BLOCK)
        shown = shown.loc[:, (shown != "").any()]
        shown.columns = [name if name in ("method", "mean") else f"t = {name}" for name in shown]
        out.append(html_table(shown, caption=f"{FORMS[strict]}, from {start}, {space} space"))
    return out


def html_table(table: pd.DataFrame, *, caption: str = "", kind: str = "") -> str:
    """Return a table as HTML with all content escaped."""
    text = [not pd.api.types.is_numeric_dtype(table[name]) and not _like_numbers(table[name]) for name in table]
    cell = ["<{0} class='text'>{1}</{0}>" if one else "<{0}>{1}</{0}>" for one in text]
    head = "".join(form.format("th", html.escape(str(name))) for form, name in zip(cell, table))
    lines = [
        "<tr>" + "".join(form.format("td", html.escape(_shown(value))) for form, value in zip(cell, row)) + "</tr>"
        for row in table.itertuples(index=False, name=None)
    ]
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{kind}">{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _like_numbers(column: pd.Series) -> bool:
    return all(re.fullmatch(r"|-|[+-]?[\d.]+( ± [\d.]+)?", str(value)) for value in column)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def _picture(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Return an image of the means with intervals, one axes per space and start, with the forms side by side."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = points(rows, METRIC)
    panels = list(rows.groupby(["space", "start"], sort=False))
    methods = list(dict.fromkeys(rows["method"]))
    figure = Figure(figsize=(2.5 + 3.8 * len(panels), 1.6 + 0.42 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, ((space, start), own) in zip(axes, panels):
        chosen = summary[["metric", "space", "start"]].eq([METRIC, space, start]).all(axis=1)
        _draw(ax, own, summary[chosen].set_index(["strict", "method"]), methods)
        ax.set_title(f"{space} space, from {start}", fontsize=10, parse_math=False)
    bars = "; bars: 95 % intervals" if summary["low"].notna().any() else ""
    handles = [
        Line2D([], [], color=COLORS[form], marker=MARKERS[form], lw=0, label=f"{FORMS[form]} (dots: seeds{bars})")
        for form in sorted(set(map(bool, rows["strict"])))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=140, metadata={"Software": None})
    coded = base64.b64encode(out.getvalue()).decode()
    words = html.escape(
        f"{MEANINGS[METRIC]} of {len(methods)} methods; the numbers are in the tables below", quote=True
    )
    return f'<img alt="{words}" src="data:image/png;base64,{coded}">'


def _draw(ax: Axes, rows: pd.DataFrame, summary: pd.DataFrame, methods: Sequence[str]) -> None:
    """Draw the mean over held-out times with its interval per method and form, and a small point for every seed."""
    forms = sorted(rows["strict"].unique())
    for form, own in rows.groupby("strict"):
        form = bool(form)
        shift = 0.0 if len(forms) == 1 else (0.16 if form else -0.16)
        by_method = {name: _by_seed(part).to_numpy() for name, part in own.groupby("method")}
        at = [k + shift for k, name in enumerate(methods) if name in by_method]
        values = [by_method[name] for name in methods if name in by_method]
        for y, seeds in zip(at, values):
            ax.plot(seeds, np.full(len(seeds), y), ".", color=COLORS[form], alpha=0.35, ms=4, lw=0)
        shown = summary.loc[[(form, name) for name in methods if name in by_method]]
        ax.plot(shown["mean"], at, MARKERS[form], color=COLORS[form], ms=6, lw=0)
        ax.hlines(at, shown["low"], shown["high"], color=COLORS[form], lw=1.2)
    ax.set_yticks(
        range(len(methods)), [textwrap.shorten(name, 40, placeholder="…") for name in methods], parse_math=False
    )
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_xlabel(f"{MEANINGS[METRIC]}\n(mean over held-out times)")
    ax.grid(axis="x", color="#e0e0e0")
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.08)
