from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small matmuls: on a busy machine two threads waiting for each other take a hundred times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], Any]:
    """Call something while torch has ``n`` threads, on a machine of eight processors; torch keeps their number."""

    def call(n: int, something: Callable[[], Any]) -> Any:
        monkeypatch.setattr("joblib.cpu_count", lambda: 8)
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            return something()
        finally:
            after = torch.get_num_threads()
            torch.set_num_threads(before)
            assert after == n

    return call
