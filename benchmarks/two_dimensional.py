"""Measure flows between laws in the plane: how near to the target, and to optimal transport, their paths are.

python benchmarks/two_dimensional.py --quick   # a few seconds, from which nothing follows
python benchmarks/two_dimensional.py           # the tables

After Tong et al. 2023 (arXiv 2302.00482, section 5.1), it reports the 2-Wasserstein distance between a test sample of
the source, moved along the flow, and one of the target; and the normalised path energy |E int |v|^2 dt - W2^2| / W2^2
between the two laws, which is zero for dynamic optimal transport. Every seed has its own training cells, test cells and
network; all seeds of a method are trained as one batch. Couplings are of whole snapshots, not of mini-batches. W2
between two samples of one law is not zero, as the first row shows. The eight Gaussians are those of the torchcfm
package; the moons are its moons except for normal noise; the S-curve is TrajectoryNet's. The paper's laws may have
another scale: compare rows with each other, not with its table.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.datasets import make_moons, make_s_curve
from tables import table
from torch import Tensor

from sctraj.flow.coupling import exact
from sctraj.flow.distance import wasserstein
from sctraj.flow.flow_matching import Training, fit
from sctraj.flow.integrate import Integration, push
from sctraj.flow.problem import make_problems
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.vector_field import VectorField

METHODS = {"i-cfm": 0.1, "ot-cfm": 0.1, "sb-cfm": 1.0, "vp-cfm": 0.1}  # and their sigmas, the paper's
N_STEPS, QUICK_STEPS = 100, 20  # of RK4 along a path
TEST_SEED = 1000  # on top of the seed: test cells are others than the training cells


# --- laws
def gaussian(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n, 2))


def eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    angle = 2 * np.pi * rng.integers(8, size=n) / 8
    # 0.1^(1/2) is the variance in torchcfm (utils.py, eight_normal_sample), not the standard deviation
    return 5 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1**0.25 * rng.standard_normal((n, 2))


def moons(n: int, rng: np.random.Generator) -> np.ndarray:
    return 3 * make_moons(n, noise=0.2, random_state=int(rng.integers(2**31)))[0] - 1


def s_curve(n: int, rng: np.random.Generator) -> np.ndarray:
    return 1.5 * make_s_curve(n, noise=0.05, random_state=int(rng.integers(2**31)))[0][:, [0, 2]]


Law = Callable[[int, np.random.Generator], np.ndarray]
TASKS: dict[str, tuple[Law, Law]] = {
    "Gaussian to 8 Gaussians": (gaussian, eight_gaussians),
    "moons to 8 Gaussians": (moons, eight_gaussians),
    "Gaussian to moons": (gaussian, moons),
    "Gaussian to S-curve": (gaussian, s_curve),
}


def drawn(laws: Sequence[Law], n: int, seed: int) -> Snapshots:
    rng = np.random.default_rng(seed)
    return Snapshots((0.0, 1.0), tuple(torch.tensor(law(n, rng), dtype=torch.float32) for law in laws))


# --- measures
def pushed(field: VectorField, x: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """Where cells ``(M, n, 2)`` come to, and each member's path energy, the trapezium rule over the steps."""
    energy = torch.zeros(len(x), dtype=torch.float64)
    times = np.linspace(0, 1, n_steps + 1)
    for k, t in enumerate(times):
        weight = (0.5 if k in (0, n_steps) else 1) / n_steps
        energy += weight * field.velocity(t, x).double().square().sum(-1).mean(1)
        if k < n_steps:
            x = push(field, x, t, times[k + 1], Integration("rk4", 1))
    return x, energy


def measured(
    task: str, seeds: Sequence[int], n_train: int, n_test: int, n_steps: int, training: Training
) -> dict[str, np.ndarray]:
    """Rows of one task: name -> W2 and normalised path energy of every seed, ``(2, n_seeds)``."""
    laws = TASKS[task]
    train = [drawn(laws, n_train, seed) for seed in seeds]
    test = [drawn(laws, n_test, TEST_SEED + seed) for seed in seeds]
    again = [drawn(laws, n_test, 2 * TEST_SEED + seed) for seed in seeds]
    # between samples, and so a little too large; of all seeds together
    optimal = float(np.mean([exact(snapshots.intervals()[0]).cost for snapshots in train]))
    noise = [wasserstein(a.points[1], b.points[1], p=2) for a, b in zip(again, test)]
    rows = {"another sample of the target": np.array([noise, [math.nan] * len(seeds)])}
    for method, sigma in METHODS.items():
        same = {"method": method, "path": None, "sigma": sigma, "validate": False}
        problems = [make_problems(snapshots, seeds=[seed], **same)[0][0] for snapshots, seed in zip(train, seeds)]
        found = fit(
            problems, validation=[], training=training, device=torch.device("cpu"), dtype=torch.float32, progress=False
        )
        ends, energy = pushed(found.vector_field, torch.stack([snapshots.points[0] for snapshots in test]), n_steps)
        distances = [wasserstein(end, snapshots.points[1], p=2) for end, snapshots in zip(ends, test)]
        rows[method] = np.array([distances, np.abs(energy.numpy() - optimal) / optimal])
    return rows


# --- tables
def cell(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return "-"
    return f"{values.mean():.3f}" + (f" ({values.std(ddof=1):.3f})" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells, short training, two seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=2000, help="training cells of either law")
    parser.add_argument("--test-cells", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000, help="of the optimiser")
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    training = Training(
        module=None, width=64, depth=3, n_steps=args.steps, batch_size=256, learning_rate=5e-3, weight_decay=1e-5,
        ema_decay=0.99, patience=None,
    )  # fmt: skip
    n_seeds, n_train, n_test, n_steps = args.seeds, args.cells, args.test_cells, N_STEPS
    if args.quick:
        n_seeds, n_train, n_test, n_steps, training = 2, 200, 200, QUICK_STEPS, replace(training, n_steps=50)
    began = time.perf_counter()
    found = {task: measured(task, range(n_seeds), n_train, n_test, n_steps, training) for task in TASKS}
    names = list(next(iter(found.values())))
    for k, title in enumerate(("2-Wasserstein distance to the target", "Normalised path energy")):
        print(f"### {title}\n")
        rows = [[name, *(cell(found[task][name][k]) for task in TASKS)] for name in (names if k == 0 else names[1:])]
        print(table(["", *TASKS], rows))
    print(
        f"Mean (sd) over {n_seeds} seeds; {n_train} training and {n_test} test cells, {training.n_steps} steps; "
        f"{time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
