"""Compare how fast OT-CFM restores held-out snapshots with torchcfm: same data set, network, protocol and run.

python benchmarks/against_torchcfm.py --quick        # 10 s: small data and few steps, from which nothing follows
python benchmarks/against_torchcfm.py --output against.csv --plot docs/images/against_torchcfm.png   # some 15 minutes
python benchmarks/against_torchcfm.py --device cuda --processes 15 --peer-fits 1   # torchcfm there on CPU and GPU

Protocol (Tong et al. 2023): every interior snapshot held out, 5 seeds; a perceptron of 3 x 64 SELU, 128 pairs per
interval and step; all cells of the snapshot before moved to the held-out time, Euler, 100 steps; exact W1. torchcfm is
run in the loop of its examples: AdamW at 1e-3, weight decay 1e-5, sigma .1, its exact mini-batch matcher, 3,000 steps.
sctraj is ``tl.leave_one_out(methods="ot-cfm", start="before")``, whose time includes everything else that it measures:
W2, MMD, baselines, the noise reference. Times are from data in memory to distances, with libraries loaded; the time of
the first call, with the cells and the Python modules in memory, is reported separately.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import joblib
import numpy as np
import pandas as pd
import torch
from courses import REAL
from tables import shown, table

from sctraj import pp, tl
from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course
from sctraj.flow.distance import energy_distance, wasserstein
from sctraj.flow.hold_out import interior
from sctraj.flow.optimiser import one_cycle
from sctraj.flow.snapshots import Snapshots, to_device

try:
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models.models import MLP
except ImportError:
    print("skipped: no torchcfm; install it with: pip install --no-deps torchcfm==1.0.7")
    sys.exit(0)

STEPS, BATCH_SIZE, WIDTH, EULER_STEPS = 3000, 128, 64, 100
CURVE = (100, 200, 300, 500, 1000, STEPS)
SEEDS = 5
CPU, GPU, CYCLE = "torchcfm, one process", "torchcfm, one process, on the GPU", ", one cycle"
REPEATED = 3  # times of ours, whose median is taken, up to the default's steps
DEFAULT_STEPS, DEFAULT_RATE = (
    inspect.signature(tl.leave_one_out).parameters[name].default for name in ("n_steps", "learning_rate")
)


# --- torchcfm
def trained(points: Sequence[torch.Tensor], n_steps: int, cycle: bool) -> MLP:
    """Fit as torchcfm's users do; with ``cycle`` on sctraj's schedule of learning rates."""
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    model = MLP(points[0].shape[1], w=WIDTH, time_varying=True).to(points[0].device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=DEFAULT_RATE if cycle else 1e-3, weight_decay=1e-5)
    for step in range(n_steps):
        if cycle:
            optimiser.param_groups[0]["lr"] = DEFAULT_RATE * one_cycle(step / n_steps)
        ts, xs, us = [], [], []
        for k in range(len(points) - 1):
            x0, x1 = (x[torch.randint(len(x), (BATCH_SIZE,))] for x in points[k : k + 2])
            t, x, u = matcher.sample_location_and_conditional_flow(x0, x1)
            ts.append(t[:, None] + k)
            xs.append(x)
            us.append(u)
        optimiser.zero_grad()
        loss = (model(torch.cat([torch.cat(xs), torch.cat(ts)], 1)) - torch.cat(us)).square().mean()
        loss.backward()
        optimiser.step()
    return model


def theirs(
    snapshots: Snapshots, held_out: int, seed: int, n_steps: int, cycle: bool, threads: int | None, device: str
) -> dict:
    """Fit, restore and measure one held-out snapshot, on the clock of kept snapshots as published."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)  # noqa: TID251 - what torchcfm draws from
    np.random.seed(seed)  # noqa: NPY002, TID251
    began = time.process_time()
    snapshots = to_device(snapshots, torch.device(device))
    model = trained(snapshots.without(held_out).points, n_steps, cycle)
    t0, t, t1 = snapshots.times[held_out - 1 : held_out + 2]
    way = (t - t0) / (t1 - t0)
    x = snapshots.points[held_out - 1]
    with torch.no_grad():
        for step in range(EULER_STEPS):
            now = torch.full((len(x), 1), held_out - 1 + way * step / EULER_STEPS, device=device)
            x = x + way / EULER_STEPS * model(torch.cat([x, now], 1))
    observed = snapshots.points[held_out]
    found = {"w1": wasserstein(x, observed), "energy": energy_distance(x, observed)}
    return {"time": t, "seed": seed, **found, "cpu": time.process_time() - began}


def peer(
    name: str,
    snapshots: Snapshots,
    n_seeds: int,
    n_steps: int,
    *,
    cycle: bool = False,
    n_fits: int = 0,
    jobs: int = 1,
    device: str = "cpu",
) -> dict:
    """Time torchcfm's fits, ``n_fits`` of them where not all, ``jobs`` at once with a thread each where several."""
    tasks = [(snapshots, k, seed) for seed in range(n_seeds) for k in interior(snapshots)]
    chosen = tasks[: n_fits or len(tasks)]
    threads = None if jobs == 1 else 1
    run = joblib.delayed(theirs)
    with joblib.Parallel(jobs) as parallel:
        parallel(run(*tasks[0], 2, cycle, threads, device) for _ in range(jobs))  # libraries loaded
        began = time.perf_counter()
        found = pd.DataFrame(parallel(run(*task, n_steps, cycle, threads, device) for task in chosen))
        share = len(chosen) / len(tasks)
    seconds = (time.perf_counter() - began) / share
    return summary(name, n_steps, (seconds, found["cpu"].sum() / share), found, f"{len(chosen)} of {len(tasks)}")


# --- sctraj
def ours(name: str, adata: ad.AnnData, n_seeds: int, n_steps: int, device: str) -> dict:
    """Time ``tl.leave_one_out``: the median of some runs where they are short."""
    times = []
    for _ in range(REPEATED if n_steps <= DEFAULT_STEPS or device != "cpu" else 1):
        began, spent = time.perf_counter(), time.process_time()
        tl.leave_one_out(
            adata, use_rep="X_std", methods="ot-cfm", start="before", n_seeds=n_seeds, n_steps=n_steps,
            batch_size=BATCH_SIZE, width=WIDTH, device=device,
        )  # fmt: skip
        times.append((time.perf_counter() - began, time.process_time() - spent))
    tidy = adata.uns["leave_one_out"]
    own = tidy[tidy["method"] == "ot-cfm"].pivot_table(index=["time", "seed"], columns="metric", values="value")
    return summary(name, n_steps, tuple(np.median(times, 0)), own.reset_index(), f"{len(own)} of {len(own)}")


def summary(name: str, n_steps: int, times: tuple[float, float], found: pd.DataFrame, fits: str) -> dict:
    """Means over held-out snapshots, then over seeds, with the standard deviation over seeds (of whole ones)."""
    by_seed = found.groupby("seed")[["w1", "energy"]].mean()
    row = {
        "who": name,
        "steps": n_steps,
        "fits": fits,
        "seconds": times[0],
        "cpu": times[1],
        "load": os.getloadavg()[0],
    }
    for measure in by_seed:
        row |= {measure: by_seed[measure].mean(), f"{measure}_sd": by_seed[measure].std()}
    print(
        f"{name}, {n_steps} steps: {times[0]:.1f} s, of processors {times[1]:.1f} s, W1 {row['w1']:.3f}",
        file=sys.stderr,
        flush=True,
    )
    return row


# --- report
def spread(row: pd.Series, measure: str) -> str:
    sd = row[f"{measure}_sd"]
    return shown(row[measure], 3) + ("" if np.isnan(sd) else f" ({shown(sd, 3)})")


def times_faster(other: pd.Series, mine: pd.Series) -> str:
    """By the clock and, in brackets, by the time of processors, which others' work on the machine disturbs less."""
    return f"{other['seconds'] / mine['seconds']:.0f} ({other['cpu'] / mine['cpu']:.0f})"


def report(rows: pd.DataFrame) -> None:
    cells = [
        [
            row.who,
            f"{row.steps:,}",
            row.fits,
            f"{row.seconds:.1f}",
            f"{row.cpu:.1f}",
            *(spread(row, m) for m in ("w1", "energy")),
        ]
        for _, row in rows.iterrows()
    ]
    print(table(["", "steps", "fits run", "seconds for all", "of processors", "W1", "energy"], cells))
    mine = rows[rows["who"] == "sctraj"].set_index("steps")
    alone, cycle = rows[rows["who"].isin([CPU, GPU])], rows[rows["who"].str.endswith(CYCLE)].iloc[0]
    one = alone.loc[alone["seconds"].idxmin()]
    two = rows[rows["who"].str.endswith("processes")].iloc[0]
    at_least = mine[mine["w1"] <= two["w1"]]
    kinds = {"the same steps and batch": int(one["steps"]), "sctraj's default": min(DEFAULT_STEPS, int(one["steps"]))}
    if len(at_least):
        kinds["fewest steps to their W1 or less"] = int(at_least.index.min())
    ratios = [
        [kind, f"{steps:,}", *(times_faster(other, mine.loc[steps]) for other in (one, two, cycle))]
        for kind, steps in kinds.items()
    ]
    print("How many times faster than torchcfm, by the clock (by the time of processors):\n")
    header = [
        "sctraj at",
        "steps",
        one["who"],
        two["who"],
        f"{cycle['who']}, {int(cycle['steps'])} steps",
    ]
    print(table(header, ratios))
    if not len(at_least):
        print(f"No number of steps reached their W1 of {two['w1']:.3f}")


def plot(rows: pd.DataFrame, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    mine = rows[rows["who"] == "sctraj"]
    axes.errorbar(mine["seconds"], mine["w1"], mine["w1_sd"], marker="o", capsize=2, label="sctraj")
    for _, row in mine.iterrows():
        above = (row.seconds, row.w1 + row.w1_sd)
        axes.annotate(f"{row.steps:,}", above, (4, -3), textcoords="offset points", fontsize=8)
    rest = rows[rows["who"] != "sctraj"]
    for (_, row), marker in zip(rest.iterrows(), "s^Dv"):
        spread = 0 if np.isnan(row["w1_sd"]) else row["w1_sd"]
        axes.errorbar(
            row.seconds, row.w1, spread, marker=marker, ls="", capsize=2, label=f"{row.who}, {row.steps:,} steps"
        )
    axes.set(xscale="log", xlabel="seconds for all folds and seeds", ylabel="mean W1 (bars: sd over seeds)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small simulated data, few steps")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--real", type=Path, default=beside, help="folder of the real data; simulated where it is not")
    parser.add_argument(
        "--peer-fits", type=int, default=0, help="torchcfm's fits in one process; the rest extrapolated"
    )
    parser.add_argument("--processes", type=int, default=2, help="of torchcfm at once, a thread each")
    parser.add_argument("--device", default="cpu", help="of sctraj; torchcfm in one process is run on both")
    parser.add_argument("--no-peer-gpu", action="store_true", help="torchcfm in one process on the CPU alone")
    parser.add_argument("--output", type=Path, help="csv")
    parser.add_argument("--plot", type=Path, help="png of W1 against time")
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)

    file = args.real / REAL["eb-5d"]
    if args.quick or not file.exists():
        adata = simulated_course("branching", 400 if args.quick else 2000)
        adata.obsm["X_std"] = adata.obsm["X_pca"]
    else:
        adata = ad.read_h5ad(file)
        pp.standardize(adata, n_dims=5)
    snapshots = read_snapshots(adata, "time", "X_std", least=3).snapshots
    n_seeds, steps, curve, short = (1, 20, (10, 20), 10) if args.quick else (SEEDS, STEPS, CURVE, DEFAULT_STEPS)
    print(f"{adata.n_obs} cells, {len(snapshots)} snapshots, {n_seeds} seeds, {torch.get_num_threads()} threads\n")

    began = time.perf_counter()
    tl.leave_one_out(
        adata, use_rep="X_std", methods="ot-cfm", start="before", n_seeds=n_seeds, n_steps=short, device=args.device
    )
    print(f"the first call, {short} steps, libraries being loaded: {time.perf_counter() - began:.1f} s\n")
    rows = [ours("sctraj", adata, n_seeds, n, args.device) for n in curve]
    rows.append(peer(CPU, snapshots, n_seeds, steps, n_fits=args.peer_fits))
    if args.device != "cpu" and not args.no_peer_gpu:
        rows.append(peer(GPU, snapshots, n_seeds, steps, n_fits=args.peer_fits, device=args.device))
    several = f"torchcfm, {args.processes} processes"
    rows.append(peer(several, snapshots, n_seeds, steps, jobs=args.processes))
    rows.append(peer(several + CYCLE, snapshots, n_seeds, short, cycle=True, jobs=args.processes))
    frame = pd.DataFrame(rows)
    if args.output:
        frame.to_csv(args.output, index=False)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(frame, args.plot)
    report(frame)


if __name__ == "__main__":
    main()
