"""Store finished units on disk: one file each, complete or absent, that reads back bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from ._files import from_text, to_text, write_durably

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

PACKAGE = Path(__file__).resolve().parents[1]
NO_NUMBER_DEPENDS_ON = ("cli.py", "__main__.py", "pl/", "benchmark/_report.py", "benchmark/_results.py")


# --- what a unit's numbers depend on -------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def code_hash() -> str:
    """Return a hash of the package's sources, except those that only draw and print."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).as_posix()
        if not inside.startswith(NO_NUMBER_DEPENDS_ON):
            digest.update(f"{inside}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions of sctraj and of the libraries on which its numbers depend."""
    from .. import __version__

    used = ("torch", "numpy", "scipy", "POT", "torchdiffeq", "anndata", "scanpy")
    return {"sctraj": __version__} | {name: version(name) for name in used}


def fingerprint(adata: AnnData, *, time_key: str, use_rep: str, labels: str | None = None) -> str:
    """Return a hash of everything that is read from cells: names, times, representation, expression, labels.

    Raises
    ------
    KeyError, ValueError
        As for `_adata.read_snapshots`, so that unusable data are refused before anything is computed.
    """
    from .. import _adata

    digest = hashlib.sha256(_adata.read_snapshots(adata, time_key, use_rep, least=3).fingerprint.encode())
    if labels is not None:
        if labels not in adata.obs:
            there = ", ".join(map(str, adata.obs)) or "none"
            raise KeyError(f'No column "{labels}" in adata.obs; there are: {there}. Pass one of them as labels.')
        digest.update("\n".join(adata.obs[labels].astype(str)).encode())
    if adata.X is not None and use_rep != "X":  # the strict form fits its components to it
        values: Any = adata.X
        parts = (values.indptr, values.indices, values.data) if hasattr(values, "indptr") else (np.asarray(values),)
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]


def key_of(unit: Any, context: Mapping[str, Any]) -> str:
    """Return the name under which a unit is stored: a hash of it and of everything that its numbers depend on.

    Parameters
    ----------
    unit
        A dataclass of numbers, text and tuples.
    context
        The data's fingerprint and everything else that is not part of the unit: how it is judged, on what, with how
        many threads.
    """
    described = {"unit": vars(unit), "context": dict(context), "versions": versions(), "code": code_hash()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]


# --- units ---------------------------------------------------------------------------------------------------------
class Store:
    """A folder of finished units.

    ``units/KEY.csv`` holds a unit's rows; ``units/KEY.json`` describes the unit and what it took; ``failed/KEY.json``
    holds the error of a failed unit, which the next run tries again; and ``claims/KEY.lock`` is locked by the run that
    is computing the unit.

    Parameters
    ----------
    folder
        Path of the folder, which is made if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for name in ("units", "failed", "claims"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def _at(self, kind: str, key: str, suffix: str) -> Path:
        return self.folder / kind / f"{key}{suffix}"

    def has(self, key: str) -> bool:
        """Return whether a unit is finished."""
        return self._at("units", key, ".csv").is_file()

    def claim(self, key: str) -> FileLock | None:
        """Return the lock of a unit, to be released once it is stored, or None if another run is computing it.

        The system releases the lock when the process ends, in whatever way.
        """
        lock = FileLock(self._at("claims", key, ".lock"), thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock

    def write(self, key: str, table: pd.DataFrame, record: Mapping[str, Any]) -> None:
        """Store a unit whose claim the caller holds."""
        write_durably(self._at("units", key, ".json"), json.dumps(dict(record), indent=1))
        write_durably(self._at("units", key, ".csv"), to_text(table))  # written last, as it marks the unit as finished
        self._at("failed", key, ".json").unlink(missing_ok=True)

    def read(self, key: str) -> pd.DataFrame:
        """Return a finished unit's rows."""
        return from_text(self._at("units", key, ".csv").read_text(encoding="utf-8"))

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Record the error of a unit whose claim the caller holds."""
        write_durably(self._at("failed", key, ".json"), json.dumps(dict(record), indent=1))

    def failure(self, key: str) -> dict[str, Any] | None:
        """Return the record of a failed unit, or None."""
        path = self._at("failed", key, ".json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all finished units, including those of earlier code and data."""
        found = sorted((self.folder / "units").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in found]

    def sweep(self, key: str) -> None:
        """Remove incomplete files that a killed run left of a unit whose claim the caller holds."""
        for kind in ("units", "failed"):
            for path in (self.folder / kind).glob(f".{key}.*.part"):
                path.unlink(missing_ok=True)
