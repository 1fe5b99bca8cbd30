"""Read cells from an AnnData: names, times, prior growth rates and a representation, checked, as snapshots."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .slots import TIME, is_ours

if TYPE_CHECKING:
    from anndata import AnnData

    from ..flow.snapshots import Snapshots

_TIME_NAME = re.compile(
    r"(?:^|[\W_])(?:real)?(?:time|day|hour|week|month|age|stage|date|hp[fi]|dp[fic])s?(?:point)?s?(?:$|[\W_\d])", re.I
)

SMALLEST_SNAPSHOT = 3  # cells; fewer have no meaningful extent
SLAB = 2**24  # numbers read, checked or hashed at once
FURTHEST = 1e4  # largest distance of cells from the origin, in units of their extent


@dataclass(frozen=True)
class Cells:
    """Snapshots, and the positions of their cells in the AnnData.

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


def read_column(adata: AnnData, name: str) -> pd.Series:
    """Read one column of ``obs``."""
    if isinstance(adata.obs, pd.DataFrame):
        return adata.obs[name]
    return adata.obs[[name]].to_memory()[name]


def holds_numbers(column: pd.Series) -> bool:
    """Return whether a column, or its categories, are real numbers."""
    kind, types = _kind(column), pd.api.types
    return types.is_numeric_dtype(kind) and not types.is_bool_dtype(kind) and not types.is_complex_dtype(kind)


def _kind(column: pd.Series) -> Any:
    return column.cat.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows that hold about ``SLAB`` numbers each."""
    rows = max(1, SLAB // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _in_memory(values: Any, use_rep: str) -> np.ndarray:
    """Return an array, sparse matrix, DataFrame or array-like as a dense array; lazy ones are read slab by slab."""
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


def read_rep(adata: AnnData, use_rep: str) -> np.ndarray:
    """Return a representation as a dense, finite n_obs x d array; ``"X"`` is the matrix itself.

    Nothing is copied if it is already dense, in memory and in this machine's byte order; otherwise one copy is made.
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
    if not values.dtype.isnative:  # from a file written on another machine; torch accepts only native byte order
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
    """Return whether a column could hold times, by its name."""
    return _TIME_NAME.search(str(name)) is not None


def missing_time(adata: AnnData, time_key: str) -> KeyError:
    """Return the error for a missing time column, which names the columns that look like one."""
    looks = [str(name) for name in adata.obs if looks_like_time(str(name))]
    there = looks or [str(name) for name in adata.obs]
    label = "columns that look like times" if looks else "there are"
    advice = "Pass one of them as time_key."
    if looks and not any(holds_numbers(read_column(adata, name)) for name in looks):
        advice = _parse_advice(adata, looks[0])
    return KeyError(f'No column "{time_key}" in adata.obs; {label}: {_some(there, 20) or "none"}. {advice}')


def _parse_advice(adata: AnnData, name: str) -> str:
    """Return what to do with a column of times that are not numbers."""
    kind, types = _kind(read_column(adata, name)), pd.api.types
    if types.is_datetime64_any_dtype(kind) or types.is_timedelta64_dtype(kind):
        since = "" if types.is_timedelta64_dtype(kind) else f' - adata.obs["{name}"].min()'
        return (
            f'Make them numbers in another column, such as days: adata.obs["days"] = (adata.obs["{name}"]{since})'
            f'.dt.total_seconds() / 86400, and pass time_key="days".'
        )
    other = f', key_added="{name}_parsed"' if name == TIME else ""
    return f'Call sctraj.pp.parse_time(adata, "{name}"{other}) first and pass the column it writes.'


def read_times(adata: AnnData, time_key: str) -> np.ndarray:
    """Return the cells' real times, float64."""
    if time_key not in adata.obs:
        raise missing_time(adata, time_key)
    fill = "Leave those cells out or fill the times in."
    times = _numbers(adata, time_key, "times", of_another_kind=_parse_advice(adata, time_key), not_finite=fill)
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
    convert, fill = "Pass a column of numbers as growth_key.", "Give cells of unknown growth the mean rate."
    return _numbers(adata, growth_key, "growth rates", of_another_kind=convert, not_finite=fill)


def read_groups(adata: AnnData, groupby: str) -> pd.Series:
    """Return the groups of the cells as a categorical column, with NaN for missing ones."""
    if not isinstance(groupby, str) or groupby not in adata.obs:
        there = _some(adata.obs, 20) or "none"
        raise KeyError(f'No column "{groupby}" in adata.obs; there are: {there}. Pass one of them as groupby.')
    column = read_column(adata, groupby)
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column
    types = pd.api.types
    if types.is_float_dtype(column) or types.is_complex_dtype(column):
        raise ValueError(
            f'Expected groups of cells in obs["{groupby}"], found numbers ({column.dtype}) such as '
            f"{_some(column.unique(), 3)}. Pass a column of names or clusters as groupby; numbers of clusters can be "
            f'made one by .astype("Int64").astype("category").'
        )
    return column.astype("category")


def _numbers(adata: AnnData, name: str, what: str, *, of_another_kind: str, not_finite: str) -> np.ndarray:
    """Return a column of ``obs`` as float64; if that fails, raise a ValueError that ends with the given advice."""
    column = read_column(adata, name)
    if not holds_numbers(column):
        kind = _kind(column)
        found = "text" if pd.api.types.is_object_dtype(kind) or pd.api.types.is_string_dtype(kind) else kind
        raise ValueError(
            f'Expected {what}, real numbers, in obs["{name}"]; found {found} such as '
            f"{_some(column.astype(str).unique(), 3)}. {of_another_kind}"
        )
    numbers = column.astype(np.float64).to_numpy()
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        raise ValueError(
            f'Expected finite {what} in obs["{name}"]; {bad.size} of {adata.n_obs} cells have NaN or inf '
            f"({_some(adata.obs_names[bad])}). {not_finite}"
        )
    return numbers


def read_snapshots(adata: AnnData, time_key: str, use_rep: str, *, least: int, growth_key: str | None = None) -> Cells:
    """Check times and representation, and return the cells as sorted snapshots.

    Parameters
    ----------
    least
        Minimum number of snapshots.
    growth_key
        Column of prior growth rates, if there is one.

    Raises
    ------
    KeyError
        If a column or the representation is missing.
    ValueError
        If one of them cannot be used; the message says what was expected, what was found, and what to do.
    """
    import torch

    from ..flow.snapshots import Snapshots

    _check_names(adata)
    times, values = read_times(adata, time_key), read_rep(adata, use_rep)
    _check_coordinates(values, use_rep)
    unique, index = _by_time(times, time_key, least)
    points = tuple(torch.from_numpy(values[rows]) for rows in index)  # copies, not shared with the AnnData
    growth: tuple[torch.Tensor, ...] = ()
    if growth_key is not None:
        rates = read_rates(adata, growth_key)
        growth = tuple(torch.from_numpy(rates[rows]) for rows in index)
    return Cells(Snapshots(unique, points, growth=growth), index, fingerprint_of(adata, times, values))


def _check_names(adata: AnnData) -> None:
    """Raise a ValueError if cells share a name."""
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()]
        raise ValueError(
            f"Expected every cell to have a name of its own; {len(twice)} names stand twice ({_some(twice)}). "
            f"Call adata.obs_names_make_unique()."
        )


def _check_coordinates(values: np.ndarray, use_rep: str) -> None:
    """Raise a ValueError if cells cannot be moved in these coordinates in single precision."""
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


def _by_time(times: np.ndarray, time_key: str, least: int) -> tuple[tuple[float, ...], tuple[np.ndarray, ...]]:
    """Return the snapshots' times, increasing, and each one's rows in their order; raise if there are too few."""
    unique, which = np.unique(times, return_inverse=True)
    if len(unique) < least:
        raise ValueError(
            f'Expected at least {least} snapshots in obs["{time_key}"], found {len(unique)} '
            f"({_some(unique)}). {'Two have none between them to hold out. ' * (len(unique) == 2 < least)}"
            f"Check that this is the column of sampling times."
        )
    index = tuple(np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1]))
    small = [f"{t:g} ({len(rows)})" for t, rows in zip(unique, index) if len(rows) < SMALLEST_SNAPSHOT]
    if small:
        raise ValueError(
            f"Expected at least {SMALLEST_SNAPSHOT} cells in every snapshot; found at time (cells): {_some(small)}. "
            f"Merge or leave out these times{'; is the column continuous?' if len(small) > 10 else ''}."
        )
    return tuple(unique), index


def fingerprint_of(adata: AnnData, times: np.ndarray, values: np.ndarray) -> str:
    """Return a hash of the cells' names, times and coordinates, and of their order."""
    digest = _of_names(adata)
    digest.update(times.tobytes())
    for rows in _slabs(values.shape):
        digest.update(np.ascontiguousarray(values[rows]).data)  # copies only slabs that are not contiguous
    return digest.hexdigest()[:32]


def _of_names(adata: AnnData) -> hashlib._Hash:
    digest = hashlib.sha256()
    names = adata.obs_names
    for rows in _slabs((len(names), 256)):  # a name is longer than a number
        digest.update(("\n" if rows.start else "").encode() + "\n".join(map(str, names[rows])).encode())
    return digest


def names_digest(adata: AnnData) -> str:
    """Return a hash of the cells' names and their order."""
    return _of_names(adata).hexdigest()[:32]


def write_by_cell(cells: Cells, values: Sequence[np.ndarray | None], dtype: type = np.float32) -> np.ndarray:
    """Merge snapshot-wise arrays ``(n_k, ...)`` into one in the AnnData's order, with NaN if a snapshot has None."""
    shape = next(v.shape[1:] for v in values if v is not None)
    out = np.full((cells.n_obs, *shape), np.nan, dtype=dtype)
    for rows, value in zip(cells.index, values, strict=True):
        if value is not None:
            out[rows] = value
    return out


def _some(values: Any, n: int = 5) -> str:
    values = [str(v) for v in values]
    return ", ".join(values[:n]) + (", ..." if len(values) > n else "")
