"""Predict the population at a time that was not sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np
import pandas as pd

from .. import _adata
from .._log import logger
from .._memory import check_room, size_of
from ..flow.flow_matching import pick_device
from ..flow.integrate import Integration, Solver
from ..flow.restoration import Restoration, mixed, moved
from ..flow.starts import Start, origins
from ._field import check_jitter, check_module
from ._steps import TOLERANCE, check_steps, near, steps_between, steps_per_gap, warn_of_unused_steps

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
    genes: Sequence[str] | None = None,
    module: nn.Module | None = None,
    device: str = "auto",
    key: str = "flow",
) -> AnnData:
    """Predict the population at a time between the first and the last snapshot.

    All cells of the snapshots before and after that time are moved to it along the flow. They carry weights: nearer
    snapshots weigh more, and growing parts of the population gain weight. This is the prediction that
    `sctraj.tl.leave_one_out` judges. At a snapshot's own time, the result is that snapshot. (The number of farther
    snapshots that are moved depends on how many snapshots there are; a fit that leaves one out has one fewer.)

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    time
        Real time, within the snapshots' range.
    start
        Which snapshots are moved. ``"both"``: the neighbours in time on both sides; with a neural field and at least
        seven snapshots whose single samples are noisy, the next ones too, as in `sctraj.tl.leave_one_out`.
        ``"before"``: only the snapshot before.
    jitter
        As in `sctraj.tl.leave_one_out`: noise on the moved cells, in bandwidths of a closed-form field.
    solver
        ``"rk4"`` or ``"euler"`` on a fixed grid, or ``"dopri5"``.
    n_steps
        Steps of a fixed grid per mean gap between snapshots. None: 10 for rk4, 50 for euler, and ten times as many for
        a closed-form bridge.
    tolerance
        Relative tolerance of ``"dopri5"``.
    decode
        Decode to genes if the flow is in ``obsm["X_pca"]``, or in a standardised form of it, and ``varm["PCs"]``
        exists.
    genes
        Names of the genes to decode to, in the order wanted; None: all from which the components were computed.
    module
        The user's own module, if the flow was fitted with one.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    key
        Name of the flow.

    Returns
    -------
    A new AnnData with one row per moved cell: ``obsm[use_rep]`` (``X``, if the flow is in it), ``obs[time_key]``,
    ``obs["source_cell"]`` (the observed cell it comes from), ``obs["weight"]`` (sums to one; weight cells by it) and,
    if decoded, ``X`` (float32) with the genes from which the components were computed. Decoded genes have only the
    variance that the components hold, and may be negative: compare them with observed cells that were decoded in the
    same way, which is what this function returns at a snapshot's own time, and not with measured values.

    Raises
    ------
    KeyError
        No such flow, or no genes of these names.
    ValueError
        A time that is not a number or is outside the range; other cells than those fitted; a solver, steps or a
        tolerance that cannot be used; a flow whose `time_key` is the name of another column that is written; components
        that do not reproduce ``X_pca`` from ``X`` (``decode=False`` then leaves the genes out); `genes`, but no way
        back to them; more values than there is memory for.
    TypeError
        `module` is not an instance of ``torch.nn.Module``.
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
    own = near(time, snapshots.times)
    time = time if own is None else snapshots.times[own]
    if own is None and not snapshots.times[0] <= time <= snapshots.times[-1]:
        raise ValueError(
            f"expected a time from {snapshots.times[0]:g} to {snapshots.times[-1]:g}, the snapshots' range, found "
            f"{time}; beyond it the flow was never trained"
        )
    if start not in get_args(Start):
        raise ValueError(f"expected a start of {get_args(Start)}, found {start!r}")
    check_jitter(jitter, flow.params["field"])
    decoder, why_not = _to_genes(adata, use_rep, genes, decode=decode)
    field = flow.vector_field.to(where).ensemble()
    stiff = flow.params["field"] == "closed-form" and field.has_score
    per_gap = steps_per_gap(solver, stiff=stiff) if n_steps is None else n_steps

    farther = float(flow.params.get("farther", 0.0))
    starts = origins(snapshots.times, time, start, farther=farther) if own is None else []
    used = [origin.snapshot for origin in starts] if own is None else [own]
    if isinstance(decoder, _adata.Decoder):
        shape = (sum(len(snapshots.points[k]) for k in used), len(decoder.genes))
        ways = "name the genes you need (genes=...), or pass decode=False"
        check_room("decoded genes", "{} cells x {} genes".format(*shape), size_of(shape, "float32"), ways)

    def from_snapshot(k: int) -> Restoration:
        cells = [(snapshots.points[k], snapshots.mass[k])]
        how = Integration(solver, steps_between(per_gap, snapshots.times[k], time, snapshots.mean_gap), tolerance)
        (there,) = moved(field, cells, [snapshots.times[k]], [time], how, jitter=jitter, seeds=[k])
        return there

    if own is not None:
        population = Restoration(snapshots.points[own].cpu(), snapshots.mass[own])
    else:
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
    if own is not None:
        origin = "that were sampled then, as they are"
    logger.info(f"the population at {time:g}: {len(sources)} cells {origin}, {genes_told}")
    return result


def _to_genes(
    adata: AnnData, use_rep: str, genes: Sequence[str] | None, *, decode: bool
) -> tuple[_adata.Decoder | _adata.Columns | None, str]:
    """Return what gives all genes, or those asked for, at points of a representation; or text on why nothing does."""
    if genes is not None:
        if not decode:
            raise ValueError("expected decode=True to decode genes to, found decode=False; leave one of both out")
        return _adata.way_to_genes(adata, use_rep, [genes] if isinstance(genes, str) else list(genes)), ""
    if use_rep == "X":  # the genes themselves
        return _adata.Columns(np.arange(adata.n_vars)), ""
    return _adata.read_decoder(adata, use_rep) if decode else (None, "by decode=False")


def _with_genes(
    adata: AnnData,
    use_rep: str,
    points: np.ndarray,
    obs: pd.DataFrame,
    decoder: _adata.Decoder | _adata.Columns | None,
    why_not: str,
) -> tuple[AnnData, str]:
    """Return cells at points ``(n, d)`` of a representation, decoded to genes if possible, and text that says so."""
    from anndata import AnnData

    if decoder is None:
        return AnnData(obs=obs, obsm={use_rep: points}), f"not decoded to genes ({why_not})"
    obsm = {} if use_rep == "X" else {use_rep: points}
    made = AnnData(X=decoder(points), obs=obs, var=adata.var.iloc[decoder.genes].copy(), obsm=obsm)
    count = f"{made.n_vars} gene{'s' * (made.n_vars != 1)}"
    if isinstance(decoder, _adata.Columns):
        return made, f"of {count}"
    held = "" if decoder.held is None else f", of whose variance the components hold {decoder.held:.0%}"
    return made, f"decoded to {count}{held}"
