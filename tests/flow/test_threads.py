"""Laws of parts at once: the answers are those of one after the other, in their order, and torch keeps its threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sctraj.flow.coupling import blocked, growing
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.threads import at_once


@pytest.mark.parametrize("n", [1, 3])
def test_answers_are_in_the_parts_order_whoever_is_done_first(threads_of_torch, n):
    def slow(n: int, wait: float) -> int:
        time.sleep(wait)
        return n * n

    assert threads_of_torch(n, lambda: at_once(slow, [(3, 0.05), (1, 0.0), (2, 0.01)])) == [9, 1, 4]


def test_many_parts_have_one_thread_of_torch_each_and_a_single_one_has_all(threads_of_torch):
    here = threading.get_ident()

    def seen(n_parts: int) -> list[tuple[int, bool]]:
        return at_once(lambda _: (torch.get_num_threads(), threading.get_ident() == here), [(0,)] * n_parts)

    assert threads_of_torch(2, lambda: seen(4)) == [(1, False)] * 4
    assert threads_of_torch(2, lambda: seen(1)) == [(2, True)]
    with pytest.raises(ZeroDivisionError):  # torch keeps its threads, too
        threads_of_torch(2, lambda: at_once(lambda n: 1 // n, [(1,), (0,)]))


@pytest.mark.parametrize(("processors", "most", "expected"), [(8, None, 3), (2, None, 2), (8, 2, 2), (8, 5, 3)])
def test_as_many_parts_at_once_as_torch_has_threads(threads_of_torch, monkeypatch, processors, most, expected):
    def together() -> int:
        monkeypatch.setattr("joblib.cpu_count", lambda: processors)
        return len(set(at_once(lambda: (time.sleep(0.05), threading.get_ident())[1], [()] * 12, most)))

    assert threads_of_torch(3, together) == expected


@pytest.mark.parametrize(("couple", "n_pools"), [(blocked, 1), (growing, 4)])  # the unit, plans, kin, pairs
def test_blocks_of_an_interval_keep_to_torchs_threads(threads_of_torch, monkeypatch, couple, n_pools):
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self))[1])
    rng = torch.Generator().manual_seed(0)
    interval = Snapshots((0.0, 1.0), tuple(torch.randn(60, 2, generator=rng) for _ in range(2))).intervals()[0]
    threads_of_torch(1, lambda: couple(interval, rng, block=10))
    assert not started
    threads_of_torch(2, lambda: couple(interval, rng, block=10))
    assert len(started) == 2 * n_pools


def test_the_end_of_one_callers_parts_gives_anothers_no_more_threads(threads_of_torch):
    def late(wait: float) -> int:
        time.sleep(wait)
        return torch.get_num_threads()

    def call(wait: float) -> None:
        torch.get_num_threads()  # how many a thread has is settled when it first asks
        ready.wait()
        time.sleep(0.05 * (wait > 0.1))  # the second starts while the first is on, and goes on when that ends
        seen.extend(at_once(late, [(wait,)] * 4))

    def both() -> None:
        callers = [threading.Thread(target=call, args=(wait,)) for wait in (0.1, 0.3)]
        for one in callers:
            one.start()
        for one in callers:
            one.join()

    ready = threading.Barrier(2)
    seen: list[int] = []
    threads_of_torch(2, both)
    assert seen == [1] * 8
