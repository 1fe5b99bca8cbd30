"""How much memory is available, and how much of it arrays take."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MEMINFO = Path("/proc/meminfo")  # of Linux


def available_memory() -> int | None:
    """Return the bytes of memory available without swapping, or None if the system does not say.

    The number comes from psutil if it is installed, otherwise from the system; some systems report only the total.
    What the system keeps of files that were read, and gives up when asked, counts as available.
    """
    try:
        import psutil
    except ImportError:
        if MEMINFO.exists() and (found := re.search(r"MemAvailable:\s*(\d+) kB", MEMINFO.read_text())):
            return 1024 * int(found[1])
        for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
            if pages in getattr(os, "sysconf_names", {}):
                return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        return None
    return int(psutil.virtual_memory().available)


def check_room(what: str, found: str, needed: int, ways_out: str, *, store: Path | None = None) -> None:
    """Raise a ValueError if something does not fit into the free memory, or on the disk of a store to be made.

    Parameters
    ----------
    what, found
        Its name, a plural, and its shape in words.
    needed
        Its size in bytes.
    ways_out
        What the user can do instead.
    store
        Folder that it is written to.
    """
    if store is None:
        there, place = available_memory(), "memory"
    else:
        beside = next(folder for folder in store.resolve().parents if folder.exists())
        there, place = shutil.disk_usage(beside).free, "disk"
    if there is not None and needed > there:
        raise ValueError(
            f"expected {what} that fit into the {there / 2**30:.1f} GiB of {place} that are free, found {found}, "
            f"{needed / 2**30:.1f} GiB; {ways_out}"
        )


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Return the size of an array in bytes."""
    return math.prod(shape) * np.dtype(dtype).itemsize
