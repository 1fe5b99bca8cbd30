"""Measure, by method, whether cells that are moved all along a course stay near its cells.

python benchmarks/trajectories.py --quick   # 10 s: a small simulated course
python benchmarks/trajectories.py --data ipsc-10d ipsc-5d eb-50d eb-5d --seeds 3

The first snapshot's cells are moved to the last one's time, and the last one's to the first one's. For each, two
figures are given: the share of cells that are astray there, that is, farther from the cells sampled at that time than
any of these is from the others (by the 5th nearest); and the energy distance to these cells as a share of that between
the two snapshots. Nothing is held out. The default is also shown in a moving frame, and with narrow paths, which are
not widened according to how far apart cells are.
"""

from __future__ import annotations

import logging
from pathlib import Path
from unittest.mock import patch

import joblib
import pandas as pd
import torch
from courses import FILES, N_CELLS, QUICK_CELLS, QUICK_STEPS, REAL, WIDER, load, options
from tables import DEFAULT, shown, table

from sctraj import tl
from sctraj._adata import read_flow
from sctraj.flow import problem
from sctraj.flow.clouds import share_astray
from sctraj.flow.distance import energy_distance
from sctraj.flow.integrate import AS_PUBLISHED, transport
from sctraj.flow.vector_field import VectorField

NARROW = "narrow paths"
METHODS = {  # columns: arguments of tl.fit_flow
    DEFAULT: {},
    "moving frame": {"frame": "moving"},
    NARROW: {},
    "closed-form field": {"field": "closed-form"},
    "ot-cfm": {"method": "ot-cfm"},
    "sb-cfm": {"method": "sb-cfm"},
}


def no_spread(*_: object) -> float:
    return 0.0


def found(field: VectorField, start: torch.Tensor, end: torch.Tensor, t0: float, t1: float) -> tuple[float, float]:
    """Share astray, and energy distance relative to the two snapshots' own, of cells moved from one time to another."""
    there = transport(field, start.expand(field.members, *start.shape), t0, t1, AS_PUBLISHED)
    mass = there.log_mass[0].double().softmax(0)
    moved = energy_distance(there.points[0], end, weights_x=mass)
    return share_astray(there.points[0], end), float(moved) / float(energy_distance(start, end))


def judged(name: str, seed: int, n_cells: int, real: Path, n_steps: int | None) -> list[dict]:
    torch.set_num_threads(1)
    logging.getLogger("sctraj").setLevel(logging.WARNING)  # of this process
    adata, snapshots = load(name, seed, n_cells, real)
    steps = {} if n_steps is None else {"n_steps": n_steps}
    rows = []
    for method, settings in METHODS.items():
        neural = {} if "field" in settings else steps
        with patch.object(problem, "spread_between", no_spread if method == NARROW else problem.spread_between):
            use_rep = "X_std" if name in FILES else "X_pca"
            tl.fit_flow(adata, use_rep=use_rep, rng=seed, progress=False, **settings, **neural)
        field = read_flow(adata, "flow").vector_field
        first, last, times = snapshots.points[0], snapshots.points[-1], snapshots.times
        ways = {
            "forwards": found(field, first, last, times[0], times[-1]),
            "backwards": found(field, last, first, times[-1], times[0]),
        }
        rows += [{"data": name, "method": method, "way": w, "astray": a, "energy": e} for w, (a, e) in ways.items()]
    return rows


def report(frame: pd.DataFrame) -> str:
    """Astray and energy, a row a data set and way; means over seeds, in brackets the sd of the share astray."""
    rows = []
    for (name, way), part in frame.groupby(["data", "way"], sort=False):
        cells = []
        for method in METHODS:
            own = part[part["method"] == method]
            spread = f" ({shown(own['astray'].std(), 2)})" if len(own) > 1 else ""
            cells.append(f"{shown(own['astray'].mean(), 2)}{spread}, {shown(own['energy'].mean(), 3)}")
        rows.append([name, way, *cells])
    return table(["astray, energy", "", *METHODS], rows)


def main() -> None:
    args = options(__doc__.splitlines()[0], FILES, default=[*WIDER, *REAL], seeds=3).parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    n_cells, n_steps = (QUICK_CELLS, QUICK_STEPS) if args.quick else (N_CELLS, None)
    firsts = {name: 0 if name in FILES else args.first for name in args.data}  # of real data these are seeds of fits
    tasks = [(name, first + n) for name, first in firsts.items() for n in range(args.seeds)]
    if args.quick:
        tasks = [("branching", 0)]
    for name in {name for name, _ in tasks if name in FILES and not (args.real / FILES[name]).exists()}:
        print(f"skipped {name}: no {args.real / FILES[name]}; pass --real FOLDER\n")
        tasks = [task for task in tasks if task[0] != name]
    each = joblib.Parallel(args.jobs)(joblib.delayed(judged)(*task, n_cells, args.real, n_steps) for task in tasks)
    if each:
        print(report(pd.DataFrame([row for rows in each for row in rows])))


if __name__ == "__main__":
    main()
