"""Compare peers with sctraj and the baselines in one grid; peers that are not installed are left out, with the reason.

python -m benchmarks.peers.run --quick -o peers  # under a minute, small simulated cells: to see that it works
python -m benchmarks.peers.run CELLS.h5ad --time-key day --n-dims 5 --seeds 2 --bootstraps 50 -o peers  # from the root
python -m benchmarks.peers.run cycle+effects --n-cells 1000 --only mioflow -o peers  # a set of restoration.py
python -m benchmarks.peers.run --table peers other_folder  # the finished folders side by side
python -m benchmarks.peers.run --table peers_* --metric energy  # the same, a line a data set

Every peer has its own requirements (requirements-*.txt in this folder), which may be incompatible with each other: run
each peer in its own environment, with its own folder. Folds, half-samples and seeds are the same everywhere, so that a
peer's rows in ``benchmark.csv`` can be combined with those of another folder for ``sctraj.benchmark.summary`` and
``paired``. Without CELLS it draws a small simulated data set, which is not informative.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import pandas as pd

from sctraj import pp
from sctraj.benchmark import TASKS, Data, make_grid, run_grid, summary
from sctraj.benchmark._grid import SIMULATED
from sctraj.benchmark._methods import REFERENCES, find_method
from sctraj.cli import prepare
from sctraj.datasets import simulated_differentiation

from ..courses import N_CELLS, load
from ..courses import SIMULATED as FAMILIES

HERE = "benchmarks.peers"
OWN = ("ot-cfm", "uot-cfm")
PEERS = {
    "torchcfm-i-cfm": f"{HERE}.torchcfm_peer:i_cfm",
    "torchcfm-ot-cfm": f"{HERE}.torchcfm_peer:ot_cfm",
    "torchcfm-sb-cfm": f"{HERE}.torchcfm_peer:sb_cfm",
    "wot": f"{HERE}.wot_peer:interpolate",
    "moscot": f"{HERE}.moscot_peer:interpolate",
    "mioflow": f"{HERE}.mioflow_peer:restore",
    "cytobridge": f"{HERE}.cytobridge_peer:restore",
}
SHOWN = {"energy": "energy", "energy_unweighted": "energy, unweighted", "variance_ratio": "V", "w1": "W1"}
KEYS = ["data", "task", "method", "strict", "start", "space", "metric"]


def absent(method: str) -> str | None:
    """Why a peer cannot be run here; None where it can."""
    try:
        find_method(method)
    except ValueError as reason:
        return str(reason.__cause__)
    return None


def side_by_side(folders: Sequence[Path]) -> str:
    """Return finished folders as one markdown table for each data set and space, nearest to the truth first.

    Means over held-out snapshots and seeds, in brackets the standard deviation over seeds. Folders with the same data
    set are to be of the same dimensions; of a method that stands in several, sctraj's own and the baselines, the one
    with most seeds is shown.
    """
    return "\n\n".join(_markdown(*one) for one in _by_title(_found(folders)))


def by_data(folders: Sequence[Path], metric: str) -> str:
    """Return finished folders as one markdown table of a metric, a line a data set and space; columns as they come."""
    found = _found(folders)
    known = sorted(set(found["metric"]))
    if metric not in known:
        raise ValueError(f"expected a metric of {', '.join(known)}, found {metric!r}")
    found = found[found["metric"] == metric]
    columns = {key: _named(*key) for key in zip(found["method"], found["start"])}
    lines = [[metric, *columns.values()], ["---"] * (1 + len(columns))]
    for title, group in _by_title(found):
        one = group.set_index(["method", "start"])
        lines.append([title, *(_text(*one.loc[key, ["mean", "sd"]]) if key in one.index else "" for key in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_title(found: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = found.groupby(["data", "task", "strict", "space"], sort=False)
    return [
        (", ".join([data, task, *(["strict"] if strict else []), space]), group)
        for (data, task, strict, space), group in groups
    ]


def _found(folders: Sequence[Path]) -> pd.DataFrame:
    if missing := [str(folder) for folder in folders if not (folder / "benchmark.csv").exists()]:
        raise ValueError(
            f"expected finished folders, found no benchmark.csv in {', '.join(missing)}; run them to the end"
        )
    tables = [pd.read_csv(folder / "benchmark.csv") for folder in folders]
    found = pd.concat([summary(table) for table in tables], ignore_index=True)
    found.loc[found["method"].isin(REFERENCES), "start"] = ""  # they know none, and stand in every one
    return found.sort_values("n_seeds", ascending=False, kind="stable").drop_duplicates(KEYS)


def _markdown(title: str, found: pd.DataFrame) -> str:
    by_metric = {metric: part.set_index(["method", "start"]) for metric, part in found.groupby("metric")}
    shown = {metric: words for metric, words in SHOWN.items() if metric in by_metric}
    lines = [[title, *shown.values()], ["---"] * (1 + len(shown))]
    for method, start in by_metric["energy"]["mean"].sort_values().index:
        numbers = [by_metric[metric].loc[(method, start)] for metric in shown]
        lines.append([_named(method, start), *(_text(one["mean"], one["sd"]) for one in numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(method: str, start: str) -> str:
    """Return a peer's short name, with its settings; of sctraj's own methods what was moved stands beside it."""
    peer = next((name + method[len(path) :] for name, path in PEERS.items() if method.startswith(path)), None)
    return peer or ", ".join([method, *([start] if start else [])])


def _text(mean: float, sd: float) -> str:
    return f"{mean:.3f} ({sd:.3f})" if sd > 1e-9 else f"{mean:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="?", help="h5ad file, or the name of a simulated set")
    parser.add_argument("--quick", action="store_true", help="one seed, no intervals, short training")
    parser.add_argument("--n-cells", type=int, default=N_CELLS, help="of a simulated family; not of differentiation")
    parser.add_argument("--time-key", default="time")
    parser.add_argument("--n-dims", type=int, default=5)
    parser.add_argument("--pca", type=int, help="first components of X, of all cells, where the file has none")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bootstraps", type=int, default=20)
    parser.add_argument("--n-steps", type=int, default=3000, help="of torchcfm's training")
    parser.add_argument("--start", default="before", choices=("before", "both"), help="of sctraj's own methods")
    parser.add_argument("--task", default="leave-one-out", choices=TASKS)
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--strict", action="store_true", help="beside the published form")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--table", nargs="+", type=Path, metavar="FOLDER", help="print finished folders alone")
    parser.add_argument("--metric", help="of the table, with a line a data set")
    parser.add_argument("-o", "--output", type=Path, default=Path("sctraj_peers"), help="folder")
    args = parser.parse_args()
    if args.table:
        try:
            print(by_data(args.table, args.metric) if args.metric else side_by_side(args.table))
        except ValueError as reason:
            parser.error(str(reason))
        return

    if args.quick:
        args.seeds, args.bootstraps, args.n_steps = 1, 0, 100
    reasons = {name: reason for name in args.only if (reason := absent(PEERS[name])) is not None}
    for name, reason in reasons.items():
        print(f"left out {name}: {reason}; see {HERE.replace('.', '/')}/requirements-*.txt")
    peers = [PEERS[name] for name in args.only if name not in reasons]

    name = SIMULATED if args.cells is None else Path(args.cells).stem
    if args.cells is None:
        cells = simulated_differentiation(600, n_genes=60, n_pcs=6)
    elif args.cells in FAMILIES:  # judged in their own space
        cells, args.n_dims = load(args.cells, 0, args.n_cells, Path())[0], 0
    else:
        cells = ad.read_h5ad(args.cells)
    if not pd.api.types.is_numeric_dtype(cells.obs[args.time_key]):
        pp.parse_time(cells, args.time_key, key_added="real_time")
        args.time_key = "real_time"
    prepare(cells, time_key=args.time_key, column=None, pca=args.pca)
    use_rep = "recipe" if cells.n_vars and "X_pca" not in cells.obsm else "X_pca"
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
