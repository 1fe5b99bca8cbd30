"""Write a fitted flow to an AnnData, read it back, and check that it belongs to the cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .cells import Cells, fingerprint_of, holds_numbers, read_column, read_rep, read_snapshots
from .slots import STORE, STORE_ID, TRAJECTORIES, VELOCITY, check_anndata, is_flow
from .store import read_stored

if TYPE_CHECKING:
    from anndata import AnnData

    from ..flow.vector_field import VectorField

FEW = 256  # cells whose stored velocities are computed again to check whether they belong to a flow
WRITTEN = ("params", "weights", "loss", "times", "fingerprint")  # what every flow has
APART = 2e-3  # tolerated relative difference of velocities, which covers rounding, also of coordinates kept in float16


@dataclass(frozen=True)
class StoredFlow:
    """A fitted flow as stored in ``uns``: its parameters, its field, and the cells it belongs to."""

    params: Mapping[str, Any]
    vector_field: VectorField
    cells: Cells


def write_flow(
    adata: AnnData,
    key: str,
    *,
    params: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    loss: np.ndarray,
    validation_loss: np.ndarray,
    cells: Cells,
) -> None:
    """Write ``uns[key]``, which holds only arrays, numbers and text."""
    adata.uns[key] = {
        "params": dict(params),
        "weights": dict(weights),
        "loss": loss,
        "validation_loss": validation_loss,
        "times": np.array(cells.snapshots.times),
        "versions": versions(),
        "fingerprint": cells.fingerprint,
    }


def versions() -> dict[str, str]:
    """Return the versions on which a fit's numbers depend."""
    import torch

    from .. import __version__

    return {"sctraj": __version__, "torch": str(torch.__version__)}


def stored(adata: AnnData, key: str) -> dict[str, Any]:
    """Return ``uns[key]`` of a fitted flow."""
    check_anndata(adata)
    flow = adata.uns.get(key)
    if not is_flow(flow):
        raise KeyError(f'No flow in adata.uns["{key}"]. Call sctraj.tl.fit_flow(adata) first, or pass its key.')
    if missing := [name for name in WRITTEN if name not in flow]:
        raise KeyError(
            f'The flow in adata.uns["{key}"] is incomplete, as after anndata.concat, which keeps of it what several '
            f"have in common; without {', '.join(missing)}. Call sctraj.tl.fit_flow again, on all cells."
        )
    return dict(flow)


def read_flow(adata: AnnData, key: str, *, module: Any = None) -> StoredFlow:
    """Return a fitted flow after checking that it was fitted on these cells in this representation.

    Raises
    ------
    KeyError
        If there is no such flow.
    ValueError
        If it was fitted on other cells or another representation.
    """
    flow = stored(adata, key)
    params = flow["params"]
    if adata.n_obs != int(params["n_obs"]):
        raise _other_cells(adata, key, module)
    cells = read_snapshots(adata, str(params["time_key"]), str(params["use_rep"]), least=1)
    if cells.fingerprint != str(flow["fingerprint"]):
        raise _other_cells(adata, key, module)
    return StoredFlow(params, _field_of(flow, module), cells)


def _field_of(flow: Mapping[str, Any], module: Any = None) -> VectorField:
    from ..flow.closed_form import ClosedFormField
    from ..flow.vector_field import NeuralField

    if flow["params"].get("field") == "closed-form":
        return ClosedFormField.from_arrays(flow["weights"])
    return NeuralField.from_arrays(flow["weights"], module)


def _other_cells(adata: AnnData, key: str, module: Any) -> ValueError:
    """Return the error for a flow of other cells, which says how they differ."""
    params, some = stored(adata, key)["params"], ""
    if adata.n_obs != int(params["n_obs"]):
        found = f"{adata.n_obs} cells"
        some = ", where some of the cells can be looked at by rows=" * (adata.n_obs < int(params["n_obs"]))
    elif _velocities_belong(adata, key, module):
        return ValueError(
            f'Expected the cells that uns["{key}"] was fitted on, found the same ones sorted otherwise, renamed, or '
            f'with "{params["use_rep"]}" rounded. Put that back, or call sctraj.tl.fit_flow again.'
        )
    else:
        found = "other times or coordinates"
    return ValueError(
        f'Expected the {int(params["n_obs"])} cells, times and "{params["use_rep"]}" that uns["{key}"] was fitted '
        f"on, found {found}. Call sctraj.tl.fit_flow again, or go back to the AnnData it was fitted on{some}."
    )


def check_cells(adata: AnnData, key: str) -> None:
    """Raise a ValueError if cells, all or a part of those fitted, have other times or coordinates than at the fit.

    All cells in their original order must have the flow's fingerprint. Otherwise, their times must be among the flow's,
    and the velocities stored at a few of them must equal those of the flow's own field at their times and coordinates.
    Not checked are cells without a velocity and, if the field is a user's module, the coordinates of a part.
    """
    flow = stored(adata, key)
    params = flow["params"]
    time_key, use_rep = str(params["time_key"]), str(params["use_rep"])
    if (
        VELOCITY.format(key=key) not in adata.obsm
        or time_key not in adata.obs
        or not holds_numbers(adata.obs[time_key])
    ):
        return  # whatever reads a missing item will report it
    times, values = read_column(adata, time_key).astype(np.float64).to_numpy(), read_rep(adata, use_rep)
    whole = adata.n_obs == int(params["n_obs"])
    if whole and np.isfinite(times).all() and fingerprint_of(adata, times, values) == str(flow["fingerprint"]):
        return
    _check_velocities(adata, key)


def check_some_cells(adata: AnnData, key: str) -> None:
    """Raise a ValueError if some cells have other times or coordinates than at the fit, judged by velocities only.

    This is for functions that are called often. Nothing is checked if the times or the representation are missing, or
    if the representation is not in memory.
    """
    params = stored(adata, key)["params"]
    use_rep, time_key = str(params["use_rep"]), str(params["time_key"])
    there = adata.X if use_rep == "X" and not adata.isbacked else adata.obsm.get(use_rep)
    in_memory = isinstance(there, (np.ndarray, pd.DataFrame)) or sparse.issparse(there)
    if in_memory and time_key in adata.obs and holds_numbers(adata.obs[time_key]):
        _check_velocities(adata, key)


def _check_velocities(adata: AnnData, key: str) -> None:
    if _velocities_belong(adata, key, None) is False:
        raise ValueError(
            f'Expected cells with the times and "{stored(adata, key)["params"]["use_rep"]}" that uns["{key}"] was '
            f"fitted on, found other times or coordinates, beside which its velocities and trajectories mean nothing. "
            f"Call sctraj.tl.fit_flow again, or put them back."
        )


def _velocities_belong(adata: AnnData, key: str, module: Any) -> bool | None:
    """Return whether times are the flow's and stored velocities those of its field; None if that is unknown."""
    import torch

    flow = stored(adata, key)
    name = VELOCITY.format(key=key)
    if name not in adata.obsm:
        return None
    times = read_column(adata, str(flow["params"]["time_key"])).astype(np.float64).to_numpy()
    points, velocity = read_rep(adata, str(flow["params"]["use_rep"])), np.asarray(adata.obsm[name])
    known = np.flatnonzero(np.isfinite(velocity).all(axis=1) & np.isfinite(times))
    if not np.isin(times[known], np.asarray(flow["times"])).all() or points.shape[1] != velocity.shape[1]:
        return False
    if not known.size or ("module" in flow["params"] and module is None):
        return None
    rows = known[np.linspace(0, known.size - 1, min(FEW, known.size)).astype(int)]
    field, expected = _field_of(flow, module), np.empty((len(rows), points.shape[1]))
    with torch.no_grad():
        for t in np.unique(times[rows]):
            at = times[rows] == t
            expected[at] = field(float(t), points[rows[at]])
    return bool(np.linalg.norm(velocity[rows] - expected) <= APART * np.linalg.norm(expected))


def read_trajectories(adata: AnnData, key: str, rows: Any = slice(None)) -> np.ndarray:
    """Return trajectories ``(n, n_times, d)`` of all or some rows, from ``obsm`` or the store named in ``uns``.

    Raises
    ------
    KeyError
        If there are none.
    ValueError
        If the store is missing, or holds the trajectories of another flow or of other cells.
    """
    name, flow = TRAJECTORIES.format(key=key), adata.uns.get(key)
    if name in adata.obsm:
        return np.asarray(adata.obsm[name][rows])
    where = flow.get(STORE) if isinstance(flow, Mapping) else None
    if where is None:
        raise KeyError(f'No adata.obsm["{name}"]. Call sctraj.tl.trajectories(adata) first, or pass its key.')
    return read_stored(adata, key, str(where), flow.get(STORE_ID), rows)
