"""The data sets of the benchmarks by name, and the options by which scripts are asked for them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

import anndata as ad
import joblib
import numpy as np
import pandas as pd
import scanpy as sc

from sctraj import pp
from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course, simulated_differentiation
from sctraj.datasets._courses import _COURSES, Family
from sctraj.flow.snapshots import Snapshots

REAL = {
    "eb-5d": "embryoid_body_2750.h5ad",
    "eb-50d": "embryoid_body_2750.h5ad",
    "ipsc-5d": "ipsc_cardiomyocyte_1081.h5ad",
}
OTHERS = {  # held-out snapshots entered no choice; made by other_courses.py
    "myoblast-5d": "myoblast_271.h5ad",
    "myoblast-20d": "myoblast_271.h5ad",
    "embryo-5d": "mouse_embryo_428.h5ad",
    "embryo-20d": "mouse_embryo_428.h5ad",
}
WIDER = {"ipsc-10d": REAL["ipsc-5d"]}  # for trajectories.py; never held out
FILES = REAL | OTHERS | WIDER
SIMULATED = [f"{family}{effects}" for family in get_args(Family) for effects in ("", "+effects")] + ["differentiation"]
COUNTS = (3, 4, 12)  # snapshots of the same families at even times, as many cells in all
RESAMPLED = [f"{family}:{n}{effects}" for n in COUNTS for family in get_args(Family) for effects in ("", "+effects")]
EFFECTS_SEED = 1000  # on top of the seed where there are sample effects: the same cells again would tell less
FIRST = 2000  # seed of the first simulated data set: the default was chosen on others, docs/tried.md has a list
N_CELLS, QUICK_CELLS, QUICK_STEPS = 2000, 500, 50
DIFFUSE = ("switch", "differentiation")  # their cells have no one true place


def load(name: str, seed: int, n_cells: int, real: Path) -> tuple[ad.AnnData, Snapshots]:
    """Read or draw one data set; those without a file are simulated."""
    if name not in FILES:
        family, _, effects = name.partition("+")
        family, _, count = family.partition(":")
        if family == "differentiation":
            adata = simulated_differentiation(rng=seed)
        else:
            rng = seed + EFFECTS_SEED * bool(effects)
            course = _COURSES[family].times
            times = np.linspace(course[0], course[-1], int(count)) if count else None
            adata = simulated_course(family, n_cells, times=times, sample_effects=float(bool(effects)), rng=rng)
        return adata, read_snapshots(adata, "time", "X_pca", least=3).snapshots
    adata, n_dims = ad.read_h5ad(real / FILES[name]), int(name.rpartition("-")[2].removesuffix("d"))
    if "time" not in adata.obs:
        pp.parse_time(adata, "day")
    if "X_pca" not in adata.obsm:  # in float64, as the command line does
        sc.pp.pca(adata, n_comps=n_dims, svd_solver="full", dtype="float32")
    if n_dims == 5:
        pp.standardize(adata, n_dims=n_dims)
    else:
        adata.obsm["X_std"] = adata.obsm["X_pca"][:, :n_dims]
    return adata, read_snapshots(adata, "time", "X_std", least=3).snapshots


def options(description: str, real: Iterable[str], *, default: Sequence[str], seeds: int) -> argparse.ArgumentParser:
    """What to run on: the named ``real`` sets and all simulated ones; for other scripts too."""
    parser = argparse.ArgumentParser(description=description)
    names = [*real, *SIMULATED, *RESAMPLED]
    parser.add_argument("--quick", action="store_true", help="one small simulated set, short training")
    parser.add_argument("--data", nargs="+", choices=names, default=default, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--seeds", type=int, default=seeds, help="simulated data sets of a kind; of real ones fits of a neural field"
    )
    parser.add_argument("--first", type=int, default=FIRST, help="seed of the first simulated data set of a kind")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--real", type=Path, default=beside, help="folder of the real data")
    parser.add_argument("--jobs", type=int, default=1, help="data sets at once, a thread each")
    return parser


def on_draws(description: str, courses: Sequence[str], judged: Callable[..., list[dict]], seeds: int) -> pd.DataFrame:
    """Rows of ``judged(course, seed, n_cells, real, n_steps)`` on draws of simulated courses, as the options say."""
    args = options(description, [], default=courses, seeds=seeds).parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    n_cells, n_steps = (QUICK_CELLS, QUICK_STEPS) if args.quick else (N_CELLS, None)
    tasks = [(name, args.first + draw) for name in args.data for draw in range(args.seeds)]
    if args.quick:
        tasks = [("branching", args.first)]
    each = joblib.Parallel(args.jobs)(joblib.delayed(judged)(*task, n_cells, args.real, n_steps) for task in tasks)
    return pd.DataFrame([row for rows in each for row in rows])
