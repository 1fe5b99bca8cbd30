"""Measure time and memory by number of cells: 50 dimensions, 10 snapshots, each step in a process of its own.

python benchmarks/scaling.py --quick                             # under 15 s: 1,000 cells, short training
python benchmarks/scaling.py                                     # 10,000, 100,000 and 1,000,000 cells
python benchmarks/scaling.py --sizes 10000 --profile 12          # with the functions in which the time goes
python benchmarks/scaling.py --steps fit_flow trajectories       # without fates and leave_one_out
python benchmarks/scaling.py --steps fit_flow --frame moving     # growth told from movement in a moving frame
python benchmarks/scaling.py --device cuda --threads 16          # and the GPU's memory beside

Memory is the peak of the process above its level once the cells have been read, in GiB and in representations (cells x
50 x 4 bytes). The exponent is that of the number of cells by which time grew since the previous size: 1 is linear. One
thread is used by default.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import math
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import anndata
import numpy as np
import torch

from sctraj import datasets, tl

N_DIMS, N_SNAPSHOTS, N_TIMES = 50, 10, 20
QUICK: dict[str, int | str] = {"n_steps": 5}
STEPS = {
    "fit_flow": lambda adata, options, frame: tl.fit_flow(adata, frame=frame, **options),
    "trajectories": lambda adata, options, frame: tl.trajectories(
        adata, times=np.linspace(*adata.obs["time"].agg(["min", "max"]), N_TIMES), **options
    ),
    "fates": lambda adata, options, frame: tl.fates(adata, "side", **options),
    "leave_one_out": lambda adata, options, frame: tl.leave_one_out(adata, n_seeds=1, frame=frame, **options),
}


def simulated(n: int) -> anndata.AnnData:
    """Draw the high-dimensional course at ten times: the representation, times, and the side of the branch alone."""
    course = datasets.simulated_course("high-dimensional", n, times=np.linspace(0, 4, N_SNAPSHOTS))
    obs = course.obs[["time"]].assign(side=np.where(course.obsm["X_latent"][:, 1] > 0, "one", "other"))
    return anndata.AnnData(obs=obs, obsm={"X_pca": course.obsm["X_pca"]})


class Peak:
    """The process's resident memory, in bytes, looked at every 10 ms; its peak since `start`."""

    def __init__(self) -> None:
        self.highest, self.running = 0, False
        self.page = os.sysconf("SC_PAGE_SIZE")

    def now(self) -> int:
        statm = Path("/proc/self/statm")
        if statm.exists():
            return int(statm.read_text().split()[1]) * self.page
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.now())
            time.sleep(0.01)

    def __enter__(self) -> Peak:
        self.running, self.before = True, self.now()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.highest = max(self.highest, self.now())
        self.running = False
        self.thread.join()


def child(step: str, path: Path, options: dict[str, int | str], frame: str, threads: int, profile: int) -> None:
    """Run one step on the cells in a file, keep what it wrote there, and print what it took."""
    torch.set_num_threads(threads)
    logging.disable(logging.INFO)
    adata = anndata.read_h5ad(path)
    getattr(tl, step)  # imports what it needs
    profiler = cProfile.Profile()
    with Peak() as peak:
        began = time.perf_counter()
        if profile:
            profiler.enable()
        STEPS[step](adata, options, frame)
        profiler.disable()
        seconds = time.perf_counter() - began
    if step == "fit_flow":
        adata.write_h5ad(path)  # which trajectories and fates need
    representation = adata.n_obs * N_DIMS * 4
    row = {"step": step, "cells": adata.n_obs, "seconds": seconds, "bytes": peak.highest - peak.before}
    on_gpu = torch.cuda.max_memory_allocated() if options["device"] == "cuda" else 0
    print(json.dumps(row | {"representation": representation, "on_gpu": on_gpu}))
    if profile:
        stats = pstats.Stats(profiler, stream=sys.stderr)
        stats.strip_dirs().sort_stats("cumulative").print_stats(r"^(?!.*built-in).*\.py", profile)
        stats.sort_stats("tottime").print_stats(profile)


def measured(step: str, path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run a step in a process of its own."""
    command = [sys.executable, __file__, "--child", step, str(path), "--profile", str(args.profile)]
    command += ["--device", args.device, "--threads", str(args.threads), *["--quick"] * args.quick]
    command += ["--frame", args.frame]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 cells, short training")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="CELLS")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--frame", choices=["fixed", "moving"], default="fixed", help="of fit_flow and leave_one_out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1 by default")
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="that many of a profile, to stderr")
    parser.add_argument("--output", type=Path, help="json of all rows")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        options = (QUICK if args.quick else {}) | {"device": args.device}
        child(args.child[0], Path(args.child[1]), options, args.frame, args.threads, args.profile)
        return
    rows: list[dict[str, float]] = []
    print(f"{N_SNAPSHOTS} snapshots, {N_DIMS} dimensions; trajectories at {N_TIMES} times; {args.device}, "
          f"threads: {args.threads}\n")  # fmt: skip
    columns = ["step", "cells", "seconds", "exponent", "GiB above the cells", "in representations"]
    columns += ["GiB of the GPU"] * (args.device == "cuda")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for n in [1000] if args.quick else args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cells.h5ad"
            simulated(n).write_h5ad(path)
            for step in STEPS:
                if step not in args.steps and not (step == "fit_flow" and {"trajectories", "fates"} & {*args.steps}):
                    continue
                row = measured(step, path, args)
                smaller = next((r for r in reversed(rows) if r["step"] == step), None)
                grown = ""
                if smaller:
                    grown = f"{math.log(row['seconds'] / smaller['seconds'], n / smaller['cells']):.2f}"
                rows.append(row)
                memory = f"{row['bytes'] / 2**30:.2f} | {row['bytes'] / row['representation']:.1f} |"
                memory += f" {row['on_gpu'] / 2**30:.2f} |" * (args.device == "cuda")
                print(f"| {step} | {n:,} | {row['seconds']:.1f} | {grown} | {memory}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
