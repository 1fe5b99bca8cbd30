"""Measure how well held-out snapshots are restored, by the energy distance, with controls for that figure.

python benchmarks/restoration.py --quick                     # 20 s: one small data set, from which nothing follows
python benchmarks/restoration.py --jobs 2 --output all.csv   # the tables of docs/benchmarks.md
python benchmarks/restoration.py --read all.csv              # these tables once more

The default is compared with baselines, two halves of the truth, an interpolation that was shrunk (a measure that
improves by this cannot be trusted), the default's ingredients one by one, the default in a moving frame, neural fields
and, for simulated cells that do not diffuse, the true dynamics from both neighbours, which is what a perfect field
would score from these. Simulated data sets are drawn anew for every seed; those with sample effects use other seeds
than those without. Of real data there is one set each, and seeds are those of neural fields and of the halves.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import anndata as ad
import joblib
import numpy as np
import pandas as pd
import torch
from courses import DIFFUSE, FILES, N_CELLS, OTHERS, QUICK_CELLS, QUICK_STEPS, REAL, SIMULATED, load, options
from tables import (
    BEFORE,
    CLOCK,
    DEFAULT,
    FRAME,
    INTERPOLATION,
    MEASURES,
    NETWORK,
    OT_BOTH,
    PUBLISHED,
    STEPS,
    TRUTH,
    WIDE,
    report,
)  # fmt: skip

from sctraj import tl
from sctraj.datasets import simulated_course
from sctraj.datasets._courses import carried
from sctraj.flow import hold_out, judgement, problem
from sctraj.flow.baselines import BASELINES
from sctraj.flow.fields import make_field
from sctraj.flow.flow_matching import Training
from sctraj.flow.hold_out import NOISE_REFERENCE
from sctraj.flow.integrate import AS_PUBLISHED
from sctraj.flow.judgement import Observed
from sctraj.flow.plans import Plans
from sctraj.flow.problem import Problem
from sctraj.flow.restoration import CONTROLS, Restoration, mixed
from sctraj.flow.snapshots import Snapshots
from sctraj.tl._seeds import member_seeds

METRIC_PATHS = ("rbf", "land")


def truth(adata: ad.AnnData, times: Sequence[float], k: int) -> Restoration:
    """Restore snapshot ``k`` from both neighbours as the default does of few, by the true dynamics and growth."""
    t0, t, t1 = times[k - 1 : k + 2]
    first, last = (Restoration(*map(torch.from_numpy, carried(adata, side, t))) for side in (t0, t1))
    s = (t - t0) / (t1 - t0)
    return mixed([first, last], [1 - s, s])


class FullTempo(Problem):
    """A problem whose network's clock runs as the other methods' do."""

    tempo = 1.0


def at_full_tempo(one: Problem, **changes: object) -> FullTempo:
    return FullTempo(**{f.name: getattr(one, f.name) for f in fields(Problem)} | changes)


def restorations(
    snapshots: Snapshots, seeds: Sequence[int], training: Training
) -> Iterator[tuple[str, int, int, Restoration]]:
    """Restore every interior snapshot in every way: name, number of the seed, snapshot, restoration."""
    for k in hold_out.interior(snapshots):
        for name in BASELINES:
            yield name, 0, k, hold_out.baseline(snapshots, k, name)
        interpolation = hold_out.baseline(snapshots, k, INTERPOLATION)
        for name, control in CONTROLS.items():
            yield f"interpolation, {name}", 0, k, control(interpolation)

    same = {"sigma": None, "seeds": seeds, "validate": False}
    held_out, plain, _ = hold_out.hold_out_problems(snapshots, method="ot-cfm", path=None, **same)
    with patch.object(problem, "ROUNDS", 0):
        _, by_place, _ = hold_out.hold_out_problems(snapshots, method=DEFAULT, path=None, **same)
    _, by_velocity, _ = hold_out.hold_out_problems(snapshots, method=DEFAULT, path=None, **same)
    _, curved, _ = hold_out.hold_out_problems(snapshots, method="ot-cfm", path="hermite", **same)
    closed = [
        (plain, {STEPS[0]: "before", STEPS[1]: "both"}),
        ([replace(p, tangents=replace(p.tangents, reliability=1.0)) for p in curved], {STEPS[2]: "both"}),
        (curved, {STEPS[3]: "both"}),
        (by_place, {STEPS[4]: "both"}),
        (by_velocity, {STEPS[5]: "both"}),
    ]
    few = not any(one.farther for one in by_velocity)
    neural = [(plain, {PUBLISHED: "before", OT_BOTH: "both"})]
    for path in METRIC_PATHS if few else ():  # of many snapshots they take their time
        bent = hold_out.hold_out_problems(snapshots, method="ot-cfm", path=path, **same)[1]
        closed.append((bent, {f"ot-cfm {path}, both": "both"}))
        neural.append((bent, {f"ot-cfm {path} neural, before": "before"}))
    for problems, starts in closed:  # nothing is drawn: one seed's problems stand for all
        yield from _restored("closed-form", starts, held_out, problems, snapshots, len(seeds), training)

    for method in ("i-cfm", "sb-cfm") if few else ():
        problems = hold_out.hold_out_problems(snapshots, method=method, path=None, **same)[1]
        starts = ("before",) if method == "i-cfm" else ("before", "both")
        neural.append((problems, {f"{method} neural, {start}": start for start in starts}))
    neural.append(([at_full_tempo(p, spreads=()) for p in by_velocity], {NETWORK: "both"}))
    neural.append(([at_full_tempo(p) for p in by_velocity], {WIDE: "both"}))
    neural.append((by_velocity, {DEFAULT: "both", BEFORE: "before"} | ({} if few else {CLOCK: "both"})))
    moving = hold_out.hold_out_problems(snapshots, method=DEFAULT, path=None, plans=Plans(frame="moving"), **same)[1]
    neural.append((moving, {FRAME: "both"}))
    for problems, starts in neural:
        yield from _restored("neural", starts, held_out, problems, snapshots, len(seeds), training)


def _restored(
    kind: str, starts: dict[str, str], held_out: Sequence[int], problems: Sequence[Problem], snapshots: Snapshots,
    n_seeds: int, training: Training,
) -> Iterator[tuple[str, int, int, Restoration]]:  # fmt: skip
    """Make one field of all folds (and of all seeds, where it is trained) and restore with it, a row for each start."""
    step = n_seeds if kind == "closed-form" else 1
    held_out, problems = held_out[::step], problems[::step]
    field = make_field(kind, problems, [], training, torch.device("cpu"), progress=False).vector_field
    for name, start in starts.items():
        farther = [one.farther if name in (DEFAULT, FRAME) else 0.0 for one in problems]
        found = hold_out.restore(field, snapshots, held_out, AS_PUBLISHED, start=start, farther=farther)
        for member, (k, restoration) in enumerate(zip(held_out, found)):
            yield name, member % (n_seeds // step), k, restoration


def judged(name: str, seed: int, n_seeds: int, n_cells: int, real: Path, training: Training) -> list[dict]:
    """All rows of one data set; ``seed`` is that of the data, ``n_seeds`` are of neural fields and halves."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    adata, snapshots = load(name, seed, n_cells, real)
    seeds = member_seeds(0, n_seeds)  # those of tl.leave_one_out
    rows = []
    observed = {k: Observed(snapshots.points[k]) for k in hold_out.interior(snapshots)}

    def judge(row: str, number: int, k: int, restoration: Restoration, cells: Observed) -> None:
        found = judgement.judge(restoration, cells)
        values = found.values | {f"{measure}_unweighted": value for measure, value in found.unweighted.items()}
        held_out = {"data": name, "method": row, "time": snapshots.times[k], "seed": seed + number}
        rows.append(held_out | {measure: values[measure] for measure in MEASURES})

    for k in observed:
        for number, one in enumerate(seeds):
            first, second = hold_out.halves(snapshots.points[k], torch.Generator().manual_seed(one + k))
            judge(NOISE_REFERENCE, number, k, Restoration(first), Observed(second))
        if name not in FILES and not name.startswith(DIFFUSE):
            judge(TRUTH, 0, k, truth(adata, snapshots.times, k), observed[k])
    for row, number, k, restoration in restorations(snapshots, seeds, training):
        judge(row, number, k, restoration, observed[k])
    print(f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def check_default(rows: pd.DataFrame, name: str, seed: int, n_cells: int, training: Training) -> None:
    """Compare the default's rows with what a user gets from ``tl.leave_one_out``."""
    adata = simulated_course(name, n_cells, rng=seed)
    tl.leave_one_out(adata, n_seeds=1, n_steps=training.n_steps)
    theirs = adata.uns["leave_one_out"].pivot_table(index=["method", "time"], columns="metric", values="value")
    for method in (DEFAULT, *BASELINES):
        own = rows[rows["method"] == method].set_index("time")[list(MEASURES)]
        np.testing.assert_allclose(own, theirs.loc[method][list(MEASURES)], rtol=0, atol=1e-6, err_msg=method)
    print(f"{DEFAULT} and the baselines are what tl.leave_one_out gives, to 1e-6\n")


def main() -> None:
    parser = options(__doc__.splitlines()[0], [*REAL, *OTHERS], default=[*REAL, *SIMULATED], seeds=5)
    parser.add_argument("--output", type=Path, help="csv of all held-out snapshots")
    parser.add_argument("--read", type=Path, help="csv of an earlier run, to print its tables alone")
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    if args.read:
        frame = pd.read_csv(args.read)
        report(frame[frame["data"].isin(args.data)])
        return

    defaults = {name: p.default for name, p in inspect.signature(tl.leave_one_out).parameters.items()}
    training = Training(**{f.name: defaults[f.name] for f in fields(Training)})
    names, n_seeds, n_cells = args.data, args.seeds, N_CELLS
    if args.quick:
        names, n_seeds, n_cells = ["branching"], 1, QUICK_CELLS
        training = replace(training, n_steps=QUICK_STEPS)
    tasks = []
    for name in names:
        if name not in FILES:
            tasks += [(name, args.first + draw, 1) for draw in range(n_seeds)]
        elif (args.real / FILES[name]).exists():
            tasks.append((name, 0, n_seeds))
        else:
            print(f"skipped {name}: no {args.real / FILES[name]}; pass --real FOLDER\n")
    if not tasks:
        return
    began = time.perf_counter()
    each = joblib.Parallel(args.jobs)(joblib.delayed(judged)(*task, n_cells, args.real, training) for task in tasks)
    frame = pd.DataFrame([row for rows in each for row in rows])
    if args.output:
        frame.to_csv(args.output, index=False)
    if args.quick:
        check_default(frame, *names, args.first, n_cells, training)
    report(frame)
    print(f"\n{len(tasks)} data sets in {(time.perf_counter() - began) / 60:.1f} min, {args.jobs} at once")


if __name__ == "__main__":
    main()
