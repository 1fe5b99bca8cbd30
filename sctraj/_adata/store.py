"""Store trajectories in a zarr group on disk, complete or not at all, and read them for the cells they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from .._memory import check_room, size_of
from .cells import names_digest
from .slots import STORE

if TYPE_CHECKING:
    from anndata import AnnData

CHUNK = 2**20  # bytes of a chunk
OURS = {"sctraj": "trajectories"}  # attribute of a group, without which it is not overwritten


def check_replaceable(path: Path) -> None:
    """Raise if zarr is not installed, or if the folder holds something else than earlier trajectories."""
    try:
        import zarr
    except ImportError as error:
        raise ImportError("expected zarr for store=..., found none; pip install zarr") from error
    if path.exists():
        try:
            ours = dict(zarr.open_group(str(path), mode="r").attrs).items() >= OURS.items()
        except (OSError, KeyError, ValueError):  # zarr's own are ValueErrors or OSErrors, by its version
            ours = False
        if not ours:
            raise ValueError(
                f"expected a store that is not there yet or holds trajectories, found something else at {path}; pass "
                f"another, or remove it"
            )


@contextmanager
def replaced(path: Path) -> Iterator[Any]:
    """Provide a new zarr group next to a folder, and replace the folder by it once it is complete."""
    import zarr

    path = path.resolve()  # so that a symbolic link is kept
    new, old = (path.with_name(f".{path.name}.{uuid4().hex}.{what}") for what in ("part", "old"))
    try:
        group = zarr.open_group(str(new), mode="w")
        group.attrs.update(OURS)
        yield group
        if path.exists():
            path.rename(old)  # a folder cannot be renamed onto one that is not empty
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def add_array(group: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Create an array in a group, in chunks of whole rows."""
    create = getattr(group, "create_array", None) or group.create_dataset  # zarr 3, zarr 2
    rows = min(shape[0], max(1, CHUNK // size_of(shape[1:], dtype)))
    return create(name, shape=shape, chunks=(rows, *shape[1:]), dtype=dtype)


def read_stored(adata: AnnData, key: str, where: str, identity: Any, rows: Any) -> np.ndarray:
    """Return trajectories of all or some rows from a flow's group; raise a ValueError if it is not this flow's."""
    import zarr

    try:
        group = zarr.open_group(where, mode="r")
        points: Any = group["points"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f'Expected trajectories in {where}, which uns["{key}"]["{STORE}"] names, found none. Move the folder back, '
            f"or call sctraj.tl.trajectories(adata) again."
        ) from error
    if group.attrs.get("id") != identity:
        raise ValueError(
            f'Expected the trajectories of uns["{key}"] in {where}, found others, computed later or by another flow. '
            f"Call sctraj.tl.trajectories again, with a store that no other flow writes to."
        )
    if points.shape[0] != adata.n_obs:
        raise ValueError(
            f"Expected the trajectories of {adata.n_obs} cells in {where}, found {points.shape[0]}: those of the "
            f"AnnData that this one is a part of. Take the rows from that one."
        )
    names = names_digest(adata)
    if group.attrs.get("cells", names) != names:  # older stores lack this attribute
        raise ValueError(
            f"Expected the trajectories of these {adata.n_obs} cells in {where}, found others, or the same ones in "
            f"another order. Take the rows from the AnnData they were computed for."
        )
    shape = (points.shape[0] if isinstance(rows, slice) else len(rows), *points.shape[1:])
    asked = "{} cells x {} times x {} dimensions".format(*shape)
    check_room("trajectories", asked, size_of(shape, str(points.dtype)), "pass rows=... for some of the cells")
    return np.asarray(points[rows] if isinstance(rows, slice) else points.oindex[np.asarray(rows)])
