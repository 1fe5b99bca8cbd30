"""How much memory there is."""

from __future__ import annotations

import os


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
