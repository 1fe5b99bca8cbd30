"""Read results back: slots as DataFrames, and the fitted field as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import _adata
from ._memory import check_room, size_of

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn

    from .flow.vector_field import VectorField

__all__ = ["fates", "leave_one_out", "loss", "representation", "trajectories", "vector_field", "velocity"]


def vector_field(adata: AnnData, *, key: str = _adata.FLOW, module: nn.Module | None = None) -> VectorField:
    """Return the fitted vector field, ready to call: ``field(t, x)``, also after a round trip through a file.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    key
        Name of the flow.
    module
        The user's own module, if the flow was fitted with one; its weights are replaced by the fitted ones.

    Returns
    -------
    A field of M members. ``field(t, x)`` takes a real time and an array ``(n, d)`` in the units of the
    representation and returns the members' mean velocity ``(n, d)`` per unit of time; ``field(t, x, "growth")`` returns
    their mean growth rate ``(n,)``, known only up to a number that all cells of a time share
    (``obs[key + "_growth"]`` is this rate minus its mean over the snapshot), and ``field(t, x, "score")`` the score
    ``(n, d)``. ``field.velocity(t, x)``, ``field.score(t, x)`` and ``field.growth(t, x)`` take and return tensors
    ``(M, n, d)``. The field also returns values before the first and after the last snapshot's time, but it has learned
    nothing about these times.

    Raises
    ------
    KeyError
        No such flow.
    ValueError
        The flow was fitted on other cells or another representation, or with a module that was not passed.
    """
    return _adata.read_flow(adata, key, module=module).vector_field


def loss(adata: AnnData, *, key: str = _adata.FLOW) -> pd.DataFrame:
    """Return the loss history: one row per step, one column per member.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    key
        Name of the flow.

    Returns
    -------
    Index ``step``; columns ``"0"``, ``"1"``, ... and, with early stopping, ``"validation 0"``, ..., which are NaN at
    the steps between two evaluations. Dimensionless: see `sctraj.flow.flow_matching.Fit`.

    Raises
    ------
    KeyError
        No such flow.
    ValueError
        The field is a closed-form one, which is not trained.
    """
    from .flow.flow_matching import EVALUATE_EVERY

    flow = _adata.stored(adata, key)
    values = np.asarray(flow["loss"])
    if not len(values):
        raise ValueError(
            f'Expected a flow that was trained; the closed-form field in uns["{key}"] was not, and has no loss. '
            f"Fit with field='neural' to see one."
        )
    index = pd.RangeIndex(1, len(values) + 1, name="step")
    table = pd.DataFrame(values, index=index, columns=[str(m) for m in range(values.shape[1])])
    validation = np.asarray(flow["validation_loss"])
    if len(validation):
        steps = EVALUATE_EVERY * np.arange(1, len(validation) + 1)
        names = [f"validation {m}" for m in range(validation.shape[1])]
        table = table.join(pd.DataFrame(validation, index=pd.Index(steps, name="step"), columns=names))
    return table


def velocity(adata: AnnData, *, key: str = _adata.FLOW) -> pd.DataFrame:
    """Return every cell's velocity at its own time.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    key
        Name of the flow.

    Returns
    -------
    n_obs x d, in units of the representation per unit of time.

    Raises
    ------
    KeyError
        No velocities.
    ValueError
        Cells with other times or coordinates than at the fit.
    """
    _check(adata, key)
    values = written(adata, _adata.VELOCITY.format(key=key), "tl.fit_flow")
    return pd.DataFrame(np.asarray(values), index=adata.obs_names)


def trajectories(
    adata: AnnData,
    *,
    rows: Sequence[int] | Sequence[bool] | Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    key: str = _adata.FLOW,
) -> pd.DataFrame:
    """Return cells' trajectories, in the representation or as trends of genes; also from a store on disk.

    Parameters
    ----------
    adata
        Annotated data with trajectories by `sctraj.tl.trajectories`.
    rows
        Cells to return: their row numbers or names, in the order wanted, or a mask of n_obs booleans, such as
        ``adata.obs["time"] == 2``; all if None.
    genes
        Names of genes to decode to, if the flow is in ``X``, in ``obsm["X_pca"]`` or in a standardised form of that.
        Decoded values have only the variation that the components hold, so they vary less than measured ones. The rest
        is set to its mean over the cells in `adata`; so choose cells by `rows` rather than pass a part of them.
    key
        Name of the flow.

    Returns
    -------
    One row per cell and time (index ``cell``, ``time``); d columns in units of the representation, or one column per
    gene in the units of ``X``.

    Raises
    ------
    KeyError
        No trajectories, or no cells or genes of these names.
    IndexError
        Row numbers that do not exist.
    ValueError
        `rows` that are neither numbers nor names nor a mask of n_obs booleans, or a mask of no cell; cells with other
        times or coordinates than at the fit; a flow that cannot be decoded to genes; more values than there is memory
        for.
    """
    _check(adata, key)
    chosen = slice(None) if rows is None else row_numbers(adata, rows)
    names = [genes] if isinstance(genes, str) else None if genes is None else list(genes)
    decoded = None
    if names is not None:
        decoded = _adata.way_to_genes(adata, str(_adata.stored(adata, key)["params"]["use_rep"]), names)
    values = _adata.read_trajectories(adata, key, chosen)
    times = np.asarray(_adata.stored(adata, key)["trajectory_times"])
    if names is not None:
        shape = (*values.shape[:2], len(names))
        asked = "{} cells x {} times x {} genes".format(*shape)
        check_room("decoded genes", asked, size_of(shape, "float32"), "pass rows=... or fewer genes")
    index = pd.MultiIndex.from_product([adata.obs_names[chosen], times], names=["cell", "time"])
    points = values.reshape(len(index), values.shape[-1])
    return pd.DataFrame(points if decoded is None else decoded(points), index=index, columns=names)


def fates(adata: AnnData, *, key: str = _adata.FLOW) -> pd.DataFrame:
    """Return every cell's probability of ending in, or having come from, each group.

    Parameters
    ----------
    adata
        Annotated data with fates by `sctraj.tl.fates`.
    key
        Name of the flow.

    Returns
    -------
    n_obs x groups, summing to one over the groups; NaN for cells of the fates' own time that have no group. Columns
    are named by the groups as text.

    Raises
    ------
    KeyError
        No fates.
    ValueError
        Cells with other times or coordinates than at the fit.
    """
    _check(adata, key)
    values = written(adata, _adata.FATES.format(key=key), "tl.fates")
    record = _adata.stored(adata, key).get("fates")
    if record is None:
        raise KeyError(f'No adata.uns["{key}"]["fates"], which names the groups. Call sctraj.tl.fates(adata) first.')
    groups = [str(group) for group in record["groups"]]
    return pd.DataFrame(np.asarray(values), index=adata.obs_names, columns=groups)


def representation(adata: AnnData, *, key: str = _adata.FLOW) -> np.ndarray:
    """Return the cells in the representation in which a flow was fitted.

    Parameters
    ----------
    adata
        Annotated data with a flow by `sctraj.tl.fit_flow`.
    key
        Name of the flow.

    Returns
    -------
    n_obs x d, in the representation's own units.
    """
    return _adata.read_rep(adata, str(_adata.stored(adata, key)["params"]["use_rep"]))


def leave_one_out(adata: AnnData, *, key: str = _adata.FLOW, metric: str | None = None) -> pd.DataFrame:
    """Return the distances between restored and held-out snapshots.

    Parameters
    ----------
    adata
        Annotated data with a table by `sctraj.tl.leave_one_out`.
    key
        Prefix of its slots.
    metric
        One of ``w1``, ``w2``, ``mmd``, ``energy``, ``energy_about_mean``, ``variance_ratio``, ``w1_unweighted``,
        ``energy_unweighted``, or the standard error of one that was estimated because there are many cells, such as
        ``w1_error``; None for all of them, as a tidy table.

    Returns
    -------
    A tidy table (columns ``method``, ``time``, ``seed``, ``metric``, ``value``) or, for one metric, a wide one: a row
    per method or baseline, a column per held-out time (mean over seeds), their mean, and ``sd``, the standard deviation
    over seeds of the mean over times (NaN for a single seed). If distances were estimated, also ``error``, the standard
    error of the mean that comes from this (it does not fall with the number of seeds; NaN where all were exact).
    """
    name = _adata.table_name(key)
    if name not in adata.uns:
        raise KeyError(f'No table in adata.uns["{name}"]. Call sctraj.tl.leave_one_out(adata) first, or pass its key.')
    tidy = pd.DataFrame(adata.uns[name]).copy()
    if metric is None:
        return tidy
    metrics = list(pd.unique(tidy["metric"]))
    if metric not in metrics:
        raise ValueError(f"Expected a metric of {', '.join(metrics)}; found {metric!r}.")
    one = tidy[tidy["metric"] == metric]
    order = list(pd.unique(one["method"].astype(str)))
    wide = one.pivot_table(index="method", columns="time", values="value", aggfunc="mean", observed=True).loc[order]
    by_seed = one.groupby(["method", "seed"], observed=True)["value"].mean()
    mean, sd = by_seed.groupby("method").mean(), by_seed.groupby("method").std()
    wide["mean"], wide["sd"] = mean.loc[order], sd.loc[order]
    estimated = tidy[tidy["metric"] == f"{metric}_error"]
    if len(estimated):
        of_times = estimated.groupby(["method", "time"], observed=True)["value"].mean()
        error = np.sqrt(of_times.pow(2).groupby("method").sum())
        wide["error"] = (error / one.groupby("method", observed=True)["time"].nunique()).reindex(order)
    wide.columns.name = None
    return wide


def row_numbers(adata: AnnData, rows: Sequence[int] | Sequence[bool] | Sequence[str]) -> np.ndarray:
    """Return the row numbers of the cells given by numbers, names or a mask."""
    asked = np.asarray(rows)
    kind = pd.api.types.infer_dtype(asked, skipna=False) if asked.ndim == 1 else "no row of values"
    if kind == "boolean" and len(asked) == adata.n_obs:
        if not asked.any():
            raise ValueError(
                f"Expected rows to choose cells, found a mask that is False at all {adata.n_obs} cells. Does it "
                f"compare with a value that is there?"
            )
        return np.flatnonzero(asked)
    if kind == "string":
        found = adata.obs_names.get_indexer_for(asked)
        if (found < 0).any():
            absent = [str(name) for name in asked if name not in adata.obs_names]
            raise KeyError(
                f"Expected names of cells in rows; {len(absent)} of {len(asked)} are not in adata.obs_names: "
                f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}. Pass names that are, or numbers."
            )
        return found
    if kind == "integer" or (asked.shape == (0,) and kind != "boolean"):
        outside = asked[(asked < -adata.n_obs) | (asked >= adata.n_obs)]
        if len(outside):
            raise IndexError(
                f"Expected numbers of cells up to {adata.n_obs - 1} in rows, found {outside[0]}. Pass numbers of "
                f"these {adata.n_obs} cells, or names."
            )
        return asked.astype(np.intp)
    raise ValueError(
        f"Expected rows to be numbers or names of cells, or a mask of {adata.n_obs} booleans, one for each cell; found "
        f'{asked.dtype} of shape {asked.shape}. Pass one of these, such as adata.obs["time"] == 2.'
    )


def _check(adata: AnnData, key: str) -> None:
    """Raise a ValueError if the cells are not those of the flow; skip the check if the flow was deleted."""
    if _adata.is_flow(adata.uns.get(key)):
        _adata.check_some_cells(adata, key)


def written(adata: AnnData, name: str, writer: str) -> Any:
    """Return a matrix in ``obsm``; if it is missing, raise a KeyError that names the function that writes it."""
    if name not in adata.obsm:
        raise KeyError(f'No adata.obsm["{name}"]. Call sctraj.{writer}(adata) first, or pass its key.')
    value: Mapping[str, Any] | Any = adata.obsm[name]
    return value
