"""Leave one timepoint out with several methods: printed, and written to a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import pl, tl

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

PRINTED = {
    "w1": "Wasserstein-1 distance",
    "energy": "energy distance, unbiased: 0 on average for two samples of one law",
    "variance_ratio": "variance, restored / observed: 1 is right",
}


def run(
    adata: AnnData,
    folder: str | Path = "sctraj_benchmark",
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
        Where the files go; made where it is not there. Files of an earlier run are replaced.
    methods
        As in `sctraj.tl.leave_one_out`.
    options
        The other arguments of `sctraj.tl.leave_one_out`.

    Raises
    ------
    OSError
        If the folder cannot be made; before anything is computed.
    TypeError
        If `sctraj.tl.leave_one_out` has no such argument.
    """
    from .. import get

    start = time.perf_counter()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tl.leave_one_out(adata, methods=methods, **options)
    key = options.get("key_added", "flow")

    for metric, meaning in PRINTED.items():
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


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and put that file in its place once it is complete: never half a file."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_text(table: Any) -> str:
    names = {column: f"t = {column:g}" for column in table.columns if not isinstance(column, str)}
    table = table.rename(columns=names | {"sd": "sd over seeds"})
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

    figure = Figure(figsize=(17, 4.5), layout="constrained")  # of its own: pyplot keeps no hold of it
    left, middle, right = figure.subplots(1, 3)
    pl.leave_one_out(adata, metric="w1", key=key, ax=left)
    pl.leave_one_out(adata, metric="energy", key=key, ax=middle)
    pl.leave_one_out(adata, kind="map", key=key, ax=right)
    return figure
