"""How the cells of a stored flow are moved, and whether they keep to the cells that were sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import _adata
from .._log import logger
from ..flow.clouds import share_astray
from ..flow.integrate import Field, Integration, Moved, Solver, simulate, transport
from ._steps import steps_between, steps_per_gap

Movement = Callable[[torch.Tensor, float, float], Moved]  # of cells (M, n, d), from one real time to another
LOOKED_AT = 1000  # cells of a snapshot, at most, whose paths are looked at for whether they keep to the cells
ASTRAY = 0.1  # share of them that is said


def movement(
    flow: _adata.StoredFlow,
    field: Field,
    solver: Solver,
    n_steps: int | None,
    tolerance: float,
    *,
    stream: torch.Generator | None = None,
) -> Movement:
    """Return what moves cells by a flow's field, or by its members' mean.

    Parameters
    ----------
    flow, field
        The flow as stored, and its field or the mean of its members.
    solver, n_steps, tolerance
        As in `sctraj.tl.trajectories`: steps per mean gap, None for the default.
    stream
        Simulate the stochastic flow with this noise instead; masses are then left as they are.
    """
    stochastic, gap = stream is not None, flow.cells.snapshots.mean_gap
    stiff = flow.params["field"] == "closed-form" and field.has_score
    per_gap = steps_per_gap(solver, stochastic=stochastic, stiff=stiff) if n_steps is None else n_steps

    def move(x: torch.Tensor, t0: float, t1: float) -> Moved:
        steps = steps_between(per_gap, t0, t1, gap)
        if stream is None:
            return transport(field, x, t0, t1, Integration(solver, steps, tolerance))
        there = simulate(field, x, t0, t1, sigma=float(flow.params["sigma"]), n_steps=steps, rng=stream)
        return Moved(there, torch.zeros_like(there[..., 0]))

    return move


def check_score(flow: _adata.StoredFlow, asked: str) -> None:
    """Raise a ValueError where the stochastic flow is asked for, and the field has no score."""
    if not flow.vector_field.has_score:
        raise ValueError(
            f"expected a flow with a score for {asked}, found one by {flow.params['method']}; fit with method='sb-cfm'"
        )


def warn_of_strays(cells: _adata.Cells, grid: np.ndarray, points: Any) -> None:
    """Log where many paths end beside the cells that were sampled there, by some cells of each snapshot.

    Paths ``(n_obs, n_times, d)``, an array or a store, end at the first and the last of the snapshots' times in the
    grid: who leaves the cells seldom comes back.
    """
    snapshots = cells.snapshots
    some = [np.unique(np.linspace(0, len(x) - 1, min(len(x), LOOKED_AT)).astype(int)) for x in snapshots.points]
    seen = [k for k, t in enumerate(snapshots.times) if t in grid]
    found = []
    for k, (index, chosen) in enumerate(zip(cells.index, some)):
        rows = np.sort(index[chosen])
        paths = points[rows] if isinstance(points, np.ndarray) else points.oindex[rows]
        for end in {*seen[:1], *seen[-1:]} - {k}:
            column = np.searchsorted(grid, snapshots.times[end])
            moved = torch.from_numpy(paths[:, column].astype(np.float64))
            found.append((share_astray(moved, snapshots.points[end][some[end]]), snapshots.times[k], grid[column]))
    share, t0, t1 = max(found, default=(0.0, 0.0, 0.0))
    if share > ASTRAY:
        logger.warning(
            f"{share:.0%} of the cells of time {t0:g} arrive at time {t1:g} where no cells were sampled: do not rely "
            f"on paths or fates over so long a time, but over a shorter one"
        )
