"""What `interpolate` refuses, before any work."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from sctraj import tl
from sctraj._adata import genes
from sctraj.tl import _interpolate


@pytest.fixture
def fitted(cells: AnnData) -> AnnData:
    tl.fit_flow(cells, field="closed-form")
    return cells


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: object, **__: object) -> None:
        raise AssertionError("cells were moved")

    monkeypatch.setattr(_interpolate, "moved", moved)


WRONG: list[tuple[dict[str, object], str]] = [({"solver": "RK4"}, "a solver of euler, rk4, dopri5, found 'RK4'$")]
WRONG += [
    ({"tolerance": tolerance, "solver": "dopri5"}, f"a positive tolerance, found {tolerance}; leave it out for")
    for tolerance in (0, -1.0, float("nan"))
]
WRONG += [
    ({"n_steps": n}, f"a whole number of n_steps, at least 1, found {n!r}; leave it out for")
    for n in (-5, 0, 0.3, 2.5, float("nan"), float("inf"), "7")
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=str)
@pytest.mark.parametrize("verb", [partial(tl.interpolate, time=1.5), tl.trajectories], ids=["at", "along"])
@pytest.mark.usefixtures("idle")
def test_of_solver_steps_and_tolerance_the_wrong_one_alone_is_named(fitted: AnnData, verb, arguments, message) -> None:
    with pytest.raises(ValueError, match=f"^expected {message}"):
        verb(fitted, **arguments)


@pytest.mark.parametrize("time", ["1", None, [1.0], True, 1j])
@pytest.mark.usefixtures("idle")
def test_a_time_that_is_no_number_is_refused(fitted: AnnData, time) -> None:
    with pytest.raises(ValueError, match="expected a time that is a number, found"):
        tl.interpolate(fitted, time)


def test_a_time_may_be_a_number_of_any_kind(fitted: AnnData) -> None:
    places = [
        tl.interpolate(fitted, time, n_steps=1.0, decode=False).obsm["X_pca"]
        for time in (4, 4.0, np.float32(4), np.int8(4), np.array(4.0), torch.tensor(4.0))
    ]
    for one in places[1:]:
        np.testing.assert_array_equal(one, places[0])


@pytest.mark.parametrize("time_key", ["weight", "source_cell"])
@pytest.mark.usefixtures("idle")
def test_a_time_column_of_a_name_that_is_written_is_refused(cells: AnnData, time_key) -> None:
    cells.obs[time_key] = cells.obs["time"]
    tl.fit_flow(cells, time_key, field="closed-form")
    with pytest.raises(ValueError, match=rf'"source_cell" and "weight".*time_key="{time_key}"; rename'):
        tl.interpolate(cells, 1.5)


def test_cells_of_either_side_jitter_on_their_own() -> None:
    n, x = 200, np.random.default_rng(0).normal(size=(200, 2))
    obs = pd.DataFrame({"time": np.repeat([0.0, 1.0], n)}, index=[f"c{k}" for k in range(2 * n)])
    cells = AnnData(obs=obs, obsm={"X_pca": np.concatenate([x, x + 1]).astype(np.float32)})
    tl.fit_flow(cells, method="ot-cfm", field="closed-form")
    still, jittered = (tl.interpolate(cells, 0.5, jitter=jitter).obsm["X_pca"] for jitter in (0.0, 1.0))
    before, after = np.split(jittered - still, 2)  # the same cells half-way, from both sides
    assert np.abs(before).mean() > 0.05
    assert abs(np.mean(np.sign(before * after))) < 0.2  # of 400 signs, four standard errors


def test_cells_are_decoded_after_a_part_of_them_was_left_out(cells: AnnData) -> None:
    """The PCA is of all cells, about their mean; of the rest ``X_pca`` has another one."""
    part = cells[cells.obs["fate"] != "A"].copy()
    assert np.abs(part.obsm["X_pca"].mean(0)).max() > 0.1
    tl.fit_flow(part, field="closed-form")
    there = tl.interpolate(part, 2.5)  # a snapshot's own time: its cells as they are, through the PCA and back
    own = part[part.obs["time"] == 2.5]
    rebuilt = cells.X.mean(0) + own.obsm["X_pca"] @ cells.varm["PCs"].T
    np.testing.assert_allclose(
        there.X, rebuilt[:, [cells.var_names.get_loc(n) for n in there.var_names]], atol=0.03
    )  # means of genes beside the PCA's plane are the part's own


def test_a_flow_of_genes_gives_genes_back(cells: AnnData) -> None:
    cells.obsm.clear()
    tl.fit_flow(cells, use_rep="X", field="closed-form")
    there = tl.interpolate(cells, 1.5)
    assert there.var_names.equals(cells.var_names)
    assert there.X.shape == (there.n_obs, cells.n_vars)
    assert not there.obsm
    own = tl.interpolate(cells, 1.0)
    np.testing.assert_allclose(own.X, cells[own.obs["source_cell"].to_numpy()].X, rtol=1e-6)


def test_genes_that_are_asked_for_are_those_of_all(cells: AnnData, caplog, monkeypatch) -> None:
    tl.fit_flow(cells, field="closed-form")
    asked = [str(cells.var_names[k]) for k in (7, 2)]
    caplog.set_level("INFO", logger="sctraj")
    every, some, one = (tl.interpolate(cells, 1.5, genes=genes) for genes in (None, asked, asked[0]))
    assert some.var_names.tolist() == asked
    assert one.var_names.tolist() == asked[:1]
    np.testing.assert_allclose(some.X, every[:, asked].X, rtol=1e-6)
    assert caplog.text.count("of whose variance the components hold") == 1  # of all, not of these
    assert tl.interpolate(cells, 1.5, genes=[]).shape == (every.n_obs, 0)
    with pytest.raises(KeyError, match="nothing of the sort"):
        tl.interpolate(cells, 1.5, genes=["nothing of the sort"])
    with pytest.raises(ValueError, match=r"decode=True to decode genes to, found decode=False; leave one of both out"):
        tl.interpolate(cells, 1.5, genes=asked, decode=False)
    tl.fit_flow(cells, use_rep="X", field="closed-form")
    for wrong in ({"genes": ["nothing of the sort"]}, {"genes": asked, "decode": False}):
        with monkeypatch.context() as patch:
            patch.setattr(_interpolate, "moved", None)  # refused before cells are moved
            with pytest.raises((KeyError, ValueError), match=r"nothing of the sort|found decode=False"):
                tl.interpolate(cells, 1.5, **wrong)
    np.testing.assert_allclose(tl.interpolate(cells, 1.0, genes=asked).X, cells[cells.obs["time"] == 1, asked].X)


def test_many_genes_are_decoded_in_parts_to_the_same_values(cells: AnnData, monkeypatch) -> None:
    tl.fit_flow(cells, field="closed-form")
    whole = tl.interpolate(cells, 1.5).X
    monkeypatch.setattr(genes, "SLAB", 8 * cells.n_vars * 7)  # seven cells
    np.testing.assert_allclose(tl.interpolate(cells, 1.5).X, whole, rtol=1e-6, atol=1e-6)


def test_what_was_moved_is_said_and_nothing_is_at_a_snapshots_own_time(fitted: AnnData, caplog) -> None:
    caplog.set_level("INFO", logger="sctraj")
    tl.interpolate(fitted, 1.5)
    assert "cells moved from 1 and 2.5" in caplog.text
    caplog.clear()
    tl.interpolate(fitted, 1.0)
    assert f"{(fitted.obs['time'] == 1).sum()} cells that were sampled then, as they are" in caplog.text


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (lambda a: None, {"decode": False}, r"\(by decode=False\)"),
        (lambda a: a.varm.pop("PCs"), {}, r'\(no varm\["PCs"\]\)'),
        (lambda a: a.uns["flow"]["params"].update(use_rep="X_other"), {}, r'\(the flow is in "X_other"; from "X_pca"'),
    ],
)
def test_why_nothing_is_decoded_is_said(fitted: AnnData, caplog, change, options, reason) -> None:
    fitted.obsm["X_other"] = fitted.obsm["X_pca"]
    fitted.varm["PCs"] = np.zeros((fitted.n_vars, fitted.obsm["X_pca"].shape[1]))
    change(fitted)
    caplog.set_level("INFO", logger="sctraj")
    tl.interpolate(fitted, 1.5, **options)
    assert re.search(f"not decoded to genes {reason}", caplog.text)
