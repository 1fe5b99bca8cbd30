"""Read the user's own files, npz, csv or h5ad, into one layout."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .._log import logger

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def load(
    path: str | os.PathLike[str],
    *,
    time_key: str = "time",
    use_rep: str | Sequence[str] | None = None,
    velocity_key: str | None = None,
    mapping: Mapping[Any, float] | None = None,
) -> ad.AnnData:
    """Read the cells of a file of your own: npz, csv (or tsv, or either as .gz) or h5ad.

    Parameters
    ----------
    path
        The file; its extension determines the format. An npz holds one array per name, all with the same n_obs, and no
        Python objects. A csv holds one cell per line, with a header; if its first column has no name, that column
        holds the cells' names.
    time_key
        Where the times are: an array ``(n_obs,)`` of the npz, a column of the csv, or of `obs`.
    use_rep
        Where the coordinates are: an array ``(n_obs, d)`` of the npz or a key of `obsm`; by default ``"X_pca"``, or
        the only one that exists. For a csv: the columns' names, or the prefix of numbered columns (``"PC"`` for PC1,
        PC2, ...); by default the only such series of columns. Numbered columns are taken in numerical order.
    velocity_key
        Where the velocities in these coordinates are, specified like `use_rep`; none by default.
    mapping
        From the labels found at `time_key` to real times; needed if the labels are text other than numbers.

    Returns
    -------
    AnnData in the file's order, with

    - `obs["time"]`, float64: the times
    - `obsm["X_pca"]`, n_obs x d, float32: the coordinates
    - `obsm["velocity_pca"]`, n_obs x d, float32: the velocities, if asked for

    and everything else in an h5ad, or the other columns of a csv in `obs`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file has another format or cannot be read; if it has no such array or column (the message lists those
        that it has); if shapes do not match; or if a time or coordinate is missing or not finite.

    Examples
    --------
    >>> adata = load("cells.csv", time_key="day", use_rep="PC")  # doctest: +SKIP
    >>> adata = load("cells.npz", time_key="sample_labels", use_rep="pcs")  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, found {'a folder' if path.is_dir() else 'nothing'}: {path}")
    suffixes = [s.lower() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s != ".gz"), "")
    if kind == ".npz":
        adata = _from_npz(path, time_key, use_rep, velocity_key)
    elif kind in _SEPARATORS:
        adata = _from_table(path, _SEPARATORS[kind], time_key, use_rep, velocity_key)
    elif kind == ".h5ad":
        adata = _from_h5ad(path, time_key, use_rep, velocity_key)
    else:
        raise ValueError(f"expected a file that ends in .npz, .csv, .tsv or .h5ad, found {path}")
    if "time" in adata.obs and time_key != "time":
        logger.warning(f'obs["time"] of {path} is replaced by the times that {time_key!r} stands for')
    adata.obs["time"] = _times(adata.obs[time_key], mapping, f"{time_key!r} of {path}")
    return adata


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray]:
    """Read arrays of an npz by name; Python objects are refused, because loading them could run any code."""
    with _opened(path) as file:
        if missing := [name for name in names if name not in file.files]:
            raise ValueError(f"expected {_listed(missing)} in {path}, found {_listed(file.files)}")
        if objects := [name for name in names if _array(file, name) is None]:
            raise ValueError(f"expected numbers or text in {path}, found Python objects in {_listed(objects)}")
        return {name: file[name] for name in names}


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected an npz file, found something else: {path}")
    return np.load(path, allow_pickle=False)


def _array(file: np.lib.npyio.NpzFile, name: str) -> NDArray | None:
    """Return an array of an npz, or None if it holds Python objects."""
    try:
        return file[name]
    except ValueError:
        return None


def _from_npz(path: Path, time_key: str, use_rep: str | Sequence[str] | None, velocity_key: str | None) -> ad.AnnData:
    if use_rep is None:
        with _opened(path) as file:
            arrays = {name: array for name in file.files if (array := _array(file, name)) is not None}
            tables = [name for name, array in arrays.items() if array.ndim == 2]
            use_rep = _the_only(tables, f"arrays with two axes in {path}")
    arrays = read_arrays(path, [time_key, _one(use_rep), *([velocity_key] if velocity_key else [])])
    obs = pd.DataFrame(index=_names(len(arrays[_one(use_rep)])))
    if arrays[time_key].shape != (len(obs),):
        raise ValueError(
            f"expected {time_key!r} of shape ({len(obs)},), one time for each row of {use_rep!r}, in {path}, found "
            f"{arrays[time_key].shape}"
        )
    obs[time_key] = arrays[time_key]
    return _with_cells(ad.AnnData(obs=obs), arrays[_one(use_rep)], arrays.get(velocity_key or ""), path)


def _from_table(
    path: Path, separator: str, time_key: str, use_rep: str | Sequence[str] | None, velocity_key: str | None
) -> ad.AnnData:
    try:
        table = pd.read_csv(path, sep=separator)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"expected a table with a header, found something else: {path} ({error})") from error
    if len(table.columns) and str(table.columns[0]).startswith("Unnamed"):
        table = table.set_index(table.columns[0])
        table.index = table.index.astype(str)
        table.index.name = None
    else:
        table.index = _names(len(table))
    if time_key not in table:
        raise ValueError(f"expected a column {time_key!r} in {path}, found {_listed(table.columns)}")
    columns = _columns(table, use_rep, time_key, path)
    moving = _columns(table, velocity_key, time_key, path) if velocity_key else []
    numbers = table.apply(pd.to_numeric, errors="coerce")
    adata = ad.AnnData(obs=table.drop(columns=[*columns, *moving]))
    return _with_cells(adata, numbers[columns], numbers[moving] if moving else None, path)


def _from_h5ad(path: Path, time_key: str, use_rep: str | Sequence[str] | None, velocity_key: str | None) -> ad.AnnData:
    try:
        adata = ad.read_h5ad(path)
    except Exception as error:
        raise ValueError(f"expected an h5ad file, found one that anndata cannot read: {path} ({error})") from error
    if time_key not in adata.obs:
        raise ValueError(f"expected a column {time_key!r} in obs of {path}, found {_listed(adata.obs)}")
    key = _the_only(list(adata.obsm), f"keys of obsm in {path}") if use_rep is None else _one(use_rep)
    wanted = [key, *([velocity_key] if velocity_key else [])]
    if missing := [name for name in wanted if name not in adata.obsm]:
        raise ValueError(f"expected {_listed(missing)} in obsm of {path}, found {_listed(adata.obsm)}")
    if key != "X_pca" and "X_pca" in adata.obsm:
        logger.warning(f'obsm["X_pca"] of {path} is replaced by {key!r}')
        adata.varm.pop("PCs", None)  # they belong to the previous "X_pca"
    return _with_cells(adata, adata.obsm[key], adata.obsm[velocity_key] if velocity_key else None, path)


def _with_cells(adata: ad.AnnData, cells: ArrayLike, velocity: ArrayLike | None, path: Path) -> ad.AnnData:
    """Check coordinates and velocities, and put them in their slots."""
    for key, values in (("X_pca", cells), ("velocity_pca", velocity)):
        if values is None:
            continue
        array = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
        if array.ndim != 2 or len(array) != adata.n_obs or array.shape[1] == 0 or array.dtype.kind not in "biuf":
            raise ValueError(f"expected numbers ({adata.n_obs}, d) in {path}, found {array.dtype} {array.shape}")
        if bad := int((~np.isfinite(array)).any(1).sum()):
            raise ValueError(f"expected finite coordinates, found {bad} cells of {path} without; remove these first")
        adata.obsm[key] = array.astype(np.float32)
    if velocity is not None and adata.obsm["velocity_pca"].shape != adata.obsm["X_pca"].shape:
        shapes = adata.obsm["velocity_pca"].shape, adata.obsm["X_pca"].shape
        raise ValueError(f"expected velocities of the coordinates' shape in {path}, found {shapes[0]} for {shapes[1]}")
    return adata


def _columns(table: pd.DataFrame, wanted: str | Sequence[str] | None, time_key: str, path: Path) -> list[str]:
    """Return the columns that hold coordinates: those named, or numbered ones with a given prefix."""
    if wanted is not None and not isinstance(wanted, str):
        if missing := [name for name in wanted if name not in table]:
            raise ValueError(f"expected columns {_listed(missing)} in {path}, found {_listed(table.columns)}")
        return list(wanted)
    runs: dict[str, list[tuple[int, str]]] = {}
    for name in table.columns:
        numbered = re.fullmatch(r"(.*?)(\d+)", str(name))
        if numbered and name != time_key and pd.api.types.is_numeric_dtype(table[name]):
            runs.setdefault(numbered[1], []).append((int(numbered[2]), name))
    if wanted is None:
        wanted = _the_only(
            list(runs), f"runs of numbered columns in {path}, whose columns are {_listed(table.columns)}"
        )
    # "PC" matches "PC1" or, if there are none such, "PC_1" or "PC 1"
    found = next((runs[p] for p in (wanted, f"{wanted}_", f"{wanted} ", f"{wanted}-") if p in runs), None)
    if found is None:
        raise ValueError(
            f"expected numeric columns {wanted}1, {wanted}2, ... in {path}, found {_listed(table.columns)}"
        )
    columns = [name for _, name in sorted(found)]
    logger.info("coordinates from %d columns of %s: %s", len(columns), path.name, _listed(columns))
    return columns


def _times(values: pd.Series, mapping: Mapping[Any, float] | None, where: str) -> NDArray[np.float64]:
    if mapping is not None:
        if missing := [label for label in values.unique() if label not in mapping]:
            raise ValueError(f"expected every label at {where} in mapping, found none for {_listed(missing)}")
        values = values.map(lambda label: mapping[label])
    labels = values.astype(object)
    times = pd.to_numeric(labels, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(times)
    if bad.any():
        raise ValueError(
            f"expected numbers at {where}, found {int(bad.sum())} cells with {_listed(labels[bad].unique())}; pass "
            "mapping={label: time, ...}, or remove cells without a time"
        )
    return times


def _the_only(names: Sequence[str], what: str) -> str:
    if "X_pca" in names:
        return "X_pca"
    if len(names) != 1:
        raise ValueError(f"expected use_rep, as there is no X_pca and not exactly one of the {what}: {_listed(names)}")
    return names[0]


def _one(name: str | Sequence[str]) -> str:
    if not isinstance(name, str):
        raise ValueError(f"expected one name of an array, found {name!r}; names of columns are for csv files")
    return name


def _names(n: int) -> pd.Index:
    return pd.Index([f"cell_{i}" for i in range(n)])


def _listed(names: Iterable[Any]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f", ... ({len(shown)} in all)" if len(shown) > 20 else "") if shown else "nothing"
