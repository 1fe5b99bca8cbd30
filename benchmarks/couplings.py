"""Compare couplings at scale with peers: time, memory, transport cost, marginal error and held-out W1 of the pairs.

python benchmarks/couplings.py --quick                                     # 10 s: whether it still works
python benchmarks/couplings.py --sizes 1000 3000 10000
python benchmarks/couplings.py --sizes 30000 100000 1000000 --device cuda  # blocks and dual potentials alone
pip install ott-jax geomloss pykeops                                       # peers that are shown where they are there

Each row is computed in a process of its own, on one core, which is stopped if it has no plan after --limit seconds.
OTT's time includes its compilation. On a GPU, the second of two runs is timed for all solvers, by which time OTT is
compiled; with more than 200,000 cells, the first run uses 20,000, and OTT is then not compiled. --limit applies to both
runs together. POT, OTT and GeomLoss have their arrays on the GPU, and memory is the GPU memory taken by torch.
The first and the last snapshot of a simulated course of three are coupled; a thousand pairs, interpolated along their
chords to the time of the middle snapshot, are compared with a thousand of its cells. Entropies are 0.05 of the exact
cost (as in the default), penalties 2, and solvers stop at the same L1 error of the marginals, 1e-3. Cost is relative to
the lowest among couplings that keep both marginals; unbalanced couplings and those of sampled cells may lie below.
Marginals are those of the cells in pairs; for potentials, whichever solver found them, those of the plan they define.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from solvers import METHODS, ON_GPU, PEERS, SOFT, TOLERANCE, Case, Pairs, rng
from tables import table
from torch import Tensor

from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course
from sctraj.flow.coupling import exact, optimal_plan
from sctraj.flow.snapshots import Interval, Snapshots

FAMILIES = {5: "branching", 50: "high-dimensional"}
TIMES = (1.0, 3.0, 4.5)
EPSILON, PENALTY = 0.05, 2.0
JUDGED = 1000  # pairs and cells of the middle
WARMED, WARMING = 200_000, 20_000  # cells up to which a solver runs on a GPU before it is timed; else on so many


# --- one row
def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def measured(name: str, case: Case, middle: Tensor, s: float, answer: Connection) -> None:
    """Solve and judge, in a process of its own; sends what the table shows: time and memory first, then the rest."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of peers: what they did not reach is seen in the marginal error
    on_gpu = case.device.type == "cuda"
    try:
        if on_gpu:
            few = len(case.interval.x0) <= WARMED
            METHODS[name][1](case if few else replace(case, interval=fewer(case.interval, WARMING)))
            torch.cuda.reset_peak_memory_stats()
        before, start = megabytes(), time.perf_counter()
        plan = METHODS[name][1](case)
        if on_gpu:
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        answer.send({"failed": str(error).splitlines()[0]})
        return
    row = {"seconds": time.perf_counter() - start, "MB": megabytes() - before}
    if on_gpu:
        row["MB"] = torch.cuda.max_memory_allocated() / 2**20 if name in ON_GPU else math.nan
    answer.send(row)
    answer.send(judged(METHODS[name][2](plan), case.interval, middle, s))


def judged(pairs: Pairs, interval: Interval, middle: Tensor, s: float) -> dict[str, float]:
    """Cost at mid-interval, the worse of both marginals' L1 errors, W1 of the pairs at fraction ``s`` to the middle."""
    device = pairs.i.device
    x0, x1 = (x.to(device, torch.float64) for x in (interval.x0, interval.x1))
    masses = (pairs.mass0 + pairs.mass1) / 2
    cost = sum(
        float(masses[part] @ (x0[pairs.i[part]] - x1[pairs.j[part]]).square().sum(1))
        for part in torch.arange(len(pairs.i), device=device).split(1_000_000)
    )
    errors = [pairs.error]
    if pairs.error is None:
        errors = [
            off(index, mass, whole.to(device))
            for index, mass, whole in (
                (pairs.i, pairs.mass0, interval.mass0),
                (pairs.j, pairs.mass1, interval.mass1),
            )
        ]
    mass = (1 - s) * pairs.mass0 + s * pairs.mass1
    u = torch.rand(JUDGED, generator=rng(), dtype=torch.float64).to(device)
    cumulative = mass.cumsum(0)
    drawn = torch.searchsorted(cumulative, u * cumulative[-1]).clamp(max=len(mass) - 1)
    there = ((1 - s) * x0[pairs.i[drawn]] + s * x1[pairs.j[drawn]]).cpu()
    cells = middle[torch.randperm(len(middle), generator=rng())[:JUDGED]].double()
    equal = [torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in (there, cells)]
    w1 = optimal_plan(there, cells, *equal, p=1).cost
    return {"cost": cost / float(masses.sum()), "error": max(errors), "w1": w1}


def off(index: Tensor, mass: Tensor, weights: Tensor) -> float:
    """L1 distance of the pairs' marginal from the weights of the cells in pairs."""
    found = torch.zeros_like(weights).index_add_(0, index, mass)
    paired = torch.zeros_like(weights, dtype=torch.bool).index_fill_(0, index, True)
    due = torch.where(paired, weights, 0)
    return float((found - due / due.sum()).abs().sum())


def in_child(name: str, case: Case, middle: Tensor, s: float, limit: float) -> dict[str, float | str]:
    # forked, memory is what the solver adds; but of a process that has seen a GPU (as imports do) no fork sees it
    context = multiprocessing.get_context("spawn" if case.device.type == "cuda" else "fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=measured, args=(name, case, middle, s, there))
    child.start()
    there.close()
    try:
        row = here.recv() if here.poll(limit) else {"failed": f"> {limit:g} s"}
    except EOFError:
        row = {"failed": "the process died"}
    if "failed" not in row:
        try:
            row |= here.recv()  # no limit: a dense plan takes long to judge
        except EOFError:
            row |= dict.fromkeys(("cost", "error", "w1"), math.nan)
    child.kill()
    child.join()
    return row


# --- table
def fewer(interval: Interval, n: int) -> Interval:
    """Every so many-th cell, about n a side."""
    thin0, thin1 = (torch.arange(0, len(x), max(1, len(x) // n)) for x in (interval.x0, interval.x1))
    m0, m1 = interval.mass0[thin0], interval.mass1[thin1]
    return replace(interval, x0=interval.x0[thin0], x1=interval.x1[thin1], mass0=m0 / m0.sum(), mass1=m1 / m1.sum())


def three(n: int, d: int) -> Snapshots:
    adata = simulated_course(FAMILIES[d], 3 * n, times=TIMES)
    return read_snapshots(adata, "time", "X_pca", least=3).snapshots


def compared(n: int, d: int, names: Sequence[str], limit: float, device: torch.device) -> str:
    snapshots = three(n, d)
    interval = snapshots.without(1).intervals()[0]
    cost = exact(fewer(interval, JUDGED)).cost
    case = Case(interval, EPSILON * cost, PENALTY * cost, device)
    s = (TIMES[1] - TIMES[0]) / (TIMES[2] - TIMES[0])
    found = {}
    for name in names:
        if METHODS[name][0] >= max(len(interval.x0), len(interval.x1)):
            found[name] = in_child(name, case, snapshots.points[1], s, limit)
            print(f"{n}, {d}: {name} {found[name]}", file=sys.stderr, flush=True)  # the table needs all of them
    hard = [row for name, row in found.items() if "cost" in row and name not in SOFT | {"growing"}]
    best = min((row["cost"] for row in hard if row["error"] <= 10 * TOLERANCE), default=math.nan)
    rows = []
    for name, row in found.items():
        if "failed" in row:
            rows.append([name, str(row["failed"]), *[""] * 4])
            continue
        error = "" if name in SOFT or math.isnan(row["error"]) else f"{row['error']:.1g}"
        seconds = f"{row['seconds']:.{2 if row['seconds'] >= 0.1 else 3}f}"
        memory = "" if math.isnan(row["MB"]) else f"{row['MB']:.0f}"
        rows.append([name, seconds, memory, f"{row['cost'] / best:.3f}", error, f"{row['w1']:.3f}"])
    return table([f"{n} cells a side, {d} dimensions", "s", "MB", "cost", "marginal error", "held-out W1"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 cells a side in 5 dimensions")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000], help="cells a side")
    parser.add_argument("--dimensions", type=int, nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of Sinkhorn's, all packages'")
    parser.add_argument("--limit", type=float, default=300, help="seconds to a plan")
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    missing = [name for name, module in PEERS.items() if importlib.util.find_spec(module) is None]
    for name in missing:
        print(f"skipped {name}: no module {PEERS[name]}")
    methods = [name for name in args.methods if name not in missing]
    sizes, dimensions = ([200], [5]) if args.quick else (args.sizes, args.dimensions)
    for n in sizes:
        for d in dimensions:
            print(f"\n{compared(n, d, methods, args.limit, args.device)}", flush=True)


if __name__ == "__main__":
    main()
