"""Write files completely or not at all, and tables as text from which numbers are read back bit for bit."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd


def write_durably(path: Path, text: str) -> None:
    """Write a file such that a kill at any moment leaves either the old or the new one complete on the disk."""
    part = path.with_name(f".{path.stem}.{uuid4().hex}.part")
    try:
        with part.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Provide a path next to `path` to write to, and move that file to `path` once it is complete."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_text(table: pd.DataFrame, *, typed: bool = True) -> str:
    """Write a table as csv, with column types in the header if `typed`, such that numbers read back bit for bit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds = [_kind(table[name]) for name in table]
    writer.writerow([f"{name}:{kind}" if typed else name for name, kind in zip(table, kinds)])
    columns = [_written(table[name], kind) for name, kind in zip(table, kinds)]
    writer.writerows(zip(*columns))
    return out.getvalue()


def from_text(text: str) -> pd.DataFrame:
    """Read a table that `to_text` has written."""
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    names, kinds = zip(*(column.rsplit(":", 1) for column in header)) if header else ((), ())
    columns = list(zip(*rows)) if rows else [()] * len(names)
    # by position first, since two columns may have the same name
    table = pd.DataFrame({k: _read(column, kind) for k, (column, kind) in enumerate(zip(columns, kinds))})
    table.columns = pd.Index(names, dtype=object)
    return table


def _kind(column: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(column.dtype):
        return "bool"
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        return column.dtype.name
    return "str" if all(isinstance(value, str) for value in column) else "json"


def _written(column: pd.Series, kind: str) -> list[str]:
    if kind == "json":
        return [json.dumps(value, default=lambda one: one.item()) for value in column]  # for numpy's number types
    if kind == "str":
        return list(column)
    return [repr(value) for value in column.tolist()]  # Python numbers, whose repr reads back exactly


def _read(values: Iterable[str], kind: str) -> Any:
    if kind == "json":
        return pd.Series([json.loads(value) for value in values], dtype=object)
    if kind == "str":
        return pd.Series(list(values), dtype=object)
    if kind == "bool":
        return np.array([value == "True" for value in values], dtype=bool)
    number = float if kind.startswith("float") else int
    return np.array([number(value) for value in values], dtype=kind)
