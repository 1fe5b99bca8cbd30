"""Independent parts of a computation on several threads, to the same bits as one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import joblib
import torch

Result = TypeVar("Result")


def at_once(solve: Callable[..., Result], parts: Sequence[tuple], workers: int) -> list[Result]:
    """Solve parts, by their arguments, on ``workers`` threads (-1: as many as processors), each part on one of them.

    So the number of workers changes no bit. Neither torch nor the network simplex holds the interpreter while it
    computes. A whole snapshot, which is one part, has all of torch's threads.
    """
    if len(parts) == 1:
        return [solve(*parts[0])]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what new threads start with
    try:
        # joblib's own threads take a fifth of a second to end, where there are sixteen
        with ThreadPoolExecutor(joblib.cpu_count() if workers == -1 else workers) as threads:
            return list(threads.map(lambda part: solve(*part), parts))
    finally:
        torch.set_num_threads(n_threads)
