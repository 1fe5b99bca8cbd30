"""Run a benchmark, from its description to its files: one data set, or a grid in units that can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import pl, tl
from ..flow.flow_matching import pick_device
from . import _plan
from ._evaluate import evaluate
from ._execute import described, execute
from ._files import written_whole
from ._grid import RECIPE, Data, Grid, make_grid
from ._published import beside_published, published_data, published_grid
from ._results import write_results
from ._store import Store
from ._tasks import Start
from ._workers import Evaluate, Job

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure

FOLDER = "sctraj_benchmark"
IN_WORDS = {  # explanations that are printed for readers without prior knowledge
    "energy": "energy distance, unbiased: 0 on average for two samples of one law",
    "variance_ratio": "variance, restored / observed: 1 is right",
    "w1": "Wasserstein-1 distance, as papers print it",
}


# --- one data set at once ------------------------------------------------------------------------------------------
def run(
    adata: AnnData,
    folder: str | Path = FOLDER,
    *,
    methods: Sequence[str] = ("uot-cfm", "ot-cfm", "i-cfm", "sb-cfm"),
    **options: Any,
) -> None:
    """Hold out every interior snapshot in turn, restore it by each method, and report the distances.

    Prints a table per metric, and writes ``leave_one_out.csv`` (tidy: method, time, seed, metric, value),
    ``leave_one_out.png`` and ``benchmark.h5ad`` (the cells with everything that `sctraj.tl.leave_one_out` writes).

    Parameters
    ----------
    adata
        Annotated cells, at least three snapshots; the results are written into it as well.
    folder
        Folder for the files, which is made if it does not exist. Files of an earlier run are replaced.
    methods
        As in `sctraj.tl.leave_one_out`.
    options
        The other arguments of `sctraj.tl.leave_one_out`.

    Raises
    ------
    OSError
        If the folder cannot be made; raised before anything is computed.
    TypeError
        If `sctraj.tl.leave_one_out` has no such argument.
    """
    from .. import get

    start = time.perf_counter()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tl.leave_one_out(adata, methods=methods, **options)
    key = options.get("key_added", "flow")

    for metric, meaning in IN_WORDS.items():
        click.echo(f"{meaning}\n{_as_text(get.leave_one_out(adata, key=key, metric=metric))}\n")
    click.echo(_protocol_line(adata, key))
    with written_whole(folder / "leave_one_out.csv") as path:
        get.leave_one_out(adata, key=key).to_csv(path, index=False)
    with written_whole(folder / "leave_one_out.png") as path:
        _draw(adata, key).savefig(path, dpi=150)
    with written_whole(folder / "benchmark.h5ad") as path:
        adata.write_h5ad(path)
    seconds = time.perf_counter() - start
    click.echo(f"{seconds:.1f} s; wrote leave_one_out.csv, leave_one_out.png and benchmark.h5ad to {folder}")


def _as_text(table: Any) -> str:
    names = {column: f"t = {column:g}" for column in table.columns if not isinstance(column, str)}
    table = table.rename(columns=names | {"sd": "sd over seeds", "error": "error of estimate"})
    table.index.name = None
    return table.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")


def _protocol_line(adata: AnnData, key: str) -> str:
    from .._adata import PROTOCOL, table_name

    record = adata.uns[PROTOCOL.format(table=table_name(key))]
    return (
        f"Protocol: each interior snapshot left out in turn, restored from {record['start']} "
        f"({record['integration']}); {adata.n_obs} cells in {record['use_rep']}, {record['n_seeds']} seed(s). "
        f"Distances are to all cells of the held-out snapshot; the noise reference's are between halves of it. "
        f"{record['leak'][0].upper()}{record['leak'][1:]}."
    )


def _draw(adata: AnnData, key: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4.5), layout="constrained")  # made without pyplot, which would keep a reference to it
    left, middle, right = figure.subplots(1, 3)
    pl.leave_one_out(adata, metric="energy", key=key, ax=left)
    pl.leave_one_out(adata, metric="w1", key=key, ax=middle)
    pl.leave_one_out(adata, kind="map", key=key, ax=right)
    return figure


# --- grids ---------------------------------------------------------------------------------------------------------
def grid_of(
    data: Data,
    *,
    tasks: Sequence[str] = ("leave-one-out",),
    strict: bool = False,
    start: Start = "both",
    bootstraps: int = 20,
    threads: int = 1,
    **others: Any,
) -> Grid:
    """Return the grid of one data set.

    Parameters
    ----------
    data
        Description of the data set.
    tasks
        What is held out: leave-one-out, leave-two-out, extrapolation, every-2nd, every-4th, cells.
    strict
        Judge in the strict form as well as in the published one: the representation is fitted anew in every fold,
        without the held-out cells. With use_rep "recipe" the two forms differ in nothing else, so that their difference
        is the leak.
    start
        Which snapshots are moved to the held-out time: those on "both" sides, the one "before" (as published), or the
        "first". A task for which this is impossible uses its first possible start in this order.
    bootstraps
        Number of half-samples of the cells for each interval; 0 for none.
    threads
        Threads per unit. The last bits of results depend on it, so units are computed anew if it changes.
    others
        The other arguments of `make_grid`.
    """
    forms = (False, True) if strict else (False,)
    return make_grid(
        [data], tasks=tasks, strict=forms, starts=(start,), bootstraps=bootstraps, threads=threads, **others
    )


def run_grid(
    grid: Grid,
    folder: str | Path = FOLDER,
    *,
    jobs: int | None = None,
    dask: str | None = None,
    plan: bool = False,
    cells: Mapping[str, AnnData] | None = None,
    compute: Evaluate = evaluate,
    beside: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Compute the units of a grid that are not in the folder, in worker processes, and write tables and a report.

    Each unit is stored when it is done. If a run was killed, calling it again continues where it stopped and gives the
    same table in the end, bit for bit; two runs into the same folder share the work. Writes ``benchmark.csv`` (tidy;
    also ``benchmark.parquet`` if pyarrow is installed), ``wide.csv`` (methods x held-out times, mean ± sd over seeds),
    ``summary.csv``, ``paired.csv`` and ``report.html``, and ``failures.csv`` if units failed. Tables and report of an
    earlier run in the folder are replaced or removed; its units are kept.

    Parameters
    ----------
    grid
        What to compute.
    folder
        Folder in which finished units are looked up and everything is written.
    jobs
        Number of units to compute at a time; by default one per core, as far as memory allows, or with CUDA one per
        GPU.
    dask
        Address of a Dask scheduler (tcp://...) whose workers compute, or local for a cluster started for this run.
    plan
        Print the units with their expected time and memory, and compute nothing.
    cells
        Data sets that have been read already, by name, with times as in their files; `times` and `index_clock` of the
        grid are applied to a copy.
    compute
        Function that computes a unit's rows; for tests.
    beside
        Function that adds published values to the table.
    notes
        Additional lines for the protocol in the report.

    Raises
    ------
    OSError, KeyError, TypeError, ValueError
        If data cannot be read or used, or a method cannot be called as requested or not by worker processes
        (`register` makes it known to this process only); raised before anything is computed.
    RuntimeError
        If units have failed; raised after everything else was computed and written.
    """
    begun = time.perf_counter()
    if dask is None and not plan:
        pick_device(grid.device)  # only to raise its error
    folder, there = Path(folder), dict(cells or {})
    there |= {one.name: one.given(there[one.name]) for one in grid.data if one.name in there}
    there |= {one.name: one.load() for one in grid.data if one.name not in there}
    there |= {one.name: one.ready(there[one.name]) for one in grid.data}
    work = _plan.jobs_of(grid, there)
    workers = _plan.workers_that_fit(work, jobs, grid.device)
    told = _unlike_forms(grid)
    for name, what in told.items():
        click.echo(f"{name}: {what}", err=True)
    if plan:
        known = Store(folder) if (folder / "units").is_dir() else None
        click.echo(_plan.as_text(work, known, workers))
        return
    store = Store(folder)
    execute(
        work, store, there, evaluate=compute, workers=workers, dask=dask, say=lambda line: click.echo(line, err=True)
    )
    failures = _failures(work, store)
    written = write_results(grid, there, work, store, failures, beside, {**(notes or {}), **told})
    click.echo(f"{time.perf_counter() - begun:.1f} s; wrote {', '.join(written)} to {folder}")
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(work)} units failed, the first with {failures[0]['error']}; see failures.csv in "
            f"{folder}, and for where an error comes from the traces in {folder / 'failed'}. Run the same again to try "
            f"these once more."
        )


def _unlike_forms(grid: Grid) -> dict[str, str]:
    """Return notes on data sets whose strict and published forms differ in more than the cells they have seen."""
    return {
        f"{one.name}: strict beside published": f"the published form is in {one.use_rep}, not in the strict form's own "
        f'recipe, so that they differ by more than the leak; use_rep = "{RECIPE}" makes that their only difference'
        for one in grid.data
        if one.use_rep != RECIPE and {unit.strict for unit in grid.units if unit.data == one.name} == {False, True}
    }


def _failures(work: Sequence[Job], store: Store) -> list[dict[str, str]]:
    """Return the units that are not stored, with their errors."""
    return [
        {"unit": described(job.unit), "error": str((store.failure(job.key) or {}).get("error", "unknown"))}
        for job in work
        if not store.has(job.key)
    ]


def run_published(
    folder: str | Path = FOLDER,
    *,
    n_seeds: int = 5,
    device: str = "cpu",
    threads: int = 1,
    bootstraps: int = 0,
    settings: Mapping[str, Any] | None = None,
    **how: Any,
) -> None:
    """Run the published protocol on the published data sets, and compare with the published values.

    The protocol uses five principal components, standardised over all cells, and restores every interior snapshot from
    the one before it. Times are snapshot indices, as published, and also real days if these are uneven.

    Parameters
    ----------
    folder
        As in `run_grid`.
    n_seeds, device, threads, bootstraps, settings
        As in `Grid` and `make_grid`.
    how
        The other arguments of `run_grid`.

    Raises
    ------
    ConnectionError
        If none of the data sets can be obtained.
    """
    data, cells, reasons = published_data()
    for name, reason in reasons.items():
        click.echo(f"skipped {name}: {reason}", err=True)
    if not data:
        raise ConnectionError(
            f"none of the published data sets can be had ({', '.join(reasons)}), so that nothing was computed; the "
            f"lines above say why, and where to put the files if you get them by other means"
        )
    grid = published_grid(
        data, n_seeds=n_seeds, device=device, threads=threads, bootstraps=bootstraps, settings=settings
    )
    notes = {f"skipped: {name}": reason for name, reason in reasons.items()}
    run_grid(grid, folder, cells=cells, beside=beside_published, notes=notes, **how)
