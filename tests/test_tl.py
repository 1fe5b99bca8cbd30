"""The scanpy-style face: slots, round trips, determinism, and the laws that restorations obey."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from itertools import pairwise, product

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from torch import nn

import sctraj
from sctraj.flow import distance_estimates, plans
from sctraj.flow.plans import Plans
from sctraj.tl._steps import steps_between

QUICK = {"n_steps": 30, "batch_size": 32}


def _everything(adata: AnnData) -> AnnData:
    sctraj.tl.fit_flow(adata, n_members=2, patience=3, **QUICK)
    sctraj.tl.trajectories(adata, times=7, n_steps=5)
    sctraj.tl.leave_one_out(adata, methods=("ot-cfm", "i-cfm"), n_seeds=2, **QUICK)
    return adata


def _same(a: object, b: object) -> bool:
    if isinstance(a, pd.DataFrame):
        return a.equals(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, np.asarray(b), equal_nan=a.dtype.kind == "f")
    return a == b


def test_slots(cells: AnnData) -> None:
    before = cells.copy()
    _everything(cells)
    n, d = cells.obsm["X_pca"].shape
    assert cells.obsm["flow_velocity"].shape == (n, d)
    assert cells.obsm["flow_velocity"].dtype == np.float32
    assert (cells.obs["flow_velocity_sd"] > 0).all()
    assert cells.obsm["flow_trajectories"].shape == (n, 10, d)  # 7 even times, of which three are among the six own
    assert cells.obsm["flow_trajectories"].dtype == np.float32
    assert list(cells.obsm["flow_w1"].columns) == ["ot-cfm", "i-cfm"]
    assert cells.obsm["flow_restored"].shape == (n, d)
    assert cells.obsm["flow_restored"].dtype == np.float32
    ends = cells.obs["time"].isin([0.0, 7.0]).to_numpy()
    assert np.isnan(cells.obsm["flow_restored"][ends]).all()
    assert np.isfinite(cells.obsm["flow_restored"][~ends]).all()
    assert cells.obsm["flow_w1"][ends].isna().all(axis=None)
    assert list(cells.uns["leave_one_out"].columns) == ["method", "time", "seed", "metric", "value"]
    flow = cells.uns["flow"]
    assert flow["params"]["sigma"] > 0
    assert 0 <= flow["params"]["reliability"] <= 1
    assert flow["params"]["farther"] == 0  # of fewer than seven snapshots
    assert flow["params"]["spreads"].shape == (5,)
    assert (flow["params"]["spreads"] > 0).all()
    assert flow["times"].tolist() == [0.0, 1.0, 2.5, 3.5, 5.5, 7.0]
    assert flow["loss"].shape == (30, 2)
    assert flow["validation_loss"].shape[1] == 2
    # nothing else was touched
    for slot in ("X_pca", "X_latent"):
        assert np.array_equal(before.obsm[slot], cells.obsm[slot])
    assert before.obs.equals(cells.obs[before.obs.columns])


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_every_slot_survives_a_file(cells: AnnData, tmp_path, kind: str) -> None:
    _everything(cells)
    path = tmp_path / f"cells.{kind}"
    getattr(cells, f"write_{kind}")(path)
    back = getattr(anndata, f"read_{kind}")(path)
    for slot in ("flow_velocity", "flow_trajectories", "flow_w1", "flow_restored"):
        assert _same(cells.obsm[slot], back.obsm[slot]), slot
    for part in ("weights", "loss", "validation_loss", "trajectory_times", "versions"):
        assert _same(cells.uns["flow"][part], back.uns["flow"][part]), part
    assert _same(
        sctraj.get.leave_one_out(cells)["value"].to_numpy(), sctraj.get.leave_one_out(back)["value"].to_numpy()
    )
    x = cells.obsm["X_pca"][:5]
    assert np.array_equal(sctraj.get.vector_field(cells)(1.3, x), sctraj.get.vector_field(back)(1.3, x))
    sctraj.tl.trajectories(back, times=7, n_steps=5)
    assert np.array_equal(cells.obsm["flow_trajectories"], back.obsm["flow_trajectories"])


def test_field_is_callable_in_another_process(cells: AnnData, tmp_path) -> None:
    sctraj.tl.fit_flow(cells, **QUICK)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    code = (
        "import sys, anndata, sctraj\n"
        "a = anndata.read_h5ad(sys.argv[1])\n"
        "print(float(sctraj.get.vector_field(a)(2.0, a.obsm['X_pca'][:3]).sum()))\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "cells.h5ad")]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert float(printed) == float(sctraj.get.vector_field(cells)(2.0, cells.obsm["X_pca"][:3]).sum())


def test_same_seed_same_bits_and_no_global_state(cells: AnnData) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    one, two = _everything(cells.copy()), _everything(cells.copy())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # noqa: NPY002
    for slot in ("flow_velocity", "flow_trajectories", "flow_w1", "flow_restored"):
        assert _same(one.obsm[slot], two.obsm[slot]), slot
    other = sctraj.tl.fit_flow(cells, rng=1, copy=True, **QUICK)
    assert other is not None
    assert not np.array_equal(other.obsm["flow_velocity"], one.obsm["flow_velocity"])
    # the seed drawn from a Generator is kept, and repeats the fit
    drawn = sctraj.tl.fit_flow(cells, rng=np.random.default_rng(5), copy=True, **QUICK)
    again = sctraj.tl.fit_flow(cells, rng=drawn.uns["flow"]["params"]["seed"], copy=True, **QUICK)
    assert np.array_equal(drawn.obsm["flow_velocity"], again.obsm["flow_velocity"])


def test_cell_order_does_not_matter_to_slots(cells: AnnData) -> None:
    """Interleaved snapshots: every value must stand at its own cell."""
    order = np.random.default_rng(0).permutation(cells.n_obs)
    shuffled = cells[order].copy()
    sctraj.tl.fit_flow(shuffled, **QUICK)
    sctraj.tl.trajectories(shuffled, times=[0.0, 1.0, 2.5, 3.5, 5.5, 7.0], n_steps=5)
    field = sctraj.get.vector_field(shuffled)
    for k, t in enumerate([0.0, 1.0, 2.5, 3.5, 5.5, 7.0]):
        own = (shuffled.obs["time"] == t).to_numpy()
        np.testing.assert_allclose(
            shuffled.obsm["flow_velocity"][own], field(t, shuffled.obsm["X_pca"][own]), rtol=1e-4, atol=1e-5
        )
        # at its own time a cell is exactly where it was observed
        assert np.array_equal(shuffled.obsm["flow_trajectories"][own, k], shuffled.obsm["X_pca"][own])


@pytest.mark.parametrize("times", [2, 20])
def test_every_path_passes_its_own_cell(cells: AnnData, times) -> None:
    """However uneven the snapshots' times, and whether or not even times meet them."""
    cells.obs["time"] = cells.obs["time"].map(dict(zip(np.unique(cells.obs["time"]), (0, 0.1, 0.3, 0.5, 1, 48))))
    sctraj.tl.fit_flow(cells, **QUICK)
    sctraj.tl.trajectories(cells, times, n_steps=2)
    grid, paths = cells.uns["flow"]["trajectory_times"], cells.obsm["flow_trajectories"]
    assert (np.diff(grid) > 0).all()
    assert set(np.linspace(0, 48, times)) <= set(grid)
    own = np.searchsorted(grid, cells.obs["time"])
    assert np.array_equal(grid[own], cells.obs["time"])
    assert np.array_equal(paths[np.arange(cells.n_obs), own], cells.obsm["X_pca"])


@pytest.mark.parametrize("first", [0.0, 0.3, 1e5])
def test_even_times_that_rounding_parts_from_a_snapshots_are_its_own(first) -> None:
    from sctraj.tl._trajectories import _time_grid

    own = [first + k * 0.1 for k in range(7)]
    for steps in (1, 2, 5):
        assert len(_time_grid(6 * steps + 1, own)) == 6 * steps + 1
    assert set(own) <= set(_time_grid(31, own))
    assert len(_time_grid(3, own)) == 7
    assert len(_time_grid(4, own)) == 7
    assert len(_time_grid(5, own)) == 9


def test_key_added_and_copy(cells: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sctraj"):
        out = sctraj.tl.leave_one_out(cells, n_seeds=1, key_added="mine", copy=True, **QUICK)
        out = sctraj.tl.fit_flow(out, key_added="mine", copy=True, **QUICK)
    assert not cells.uns.keys() & {"mine", "mine_leave_one_out", "leave_one_out"}
    assert {"mine", "mine_leave_one_out", "mine_leave_one_out_protocol"} <= out.uns.keys()
    assert {"mine_w1", "mine_restored", "mine_velocity"} <= out.obsm.keys()
    assert len(sctraj.get.leave_one_out(out, key="mine"))
    for slot in ("mine_leave_one_out", "mine_w1", "mine_restored", "mine_velocity", "has seen the held-out snapshots"):
        assert slot in caplog.text
    params = out.uns["mine"]["params"]
    assert f"sigma = {params['sigma']:.4g} and spreads of {params['spreads'].min():.4g} to" in caplog.text


def test_a_fit_to_two_snapshots_says_how_wide_its_bridges_are(cells: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    two = cells[cells.obs["time"].isin([1.0, 2.5])].copy()
    with caplog.at_level(logging.INFO, logger="sctraj"):
        sctraj.tl.fit_flow(two, **QUICK)
    (half_way,) = two.uns["flow"]["params"]["spreads"]
    assert half_way > 0
    assert (
        f"sigma = {two.uns['flow']['params']['sigma']:.4g} and a spread of {half_way:.4g} half-way, on" in caplog.text
    )
    assert np.isfinite(two.obsm["flow_velocity"]).all()


def test_share_averages_to_the_table(cells: AnnData) -> None:
    sctraj.tl.leave_one_out(cells, methods=("ot-cfm", "i-cfm"), n_seeds=3, **QUICK)
    wide = sctraj.get.leave_one_out(cells, metric="w1")
    for method in ("ot-cfm", "i-cfm"):
        by_time = cells.obsm["flow_w1"][method].groupby(cells.obs["time"]).mean().dropna()
        np.testing.assert_allclose(by_time, wide.loc[method, by_time.index.tolist()], rtol=1e-9)


def test_estimated_distances_are_shown_with_their_errors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cells = sctraj.datasets.simulated_course("crossing", 1000)
    caplog.set_level("INFO")
    sctraj.tl.leave_one_out(cells, **QUICK)
    assert "error" not in sctraj.get.leave_one_out(cells, metric="w1")
    assert "estimated" not in caplog.text

    monkeypatch.setattr(distance_estimates, "LARGEST_EXACT", 150)
    monkeypatch.setattr(distance_estimates, "SIZES", (16, 32, 64, 128))
    monkeypatch.setattr(distance_estimates, "PLAN_BLOCK", 64)
    sctraj.tl.leave_one_out(cells, **QUICK)
    tidy, wide = (sctraj.get.leave_one_out(cells, metric=metric) for metric in (None, "w1"))
    errors = tidy[tidy["metric"] == "w1_error"].groupby(["method", "time"])["value"].mean()
    for method in ("uot-cfm", "ot-interpolation"):
        independent = np.sqrt((errors[method] ** 2).sum()) / 3  # of three held-out times, whose blocks are their own
        assert wide["error"][method] == pytest.approx(independent) != 0
    assert np.isnan(wide["error"]["noise-reference"])  # halves of 100 cells are compared whole
    assert "error" not in sctraj.get.leave_one_out(cells, metric="energy")  # all pairs were met
    assert f"w1 {tidy[tidy['metric'] == 'w1_error']['value'].max():.2g}" in caplog.text


def test_baselines_and_noise_reference(cells: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    sctraj.tl.leave_one_out(cells, n_seeds=10, **QUICK)
    table = sctraj.get.leave_one_out(cells)
    x = {t: cells.obsm["X_pca"][(cells.obs["time"] == t).to_numpy()] for t in (0.0, 1.0, 2.5)}
    value = table.set_index(["method", "time", "seed", "metric"])["value"]
    assert value["previous", 1.0, 0, "w1"] == pytest.approx(sctraj.metrics.wasserstein(x[0.0], x[1.0]))
    assert value["next", 1.0, 0, "energy"] == pytest.approx(sctraj.metrics.energy_distance(x[2.5], x[1.0]))
    noise = table[(table["method"] == "noise-reference") & (table["metric"] == "energy")]
    by_seed = noise.groupby("seed")["value"].mean()
    assert abs(by_seed.mean()) < 3 * by_seed.std() / np.sqrt(len(by_seed)) + 1e-3  # halves of one law: zero on average
    sizes = cells.uns["leave_one_out_protocol"]["noise_reference_sizes"]
    assert sizes.sum(1).tolist() == [(cells.obs["time"] == t).sum() for t in (1.0, 2.5, 3.5, 5.5)]
    least, most = (f"{n // 2} + {n - n // 2}" for n in (min(sizes.sum(1)), max(sizes.sum(1))))
    assert f"halves have {least} to {most} cells" in caplog.text  # however many folds there are


@pytest.mark.parametrize(("n", "said"), [(4, True), (19, True), (20, False)])
def test_held_out_snapshots_of_few_cells_are_said(cells: AnnData, caplog, n, said) -> None:
    """Of those at the ends, which are not held out, any number will do."""
    order = cells.obs.groupby("time").cumcount()
    few = cells[(~cells.obs["time"].isin([0.0, 2.5]) | (order < n)).to_numpy()].copy()
    caplog.set_level("WARNING", logger="sctraj")
    sctraj.tl.leave_one_out(few, methods=("i-cfm",), field="closed-form", n_seeds=1)
    assert (f"at time (cells): 2.5 ({n});" in caplog.text) == said
    assert len(caplog.records) == said


@pytest.fixture(scope="module")
def noisy() -> AnnData:
    """Many snapshots, each with an age, a composition and a shift of its own."""
    return sctraj.datasets.simulated_course("branching", 320, times=np.linspace(0, 4, 8), sample_effects=1.5)


@pytest.mark.parametrize("start", ["both", "before"])
def test_how_much_farther_snapshots_count_is_written_down(noisy: AnnData, start) -> None:
    out = sctraj.tl.leave_one_out(
        noisy, methods=("uot-cfm", "ot-cfm"), start=start, n_seeds=1, n_steps=2, width=4, copy=True
    )
    protocol = out.uns["leave_one_out_protocol"]
    curved, straight = protocol["farther"]
    np.testing.assert_array_equal(curved, 1 - protocol["reliability"][0] if start == "both" else np.zeros(6))
    assert not straight.any()
    assert protocol["reliability"][0].min() < 0.8


def test_a_closed_form_field_moves_the_neighbours_alone(noisy: AnnData) -> None:
    out = sctraj.tl.leave_one_out(noisy, field="closed-form", n_seeds=1, copy=True)
    protocol = out.uns["leave_one_out_protocol"]
    assert protocol["reliability"].min() < 0.8
    assert not protocol["farther"].any()
    sctraj.tl.fit_flow(noisy, field="closed-form", key_added="closed")
    times = noisy.obs["time"].unique()
    assert sctraj.tl.interpolate(noisy, times[3:5].mean(), key="closed", decode=False).n_obs == 80


def test_interpolation_is_what_leaving_out_judges(noisy: AnnData) -> None:
    same = {"n_steps": 60, "width": 16}
    sctraj.tl.leave_one_out(noisy, **same, n_seeds=1, key_added="all")
    table = sctraj.get.leave_one_out(noisy, key="all").query("method == 'uot-cfm'").set_index(["time", "metric"])
    times = noisy.obs["time"].unique()
    for k, sources in ((1, [0, 2, 3]), (4, [2, 3, 5, 6])):  # of the first of them there is no second one before
        here = (noisy.obs["time"] == times[k]).to_numpy()
        kept = noisy[~here].copy()
        sctraj.tl.fit_flow(kept, **same)
        # as many steps of a mean gap of 2/3 as are 100 for a time in the middle of a gap that is twice the others
        there = sctraj.tl.interpolate(kept, times[k], solver="euler", n_steps=117, decode=False)
        moved = kept.obs["time"].to_numpy()[kept.obs_names.get_indexer(there.obs["source_cell"])]
        np.testing.assert_array_equal(np.unique(moved), times[sources])
        found = sctraj.metrics.energy_distance(
            there.obsm["X_pca"], noisy.obsm["X_pca"][here], weights_x=there.obs["weight"].to_numpy()
        )
        # Euler steps of nearly the same length; the nearest two alone are off by a seventh
        assert found == pytest.approx(table.loc[(times[k], "energy"), "value"], rel=1e-2)
        near = sctraj.tl.interpolate(kept, times[k], start="before", decode=False)
        assert near.n_obs == 40


def test_the_reliability_of_every_fold_is_written_down(cells: AnnData) -> None:
    sctraj.tl.leave_one_out(cells, methods=("uot-cfm", "ot-cfm"), field="closed-form", n_seeds=2)
    protocol = cells.uns["leave_one_out_protocol"]
    curved, straight = protocol["reliability"]
    assert curved.shape == protocol["sigma"][0].shape == (4,)
    assert ((curved >= 0) & (curved <= 1)).all()
    assert len(set(curved)) > 1  # each by its own kept snapshots
    assert np.isnan(straight).all()
    kept = cells[cells.obs["time"] != protocol["held_out_times"][1]].copy()
    for method, found in (("uot-cfm", curved[1]), ("ot-cfm", None)):
        sctraj.tl.fit_flow(kept, method=method, field="closed-form")
        assert kept.uns["flow"]["params"].get("reliability") == found


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_the_protocol_says_what_the_fits_are_defined_by(cells: AnnData, field) -> None:
    """All that a fit's own record has, so that the table can be made again."""
    cells.obs["prior"] = 0.0
    options = {"field": field, "growth_key": "prior", "frame": "moving", "block": 500, "device": "cpu"}
    if field == "neural":
        options |= {"width": 8, "depth": 2, "weight_decay": 0.1, "ema_decay": 0.5, "patience": 3, **QUICK}
    sctraj.tl.fit_flow(cells, **options)
    sctraj.tl.leave_one_out(cells, n_seeds=1, **options)
    flow, protocol = cells.uns["flow"], cells.uns["leave_one_out_protocol"]
    for record in (flow["params"], protocol):
        assert options.items() <= record.items()
        assert ("learning_rate" in record) == ("width" in record) == (field == "neural")
        assert "module" not in record
    of_one_fit = {"method", "path", "n_members", "n_obs"}
    assert flow["params"].keys() - protocol.keys() == of_one_fit
    assert protocol["paths"].tolist() == [flow["params"]["path"]] == ["hermite"]
    assert protocol["versions"] == flow["versions"]
    assert protocol["spreads"].shape == (1, 4, 4)  # methods, folds, their intervals
    assert (protocol["spreads"] > 0).all() if field == "neural" else np.isnan(protocol["spreads"]).all()


def test_in_a_moving_frame_less_of_a_move_is_growth() -> None:
    course = sctraj.datasets.simulated_course("fast-phase", 1200)  # where nothing grows
    truth = course.obsm["drift_latent"]
    axes = course.varm["latent_axes"][:, : truth.shape[1]]
    inner = ~course.obs["time"].isin([course.obs["time"].min(), course.obs["time"].max()]).to_numpy()
    length, growth = {}, {}
    for frame in ("fixed", "moving"):
        sctraj.tl.fit_flow(course, frame=frame, field="closed-form")
        assert course.uns["flow"]["params"]["frame"] == frame
        along = (course.obsm["flow_velocity"] @ axes * truth).sum(1) / (truth**2).sum(1)
        length[frame], growth[frame] = np.median(along[inner]), course.obs["flow_growth"][inner].std()
    assert length["fixed"] < length["moving"] < 1
    assert 1 - length["moving"] < 0.7 * (1 - length["fixed"])
    assert growth["moving"] < 0.6 * growth["fixed"]


def test_a_frame_is_that_of_the_methods_that_take_it(cells: AnnData) -> None:
    found = {}
    for frame in ("fixed", "moving"):
        sctraj.tl.leave_one_out(cells, methods=["uot-cfm", "ot-cfm"], frame=frame, field="closed-form", n_seeds=1)
        found[frame] = sctraj.get.leave_one_out(cells, metric="energy")["mean"]
        assert cells.uns["leave_one_out_protocol"]["frame"] == frame
    same = found["fixed"] == found["moving"]
    assert not same.pop("uot-cfm")
    assert same.all()
    with pytest.raises(ValueError, match=r"expected a frame of .*'fixed', 'moving'.*, found 'still'"):
        sctraj.tl.leave_one_out(cells, frame="still")


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_folds_of_three_snapshots_have_bridges_in_the_protocol(cells: AnnData, field: str) -> None:
    three = cells[cells.obs["time"].isin([1.0, 2.5, 5.5])].copy()
    options = QUICK if field == "neural" else {}
    sctraj.tl.leave_one_out(three, methods=["uot-cfm", "ot-cfm"], field=field, n_seeds=1, **options)
    spreads = three.uns["leave_one_out_protocol"]["spreads"]
    assert spreads.shape == (2, 1, 1)  # methods, folds, their intervals
    assert np.isnan(spreads[1]).all()
    if field == "closed-form":
        assert np.isnan(spreads).all()
        return
    two = three[three.obs["time"] != 2.5].copy()
    sctraj.tl.fit_flow(two, **options)
    assert spreads[0, 0] == pytest.approx(two.uns["flow"]["params"]["spreads"])


def test_the_protocol_has_every_methods_path_and_the_module(cells: AnnData) -> None:
    sctraj.tl.leave_one_out(cells, methods=("sb-cfm", "ot-cfm"), field="closed-form", n_seeds=1)
    assert cells.uns["leave_one_out_protocol"]["paths"].tolist() == ["brownianbridge", "straight"]

    class Net(nn.Linear):
        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([t, x], -1))

    sctraj.tl.leave_one_out(cells, methods=("i-cfm",), module=Net(7, 6), n_seeds=1, **QUICK)
    protocol = cells.uns["leave_one_out_protocol"]
    assert protocol["module"] == "Net"
    assert not {"width", "depth", "patience", "growth_key", "block"} & protocol.keys()


@pytest.mark.parametrize(
    "options", [{}, {"field": "closed-form"}, {"start": "before"}], ids=["defaults", "closed-form", "published"]
)
def test_restoration_on_simulated_cells(options) -> None:
    """Uneven gaps, known truth: far better than either neighbour, and as good as exact OT interpolation."""
    cells = sctraj.datasets.simulated_differentiation()
    sctraj.tl.leave_one_out(cells, use_rep="X_latent", methods=("ot-cfm", "uot-cfm"), n_seeds=2, **options)
    w1, energy = (sctraj.get.leave_one_out(cells, metric=m)["mean"] for m in ("w1", "energy"))
    for method in ("ot-cfm", "uot-cfm"):
        assert w1[method] < 0.4 * min(w1["previous"], w1["next"])
        assert w1[method] < 1.03 * w1["ot-interpolation"]
        assert energy[method] < 0.1 * min(energy["previous"], energy["next"])
    assert energy["uot-cfm"] <= energy["ot-interpolation"]


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "ot-cfm"}, {"field": "closed-form"}, {"method": "sb-cfm", "field": "closed-form"}],
    ids=["defaults", "ot-cfm", "closed-form", "closed-form bridge"],
)
def test_velocity_matches_the_known_one(options) -> None:
    """Where there is no ambiguity (between the ends), the direction and length of the true velocity are found."""
    cells = sctraj.datasets.simulated_differentiation()
    sctraj.tl.fit_flow(cells, use_rep="X_latent", **options)
    inner = cells.obs["time"].between(1, 5.5).to_numpy()
    found, true = cells.obsm["flow_velocity"][inner], cells.obsm["velocity_latent"][inner]
    cosine = (found * true).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
    assert np.median(cosine) > 0.95
    assert np.median(np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)) == pytest.approx(1, abs=0.15)


def test_stochastic_trajectories(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, method="sb-cfm", n_steps=200, batch_size=64)
    sctraj.tl.trajectories(cells, times=5, stochastic=True, n_steps=20)
    one = cells.obsm["flow_trajectories"].copy()
    sctraj.tl.trajectories(cells, times=5, stochastic=True, n_steps=20, rng=1)
    first = (cells.obs["time"] == 0).to_numpy()
    assert np.array_equal(one[first, 0], cells.obsm["flow_trajectories"][first, 0])
    assert not np.allclose(one[first, 1], cells.obsm["flow_trajectories"][first, 1])
    # both ways in time the population stays where the data are
    last = (cells.obs["time"] == 7).to_numpy()
    for start, k, end in ((first, -1, last), (last, 0, first)):
        arrived, there = one[start, k], cells.obsm["X_pca"][end]
        assert sctraj.metrics.energy_distance(arrived, there) < 0.25 * sctraj.metrics.energy_distance(
            cells.obsm["X_pca"][start], there
        )


def test_stochastic_needs_a_score(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, **QUICK)
    with pytest.raises(ValueError, match="sb-cfm"):
        sctraj.tl.trajectories(cells, stochastic=True)
    assert "flow_trajectories" not in cells.obsm


def test_a_new_fit_takes_the_old_ones_trajectories_away(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, n_members=2, **QUICK)
    sctraj.tl.trajectories(cells, times=3, n_steps=2)
    sctraj.tl.fit_flow(cells, **QUICK)
    assert "flow_trajectories" not in cells.obsm
    assert "flow_velocity_sd" not in cells.obs


def test_own_module(cells: AnnData) -> None:
    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))
            generator = torch.Generator().manual_seed(seed)
            for p in self.parameters():
                nn.init.normal_(p, std=0.3, generator=generator)

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.layers(torch.cat([t, x], -1))

    sctraj.tl.fit_flow(cells, module=Net(0), n_members=2, n_steps=100, batch_size=64)
    assert cells.uns["flow"]["loss"][-10:].mean() < 0.7 * cells.uns["flow"]["loss"][:10].mean()
    with pytest.raises(ValueError, match="module"):
        sctraj.get.vector_field(cells)
    field = sctraj.get.vector_field(cells, module=Net(1))
    own = (cells.obs["time"] == 1).to_numpy()
    np.testing.assert_allclose(field(1.0, cells.obsm["X_pca"][own]), cells.obsm["flow_velocity"][own], atol=1e-5)


@pytest.mark.parametrize(("method", "columns", "said"), [("uot-cfm", 6, 1), ("uot-cfm", 7, 0), ("ot-cfm", 6, 0)])
def test_a_module_without_growth_is_said(cells: AnnData, caplog, method, columns, said) -> None:
    class Net(nn.Linear):
        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([t, x], -1))

    caplog.set_level("WARNING", logger="sctraj")
    sctraj.tl.fit_flow(cells, method=method, module=Net(7, columns), **QUICK)
    assert [record.getMessage().startswith("the pairs grow") for record in caplog.records] == [True] * said
    assert ("flow_growth" in cells.obs) == (columns == 7)
    caplog.clear()
    sctraj.tl.leave_one_out(cells, methods=(method, "i-cfm"), module=Net(7, 6), n_seeds=1, **QUICK)
    assert len(caplog.records) == (method == "uot-cfm")  # once, however many folds


@pytest.mark.parametrize(
    "verb", [partial(sctraj.tl.fit_flow, method="i-cfm"), partial(sctraj.tl.leave_one_out, methods="i-cfm", n_seeds=1)]
)
def test_options_that_nothing_uses_are_said(cells: AnnData, caplog, verb) -> None:
    class Net(nn.Linear):
        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([t, x], -1))

    caplog.set_level("WARNING", logger="sctraj")
    verb(cells, field="closed-form", n_steps=7, learning_rate=0.1)
    verb(cells, module=Net(7, 6), depth=2, n_steps=7)
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if " given, " in message] == [
        "n_steps, learning_rate given, without effect on a closed-form field, which is not trained",
        "depth given, without effect on a module of your own",
    ]
    caplog.clear()
    verb(cells, field="closed-form")
    verb(cells, depth=2, n_steps=7)
    assert " given, " not in caplog.text


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_interpolate(cells: AnnData, field) -> None:
    sctraj.tl.fit_flow(cells, field=field, n_steps=200, batch_size=64)
    middle = sctraj.tl.interpolate(cells, 4.5, start="before")
    source = (cells.obs["time"] == 3.5).to_numpy()
    assert middle.obs["source_cell"].tolist() == cells.obs_names[source].tolist()
    assert (middle.obs["time"] == 4.5).all()
    sctraj.tl.trajectories(cells, times=[3.5, 4.5])
    np.testing.assert_allclose(middle.obsm["X_pca"], cells.obsm["flow_trajectories"][source, 1], atol=1e-4)
    # decoding then projecting gives the components back
    mean = cells.X.mean(axis=0)
    np.testing.assert_allclose((middle.X - mean) @ cells.varm["PCs"], middle.obsm["X_pca"], atol=1e-3)
    assert middle.var_names.equals(cells.var_names)
    at_a_snapshot = sctraj.tl.interpolate(cells, 3.5)
    assert np.array_equal(at_a_snapshot.obsm["X_pca"], cells.obsm["X_pca"][source])
    for outside in (-1, 7.1, float("nan")):
        with pytest.raises(ValueError, match="range"):
            sctraj.tl.interpolate(cells, outside)


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
@pytest.mark.parametrize("decode", [True, False])
def test_an_interpolated_population_survives_a_file(cells: AnnData, tmp_path, decode: bool) -> None:
    sctraj.tl.fit_flow(cells, **QUICK)
    middle = sctraj.tl.interpolate(cells, 4.5, decode=decode)
    middle.write_h5ad(tmp_path / "middle.h5ad")
    middle.write_zarr(tmp_path / "middle.zarr")
    for back in (anndata.read_h5ad(tmp_path / "middle.h5ad"), anndata.read_zarr(tmp_path / "middle.zarr")):
        assert back.shape == middle.shape
        assert np.array_equal(back.obsm["X_pca"], middle.obsm["X_pca"])
        assert back.obs["source_cell"].tolist() == middle.obs["source_cell"].tolist()


def test_interpolate_refuses_components_of_another_matrix(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, **QUICK)
    cells.X = np.asarray(cells.X) * 2
    with pytest.raises(ValueError, match="decode=False"):
        sctraj.tl.interpolate(cells, 2.0)
    assert sctraj.tl.interpolate(cells, 2.0, decode=False).n_vars == 0


def test_sparse_matrix_decodes(cells: AnnData) -> None:
    from scipy import sparse

    sctraj.tl.fit_flow(cells, **QUICK)
    dense = sctraj.tl.interpolate(cells, 2.0).X
    cells.X = sparse.csr_matrix(cells.X)
    np.testing.assert_allclose(sctraj.tl.interpolate(cells, 2.0).X, dense, atol=1e-4)


def test_get_names_what_to_run_first(cells: AnnData) -> None:
    for call, hint in (
        (sctraj.get.vector_field, "tl.fit_flow"),
        (sctraj.get.loss, "tl.fit_flow"),
        (sctraj.get.velocity, "tl.fit_flow"),
        (sctraj.get.trajectories, "tl.trajectories"),
        (sctraj.get.leave_one_out, "tl.leave_one_out"),
        (sctraj.tl.trajectories, "tl.fit_flow"),
    ):
        with pytest.raises(KeyError, match=hint):
            call(cells)


def test_real_cells(real_data) -> None:
    """Embryoid bodies, the published 5-D protocol: the baselines to three decimals, the method at its mark."""
    cells = anndata.read_h5ad(real_data("embryoid_body_2750.h5ad"))
    sctraj.pp.standardize(cells)
    sctraj.tl.leave_one_out(cells, use_rep="X_std", methods=("ot-cfm",), start="before", n_seeds=2)
    w1 = sctraj.get.leave_one_out(cells, metric="w1")["mean"]
    assert round(w1["previous"], 3) == 1.273
    assert round(w1["ot-interpolation"], 3) == 0.887
    assert w1["ot-cfm"] <= 0.89


def test_real_text_days(real_data) -> None:
    """iPSC to cardiomyocyte: text days, uneven gaps, four held-out days, each at its real time."""
    cells = anndata.read_h5ad(real_data("ipsc_cardiomyocyte_1081.h5ad"))
    sctraj.pp.parse_time(cells, "day")
    sc.pp.pca(cells, n_comps=5)
    sctraj.pp.standardize(cells, n_dims=5)
    with pytest.raises(ValueError, match="parse_time"):
        sctraj.tl.fit_flow(cells, "day", use_rep="X_std")
    sctraj.tl.fit_flow(cells, use_rep="X_std", **QUICK)
    sctraj.tl.leave_one_out(cells, use_rep="X_std", methods=("ot-cfm", "uot-cfm"), n_seeds=1, n_steps=300)
    w1 = sctraj.get.leave_one_out(cells, metric="w1")
    assert w1.columns[:4].tolist() == [1.0, 1.5, 2.0, 2.5]
    assert round(w1.loc["previous", "mean"], 3) == 1.844
    assert round(w1.loc["ot-interpolation", "mean"], 3) == 1.405
    assert w1.loc["ot-cfm", "mean"] < 1.45
    assert w1.loc["uot-cfm", "mean"] < w1.loc["ot-interpolation", "mean"]


# --- growth, and the closed-form field


def test_closed_form_slots_survive_a_file(cells: AnnData, tmp_path) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form", n_members=2)
    sctraj.tl.trajectories(cells, times=4, n_steps=5)
    assert cells.uns["flow"]["params"]["field"] == "closed-form"
    assert cells.uns["flow"]["params"]["path"] == "hermite"
    assert (cells.obs["flow_velocity_sd"] > 0).mean() > 0.9
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    x = cells.obsm["X_pca"][:50]
    for t in (0.0, 1.3, 2.5, 7.0):
        assert np.array_equal(sctraj.get.vector_field(cells)(t, x), sctraj.get.vector_field(back)(t, x))
    sctraj.tl.trajectories(back, times=4, n_steps=5)
    assert np.array_equal(cells.obsm["flow_trajectories"], back.obsm["flow_trajectories"])
    assert np.array_equal(cells.obsm["flow_trajectory_weights"], back.obsm["flow_trajectory_weights"])


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_known_growth_is_recovered(field) -> None:
    """Branching fates of unlike growth: rates order cells, and are nearer than a guess of none, by three tenths."""
    ratios = []
    for seed in range(4):
        cells = sctraj.datasets.simulated_course("branching", 2000, rng=seed)
        sctraj.tl.fit_flow(cells, field=field)
        late = cells.obs["time"].isin([2.0, 3.0]).to_numpy()
        side = cells.obsm["X_latent"][:, 1]
        found, true = (
            cells.obs[name][late & (side > 0.5)].mean() - cells.obs[name][late & (side < -0.5)].mean()
            for name in ("flow_growth", "growth_rate")
        )
        ratios.append(found / true)
        # log mass ratios per cell are noisy: a rank correlation is what a biologist would see
        rank = cells.obs.loc[late, ["flow_growth", "growth_rate"]].corr("spearman").iloc[0, 1]
        assert rank > 0.6
        by_time = cells.obs.groupby("time")[["flow_growth", "growth_rate"]]
        about_mean = (cells.obs[["flow_growth", "growth_rate"]] - by_time.transform("mean"))[late]
        error = (about_mean["flow_growth"] - about_mean["growth_rate"]).pow(2).mean() ** 0.5
        assert error < 0.7 * about_mean["growth_rate"].pow(2).mean() ** 0.5
    # about half of the contrast is read as movement between the fates, which have only begun to part
    assert 0.4 < np.mean(ratios) < 1


@pytest.mark.parametrize("family", ["crossing", "high-dimensional"])
def test_growth_rates_beside_the_truth(family) -> None:
    """Where fates grow apart they are nearer than a guess of none; of the crossing, where none does, they are small.

    A cell's way through the gap would be worth .27 a day there.
    """
    cells = sctraj.datasets.simulated_course(family, 1000)
    sctraj.tl.fit_flow(cells, field="closed-form")
    by_time = cells.obs.groupby("time")
    found, true = (cells.obs[name] - by_time[name].transform("mean") for name in ("flow_growth", "growth_rate"))
    assert found.std() > 0.01
    assert (found - true).std() < (0.12 if family == "crossing" else 0.95 * true.std())


@pytest.mark.parametrize("times", [None, np.linspace(0, 4, 12)])
def test_velocities_have_nearly_their_true_length_however_near_snapshots_are(times) -> None:
    cells = sctraj.datasets.simulated_course("branching", 2000, times=times)
    sctraj.tl.fit_flow(cells, field="closed-form")
    inner = cells.obs["time"].between(0.1, 3.9).to_numpy()
    true = cells.obsm["drift_latent"][inner].astype(float)
    found = cells.obsm["flow_velocity"][inner] @ cells.varm["latent_axes"][:, : true.shape[1]]
    assert 0.8 < np.median((found * true).sum(1) / (true**2).sum(1)) < 1.1


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_growth_is_relative_to_the_snapshots_mean(cells: AnnData, field) -> None:
    sctraj.tl.fit_flow(cells, field=field, n_steps=100)
    by_time = cells.obs.groupby("time")["flow_growth"]
    assert by_time.std().max() > 1e-3  # there is something to centre
    np.testing.assert_allclose(by_time.mean(), 0, atol=1e-6)  # single precision


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_trajectory_weights_carry_the_growth(cells: AnnData, field) -> None:
    sctraj.tl.fit_flow(cells, field=field)
    sctraj.tl.trajectories(cells, times=[0.0, 1.0, 2.5, 3.5, 5.5, 7.0], n_steps=20)
    weights = cells.obsm["flow_trajectory_weights"]
    for k, t in enumerate([0.0, 1.0, 2.5, 3.5, 5.5, 7.0]):
        own = (cells.obs["time"] == t).to_numpy()
        np.testing.assert_allclose(weights[own, k], 1, rtol=1e-5)
        np.testing.assert_allclose(weights[own].mean(0), 1, rtol=1e-5)
    sctraj.tl.fit_flow(cells, method="ot-cfm", field=field)
    assert "flow_trajectory_weights" not in cells.obsm
    assert "flow_growth" not in cells.obs


def test_descendants_of_the_fast_fate_outweigh_the_others() -> None:
    cells = sctraj.datasets.simulated_course("branching", 2000, rng=1)
    sctraj.tl.fit_flow(cells, field="closed-form")
    sctraj.tl.trajectories(cells, times=[2.0, 4.0], n_steps=20)
    parting = (cells.obs["time"] == 2).to_numpy()
    side, weight = cells.obsm["X_latent"][parting, 1], cells.obsm["flow_trajectory_weights"][parting, 1]
    # the true log ratio is about 2 x .35 x 2 days; soft marginals take a part of it for movement
    log_ratio = np.log(weight[side > 0.5].mean() / weight[side < -0.5].mean())
    assert 0.5 < log_ratio < 2


def test_growth_prior_enters_as_a_marginal(cells: AnnData) -> None:
    """A prior that says that one fate dies makes its descendants lighter; only differences count."""
    cells.obs["prior"] = np.where(cells.obsm["X_latent"][:, 1] > 0, 0.5, -0.5)
    cells.obs["same"] = 3.0
    plain = sctraj.tl.fit_flow(cells, field="closed-form", copy=True).obs["flow_growth"]
    same = sctraj.tl.fit_flow(cells, growth_key="same", field="closed-form", copy=True).obs["flow_growth"]
    np.testing.assert_allclose(plain, same, atol=1e-4)
    told = sctraj.tl.fit_flow(cells, growth_key="prior", field="closed-form", copy=True).obs["flow_growth"]
    up = (cells.obs["prior"] > 0).to_numpy()
    # both snapshots stay as they are, so the prior is weighed against them: it moves growth its way, not all the way
    assert told[up].mean() - told[~up].mean() > plain[up].mean() - plain[~up].mean() + 0.05
    with pytest.raises(KeyError, match="growth_key"):
        sctraj.tl.fit_flow(cells, growth_key="nothing")
    with pytest.raises(ValueError, match="no prior of growth for ot-cfm"):
        sctraj.tl.fit_flow(cells, method="ot-cfm", growth_key="prior")
    cells.obs.iloc[0, cells.obs.columns.get_loc("prior")] = np.nan
    with pytest.raises(ValueError, match="finite"):
        sctraj.tl.leave_one_out(cells, growth_key="prior")


def test_of_several_methods_an_option_is_for_those_that_take_it(cells: AnnData, caplog) -> None:
    cells.obs["prior"] = np.where(cells.obsm["X_latent"][:, 1] > 0, 0.5, -0.5)
    methods, quick = ("uot-cfm", "sb-cfm", "i-cfm"), {"n_seeds": 1, "field": "closed-form"}
    caplog.set_level("WARNING", logger="sctraj")
    sctraj.tl.leave_one_out(cells, methods=methods, path="straight", growth_key="prior", **quick)
    assert list(cells.uns["leave_one_out_protocol"]["paths"]) == ["straight", "brownianbridge", "straight"]
    told = cells.uns["leave_one_out"].set_index("method")["value"]
    assert "path given, without effect on sb-cfm" in caplog.text
    assert "growth_key given, without effect on sb-cfm, i-cfm" in caplog.text
    sctraj.tl.leave_one_out(cells, methods=methods, path="straight", **quick)
    plain = cells.uns["leave_one_out"].set_index("method")["value"]
    assert not np.array_equal(told["uot-cfm"], plain["uot-cfm"])
    for other in ("sb-cfm", "i-cfm", "ot-interpolation"):
        np.testing.assert_array_equal(told[other], plain[other])


def test_methods_and_baselines_share_what_is_solved_for_the_same_cells(cells: AnnData, monkeypatch) -> None:
    """Of large snapshots too, of which some cells take part, chosen once for all."""
    solved, solve = [], Plans._solve

    def counted(self: Plans, interval, path, method) -> object:
        solved.append((method, interval.t0, interval.t1))
        return solve(self, interval, path, method)

    monkeypatch.setattr(Plans, "_solve", counted)
    monkeypatch.setattr(plans, "MOST_CELLS", 60)
    sctraj.tl.leave_one_out(cells, methods=("uot-cfm", "ot-cfm"), field="closed-form", n_seeds=1)
    assert len(solved) == len(set(solved))
    assert {method for method, *_ in solved} == {"uot-cfm", "ot-cfm"}


def test_what_an_earlier_flow_left_is_removed_and_named(cells: AnnData, caplog) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form", n_members=2)
    sctraj.tl.trajectories(cells, times=[0.0, 7.0])
    caplog.set_level("INFO", logger="sctraj")
    sctraj.tl.fit_flow(cells, field="closed-form", method="ot-cfm")
    left = ['obs["flow_growth"]', 'obs["flow_velocity_sd"]', 'obsm["flow_trajectories"]', 'obsm["flow_trajectory_wei']
    assert f"; removed what an earlier flow left: {', '.join(left)}" in caplog.text
    assert not {"flow_growth", "flow_velocity_sd"} & {*cells.obs} | {"flow_trajectories"} & {*cells.obsm}
    caplog.clear()
    sctraj.tl.fit_flow(cells, field="closed-form", method="ot-cfm")
    assert "removed" not in caplog.text


def test_even_gaps_take_even_steps() -> None:
    times = np.arange(0, 0.71, 0.1)  # of which 0.3 - 0.2 is more than 0.1, in floating point
    mean_gap = times[-1] / 7
    assert {steps_between(10, t0, t1, mean_gap) for t0, t1 in pairwise(times)} == {10}
    assert [steps_between(10, 0.0, t, 1.0) for t in (0.01, 0.1, 0.11, 2.0)] == [1, 1, 2, 20]
    assert steps_between(10, 2.0, 0.0, 1.0) == 20


def test_a_closed_form_field_has_no_loss(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    with pytest.raises(ValueError, match="field='neural'"):
        sctraj.get.loss(cells)
    with pytest.raises(ValueError, match="field='neural'"):
        sctraj.pl.loss(cells)


def test_interpolate_from_both_sides(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    middle = sctraj.tl.interpolate(cells, 4.0)
    of = dict(zip(cells.obs_names, cells.obs["time"]))
    after = np.array([of[name] == 5.5 for name in middle.obs["source_cell"]])
    assert {of[name] for name in middle.obs["source_cell"]} == {3.5, 5.5}
    # a quarter of the way
    assert middle.obs["weight"][after].sum() == pytest.approx(0.25, abs=1e-6)
    assert middle.obs["weight"].sum() == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="both"):
        sctraj.tl.interpolate(cells, 4.0, start="after")


def test_jitter_widens_what_a_closed_form_field_restores(cells: AnnData) -> None:
    widths, spreads = (0.0, 1.0, 2.0), []
    for jitter in widths:
        sctraj.tl.leave_one_out(cells, field="closed-form", jitter=jitter)
        assert cells.uns["leave_one_out_protocol"]["jitter"] == jitter
        spreads.append(sctraj.get.leave_one_out(cells, metric="variance_ratio")["mean"]["uot-cfm"])
    assert spreads[0] < spreads[1] < spreads[2]
    sctraj.tl.fit_flow(cells, field="closed-form")
    plain, wide = (sctraj.tl.interpolate(cells, 4.0, jitter=jitter).obsm["X_pca"] for jitter in (0.0, 1.0))
    assert np.trace(np.cov(wide.T)) > np.trace(np.cov(plain.T))
    with pytest.raises(ValueError, match="field='closed-form'"):
        sctraj.tl.leave_one_out(cells, jitter=1.0)
    with pytest.raises(ValueError, match="at least 0, found -1"):
        sctraj.tl.leave_one_out(cells, field="closed-form", jitter=-1.0)
    sctraj.tl.fit_flow(cells, **QUICK)
    with pytest.raises(ValueError, match="no bandwidth"):
        sctraj.tl.interpolate(cells, 4.0, jitter=1.0)


def test_unweighted_distances_stand_beside_the_weighted(cells: AnnData) -> None:
    sctraj.tl.leave_one_out(cells, methods=("uot-cfm", "ot-cfm"), field="closed-form", start="before")
    mean = {m: sctraj.get.leave_one_out(cells, metric=m)["mean"] for m in ("w1", "w1_unweighted", "energy_unweighted")}
    assert mean["w1"]["uot-cfm"] != mean["w1_unweighted"]["uot-cfm"]
    # without growth, pushed cells of one snapshot all weigh the same
    assert mean["w1"]["ot-cfm"] == mean["w1_unweighted"]["ot-cfm"]
    with pytest.raises(ValueError, match="both"):
        sctraj.tl.leave_one_out(cells, start="after")


def test_the_default_beats_interpolation_on_real_cells(real_data) -> None:
    """One default, untouched, on the embryoid bodies: energy distance below interpolation's, and not by shrinking."""
    cells = anndata.read_h5ad(real_data("embryoid_body_2750.h5ad"))
    sctraj.pp.standardize(cells)
    sctraj.tl.leave_one_out(cells, use_rep="X_std", n_seeds=2)
    energy, ratio = (sctraj.get.leave_one_out(cells, metric=m)["mean"] for m in ("energy", "variance_ratio"))
    assert energy["uot-cfm"] < 0.9 * energy["ot-interpolation"]
    assert 0.8 < ratio["uot-cfm"] < 1.2


def test_fields_that_do_not_fit_are_refused(cells: AnnData) -> None:
    with pytest.raises(ValueError, match="neural, closed-form"):
        sctraj.tl.fit_flow(cells, field="kernel")
    with pytest.raises(ValueError, match="not trained"):
        sctraj.tl.fit_flow(cells, field="closed-form", module=nn.Linear(7, 6))
    with pytest.raises(ValueError, match="has its own"):
        sctraj.tl.fit_flow(cells, method="sb-cfm", path="hermite")
    with pytest.raises(ValueError, match="path"):
        sctraj.tl.fit_flow(cells, path="spline")


@pytest.mark.parametrize("path", ["land", "rbf"])
def test_learned_paths_survive_a_file(cells: AnnData, tmp_path, path: str) -> None:
    sctraj.tl.fit_flow(cells, method="ot-cfm", path=path, field="closed-form")
    assert cells.uns["flow"]["params"]["path"] == path
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    x = cells.obsm["X_pca"][:20]
    field = sctraj.get.vector_field(cells)
    assert np.array_equal(field(1.3, x), sctraj.get.vector_field(back)(1.3, x))
    straight = sctraj.tl.fit_flow(cells, method="ot-cfm", field="closed-form", copy=True)
    assert not np.allclose(field(1.3, x), sctraj.get.vector_field(straight)(1.3, x), rtol=0.05)
    # the neural field is trained on the same paths
    sctraj.tl.fit_flow(cells, method="ot-cfm", path=path, **QUICK)
    assert np.isfinite(cells.obsm["flow_velocity"]).all()


@pytest.mark.parametrize(
    ("method", "width", "warned"), [("sb-cfm", 3, True), ("sb-cfm", 8, False), ("ot-cfm", 3, False)]
)
def test_a_network_too_narrow_for_a_score_is_said(cells: AnnData, caplog, method, width, warned) -> None:
    caplog.set_level(logging.WARNING, logger="sctraj")
    sctraj.tl.fit_flow(cells, method=method, width=width, n_steps=5)
    assert ("pass width=" in caplog.text) == warned


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_cell_far_from_all_others_is_named(cells: AnnData, caplog, scale) -> None:
    """Whatever the unit; a cell in the tail of heavy ones is not."""
    caplog.set_level("WARNING", logger="sctraj")
    cells.obsm["X_pca"] = (scale * np.random.default_rng(0).standard_t(3, size=(600, 4))).astype(np.float32)
    cells.obsm["X_pca"] += scale * 5 * cells.obs["time"].to_numpy(np.float32)[:, None]
    sctraj.tl.fit_flow(cells, field="closed-form")
    assert not caplog.records
    usual = cells.uns["flow"]["params"]["sigma"]
    cells.obsm["X_pca"][7, 0] = 1e4 * scale
    for verb in (sctraj.tl.fit_flow, sctraj.tl.leave_one_out):
        caplog.clear()
        verb(cells, field="closed-form")
        (record,) = caplog.records
        assert "1 of 600 cells" in record.getMessage()
        assert f"{cells.obs_names[7]} (time {cells.obs['time'].iloc[7]:g}, " in record.getMessage()
    assert cells.uns["flow"]["params"]["sigma"] > 10 * usual  # said, and left as it is


def test_cells_mostly_at_one_place_are_not_outliers(cells: AnnData, caplog) -> None:
    caplog.set_level("WARNING", logger="sctraj")
    x = cells.obsm["X_pca"]
    x[np.random.default_rng(0).random(600) < 0.7] = 0
    sctraj.tl.fit_flow(cells, field="closed-form")
    assert not caplog.records


@pytest.mark.parametrize("method", ["uot-cfm", "sb-cfm"])
def test_default_steps_are_fine_enough(cells: AnnData, method) -> None:
    """Whoever gives no steps gets paths that finer steps do not change."""
    sctraj.tl.fit_flow(cells, method=method)
    spread = cells.obsm["X_pca"].std()
    found = {}
    for n_steps in (None, 50):
        sctraj.tl.trajectories(cells, times=4, n_steps=n_steps)
        found[n_steps] = cells.obsm["flow_trajectories"]
    off = (found[None] - found[50]) / spread
    assert 0 < np.sqrt((off**2).mean()) < 1e-3  # float32 and rk4 at ten steps a gap; a field is off by some percent


# --- a closed-form field, exactly


def _cells(points: np.ndarray, times: np.ndarray) -> AnnData:
    obs = pd.DataFrame({"time": times}, index=[f"c{k}" for k in range(len(times))])
    return AnnData(obs=obs, obsm={"X_pca": points.astype(np.float32)})


def _turning(n: int = 200) -> AnnData:
    """A cloud that goes up ten in the first interval and down ten in the second: its velocity jumps between them."""
    base = np.random.default_rng(0).normal(size=(n, 2))
    points = np.concatenate([base + np.array(place) for place in ([0, 0], [1, 10], [2, 0])])
    made = _cells(points, np.repeat([0.0, 1.0, 2.0], n))
    sctraj.tl.fit_flow(made, method="ot-cfm", field="closed-form")
    return made


def test_a_way_that_ends_at_a_snapshot_is_of_its_own_interval_alone() -> None:
    cells = _turning()
    x = cells.obsm["X_pca"].reshape(3, -1, 2).mean(1)
    for solver, n_steps in (("rk4", None), ("euler", 2)):
        sctraj.tl.trajectories(cells, times=[0.0, 1.0, 2.0], solver=solver, n_steps=n_steps)
        paths = cells.obsm["flow_trajectories"].reshape(3, -1, 3, 2).mean(1)  # of a snapshot's mean, at every time
        np.testing.assert_allclose(paths, np.broadcast_to(x, (3, 3, 2)), atol=0.15)  # a step of the wrong way is 5
    half = sctraj.tl.interpolate(cells, 0.5, solver="euler", n_steps=20).obsm["X_pca"].reshape(2, -1, 2).mean(1)
    np.testing.assert_allclose(half, [x[:2].mean(0)] * 2, atol=0.1)
    sctraj.tl.trajectories(cells, times=[0.0, 2.0])  # which leaves the snapshot between out
    np.testing.assert_allclose(cells.obsm["flow_trajectories"][:200, 1].mean(0), paths[0, 2], atol=0.05)


def test_a_closed_form_flow_is_the_same_backwards_in_time(cells: AnnData) -> None:
    back = cells.copy()
    back.obs["time"] = -back.obs["time"]
    for one in (cells, back):
        sctraj.tl.leave_one_out(one, field="closed-form")
    there, again = (sctraj.get.leave_one_out(one, metric="energy").loc["uot-cfm"] for one in (cells, back))
    np.testing.assert_allclose(there["mean"], again["mean"], rtol=1e-4)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_closed_form_bridge_keeps_a_population_together(stochastic) -> None:
    rng, n = np.random.default_rng(0), 150
    times = np.arange(4.0).repeat(n)
    cells = _cells(rng.normal(3 * times[:, None] * [1, 0]), times)
    sctraj.tl.fit_flow(cells, method="sb-cfm", field="closed-form")
    sctraj.tl.trajectories(cells, times=[0.0, 1.0, 2.0, 3.0], stochastic=stochastic)
    spread = cells.obsm["flow_trajectories"].reshape(4, n, 4, 2).std(1)
    assert spread.min() > 0.75
    assert spread.max() < 1.3  # 1 for all; 100 by steps too large, 1.7 by those of a neighbouring interval


@pytest.mark.parametrize(("method", "stochastic"), [("uot-cfm", False), ("sb-cfm", False), ("sb-cfm", True)])
def test_paths_and_what_they_gain_are_the_same_in_any_unit_of_time_and_by_any_stops(method, stochastic) -> None:
    times, paths, weights = np.repeat([0.0, 1.0, 3.0], 30), [], []
    points = np.random.default_rng(0).normal(size=(90, 2)) + times[:, None]
    for hours, between in product((1.0, 24.0), (False, True)):
        cells = _cells(points, hours * times)
        sctraj.tl.fit_flow(cells, method=method, field="closed-form")
        grid = hours * (np.arange(7) / 2 if between else np.array([0.0, 1.0, 3.0]))
        # three steps per mean gap, 1.5: each of half a unit, as far as it is to the next stop
        sctraj.tl.trajectories(cells, times=grid, solver="euler", stochastic=stochastic, n_steps=3)
        seen = np.isin(grid / hours, times)
        paths.append(cells.obsm["flow_trajectories"][:, seen])
        if method == "uot-cfm":
            weights.append(cells.obsm["flow_trajectory_weights"][:, seen])
    for found in (paths, weights):
        for other in found[1:]:
            # single precision, where a bridge's velocities grow without bound; other steps move paths by .1 and more
            np.testing.assert_allclose(other, found[0], rtol=0, atol=5e-3)
    assert not weights or weights[0].std() > 0.1  # there is something to gain


def test_stochastic_paths_are_as_rough_as_the_fits_diffusivity_says() -> None:
    times = np.arange(3.0).repeat(100)
    cells = _cells(np.random.default_rng(0).normal(size=(300, 2)) + times[:, None], times)
    sctraj.tl.fit_flow(cells, method="sb-cfm", field="closed-form")
    grid = np.linspace(0.25, 0.75, 51)
    sctraj.tl.trajectories(cells, times=grid, stochastic=True, n_steps=100)
    turns = np.diff(cells.obsm["flow_trajectories"], n=2, axis=1)  # from which a steady drift is gone
    sigma = cells.uns["flow"]["params"]["sigma"]
    # of 300 x 49 x 2 turns, neighbours of which share a step: 1 % by chance, and the drift's own change
    assert turns.var() == pytest.approx(2 * sigma**2 * 0.01, rel=0.05)


def test_closed_form_members_share_their_diffusivity(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, method="sb-cfm", field="closed-form")
    one = cells.uns["flow"]["params"]["sigma"]
    sctraj.tl.fit_flow(cells, method="sb-cfm", field="closed-form", n_members=3)
    paths = {name: value for name, value in cells.uns["flow"]["weights"].items() if name.endswith("sigma")}
    assert len(paths) == 3
    assert {float(value) for value in paths.values()} == {one} == {cells.uns["flow"]["params"]["sigma"]}


def test_seeds_of_pairs_that_are_drawn_are_in_the_table(cells: AnnData) -> None:
    sctraj.tl.leave_one_out(cells, methods=("uot-cfm", "i-cfm"), field="closed-form", n_seeds=3)
    wide = sctraj.get.leave_one_out(cells, metric="energy")
    assert wide.loc["i-cfm", "sd"] > 0
    assert np.isnan(wide.loc["uot-cfm", "sd"])


# --- what is said of data and results


@pytest.mark.parametrize("verb", [sctraj.tl.fit_flow, partial(sctraj.tl.leave_one_out, n_seeds=1)])
def test_what_makes_a_flow_doubtful_is_said(cells: AnnData, caplog, verb) -> None:
    caplog.set_level("WARNING", logger="sctraj")
    x, rng = cells.obsm["X_pca"], np.random.default_rng(0)

    def said(**options: object) -> list[str]:
        caplog.clear()
        verb(cells, field="closed-form", **options)
        return [record.getMessage() for record in caplog.records]

    assert said() == []
    cells.obsm["X_umap"] = x[:, :2].copy()
    (message,) = said(use_rep="X_umap")
    assert 'draw that flow with basis="X_umap"' in message
    cells.obsm["X_flexible"] = x.copy()  # begins as "fle" does, which is one
    assert said(use_rep="X_flexible") == []
    cells.obsm["X_wide"] = x * np.r_[1, 100, np.ones(x.shape[1] - 2)].astype(np.float32)
    assert any('one dimension of "X_wide" (1; the first is 0)' in message for message in said(use_rep="X_wide"))
    rare = np.where(rng.random((600, 30)) < 0.05, 1.0, 0.0) * rng.exponential(3, (600, 30))  # as most genes are
    cells.obsm["X_rare"] = np.column_stack([x[:, :1], rare]).astype(np.float32)
    assert said(use_rep="X_rare") == []
    counts = AnnData(
        rng.poisson(3 + cells.obs["time"].to_numpy()[:, None], (600, 5)).astype(np.float32), obs=cells.obs[["time"]]
    )
    cells, kept = counts, cells
    assert any("raw counts" in message for message in said(use_rep="X"))
    cells.X = np.log1p(cells.X)
    assert not any("raw counts" in message for message in said(use_rep="X"))
    cells = kept
    cells.obs["rates"] = rng.normal(0, 0.3, 600)
    assert said(growth_key="rates") == []
    cells.obs["faint"] = cells.obs["rates"] / 100
    assert any("next to nothing; are these rates" in message for message in said(growth_key="faint"))
    cells.obs["rates"] *= 1000
    assert any("are these rates per the unit of the times?" in message for message in said(growth_key="rates"))
    cells.obs["rates"] = cells.obs["time"]
    assert any("without effect" in message for message in said(growth_key="rates"))


def test_a_flow_that_tells_nothing_is_said(cells: AnnData, caplog) -> None:
    caplog.set_level("INFO", logger="sctraj")
    sctraj.tl.leave_one_out(cells, field="closed-form")
    energy = sctraj.get.leave_one_out(cells, metric="energy")["mean"]
    assert f"uot-cfm {energy['uot-cfm']:.3g}, previous {energy['previous']:.3g}" in caplog.text
    assert "tells nothing" not in caplog.text
    rng, times = np.random.default_rng(0), np.repeat([0.0, 1.0, 2.0], 60)
    late = _cells(rng.normal(size=(180, 2)) + 5 * (times == 2.0)[:, None], times)  # it moves in the second half alone
    sctraj.tl.leave_one_out(late, field="closed-form")
    assert (
        "uot-cfm is farther from the held-out snapshots, in the mean over times, than a neighbour copied (previous;"
        in caplog.text
    )


def test_where_nothing_moves_or_no_model_is_needed_it_is_said(cells: AnnData, caplog) -> None:
    caplog.set_level("INFO", logger="sctraj")
    cells.obs["time"] = np.random.default_rng(0).permutation(cells.obs["time"])
    sctraj.tl.leave_one_out(cells, field="closed-form")
    assert "as near to the held-out ones as sampling noise allows" in caplog.text
    assert "there is nothing to restore. Are the times right?" in caplog.text
    assert "interpolation without a model" not in caplog.text


def test_a_method_behind_straight_lines_is_told_so(cells: AnnData, caplog) -> None:
    caplog.set_level("INFO", logger="sctraj")
    sctraj.tl.leave_one_out(cells, methods=("i-cfm",), n_steps=5, batch_size=32)  # too few steps for a flow
    energy = sctraj.get.leave_one_out(cells, metric="energy")["mean"]
    assert energy["ot-interpolation"] < energy["i-cfm"] < energy["previous"]
    assert energy["i-cfm"] - energy["ot-interpolation"] > abs(energy["noise-reference"])
    (told,) = (record.getMessage() for record in caplog.records if "without a model" in record.getMessage())
    assert f"({energy['i-cfm']:.3g} for {energy['ot-interpolation']:.3g}): trust" in told


def test_a_flow_that_is_not_the_one_judged_is_said(cells: AnnData, caplog) -> None:
    caplog.set_level("WARNING", logger="sctraj")
    same = {"field": "closed-form", "use_rep": "X_latent"}
    sctraj.tl.fit_flow(cells, method="ot-cfm", **same)
    sctraj.tl.leave_one_out(cells, methods=("ot-cfm", "i-cfm"), **same)
    sctraj.tl.leave_one_out(cells, key_added="other", **QUICK)
    assert "fitted with" not in caplog.text
    sctraj.tl.leave_one_out(cells, methods=("ot-cfm",), path="hermite", sigma=0.5, **same)
    sigma = cells.uns["flow"]["params"]["sigma"]
    assert f"fitted with sigma={sigma!r}, path='straight': other fits are judged here" in caplog.text
    sctraj.tl.leave_one_out(cells, **QUICK)
    told = "fitted with use_rep='X_latent', field='closed-form', method='ot-cfm': other fits are judged here"
    assert told in caplog.text


def test_times_in_single_precision_are_the_snapshots_own(cells: AnnData, caplog) -> None:
    cells.obs["time"] = (8 + cells.obs["time"] / 10).astype(np.float32)
    sctraj.tl.fit_flow(cells, field="closed-form")
    last, before, sizes = 8.7, 8.55, cells.obs["time"].value_counts().sort_index().to_numpy()
    caplog.set_level("INFO", logger="sctraj")
    assert sctraj.tl.interpolate(cells, last).n_obs == sizes[-1]  # and not beyond the last snapshot
    assert sctraj.tl.interpolate(cells, before).n_obs == sizes[-2]
    assert set(sctraj.tl.interpolate(cells, before).obs["time"]) == {float(np.float32(before))}  # that of its cells
    assert caplog.text.count("that were sampled then, as they are") == 3
    sctraj.tl.trajectories(cells, times=[8.0, before, last], n_steps=1)
    own = np.unique(cells.obs["time"].astype(np.float64))
    np.testing.assert_array_equal(cells.uns["flow"]["trajectory_times"], own[[0, -2, -1]])
    sctraj.tl.trajectories(cells, times=[8.0, 8.000001, last], n_steps=1)  # one of them twice
    np.testing.assert_array_equal(cells.uns["flow"]["trajectory_times"], own[[0, -1]])
    with pytest.raises(ValueError, match=r"increasing times .* found \[8\.7, 8\.0\]"):
        sctraj.tl.trajectories(cells, times=[last, 8.0])
    with pytest.raises(ValueError, match=r"the snapshots' range, found 8\.71"):
        sctraj.tl.interpolate(cells, 8.71)


def test_what_another_wrote_is_never_replaced(cells: AnnData) -> None:
    cells.obsm["rna_velocity"], cells.obs["rna_growth"] = np.zeros((600, 3)), "mine"
    with pytest.raises(ValueError, match=r'found adata\.obsm\["rna_velocity"\], adata\.obs\["rna_growth"\] without'):
        sctraj.tl.fit_flow(cells, field="closed-form", key_added="rna")
    assert (cells.obs.pop("rna_growth") == "mine").all()
    del cells.obsm["rna_velocity"]
    for _ in range(2):  # its own are
        sctraj.tl.fit_flow(cells, field="closed-form", key_added="rna")
    cells.obsm["flow_restored"] = np.zeros((600, 3))
    with pytest.raises(ValueError, match=r'del adata\.obsm\["flow_restored"\]'):
        sctraj.tl.leave_one_out(cells, field="closed-form")
    assert not cells.obsm["flow_restored"].any()
    del cells.obsm["flow_restored"]
    for _ in range(2):
        sctraj.tl.leave_one_out(cells, field="closed-form")


def test_options_of_steps_that_nothing_uses_are_said(cells: AnnData, caplog) -> None:
    caplog.set_level("WARNING", logger="sctraj")
    sctraj.tl.fit_flow(cells, method="sb-cfm", field="closed-form")
    sctraj.tl.interpolate(cells, 0.5, n_steps=5)
    sctraj.tl.interpolate(cells, 0.5, solver="dopri5", tolerance=1e-2)
    assert not caplog.records
    sctraj.tl.interpolate(cells, 0.5, n_steps=5, tolerance=1e-2)
    sctraj.tl.interpolate(cells, 0.5, solver="dopri5", n_steps=5, tolerance=1e-2)
    sctraj.tl.trajectories(cells, times=[0.0, 1.0], stochastic=True, solver="euler", tolerance=1e-2)
    sctraj.tl.leave_one_out(cells, methods="sb-cfm", field="closed-form", n_seeds=1, block=300)
    sctraj.tl.fit_flow(cells, method="ot-cfm", field="closed-form", frame="moving")
    assert "frame" not in cells.uns["flow"]["params"]
    sctraj.tl.fit_flow(cells, method="ot-cfm", field="closed-form", path="hermite", frame="moving")  # kin's frame
    assert cells.uns["flow"]["params"]["frame"] == "moving"
    assert [record.getMessage() for record in caplog.records] == [
        "tolerance given, without effect on the steps of rk4",
        "n_steps given, without effect on the steps of dopri5",
        "solver, tolerance given, without effect on the steps of the simulation",
        "block given, without effect on sb-cfm",
        "frame given, without effect on ot-cfm",
    ]


def test_what_is_no_number_is_told_in_words(cells: AnnData) -> None:
    with pytest.raises(ValueError, match="expected n_steps to be a whole number of at least 1, found '100'"):
        sctraj.tl.fit_flow(cells, n_steps="100")
    sctraj.tl.fit_flow(cells, field="closed-form")
    with pytest.raises(ValueError, match=r"expected times that are numbers.*found 'D3'"):
        sctraj.tl.trajectories(cells, times="D3")
