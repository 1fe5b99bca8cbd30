"""Compare Schroedinger bridges between Gaussians in 2 to 100 dimensions with their closed form.

python benchmarks/schroedinger_bridge.py --quick   # a few seconds, from which nothing follows
python benchmarks/schroedinger_bridge.py           # the table

After Tong et al. 2023 (arXiv 2302.00482, section 5.2) and De Bortoli et al. 2021: from N(-0.1, I) to N(0.1, I) in unit
time, diffusivity sigma = 1. Reported is the KL divergence from the Gaussian with mean and covariance of a simulated
sample to the bridge's own marginal, mean over 21 times from 0 to 1. The bridge between N(m0, S0) and N(m1, S1) has
Gaussian marginals (Mallasto et al. 2022, theorem 1; Bunne et al. 2023, theorem 3), with

    mean        (1-t) m0 + t m1
    covariance  (1-t)^2 S0 + t^2 S1 + t (1-t) (C + C^T + sigma^2 I)
    C = (S0^(1/2) D S0^(-1/2) - sigma^2 I) / 2,  D = (4 S0^(1/2) S1 S0^(1/2) + sigma^4 I)^(1/2)

where C is the covariance between the two ends. The KL of a sample from the closed form is not zero but about
d (d + 3) / (4 n), as the first row shows. These bridges are nearly static, with a covariance of at most 1.06 I:
the second row, the law N(mean, I) of optimal transport without a bridge, shows how much a method can gain at all.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from tables import table
from torch import Tensor

from sctraj.flow.flow_matching import Training, fit
from sctraj.flow.integrate import Integration, push, simulate
from sctraj.flow.problem import make_problems
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.vector_field import VectorField

SHIFT, SIGMA = 0.1, 1.0
TIMES = np.linspace(0, 1, 21)
STEPS = 5  # of Euler-Maruyama between two of these times; RK4 takes one
TEST_SEED = 1000  # on top of the seed: simulations start from other cells than those trained on
EXACT, STILL = "the bridge itself", "optimal transport itself, no bridge"


# --- the closed form
def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def bridge_marginal(
    m0: np.ndarray, s0: np.ndarray, m1: np.ndarray, s1: np.ndarray, sigma: float, t: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the bridge between two Gaussians at the fraction ``t`` of unit time."""
    unit, r = np.eye(len(m0)), root(s0)
    d = root(4 * r @ s1 @ r + sigma**4 * unit)
    c = (r @ d @ np.linalg.inv(r) - sigma**2 * unit) / 2
    covariance = (1 - t) ** 2 * s0 + t**2 * s1 + t * (1 - t) * (c + c.T + sigma**2 * unit)
    return (1 - t) * m0 + t * m1, covariance


def divergence(sample: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """KL from the Gaussian with a sample's mean and covariance to another one."""
    fitted, gap = np.cov(sample.T), sample.mean(0) - mean
    log_ratio = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(fitted)[1]
    solved = np.linalg.solve(covariance, np.column_stack([fitted, gap]))
    return float(np.trace(solved[:, :-1]) + gap @ solved[:, -1] - len(mean) + log_ratio) / 2


# --- simulations
def ends(d: int, n: int, seed: int) -> Snapshots:
    rng = np.random.default_rng(seed)
    draws = (rng.standard_normal((n, d)) + shift for shift in (-SHIFT, SHIFT))
    return Snapshots((0.0, 1.0), tuple(torch.tensor(x, dtype=torch.float32) for x in draws))


def followed(field: VectorField, x: Tensor, kind: str) -> Iterator[Tensor]:
    """Cells ``(M, n, d)`` at the 21 times."""
    rng = torch.Generator().manual_seed(TEST_SEED)
    yield x
    for t0, t1 in pairwise(TIMES):
        if kind == "SDE":
            x = simulate(field, x, t0, t1, sigma=SIGMA, n_steps=STEPS, rng=rng)
        else:
            x = push(field, x, t0, t1, Integration("rk4", 1))
        yield x


def measured(d: int, seeds: Sequence[int], n_train: int, n_test: int, training: Training) -> dict[str, np.ndarray]:
    """Name -> mean KL over the times of every seed, in ``d`` dimensions."""
    m0, m1, unit = np.full(d, -SHIFT), np.full(d, SHIFT), np.eye(d)
    laws = [bridge_marginal(m0, unit, m1, unit, SIGMA, t) for t in TIMES]
    still = [(mean, unit) for mean, _ in laws]
    rows = {}
    for name, drawn_from in ((EXACT, laws), (STILL, still)):
        each = []
        for seed in seeds:
            rng = np.random.default_rng(TEST_SEED + seed)
            samples = (mean + rng.standard_normal((n_test, d)) @ root(s) for mean, s in drawn_from)
            each.append(np.mean([divergence(x, *law) for x, law in zip(samples, laws)]))
        rows[name] = np.array(each)

    same = {"method": "sb-cfm", "path": None, "sigma": SIGMA, "validate": False}
    problems = [make_problems(ends(d, n_train, seed), seeds=[seed], **same)[0][0] for seed in seeds]
    field = fit(
        problems, validation=[], training=training, device=torch.device("cpu"), dtype=torch.float32, progress=False
    ).vector_field
    x = torch.stack([ends(d, n_test, TEST_SEED + seed).points[0] for seed in seeds])
    for kind in ("SDE", "ODE"):
        by_time = [
            [divergence(cells.double().numpy(), *law) for cells in members]
            for members, law in zip(followed(field, x, kind), laws)
        ]
        rows[f"sb-cfm, {kind}"] = np.mean(by_time, 0)
    return rows


# --- table
def cell(values: np.ndarray) -> str:
    return f"{values.mean():.4f}" + (f" ({values.std(ddof=1):.4f})" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells and dimensions, short training, two seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 5, 20, 50, 100])
    parser.add_argument("--cells", type=int, default=2000, help="training cells of either end")
    parser.add_argument("--test-cells", type=int, default=5000, help="simulated cells")
    parser.add_argument("--steps", type=int, default=1000, help="of the optimiser")
    parser.add_argument("--width", type=int, default=128, help="of the network; below d no score fits through it")
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    training = Training(
        module=None, width=args.width, depth=3, n_steps=args.steps, batch_size=256, learning_rate=5e-3,
        weight_decay=1e-5, ema_decay=0.99, patience=None,
    )  # fmt: skip
    dims, n_seeds, n_train, n_test = args.dims, args.seeds, args.cells, args.test_cells
    if args.quick:
        dims, n_seeds, n_train, n_test, training = [2, 5], 2, 200, 500, replace(training, n_steps=50)
    began = time.perf_counter()
    found = [measured(d, range(n_seeds), n_train, n_test, training) for d in dims]
    print("### KL divergence to the marginals of the Gaussian Schroedinger bridge\n")
    rows = [[name, *(cell(one[name]) for one in found)] for name in found[0]]
    print(table(["", *(f"d = {d}" for d in dims)], rows))
    print(
        f"Mean over 21 times; mean (sd) over {n_seeds} seeds; {n_train} training and {n_test} simulated cells, "
        f"{training.n_steps} steps, width {training.width}; {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
