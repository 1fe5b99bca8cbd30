"""Estimate, before anything runs, what a grid will take: units, seconds and memory."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _adata, _memory, tl
from ..flow.baselines import BASELINES
from ..flow.coupling.blocked import BLOCK
from ..flow.coupling.growing import WHOLE
from ..flow.distance import LARGEST_EXACT
from ..flow.hold_out import NOISE_REFERENCE, SMALLEST_HELD_OUT
from ..flow.plans import MOST_CELLS
from ..flow.problem import METHODS as OWN
from ..flow.starts import reach
from ._evaluate import check
from ._execute import duration
from ._judge import DIVERGENCES
from ._methods import find_method, is_known_here_alone
from ._store import Store, fingerprint, key_of
from ._tasks import find_task
from ._workers import Job, n_gpus

if TYPE_CHECKING:
    from anndata import AnnData

    from ._evaluate import Unit
    from ._grid import Grid

# Seconds on one core of a small machine; the units stored in a folder correct all of them by one factor.
FIT = 8e-4  # per member and step, with a batch of 128 pairs and a network of 3 x 64
MOVE = 3e-4  # per cell moved through a gap, in 100 steps
PLAN = 4.5e-7  # per pair of cells that a plan looks at
PAIRED_ANEW = 3  # times as long if pairs are found by velocity too
JUDGE, PAIR = 0.03, 8e-7  # all distances of one restoration in one space: at least, and per pair of cells
LESS = 0.3  # fraction of that without the divergence
RECIPE = 4e-9  # per cell and squared number of genes, to refit components
WARM = 5.0  # until a worker has loaded everything
IDLE = 600 * 2**20  # bytes that a worker uses with everything loaded but no cells
ARRAYS = 6  # float64 arrays, cells x cells of two snapshots, that exist at the same time


def jobs_of(grid: Grid, cells: Mapping[str, AnnData]) -> list[Job]:
    """Return the grid's units with their keys and estimates, in order.

    Raises
    ------
    KeyError, TypeError, ValueError
        If data cannot be used as requested, or a method cannot be called in this way or not by worker processes; this
        is raised before anything is computed.
    """
    prints = {
        one.name: fingerprint(cells[one.name], time_key=one.time_key, use_rep=one.use_rep, labels=one.labels)
        for one in grid.data
    }
    jobs = []
    for unit in grid.units:
        data = grid.names[unit.data]
        try:
            check(
                unit, cells[data.name], use_rep=data.use_rep, n_dims=data.n_dims, bootstraps=grid.bootstraps,
                labels=data.labels,
            )  # fmt: skip
            work, size = estimate(unit, cells[unit.data], data.time_key, n_dims=data.n_dims, bootstraps=grid.bootstraps)
        except ValueError as reason:
            raise ValueError(f"{data.name}: {reason}") from reason
        reading = {"time_key": data.time_key, "use_rep": data.use_rep, "n_dims": data.n_dims, "labels": data.labels}
        how: dict[str, Any] = {"fingerprint": prints[unit.data], "device": grid.device, "threads": grid.threads}
        how["bootstraps"] = grid.bootstraps
        key = key_of(unit, reading | how | {"source": _source(unit.method)})
        jobs.append(Job(key, unit, reading, work, size, **how))
    return jobs


def _source(method: str) -> str:
    """Return a hash of the files in which an external method is named and defined, since its numbers depend on them.

    The modules that these files import are not included.
    """
    if is_known_here_alone(method):
        raise ValueError(
            f'expected a method that worker processes can import, found "{method}", which this process alone knows; '
            f'put it into a file and give it as "module:function", or measure it here with sctraj.benchmark.evaluate'
        )
    if ":" not in method:
        return ""
    found = inspect.unwrap(find_method(method))  # type: ignore[arg-type]
    files = {sys.modules[method.partition(":")[0]].__file__}
    files |= {inspect.getsourcefile(found)} if inspect.isfunction(found) else set()
    content = b"".join(Path(path).read_bytes() for path in sorted(filter(None, files)))
    return hashlib.sha256(content).hexdigest()[:32]


def _pace(store: Store | None) -> float:
    """Return the factor by which the units in a folder took longer than planned."""
    records = store.records() if store is not None else []
    return median(one["seconds"] / one["planned"] for one in records) if records else 1.0


def estimate(unit: Unit, adata: AnnData, time_key: str, *, n_dims: int, bootstraps: int = 0) -> tuple[float, int]:
    """Estimate the seconds and the bytes of memory that a unit will take.

    For an external method, only the cost of judging is known.

    Raises
    ------
    ValueError
        If the course is too short for the task, or a held-out snapshot too small.
    """
    times, which = np.unique(_adata.read_times(adata, time_key), return_inverse=True)
    index = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
    task = find_task(unit.task)
    task.check(len(times), unit.start)
    settings = dict(unit.settings)
    steps = settings.get("n_steps", inspect.signature(tl.leave_one_out).parameters["n_steps"].default)
    n_seeds, seconds, most = len(unit.seeds), 0.2, 0
    neural = settings.get("field", "neural") == "neural"
    bent = (settings.get("path") or ("hermite" if unit.method == "uot-cfm" else "straight")) == "hermite"
    spaces = 2 if unit.strict else 1
    # methods without seeds are judged once
    n_clouds = 1 if unit.method in BASELINES or not neural else n_seeds
    genes = adata.n_vars if adata.X is not None else 0
    for fold in task.folds(times.tolist(), index, unit.seeds[0]):
        sizes, held_out = [len(rows) for rows in fold.kept], [len(rows) for rows in fold.held_out]
        if unit.method == NOISE_REFERENCE and min(held_out) < SMALLEST_HELD_OUT:
            raise ValueError(
                f"expected at least {SMALLEST_HELD_OUT} cells in every held-out snapshot, for two halves of two in the "
                f"{NOISE_REFERENCE}, found {min(held_out)} at time {fold.held_out_times[np.argmin(held_out)]:g}; merge "
                f"or leave out that time, or say references = false in a grid file"
            )
        a_side = reach(len(sizes)) if bent and neural else 1  # largest number of snapshots
        moved, gaps = (2 * a_side, a_side * (a_side + 1)) if unit.start == "both" else (1, 1)
        restored = moved * max(sizes) if unit.method in OWN else max(sizes)
        # larger ones are compared in blocks
        most = max(most, min(restored, LARGEST_EXACT) * min(max(*sizes, *held_out), LARGEST_EXACT))
        if unit.method in OWN:
            plans = PLAN * _pairs(sizes, unit.method, settings.get("block")) * (n_seeds if task.by_seed else 1)
            if bent and unit.method == "uot-cfm":
                plans *= PAIRED_ANEW
            trained = n_seeds * FIT * int(steps) if neural else 0.0
            seconds += plans + trained + n_seeds * MOVE * gaps * max(sizes) * len(held_out)
        seconds += n_clouds * spaces * sum(_judging(restored, n, bootstraps) for n in held_out)
        if unit.strict:
            seconds += adata.n_obs * min(genes, 2000) ** 2 * RECIPE
    held = adata.n_obs * (n_dims or 50) * 8 + (adata.n_obs * genes * 8 * 2 if unit.strict else 0)
    return seconds, IDLE + _size(adata) + held + ARRAYS * 8 * most


def _pairs(sizes: Sequence[int], method: str, block: Any) -> float:
    """Return the number of pairs of cells that the plans between consecutive snapshots involve."""
    side = LARGEST_EXACT
    if method in ("uot-cfm", "ot-cfm"):  # larger snapshots are thinned, and coupled in blocks
        side = int(block or (WHOLE if method == "uot-cfm" else BLOCK))
        sizes = [min(n, max(MOST_CELLS, side)) for n in sizes]
    return sum(math.sqrt(a * b) * min(math.sqrt(a * b), side) for a, b in pairwise(sizes))


def _judging(n: int, m: int, bootstraps: int) -> float:
    """Return the seconds for the distances between ``n`` and ``m`` cells, including their half-samples."""
    pairs = min(n, LARGEST_EXACT) * min(m, LARGEST_EXACT)
    whole, half = JUDGE + PAIR * pairs, JUDGE + PAIR * pairs / 4
    return whole + half * (min(bootstraps, DIVERGENCES) + LESS * max(0, bootstraps - DIVERGENCES))


def _size(adata: AnnData) -> int:
    parts: list[Any] = [adata.X, *adata.obsm.values(), *adata.layers.values()]
    return int(sum(getattr(getattr(one, "data", one), "nbytes", 0) for one in parts if one is not None))


def workers_that_fit(jobs: Sequence[Job], asked: int | None, device: str) -> int:
    """Return the number of processes to start: as requested, or else with CUDA one per GPU, or one if a GPU is named.

    Without CUDA, it is one per core, as far as memory allows.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"expected at least one job at a time, found {asked}")
        return asked
    if device.startswith("cuda"):
        return max(1, n_gpus()) if device == "cuda" else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory, largest = _memory.available_memory(), max((job.bytes for job in jobs), default=1)
    return max(1, min(cores // (jobs[0].threads if jobs else 1), cores if memory is None else memory // largest))


def as_text(jobs: Sequence[Job], store: Store | None, workers: int) -> str:
    """Return the plan as text: a line per unit, and the total."""
    pace = _pace(store)
    there = [store is not None and store.has(job.key) for job in jobs]
    table = pd.DataFrame(
        {
            "data": [job.unit.data for job in jobs],
            "task": [job.unit.task for job in jobs],
            "method": [job.unit.method for job in jobs],
            "settings": [", ".join(f"{k}={v}" for k, v in job.unit.settings) or "-" for job in jobs],
            "form": ["strict" if job.unit.strict else "published" for job in jobs],
            "start": [job.unit.start for job in jobs],
            "seeds": [len(job.unit.seeds) for job in jobs],
            "time": ["there" if done else duration(pace * job.work) for job, done in zip(jobs, there)],
            "memory": [f"{job.bytes / 2**30:.1f} GiB" for job in jobs],
        }
    )
    left = [pace * job.work for job, done in zip(jobs, there) if not done]
    most = max((job.bytes for job in jobs), default=0) * workers / 2**30
    known = "measured units of this folder" if store is not None and store.records() else "another machine's pace"
    counted = f"{table.to_string(index=False)}\n\n{len(jobs)} units, {sum(there)} of them there; "
    if not left:
        return f"{counted}nothing left to do"
    total = duration(WARM + max(sum(left) / workers, max(left)))
    return f"{counted}with {workers} at a time about {total} (from {known}) and up to {most:.1f} GiB"
