"""Worker processes, on this machine by loky or in a Dask cluster: what they receive, compute and return."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock, Timeout

from ._store import code_hash

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from ._evaluate import Unit

Evaluate = Callable[..., "pd.DataFrame"]
PATIENCE = 60  # seconds within which a first worker of a cluster must appear


@dataclass(frozen=True)
class Job:
    """A unit with everything that a worker needs except the cells.

    Attributes
    ----------
    key
        Name under which it is stored.
    unit
        What to compute.
    reading
        How the cells are read: `time_key`, `use_rep`, `n_dims`, `labels`.
    work
        Planned seconds, which are corrected as the run proceeds.
    bytes
        Planned peak memory of a worker.
    fingerprint
        Hash of the data.
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
    """The result that a worker returns: the rows, or the text of an error."""

    table: pd.DataFrame | None
    seconds: float
    error: str = ""
    trace: str = ""


# --- in a worker ---------------------------------------------------------------------------------------------------
_CELLS: dict[str, AnnData] = {}  # by fingerprint; received when this worker started
_GPU: list[FileLock] = []  # held for the lifetime of this worker
_TURN = threading.Lock()  # one unit at a time: thread numbers hold for the process, whose pool could run several


def _receive(cells: Mapping[str, AnnData], device: str) -> None:
    """Receive the cells, once, and lease a GPU for this worker if there are several."""
    _CELLS.update(cells)
    if device == "cuda" and not _GPU:  # a GPU that is named is shared by all
        _lease_gpu()


def _lease_gpu() -> None:
    """Make the first GPU not leased by another worker on this machine the only one visible to torch."""
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


def compute(job: Job, evaluate: Evaluate, code: str) -> Outcome:
    """Compute one unit; an error is returned as text, because an exception's content may not be transferable."""
    import torch
    from threadpoolctl import threadpool_limits

    start = time.perf_counter()
    try:
        if code_hash() != code:
            raise RuntimeError(
                "expected the same sctraj on every worker, found other sources on one; install the same everywhere, "
                "and leave its files alone while a run is on"
            )
        with _TURN, threadpool_limits(job.threads):
            start = time.perf_counter()  # without the time spent waiting
            torch.set_num_threads(job.threads)
            cells = _CELLS[job.fingerprint]
            table = evaluate(job.unit, cells, **job.reading, device=job.device, bootstraps=job.bootstraps)
    except Exception as error:
        text = f"{type(error).__name__}: {error.args[0] if isinstance(error, KeyError) and error.args else error}"
        return Outcome(None, time.perf_counter() - start, text, traceback.format_exc())
    return Outcome(table, time.perf_counter() - start)


# --- pools of workers ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pool:
    """Workers: how many units they can compute at a time, and how to hand one to them."""

    executor: Executor
    size: Callable[[], int]


@contextmanager
def local_workers(n: int, cells: Mapping[str, AnnData], *, device: str, threads: int) -> Iterator[Pool]:
    """Provide ``n`` processes on this machine."""
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
    """Provide the workers of a cluster; with ``"local"``, of one with ``n`` processes that is started and stopped here.

    Raises
    ------
    OSError
        If there is no scheduler, or no worker appears.
    RuntimeError
        If Dask is not installed, or if a GPU is requested and no worker offers one.
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
                f"scheduler, and on every machine dask worker {address} --nworkers auto --nthreads 1"
            ) from error
        plugin = _cells_plugin(cells, device)
        client.register_plugin(plugin)  # applies also to workers that join, or rejoin, later
        closing(_Unregistered(client, plugin.name))
        if resources and not _offers(client):
            raise RuntimeError(
                "expected workers that offer a GPU, found none; start one a device: dask worker --resources GPU=1 ..."
            )
        size = _offers if resources else _processes
        yield Pool(client.get_executor(pure=False, resources=resources or None), lambda: max(1, size(client)))


def _processes(client: Any) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _offers(client: Any) -> int:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return int(sum(worker.get("resources", {}).get("GPU", 0) for worker in workers))


@contextmanager
def _left_open() -> Iterator[Callable[[Any], Any]]:
    """Close everything that was opened, in reverse order."""
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
        """A plugin that sends the cells to every worker once."""

        def __init__(self) -> None:
            self.name = f"sctraj-cells-{uuid4().hex}"  # several runs may share a cluster
            self.cells = dict(cells)

        def setup(self, worker: Any) -> None:
            from sctraj.benchmark._workers import _receive

            _receive(self.cells, device)

    return Cells()


@dataclass(frozen=True)
class _Unregistered:
    """A plugin that is removed from the cluster in the end, because the cluster may go on to serve other runs."""

    client: Any
    name: str

    def close(self) -> None:
        self.client.unregister_worker_plugin(self.name)
