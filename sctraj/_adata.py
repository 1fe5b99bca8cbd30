"""The AnnData boundary: every slot name, and all that is read from or written to an AnnData.

The AnnData may be in memory, backed by a file, or lazy (dask arrays, and columns that are read when asked for): of it
only the representation, the names and the columns needed are read.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

    from .flow.snapshots import Snapshots
    from .flow.vector_field import VectorField

# --- slots ---------------------------------------------------------------------------------------------------------
TIME = "time"  # obs: real time, float64; uns: unit, source column, mapping
FLOW = "flow"  # default `key_added`: uns[key] and the prefix of what follows
VELOCITY = "{key}_velocity"  # obsm: n_obs x d float32, per unit time, in use_rep units
GROWTH = "{key}_growth"  # obs: float32, log mass change per unit time relative to the population's; where it grows
VELOCITY_SD = "{key}_velocity_sd"  # obs: float32, spread of the members' velocities; with more than one member
TRAJECTORIES = "{key}_trajectories"  # obsm: n_obs x n_times x d float32; the times in uns[key]["trajectory_times"]
STORE = "trajectory_store"  # uns[key]: folder of the zarr group that holds trajectories and weights instead of obsm
STORE_ID = "trajectory_store_id"  # uns[key]: the group's own, which tells whether another flow's took its place
W1 = "{key}_w1"  # obsm: DataFrame n_obs x methods; NaN at the first and last snapshot
RESTORED = "{key}_restored"  # obsm: n_obs x d float32; NaN at the first and last snapshot
WEIGHTS = "{key}_trajectory_weights"  # obsm: n_obs x n_times float32, mass relative to the cell's own; where it grows
LEAVE_ONE_OUT = "leave_one_out"  # uns: tidy DataFrame; prefixed with "{key}_" when key is not FLOW
PROTOCOL = "{table}_protocol"  # uns: how that table came about; {table} is the name above

_TIME_NAME = re.compile(
    r"(?:^|[\W_])(?:real)?(?:time|day|hour|week|month|age|stage|date|hp[fi]|dp[fic])s?(?:point)?s?(?:$|[\W_\d])", re.I
)

SMALLEST_SNAPSHOT = 3  # cells: fewer have no spread to speak of
SLAB = 2**24  # numbers read, checked or hashed at once
FURTHEST = 1e4  # times the cells' extent that they may be from the origin
FEW = 256  # cells whose stored velocities are computed again, to see whether they belong to a flow
APART = 2e-3  # relative difference of velocities beyond rounding, be it that of coordinates kept in float16


def table_name(key: str) -> str:
    """Return the name of the leave-one-out table in ``uns``."""
    return LEAVE_ONE_OUT if key == FLOW else f"{key}_{LEAVE_ONE_OUT}"


def check_key(key: str) -> None:
    """Raise a ValueError for a name that h5ad and zarr cannot hold."""
    if not key or "/" in key:
        raise ValueError(
            f'key_added must be a name without "/" (h5ad and zarr read it as a folder), not {key!r}. Pass another.'
        )


def check_flow_key(adata: AnnData, key: str) -> None:
    """Raise a ValueError for a name that cannot be stored, or under which ``uns`` holds something else than a flow."""
    check_key(key)
    if key in adata.uns and not _is_flow(adata.uns[key]):
        raise ValueError(
            f'Expected a flow or nothing in adata.uns["{key}"], found something else, which is never overwritten. '
            f'Pass another key_added, or delete it first: del adata.uns["{key}"].'
        )


def check_own(adata: AnnData, *, copy: bool) -> None:
    """Raise a ValueError, before any work, where `own` could not return anything to write to.

    A backed AnnData itself can be written to (new slots stay in memory until it is saved); a copy of it, or of a view
    of it, would need a file of its own.
    """
    if adata.isbacked and (copy or adata.is_view):
        found = "a view of a backed one" if adata.is_view else "a backed one and copy=True"
        raise ValueError(
            f"Expected an AnnData that can be written to or copied, found {found}: its copy would need a file of its "
            f"own. {'Call' if adata.is_view else 'Pass copy=False, or call'} adata.to_memory() first."
        )


def own(adata: AnnData, *, copy: bool) -> AnnData:
    """Return what may be written to: the copy asked for, or the AnnData itself, a view made actual with a warning."""
    check_own(adata, copy=copy)
    if copy:
        return adata.copy()
    if adata.is_view:
        warnings.warn("Received a view of an AnnData. Making a copy.", stacklevel=3)
        adata._init_as_actual(adata.copy())
    return adata


# --- reading -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cells:
    """Snapshots and where their cells stand.

    Attributes
    ----------
    snapshots
        Sorted by time.
    index
        For each snapshot, the rows of the AnnData, ``(n_k,)``.
    fingerprint
        Hash of cell names, times and representation.
    """

    snapshots: Snapshots
    index: tuple[np.ndarray, ...]
    fingerprint: str

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return sum(len(rows) for rows in self.index)


def drop_column(adata: AnnData, column: str) -> None:
    """Take a column out of ``obs``, where it is there."""
    if column not in adata.obs:
        return
    if isinstance(adata.obs, pd.DataFrame):
        del adata.obs[column]
    else:  # lazy: a dataset, which has no deletion of its own
        adata.obs = adata.obs.ds.drop_vars(column)


def _column(adata: AnnData, name: str) -> pd.Series:
    """Read one column of ``obs``."""
    if isinstance(adata.obs, pd.DataFrame):
        return adata.obs[name]
    return adata.obs[[name]].to_memory()[name]


def _kind(column: pd.Series) -> tuple[Any, bool]:
    """Return the dtype of a column, or of its categories, and whether it holds real numbers."""
    kind = column.cat.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
    types = pd.api.types
    return kind, types.is_numeric_dtype(kind) and not types.is_bool_dtype(kind) and not types.is_complex_dtype(kind)


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows that hold about ``SLAB`` numbers each."""
    rows = max(1, SLAB // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _in_memory(values: Any, use_rep: str) -> np.ndarray:
    """Return an array, sparse matrix, DataFrame or what can be read as one, dense; lazy ones slab by slab."""
    if not hasattr(values, "dask"):
        if hasattr(values, "to_memory"):  # backed sparse, lazy DataFrame
            values = values.to_memory()
        return values.toarray() if sparse.issparse(values) else np.asarray(values)
    if np.isnan(values.shape).any():
        raise ValueError(
            f'Expected a dask array of known size in "{use_rep}", found shape {values.shape}. Call '
            f"compute_chunk_sizes() on it first."
        )
    out = np.empty(values.shape, values.dtype)
    for rows in _slabs(values.shape):
        part = values[rows].compute()
        out[rows] = part.toarray() if sparse.issparse(part) else part
    return out


def is_ours(adata: AnnData, name: str) -> bool:
    """Whether a matrix in ``obsm`` is what a flow or leave-one-out wrote, rather than a representation."""
    keys = {str(key) for key in adata.uns if _is_flow(adata.uns[key])}
    keys |= {key.removesuffix(LEAVE_ONE_OUT)[:-1] or FLOW for key in adata.uns if key.endswith(LEAVE_ONE_OUT)}
    return any(name == slot.format(key=key) for key in keys for slot in (VELOCITY, TRAJECTORIES, WEIGHTS, W1, RESTORED))


def read_rep(adata: AnnData, use_rep: str) -> np.ndarray:
    """Return a representation as a dense, finite n_obs x d array; ``"X"`` is the matrix itself.

    No copy of what is dense, in memory and in this machine's byte order; of what is not, one.
    """
    values: Any = adata.X if use_rep == "X" else adata.obsm.get(use_rep)
    if values is None:
        there = ", ".join(f'"{name}"' for name in adata.obsm if not is_ours(adata, name))
        advice = f"there are: {there}. Pass one of them as use_rep." if there else "there are: none."
        if use_rep == "X":
            raise ValueError(f"Expected a matrix in adata.X, found none; in adata.obsm {advice}")
        if adata.X is not None:
            advice += ' Call scanpy.pp.pca(adata), which writes "X_pca", or pass use_rep="X" for the matrix itself.'
        raise KeyError(f'No representation "{use_rep}" in adata.obsm; {advice}')
    values = _in_memory(values, use_rep)
    if not values.dtype.isnative:  # of a file from another machine: torch takes none
        values = values.astype(values.dtype.newbyteorder("="))
    if values.ndim != 2 or values.dtype.kind not in "fiub" or len(values) == 0:
        raise ValueError(
            f'Expected "{use_rep}" to be numbers, cells x dimensions; found {values.dtype}, shape {values.shape}. '
            f"Pass another use_rep."
        )
    finite = np.empty(len(values), bool)
    for rows in _slabs(values.shape):
        finite[rows] = np.isfinite(values[rows]).all(axis=1)
    bad = np.flatnonzero(~finite)
    if bad.size:
        raise ValueError(
            f'Expected finite values in "{use_rep}"; {bad.size} of {adata.n_obs} cells have NaN or inf '
            f"({_some(adata.obs_names[bad])}). Leave those cells out, or compute the representation again."
        )
    return values


def looks_like_time(name: str) -> bool:
    """Whether a column could hold times, by its name."""
    return _TIME_NAME.search(str(name)) is not None


def missing_time(adata: AnnData, time_key: str) -> KeyError:
    """Return the error for a time column that is not there, naming those that look like one."""
    looks = [str(name) for name in adata.obs if looks_like_time(str(name))]
    there = looks or [str(name) for name in adata.obs]
    label = "columns that look like times" if looks else "there are"
    return KeyError(
        f'No column "{time_key}" in adata.obs; {label}: {_some(there, 20) or "none"}. Pass one of them as time_key.'
    )


def read_times(adata: AnnData, time_key: str) -> np.ndarray:
    """Return the cells' real times, float64."""
    if time_key not in adata.obs:
        raise missing_time(adata, time_key)
    column = _column(adata, time_key)
    kind, real = _kind(column)
    if not real:
        raise ValueError(
            f'Expected real times, numbers, in obs["{time_key}"]; found {kind} such as '
            f'{_some(column.astype(str).unique(), 3)}. Call sctraj.pp.parse_time(adata, "{time_key}") first and pass '
            f"the column it writes."
        )
    times = column.astype(np.float64).to_numpy()
    bad = np.flatnonzero(~np.isfinite(times))
    if bad.size:
        raise ValueError(
            f'Expected finite times in obs["{time_key}"]; {bad.size} of {adata.n_obs} cells have NaN or inf '
            f"({_some(adata.obs_names[bad])}). Leave those cells out or fill the times in."
        )
    if np.abs(times).max() > 2**53:
        raise ValueError(
            f'Expected times that float64 tells apart in obs["{time_key}"]; found {np.abs(times).max():.3g}. '
            f"Subtract the first time and use a larger unit."
        )
    return times


def read_rates(adata: AnnData, growth_key: str) -> np.ndarray:
    """Return the prior growth rates of the cells, float64."""
    if growth_key not in adata.obs:
        there = _some(adata.obs, 20) or "none"
        raise KeyError(f'No column "{growth_key}" in adata.obs; there are: {there}. Pass one of them as growth_key.')
    column = _column(adata, growth_key)
    kind, real = _kind(column)
    if not real:
        raise ValueError(
            f'Expected growth rates, real numbers, in obs["{growth_key}"]; found {kind} such as '
            f"{_some(column.astype(str).unique(), 3)}. Pass a column of numbers as growth_key."
        )
    rates = column.astype(np.float64).to_numpy()
    bad = np.flatnonzero(~np.isfinite(rates))
    if bad.size:
        raise ValueError(
            f'Expected finite growth rates in obs["{growth_key}"]; {bad.size} of {adata.n_obs} cells have NaN or inf '
            f"({_some(adata.obs_names[bad])}). Give cells of unknown growth the mean rate."
        )
    return rates


def read_snapshots(adata: AnnData, time_key: str, use_rep: str, *, least: int, growth_key: str | None = None) -> Cells:
    """Check times and representation, and return the cells as sorted snapshots.

    Parameters
    ----------
    least
        Number of snapshots needed.
    growth_key
        Column of prior growth rates, if there is one.

    Raises
    ------
    KeyError
        If the column or the representation is not there.
    ValueError
        If either cannot be used; the message says what was expected, what was found, and what to do.
    """
    import torch

    from .flow.snapshots import Snapshots

    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()]
        raise ValueError(
            f"Expected every cell to have a name of its own; {len(twice)} names stand twice ({_some(twice)}). "
            f"Call adata.obs_names_make_unique()."
        )
    times, values = read_times(adata, time_key), read_rep(adata, use_rep)
    if values.dtype not in (np.float32, np.float64):
        raise ValueError(
            f'Expected float32 or float64 in "{use_rep}", found {values.dtype}: integers overflow or are raw counts, '
            f'and float16 keeps three digits. Use a representation such as "X_pca", or convert with '
            f'.astype("float32").'
        )
    low, high = values.min(axis=0), values.max(axis=0)
    constant = np.flatnonzero(high - low <= 4 * np.finfo(values.dtype).eps * np.maximum(-low, high))
    if constant.size:
        raise ValueError(
            f'Expected dimensions of "{use_rep}" that vary between cells; {constant.size} of {values.shape[1]} have '
            f"one value for all ({_some(constant)}; the first is 0). Leave them out of the representation."
        )
    furthest, extent = float(np.maximum(-low, high).max()), float((high - low).max())
    if furthest > FURTHEST * extent:
        raise ValueError(
            f'Expected coordinates in "{use_rep}" about their origin, found some at {furthest:.3g} that extend over '
            f"{extent:.3g}: in single precision cells would move by steps of rounding. Subtract their mean first."
        )
    unique, which = np.unique(times, return_inverse=True)
    if len(unique) < least:
        raise ValueError(
            f'Expected at least {least} snapshots in obs["{time_key}"], found {len(unique)} '
            f"({_some(unique)}). Check that this is the column of sampling times."
        )
    # rows by snapshot, and within one in their own order
    index = tuple(np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1]))
    small = [f"{t:g} ({len(rows)})" for t, rows in zip(unique, index) if len(rows) < SMALLEST_SNAPSHOT]
    if small:
        raise ValueError(
            f"Expected at least {SMALLEST_SNAPSHOT} cells in every snapshot; found at time (cells): {_some(small)}. "
            f"Merge or leave out these times{'; is the column continuous?' if len(small) > 10 else ''}."
        )
    points = tuple(torch.from_numpy(values[rows]) for rows in index)  # copies: the AnnData's own stay its own
    growth: tuple[torch.Tensor, ...] = ()
    if growth_key is not None:
        rates = read_rates(adata, growth_key)
        growth = tuple(torch.from_numpy(rates[rows]) for rows in index)
    return Cells(Snapshots(tuple(unique), points, growth=growth), index, _fingerprint(adata, times, values))


def _fingerprint(adata: AnnData, times: np.ndarray, values: np.ndarray) -> str:
    digest = _of_names(adata)
    digest.update(times.tobytes())
    for rows in _slabs(values.shape):
        digest.update(np.ascontiguousarray(values[rows]).data)  # a copy only of slabs out of order
    return digest.hexdigest()[:32]


def _of_names(adata: AnnData) -> hashlib._Hash:
    digest = hashlib.sha256()
    names = adata.obs_names
    for rows in _slabs((len(names), 256)):  # a name is longer than a number
        digest.update(("\n" if rows.start else "").encode() + "\n".join(map(str, names[rows])).encode())
    return digest


def names_digest(adata: AnnData) -> str:
    """Return what tells whether these are the same cells in the same order, by their names."""
    return _of_names(adata).hexdigest()[:32]


def _some(values: Any, n: int = 5) -> str:
    values = [str(v) for v in values]
    return ", ".join(values[:n]) + (", ..." if len(values) > n else "")


# --- the flow ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StoredFlow:
    """A fitted flow as it stands in ``uns``: its parameters, its field, and the cells it belongs to."""

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
    """Write ``uns[key]``: arrays, numbers and text only."""
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

    from . import __version__

    return {"sctraj": __version__, "torch": str(torch.__version__)}


def write_by_cell(cells: Cells, values: Sequence[np.ndarray | None], dtype: type = np.float32) -> np.ndarray:
    """Put snapshot-wise arrays ``(n_k, ...)`` into one in the AnnData's order; NaN where a snapshot has None."""
    shape = next(v.shape[1:] for v in values if v is not None)
    out = np.full((cells.n_obs, *shape), np.nan, dtype=dtype)
    for rows, value in zip(cells.index, values, strict=True):
        if value is not None:
            out[rows] = value
    return out


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, where the system says so.

    From psutil where it is installed, else from the system: on some only the memory's whole size can be had.
    """
    try:
        import psutil
    except ImportError:
        for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
            if pages in getattr(os, "sysconf_names", {}):
                return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        return None
    return int(psutil.virtual_memory().available)


def read_trajectories(adata: AnnData, key: str, rows: Any = slice(None)) -> np.ndarray:
    """Return trajectories ``(n, n_times, d)``, of all or some rows, from ``obsm`` or the store that ``uns`` names.

    Raises
    ------
    KeyError
        If there are none.
    ValueError
        If the store is not there, or holds another flow's trajectories or other cells.
    """
    name, flow = TRAJECTORIES.format(key=key), adata.uns.get(key)
    if name in adata.obsm:
        return np.asarray(adata.obsm[name][rows])
    where = flow.get(STORE) if isinstance(flow, Mapping) else None
    if where is None:
        raise KeyError(f'No adata.obsm["{name}"]. Call sctraj.tl.trajectories(adata) first, or pass its key.')
    import zarr

    try:
        group = zarr.open_group(str(where), mode="r")
        points: Any = group["points"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f'Expected trajectories in {where}, which uns["{key}"]["{STORE}"] names, found none. Move the folder back, '
            f"or call sctraj.tl.trajectories(adata) again."
        ) from error
    if group.attrs.get("id") != flow.get(STORE_ID):
        raise ValueError(
            f'Expected the trajectories of uns["{key}"] in {where}, found others, computed later or by another flow. '
            f"Call sctraj.tl.trajectories again, with a store that no other flow writes to."
        )
    if points.shape[0] != adata.n_obs:
        raise ValueError(
            f"Expected the trajectories of {adata.n_obs} cells in {where}, found {points.shape[0]}: those of the "
            f"AnnData that this one is a part of. Take the rows from that one."
        )
    names = names_digest(adata)
    if group.attrs.get("cells", names) != names:  # older stores have none
        raise ValueError(
            f"Expected the trajectories of these {adata.n_obs} cells in {where}, found others, or the same ones in "
            f"another order. Take the rows from the AnnData they were computed for."
        )
    return np.asarray(points[rows] if isinstance(rows, slice) else points.oindex[np.asarray(rows)])


def _is_flow(value: Any) -> bool:
    """Whether an entry of ``uns`` is a fitted flow."""
    return isinstance(value, Mapping) and "weights" in value and "params" in value


def stored(adata: AnnData, key: str) -> dict[str, Any]:
    """Return ``uns[key]`` of a fitted flow."""
    flow = adata.uns.get(key)
    if not _is_flow(flow):
        raise KeyError(f'No flow in adata.uns["{key}"]. Call sctraj.tl.fit_flow(adata) first, or pass its key.')
    return dict(flow)


def read_flow(adata: AnnData, key: str, *, module: Any = None) -> StoredFlow:
    """Return a fitted flow, having checked that it was fitted on these cells in this representation.

    Raises
    ------
    KeyError
        If there is none.
    ValueError
        If it was fitted on other cells or another representation.
    """
    flow = stored(adata, key)
    params = flow["params"]
    cells = read_snapshots(adata, str(params["time_key"]), str(params["use_rep"]), least=1)
    if cells.fingerprint != str(flow["fingerprint"]):
        raise _other_cells(adata, key, module)
    return StoredFlow(params, _field_of(flow, module), cells)


def _field_of(flow: Mapping[str, Any], module: Any = None) -> VectorField:
    from .flow.closed_form import ClosedFormField
    from .flow.vector_field import NeuralField

    if flow["params"].get("field") == "closed-form":
        return ClosedFormField.from_arrays(flow["weights"])
    return NeuralField.from_arrays(flow["weights"], module)


def _other_cells(adata: AnnData, key: str, module: Any) -> ValueError:
    """Return the error for a flow of other cells, which says in what they differ."""
    params = stored(adata, key)["params"]
    if adata.n_obs != int(params["n_obs"]):
        found = f"{adata.n_obs} cells"
    elif _velocities_belong(adata, key, module):
        found = "the same cells by other names or in another order"
        return ValueError(
            f'Expected the cells that uns["{key}"] was fitted on by their names and in their order, found {found}. Put '
            f"adata.obs_names and the order back, or call sctraj.tl.fit_flow again."
        )
    else:
        found = "other times or coordinates"
    return ValueError(
        f'Expected the {int(params["n_obs"])} cells, times and "{params["use_rep"]}" that uns["{key}"] was fitted '
        f"on, found {found}. Call sctraj.tl.fit_flow again, or go back to the AnnData it was fitted on."
    )


def check_cells(adata: AnnData, key: str) -> None:
    """Raise a ValueError where cells, all or a part of those fitted, have other times or coordinates than at the fit.

    All of them in their order have the flow's fingerprint. Of others the times must be the flow's, and the velocities
    stored at a few of them those that the flow's own field has at their times and coordinates. Cells without a
    velocity, and of a field that is a user's module all coordinates of a part, are taken as they are.
    """
    flow = stored(adata, key)
    params = flow["params"]
    time_key, use_rep = str(params["time_key"]), str(params["use_rep"])
    if VELOCITY.format(key=key) not in adata.obsm or time_key not in adata.obs or not _kind(adata.obs[time_key])[1]:
        return  # what is missing is said by who reads it
    times, values = _column(adata, time_key).astype(np.float64).to_numpy(), read_rep(adata, use_rep)
    whole = adata.n_obs == int(params["n_obs"])
    if whole and np.isfinite(times).all() and _fingerprint(adata, times, values) == str(flow["fingerprint"]):
        return
    if _velocities_belong(adata, key, None) is False:
        raise ValueError(
            f'Expected cells with the times and "{use_rep}" that uns["{key}"] was fitted on, found other times or '
            f"coordinates, beside which its velocities and trajectories mean nothing. Call sctraj.tl.fit_flow again, "
            f"or put them back."
        )


def _velocities_belong(adata: AnnData, key: str, module: Any) -> bool | None:
    """Whether times are the flow's and stored velocities its field's at the cells; None where that cannot be told."""
    import torch

    flow = stored(adata, key)
    name = VELOCITY.format(key=key)
    if name not in adata.obsm:
        return None
    times = _column(adata, str(flow["params"]["time_key"])).astype(np.float64).to_numpy()
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
