"""Print and write the results of a grid's stored units: tables and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pandas as pd

from ..flow.integrate import AS_PUBLISHED
from ._files import to_text, write_durably, written_whole
from ._report import FORMS, PRINTED, as_text, html_report, wide
from ._store import Store, code_hash, versions
from ._uncertainty import paired, summary

if TYPE_CHECKING:
    from anndata import AnnData

    from ._grid import Grid
    from ._workers import Job

GRID_FILES = (
    "benchmark.csv", "wide.csv", "summary.csv", "paired.csv", "published.csv", "failures.csv", "benchmark.parquet",
    "report.html",
)  # fmt: skip


def write_results(
    grid: Grid, cells: Mapping[str, AnnData], work: Sequence[Job], store: Store, failures: list[dict[str, str]],
    beside: Callable[[pd.DataFrame], pd.DataFrame] | None, notes: Mapping[str, str],
) -> list[str]:  # fmt: skip
    """Print and write the results of the stored units, in the grid's order; return the names of the files.

    Files that an earlier run has written and this one does not write are removed.
    """
    files: dict[str, pd.DataFrame] = {}
    done = [store.read(job.key) for job in work if store.has(job.key)]
    page = None
    if done:
        table = pd.concat(done, ignore_index=True)
        for metric in PRINTED:
            click.echo(f"{as_text(table, metric=metric)}\n")
        files = _tables(table, beside)
        if "published" in files:
            click.echo(f"{files['published'].to_string(index=False)}\n")
        page = html_report(
            table, title="sctraj benchmark", summary=files["summary"], paired=files.get("paired"),
            protocol=_protocol(grid, notes), data=_described(grid, cells, work),
            versions=versions() | {"sources": code_hash()}, failures=failures, published=files.get("published"),
        )  # fmt: skip
    if failures:
        files["failures"] = pd.DataFrame(failures)
    for name, rows in files.items():
        write_durably(store.folder / f"{name}.csv", to_text(rows, typed=False))
    written = [f"{name}.csv" for name in files]
    if done and _has_pyarrow():
        with written_whole(store.folder / "benchmark.parquet") as path:
            files["benchmark"].to_parquet(path, index=False)
        written.append("benchmark.parquet")
    if page is not None:
        write_durably(store.folder / "report.html", page)
        written.append("report.html")
    for name in set(GRID_FILES) - set(written):  # files of an earlier run that this one does not write
        (store.folder / name).unlink(missing_ok=True)
    return written


def _tables(table: pd.DataFrame, beside: Callable[[pd.DataFrame], pd.DataFrame] | None) -> dict[str, pd.DataFrame]:
    """Return the tidy table and those derived from it, by the names of their files."""
    by_time = pd.concat([wide(table, metric=metric).assign(metric=metric) for metric in PRINTED])
    files = {"benchmark": table, "wide": by_time, "summary": summary(table)}
    pairs = _paired(table)
    if pairs is not None:
        files["paired"] = pairs
    if beside is not None:
        files["published"] = beside(table)
    return files


def _paired(table: pd.DataFrame) -> pd.DataFrame | None:
    """Return paired comparisons of methods by metric, or None if there is nothing to pair."""
    if table["method"].nunique() < 2:
        return None
    return pd.concat([paired(table, metric=metric) for metric in table["metric"].unique()], ignore_index=True)


def _protocol(grid: Grid, notes: Mapping[str, str]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(unit.task for unit in grid.units))
    return {
        "tasks": ", ".join(tasks),
        "start": ", ".join(dict.fromkeys(unit.start for unit in grid.units)),
        "forms": ", ".join(FORMS[form] for form in sorted({unit.strict for unit in grid.units})),
        "seeds": ", ".join(map(str, dict.fromkeys(seed for unit in grid.units for seed in unit.seeds))),
        "integration": f"Euler, {AS_PUBLISHED.n_steps} steps an interval, from all kept cells of the start, "
        "in real time",
        "distances": "to all held-out cells, exact up to several thousand cells and estimated beyond",
        "half-samples behind each interval": grid.bootstraps,
        "device": grid.device,
        "threads of a unit": grid.threads,
        **notes,
    }


def _described(grid: Grid, cells: Mapping[str, AnnData], work: Sequence[Job]) -> pd.DataFrame:
    prints = {job.unit.data: job.fingerprint for job in work}
    return pd.DataFrame(
        [
            {
                "data": one.name,
                "source": Path(one.source).name,
                "cells": cells[one.name].n_obs,
                "genes": cells[one.name].n_vars,
                "times": ", ".join(f"{t:g}" for t in sorted(set(map(float, cells[one.name].obs[one.time_key])))),
                "representation": one.use_rep,
                "dimensions": str(one.n_dims or "all"),
                "fingerprint": prints[one.name],
            }
            for one in grid.data
        ]
    )


def _has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True
