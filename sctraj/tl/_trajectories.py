"""Follow every cell along a fitted flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import _adata
from .._log import logger
from ..flow.flow_matching import pick_device
from ..flow.integrate import Field, Moved, Solver, simulate, transport
from ._seeds import seed_of

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn


def trajectories(
    adata: AnnData,
    times: int | Sequence[float] = 20,
    *,
    stochastic: bool = False,
    solver: Solver = "rk4",
    n_steps: int = 50,
    tolerance: float = 1e-4,
    module: nn.Module | None = None,
    device: str = "auto",
    rng: int | np.random.Generator = 0,
    key: str = "flow",
    copy: bool = False,
) -> AnnData | None:
    """Infer every cell's own path over the whole time range, backwards and forwards from the time it was sampled at.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    times
        How many times, evenly spread from the first snapshot to the last, or the times themselves, increasing and
        within that range.
    stochastic
        Simulate the stochastic flow instead (``"sb-cfm"`` only): one sample of each cell's path.
    solver
        ``"rk4"`` or ``"euler"`` on a fixed grid, or ``"dopri5"``.
    n_steps
        Steps of a fixed grid, and of the simulation, per mean gap between snapshots.
    tolerance
        Of ``"dopri5"``, relative.
    module
        The user's own module, if the flow was fitted with one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator of the stochastic flow.
    key
        Name of the flow.
    copy
        Return a changed copy and leave `adata` alone.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Sets:

    ``obsm[key + "_trajectories"]`` : float32, n_obs x n_times x d
        In units of the representation; at a cell's own time exactly where it was observed.
    ``obsm[key + "_trajectory_weights"]`` : float32, n_obs x n_times
        What has become of the cell's mass, relative to the mean over the cells of its snapshot; where the flow grows.
    ``uns[key]["trajectory_times"]`` : float64, n_times

    Raises
    ------
    KeyError
        No such flow.
    ValueError
        Times outside the range; other cells than those fitted; no score where one is needed.
    """
    where = pick_device(device)
    seed = seed_of(rng)
    if solver not in ("euler", "rk4", "dopri5") or n_steps != int(n_steps) or n_steps < 1 or not tolerance > 0:
        raise ValueError(
            f"expected a solver of euler, rk4, dopri5, n_steps of at least 1 and a positive tolerance, found "
            f"{solver!r}, {n_steps}, {tolerance}"
        )
    flow = _adata.read_flow(adata, key, module=module)
    snapshots = flow.cells.snapshots
    grid = _time_grid(times, snapshots.times)
    field = flow.vector_field.to(where).ensemble()
    if stochastic and not field.has_score:
        raise ValueError(
            f"expected a flow with a score for stochastic=True, found one by {flow.params['method']}; fit with "
            f"method='sb-cfm'"
        )
    stream = torch.Generator().manual_seed(seed)

    def move(x: torch.Tensor, t0: float, t1: float) -> Moved:
        steps = max(1, math.ceil(n_steps * abs(t1 - t0) / snapshots.mean_gap))
        if stochastic:
            there = simulate(field, x, t0, t1, sigma=float(flow.params["sigma"]), n_steps=steps, rng=stream)
            return Moved(there, torch.zeros_like(there[..., 0]))
        return transport(field, x, t0, t1, solver=solver, n_steps=steps, tolerance=tolerance)

    paths = [_path(field, points, t, grid, move) for t, points in zip(snapshots.times, snapshots.points)]
    adata = _adata.own(adata, copy=copy)
    name, weights = _adata.TRAJECTORIES.format(key=key), _adata.WEIGHTS.format(key=key)
    adata.obsm[name] = _adata.write_by_cell(flow.cells, [path.points.cpu().numpy() for path in paths])
    written = f'obsm["{name}"]'
    adata.obsm.pop(weights, None)
    if flow.vector_field.grows and not stochastic:
        # relative to the mean of the snapshot's cells: growth is known up to the population's total alone
        shares = [path.log_mass.softmax(0).cpu().numpy() * len(path.log_mass) for path in paths]
        adata.obsm[weights] = _adata.write_by_cell(flow.cells, shares)
        written += f', obsm["{weights}"]'
    adata.uns[key]["trajectory_times"] = grid
    logger.info(
        f"trajectories of {flow.cells.n_obs} cells at {len(grid)} times from {grid[0]:g} to {grid[-1]:g}"
        f'{", stochastic" if stochastic else ""}; wrote {written}, uns["{key}"]["trajectory_times"]'
    )
    return adata if copy else None


def _time_grid(times: int | Sequence[float], snapshots: Sequence[float]) -> np.ndarray:
    """Return the times asked for, checked."""
    first, last = snapshots[0], snapshots[-1]
    if isinstance(times, (int, np.integer)) and not isinstance(times, bool):
        if times < 2:
            raise ValueError(f"expected at least two times, found {times}")
        return np.linspace(first, last, int(times))
    grid = np.asarray(times, dtype=np.float64)
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
    move: Callable[[torch.Tensor, float, float], Moved],
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
