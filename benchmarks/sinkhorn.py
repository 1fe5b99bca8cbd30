"""Sinkhorn's plain iteration, extrapolated, and with Newton steps, on branching data: iterations, marginal error.

python benchmarks/sinkhorn.py --quick   # a few seconds: few cells, and a strong entropy alone
python benchmarks/sinkhorn.py
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

from restoration import table
from torch import Tensor

from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_differentiation
from sctraj.flow.coupling import entropic as coupling
from sctraj.flow.coupling import exact, sinkhorn
from sctraj.flow.snapshots import Interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells, and a strong entropy alone")
    quick = parser.parse_args().quick
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
