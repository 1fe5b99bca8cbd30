"""Independent parts of a computation on several threads, with the same result, bit by bit, as one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import joblib
import torch

Result = TypeVar("Result")
_TURN = threading.Lock()  # torch's number of threads belongs to the whole process


def at_once(solve: Callable[..., Result], parts: Sequence[tuple], most: int | None = None) -> list[Result]:
    """Call ``solve`` with each part's arguments, each part on one of as many threads as torch has (``most`` at most).

    As a part runs on a single thread, the number of threads changes no bit. Neither torch nor the network simplex holds
    the interpreter's lock while it computes. If there is a single part, it has all of torch's threads.
    """
    # (a thread that first asks for this number while another one is in here sees, and keeps, one thread)
    n_threads = torch.get_num_threads()
    if len(parts) == 1 or n_threads == 1:  # the latter also if a part has parts of its own
        return [solve(*part) for part in parts]
    n_workers = min(n_threads, joblib.cpu_count())  # torch does not see a container's limits
    if most is not None:
        n_workers = min(n_workers, most)
    with _TURN:
        torch.set_num_threads(1)  # which new threads inherit
        try:
            # sixteen of joblib's own threads would take a fifth of a second to end
            with ThreadPoolExecutor(n_workers) as threads:
                return list(threads.map(lambda part: solve(*part), parts))
        finally:
            torch.set_num_threads(n_threads)
