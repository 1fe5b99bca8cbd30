"""Hand out units to workers, store them when they are done, and report progress."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .._log import logger
from ._store import Store, code_hash
from ._workers import Evaluate, Job, Outcome, Pool, compute, dask_workers, local_workers

if TYPE_CHECKING:
    from anndata import AnnData
    from filelock import FileLock

    from ._evaluate import Unit

POLL = 0.5  # seconds between checks of units that another run is computing


@dataclass
class Progress:
    """Units done, and an estimate of the time left, which is "unknown" until a first unit of this run has been timed.

    Attributes
    ----------
    jobs
        All jobs of this run.
    say
        Function that is given each line.
    """

    jobs: Sequence[Job]
    say: Callable[[str], None]
    done: set[str] = field(default_factory=set)
    measured: float = 0.0
    planned: float = 0.0
    failed: int = 0

    def finished(self, job: Job, seconds: float | None, flying: Mapping[str, float], workers: int) -> None:
        """Report the progress of the run; ``flying`` are the seconds that current units have taken so far."""
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
        """Return the seconds left, or None as long as they cannot be estimated."""
        if not self.planned:
            return None
        pace = self.measured / self.planned
        each = [max(0.0, pace * one.work - flying.get(one.key, 0.0)) for one in self.jobs if one.key not in self.done]
        return max(sum(each) / max(1, workers), max(each, default=0.0))


def duration(seconds: float) -> str:
    """Return a duration as readable text."""
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

    A unit is claimed when it is handed out. A unit that another run has claimed is left to that run, and taken over if
    that run ends without having stored it. If a process dies, the unit is tried once more, alone, so that no other unit
    is blamed.

    Parameters
    ----------
    jobs
        Jobs, in the order in which to start them.
    store
        Where finished units are stored.
    cells
        Cells of each data set.
    evaluate
        Function that computes a unit's rows; it is sent to the workers.
    workers
        Number of processes on this machine.
    dask
        Address of a scheduler to use instead, or "local".
    say
        Function that is given lines about the progress.
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
    common: dict[str, Any] = {"device": jobs[0].device, "threads": jobs[0].threads} if jobs else {}
    sent = {job.fingerprint: cells[job.unit.data] for job in todo}
    while todo:
        if dask is not None:
            pool = dask_workers(dask, min(workers, len(todo)), sent, **common)
        else:
            pool = local_workers(min(workers, len(todo)), sent, **common)
        todo, died = _drain(todo, pool, store, evaluate, progress)
        for job in died:
            left, died_alone = _drain([job], local_workers(1, sent, **common), store, evaluate, progress)
            todo += left
            for one in died_alone:
                _record_death(one, store, progress)


def _record_death(job: Job, store: Store, progress: Progress) -> None:
    claim = store.claim(job.key)
    if claim is None:  # another run is computing it, and will find out by itself
        return
    text = "its process was killed twice, the second time alone; most often memory has run out"
    store.fail(job.key, _record(job, Outcome(None, 0.0, text)))
    progress.failed += 1
    progress.finished(job, None, {}, 1)
    claim.release()


def _drain(
    jobs: Iterable[Job], workers: Any, store: Store, evaluate: Evaluate, progress: Progress
) -> tuple[list[Job], list[Job]]:
    """Compute units until none is left or a process dies; return those not done and those being computed at a death."""
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
    """Claim units and hand them to free workers; those claimed by another run go to the end of the queue."""
    for _ in range(len(queue)):
        if len(flying) >= pool.size():
            return
        job = queue.popleft()
        claim = store.claim(job.key)
        if claim is None:
            queue.append(job)
        elif store.has(job.key):  # stored by another run in the meantime
            claim.release()
            progress.finished(job, None, {}, pool.size())
        else:
            store.sweep(job.key)
            try:
                future = pool.executor.submit(compute, job, evaluate, code_hash())
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
    except Exception as error:  # from the cluster: a worker that died at every try, or a lost scheduler
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
    """Return one line that identifies a unit."""
    settings = "".join(f", {name}={value}" for name, value in unit.settings)
    space = "strict" if unit.strict else "published"
    return f"{unit.data}, {unit.task}, {unit.method}{settings}, {space}, from {unit.start}, {len(unit.seeds)} seed(s)"
