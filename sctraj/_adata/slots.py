"""The names of all slots, and checks of what may be overwritten."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

TIME = "time"  # obs: real time, float64; uns: unit, source column, mapping
FLOW = "flow"  # default `key_added`: uns[key] and the prefix of the following slots
VELOCITY = "{key}_velocity"  # obsm: n_obs x d float32, per unit time, in use_rep units
GROWTH = "{key}_growth"  # obs: float32, log mass change per unit time relative to the population's; if it has growth
VELOCITY_SD = "{key}_velocity_sd"  # obs: float32, spread of the members' velocities; with more than one member
TRAJECTORIES = "{key}_trajectories"  # obsm: n_obs x n_times x d float32; the times in uns[key]["trajectory_times"]
STORE = "trajectory_store"  # uns[key]: folder of the zarr group that holds trajectories and weights instead of obsm
STORE_ID = "trajectory_store_id"  # uns[key]: identifier of that group, by which a replacement is recognised
W1 = "{key}_w1"  # obsm: DataFrame n_obs x methods; NaN at the first and last snapshot
RESTORED = "{key}_restored"  # obsm: n_obs x d float32; NaN at the first and last snapshot
FATES = "{key}_fates"  # obsm: n_obs x groups float32; names of the groups in uns[key]["fates"]
WEIGHTS = "{key}_trajectory_weights"  # obsm: n_obs x n_times float32, mass relative to the snapshot's mean; with growth
LEAVE_ONE_OUT = "leave_one_out"  # uns: tidy DataFrame; prefixed with "{key}_" when key is not FLOW
PROTOCOL = "{table}_protocol"  # uns: how that table was obtained; {table} is the name above


def table_name(key: str) -> str:
    """Return the name of the leave-one-out table in ``uns``."""
    return LEAVE_ONE_OUT if key == FLOW else f"{key}_{LEAVE_ONE_OUT}"


def check_key(key: str) -> None:
    """Raise a ValueError for a name that h5ad and zarr cannot store."""
    if not key or "/" in key:
        raise ValueError(
            f'key_added must be a name without "/" (h5ad and zarr read it as a folder), not {key!r}. Pass another.'
        )


def check_flow_key(adata: AnnData, key: str, *, use_rep: str, columns: Sequence[str]) -> None:
    """Raise a ValueError for a name that cannot be stored, or is used for something else than a flow.

    Also for one under which a fit would overwrite its own representation, or columns of ``obs`` that it reads.
    """
    check_anndata(adata)
    check_key(key)
    _check_kept([use_rep], key, (VELOCITY, TRAJECTORIES, WEIGHTS, FATES))
    _check_kept(columns, key, (GROWTH, VELOCITY_SD))
    if key in adata.uns and not is_flow(adata.uns[key]):
        raise ValueError(
            f'Expected a flow or nothing in adata.uns["{key}"], found something else, which is never overwritten. '
            f'Pass another key_added, or delete it first: del adata.uns["{key}"].'
        )
    if key not in adata.uns:
        of_flows = (VELOCITY, GROWTH, VELOCITY_SD, TRAJECTORIES, WEIGHTS, FATES)
        _refuse_others(adata, [slot.format(key=key) for slot in of_flows])


def is_flow(value: Any) -> bool:
    """Return whether an entry of ``uns`` is a fitted flow."""
    return isinstance(value, Mapping) and "weights" in value and "params" in value


def is_protocol(value: Any) -> bool:
    """Return whether an entry of ``uns`` is the protocol of a leave-one-out table."""
    return isinstance(value, Mapping) and "held_out_times" in value


def check_table_key(adata: AnnData, key: str, use_rep: str) -> None:
    """Raise a ValueError for a name that cannot be stored, or whose slots hold something else than a leave-one-out.

    Also for one that has the representation itself in a slot.
    """
    check_key(key)
    _check_kept([use_rep], key, (W1, RESTORED))
    table = table_name(key)
    if not is_protocol(adata.uns.get(PROTOCOL.format(table=table))):
        _refuse_others(adata, [W1.format(key=key), RESTORED.format(key=key), table])


def check_fates(adata: AnnData, key: str) -> None:
    """Raise a ValueError if the slot of a flow's fates is in use without a record of them."""
    if is_flow(adata.uns.get(key)) and "fates" not in adata.uns[key]:
        _refuse_others(adata, [FATES.format(key=key)])


def _check_kept(names: Sequence[str], key: str, slots: Sequence[str]) -> None:
    """Raise a ValueError if what is read under one of the names would be overwritten or removed."""
    for name in {*names} & {slot.format(key=key) for slot in slots}:
        raise ValueError(
            f'Expected data that stay as they are, found "{name}", which is written here. Copy it to another name, or '
            f"pass another key_added."
        )


def _refuse_others(adata: AnnData, names: Sequence[str]) -> None:
    """Raise a ValueError if slots are in use without a record that sctraj wrote them."""
    places = {"obs": adata.obs, "obsm": adata.obsm, "uns": adata.uns}
    found = [f'adata.{place}["{name}"]' for name in names for place, held in places.items() if name in held]
    if found:
        raise ValueError(
            f"Expected nothing under names that are written here, found {', '.join(found)} without the record of an "
            f"earlier call in uns. Pass another key_added, or delete what is there first: del {', '.join(found)}."
        )


def is_ours(adata: AnnData, name: str) -> bool:
    """Return whether a matrix in ``obsm`` was written by a flow or leave-one-out, rather than a representation."""
    keys = {str(key) for key in adata.uns if is_flow(adata.uns[key])}
    keys |= {key.removesuffix(LEAVE_ONE_OUT)[:-1] or FLOW for key in adata.uns if key.endswith(LEAVE_ONE_OUT)}
    slots = (VELOCITY, TRAJECTORIES, WEIGHTS, FATES, W1, RESTORED)
    return any(name == slot.format(key=key) for key in keys for slot in slots)


def check_anndata(adata: object) -> None:
    """Raise a TypeError for anything other than an AnnData, such as a path."""
    if not hasattr(adata, "obsm") or not hasattr(adata, "uns"):
        read = " Read the file first: anndata.read_h5ad(path)." if isinstance(adata, (str, os.PathLike)) else ""
        raise TypeError(f"Expected an AnnData, found {type(adata).__name__}.{read}")


def check_own(adata: AnnData, *, copy: bool) -> None:
    """Raise a ValueError, before any work, if `own` could not return an AnnData to write to.

    A backed AnnData itself can be written to (new slots stay in memory until it is saved), but a copy of it, or of a
    view of it, would need a file of its own. Anything other than an AnnData raises a TypeError.
    """
    check_anndata(adata)
    if adata.isbacked and (copy or adata.is_view):
        found = "a view of a backed one" if adata.is_view else "a backed one and copy=True"
        raise ValueError(
            f"Expected an AnnData that can be written to or copied, found {found}: its copy would need a file of its "
            f"own. {'Call' if adata.is_view else 'Pass copy=False, or call'} adata.to_memory() first."
        )


def own(adata: AnnData, *, copy: bool) -> AnnData:
    """Return the AnnData to write to: a copy if requested, otherwise itself; a view is made actual with a warning."""
    check_own(adata, copy=copy)
    if copy:
        return adata.copy()
    if adata.is_view:
        warnings.warn("Received a view of an AnnData. Making a copy.", stacklevel=3)
        adata._init_as_actual(adata.copy())
    return adata


def drop_column(adata: AnnData, column: str) -> None:
    """Remove a column from ``obs``, if it is there."""
    if column not in adata.obs:
        return
    if isinstance(adata.obs, pd.DataFrame):
        del adata.obs[column]
    else:  # lazy: a dataset without deletion in place
        adata.obs = adata.obs.ds.drop_vars(column)
