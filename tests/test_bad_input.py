"""Bad input: an error that says what was expected, what was found and what to do, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn

import sctraj
from sctraj.flow.plans import Plans

Change = Callable[[AnnData], None]
QUICK = {"n_steps": 5, "batch_size": 8}


def _set(adata: AnnData, slot: str, value: object) -> None:
    adata.obsm[slot] = value


def _nan_times(adata: AnnData) -> None:
    adata.obs.loc[adata.obs_names[[3, 7]], "time"] = np.nan


def _text_time(adata: AnnData) -> None:
    adata.obs["time"] = "D" + adata.obs["time"].astype(str)


def _rounded(adata: AnnData) -> None:
    adata.obs["time"] = np.tile([0.3, 0.1 + 0.2, 1.0], adata.n_obs // 3)


def _nan_cells(adata: AnnData) -> None:
    adata.obsm["X_pca"][[5, 9], 1] = np.inf


def _tiny_snapshot(adata: AnnData) -> None:
    adata.obs.loc[adata.obs_names[:2], "time"] = 99.0


def _constant(adata: AnnData) -> None:
    adata.obsm["X_pca"][:, 2] = 3.0


def _duplicates(adata: AnnData) -> None:
    names = adata.obs_names.to_numpy().copy()
    names[1] = names[0]
    adata.obs_names = names


def _one_snapshot(adata: AnnData) -> None:
    adata.obs["time"] = 1.0


CASES: dict[str, tuple[Change, dict[str, object], type[Exception], str]] = {
    "no such time column": (lambda a: None, {"time_key": "hour"}, KeyError, "look like times.*day.*time|time.*day"),
    "no numbers in what looks like times": (lambda a: a.obs.drop(columns="time", inplace=True), {}, KeyError,
                                            r"look like times: day\. Call sctraj\.pp\.parse_time\(adata, \"day\"\)"),
    "text in the usual column": (_text_time, {}, ValueError,
                                 r"found text such as D.*parse_time\(adata, \"time\", key_added=\"time_parsed\"\)"),
    "dates": (lambda a: a.obs.insert(0, "date", pd.Timestamp("2020-01-01")), {"time_key": "date"}, ValueError,
              r"\(adata\.obs\[\"date\"\] - adata\.obs\[\"date\"\]\.min\(\)\)\.dt\.total_seconds\(\) / 86400.*\"days\""),
    "times that are one but for rounding": (_rounded, {}, ValueError, "found 0.3 and 0.30000000000000004: if they are"),
    "text times": (lambda a: None, {"time_key": "day"}, ValueError, r"pp\.parse_time\(adata, \"day\"\)"),
    "boolean times": (lambda a: a.obs.insert(0, "b", True), {"time_key": "b"}, ValueError, "bool"),
    "NaN times": (_nan_times, {}, ValueError, "2 of 600 cells.*cell_3, cell_7"),
    "NaN cells": (_nan_cells, {}, ValueError, "2 of 600 cells.*cell_5, cell_9"),
    "one snapshot": (_one_snapshot, {}, ValueError, "at least 2 snapshots.*found 1"),
    "tiny snapshot": (_tiny_snapshot, {}, ValueError, r"at least 3 cells.*99 \(2\)"),
    "no such representation": (lambda a: None, {"use_rep": "X_umap"}, KeyError, "X_umap.*X_pca"),
    "integers": (lambda a: _set(a, "R", np.arange(1800, dtype=np.int8).reshape(600, 3)), {"use_rep": "R"}, ValueError,
                 "float32 or float64.*int8"),
    "float16": (lambda a: _set(a, "R", a.obsm["X_pca"].astype(np.float16)), {"use_rep": "R"}, ValueError, "float16"),
    "duplicate names": (_duplicates, {}, ValueError, "obs_names_make_unique"),
    "constant dimension": (_constant, {}, ValueError, r"1 of 6.*\(2; the first is 0\)"),
    "sigma below zero": (lambda a: None, {"sigma": -1.0}, ValueError, "sigma of at least 0, found -1"),
    "sigma not finite": (lambda a: None, {"sigma": float("nan")}, ValueError, "finite sigma"),
    "no sigma for a score": (lambda a: None, {"sigma": 0.0, "method": "sb-cfm"}, ValueError, "positive sigma.*ot-cfm"),
    "sigma too small": (lambda a: None, {"sigma": 1e-5, "method": "sb-cfm"}, ValueError, "sigma at least .* larger"),
    "blocks of one cell": (lambda a: None, {"block": 1}, ValueError, "block.*at least 2, found 1"),
    "endless blocks": (lambda a: None, {"block": float("inf")}, ValueError, "whole number of cells.*inf"),
    "half a cell": (lambda a: None, {"block": 20.5}, ValueError, "whole number of cells.*20.5"),
    "unknown method": (lambda a: None, {"method": "ot"}, ValueError, "ot-cfm.*found 'ot'"),
    "unknown path": (lambda a: None, {"path": "bent"}, ValueError, "expected a path of .*found 'bent'"),
    "a path of its own": (lambda a: None, {"path": "hermite", "method": "sb-cfm"}, ValueError, "no path for sb-cfm"),
    "what is written": (lambda a: None, {"use_rep": "flow_velocity"}, ValueError, "stay as they are, found \"flow_vel"),
    "what is written in obs": (lambda a: a.obs.insert(0, "flow_growth", a.obs["time"]), {"time_key": "flow_growth"},
                               ValueError, "stay as they are, found \"flow_growth"),
    "a prior that is written": (lambda a: a.obs.insert(0, "flow_growth", 0.1), {"growth_key": "flow_growth"},
                                ValueError, "stay as they are, found \"flow_growth"),
    "unknown device": (lambda a: None, {"device": "tpu"}, ValueError, "auto, cpu, cuda, mps, found 'tpu'"),
    "no members": (lambda a: None, {"n_members": 0}, ValueError, "whole number of members.*at least 1, found 0"),
    "no steps": (lambda a: None, {"n_steps": 0}, ValueError, "n_steps.*at least 1, found 0"),
    "no batch": (lambda a: None, {"batch_size": 0}, ValueError, "batch_size"),
    "learning rate": (lambda a: None, {"learning_rate": -1.0}, ValueError, "learning_rate"),
    "patience": (lambda a: None, {"patience": 0}, ValueError, "patience"),
    "seed": (lambda a: None, {"rng": -1}, ValueError, "rng"),
    "key with a slash": (lambda a: None, {"key_added": "a/b"}, ValueError, 'without "/"'),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_fit_flow_refuses(cells: AnnData, monkeypatch, name: str) -> None:
    change, arguments, kind, message = CASES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)  # anndata warns of duplicate names
        change(cells)
    slots = {kind: set(getattr(cells, kind).keys()) for kind in ("obs", "obsm", "uns", "varm", "layers")}
    if name != "sigma too small":  # which a solver has to find out; all else is known before one begins
        monkeypatch.setattr(Plans, "_solve", _no_work)
    with pytest.raises(kind, match=message):
        sctraj.tl.fit_flow(cells, **{**QUICK, **arguments})  # type: ignore[arg-type]
    assert slots == {kind: set(getattr(cells, kind).keys()) for kind in slots}


def test_cuda_without_cuda(cells: AnnData) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=r"working cuda device.*device='cpu'"):
        sctraj.tl.fit_flow(cells, device="cuda", **QUICK)


def _no_work(*arguments: object) -> NoReturn:
    raise AssertionError("transport is solved before all arguments are looked at")


def test_leave_one_out_refuses(cells: AnnData, monkeypatch) -> None:
    monkeypatch.setattr(Plans, "_solve", _no_work)
    cells.obs["prior"] = 0.1
    for arguments, message in (
        ({"methods": ("ot-cfm", "sb-cfm"), "sigma": 0.0}, "positive sigma for sb-cfm"),
        ({"methods": ("ot-cfm", "i-cfm"), "path": "bent"}, "expected a path of"),
        ({"methods": ("sb-cfm", "vp-cfm"), "path": "hermite"}, "expected no path for sb-cfm"),
        ({"methods": ("ot-cfm", "i-cfm"), "growth_key": "prior"}, "no prior of growth for ot-cfm"),
        ({"use_rep": "flow_w1"}, 'stay as they are, found "flow_w1"'),
    ):
        with pytest.raises(ValueError, match=message):
            sctraj.tl.leave_one_out(cells, **arguments, **QUICK)
    two = cells[cells.obs["time"] < 2].copy()
    with pytest.raises(ValueError, match=r"at least 3 snapshots.*found 2"):
        sctraj.tl.leave_one_out(two, **QUICK)
    for methods in ((), ("ot-cfm", "ot-cfm"), ("sinkhorn",)):
        with pytest.raises(ValueError, match="distinct methods"):
            sctraj.tl.leave_one_out(cells, methods=methods, **QUICK)
    with pytest.raises(ValueError, match="found 0"):
        sctraj.tl.leave_one_out(cells, n_seeds=0, **QUICK)
    with pytest.raises(ValueError, match=r"block.*found 0"):
        sctraj.tl.leave_one_out(cells, block=0, **QUICK)
    few = cells[(cells.obs["time"] != 1.0) | (np.arange(cells.n_obs) < np.flatnonzero(cells.obs["time"] == 1.0)[3])]
    with pytest.raises(ValueError, match="at least 4 cells in every held-out snapshot, found 3 at time 1"):
        sctraj.tl.leave_one_out(few.copy(), **QUICK)
    same = cells.copy()
    same.obsm["X_pca"][(same.obs["time"] == 1.0).to_numpy()] = 0.5
    with pytest.raises(ValueError, match=r"cells that differ in every held-out snapshot, found \d+ .* at time 1"):
        sctraj.tl.leave_one_out(same, **QUICK)
    assert "leave_one_out" not in cells.uns


def test_numeric_categories_and_sparse_representations_work(cells: AnnData) -> None:
    expected = sctraj.tl.fit_flow(cells, copy=True, **QUICK).obsm["flow_velocity"]
    cells.obs["t"] = pd.Categorical(cells.obs["time"])
    cells.obsm["sparse"] = sparse.csr_matrix(cells.obsm["X_pca"])
    sctraj.tl.fit_flow(cells, "t", use_rep="sparse", **QUICK)
    assert np.array_equal(cells.obsm["flow_velocity"], expected)


def test_view_is_copied_with_a_warning(cells: AnnData) -> None:
    view = cells[cells.obs["time"] < 5]
    with pytest.warns(UserWarning, match="view"):
        sctraj.tl.fit_flow(view, **QUICK)
    assert not view.is_view
    assert "flow" in view.uns
    assert "flow" not in cells.uns


def test_flow_of_other_cells(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, **QUICK)
    with pytest.raises(ValueError, match=r"600 cells.*found 300 cells"):
        sctraj.get.vector_field(cells[::2].copy())
    moved = cells.copy()
    moved.obsm["X_pca"][0, 0] += 1
    with pytest.raises(ValueError, match="other times or coordinates"):
        sctraj.tl.trajectories(moved)
    renamed = cells.copy()
    renamed.obs_names = [f"other_{name}" for name in renamed.obs_names]
    with pytest.raises(ValueError, match="fitted on"):
        sctraj.tl.interpolate(renamed, 1.0)


def test_trajectory_times(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, **QUICK)
    with pytest.raises(ValueError, match=r"whole number of times, or the times themselves .*found 5\.0"):
        sctraj.tl.trajectories(cells, times=5.0)
    for times in (1, [], [2.0, 1.0], [-0.1, 1.0], [1.0, 7.5], [float("nan")]):
        with pytest.raises(ValueError, match="times"):
            sctraj.tl.trajectories(cells, times=times)
    with pytest.raises(ValueError, match="solver"):
        sctraj.tl.trajectories(cells, solver="heun")
    assert "flow_trajectories" not in cells.obsm


def test_units_far_from_one(cells: AnnData) -> None:
    """Neither the clock's unit nor the representation's scale changes the result, with sigma at its default.

    By powers of four, which floating-point numbers carry without rounding.
    """
    for method in ("ot-cfm", "sb-cfm"):
        one = sctraj.tl.fit_flow(cells, method=method, copy=True, **QUICK)
        scaled = cells.copy()
        scaled.obsm["X_pca"] = scaled.obsm["X_pca"] * 1024
        scaled.obs["time"] *= 16
        sctraj.tl.fit_flow(scaled, method=method, **QUICK)
        ratio = scaled.uns["flow"]["params"]["sigma"] / one.uns["flow"]["params"]["sigma"]
        assert ratio == pytest.approx(1024 / 4 if method == "sb-cfm" else 1024, rel=1e-6)
        expected = one.obsm["flow_velocity"] * 1024 / 16
        error = np.abs(scaled.obsm["flow_velocity"] - expected).max() / np.abs(expected).max()
        assert error < 1e-5


@pytest.mark.parametrize("n", [2.5, 0, -1, float("nan"), float("inf"), True, "2"])
def test_members_and_seeds_are_whole_numbers(cells: AnnData, n) -> None:
    with pytest.raises(ValueError, match=r"whole number of members or seeds, at least 1, found"):
        sctraj.tl.fit_flow(cells, n_members=n, **QUICK)
    with pytest.raises(ValueError, match=r"whole number of members or seeds, at least 1, found"):
        sctraj.tl.leave_one_out(cells, n_seeds=n, **QUICK)


def test_the_class_of_a_module_is_none(cells: AnnData) -> None:
    for verb in (sctraj.tl.fit_flow, sctraj.tl.leave_one_out):
        with pytest.raises(TypeError, match=r"found the class Linear; pass one of it: Linear\(\.\.\.\)"):
            verb(cells, module=nn.Linear, **QUICK)
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, found function"):
            verb(cells, module=_nan_times, **QUICK)
    sctraj.tl.fit_flow(cells, **QUICK)
    with pytest.raises(TypeError, match="class Linear"):
        sctraj.tl.trajectories(cells, module=nn.Linear)
    with pytest.raises(TypeError, match="class Linear"):
        sctraj.tl.interpolate(cells, 1.0, module=nn.Linear)


@pytest.mark.parametrize(
    "verb",
    [
        sctraj.tl.fit_flow, sctraj.tl.leave_one_out, sctraj.tl.trajectories, sctraj.pp.standardize,
        sctraj.get.vector_field, lambda adata: sctraj.tl.interpolate(adata, 1.0),
        lambda adata: sctraj.pp.parse_time(adata, "day"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("given", "said"), [("cells.h5ad", "found str. Read the file first"), (None, "found NoneType")]
)
def test_what_is_no_anndata_is_named(verb, given, said) -> None:
    with pytest.raises(TypeError, match=f"Expected an AnnData, {said}"):
        verb(given)
