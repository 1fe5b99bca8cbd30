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

import argparse
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import anndata as ad
import joblib
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from scipy.stats import wilcoxon

from sctraj import pp, tl
from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course, simulated_differentiation
from sctraj.datasets._courses import _COURSES, Family, carried
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

DEFAULT, BEFORE, FRAME = "uot-cfm", "uot-cfm, before", "uot-cfm, moving frame"
INTERPOLATION, PUBLISHED, OT_BOTH = "ot-interpolation", "ot-cfm neural, before", "ot-cfm neural, both"
# one ingredient more each, closed-form up to the pairs; the last is the default, which moves more than the nearest
# snapshots where there are many
STEPS = (
    "ot-cfm straight, before", "+ both sides", "+ hermite", "+ reliable turns", "+ growth", "+ pairs by velocity",
)  # fmt: skip
NETWORK, WIDE, CLOCK, FARTHER = "+ network", "+ wide paths", "+ slow clock", "+ farther snapshots"
TRUTH, DIFFUSE = "true dynamics", ("switch", "differentiation")  # of the latter there is no one true place
COMPARED = (INTERPOLATION, PUBLISHED, OT_BOTH)
PAIRED = (*((DEFAULT, other) for other in COMPARED), (BEFORE, PUBLISHED), (FRAME, DEFAULT))
METRIC_PATHS = ("rbf", "land")
MEASURES = {  # and their decimals
    "energy": 3, "energy_about_mean": 3, "energy_unweighted": 3, "mmd": 4, "w1": 3, "w1_unweighted": 3,
    "variance_ratio": 2,
}  # fmt: skip
SMALLEST = 0.002  # energy distances below count as that in ratios, where sampling decides


# --- data
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


# --- restorations
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


# --- tables
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


def check_default(rows: pd.DataFrame, name: str, seed: int, n_cells: int, training: Training) -> None:
    """Compare the default's rows with what a user gets from ``tl.leave_one_out``."""
    adata = simulated_course(name, n_cells, rng=seed)
    tl.leave_one_out(adata, n_seeds=1, n_steps=training.n_steps)
    theirs = adata.uns["leave_one_out"].pivot_table(index=["method", "time"], columns="metric", values="value")
    for method in (DEFAULT, *BASELINES):
        own = rows[rows["method"] == method].set_index("time")[list(MEASURES)]
        np.testing.assert_allclose(own, theirs.loc[method][list(MEASURES)], rtol=0, atol=1e-6, err_msg=method)
    print(f"{DEFAULT} and the baselines are what tl.leave_one_out gives, to 1e-6\n")


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
