"""Tables in markdown, and those that `restoration.py` prints: the names of its rows, measures, pairs and tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from courses import FILES
from scipy.stats import wilcoxon

from sctraj.flow.hold_out import NOISE_REFERENCE

DEFAULT, BEFORE, FRAME = "uot-cfm", "uot-cfm, before", "uot-cfm, moving frame"
INTERPOLATION, PUBLISHED, OT_BOTH = "ot-interpolation", "ot-cfm neural, before", "ot-cfm neural, both"
# one ingredient more each, closed-form up to the pairs; the last is the default, which moves more than the nearest
# snapshots where there are many
STEPS = (
    "ot-cfm straight, before", "+ both sides", "+ hermite", "+ reliable turns", "+ growth", "+ pairs by velocity",
)  # fmt: skip
NETWORK, WIDE, CLOCK, FARTHER = "+ network", "+ wide paths", "+ slow clock", "+ farther snapshots"
TRUTH = "true dynamics"
COMPARED = (INTERPOLATION, PUBLISHED, OT_BOTH)
PAIRED = (*((DEFAULT, other) for other in COMPARED), (BEFORE, PUBLISHED), (FRAME, DEFAULT))
MEASURES = {  # and their decimals
    "energy": 3, "energy_about_mean": 3, "energy_unweighted": 3, "mmd": 4, "w1": 3, "w1_unweighted": 3,
    "variance_ratio": 2,
}  # fmt: skip
SMALLEST = 0.002  # energy distances below count as that in ratios, where sampling decides


def shown(value: float, decimals: int) -> str:
    if np.isnan(value):
        return ""
    text = f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no minus at zero
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def averages(frame: pd.DataFrame) -> str:
    """One data set: means over held-out snapshots, then over seeds, with the sd over seeds where there are some."""
    rows = []
    for method in frame["method"].unique():
        by_seed = frame[frame["method"] == method].groupby("seed")[list(MEASURES)].mean()
        cells = []
        for measure, decimals in MEASURES.items():
            spread = f" ({shown(by_seed[measure].std(), decimals)})" if len(by_seed) > 1 else ""
            cells.append(shown(by_seed[measure].mean(), decimals) + spread)
        rows.append([f"**{method}**" if method == DEFAULT else method, *cells])
    head = ["", "energy", "about the mean", "energy, unweighted", "MMD^2", "W1", "W1, unweighted", "V"]
    return table(head, rows)


def energies(frame: pd.DataFrame, measure: str = "energy") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean energy distance, data sets x methods, and its sd over seeds."""
    by_seed = frame.groupby(["data", "method", "seed"], sort=False)[measure].mean()
    grouped, methods = by_seed.groupby(["data", "method"], sort=False), list(frame["method"].unique())
    return grouped.mean().unstack()[methods], grouped.std().unstack()[methods]


def with_spread(mean: pd.DataFrame, sd: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    """Rows of a table: a data set each, means and in brackets their sd where there are several seeds."""
    rows = []
    for name in mean.index:
        spread = ["" if np.isnan(s) else f" ({shown(s, 3)})" for s in sd.loc[name, columns]]
        rows.append([name, *(shown(v, 3) + s for v, s in zip(mean.loc[name, columns], spread))])
    return rows


def differences(frame: pd.DataFrame, name: str, one: str, other: str) -> np.ndarray:
    """Energy of one row less that of another: means over held-out snapshots, by draw; of real data, by snapshot."""
    of = frame[frame["data"] == name].groupby(["method", "time" if name in FILES else "seed"])["energy"].mean()
    return (of[one] - of[other]).to_numpy()


def paired(frame: pd.DataFrame) -> str:
    rows = []
    for name in frame["data"].unique():
        cells = []
        for pair in PAIRED:
            values = differences(frame, name, *pair)
            spread = (values.min(), values.max()) if name in FILES else (values.std(ddof=1),) if len(values) > 1 else ()
            brackets = f" ({' to '.join(shown(v, 3) for v in spread)})" if spread else ""
            cells.append(shown(values.mean(), 3) + brackets)
        rows.append([name, *cells])
    return table(["energy", *(f"{one} less {other}" for one, other in PAIRED)], rows)


def ingredients(frame: pd.DataFrame) -> str:
    """Ratio of the energy distance with an ingredient to that without: over data sets and, for the test, over kinds."""
    by_set = frame.groupby(["data", "seed", "method"])["energy"].mean().clip(lower=SMALLEST).unstack()
    order = [name for name in (*STEPS, NETWORK, WIDE, CLOCK, DEFAULT) if name in by_set]
    rows = []
    for without, within in pairwise(order):
        ratio = np.log(by_set[within] / by_set[without])
        kinds = ratio.groupby("data").mean().dropna()
        affected = kinds.index.str.contains("+effects", regex=False)
        name = {DEFAULT: FARTHER if CLOCK in by_set else CLOCK}.get(within, within)
        means = [shown(np.exp(part.mean()), 3) for part in (kinds[~affected], kinds[affected])]
        counts = f"{int((ratio < 0).sum())}, {int((ratio > 0).sum())}"
        p = f"{wilcoxon(kinds).pvalue:.2g}" if len(kinds) > 1 and kinds.any() else ""
        rows.append([name, *means, counts, p])
    head = ["", "energy, of without it: no effects", "with effects", "sets better, worse", "p over kinds"]
    return table(head, rows)


def spread_and_w1(frame: pd.DataFrame) -> str:
    """V and W1 of baselines and the default, data sets in rows."""
    methods = [name for name in (NOISE_REFERENCE, *COMPARED, DEFAULT) if name in set(frame["method"])]
    mean = frame.groupby(["data", "method"], sort=False)[["variance_ratio", "w1"]].mean()
    cells = [
        [name, *(f"{shown(v, 2)}, {shown(w, 3)}" for v, w in mean.loc[name].loc[methods].to_numpy())]
        for name in frame["data"].unique()
    ]
    return table(["V, W1", *methods], cells)


def report(frame: pd.DataFrame) -> None:
    for name, own in frame.groupby("data", sort=False):
        print(f"### {name}\n\n{averages(own)}")
    mean, sd = energies(frame)
    columns = [NOISE_REFERENCE, *COMPARED, *STEPS, NETWORK, WIDE, CLOCK, DEFAULT, TRUTH]
    columns = [name for name in columns if name in mean]  # of real data there is no truth
    print("### One ingredient at a time: energy distance\n")
    last = f"{FARTHER if CLOCK in columns else CLOCK} = {DEFAULT}"
    print(table(["", *(last if name == DEFAULT else name for name in columns)], with_spread(mean, sd, columns)))
    columns = [name for name in (NOISE_REFERENCE, *COMPARED, WIDE, DEFAULT, TRUTH) if name in mean]
    print("### What is off in shape: energy distance about the mean\n")
    print(table(["", *columns], with_spread(*energies(frame, "energy_about_mean"), columns)))
    simulated = [name for name in mean.index if name not in FILES]
    if simulated:
        print("### What each ingredient is worth on simulated courses\n")
        print(ingredients(frame[frame["data"].isin(simulated)]))
        print("### Variance ratio and W1 on simulated courses\n")
        print(spread_and_w1(frame[frame["data"].isin(simulated)]))
    print("### The default beside interpolation and OT-CFM\n")
    print(
        "Mean difference of the energy distance, below zero where the first is nearer to the truth; in brackets of "
        "simulated courses\nits sd over draws, of real ones the smallest and the largest of the held-out snapshots.\n"
    )
    print(paired(frame))
    for one, other in PAIRED if simulated else ():
        values = [differences(frame, name, one, other) for name in simulated]
        below = f"{sum(int((v < 0).sum()) for v in values)} of {sum(map(len, values))} simulated data sets"
        kinds = np.array([v.mean() for v in values])
        print(
            f"{one} is below {other} in {below} and in {int((kinds < 0).sum())} of {len(kinds)} kinds on average; "
            f"Wilcoxon signed-rank p over kinds = {wilcoxon(kinds).pvalue:.2g}"
        )
    print()
    for other in COMPARED:
        worse = [f"{n} (by {shown(d, 4)})" for n, d in (mean[DEFAULT] - mean[other]).items() if d > 0]
        print(f"Data on which the default's energy is above that of {other}: {', '.join(worse) or 'none'}")
