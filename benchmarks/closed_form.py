"""Measure velocities per second of a closed-form field by its number of pairs and dimensions.

python benchmarks/closed_form.py --quick           # 2 s
python benchmarks/closed_form.py --pairs 10000 100000 1000000 --dimensions 5 50
python benchmarks/closed_form.py --device cuda
python benchmarks/closed_form.py --real shared/data/embryoid_body_2750.h5ad      # and all of leave_one_out with it

Besides the time, it reports how many of the pairs nearest to a query hold all but a thousandth of the weight (median
over queries), which is the number that a neighbour search would have to find.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import anndata as ad
import torch
from tables import table

from sctraj import pp, tl
from sctraj.flow.closed_form import ClosedFormField, closed_form
from sctraj.flow.flow_matching import pick_device
from sctraj.flow.problem import DRAWN_PAIRS, make_problems
from sctraj.flow.snapshots import Snapshots

NEGLECTED = 1e-3
SECONDS = 3.0  # of queries, about


def field(n_pairs: int, d: int, device: torch.device) -> tuple[ClosedFormField, torch.Tensor]:
    """Two Gaussian snapshots coupled independently: a field of about ``n_pairs`` pairs, and points half-way."""
    n, rng = n_pairs // (2 * DRAWN_PAIRS), torch.Generator().manual_seed(0)
    ends = tuple(shift + torch.randn(n, d, generator=rng) for shift in (0.0, 1.0))
    problems, _ = make_problems(
        Snapshots((0.0, 1.0), ends), method="i-cfm", path=None, sigma=0.1, seeds=[0], validate=False
    )
    points = 0.5 + 0.5**0.5 * torch.randn(1, 4096, d, generator=rng)
    return closed_form(problems, device=device, dtype=torch.float32), points.to(device)


def rate(one: ClosedFormField, points: torch.Tensor) -> float:
    """Queries per second: all points again and again, or as many as there is time for."""

    def ask(n: int) -> None:
        one.velocity(0.5, points[:, :n])
        if points.device.type == "cuda":
            torch.cuda.synchronize()

    ask(16)  # libraries loaded
    began = time.perf_counter()
    ask(16)
    n = min(points.shape[1], max(16, int(16 * SECONDS / (time.perf_counter() - began))))
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS / 2:
        ask(n)
        calls += 1
    return calls * n / (time.perf_counter() - began)


def needed(one: ClosedFormField, points: torch.Tensor) -> int:
    """Nearest pairs that hold all but a thousandth of a query's weight, median over 64 queries."""
    part = one._parts[0]
    pairs = part.intervals[0].pairs
    middle = (pairs.x0 + pairs.x1) / 2
    distance2 = torch.cdist(points[0, :64] - part.origin, middle).square().sort(1).values
    weight = torch.softmax(-distance2 / (2 * distance2[:, 4:5]), 1).cumsum(1)
    return int((weight < 1 - NEGLECTED).sum(1).float().median()) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pairs")
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--device", type=pick_device, default=torch.device("cpu"))
    parser.add_argument("--real", type=Path, help="h5ad with obsm['X_pca']: also time leave_one_out in 5 dimensions")
    args = parser.parse_args()
    logging.getLogger("sctraj").setLevel(logging.WARNING)
    rows = []
    for n_pairs in [1000] if args.quick else args.pairs:
        for d in args.dimensions:
            one, points = field(n_pairs, d, args.device)
            rows.append([f"{n_pairs:,}", str(d), f"{rate(one, points):,.0f}", f"{needed(one, points):,}"])
    print(f"{torch.get_num_threads()} threads, {args.device}\n")
    print(table(["pairs", "dimensions", "queries per second", "pairs that hold .999 of the weight"], rows))
    if args.real:
        adata = ad.read_h5ad(args.real)
        pp.standardize(adata, n_dims=5)
        tl.leave_one_out(adata, use_rep="X_std", field="closed-form", device=str(args.device))  # libraries loaded
        began = time.perf_counter()
        tl.leave_one_out(adata, use_rep="X_std", field="closed-form", device=str(args.device))
        print(f"leave_one_out(field='closed-form'), {adata.n_obs:,} cells: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
