"""Compare estimators for large clouds with exact distances: actual error, estimated error and time.

python benchmarks/distances.py --quick           # under 8 s: 1,500 cells a side, from which little follows
python benchmarks/distances.py                   # 3,000 cells a side: some two minutes
python benchmarks/distances.py --cells 10000     # some ten minutes

Two simulated snapshots are compared in 5 and in 50 dimensions. Near ones are two samples of one law, whose distance is
only sampling noise and shrinks as they grow; far ones are days 1 and 3 of a course. Every repeat draws them anew. `z`
is the estimate's error in units of its own standard error: its root mean square should be about 1, or less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from sctraj.datasets import simulated_course
from sctraj.flow import distance, distance_estimates, pairwise_estimates
from sctraj.flow.clouds import Estimate

FAMILIES = {5: "branching", 50: "high-dimensional"}
MEASURES: dict[str, tuple[Callable[..., float], Callable[..., Estimate]]] = {
    "W1": (distance.wasserstein, distance.estimated_wasserstein),
    "W2": (
        lambda x, y: distance.wasserstein(x, y, p=2),
        lambda x, y, rng: distance.estimated_wasserstein(x, y, p=2, rng=rng),
    ),
    "energy": (distance.energy_distance, distance.estimated_energy_distance),
    "MMD^2": (distance.mmd, distance.estimated_mmd),
}


def clouds(d: int, n: int, far: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``n`` cells a side."""
    cells = simulated_course(FAMILIES[d], 2 * n if far else 4 * n, times=(1.0, 3.0), rng=seed).obsm["X_pca"]
    return (cells[:n], cells[n:]) if far else (cells[2 * n : 3 * n], cells[3 * n :])


def timed(measure: Callable[..., object], *args: object, **kwargs: object) -> tuple[object, float]:
    began = time.perf_counter()
    return measure(*args, **kwargs), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,500 cells, one repeat")
    parser.add_argument("--cells", type=int, default=3000, help="a side")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, repeats, names = (1500, 1, ["W1"]) if args.quick else (args.cells, args.repeats, args.measures)
    # what is compared are the estimators, also at sizes at which the package would not call them
    distance_estimates.LARGEST_EXACT = pairwise_estimates.LARGEST_PAIRWISE = 0
    print(f"{n} cells a side, {repeats} repeats\n")
    print("| | d | laws | exact | miss, mean | miss, rms | stated error | z, rms | seconds exact | seconds estimate |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        exact, estimated = MEASURES[name]
        for d in FAMILIES:
            for far in (False, True):
                rows = []
                for seed in range(repeats):
                    x, y = clouds(d, n, far, seed)
                    truth, longer = timed(exact, x, y)
                    found, shorter = timed(estimated, x, y, rng=seed)
                    rows.append((truth, found.value - truth, found.error, longer, shorter))
                truth, miss, said, longer, shorter = np.array(rows).T
                rms, z = np.sqrt(np.mean(miss**2)), np.sqrt(np.mean((miss / said) ** 2))
                numbers = f"{truth.mean():.4g} | {miss.mean():.2g} | {rms:.2g} | {said.mean():.2g} | {z:.2f}"
                times = f"{longer.mean():.2f} | {shorter.mean():.2f}"
                print(f"| {name} | {d} | {'far' if far else 'near'} | {numbers} | {times} |", flush=True)


if __name__ == "__main__":
    main()
