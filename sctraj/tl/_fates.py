"""Which groups of cells every cell ends in, or came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from .. import _adata
from .._log import logger
from .._memory import size_of
from ..flow.clouds import evenly
from ..flow.flow_matching import pick_device
from ..flow.integrate import Field, Solver
from ._doubts import doubt_groups
from ._field import check_module
from ._moves import Movement, check_score, movement, warn_of_strays
from ._seeds import seed_of
from ._steps import TOLERANCE, check_steps, check_whole, near, warn_of_unused_steps

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from torch import nn

SLAB = 2**28  # bytes of moved cells held at once
MOST_ASKED = 20_000  # cells of a snapshot, evenly chosen, among which nearest ones are sought


def fates(
    adata: AnnData,
    groupby: str,
    time: float | None = None,
    *,
    n_neighbors: int = 15,
    n_draws: int | None = None,
    solver: Solver = "rk4",
    n_steps: int | None = None,
    tolerance: float = TOLERANCE,
    module: nn.Module | None = None,
    device: str = "auto",
    rng: int | np.random.Generator = 0,
    key: str = "flow",
    copy: bool = False,
) -> AnnData | None:
    """Infer in which groups of the cells sampled at one time every other cell ends, or from which it came.

    Every cell is moved along the flow from its own time to that one, forwards (its fate) or backwards (its ancestry),
    to see which groups the sampled cells nearest to where it arrives belong to. The shares of the groups among these
    are then averaged over the cells of its own snapshot that are nearest to it: measured coordinates are noisy, and
    where fates part, a little noise decides which way a single cell is carried. They are averaged over the members of
    the flow, too.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    groupby
        Column of ``obs`` with groups of cells, such as cell types or clusters. Only the cells of `time` need a group;
        those of them without one are passed over.
    time
        A snapshot's time; None is the last one's. A flow holds the fates of one time: those of another take their
        place, so keep what `sctraj.get.fates` returns.
    n_neighbors
        How many nearest cells are averaged over, at either end (all cells, if there are fewer). With more of them
        probabilities are smoother and more cautious, and groups that are smaller than this are blurred. In snapshots of
        more than 20,000 cells, 20,000 evenly chosen ones are searched.
    n_draws
        Follow so many samples of every cell's path in the stochastic flow instead (``"sb-cfm"`` only).
    solver, n_steps, tolerance
        As in `sctraj.tl.trajectories`.
    module
        The user's own module, if the flow was fitted with one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator of the stochastic flow.
    key
        Name of the flow.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. A warning is logged if more than a tenth of a snapshot's cells arrive
    farther from the cells of `time` than any of these is from the others. Sets, for `sctraj.get.fates`:

    ``obsm[key + "_fates"]`` : float32, n_obs x groups
        Probabilities, which sum to one over the groups. For the cells of `time` that of their own group is one; they
        are NaN for those without a group. They are the cell's own and not its offspring's: for what becomes of a
        growing population, weigh its cells by what `sctraj.tl.trajectories` writes for that time,
        ``obsm[key + "_trajectory_weights"]``.
    ``uns[key]["fates"]`` : dict
        ``groupby``, ``time``, ``groups`` and ``n_neighbors``.

    Raises
    ------
    KeyError
        No such flow, or no such column.
    ValueError
        A `time` that is not a snapshot's; a column without groups at that time, or with measured numbers; other cells
        than those fitted; no score where one is needed; a slot that something else holds; unusable numbers.
    TypeError
        `module` is not an instance of ``torch.nn.Module``.

    Notes
    -----
    The fate of a single cell is a stronger claim than where a population goes, which is all that
    `sctraj.tl.leave_one_out` can check. A group that grows can look like one that cells move to: on simulated courses
    on which half of the first cells end on either side and one side then outgrows the other, .85 to .93 of them are
    found to be bound for the side that grows (.81 to .91 by a flow in a moving frame), and .60 to .69 if the flow was
    given a noisy prior of growth. Nor can fates be found that are decided before they show in the coordinates. See
    "Fates beside the truth" in the documentation.
    """
    check_module(module)
    _adata.check_own(adata, copy=copy)
    check_whole("n_neighbors", n_neighbors)
    if n_draws is not None:
        check_whole("n_draws", n_draws)
    _adata.check_fates(adata, key)
    where = pick_device(device)
    seed = seed_of(rng)
    check_steps(solver, 1 if n_steps is None else n_steps, tolerance)
    warn_of_unused_steps(solver, n_steps, tolerance, default=TOLERANCE, stochastic=n_draws is not None)
    flow = _adata.read_flow(adata, key, module=module)
    end = _snapshot_at(time, flow.cells.snapshots.times)
    labels = _adata.read_groups(adata, groupby).iloc[flow.cells.index[end]]
    labels = labels.cat.remove_unused_categories()
    at = f"{flow.cells.snapshots.times[end]:g}"
    if not len(labels.cat.categories):
        raise ValueError(
            f'expected cells of time {at} with a group in obs["{groupby}"], found none; pass another time or column'
        )
    if n_draws is not None:
        check_score(flow, f"n_draws={n_draws}")
    doubt_groups(labels, int(n_neighbors), groupby, at)

    field = flow.vector_field.to(where)
    stream = None if n_draws is None else torch.Generator().manual_seed(seed)
    move = movement(flow, field, solver, n_steps, tolerance, stream=stream)
    found, ends = _followed(flow.cells, field, move, end, labels, int(n_neighbors), int(n_draws or 1))
    warn_of_strays(flow.cells, np.array([flow.cells.snapshots.times[end]]), ends[:, None])

    slot = _adata.FATES.format(key=key)
    adata = _adata.own(adata, copy=copy)
    adata.obsm[slot] = found
    adata.uns[key]["fates"] = {
        "groupby": groupby,
        "time": flow.cells.snapshots.times[end],
        "groups": np.array([str(group) for group in labels.cat.categories], dtype=object),
        "n_neighbors": int(n_neighbors),
    }
    sizes = ", ".join(f"{group} {n}" for group, n in labels.value_counts().items())
    what = "ancestry" if end == 0 else "fates" if end == len(flow.cells.index) - 1 else "fates and ancestry"
    logger.info(
        f'{what} at time {at} by obs["{groupby}"] (cells: {sizes}; without a group {int(labels.isna().sum())}): wrote '
        f'obsm["{slot}"], uns["{key}"]["fates"]'
    )
    return adata if copy else None


def _followed(
    cells: _adata.Cells,
    field: Field,
    move: Movement,
    end: int,
    labels: pd.Series,
    n_neighbors: int,
    n_draws: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities ``(n_obs, groups)``, and where each cell's first member and draw end, ``(n_obs, d)``."""
    codes, groups = labels.cat.codes.to_numpy(), len(labels.cat.categories)
    own = np.eye(groups, dtype=np.float32)[codes]
    own[codes < 0] = np.nan
    there, to = cells.snapshots.points[end].numpy(), cells.snapshots.times[end]
    known = np.flatnonzero(codes >= 0)
    members, d = len(field.scale), there.shape[1]
    # beside points, of each the numbers of its neighbours, how far they are, and their shares
    at_once = max(1, SLAB // size_of((n_draws, members, d + 2 * groups + 4 * n_neighbors), "float32"))

    probabilities, ends = [], []
    for k, (t, points) in enumerate(zip(cells.snapshots.times, cells.snapshots.points)):
        if k == end:
            probabilities.append(own)
            ends.append(there)
            continue
        shares, first = [], []
        for part in points.split(at_once):
            start = part.to(field.scale).expand(members, *part.shape)
            moved = torch.stack([move(start, t, to).points for _ in range(n_draws)]).flatten(0, 1).cpu().numpy()
            first.append(moved[0])
            nearest = _nearest(moved.reshape(-1, d), there[known], n_neighbors)
            votes = _means(own[known], nearest)  # (draws x members x cells, groups)
            shares.append(votes.reshape(len(moved), len(part), groups).mean(0))
        alike = _nearest(points.numpy(), points.numpy(), n_neighbors)
        probabilities.append(_means(np.concatenate(shares), alike))
        ends.append(np.concatenate(first))
    return _adata.write_by_cell(cells, probabilities), _adata.write_by_cell(cells, ends)


def _means(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the means of values ``(m, groups)`` over some rows ``(n, k)`` for each of n, in the memory of one."""
    total = np.zeros((len(rows), values.shape[1]), values.dtype)
    for column in rows.T:
        total += values[column]
    return total / rows.shape[1]


def _nearest(x: np.ndarray, cells: np.ndarray, k: int) -> np.ndarray:
    """Return the numbers of the ``k`` cells nearest to each point ``(n, d)``, all if they are fewer; ``(n, k)``."""
    asked = evenly(len(cells), MOST_ASKED).numpy()
    finder = NearestNeighbors(n_neighbors=min(k, len(asked))).fit(cells[asked])
    return asked[finder.kneighbors(x, return_distance=False)]


def _snapshot_at(time: float | None, times: tuple[float, ...]) -> int:
    """Return the number of the snapshot of a time."""
    if time is None:
        return len(times) - 1
    at = np.asarray(time)
    if at.ndim == 0 and at.dtype.kind in "iuf" and (number := near(float(at), times)) is not None:
        return number
    told = ", ".join(f"{t:g}" for t in times)
    raise ValueError(
        f"expected the time of a snapshot, whose cells have groups, found {time!r}; there are {told}. For the "
        f"population at another time there is sctraj.tl.interpolate"
    )
