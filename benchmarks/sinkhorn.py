"""Compare Sinkhorn's plain iteration, extrapolation and Newton steps on branching data: iterations, marginal error.

python benchmarks/sinkhorn.py --quick   # a few seconds: few cells, and a strong entropy alone
python benchmarks/sinkhorn.py
python benchmarks/sinkhorn.py --passes --device cuda   # pairs a second of one iteration where no kernel is kept
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence

import torch
from tables import table
from torch import Tensor

from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_differentiation
from sctraj.flow.coupling import entropic as coupling
from sctraj.flow.coupling import exact, sinkhorn
from sctraj.flow.coupling.kernel import Kernel
from sctraj.flow.coupling.sinkhorn import NEAR, ROUNDING
from sctraj.flow.flow_matching import pick_device
from sctraj.flow.snapshots import Interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells, and a strong entropy alone")
    parser.add_argument("--passes", action="store_true", help="single iterations of large snapshots, float32")
    parser.add_argument("--device", type=pick_device, default=torch.device("cpu"), help="of the passes")
    args = parser.parse_args()
    quick = args.quick
    if args.passes:
        passes((1000,) if quick else (10_000, 100_000), args.device)
        return
    solver = sys.modules["sctraj.flow.coupling.entropic"]  # the function of that name hides the module
    mix = sinkhorn.Mixing.__call__
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    cells = simulated_differentiation(n_cells=300) if quick else simulated_differentiation()
    snapshots = read_snapshots(cells, "time", "X_pca", least=2).snapshots.without(1)
    ways = {"plain": (False, 10**9), "extrapolated": (True, 10**9), "or Newton": (True, solver.NEWTON_EVERY)}
    rows = []
    for interval in snapshots.intervals():
        cost = exact(interval).cost
        for fraction in (0.1,) if quick else (0.1, 0.016, 0.003):
            row = [f"{interval.t0:g} to {interval.t1:g}", f"{fraction:g}"]
            for mixed, every in ways.values():
                solver.NEWTON_EVERY = every
                sinkhorn.Mixing.__call__ = mix if mixed else plain
                row.append(solved(interval, fraction * cost))
            rows.append(row)
    print(table(["interval", "epsilon / cost", *ways], rows))


def passes(sizes: Sequence[int], device: torch.device) -> None:
    """Time the soft minima of both sides: in tiles, each entry made once for both, and, where it can be, fused."""
    rows, fused = [], Kernel._fused
    for n in sizes:
        for d in (5, 50):
            rng = torch.Generator().manual_seed(0)
            ends = [(shift + torch.randn(n, d, generator=rng)).double().to(device) for shift in (0.0, 0.5)]
            same = torch.full((n,), -math.log(n), dtype=torch.float64, device=device)
            g, seconds = torch.zeros_like(same), []
            for way in (lambda self, epsilon: False, fused):
                Kernel._fused = way
                kernel = Kernel(*ends, same, same, keep=False)
                kernel.rounding = ROUNDING * NEAR  # the most that the solver lets pass
                took = []
                for _ in range(4):
                    start = time.perf_counter()
                    float(kernel.soft_minima(g, 2.0 * d, 1.0)[1].sum())
                    took.append(time.perf_counter() - start)
                seconds.append(min(took[1:]) if kernel._fused(2.0 * d) or way is not fused else math.nan)
            Kernel._fused = fused
            shown = ["" if math.isnan(s) else f"{1e3 * s:.2f}" for s in seconds]
            rows.append([f"{n:,}", str(d), *shown, *("" if math.isnan(s) else f"{n * n / s:.1e}" for s in seconds)])
    print(f"{device}, {torch.get_num_threads()} threads\n")
    print(table(["cells a side", "dimensions", "ms in tiles", "fused", "pairs a second in tiles", "fused"], rows))


def plain(_: sinkhorn.Mixing, at: Tensor, then: Tensor) -> Tensor:
    return then


def solved(interval: Interval, epsilon: float) -> str:
    """Iterations and the best of three times, or how far the marginals stayed off."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        try:
            plan = coupling(interval, epsilon=epsilon)
        except RuntimeError as error:
            return f"not in 5,000 (error {str(error).split('found ')[1].split()[0]})"
        seconds.append(time.perf_counter() - start)
    return f"{plan.n_iterations:,} ({1000 * min(seconds):.0f} ms)"


if __name__ == "__main__":
    main()
