"""Units through worker processes: on this machine by loky, or on a Dask cluster; each is stored when it is done."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock, Timeout

from .._log import logger
from ._store import Store, code_hash

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from ._evaluate import Unit

Evaluate = Callable[..., "pd.DataFrame"]
POLL = 0.5  # seconds between looks at what another run has in hand
PATIENCE = 60  # seconds in which a cluster must show a first worker


@dataclass(frozen=True)
class Job:
    """A unit with all that a worker needs but the cells.

    Attributes
    ----------
    key
        Under which it is stored.
    unit
        What to compute.
    reading
        How the cells are read: `time_key`, `use_rep`, `n_dims`, `labels`.
    work
        Planned seconds; how far off they are is learned on the way.
    bytes
        Planned peak memory of a worker.
    fingerprint
        Of the data.
    device, threads, bootstraps
        How to compute.
    """

    key: str
    unit: Unit
    reading: Mapping[str, Any]
    work: float
    bytes: int
    fingerprint: str = ""
    device: str = "cpu"
    threads: int = 1
    bootstraps: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: the rows, or the error's text."""

    table: pd.DataFrame | None
    seconds: float
    error: str = ""
    trace: str = ""


# --- in a worker ---------------------------------------------------------------------------------------------------
_CELLS: dict[str, AnnData] = {}  # by fingerprint; what this worker was sent when it started
_GPU: list[FileLock] = []  # held as long as this worker lives


def _receive(cells: Mapping[str, AnnData], device: str) -> None:
    """Take in the cells, once, and a GPU of one's own where there are several."""
    _CELLS.update(cells)
    if device.startswith("cuda") and not _GPU:
        _lease_gpu()


def _lease_gpu() -> None:
    """Make the first GPU that no other worker on this machine has the only one that torch sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [one.strip() for one in visible.split(",")] if visible else [str(k) for k in range(n_gpus())]
    for number in numbers if len(numbers) > 1 else []:
        name = f"sctraj-{os.getuid() if hasattr(os, 'getuid') else 'user'}-gpu-{number.replace('/', '-')}.lock"
        lock = FileLock(Path(tempfile.gettempdir()) / name, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        _GPU.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = number  # before the first use of CUDA in this process
        return


def n_gpus() -> int:
    """Return the number of GPUs that torch can use, without starting CUDA."""
    import torch

    return torch.cuda.device_count()


def _compute(job: Job, evaluate: Evaluate, code: str) -> Outcome:
    """Compute one unit; an error comes back as text, for what an exception holds may not travel."""
    import torch
    from threadpoolctl import threadpool_limits

    start = time.perf_counter()
    try:
        if code_hash() != code:
            raise RuntimeError(
                "expected the same sctraj on every worker, found other sources on one; install the same everywhere, "
                "and leave its files alone while a run is on"
            )
        torch.set_num_threads(job.threads)  # of the thread that calls it
        with threadpool_limits(job.threads):
            cells = _CELLS[job.fingerprint]
            table = evaluate(job.unit, cells, **job.reading, device=job.device, bootstraps=job.bootstraps)
    except Exception as error:
        text = f"{type(error).__name__}: {error.args[0] if isinstance(error, KeyError) and error.args else error}"
        return Outcome(None, time.perf_counter() - start, text, traceback.format_exc())
    return Outcome(table, time.perf_counter() - start)


# --- pools of workers ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pool:
    """Workers: how many units they can have in hand, and how one is handed to them."""

    executor: Executor
    size: Callable[[], int]


@contextmanager
def local_workers(n: int, cells: Mapping[str, AnnData], *, device: str, threads: int) -> Iterator[Pool]:
    """Give ``n`` processes of this machine."""
    from joblib.externals.loky import ProcessPoolExecutor

    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    executor = ProcessPoolExecutor(
        n, initializer=_receive, initargs=(dict(cells), device), env=dict.fromkeys(limits, str(threads))
    )
    try:
        yield Pool(executor, lambda: n)
    except BaseException:
        executor.shutdown(wait=False, kill_workers=True)
        raise
    executor.shutdown(wait=True)


@contextmanager
def dask_workers(address: str, n: int, cells: Mapping[str, AnnData], *, device: str, threads: int) -> Iterator[Pool]:
    """Give the workers of a cluster, or with ``"local"`` of one of ``n`` processes that is started here and stopped.

    Raises
    ------
    OSError
        If there is no scheduler, or no worker comes.
    RuntimeError
        If Dask is not installed; if a GPU is asked for and no worker offers one.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise RuntimeError('expected Dask, found none; install it with: pip install "sctraj[dask]"') from error
    resources = {"GPU": 1} if device.startswith("cuda") else {}
    with _left_open() as closing:
        if address == "local":
            address = closing(
                LocalCluster(
                    n_workers=n, threads_per_worker=1, memory_limit=0, dashboard_address=None, resources=resources
                )
            )
        try:
            client = closing(Client(address))
            client.wait_for_workers(1, timeout=PATIENCE)
        except OSError as error:
            raise OSError(
                f"expected a Dask scheduler with workers at {address}, found none ({error}); start them with: dask "
                f"scheduler, and on every machine dask worker {address}"
            ) from error
        plugin = _cells_plugin(cells, device)
        client.register_plugin(plugin)  # also of workers that come, or come back, later
        closing(_Unregistered(client, plugin.name))
        if resources and not _offers(client):
            raise RuntimeError(
                "expected workers that offer a GPU, found none; start one a device: dask worker --resources GPU=1 ..."
            )
        size = _offers if resources else _threads
        yield Pool(client.get_executor(pure=False, resources=resources or None), lambda: max(1, size(client)))


def _threads(client: Any) -> int:
    return sum(worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())


def _offers(client: Any) -> int:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return int(sum(worker.get("resources", {}).get("GPU", 0) for worker in workers))


@contextmanager
def _left_open() -> Iterator[Callable[[Any], Any]]:
    """Close what was opened, last first."""
    opened: list[Any] = []

    def closing(one: Any) -> Any:
        opened.append(one)
        return one

    try:
        yield closing
    finally:
        for one in reversed(opened):
            one.close()


def _cells_plugin(cells: Mapping[str, AnnData], device: str) -> Any:
    from distributed import WorkerPlugin

    class Cells(WorkerPlugin):
        """Brings the cells to every worker once."""

        def __init__(self) -> None:
            self.name = f"sctraj-cells-{uuid4().hex}"  # several runs may share a cluster
            self.cells = dict(cells)

        def setup(self, worker: Any) -> None:
            from sctraj.benchmark._execute import _receive

            _receive(self.cells, device)

    return Cells()


@dataclass(frozen=True)
class _Unregistered:
    """A plugin that is taken off the cluster in the end, which goes on to serve others."""

    client: Any
    name: str

    def close(self) -> None:
        self.client.unregister_worker_plugin(self.name)


# --- the run -------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What is done, and an estimate of the time left that says "unknown" until a unit of this run has shown its pace.

    Attributes
    ----------
    jobs
        All of this run.
    say
        Takes a line.
    """

    jobs: Sequence[Job]
    say: Callable[[str], None]
    done: set[str] = field(default_factory=set)
    measured: float = 0.0
    planned: float = 0.0
    failed: int = 0

    def finished(self, job: Job, seconds: float | None, flying: Mapping[str, float], workers: int) -> None:
        """Say how far the run is; ``flying`` are the seconds that units in hand have taken so far."""
        self.done.add(job.key)
        if seconds is not None:
            self.measured, self.planned = self.measured + seconds, self.planned + job.work
        total = sum(one.work for one in self.jobs)
        share = sum(one.work for one in self.jobs if one.key in self.done) / total if total else 1.0
        left = self.left(flying, workers)
        failed = f", {self.failed} failed" if self.failed else ""
        if len(self.done) < len(self.jobs):
            failed += f"; time left: {'unknown' if left is None else f'about {duration(left)}'}"
        self.say(f"{len(self.done)} of {len(self.jobs)} units, {share:.0%} of the planned work{failed}")

    def left(self, flying: Mapping[str, float], workers: int) -> float | None:
        """Return the seconds still to go, or None as long as nobody can know."""
        if not self.planned:
            return None
        pace = self.measured / self.planned
        each = [max(0.0, pace * one.work - flying.get(one.key, 0.0)) for one in self.jobs if one.key not in self.done]
        return max(sum(each) / max(1, workers), max(each, default=0.0))


def duration(seconds: float) -> str:
    """Return a length of time for people."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "1 s"


def execute(
    jobs: Sequence[Job],
    store: Store,
    cells: Mapping[str, AnnData],
    *,
    evaluate: Evaluate,
    workers: int,
    dask: str | None = None,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Compute every unit that is not stored; afterwards each is either stored or recorded as failed.

    A unit is claimed when it is handed out. One that another run has claimed is left to that run, and taken over if the
    other ends without having stored it. A unit that a process dies of is tried once more, alone, so that no other is
    blamed.

    Parameters
    ----------
    jobs
        In the order in which to start them.
    store
        Where finished ones are.
    cells
        By data set.
    evaluate
        Computes a unit's rows; it travels to the workers.
    workers
        Processes on this machine.
    dask
        Address of a scheduler, or "local", instead.
    say
        Takes lines about the progress.
    """
    progress = Progress(jobs, say)
    todo: list[Job] = []
    for job in jobs:
        if store.has(job.key):
            progress.done.add(job.key)
        else:
            todo.append(job)
    if progress.done:
        say(f"{len(progress.done)} of {len(jobs)} units were there from earlier runs")
    common = {"device": jobs[0].device, "threads": jobs[0].threads} if jobs else {}
    sent = {job.fingerprint: cells[job.unit.data] for job in todo}
    while todo:
        if dask is not None:
            pool = dask_workers(dask, min(workers, len(todo)), sent, **common)  # type: ignore[arg-type]
        else:
            pool = local_workers(min(workers, len(todo)), sent, **common)  # type: ignore[arg-type]
        todo, died = _drain(todo, pool, store, evaluate, progress)
        for job in died:
            left, died_alone = _drain([job], local_workers(1, sent, **common), store, evaluate, progress)  # type: ignore[arg-type]
            todo += left
            for one in died_alone:
                _record_death(one, store, progress)


def _record_death(job: Job, store: Store, progress: Progress) -> None:
    claim = store.claim(job.key)
    if claim is None:  # another run is at it; it will see for itself
        return
    text = "its process was killed twice, the second time alone; most often memory has run out"
    store.fail(job.key, _record(job, Outcome(None, 0.0, text)))
    progress.failed += 1
    progress.finished(job, None, {}, 1)
    claim.release()


def _drain(
    jobs: Iterable[Job], workers: Any, store: Store, evaluate: Evaluate, progress: Progress
) -> tuple[list[Job], list[Job]]:
    """Work through units until none is left or a process dies; return those not done and those in hand at a death."""
    queue, died = deque(jobs), []
    flying: dict[Future, tuple[Job, FileLock, float]] = {}
    try:
        with workers as pool:
            while queue or flying:
                _hand_out(queue, flying, pool, store, evaluate, progress)
                if not flying:
                    time.sleep(POLL)
                    continue
                finished, _ = wait(flying, timeout=POLL if queue else None, return_when=FIRST_COMPLETED)
                for future in finished:
                    job, claim, _ = flying[future]
                    outcome = _outcome(future)
                    del flying[future]
                    now = time.perf_counter()
                    _keep(job, outcome, store, progress, {j.key: now - t for j, _, t in flying.values()}, pool.size())
                    claim.release()
    except BrokenProcessPool:
        died = [job for job, _, _ in flying.values()]
        logger.warning("a worker process died with %d unit(s) in hand: going on with new ones", len(died))
    finally:
        for _, claim, _ in flying.values():
            claim.release()
    return list(queue), died


def _hand_out(
    queue: deque[Job], flying: dict[Future, tuple[Job, FileLock, float]], pool: Pool, store: Store, evaluate: Evaluate,
    progress: Progress,
) -> None:  # fmt: skip
    """Claim units and hand them to free workers; what another run has in hand goes to the end of the queue."""
    for _ in range(len(queue)):
        if len(flying) >= pool.size():
            return
        job = queue.popleft()
        claim = store.claim(job.key)
        if claim is None:
            queue.append(job)
        elif store.has(job.key):  # by another run, meanwhile
            claim.release()
            progress.finished(job, None, {}, pool.size())
        else:
            store.sweep(job.key)
            try:
                future = pool.executor.submit(_compute, job, evaluate, code_hash())
            except BaseException:
                claim.release()
                queue.appendleft(job)
                raise
            flying[future] = (job, claim, time.perf_counter())


def _outcome(future: Future) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # of the cluster: a worker that died at every try, a scheduler that is gone
        return Outcome(None, 0.0, f"{type(error).__name__}: {error}", traceback.format_exc())


def _keep(
    job: Job, outcome: Outcome, store: Store, progress: Progress, flying: Mapping[str, float], workers: int
) -> None:
    if outcome.table is not None:
        store.write(job.key, outcome.table, _record(job, outcome))
        progress.finished(job, outcome.seconds, flying, workers)
        return
    store.fail(job.key, _record(job, outcome))
    progress.failed += 1
    logger.warning("failed: %s: %s", described(job.unit), outcome.error)
    progress.finished(job, None, flying, workers)


def _record(job: Job, outcome: Outcome) -> dict[str, Any]:
    record = {"unit": asdict(job.unit), "seconds": outcome.seconds, "planned": job.work}
    return record | ({"error": outcome.error, "trace": outcome.trace} if outcome.table is None else {})


def described(unit: Unit) -> str:
    """Return one line that says which unit it is."""
    settings = "".join(f", {name}={value}" for name, value in unit.settings)
    space = "strict" if unit.strict else "published"
    return f"{unit.data}, {unit.task}, {unit.method}{settings}, {space}, from {unit.start}, {len(unit.seeds)} seed(s)"
