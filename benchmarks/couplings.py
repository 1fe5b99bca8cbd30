"""Couplings at scale: seconds, memory, transport cost, marginal error, and the held-out W1 of the pairs, beside peers.

python benchmarks/couplings.py --quick                                     # 10 s: whether it still works
python benchmarks/couplings.py --sizes 1000 3000 10000
python benchmarks/couplings.py --sizes 30000 100000 1000000 --device cuda  # blocks and dual potentials alone
pip install ott-jax geomloss pykeops                                       # peers that are shown where they are there

Each row is made in a process of its own, on one core, which is stopped if it has no plan after --limit seconds. OTT's
time has its compilation. On a GPU the second of two runs is timed, for all, and OTT's is compiled then; of more than
200,000 cells the first run is of 20,000, and OTT's is not. --limit is for both. POT, OTT and GeomLoss have their arrays
there, and memory is what torch took of the GPU's.
Of a simulated course of three snapshots the first and the last are coupled; a thousand pairs, put on their chords at
the middle's time, are compared with a thousand cells of the middle. Entropies are 0.05 of the exact cost, penalties 2
(as in the default), and solvers stop at the same L1 error of the marginals, 1e-3. Cost is relative to the lowest of a
coupling that keeps both marginals; unbalanced ones and those of sampled cells may lie below. Marginals are those of the
cells in pairs; of potentials, whoever found them, those of the plan that they stand for.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np
import ot
import torch
from torch import Tensor

from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course
from sctraj.flow.coupling import (
    EntropicPlan,
    GrowingPlan,
    SparsePlan,
    UnbalancedPlan,
    blocked,
    entropic,
    exact,
    growing,
    optimal_plan,
    unbalanced,
)
from sctraj.flow.coupling.conditional import partners
from sctraj.flow.coupling.independent import draw
from sctraj.flow.coupling.kernel import Kernel
from sctraj.flow.plans import MOST_CELLS
from sctraj.flow.snapshots import Interval, Snapshots, sampled

Array: TypeAlias = np.ndarray | Tensor
FAMILIES = {5: "branching", 50: "high-dimensional"}
TIMES = (1.0, 3.0, 4.5)
EPSILON, PENALTY, TOLERANCE = 0.05, 2.0, 1e-3
JUDGED = 1000  # pairs and cells of the middle
DRAWN = 50_000  # pairs from which the cost of a plan without a matrix is taken
WARMED, WARMING = 200_000, 20_000  # cells up to which a solver runs on a GPU before it is timed; else on so many
DENSE = 10_000  # cells a side: above, no peer's matrix and no exact plan


@dataclass(frozen=True)
class Case:
    """An interval to couple, the entropy in units of cost, and where to compute."""

    interval: Interval
    epsilon: float
    penalty: float
    device: torch.device


@dataclass(frozen=True)
class Pairs:
    """Pairs with a mass at each end, as listed or drawn."""

    i: Tensor
    j: Tensor
    mass0: Tensor
    mass1: Tensor
    error: float | None = None  # the worse of both marginals' L1 errors, where it is known already


# --- ours
def whole(plan: EntropicPlan | UnbalancedPlan) -> Pairs:
    """All pairs of a plan that fits, else draws; an unbalanced plan's as they are, not weighted anew."""
    if len(plan.x0) * len(plan.x1) <= DENSE**2:
        return dense(plan.matrix())
    i, j = drawn(plan, torch.Generator(plan.x0.device).manual_seed(0))
    mass = torch.full((DRAWN,), 1 / DRAWN, dtype=torch.float64, device=i.device)
    error = off_potentials(plan) if isinstance(plan, EntropicPlan) else math.nan
    return Pairs(i, j, mass, mass, error)


def drawn(plan: EntropicPlan | UnbalancedPlan, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs by their mass, of an unbalanced plan by that at mid-interval: half by where source cells' mass goes."""
    if isinstance(plan, EntropicPlan):
        return plan.sample(DRAWN, rng)
    i0 = draw(plan.log_mass0.exp().cumsum(0), DRAWN // 2, rng)
    j0 = partners(plan.x0[i0], plan.x1, plan.g / plan.epsilon + plan.log_mass1, plan.epsilon, rng)
    j1 = draw(plan.log_mass1.exp().cumsum(0), DRAWN // 2, rng)
    i1 = partners(plan.x1[j1], plan.x0, plan.f / plan.epsilon + plan.log_mass0, plan.epsilon, rng)
    return torch.cat([i0, i1]), torch.cat([j0, j1])


def off_potentials(plan: EntropicPlan) -> float:
    """The worse of both marginals' L1 errors of the plan that potentials stand for, to a twentieth of the tolerance."""
    ends = (plan.x0, plan.log_mass0, plan.f), (plan.x1, plan.log_mass1, plan.g)
    errors = []
    for (x, log_a, f), (y, log_b, g) in (ends, ends[::-1]):
        kernel = Kernel(x, y, log_a, log_b, keep=False)
        kernel.rounding = TOLERANCE / 20
        made = kernel.plan(f, g, plan.epsilon).columns(torch.ones_like(f))
        errors.append(float((made - log_b.exp()).abs().sum()))
    return max(errors)


def sparse(plan: SparsePlan | GrowingPlan) -> Pairs:
    pairs = plan.pairs
    return Pairs(pairs.i, pairs.j, pairs.mass0, pairs.mass1)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def in_blocks(case: Case, couple: Callable) -> tuple[SparsePlan | GrowingPlan, Tensor, Tensor]:
    """Couple as a fit does: of large snapshots a random choice of the cells, in blocks; and which cells these are."""
    m0, m1 = case.interval.mass0, case.interval.mass1
    rows, columns = (sampled(m, MOST_CELLS) if len(m) > MOST_CELLS else torch.arange(len(m)) for m in (m0, m1))
    few = {"x0": case.interval.x0[rows], "x1": case.interval.x1[columns], "mass0": m0[rows], "mass1": m1[columns]}
    few |= {name: few[name] / few[name].sum() for name in ("mass0", "mass1")}
    return couple(replace(case.interval, **few), rng()), rows, columns


def among_all(found: tuple[SparsePlan | GrowingPlan, Tensor, Tensor]) -> Pairs:
    plan, rows, columns = found
    pairs = sparse(plan)
    return replace(pairs, i=rows[pairs.i], j=columns[pairs.j])


def ours_entropic(case: Case) -> EntropicPlan:
    return entropic(case.interval, epsilon=case.epsilon, tolerance=TOLERANCE, device=case.device)


def ours_unbalanced(case: Case) -> UnbalancedPlan:
    return unbalanced(
        case.interval, epsilon=case.epsilon, penalty=case.penalty, tolerance=TOLERANCE, device=case.device
    )


# --- peers
def dense(plan: Array) -> Pairs:
    plan = torch.as_tensor(plan)
    i, j = torch.nonzero(plan, as_tuple=True)
    return Pairs(i, j, plan[i, j], plan[i, j])


def clouds(case: Case) -> tuple[Array, Array, Array, Array]:
    """Masses and cells as POT takes them: NumPy's arrays, on a GPU torch's."""
    one = case.interval
    found = [v.double().to(case.device) for v in (one.mass0, one.mass1, one.x0, one.x1)]
    a, b, x0, x1 = found if case.device.type == "cuda" else [v.numpy() for v in found]
    return a, b, x0, x1


def arrays(case: Case) -> tuple[Array, Array, Array]:
    a, b, x0, x1 = clouds(case)
    return a, b, ot.dist(x0, x1)


def pot_exact(case: Case) -> Array:
    return ot.emd(*arrays(replace(case, device=torch.device("cpu"))), numItermax=10_000_000)


def pot_sinkhorn(case: Case, method: str) -> Array:
    a, b, cost = arrays(case)
    stop = TOLERANCE / math.sqrt(len(b))  # POT's is an L2 norm
    return ot.sinkhorn(a, b, cost, case.epsilon, method=method, numItermax=100_000, stopThr=stop)


def pot_unbalanced(case: Case) -> Array:
    # its stabilised variant ends in overflow here, and this one stops by the change of its scalings
    stop = {"method": "sinkhorn", "numItermax": 100_000, "stopThr": TOLERANCE * 1e-2}
    return ot.unbalanced.sinkhorn_unbalanced(*arrays(case), case.epsilon, case.penalty, **stop)


def pot_solve_sample(case: Case) -> Array:
    a, b, x0, x1 = clouds(case)
    tolerance = TOLERANCE / math.sqrt(len(b))
    return ot.solve_sample(x0, x1, a=a, b=b, reg=case.epsilon, reg_type="entropy", max_iter=100_000, tol=tolerance).plan


def potentials(case: Case, f: Tensor, g: Tensor) -> EntropicPlan:
    """A peer's potentials, of masses ``a_i b_j exp((f_i + g_j - C_ij) / epsilon)``."""
    one = case.interval
    ends = one.x0.double(), one.x1.double(), one.mass0.log(), one.mass1.log(), f, g
    return EntropicPlan(*(v.to(case.device) for v in ends), case.epsilon, math.nan, 0)


@cache
def ott_solver(batch: int | None) -> Callable:
    """OTT's solver of two clouds, an entropy and their masses, compiled once for each number of cells."""
    import jax
    from ott.geometry import pointcloud
    from ott.solvers import linear

    def solve(x0, x1, epsilon, a, b):  # type: ignore[no-untyped-def]
        geometry = pointcloud.PointCloud(x0, x1, epsilon=epsilon, batch_size=batch)
        found = linear.solve(geometry, a=a, b=b, threshold=TOLERANCE, max_iterations=100_000)
        return found.f, found.g

    return jax.jit(solve)


def ott_sinkhorn(case: Case) -> EntropicPlan:
    import jax

    one = case.interval
    solve = ott_solver(None if len(one.x0) * len(one.x1) <= DENSE**2 else 1024)  # of rows: without a matrix
    a, b = one.mass0, one.mass1
    with jax.default_device(jax.devices("gpu" if case.device.type == "cuda" else "cpu")[0]):
        found = solve(one.x0.numpy(), one.x1.numpy(), case.epsilon, a.numpy(), b.numpy())
    f, g = (torch.from_numpy(np.array(h, dtype=np.float64)) for h in found)
    return potentials(case, f - case.epsilon * a.log(), g - case.epsilon * b.log())


def geomloss_sinkhorn(case: Case) -> EntropicPlan:
    from geomloss import SamplesLoss

    # its cost is half of ours; it takes a fixed number of steps, by the rate at which the entropy falls
    blur, backend = math.sqrt(case.epsilon / 2), "tensorized" if len(case.interval.x0) <= 3000 else "online"
    solver = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.9, debias=False, potentials=True, backend=backend)
    ends = (case.interval.mass0, case.interval.x0, case.interval.mass1, case.interval.x1)
    f, g = solver(*(v.float().contiguous().to(case.device) for v in ends))
    return potentials(case, 2 * f.flatten().double(), 2 * g.flatten().double())


METHODS: dict[str, tuple[int, Callable, Callable]] = {  # largest number of cells, solver, its pairs
    "exact": (DENSE, lambda case: exact(case.interval), sparse),
    "blocked": (10**9, lambda case: in_blocks(case, blocked), among_all),
    "growing": (10**9, lambda case: in_blocks(case, growing), among_all),
    "entropic": (10**9, ours_entropic, whole),
    "unbalanced": (10**9, ours_unbalanced, whole),
    "POT emd": (DENSE, pot_exact, dense),
    "POT sinkhorn_log": (DENSE, lambda case: pot_sinkhorn(case, "sinkhorn_log"), dense),
    "POT sinkhorn_stabilized": (DENSE, lambda case: pot_sinkhorn(case, "sinkhorn_stabilized"), dense),
    "POT solve_sample": (DENSE, pot_solve_sample, dense),
    "POT sinkhorn_unbalanced": (DENSE, pot_unbalanced, dense),
    "OTT sinkhorn": (10**9, ott_sinkhorn, whole),
    "GeomLoss sinkhorn": (10**9, geomloss_sinkhorn, whole),
}
PEERS = {"OTT sinkhorn": "ott", "GeomLoss sinkhorn": "pykeops"}  # and modules that may be missing
ON_GPU = {"entropic", "unbalanced", "POT sinkhorn_log", "POT sinkhorn_stabilized", "POT solve_sample"}
ON_GPU |= {"POT sinkhorn_unbalanced", "GeomLoss sinkhorn"}  # through torch, which knows the memory that they take there
SOFT = {"unbalanced", "POT sinkhorn_unbalanced"}  # marginals differ from the snapshots' by design


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


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
