"""Many cells: data that stay in their file, outputs that go to one, and memory that is asked for before it is used."""

from __future__ import annotations

import re
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import sctraj
from sctraj import _adata, _memory
from sctraj.flow.integrate import Moved
from sctraj.tl import _interpolate, _moves
from sctraj.tl import _trajectories as verb

QUICK = {"n_steps": 5, "batch_size": 8}
KINDS = ["backed", "dask", "lazy-h5ad", "lazy-zarr"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2:UserWarning", "ignore:Consolidated metadata:UserWarning", "ignore::ResourceWarning"
)


def _forbidden(adata: AnnData) -> None:
    raise AssertionError("X was read")


def _opened(cells: AnnData, kind: str, folder: Path) -> AnnData:
    """The same cells, left in a file or behind dask arrays."""
    if kind == "dask":
        array = pytest.importorskip("dask.array")
        cells = cells.copy()
        for slot in ("X_pca", "X_latent"):
            cells.obsm[slot] = array.from_array(cells.obsm[slot], chunks=(97, 4))
        return cells
    path = folder / f"cells.{'zarr' if kind == 'lazy-zarr' else 'h5ad'}"
    (cells.write_zarr if kind == "lazy-zarr" else cells.write_h5ad)(path)
    if kind == "backed":
        return anndata.read_h5ad(path, backed="r")
    pytest.importorskip("xarray")
    if not hasattr(anndata.experimental, "read_lazy"):
        pytest.skip("this anndata opens nothing lazily")
    return anndata.experimental.read_lazy(path)


@pytest.fixture
def few(cells: AnnData) -> AnnData:
    """150 cells of three snapshots, interleaved, with a category of numbers."""
    early = np.flatnonzero(cells.obs["time"] < 3)
    few = cells[np.random.default_rng(0).permutation(early)[:150]].copy()
    few.obs["t"] = pd.Categorical(few.obs["time"])
    return few


@pytest.fixture
def fitted(few: AnnData) -> AnnData:
    sctraj.tl.fit_flow(few, **QUICK)
    return few


def _everything(adata: AnnData, time_key: str) -> AnnData:
    sctraj.tl.fit_flow(adata, time_key, growth_key="growth_rate", **QUICK)
    sctraj.tl.trajectories(adata, times=3, n_steps=2)
    sctraj.tl.leave_one_out(adata, time_key, methods=("ot-cfm",), n_seeds=1, **QUICK)
    return adata


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time_key", ["time", "t"])
def test_data_left_in_their_file_give_the_same_bits(few: AnnData, kind, time_key, tmp_path, monkeypatch) -> None:
    opened = _opened(few, kind, tmp_path)
    expected = _everything(few, time_key)
    monkeypatch.setattr(_adata.cells, "SLAB", 100)  # numbers: many slabs
    with monkeypatch.context() as patch:
        patch.setattr(AnnData, "X", property(_forbidden))
        _everything(opened, time_key)
    assert opened.uns["flow"]["fingerprint"] == expected.uns["flow"]["fingerprint"]
    for slot in ("flow_velocity", "flow_trajectories", "flow_restored", "flow_w1"):
        assert np.array_equal(np.asarray(opened.obsm[slot]), np.asarray(expected.obsm[slot]), equal_nan=True), slot
    assert np.array_equal(np.asarray(opened.obs["flow_growth"]), expected.obs["flow_growth"])
    with pytest.raises(KeyError, match=r"look like times.*time"):
        sctraj.tl.fit_flow(opened, "hour", **QUICK)
    with pytest.raises(ValueError, match="parse_time"):
        sctraj.tl.fit_flow(opened, "day", **QUICK)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_is_read_back_from_a_file_left_there(fitted: AnnData, kind, tmp_path) -> None:
    opened = _opened(fitted, kind, tmp_path)
    for adata in (fitted, opened):
        sctraj.tl.trajectories(adata, times=3, n_steps=2)
    assert np.array_equal(fitted.obsm["flow_trajectories"], opened.obsm["flow_trajectories"])
    assert "flow_growth" in opened.obs
    _adata.drop_column(opened, "flow_growth")
    _adata.drop_column(opened, "flow_growth")
    assert "flow_growth" not in opened.obs
    assert "time" in opened.obs


def test_no_copy_of_a_backed_one_and_said_before_work(fitted: AnnData, tmp_path) -> None:
    opened = _opened(fitted, "backed", tmp_path)
    del opened.uns["flow"]  # with which trajectories would go to work
    with pytest.raises(ValueError, match=r"backed one and copy=True.*copy=False.*to_memory\(\)"):
        sctraj.tl.trajectories(opened, copy=True)
    with pytest.raises(ValueError, match=r"view of a backed one.*to_memory\(\)"):
        sctraj.tl.trajectories(opened[:50])
    with pytest.raises(ValueError, match="backed one and copy=True"):
        sctraj.tl.fit_flow(opened, copy=True, **QUICK)
    assert not opened[:50].to_memory().is_view  # the way out


def test_dask_arrays_of_unknown_size_are_refused(few: AnnData, tmp_path) -> None:
    opened = _opened(few, "dask", tmp_path)
    array = opened.obsm["X_pca"]
    values = SimpleNamespace(dask=array.dask, shape=(np.nan, 6))
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        _adata.cells._in_memory(values, "X_pca")


def test_slabs_and_layout_change_nothing(few: AnnData, monkeypatch) -> None:
    whole = _adata.read_snapshots(few, "time", "X_pca", least=2)
    few.obsm["X_pca"] = np.asfortranarray(few.obsm["X_pca"])
    assert whole.fingerprint == _adata.read_snapshots(few, "time", "X_pca", least=2).fingerprint
    monkeypatch.setattr(_adata.cells, "SLAB", 13)
    slabs = _adata.read_snapshots(few, "time", "X_pca", least=2)
    assert whole.fingerprint == slabs.fingerprint
    for k, t in enumerate(whole.snapshots.times):
        own = np.flatnonzero(few.obs["time"] == t)
        assert np.array_equal(slabs.index[k], own)
        assert np.array_equal(slabs.snapshots.points[k].numpy(), few.obsm["X_pca"][own])


def test_reading_takes_one_copy_of_the_representation() -> None:
    n, d = 100_000, 50
    rng = np.random.default_rng(0)
    big = AnnData(obs=pd.DataFrame({"time": rng.integers(4, size=n)}, index=np.arange(n).astype(str)))
    big.obsm["X_pca"] = rng.normal(size=(n, d)).astype(np.float32)
    tracemalloc.start()
    _adata.read_snapshots(big, "time", "X_pca", least=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # beside the snapshots themselves, the names and a few numbers per cell: about 100 bytes of 200
    assert peak < 1.8 * big.obsm["X_pca"].nbytes


# --- trajectories


@pytest.mark.parametrize("rows", [1, 7, 10_000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_holds_what_memory_would(fitted: AnnData, rows, dtype, tmp_path, monkeypatch) -> None:
    pytest.importorskip("zarr")
    if rows == 1:
        fitted = fitted[:40].copy()
        sctraj.tl.fit_flow(fitted, **QUICK)
    sctraj.tl.trajectories(fitted, times=4, n_steps=3)
    points, weights = fitted.obsm["flow_trajectories"], fitted.obsm["flow_trajectory_weights"]
    monkeypatch.setattr(verb, "SLAB", rows * 5 * 6 * 4)  # five times: four even ones, and the second snapshot's
    monkeypatch.setattr(_adata.store, "CHUNK", 1000)
    for _ in range(2):  # earlier trajectories are replaced
        sctraj.tl.trajectories(fitted, times=4, n_steps=3, dtype=dtype, store=str(tmp_path / "paths"))
    assert not {"flow_trajectories", "flow_trajectory_weights"} & set(fitted.obsm)
    stored = _adata.read_trajectories(fitted, "flow")
    assert stored.dtype == dtype
    # float16 keeps 11 bits; in float32 the order of sums depends on how many cells are met at once
    tolerance = 1e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(stored, points, rtol=tolerance, atol=tolerance)
    some = _adata.read_trajectories(fitted, "flow", [5, 3, 17])
    assert np.array_equal(some, stored[[5, 3, 17]])
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "paths"), mode="r")
    np.testing.assert_allclose(group["weights"][:], weights, rtol=1e-4)
    assert np.array_equal(group["times"][:], fitted.uns["flow"]["trajectory_times"])
    fitted.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(_adata.read_trajectories(back, "flow"), stored)
    with pytest.raises(ValueError, match="Take the rows from that one"):
        _adata.read_trajectories(fitted[:20], "flow")
    # and back into memory
    sctraj.tl.trajectories(fitted, times=4, n_steps=3)
    assert "trajectory_store" not in fitted.uns["flow"]
    assert np.array_equal(fitted.obsm["flow_trajectories"], points)


def test_half_the_size_in_memory(fitted: AnnData) -> None:
    sctraj.tl.trajectories(fitted, times=4, n_steps=3)
    single = fitted.obsm["flow_trajectories"]
    sctraj.tl.trajectories(fitted, times=4, n_steps=3, dtype="float16")
    assert fitted.obsm["flow_trajectories"].dtype == np.float16
    assert np.array_equal(fitted.obsm["flow_trajectories"], single.astype(np.float16))
    assert np.array_equal(_adata.read_trajectories(fitted, "flow"), fitted.obsm["flow_trajectories"])
    with pytest.raises(ValueError, match=r"float32 or float16.*float64"):
        sctraj.tl.trajectories(fitted, dtype="float64")


def test_float16_that_would_overflow(few: AnnData) -> None:
    few.obsm["X_pca"] *= 2.0**16
    sctraj.tl.fit_flow(few, **QUICK)
    with pytest.raises(ValueError, match=r"65504.*'float32'"):
        sctraj.tl.trajectories(few, dtype="float16")


def test_what_does_not_fit_is_said_before_the_work(fitted: AnnData, tmp_path, monkeypatch) -> None:
    def work(*args: object) -> None:
        raise AssertionError("cells were moved")

    monkeypatch.setattr(verb, "_path", work)
    needed = 150 * 6 * 6 * 4 + 150 * 6 * 4  # five even times, and the second snapshot's
    numbers = r"150 cells x 6 times x 6 dimensions in float32.*fewer times, dtype='float16'.*store="
    monkeypatch.setattr(_memory, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=numbers):
        sctraj.tl.trajectories(fitted, times=5)
    for enough in (needed, None):
        monkeypatch.setattr(_memory, "available_memory", lambda enough=enough: enough)
        with pytest.raises(AssertionError, match="moved"):
            sctraj.tl.trajectories(fitted, times=5)
    monkeypatch.setattr(_memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"GiB of disk.*larger disk"):
        sctraj.tl.trajectories(fitted, times=5, store=str(tmp_path / "new" / "paths"))
    assert not any(tmp_path.iterdir())
    assert "flow_trajectories" not in fitted.obsm


def test_genes_that_do_not_fit_are_said_before_cells_are_moved(cells: AnnData, monkeypatch) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    sctraj.tl.trajectories(cells, times=2, n_steps=1)
    n_times, first = len(cells.uns["flow"]["trajectory_times"]), cells.obs["time"] == 0
    n_moved, n_genes = int(cells.obs["time"].isin([1.0, 2.5]).sum()), cells.varm["PCs"].any(axis=1).sum()

    monkeypatch.setattr(_memory, "available_memory", lambda: 4 * n_moved * n_genes - 1)
    with monkeypatch.context() as patch:
        patch.setattr(_interpolate, "moved", None)  # not called
        with pytest.raises(ValueError, match=rf"{n_moved} cells x {n_genes} genes.*genes=.*decode=False"):
            sctraj.tl.interpolate(cells, 1.5)
    assert sctraj.tl.interpolate(cells, 1.5, genes=[cells.var_names[0]]).n_obs == n_moved
    assert sctraj.tl.interpolate(cells, 1.5, decode=False).n_obs == n_moved
    monkeypatch.setattr(_memory, "available_memory", lambda: 4 * n_moved * n_genes)
    assert sctraj.tl.interpolate(cells, 1.5).n_vars == n_genes

    monkeypatch.setattr(_memory, "available_memory", lambda: 4 * cells.n_obs * n_times * 2 - 1)
    with pytest.raises(ValueError, match=rf"{cells.n_obs} cells x {n_times} times x 2 genes.*rows="):
        sctraj.get.trajectories(cells, genes=cells.var_names[:2])
    assert len(sctraj.get.trajectories(cells, genes=cells.var_names[:2], rows=first)) == first.sum() * n_times


def test_trajectories_on_disk_that_do_not_fit_are_not_read(cells: AnnData, tmp_path, monkeypatch) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    sctraj.tl.trajectories(cells, times=2, n_steps=1, store=str(tmp_path / "paths"))
    monkeypatch.setattr(_memory, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=rf"{cells.n_obs} cells x .* dimensions.*rows="):
        sctraj.get.trajectories(cells)
    assert len(sctraj.get.trajectories(cells, rows=[3])) == len(cells.uns["flow"]["trajectory_times"])


def test_the_number_is_in_gibibytes(monkeypatch) -> None:
    monkeypatch.setattr(_memory, "available_memory", lambda: 2**31)
    with pytest.raises(ValueError, match=r"2\.0 GiB of memory.*3\.8 GiB"):
        verb._check_size((1_000_000, 20, 50), "float32", None)
    monkeypatch.setattr(_memory, "available_memory", lambda: 2**30)
    with pytest.raises(ValueError, match=r"1\.9 GiB") as error:
        verb._check_size((1_000_000, 20, 50), "float16", None)
    assert "dtype" not in str(error.value)


def test_free_memory_is_that_of_this_machine(monkeypatch) -> None:
    known = _memory.available_memory()
    monkeypatch.setitem(sys.modules, "psutil", None)
    by_system = _memory.available_memory()
    for value in (known, by_system):
        assert value is None or 2**26 < value < 2**46


@pytest.mark.parametrize("method", ["uot-cfm", "ot-cfm"])
def test_the_blocks_that_snapshots_are_coupled_in_are_said_and_can_be_chosen(few: AnnData, method, caplog) -> None:
    def said(verb, **arguments) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="sctraj"):
            verb(few, **arguments, **QUICK)
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("coupling from")]

    assert said(sctraj.tl.fit_flow, method=method, block=200) == []
    assert few.uns["flow"]["params"]["block"] == 200
    as_it_is = few.obsm["flow_velocity"]
    assert said(sctraj.tl.fit_flow, method=method) == []
    assert "block" not in few.uns["flow"]["params"]
    np.testing.assert_array_equal(few.obsm["flow_velocity"], as_it_is)
    sigma = few.uns["flow"]["params"]["sigma"]
    told = said(sctraj.tl.fit_flow, method=method, block=20)
    assert len(told) == 2  # intervals
    sizes = few.obs["time"].value_counts(sort=False).sort_index()
    for (n0, n1), line in zip(pairwise(sizes), told, strict=True):
        assert re.search(rf": {n0} and {n1} cells in \d blocks$", line)
    assert few.uns["flow"]["params"]["sigma"] == pytest.approx(sigma, rel=1e-12)  # measured whole
    assert not np.array_equal(few.obsm["flow_velocity"], as_it_is)
    assert len(said(sctraj.tl.leave_one_out, methods=(method,), n_seeds=1, block=20)) == 1  # the gap
    assert few.uns["leave_one_out_protocol"]["block"] == 20


@pytest.mark.parametrize("what", ["folder", "file", "group"])
def test_a_store_that_holds_something_else_is_left_alone(fitted: AnnData, what, tmp_path) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "mine"
    if what == "file":
        path.write_text("mine")
    elif what == "folder":
        path.mkdir()
        (path / "data.txt").write_text("mine")
    else:
        zarr.open_group(str(path), mode="w").attrs["mine"] = 1
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="something else at"):
        sctraj.tl.trajectories(fitted, store=str(path))
    assert before == sorted(p.name for p in tmp_path.rglob("*"))


def test_a_store_that_is_gone(fitted: AnnData, tmp_path) -> None:
    pytest.importorskip("zarr")
    with pytest.raises(KeyError, match=r"tl\.trajectories"):
        _adata.read_trajectories(fitted, "flow")
    sctraj.tl.trajectories(fitted, times=3, n_steps=2, store=str(tmp_path / "paths"))
    (tmp_path / "paths").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="Move the folder back"):
        _adata.read_trajectories(fitted, "flow")


def test_a_store_that_another_flow_took_is_refused(fitted: AnnData, tmp_path) -> None:
    pytest.importorskip("zarr")
    sctraj.tl.fit_flow(fitted, rng=1, key_added="other", **QUICK)
    store = str(tmp_path / "paths")
    sctraj.tl.trajectories(fitted, times=3, n_steps=2, store=store)
    earlier = fitted.copy()
    sctraj.tl.trajectories(fitted, times=3, n_steps=2, store=store, key="other")
    assert np.isfinite(_adata.read_trajectories(fitted, "other")).all()
    with pytest.raises(ValueError, match=r'trajectories of uns\["flow"\].*found others'):
        sctraj.get.trajectories(fitted)
    # of the same name and cells, too
    sctraj.tl.trajectories(fitted, times=3, n_steps=2, store=store)
    assert np.isfinite(_adata.read_trajectories(fitted, "flow")).all()
    with pytest.raises(ValueError, match="found others, computed later"):
        _adata.read_trajectories(earlier, "flow")


def test_a_store_of_the_same_cells_in_another_order_is_refused(fitted: AnnData, tmp_path) -> None:
    pytest.importorskip("zarr")
    sctraj.tl.trajectories(fitted, times=3, n_steps=2, store=str(tmp_path / "paths"))
    with pytest.raises(ValueError, match="another order"):
        _adata.read_trajectories(fitted[::-1], "flow")


@pytest.mark.parametrize("linked", [False, True])
def test_trajectories_that_fail_leave_the_earlier_ones(fitted: AnnData, linked, tmp_path, monkeypatch) -> None:
    pytest.importorskip("zarr")
    store = tmp_path / "paths"
    if linked:
        (tmp_path / "elsewhere").mkdir()
        store.symlink_to(tmp_path / "elsewhere" / "paths")
    sctraj.tl.trajectories(fitted, times=3, n_steps=2, store=str(store))
    there, record = _adata.read_trajectories(fitted, "flow"), dict(fitted.uns["flow"])
    monkeypatch.setattr(verb, "SLAB", 4 * 5 * 6 * 4)
    follow, asked = verb._path, []

    def failing(*arguments: object) -> object:
        asked.append(arguments)
        if len(asked) > 5:
            raise RuntimeError("out of memory")
        return follow(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "_path", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            sctraj.tl.trajectories(fitted, times=4, n_steps=2, store=str(store))
    assert np.array_equal(_adata.read_trajectories(fitted, "flow"), there)
    assert fitted.uns["flow"]["trajectory_store_id"] == record["trajectory_store_id"]
    sctraj.tl.trajectories(fitted, times=4, n_steps=2, store=str(store))
    assert _adata.read_trajectories(fitted, "flow").shape[1] > there.shape[1]
    assert store.is_symlink() == linked
    # nothing half-done or old is left beside it
    left = [p.name for p in (*tmp_path.iterdir(), *(tmp_path / "elsewhere").glob("*"))]
    assert sorted(left) == (["elsewhere", "paths", "paths"] if linked else ["paths"])


def test_a_store_that_a_fit_no_longer_names_is_said(cells: AnnData, tmp_path, caplog) -> None:
    pytest.importorskip("zarr")
    sctraj.tl.fit_flow(cells, field="closed-form")
    sctraj.tl.trajectories(cells, times=2, store=str(tmp_path / "paths"))
    caplog.set_level("INFO", logger="sctraj")
    sctraj.tl.fit_flow(cells, field="closed-form")
    assert f"; removed what an earlier flow left: what named the trajectories in {tmp_path / 'paths'}" in caplog.text
    assert "trajectory_store" not in cells.uns["flow"]


class Away(torch.nn.Module):
    """Everything moves along the first coordinate, as far as this is told."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self.speed = torch.nn.Parameter(torch.tensor(speed))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.speed.expand(len(x), 1), 0 * x], 1)  # the last column is growth


@pytest.mark.parametrize("stored", [False, True])
def test_paths_that_leave_the_sampled_cells_are_said(caplog, stored, tmp_path) -> None:
    cells = sctraj.datasets.simulated_differentiation(120, n_genes=8, n_pcs=4)
    last, module = cells.obs["time"].max(), Away(1e3)
    sctraj.tl.fit_flow(cells, module=module, learning_rate=1e-12, n_steps=1, batch_size=6)
    kept = {"module": module, "n_steps": 1}
    if stored:
        pytest.importorskip("zarr")
        kept["store"] = str(tmp_path / "paths")
    caplog.set_level("WARNING", logger="sctraj")
    sctraj.tl.trajectories(cells, times=[0.5, last - 0.5], **kept)  # no snapshot there to hold them against
    assert "no cells were sampled" not in caplog.text
    sctraj.tl.trajectories(cells, times=3, **kept)
    assert "100% of the cells of time" in caplog.text
    assert "where no cells were sampled: do not rely on paths" in caplog.text


@pytest.mark.parametrize(("n", "said"), [(10, ""), (11, "11% of the cells of time 0 arrive at time 1 where")])
def test_more_than_a_tenth_of_a_snapshots_paths_that_leave_the_cells_are_said(caplog, monkeypatch, n, said) -> None:
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    obs = pd.DataFrame({"time": np.repeat([0.0, 1.0], 100)}, index=[f"c{k}" for k in range(200)])
    cells = AnnData(obs=obs, obsm={"X_pca": np.concatenate([x, x])})

    def leaving(field, x, t0, t1, how) -> Moved:
        away = (t1 > t0) * (torch.arange(100) < n)
        return Moved(x + 1e3 * away[:, None], torch.zeros(1, 100))

    sctraj.tl.fit_flow(cells, field="closed-form", sigma=0.1)
    monkeypatch.setattr(_moves, "transport", leaving)
    caplog.set_level("WARNING", logger="sctraj")
    sctraj.tl.trajectories(cells, times=2)
    assert said in caplog.text
    assert ("no cells were sampled" in caplog.text) == bool(said)


def test_earlier_trajectories_are_put_back_where_new_ones_cannot_take_their_place(tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    place, rename = tmp_path / "paths", Path.rename
    place.mkdir()
    (place / "earlier").touch()

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError), _adata.replaced(place):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["paths"]
    assert (place / "earlier").exists()
