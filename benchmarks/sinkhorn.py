"""Sinkhorn with and without the Newton step on branching data: iterations and marginal error.

python benchmarks/sinkhorn.py --quick   # a few seconds: few cells, and a strong entropy alone
python benchmarks/sinkhorn.py
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_differentiation
from sctraj.flow.coupling import entropic as coupling
from sctraj.flow.coupling import exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells, and a strong entropy alone")
    quick = parser.parse_args().quick
    solver = sys.modules["sctraj.flow.coupling.entropic"]  # the function of that name hides the module
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    cells = simulated_differentiation(n_cells=300) if quick else simulated_differentiation()
    snapshots = read_snapshots(cells, "time", "X_pca", least=2).snapshots.without(1)
    print("interval     epsilon/cost   Newton   iterations   marginal error   seconds")
    for interval in snapshots.intervals():
        cost = exact(interval).cost
        for fraction in (0.1,) if quick else (0.1, 0.016, 0.003):
            for every, name in ((10, "yes"), (10**9, "no")):
                solver.NEWTON_EVERY = every
                start = time.perf_counter()
                try:
                    plan = coupling(interval, epsilon=fraction * cost)
                    found = f"{plan.n_iterations:10d}   {plan.marginal_error:14.2g}"
                except RuntimeError as error:
                    found = f"{'> 5000':>10}   {str(error).split('found ')[1].split()[0]:>14}"
                seconds = time.perf_counter() - start
                print(f"{interval.t0:g} - {interval.t1:<8g} {fraction:10g}   {name:>6}   {found}   {seconds:7.3f}")


if __name__ == "__main__":
    main()
