"""The two real courses that benchmarks/other_courses.py makes of R packages' data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

rdata = pytest.importorskip("rdata", reason="reads R's files: pip install rdata")
DataArray = pytest.importorskip("xarray").DataArray

HOURS = ["0", "24", "48", "72"]


@pytest.fixture
def courses(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import other_courses

    return other_courses


def matrix(genes: int, cells: list[str]) -> DataArray:
    drawn = np.random.default_rng(0).gamma(1.0, 4.0, (genes, len(cells)))
    return DataArray(drawn, coords={"dim_0": [f"gene {g}" for g in range(genes)], "dim_1": cells})


@pytest.fixture
def myoblasts(courses, monkeypatch, tmp_path):
    """Write a sheet as R does, and put a matrix, which rdata cannot write, in its place."""
    cells = [f"T{i}" for i in range(40)]
    sheet = pd.DataFrame({"Hours": pd.Categorical(np.repeat(HOURS, 10))}, index=cells)
    rdata.write_rda(tmp_path / "HSMM_sample_sheet.rda", {"sheet": sheet})
    fpkm, read = matrix(60, cells), courses.read
    fpkm.values[:5] = 0.2  # nowhere at 1 FPKM
    monkeypatch.setattr(courses, "read", lambda path: fpkm if "matrix" in path.name else read(path))
    monkeypatch.setattr(courses, "N_GENES", 30)
    return SimpleNamespace(folder=tmp_path, fpkm=fpkm, sheet=sheet)


def test_myoblasts_have_their_hours_and_log_fpkm_of_variable_genes(courses, myoblasts):
    adata = courses.myoblasts(myoblasts.folder)
    assert adata.shape == (40, 30)
    assert adata.obs["time"].tolist() == np.repeat([0.0, 24.0, 48.0, 72.0], 10).tolist()
    assert not set(adata.var_names) & {f"gene {g}" for g in range(5)}
    fpkm = myoblasts.fpkm.sel(dim_0=list(adata.var_names)).values.T
    np.testing.assert_allclose(adata.X, np.log1p(fpkm), rtol=1e-5)


def test_cells_in_another_order_and_other_times_are_refused(courses, myoblasts):
    turned = myoblasts.sheet.iloc[::-1]
    rdata.write_rda(myoblasts.folder / "HSMM_sample_sheet.rda", {"sheet": turned})
    with pytest.raises(ValueError, match="one order of cells"):
        courses.myoblasts(myoblasts.folder)
    other = myoblasts.sheet.assign(Hours=pd.Categorical(np.repeat(["0", "24", "48", "96"], 10)))
    rdata.write_rda(myoblasts.folder / "HSMM_sample_sheet.rda", {"sheet": other})
    with pytest.raises(ValueError, match=r"expected hours \[0, 24, 48, 72\], found \[0, 24, 48, 96\]"):
        courses.myoblasts(myoblasts.folder)


def test_embryos_are_on_the_clock_of_divisions(courses, monkeypatch, tmp_path):
    found = SimpleNamespace(
        assayData={"exprs": matrix(4, [f"{c}C" for c in range(12)])},
        phenoData=SimpleNamespace(data=pd.DataFrame({"num_cells": np.repeat([2, 4, 8, 16, 32, 64], 2)})),
    )
    monkeypatch.setattr(courses, "read", lambda path: found)
    adata = courses.embryos(tmp_path)
    assert adata.obs["time"].tolist() == np.repeat(np.arange(1.0, 7.0), 2).tolist()
    np.testing.assert_array_equal(adata.X, found.assayData["exprs"].values.T.astype("float32"))
