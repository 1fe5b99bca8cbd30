"""The population at a time nobody sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pandas as pd

from .. import _adata
from .._log import logger
from ..flow.flow_matching import pick_device
from ..flow.integrate import Integration, Solver
from ..flow.restoration import Restoration, mixed, moved
from ..flow.starts import Start, origins
from ._field import check_jitter, check_module
from ._steps import TOLERANCE, check_steps, steps_between, steps_per_gap, warn_of_unused_steps

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn


def interpolate(
    adata: AnnData,
    time: float,
    *,
    start: Start = "both",
    jitter: float = 0.0,
    solver: Solver = "rk4",
    n_steps: int | None = None,
    tolerance: float = TOLERANCE,
    decode: bool = True,
    module: nn.Module | None = None,
    device: str = "auto",
    key: str = "flow",
) -> AnnData:
    """Predict the population at a time between the first and the last snapshot.

    All cells of the snapshots before and after that time are moved along the flow to it, and carry weights: nearer
    snapshots weigh more, and parts of the population that grow gain. It is what `sctraj.tl.leave_one_out` judges. At a
    snapshot's own time it is that snapshot. (How many farther snapshots are moved goes by how many there are,
    of which a fit that leaves one out has one fewer.)

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    time
        Real time, within the snapshots' range.
    start
        What is moved: ``"both"`` neighbours in time, and by a neural field, of seven snapshots or more whose single
        samples are noisy, the next ones too, as in `sctraj.tl.leave_one_out`; or the snapshot ``"before"`` alone.
    jitter
        As in `sctraj.tl.leave_one_out`: noise on what is moved, in bandwidths of a closed-form field.
    solver
        ``"rk4"`` or ``"euler"`` on a fixed grid, or ``"dopri5"``.
    n_steps
        Steps of a fixed grid per mean gap between snapshots; None: 10 of rk4, 50 of euler, ten times as many of a
        closed-form bridge.
    tolerance
        Of ``"dopri5"``, relative.
    decode
        Decode to genes where the flow is in ``obsm["X_pca"]``, or in what was standardised from it, and
        ``varm["PCs"]`` is there.
    module
        The user's own module, if the flow was fitted with one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    key
        Name of the flow.

    Returns
    -------
    A new AnnData, one row per moved cell: ``obsm[use_rep]`` (``X``, where the flow is in it), ``obs[time_key]``,
    ``obs["source_cell"]`` (the observed cell it comes from), ``obs["weight"]`` (summing to one; weigh cells by it) and,
    decoded, ``X`` (float32) of the genes that the components were computed from. Decoded genes have the variance that
    the components hold, and may be below zero: compare them with observed cells decoded likewise, as they are at a
    snapshot's own time, and not with measured ones.

    Raises
    ------
    KeyError
        No such flow.
    ValueError
        A time that is no number or outside the range; other cells than those fitted; a solver, steps or a tolerance
        that cannot be used; a `time_key` of a column that is written beside it; components that do not reproduce
        ``X_pca`` from ``X`` (then ``decode=False`` leaves the genes out).
    TypeError
        A module that is none.
    """
    check_module(module)
    where = pick_device(device)
    check_steps(solver, 1 if n_steps is None else n_steps, tolerance)
    warn_of_unused_steps(solver, n_steps, tolerance, default=TOLERANCE)
    at = np.asarray(time)
    if at.ndim or at.dtype.kind not in "iuf":
        raise ValueError(f"expected a time that is a number, found {time!r}; pass one, such as 1.5")
    time = float(at)
    flow = _adata.read_flow(adata, key, module=module)
    snapshots, use_rep, time_key = flow.cells.snapshots, str(flow.params["use_rep"]), str(flow.params["time_key"])
    if time_key in ("source_cell", "weight"):
        raise ValueError(
            f'expected times in a column other than "source_cell" and "weight", which the result holds beside it, '
            f'found a flow fitted with time_key="{time_key}"; rename the column and fit again'
        )
    if not snapshots.times[0] <= time <= snapshots.times[-1]:
        raise ValueError(
            f"expected a time from {snapshots.times[0]:g} to {snapshots.times[-1]:g}, the snapshots' range, found "
            f"{time}; beyond it the flow was never trained"
        )
    if start not in get_args(Start):
        raise ValueError(f"expected a start of {get_args(Start)}, found {start!r}")
    check_jitter(jitter, flow.params["field"])
    decoder, why_not = _adata.read_decoder(adata, use_rep) if decode else (None, "by decode=False")
    field = flow.vector_field.to(where).ensemble()
    stiff = flow.params["field"] == "closed-form" and field.has_score
    per_gap = steps_per_gap(solver, stiff=stiff) if n_steps is None else n_steps

    def from_snapshot(k: int) -> Restoration:
        cells = [(snapshots.points[k], snapshots.mass[k])]
        how = Integration(solver, steps_between(per_gap, snapshots.times[k], time, snapshots.mean_gap), tolerance)
        (there,) = moved(field, cells, [snapshots.times[k]], [time], how, jitter=jitter, seeds=[k])
        return there

    if time in snapshots.times:
        used = [snapshots.times.index(time)]
        population = Restoration(snapshots.points[used[0]].cpu(), snapshots.mass[used[0]])
    else:
        starts = origins(snapshots.times, time, start, farther=float(flow.params.get("farther", 0.0)))
        used = [origin.snapshot for origin in starts]
        population = mixed([from_snapshot(k) for k in used], [origin.share for origin in starts])
    restored = population.points.numpy().astype(np.float32)

    sources = np.concatenate([np.asarray(adata.obs_names[flow.cells.index[i]], dtype=object) for i in used])
    obs = pd.DataFrame(
        {
            time_key: np.full(len(sources), time),
            "source_cell": sources,
            "weight": population.weights.numpy(),
        },
        index=pd.Index([f"{name}_at_{time:g}" for name in sources]),
    )
    result, genes_told = _with_genes(adata, use_rep, restored, obs, decoder, why_not)
    origin = f"moved from {' and '.join(f'{snapshots.times[i]:g}' for i in sorted(used))}"
    if time in snapshots.times:
        origin = "that were sampled then, as they are"
    logger.info(f"the population at {time:g}: {len(sources)} cells {origin}, {genes_told}")
    return result


def _with_genes(
    adata: AnnData, use_rep: str, points: np.ndarray, obs: pd.DataFrame, decoder: _adata.Decoder | None, why_not: str
) -> tuple[AnnData, str]:
    """Return cells at points ``(n, d)`` of a representation, with genes if there is a way to them; and say which."""
    from anndata import AnnData

    if use_rep == "X":  # the genes themselves
        return AnnData(X=points, obs=obs, var=adata.var.copy()), f"of {adata.n_vars} genes"
    if decoder is None:
        return AnnData(obs=obs, obsm={use_rep: points}), f"not decoded to genes ({why_not})"
    held = "" if decoder.held is None else f", of whose variance the components hold {decoder.held:.0%}"
    made = AnnData(X=decoder(points), obs=obs, var=adata.var.iloc[decoder.genes].copy(), obsm={use_rep: points})
    return made, f"decoded to {made.n_vars} genes{held}"
