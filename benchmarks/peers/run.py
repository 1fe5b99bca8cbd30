"""Peers beside sctraj and the baselines, as one grid; a peer that is not installed is left out, with the reason.

python -m benchmarks.peers.run CELLS.h5ad --time-key day --n-dims 5 --seeds 2 --bootstraps 50 -o peers  # from the root

Every peer has requirements of its own (requirements-*.txt beside this), which need not get along with each other's: run
it in an environment each, with a folder each. Folds, half-samples and seeds are the same everywhere, so that a peer's
rows in ``benchmark.csv`` can be put beside those of another folder for ``sctraj.benchmark.summary`` and ``paired``.
Without CELLS it draws a small simulated data set, from which nothing follows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import pandas as pd

from sctraj import pp
from sctraj.benchmark import TASKS, Data, make_grid, run_grid
from sctraj.benchmark._methods import find_method
from sctraj.datasets import simulated_differentiation

HERE = "benchmarks.peers"
OWN = ("ot-cfm", "uot-cfm")
PEERS = {
    "torchcfm-i-cfm": f"{HERE}.torchcfm_peer:i_cfm",
    "torchcfm-ot-cfm": f"{HERE}.torchcfm_peer:ot_cfm",
    "torchcfm-sb-cfm": f"{HERE}.torchcfm_peer:sb_cfm",
    "wot": f"{HERE}.wot_peer:interpolate",
    "moscot": f"{HERE}.moscot_peer:interpolate",
}


def absent(method: str) -> str | None:
    """Why a peer cannot be run here; None where it can."""
    try:
        find_method(method)
    except ValueError as reason:
        return str(reason.__cause__)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="?", type=Path)
    parser.add_argument("--time-key", default="time")
    parser.add_argument("--n-dims", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bootstraps", type=int, default=20)
    parser.add_argument("--n-steps", type=int, default=3000, help="of torchcfm's training")
    parser.add_argument("--start", default="before", choices=("before", "both"), help="of sctraj's own methods")
    parser.add_argument("--task", default="leave-one-out", choices=TASKS)
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--strict", action="store_true", help="beside the published form")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("sctraj_peers"), help="folder")
    args = parser.parse_args()

    reasons = {name: reason for name in args.only if (reason := absent(PEERS[name])) is not None}
    for name, reason in reasons.items():
        print(f"left out {name}: {reason}; see {HERE.replace('.', '/')}/requirements-*.txt")
    peers = [PEERS[name] for name in args.only if name not in reasons]

    cells = simulated_differentiation(600, n_genes=60, n_pcs=6) if args.cells is None else ad.read_h5ad(args.cells)
    if not pd.api.types.is_numeric_dtype(cells.obs[args.time_key]):
        pp.parse_time(cells, args.time_key, key_added="real_time")
        args.time_key = "real_time"
    name = "simulated" if args.cells is None else args.cells.stem
    use_rep = "recipe" if cells.n_vars else "X_pca"
    data = Data(name, name, time_key=args.time_key, use_rep=use_rep, n_dims=args.n_dims)
    grid = make_grid(
        [data],
        tasks=[args.task],
        methods=[*OWN, *peers],
        settings={peer: {"n_steps": args.n_steps} for peer in peers if "torchcfm" in peer},
        seeds=args.seeds,
        strict=[False, True] if args.strict else False,
        starts=[args.start],
        bootstraps=args.bootstraps,
    )
    notes = {f"left out: {name}": reason for name, reason in reasons.items()}
    run_grid(grid, args.output, jobs=args.jobs, cells={name: cells}, notes=notes)


if __name__ == "__main__":
    main()
