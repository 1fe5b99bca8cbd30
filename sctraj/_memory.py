"""How much memory there is, and how much of it arrays take."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, where the system says so.

    From psutil where it is installed, else from the system: on some only the memory's whole size can be had.
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
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
