"""How much memory is available, and how much of it arrays take."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np


def available_memory() -> int | None:
    """Return the bytes of memory available without swapping, or None if the system does not say.

    The number comes from psutil if it is installed, otherwise from the system; some systems report only the total.
    """
    try:
        import psutil
    except ImportError:
        for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
            if pages in getattr(os, "sysconf_names", {}):
                return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        return None
    return int(psutil.virtual_memory().available)


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Return the size of an array in bytes."""
    return math.prod(shape) * np.dtype(dtype).itemsize
