"""Peers beside sctraj and the baselines, leave-one-out; a peer that is not installed is left out, with the reason.

python -m benchmarks.peers.run CELLS.h5ad --time-key day --n-dims 5 --seeds 2 --bootstraps 50     # from the root

Every peer has requirements of its own (requirements-*.txt beside this), which need not get along with each other's: run
it in an environment each, with ``--output``, and put the tables together. Without CELLS it draws a small simulated
data set, from which nothing follows.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch

from sctraj import pp
from sctraj.benchmark._evaluate import Unit, evaluate
from sctraj.benchmark._methods import find_method
from sctraj.benchmark._representation import fit_recipe, read_expression
from sctraj.benchmark._uncertainty import summary
from sctraj.datasets import simulated_differentiation

HERE = "benchmarks.peers"
REFERENCES = {name: name for name in ("previous", "next", "ot-interpolation", "noise-reference")}
OWN = {"ot-cfm": "ot-cfm", "uot-cfm": "uot-cfm"}
PEERS = {
    "torchcfm i-cfm": f"{HERE}.torchcfm_peer:i_cfm",
    "torchcfm ot-cfm": f"{HERE}.torchcfm_peer:ot_cfm",
    "torchcfm sb-cfm": f"{HERE}.torchcfm_peer:sb_cfm",
    "wot": f"{HERE}.wot_peer:interpolate",
    "moscot": f"{HERE}.moscot_peer:interpolate",
}
SHOWN = ("w1", "energy", "variance_ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="?", type=Path)
    parser.add_argument("--time-key", default="time")
    parser.add_argument("--n-dims", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bootstraps", type=int, default=20)
    parser.add_argument("--n-steps", type=int, default=3000, help="of torchcfm's training")
    parser.add_argument("--start", default="before", choices=("before", "both"), help="of sctraj's own methods")
    parser.add_argument("--only", nargs="*", default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--output", type=Path, help="csv to add the rows to")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    cells = simulated_differentiation(600, n_genes=60, n_pcs=6) if args.cells is None else ad.read_h5ad(args.cells)
    if not pd.api.types.is_numeric_dtype(cells.obs[args.time_key]):
        pp.parse_time(cells, args.time_key, key_added="real_time")
        args.time_key = "real_time"
    if cells.n_vars:
        raw = read_expression(cells)
        cells.obsm["X_rep"] = fit_recipe(raw, args.n_dims).project(raw).astype(np.float32)
    else:
        cells.obsm["X_rep"] = cells.obsm["X_pca"]

    tables = []
    for name, method in (REFERENCES | OWN | PEERS).items():
        if name in PEERS and name not in args.only:
            continue
        try:
            find_method(method)
        except ValueError as reason:
            print(f"left out {name}: {reason.__cause__}; see {HERE.replace('.', '/')}/requirements-*.txt")
            continue
        settings = (("n_steps", args.n_steps),) if name.startswith("torchcfm") else ()
        unit = Unit("cells", "leave-one-out", method, settings, args.strict, args.start, tuple(range(args.seeds)))
        started = time.perf_counter()
        table = evaluate(
            unit, cells, time_key=args.time_key, use_rep="X_rep", n_dims=args.n_dims, bootstraps=args.bootstraps
        )
        print(f"{name}: {time.perf_counter() - started:.1f} s")
        tables.append(table.assign(method=name))
    table = pd.concat(tables)
    if args.output is not None:
        table.to_csv(args.output, mode="a", header=not args.output.exists(), index=False)
    found = summary(table)
    for metric in SHOWN:
        columns = ["space", "method", "mean", "sd", "low", "high", "skill", "skill_low", "skill_high", "rank"]
        print(f"\n{metric}\n{found.loc[found['metric'] == metric, columns].round(3).to_string(index=False)}")


if __name__ == "__main__":
    main()
