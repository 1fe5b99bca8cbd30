"""What a grid will take, before anything runs: units, seconds and memory."""

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

# Seconds on one core of a small machine; the units that a folder holds correct them by one factor.
FIT = 8e-4  # per member and step, of a batch of 128 pairs and 3 x 64
MOVE = 3e-4  # per cell moved through a gap, in 100 steps
PLAN = 4.5e-7  # per pair of cells that a plan looks at
PAIRED_ANEW = 3  # times as long where pairs are found by velocity too
JUDGE, PAIR = 0.03, 8e-7  # all distances of one restoration in one space: at least, and per pair of cells
LESS = 0.3  # of that is left without the divergence
RECIPE = 4e-9  # per cell and squared gene that components are refitted on
WARM = 5.0  # until a worker has loaded everything
IDLE = 600 * 2**20  # bytes of a worker that has loaded everything and holds no cells
ARRAYS = 6  # of float64, cells x cells of two snapshots, that are alive at once


def jobs_of(grid: Grid, cells: Mapping[str, AnnData]) -> list[Job]:
    """Return the grid's units with their keys and estimates, in order.

    Raises
    ------
    KeyError, TypeError, ValueError
        If data cannot be used for what is asked, or a method cannot be called so, or not by worker processes; before
        anything is computed.
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
    """Return a hash of the files that a method from elsewhere is named and defined in: changed, other numbers come out.

    What these import is not looked at.
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
    """Return how many times longer than planned the units of a folder took."""
    records = store.records() if store is not None else []
    return median(one["seconds"] / one["planned"] for one in records) if records else 1.0


def estimate(unit: Unit, adata: AnnData, time_key: str, *, n_dims: int, bootstraps: int = 0) -> tuple[float, int]:
    """Return the seconds and the bytes of memory that a unit is expected to take.

    Of a method from elsewhere only the judging is known.

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
    # what has no seed is judged once
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
        a_side = reach(len(sizes)) if bent and neural else 1  # snapshots, at most
        moved, gaps = (2 * a_side, a_side * (a_side + 1)) if unit.start == "both" else (1, 1)
        restored = moved * max(sizes) if unit.method in OWN else max(sizes)
        # what is larger is met in blocks
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
    """Return how many pairs of cells the plans between consecutive snapshots look at."""
    side = LARGEST_EXACT
    if method in ("uot-cfm", "ot-cfm"):  # what is larger is thinned, and met in blocks
        side = int(block or (WHOLE if method == "uot-cfm" else BLOCK))
        sizes = [min(n, max(MOST_CELLS, side)) for n in sizes]
    return sum(math.sqrt(a * b) * min(math.sqrt(a * b), side) for a, b in pairwise(sizes))


def _judging(n: int, m: int, bootstraps: int) -> float:
    """Return the seconds that the distances between ``n`` and ``m`` cells take, with half-samples of them."""
    pairs = min(n, LARGEST_EXACT) * min(m, LARGEST_EXACT)
    whole, half = JUDGE + PAIR * pairs, JUDGE + PAIR * pairs / 4
    return whole + half * (min(bootstraps, DIVERGENCES) + LESS * max(0, bootstraps - DIVERGENCES))


def _size(adata: AnnData) -> int:
    parts: list[Any] = [adata.X, *adata.obsm.values(), *adata.layers.values()]
    return int(sum(getattr(getattr(one, "data", one), "nbytes", 0) for one in parts if one is not None))


def workers_that_fit(jobs: Sequence[Job], asked: int | None, device: str) -> int:
    """Return how many processes to start: as many as asked for; else one for each GPU, or for one that is named.

    Without GPUs one for each core, as far as memory goes.
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
    """Return the plan as text: a line per unit and what it comes to."""
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
