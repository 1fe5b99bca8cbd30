"""Solvers that couplings.py times: those of sctraj, POT, OTT and GeomLoss on one interval, and the pairs they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import numpy as np
import ot
import torch
from torch import Tensor

from sctraj.flow.coupling import (
    EntropicPlan,
    GrowingPlan,
    SparsePlan,
    UnbalancedPlan,
    blocked,
    entropic,
    exact,
    growing,
    unbalanced,
)
from sctraj.flow.coupling.conditional import partners
from sctraj.flow.coupling.independent import draw
from sctraj.flow.coupling.kernel import Kernel
from sctraj.flow.plans import MOST_CELLS
from sctraj.flow.snapshots import Interval, sampled

Array: TypeAlias = np.ndarray | Tensor
TOLERANCE = 1e-3  # L1 error of the marginals at which solvers stop
DRAWN = 50_000  # pairs from which the cost of a plan without a matrix is taken
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
    """The worse of both marginals' L1 errors of the plan that potentials stand for.

    To a hundredth of the tolerance; on a GPU to a twentieth, or its sums could not be fused.
    """
    ends = (plan.x0, plan.log_mass0, plan.f), (plan.x1, plan.log_mass1, plan.g)
    errors = []
    for (x, log_a, f), (y, log_b, g) in (ends, ends[::-1]):
        kernel = Kernel(x, y, log_a, log_b, keep=False)
        kernel.rounding = TOLERANCE / (100 if x.device.type == "cpu" else 20)
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
