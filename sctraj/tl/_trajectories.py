"""Follow every cell along a fitted flow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from uuid import uuid4

import numpy as np
import torch

from .. import _adata, _memory
from .._log import logger
from .._memory import size_of
from ..flow.flow_matching import pick_device
from ..flow.integrate import Field, Moved, Solver
from ._field import check_module
from ._moves import Movement, check_score, movement, warn_of_strays
from ._seeds import seed_of
from ._steps import TOLERANCE, check_steps, warn_of_unused_steps

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn

    from ..flow.snapshots import Snapshots

DType = Literal["float32", "float16"]
SLAB = 2**28  # bytes of trajectories held at once on their way to a store
LARGEST_HALF = 2**14  # a coordinate that float16 takes, with room for where its cell may go


def trajectories(
    adata: AnnData,
    times: int | Sequence[float] = 20,
    *,
    stochastic: bool = False,
    solver: Solver = "rk4",
    n_steps: int | None = None,
    tolerance: float = TOLERANCE,
    module: nn.Module | None = None,
    device: str = "auto",
    rng: int | np.random.Generator = 0,
    dtype: DType = "float32",
    store: str | None = None,
    key: str = "flow",
    copy: bool = False,
) -> AnnData | None:
    """Infer every cell's own path over the whole time range, backwards and forwards from the time it was sampled at.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    times
        How many times, evenly spread from the first snapshot to the last, to which the snapshots' own times are added:
        every path passes its cell, and all intervals are seen, however short. Or the times themselves, increasing and
        within that range, to which none are added.
    stochastic
        Simulate the stochastic flow instead (``"sb-cfm"`` only): one sample of each cell's path.
    solver
        ``"rk4"`` or ``"euler"`` on a fixed grid, or ``"dopri5"``.
    n_steps
        Steps of a fixed grid, and of the simulation, per mean gap between snapshots. None: 10 of rk4, which end
        within 0.02 % of the data's spread of where 50 do, and 50 of Euler and of the simulation; ten times as many of a
        closed-form bridge (``"sb-cfm"``), whose velocities grow without bound towards the snapshots.
    tolerance
        Of ``"dopri5"``, relative.
    module
        The user's own module, if the flow was fitted with one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator of the stochastic flow.
    dtype
        ``"float32"``, or ``"float16"``: half the size, three digits.
    store
        Folder for the trajectories where they are too large for memory: a zarr group, written some cells at a time,
        with ``points``, ``times`` and, where the flow grows, ``weights``; ``obsm`` then stays without them. Earlier
        trajectories in it, of whatever flow, are replaced once the new ones are complete: until then there is room on
        the disk for both, and an error leaves the earlier ones. The stochastic flow's noise is drawn for some cells at
        a time, so that the sample is another one than without a store.
    key
        Name of the flow.
    copy
        Return a changed copy and leave `adata` alone.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Where more than a tenth of a snapshot's cells end up, by another snapshot's
    time, farther from its cells than any of these is from the others, that is logged. Sets:

    ``obsm[key + "_trajectories"]`` : float32, n_obs x n_times x d
        In units of the representation; at a cell's own time, where it is among the times, exactly where it was
        observed. ``anndata.concat(..., join="outer")`` with cells that lack it fails: delete it first, or pass a
        `store`.
    ``obsm[key + "_trajectory_weights"]`` : float32, n_obs x n_times
        What has become of the cell's mass, relative to the mean over the cells of its snapshot; where the flow grows.
    ``uns[key]["trajectory_times"]`` : float64, n_times
    ``uns[key]["trajectory_store"]``, ``uns[key]["trajectory_store_id"]`` : str
        The store's full path, if there is one, and what tells its content from any other; neither of the two in
        ``obsm`` is then set.

    Raises
    ------
    KeyError
        No such flow.
    ValueError
        Times outside the range; other cells than those fitted; no score where one is needed; trajectories larger than
        the memory, or the disk, that is free; a store that holds something else.
    TypeError
        A module that is none.
    ImportError
        A store, without zarr.
    """
    if dtype not in get_args(DType):
        raise ValueError(f"expected a dtype of {' or '.join(get_args(DType))}, found {dtype!r}")
    check_module(module)
    _adata.check_own(adata, copy=copy)
    where = pick_device(device)
    seed = seed_of(rng)
    check_steps(solver, 1 if n_steps is None else n_steps, tolerance)
    warn_of_unused_steps(solver, n_steps, tolerance, default=TOLERANCE, stochastic=stochastic)
    flow = _adata.read_flow(adata, key, module=module)
    snapshots = flow.cells.snapshots
    grid = _time_grid(times, snapshots.times)
    field = flow.vector_field.to(where).ensemble()
    if stochastic:
        check_score(flow, "stochastic=True")
    shape = (flow.cells.n_obs, len(grid), snapshots.dimension)
    _check_size(shape, dtype, store)
    if dtype == "float16":
        _check_half(snapshots)
    if store is not None:
        _adata.check_replaceable(Path(store))
    move = movement(
        flow, field, solver, n_steps, tolerance, stream=torch.Generator().manual_seed(seed) if stochastic else None
    )

    def fill(points: Any) -> np.ndarray | None:
        """Write all paths into an array or a store; return the cells' weights, where the flow grows."""
        log_mass = _follow(flow.cells, field, grid, move, points)
        warn_of_strays(flow.cells, grid, points)
        return _weights(flow.cells, log_mass) if flow.vector_field.grows and not stochastic else None

    slots, record = {}, {"trajectory_times": grid}
    if store is None:
        slots = _in_memory(key, shape, dtype, fill)
        written = ", ".join(f'obsm["{slot}"]' for slot in slots)
    else:
        record |= _in_store(store, adata, grid, shape, dtype, fill)
        written = str(record[_adata.STORE])
    adata = _adata.own(adata, copy=copy)
    _put(adata, key, slots, record)
    logger.info(
        f"trajectories of {flow.cells.n_obs} cells at {len(grid)} times from {grid[0]:g} to {grid[-1]:g}"
        f'{", stochastic" if stochastic else ""}; wrote {written}, uns["{key}"]["trajectory_times"]'
    )
    return adata if copy else None


Fill = Callable[[Any], np.ndarray | None]  # writes all paths; returns the cells' weights, where the flow grows


def _in_memory(key: str, shape: tuple[int, int, int], dtype: str, fill: Fill) -> dict[str, np.ndarray]:
    """Return paths, and weights where there are some, by the names of their slots."""
    points = np.empty(shape, dtype)
    found = {_adata.TRAJECTORIES: points, _adata.WEIGHTS: fill(points)}
    return {slot.format(key=key): values for slot, values in found.items() if values is not None}


def _in_store(
    store: str, adata: AnnData, grid: np.ndarray, shape: tuple[int, int, int], dtype: str, fill: Fill
) -> dict[str, Any]:
    """Write paths and weights into a zarr group; return what the flow keeps of where it is."""
    record = {_adata.STORE: os.path.abspath(store), _adata.STORE_ID: uuid4().hex}
    with _adata.replaced(Path(store)) as group:
        weights = fill(_adata.add_array(group, "points", shape, dtype))
        if weights is not None:
            _adata.add_array(group, "weights", shape[:2], "float32")[:] = weights
        _adata.add_array(group, "times", (len(grid),), "float64")[:] = grid
        group.attrs.update({"id": record[_adata.STORE_ID], "cells": _adata.names_digest(adata)})
    return record


def _weights(cells: _adata.Cells, log_mass: np.ndarray) -> np.ndarray:
    """Return masses relative to their snapshot's mean: growth is known up to the population's total alone."""
    for rows in cells.index:
        log_mass[rows] = torch.from_numpy(log_mass[rows]).softmax(0).numpy() * len(rows)
    return log_mass


def _put(adata: AnnData, key: str, slots: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Write the slots, and into the flow's record, in place of all that earlier trajectories left there."""
    for slot in (_adata.TRAJECTORIES, _adata.WEIGHTS):
        adata.obsm.pop(slot.format(key=key), None)
    for slot in (_adata.STORE, _adata.STORE_ID):
        adata.uns[key].pop(slot, None)
    for slot, values in slots.items():
        adata.obsm[slot] = values
    adata.uns[key].update(record)


def _follow(cells: _adata.Cells, field: Field, grid: np.ndarray, move: Movement, out: Any) -> np.ndarray:
    """Write every cell's path into ``out`` ``(n_obs, n_times, d)``; return what its mass is multiplied by, as a log.

    An array is filled at once; a store some cells at a time, which are then all that is in memory.
    """
    n, n_times, d = out.shape
    stored = not isinstance(out, np.ndarray)
    at_once = max(1, SLAB // size_of((n_times, d), "float32")) if stored else n
    log_mass = np.empty((n, n_times), np.float32)
    for start in range(0, n, at_once):
        stop = min(n, start + at_once)
        part = np.empty((stop - start, n_times, d), out.dtype) if stored else out
        for t, points, index in zip(cells.snapshots.times, cells.snapshots.points, cells.index):
            inside = slice(*np.searchsorted(index, (start, stop)))
            if inside.start < inside.stop:
                path, rows = _path(field, points[inside], t, grid, move), index[inside]
                part[rows - start], log_mass[rows] = path.points.cpu().numpy(), path.log_mass.cpu().numpy()
        if stored:
            out[start:stop] = part
    return log_mass


def _check_half(snapshots: Snapshots) -> None:
    """Raise a ValueError for coordinates that float16 cannot hold."""
    largest = max(float(end.abs()) for x in snapshots.points for end in x.aminmax())
    if largest > LARGEST_HALF:
        raise ValueError(
            f"expected coordinates of at most {LARGEST_HALF} for dtype='float16', which ends at 65504, found "
            f"{largest:.3g}; pass 'float32'"
        )


def _check_size(shape: tuple[int, int, int], dtype: str, store: str | None) -> None:
    """Raise a ValueError where the trajectories would fill the memory, or the store the disk."""
    needed = size_of(shape, dtype) + size_of(shape[:2], "float32")  # with the weights
    if store is None:
        there, what = _memory.available_memory(), "memory"
    else:
        beside = next(folder for folder in Path(store).resolve().parents if folder.exists())
        there, what = shutil.disk_usage(beside).free, "disk"
    if there is not None and needed > there:
        cells, times, d = shape
        half = "" if dtype == "float16" else "dtype='float16' (half the size), "
        elsewhere = "store=FOLDER (on disk)" if store is None else "a store on a larger disk"
        raise ValueError(
            f"expected trajectories that fit into the {there / 2**30:.1f} GiB of {what} that are free, found "
            f"{cells} cells x {times} times x {d} dimensions in {dtype}, {needed / 2**30:.1f} GiB; pass fewer times, "
            f"{half}or {elsewhere}, or fit the flow to a part of the cells"
        )


def _time_grid(times: int | Sequence[float], snapshots: Sequence[float]) -> np.ndarray:
    """Return the times asked for, checked; a number of them stands for so many even ones and the snapshots' own."""
    first, last = snapshots[0], snapshots[-1]
    if isinstance(times, (int, np.integer)) and not isinstance(times, bool):
        if times < 2:
            raise ValueError(f"expected at least two times, found {times}")
        own, even = np.array(snapshots), np.linspace(first, last, int(times))
        apart = np.abs(even[:, None] - own).min(axis=1) > 1e-9 * (last - first)  # else off by rounding alone
        return np.sort(np.concatenate([own, even[apart]]))
    try:
        grid = np.asarray(times, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected times that are numbers, in the unit of the snapshots' times, found {times!r}; labels stand for "
            f"times in the uns entry that `sctraj.pp.parse_time` wrote"
        ) from error
    if grid.ndim == 0:
        raise ValueError(f"expected a whole number of times, or the times themselves as a sequence, found {times!r}")
    if grid.ndim != 1 or not len(grid) or not (np.diff(grid) > 0).all() or not first <= grid[0] <= grid[-1] <= last:
        raise ValueError(
            f"expected increasing times from {first:g} to {last:g}, the snapshots' range, found {grid.tolist()}; "
            f"beyond it the flow was never trained"
        )
    return grid


def _path(
    field: Field,
    points: torch.Tensor,
    own: float,
    grid: np.ndarray,
    move: Movement,
) -> Moved:
    """Return one snapshot's cells at every time of the grid, ``(n, n_times, d)``, and their log mass."""
    start = points.to(field.scale)[None]  # (1, n, d)
    out = start.new_empty(start.shape[1], len(grid), start.shape[2])
    log_mass = start.new_zeros(start.shape[1], len(grid))
    for direction in (1, -1):
        x, gained, t = start, start.new_zeros(start.shape[1]), own
        for k in range(len(grid))[::direction]:
            if direction * (grid[k] - own) >= 0:
                if grid[k] != t:
                    moved = move(x, t, float(grid[k]))
                    x, gained, t = moved.points, gained + moved.log_mass[0], float(grid[k])
                out[:, k], log_mass[:, k] = x[0], gained
    return Moved(out, log_mass)
