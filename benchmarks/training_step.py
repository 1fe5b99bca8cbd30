"""Compare a training step's time with its lower bound: its floating-point operations at this machine's matmul rate.

python benchmarks/training_step.py --quick             # a few seconds, from which nothing follows
python benchmarks/training_step.py                     # on the CPU, torch's number of threads
python benchmarks/training_step.py --device cuda

It uses 15 members of a leave-one-out (3 folds x 5 seeds of a simulated course in 5 dimensions) with the default network
and batch. The floor is at the rate of the hidden layers' batched product at its own size; that of one large product,
the most that the machine does, is printed beside it. Drawing pairs and, on a CPU, the optimiser are timed separately;
the rest of a step is activations, narrow products, sums over the batch and the interpreter.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise

import torch
from tables import table

from sctraj import tl
from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course
from sctraj.flow import flow_matching
from sctraj.flow.flow_matching import Training, fit, pick_device
from sctraj.flow.hold_out import hold_out_problems
from sctraj.flow.vector_field import NeuralField

LARGE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large product


def seconds(act: Callable[[], object], device: torch.device, least: float) -> float:
    """Seconds that an act takes, over repeats that together take at least so long."""
    act()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < least or not done:
        act()
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / done


def product_rate(shape: tuple[int, int, int], width: int, device: torch.device, least: float) -> float:
    """Floating-point operations per second of a batch of matrices times matrices with so many columns."""
    a, b = torch.randn(shape, device=device), torch.randn(shape[0], shape[2], width, device=device)
    out = a.new_empty(*shape[:2], width)
    return 2 * a.numel() * width / seconds(lambda: torch.bmm(a, b, out=out), device, least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells and steps")
    parser.add_argument("--device", type=pick_device, default=torch.device("cpu"))
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    device, least, steps = args.device, 0.1 if args.quick else 3.0, (5, 10) if args.quick else (200, 800)

    cells = read_snapshots(simulated_course("branching", 300 if args.quick else 2750), "time", "X_pca", least=3)
    _, problems, _ = hold_out_problems(
        cells.snapshots, method="ot-cfm", path=None, sigma=None, seeds=range(5), validate=False
    )
    defaults = {name: p.default for name, p in inspect.signature(tl.leave_one_out).parameters.items()}
    training = Training(**{f.name: defaults[f.name] for f in fields(Training)})

    def fitted(n_steps: int) -> float:
        began = time.perf_counter()
        fit(
            problems, validation=[], training=replace(training, n_steps=n_steps), device=device, dtype=torch.float32,
            progress=False,
        )  # fmt: skip
        return time.perf_counter() - began

    fitted(2)  # libraries loaded
    step = (fitted(steps[1]) - fitted(steps[0])) / (steps[1] - steps[0])

    d, members, intervals = problems[0].snapshots.dimension, len(problems), len(problems[0].couplings)
    batch = flow_matching.pairs_a_step(training.batch_size, intervals)
    sizes = [1 + d, *[training.width] * training.depth, d]
    products = [n * m for n, m in pairwise(sizes)]
    # forwards, for the weights, and for what goes into all layers but the first
    flop = 2 * members * batch * (3 * sum(products) - products[0])
    rate = product_rate((members, batch, training.width), training.width, device, least)
    n = 256 if args.quick else LARGE[device.type]
    peak = product_rate((1, n, n), n, device, least)

    scalings = [flow_matching.scaling(p.snapshots, std=p.std) for p in problems]
    field = NeuralField(
        flow_matching.MLP(sizes, [torch.Generator().manual_seed(p.seed) for p in problems]), scalings
    ).to(device, torch.float32)
    moved = [flow_matching.to_device(p, device) for p in problems]
    streams = [torch.Generator(device).manual_seed(p.seed) for p in problems]
    n_steps = steps[1]

    def draw() -> None:
        for _ in flow_matching._batches(moved, streams, field, batch, n_steps):
            pass

    drawing = seconds(draw, device, least) / n_steps
    weights = list(field.network.parameters())
    optimiser = flow_matching.AdamW(weights, training.weight_decay)

    def move() -> None:
        optimiser.step([w.detach() for w in weights], 0.0)

    floor = flop / rate
    shown = [("floor: the products", floor), ("drawing pairs", drawing)]
    if device.type == "cpu":  # on a GPU a recorded step's parts take less than each launched by itself
        moving = seconds(move, device, least)
        shown += [("optimiser", moving), ("the rest", step - floor - drawing - moving)]
    print(f"{members} members x {batch} pairs, {sizes}; {torch.get_num_threads()} threads, {device}\n")
    print(f"{flop / 1e6:.0f} MFLOP a step, {rate / 1e9:.0f} GFLOP/s in the hidden layers' products")
    print(
        f"{peak / 1e9:.0f} GFLOP/s in a product of {n} x {n}, by which a step would take {1e3 * flop / peak:.2f} ms\n"
    )
    rows = [[name, f"{1e3 * t:.2f}", f"{t / step:.0%}"] for name, t in [*shown, ("a step", step)]]
    print(table(["", "ms", "of a step"], rows))


if __name__ == "__main__":
    main()
