"""Laws of parts at once: the answers are those of one after the other, in their order, and torch keeps its threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sctraj.flow.threads import at_once


@pytest.mark.parametrize("workers", [1, 3, -1])
def test_answers_are_in_the_parts_order_whoever_is_done_first(workers):
    def slow(n: int, wait: float) -> int:
        time.sleep(wait)
        return n * n

    assert at_once(slow, [(3, 0.05), (1, 0.0), (2, 0.01)], workers) == [9, 1, 4]


def test_many_parts_have_one_thread_of_torch_each_and_a_single_one_has_all():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = threading.get_ident()
        seen = at_once(lambda _: (torch.get_num_threads(), threading.get_ident() == here), [(0,)] * 4, 2)
        assert seen == [(1, False)] * 4
        assert at_once(lambda _: (torch.get_num_threads(), threading.get_ident() == here), [(0,)], 2) == [(2, True)]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            at_once(lambda n: 1 // n, [(1,), (0,)], 2)
        assert torch.get_num_threads() == 2  # after an error too
    finally:
        torch.set_num_threads(before)
