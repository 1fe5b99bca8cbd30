"""Compare the fates of single cells with the truth, on simulated courses.

python benchmarks/fates.py --quick             # 10 s: one small data set, from which nothing follows
python benchmarks/fates.py --jobs 2            # the table of docs/benchmarks.md

It uses the families with two fates. A cell's true fate is the side it is on at the last time, after its latent state is
moved there by the true dynamics (with diffusion, the share in 50 such moves). The figure is the Brier score: the mean
square of found minus true probability, over the cells of a snapshot, then over all but the last snapshot, then over
draws; 0 is perfect.

The columns are the default, also in a *moving frame*; both *with a prior*, every cell's true growth rate with noise as
large as such rates are on the branching course; other flows; *chained plans*, the entropic plans of consecutive
snapshots one after the other, as Waddington-OT and moscot follow cells, and *soft* ones, whose marginals hold only
softly, both averaged over neighbouring cells as `tl.fates` does, which makes them better; *end shares*, which gives
every cell the shares of the sides at the last time; and *cells like it*, the mean true fate of the 25 nearest cells of
the same snapshot, which is about the best that noisy coordinates allow.

A second table has the mean probability, over the first snapshot's cells, of the side that grows (of either side, where
none does), which shows how far growth is taken for cells that change sides.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import ot
import pandas as pd
import torch
from courses import load, on_draws
from sklearn.neighbors import KNeighborsRegressor
from tables import DEFAULT, shown, table

from sctraj import get, tl
from sctraj.datasets._courses import _COURSES, _moved
from sctraj.flow.coupling.unbalanced import unbalanced
from sctraj.flow.snapshots import Snapshots

SIDES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # families with two fates: the side of latent states (n, k)
    "branching": lambda z: z[:, 1] > 0,
    "high-dimensional": lambda z: z[:, 1] > 0,
    "crossing": lambda z: z[:, 2] > 0,
    "switch": lambda z: z[:, 0] > z[:, 1],
}
COURSES = [f"{family}{kind}" for family in SIDES for kind in ("", "+effects", ":12")]
METHODS = {  # columns: arguments of tl.fit_flow
    DEFAULT: {},
    "moving frame": {"frame": "moving"},
    "with a prior": {"growth_key": "prior"},
    "moving, with a prior": {"frame": "moving", "growth_key": "prior"},
    "closed-form field": {"field": "closed-form"},
    "ot-cfm": {"method": "ot-cfm"},
    "sb-cfm": {"method": "sb-cfm"},
}
CHAINED = {"chained plans": 1e3, "chained, soft": 4.0}  # penalty on marginals, in costs of the exact plan
END_SHARES, LIKE_IT, TRUTH = "end shares", "cells like it", "truth"
EPSILON = 0.05  # of the exact plan's cost
MOVES, LIKE = 50, 25
NOISE = 0.25  # of a prior's rates, per day
NEAR = inspect.signature(tl.fates).parameters["n_neighbors"].default


def true_fates(adata: ad.AnnData, family: str) -> np.ndarray:
    """Probability of one side at the last time, of every cell's latent state ``(n,)``."""
    course, found, last = _COURSES[family], np.empty(adata.n_obs), adata.obs["time"].max()
    for time in adata.obs["time"].unique():
        own = (adata.obs["time"] == time).to_numpy()
        z, moves = adata.obsm["X_latent"][own].astype(float), MOVES if course.diffusion else 1
        ends = [_moved(course, z, time, last, np.random.default_rng(move))[0] for move in range(moves)]
        found[own] = np.mean([SIDES[family](end) for end in ends], axis=0)
    return found


def chained(snapshots: Snapshots, at_end: np.ndarray, penalty: float) -> list[np.ndarray]:
    """Values at the last snapshot's cells carried back through the plans, one array for every earlier snapshot."""
    values, found = torch.from_numpy(at_end.astype(float))[:, None], []
    for interval in snapshots.intervals()[::-1]:
        cost = float(ot.emd2([], [], ot.dist(interval.x0.double().numpy(), interval.x1.double().numpy())))
        plan = unbalanced(interval, epsilon=EPSILON * cost, penalty=penalty * cost)
        values = plan.descendants(values)
        found.append(values[:, 0].numpy())
    return found[::-1]


def averaged(values: np.ndarray, cells: np.ndarray, k: int) -> np.ndarray:
    """Means of cells' values over the k nearest cells, itself among them."""
    return KNeighborsRegressor(min(k, len(cells))).fit(cells, values).predict(cells)


def judged(name: str, seed: int, n_cells: int, real: Path, n_steps: int | None) -> list[dict]:
    if not name.startswith(tuple(SIDES)):
        return []
    torch.set_num_threads(1)
    logging.getLogger("sctraj").setLevel(logging.ERROR)  # of this process
    adata, snapshots = load(name, seed, n_cells, real)
    family = name.partition("+")[0].partition(":")[0]
    truth, side = true_fates(adata, family), SIDES[family](adata.obsm["X_latent"])
    adata.obs["side"] = np.where(side, "one", "other")
    adata.obs["prior"] = adata.obs["growth_rate"] + NOISE * np.random.default_rng(seed).standard_normal(adata.n_obs)
    rows_of = [np.flatnonzero(adata.obs["time"] == time) for time in snapshots.times]
    at_end = side[rows_of[-1]]

    found: dict[str, list[np.ndarray]] = {}
    for method, settings in METHODS.items():
        steps = {} if n_steps is None or "field" in settings else {"n_steps": n_steps}
        tl.fit_flow(adata, rng=seed, progress=False, **settings, **steps)
        tl.fates(adata, "side")
        found[method] = [get.fates(adata)["one"].to_numpy()[rows] for rows in rows_of[:-1]]
    for method, penalty in CHAINED.items():
        each = zip(chained(snapshots, at_end, penalty), rows_of)
        found[method] = [averaged(values, adata.obsm["X_pca"][rows], NEAR) for values, rows in each]
    found[END_SHARES] = [np.full(len(rows), at_end.mean()) for rows in rows_of[:-1]]
    found[LIKE_IT] = []
    for rows in rows_of[:-1]:
        found[LIKE_IT].append(averaged(truth[rows], adata.obsm["X_pca"][rows], LIKE))
    found[TRUTH] = [truth[rows] for rows in rows_of[:-1]]
    return [
        {"data": name, "seed": seed, "method": method, "snapshot": k, "share": one.mean()}
        | {"brier": np.mean((one - truth[rows]) ** 2)}
        for method, each in found.items()
        for k, (one, rows) in enumerate(zip(each, rows_of))
    ]


def report(frame: pd.DataFrame) -> str:
    """Brier scores, then shares at the first snapshot; rows are data sets, in brackets the sd over draws."""
    columns = [*METHODS, *CHAINED, END_SHARES]

    def rows(part: pd.DataFrame, measure: str, columns: list[str], decimals: int) -> list[list[str]]:
        each = []
        for name, own in part.groupby("data", sort=False):
            draws = own.groupby(["method", "seed"])[measure].mean().unstack()
            spread = [f" ({shown(draws.loc[c].std(), decimals)})" if draws.shape[1] > 1 else "" for c in columns]
            means = [shown(draws.loc[c].mean(), decimals) for c in columns]
            each.append([str(name), *map("".join, zip(means, spread))])
        return each

    first = frame[frame["snapshot"] == 0]
    brier = table(["Brier score", *columns, LIKE_IT], rows(frame, "brier", [*columns, LIKE_IT], 3))
    return brier + "\n" + table(["share at first", *columns, TRUTH], rows(first, "share", [*columns, TRUTH], 2))


def main() -> None:
    print(report(on_draws(__doc__.splitlines()[0], COURSES, judged, seeds=3)))


if __name__ == "__main__":
    main()
