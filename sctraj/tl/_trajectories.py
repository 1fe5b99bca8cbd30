"""Follow every cell along a fitted flow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from uuid import uuid4

import numpy as np
import torch

from .. import _adata
from .._log import logger
from .._memory import check_room, size_of
from ..flow.flow_matching import pick_device
from ..flow.integrate import Field, Moved, Solver
from ._field import check_module
from ._moves import Movement, check_score, movement, warn_of_strays
from ._seeds import seed_of
from ._steps import TOLERANCE, check_steps, near, warn_of_unused_steps

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn

    from ..flow.snapshots import Snapshots

DType = Literal["float32", "float16"]
SLAB = 2**28  # bytes of trajectories held at once on their way to a store
LARGEST_HALF = 2**14  # largest coordinate for float16, which leaves room for where the cell may go


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
    """Infer every cell's path over the whole time range, backwards and forwards from the time when it was sampled.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    times
        Number of times, evenly spaced from the first snapshot to the last. The snapshots' own times are added to them,
        so that every path passes through its cell and no interval is missed, however short. Or the times themselves,
        increasing and within that range; to these, none are added.
    stochastic
        Simulate the stochastic flow instead (``"sb-cfm"`` only), which gives one sample of each cell's path.
    solver
        ``"rk4"`` or ``"euler"`` on a fixed grid, or ``"dopri5"``.
    n_steps
        Steps of a fixed grid, or of the simulation, per mean gap between snapshots. None: 10 for rk4, whose paths then
        end within 0.02 % of the data's spread of where they end with 50, and 50 for Euler and for the simulation; ten
        times as many for a closed-form bridge (``"sb-cfm"``), whose velocities grow without bound towards the
        snapshots.
    tolerance
        Relative tolerance of ``"dopri5"``.
    module
        The user's own module, if the flow was fitted with one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator of the stochastic flow.
    dtype
        ``"float32"``, or ``"float16"``: half the size, with a precision of three digits.
    store
        Folder for trajectories that are too large for memory. It becomes a zarr group, written some cells at a time,
        with ``points``, ``times`` and, if the flow has growth, ``weights``; nothing is then written to ``obsm``.
        Earlier trajectories in the folder, of whatever flow, are replaced once the new ones are complete: the disk
        needs room for both until then, and after an error the earlier ones are still there. The noise of the stochastic
        flow is drawn for some cells at a time, so that the sample differs from the one without a store.
    key
        Name of the flow.
    copy
        Return a modified copy and leave `adata` unchanged.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. If more than a tenth of a snapshot's cells end up astray at another
    snapshot's time, that is, farther from its cells than any of these is from the others, this is logged. Sets:

    ``obsm[key + "_trajectories"]`` : float32, n_obs x n_times x d
        In units of the representation. At the cell's own time, if it is among the times, this is exactly where the cell
        was observed. ``anndata.concat(..., join="outer")`` with cells that lack this slot fails: delete it first, or
        pass a `store`.
    ``obsm[key + "_trajectory_weights"]`` : float32, n_obs x n_times
        What becomes of the cell's mass, relative to the mean over its snapshot's cells; only if the flow has growth.
    ``uns[key]["trajectory_times"]`` : float64, n_times
    ``uns[key]["trajectory_store"]``, ``uns[key]["trajectory_store_id"]`` : str
        The full path of the store, if there is one, and an identifier of its content; neither of the two slots in
        ``obsm`` is then set.

    Raises
    ------
    KeyError
        No such flow.
    ValueError
        Times outside the range; other cells than those fitted; a flow without the score that is needed; trajectories
        larger than the free memory, or the free disk space; a store that holds something else.
    TypeError
        `module` is not an instance of ``torch.nn.Module``.
    ImportError
        A store is requested but zarr is not installed.
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
        """Write all paths into an array or a store; return the cells' weights, if the flow has growth."""
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


Fill = Callable[[Any], np.ndarray | None]  # writes all paths; returns the cells' weights, if the flow has growth


def _in_memory(key: str, shape: tuple[int, int, int], dtype: str, fill: Fill) -> dict[str, np.ndarray]:
    """Return the paths and any weights, by the names of their slots."""
    points = np.empty(shape, dtype)
    found = {_adata.TRAJECTORIES: points, _adata.WEIGHTS: fill(points)}
    return {slot.format(key=key): values for slot, values in found.items() if values is not None}


def _in_store(
    store: str, adata: AnnData, grid: np.ndarray, shape: tuple[int, int, int], dtype: str, fill: Fill
) -> dict[str, Any]:
    """Write paths and weights into a zarr group; return the entries by which the flow's record refers to it."""
    record = {_adata.STORE: os.path.abspath(store), _adata.STORE_ID: uuid4().hex}
    with _adata.replaced(Path(store)) as group:
        weights = fill(_adata.add_array(group, "points", shape, dtype))
        if weights is not None:
            _adata.add_array(group, "weights", shape[:2], "float32")[:] = weights
        _adata.add_array(group, "times", (len(grid),), "float64")[:] = grid
        group.attrs.update({"id": record[_adata.STORE_ID], "cells": _adata.names_digest(adata)})
    return record


def _weights(cells: _adata.Cells, log_mass: np.ndarray) -> np.ndarray:
    """Return masses relative to their snapshot's mean, since growth is known only up to the population's total."""
    for rows in cells.index:
        log_mass[rows] = torch.from_numpy(log_mass[rows]).softmax(0).numpy() * len(rows)
    return log_mass


def _put(adata: AnnData, key: str, slots: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Write the slots and the flow's record, replacing everything that earlier trajectories left there."""
    for slot in (_adata.TRAJECTORIES, _adata.WEIGHTS):
        adata.obsm.pop(slot.format(key=key), None)
    for slot in (_adata.STORE, _adata.STORE_ID):
        adata.uns[key].pop(slot, None)
    for slot, values in slots.items():
        adata.obsm[slot] = values
    adata.uns[key].update(record)


def _follow(cells: _adata.Cells, field: Field, grid: np.ndarray, move: Movement, out: Any) -> np.ndarray:
    """Write every cell's path into ``out`` ``(n_obs, n_times, d)``; return the log factor by which its mass changes.

    An array is filled at once; a store some cells at a time, and only those are in memory.
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
    """Raise a ValueError if coordinates are too large for float16."""
    largest = max(float(end.abs()) for x in snapshots.points for end in x.aminmax())
    if largest > LARGEST_HALF:
        raise ValueError(
            f"expected coordinates of at most {LARGEST_HALF} for dtype='float16', which ends at 65504, found "
            f"{largest:.3g}; pass 'float32'"
        )


def _check_size(shape: tuple[int, int, int], dtype: str, store: str | None) -> None:
    """Raise a ValueError if the trajectories do not fit into the free memory or, with a store, on the disk."""
    needed = size_of(shape, dtype) + size_of(shape[:2], "float32")  # with the weights
    cells, times, d = shape
    half = "" if dtype == "float16" else "dtype='float16' (half the size), "
    elsewhere = "store=FOLDER (on disk)" if store is None else "a store on a larger disk"
    check_room(
        "trajectories",
        f"{cells} cells x {times} times x {d} dimensions in {dtype}",
        needed,
        f"pass fewer times, {half}or {elsewhere}, or fit the flow to a part of the cells",
        store=None if store is None else Path(store),
    )


def _time_grid(times: int | Sequence[float], snapshots: Sequence[float]) -> np.ndarray:
    """Check and return the requested times; a number stands for so many even ones and the snapshots' own."""
    first, last = snapshots[0], snapshots[-1]
    if isinstance(times, (int, np.integer)) and not isinstance(times, bool):
        if times < 2:
            raise ValueError(f"expected at least two times, found {times}")
        own, even = np.array(snapshots), np.linspace(first, last, int(times))
        apart = np.abs(even[:, None] - own).min(axis=1) > 1e-9 * (last - first)  # nearer ones differ by rounding only
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
    asked = grid
    if grid.ndim == 1:
        beside = [near(t, snapshots) for t in grid]
        grid = np.array([t if k is None else snapshots[k] for t, k in zip(grid, beside)])
    increasing = grid.ndim == 1 and len(grid) and (np.diff(asked) > 0).all()
    if not increasing or not first <= grid[0] <= grid[-1] <= last:
        raise ValueError(
            f"expected increasing times from {first:g} to {last:g}, the snapshots' range, found {asked.tolist()}; "
            f"beyond it the flow was never trained"
        )
    return np.unique(grid)  # a snapshot's own time once, whichever near it were asked for


def _path(
    field: Field,
    points: torch.Tensor,
    own: float,
    grid: np.ndarray,
    move: Movement,
) -> Moved:
    """Return the cells of one snapshot at every time of the grid, ``(n, n_times, d)``, and their log mass."""
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
