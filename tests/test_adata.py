"""The AnnData boundary: what is read in whatever form it comes, and what is refused."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from sctraj import _adata, get, pp, tl

QUICK = {"n_steps": 5, "batch_size": 8}


def test_no_matrix_is_said(cells: AnnData) -> None:
    bare = AnnData(obs=cells.obs, obsm={"X_pca": cells.obsm["X_pca"]})
    with pytest.raises(ValueError, match=r'matrix in adata\.X, found none; in adata\.obsm there are: "X_pca"'):
        tl.fit_flow(bare, use_rep="X", **QUICK)
    with pytest.raises(KeyError, match="there are: none"):
        tl.fit_flow(AnnData(obs=cells.obs), use_rep="X_pca", **QUICK)


def test_without_components_they_are_offered_and_what_a_flow_wrote_is_not(cells: AnnData) -> None:
    tl.fit_flow(cells, field="closed-form", key_added="first")
    tl.trajectories(cells, 2, solver="euler", n_steps=1, key="first")
    tl.leave_one_out(cells, field="closed-form", n_seeds=1)
    cells.obsm["X_other"] = cells.obsm.pop("X_pca")
    others = ", ".join(f'"{name}"' for name in cells.obsm if not name.startswith(("first_", "flow_")))
    assert len(cells.obsm) > others.count(",") + 4
    with pytest.raises(KeyError) as caught:
        tl.fit_flow(cells, **QUICK)
    assert f"there are: {others}. Pass one of them as use_rep." in caught.value.args[0]
    assert 'scanpy.pp.pca(adata), which writes "X_pca", or pass use_rep="X"' in caught.value.args[0]


def test_the_byte_order_of_another_machine_changes_nothing(cells: AnnData) -> None:
    native = cells.obsm["X_pca"]
    other = native.astype(native.dtype.newbyteorder("S"))
    assert not other.dtype.isnative
    tl.fit_flow(cells, **QUICK)
    velocity = cells.obsm["flow_velocity"]
    cells.obsm["X_pca"] = other
    assert _adata.read_flow(cells, "flow").cells.n_obs == cells.n_obs  # the same fingerprint
    tl.fit_flow(cells, **QUICK)
    np.testing.assert_array_equal(cells.obsm["flow_velocity"], velocity)
    assert cells.obsm["X_pca"] is other


@pytest.mark.parametrize("categorical", [False, True])
def test_complex_times_and_growth_rates_are_refused(cells: AnnData, categorical) -> None:
    values = cells.obs["time"] + 1j
    cells.obs["z"] = values.astype("category") if categorical else values
    with pytest.raises(ValueError, match=r'times, real numbers, in obs\["z"\]; found complex128'):
        tl.fit_flow(cells, "z", **QUICK)
    with pytest.raises(ValueError, match=r'growth rates, real numbers, in obs\["z"\]; found complex128'):
        tl.fit_flow(cells, growth_key="z", **QUICK)
    with pytest.raises(ValueError, match="a complex, neither number nor text"):
        pp.parse_time(cells, "z", key_added="t")
    assert "flow" not in cells.uns


def test_growth_rates_may_be_categories_of_numbers_as_times_may(cells: AnnData) -> None:
    rates = np.round(np.random.default_rng(0).normal(size=cells.n_obs), 1)
    cells.obs["numbers"], cells.obs["categories"] = rates, pd.Categorical(rates)
    np.testing.assert_array_equal(_adata.read_rates(cells, "categories"), _adata.read_rates(cells, "numbers"))
    cells.obs["text"] = pd.Categorical(rates.astype(str))
    with pytest.raises(ValueError, match=r'growth rates.*obs\["text"\]; found text'):
        _adata.read_rates(cells, "text")


@pytest.mark.parametrize("record", [{"unit": "day"}, np.arange(3), "mine"])
def test_a_record_of_something_else_is_not_overwritten_by_a_flow(cells: AnnData, record) -> None:
    cells.uns["mine"] = record
    slots = {kind: set(getattr(cells, kind).keys()) for kind in ("obs", "obsm", "uns")}
    with pytest.raises(ValueError, match=r'adata\.uns\["mine"\], found something else.*another key_added'):
        tl.fit_flow(cells, key_added="mine", **QUICK)
    assert cells.uns["mine"] is record
    assert slots == {kind: set(getattr(cells, kind).keys()) for kind in slots}


def test_names_for_a_flow_are_checked_before_there_is_one(cells: AnnData) -> None:
    pp.parse_time(cells, "day", key_added="parsed")
    with pytest.raises(ValueError, match=r'del adata\.uns\["parsed"\]'):
        _adata.check_flow_key(cells, "parsed", use_rep="X_pca", columns=["time"])
    with pytest.raises(ValueError, match='without "/"'):
        _adata.check_flow_key(cells, "a/b", use_rep="X_pca", columns=["time"])
    _adata.check_flow_key(cells, "flow", use_rep="X_pca", columns=["time"])
    tl.fit_flow(cells, field="closed-form")
    _adata.check_flow_key(cells, "flow", use_rep="X_pca", columns=["time"])  # a flow may take a flow's place


def test_cells_by_other_names_or_in_another_order_are_told_from_other_cells(cells: AnnData) -> None:
    tl.fit_flow(cells, **QUICK)
    renamed = cells.copy()
    renamed.obs_names = [f"other {name}" for name in cells.obs_names]
    for same in (renamed, cells[::-1].copy()):
        with pytest.raises(ValueError, match=r"found the same ones sorted otherwise, renamed, or .* Put"):
            _adata.read_flow(same, "flow")
    renamed.obsm["X_pca"] = renamed.obsm["X_pca"][::-1]
    with pytest.raises(ValueError, match="found other times or coordinates"):
        _adata.read_flow(renamed, "flow")


def test_a_part_of_the_cells_is_told_so_even_where_it_has_too_few_of_a_snapshot(cells: AnnData) -> None:
    tl.fit_flow(cells, field="closed-form")
    part = cells[np.r_[0:2, 200:600]].copy()
    with pytest.raises(ValueError, match=rf"Expected the 600 cells.*found {part.n_obs} cells.*by rows="):
        tl.trajectories(part)


def test_what_concat_leaves_of_two_flows_is_told_from_a_flow(cells: AnnData) -> None:
    early, late = cells[cells.obs["time"] < 3].copy(), cells[cells.obs["time"] > 3].copy()
    for part in (early, late):
        tl.fit_flow(part, field="closed-form")
    both = anndata.concat([early, late], uns_merge="same")
    assert "flow" in both.uns
    for read in (get.velocity, get.loss, get.vector_field, tl.trajectories):
        with pytest.raises(KeyError, match=r"is incomplete, as after anndata\.concat.*fit_flow again"):
            read(both)
    tl.leave_one_out(both, field="closed-form")  # which needs no flow


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cells_far_from_their_origin_are_refused(cells: AnnData, dtype) -> None:
    cells.obsm["far"] = cells.obsm["X_pca"].astype(dtype) + np.array(1e6, dtype)
    with pytest.raises(ValueError, match="Subtract their mean"):
        tl.fit_flow(cells, use_rep="far", **QUICK)
    cells.obsm["near"] = cells.obsm["X_pca"].astype(dtype) + np.array(100, dtype)
    tl.fit_flow(cells, use_rep="near", **QUICK)
