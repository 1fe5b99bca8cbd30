"""Independent parts of a computation on several threads, to the same bits as one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import joblib
import torch

Result = TypeVar("Result")
_TURN = threading.Lock()  # torch's number of threads is the whole process's


def at_once(solve: Callable[..., Result], parts: Sequence[tuple], most: int | None = None) -> list[Result]:
    """Solve parts, by their arguments, on as many threads as torch has (``most`` at most), each part on one of them.

    So the number of threads changes no bit. Neither torch nor the network simplex holds the interpreter while it
    computes. A single part has all of torch's threads.
    """
    # (a thread that asks for the first time while another one is in here keeps to one of torch's threads)
    n_threads = torch.get_num_threads()
    if len(parts) == 1 or n_threads == 1:  # the latter also where a part has parts of its own
        return [solve(*part) for part in parts]
    n_workers = min(n_threads, joblib.cpu_count())  # torch does not see a container's limits
    if most is not None:
        n_workers = min(n_workers, most)
    with _TURN:
        torch.set_num_threads(1)  # what new threads start with
        try:
            # joblib's own threads take a fifth of a second to end, where there are sixteen
            with ThreadPoolExecutor(n_workers) as threads:
                return list(threads.map(lambda part: solve(*part), parts))
        finally:
            torch.set_num_threads(n_threads)
