from pathlib import Path

import anndata as ad
import numpy as np
import ot
import pandas as pd
import pytest
from scipy.integrate import solve_ivp

from sctraj.datasets import simulated_differentiation
from sctraj.datasets._simulated import _flow, _progenitors, differentiation_growth, differentiation_velocity

EMBEDDED = Path(__file__).parents[1] / "data" / "simulated_differentiation.h5ad"


@pytest.fixture(scope="module")
def default():
    return simulated_differentiation()


@pytest.fixture
def states():
    """States over the whole landscape, each with its own time."""
    rng = np.random.default_rng(3)
    return rng.uniform(0, 7, 200), rng.uniform([-0.5, -3], [5, 3], (200, 2))


def small(**kwargs):
    return simulated_differentiation(60, **{"n_genes": 12, "n_pcs": 4} | kwargs)


def assert_same(a, b):
    """Bit for bit."""
    pd.testing.assert_frame_equal(a.obs, b.obs, check_exact=True)
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.layers["counts"].toarray(), b.layers["counts"].toarray())
    for key in ("X_latent", "velocity_latent", "X_pca"):
        np.testing.assert_array_equal(a.obsm[key], b.obsm[key])


# --- randomness


def test_a_seed_fixes_every_bit_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert_same(small(rng=4), small(rng=4))
    assert_same(small(rng=4), small(rng=np.random.default_rng(4)))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert not np.array_equal(small(rng=4).obsm["X_latent"], small(rng=5).obsm["X_latent"])


def test_a_generator_is_consumed():
    rng = np.random.default_rng(4)
    assert not np.array_equal(small(rng=rng).obsm["X_latent"], small(rng=rng).obsm["X_latent"])


# --- the known truth


def test_velocity_is_the_time_derivative_of_the_flow(states):
    h = 1e-3
    for t, z in zip(*(s[:30] for s in states)):
        ahead, _ = _flow(z[None], t, t + h)
        further, _ = _flow(z[None], t, t + 2 * h)
        slope = (4 * ahead - further - 3 * z) / (2 * h)  # one-sided, second order
        np.testing.assert_allclose(slope[0], differentiation_velocity(t, z), atol=2e-5)


def test_flow_and_growth_agree_with_an_adaptive_solver():
    start = _progenitors(5, np.random.default_rng(0))
    reached, log_mass = _flow(start, 0.0, 7.0)
    for z0, z1, mass in zip(start, reached, log_mass):

        def rates(t, y):
            return [*differentiation_velocity(t, y[:2]), differentiation_growth(t, y[:2])]

        exact = solve_ivp(rates, (0, 7), [*z0, 0.0], method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
        np.testing.assert_allclose([*z1, mass], exact, atol=1e-6)


def test_velocity_has_no_rotation(states):
    t, z = states
    h = 1e-5
    d_dp, d_db = (  # columns of the Jacobian
        (differentiation_velocity(t, z + step) - differentiation_velocity(t, z - step)) / (2 * h)
        for step in h * np.eye(2)
    )
    np.testing.assert_allclose(d_dp[:, 1], d_db[:, 0], atol=1e-8)
    assert np.abs(d_dp[:, 1]).max() > 0.1  # and not because it is zero


def test_velocity_depends_on_time_and_mirrors_the_fates(states):
    t, z = states
    v, mirrored = differentiation_velocity(t, z), differentiation_velocity(t, z * [1, -1])
    np.testing.assert_allclose(mirrored * [1, -1], v)
    assert (differentiation_velocity(t + 1, z)[:, 0] < v[:, 0]).all()
    np.testing.assert_allclose(differentiation_velocity(t[0], z[0]), v[0])  # broadcasts


def test_snapshots_sample_the_grown_population():
    """Fate shares and cell numbers follow the mass exp(int g dt) of an independent population, within 4 s.d."""
    adata = simulated_differentiation(6000, times=(0.0, 3.0, 7.0), n_genes=4, n_pcs=2, rng=1)
    for t, cells in adata.obs.groupby("time"):
        z, log_mass = _flow(_progenitors(20_000, np.random.default_rng(2)), 0.0, t)
        mass = np.exp(log_mass)
        observed = (adata[cells.index].obsm["X_latent"][:, 1] > 0).mean()
        expected = mass[z[:, 1] > 0].sum() / mass.sum()
        error = np.sqrt(expected * (1 - expected) * (1 / len(cells) + 1 / 20_000))
        assert abs(observed - expected) < 4 * error
        if t == 7:
            assert abs(observed - 0.5) > 8 * error  # which is what no growth would give
        assert len(cells) / (adata.obs["time"] == 0).sum() == pytest.approx(mass.mean(), rel=0.02)


def test_truth_in_the_slots_is_that_of_the_cells(default):
    time, z = default.obs["time"].to_numpy(), default.obsm["X_latent"]
    np.testing.assert_allclose(default.obsm["velocity_latent"], differentiation_velocity(time, z), atol=1e-5)
    np.testing.assert_allclose(default.obs["growth_rate"], differentiation_growth(time, z), atol=1e-6)


def test_every_snapshot_has_its_own_cells(default):
    """A cell moved by the flow is nowhere in the next snapshot."""
    z, time = default.obsm["X_latent"].astype(float), default.obs["time"]
    moved, _ = _flow(z[time == 0], 0.0, 1.0)
    assert ot.dist(moved, z[time == 1], metric="euclidean").min() > 1e-5


# --- the form


def test_slots_and_dtypes(default):
    assert default.shape == (1500, 150)
    assert default.X.dtype == np.float32
    assert default.obs["time"].dtype == np.float64
    assert default.obs["time"].is_monotonic_increasing
    assert default.obs["day"].cat.categories.tolist() == ["D0", "D1", "D2.5", "D3.5", "D5.5", "D7"]
    np.testing.assert_array_equal(default.obs["day"].astype(str).str[1:].astype(float), default.obs["time"])
    assert set(default.obs["fate"]) == {"progenitor", "A", "B"}
    for key, d in {"X_latent": 2, "velocity_latent": 2, "X_pca": 10}.items():
        assert default.obsm[key].shape == (1500, d)
        assert default.obsm[key].dtype == np.float32
    assert default.obs_names[0] == "cell_0"
    assert default.var_names[-1] == "gene_149"
    assert default.uns["simulation"]["seed"] == 0


def test_x_is_log_normalised_counts(default):
    counts = default.layers["counts"].toarray().astype(float)
    assert (counts == np.rint(counts)).all()
    assert counts.min() >= 0
    linear = np.expm1(default.X.astype(float))
    np.testing.assert_allclose(linear.sum(1), np.median(counts.sum(1)), rtol=1e-5)
    np.testing.assert_allclose(linear / linear.sum(1, keepdims=True), counts / counts.sum(1, keepdims=True), atol=1e-6)


def test_x_pca_is_x_centred_times_the_components(default):
    x = default.X.astype(float)
    np.testing.assert_allclose((x - x.mean(0)) @ default.varm["PCs"], default.obsm["X_pca"], atol=1e-3)
    ratio = default.uns["pca"]["variance_ratio"]
    assert 0.4 < ratio[:2].sum() < 0.8  # two components carry the branching, and leave something


@pytest.mark.parametrize(("n_cells", "times"), [(18, (0, 1, 2.5, 3.5, 5.5, 7)), (40, (2, 9)), (101, range(8))])
def test_numbers_of_cells_add_up(n_cells, times):
    adata = simulated_differentiation(n_cells, times=times, n_genes=5, n_pcs=5)
    assert adata.n_obs == n_cells
    assert adata.obs["day"].value_counts().min() >= 3
    assert adata.obs["time"].unique().tolist() == list(times)


@pytest.mark.parametrize("use_rep", ["X_pca", "X_latent"])
def test_optimal_transport_restores_what_copying_does_not(default, use_rep):
    """The energy distance of displacement interpolation at the real time is a fraction of that of either neighbour."""

    def mean_distance(x, y, pairs):
        return ot.dist(x, y, metric="euclidean").sum() / pairs

    def energy(x, y):
        n, m = len(x), len(y)
        return 2 * mean_distance(x, y, n * m) - mean_distance(x, x, n * (n - 1)) - mean_distance(y, y, m * (m - 1))

    times = default.uns["simulation"]["times"]
    points = [default.obsm[use_rep][default.obs["time"] == t].astype(float) for t in times]
    for k in range(1, len(times) - 1):
        before, observed, after = points[k - 1 : k + 2]
        plan = ot.emd([], [], ot.dist(before, after))
        i, j = np.nonzero(plan)
        chosen = np.random.default_rng(0).choice(len(i), 1000, p=plan[i, j] / plan.sum())
        s = (times[k] - times[k - 1]) / (times[k + 1] - times[k - 1])
        restored = ((1 - s) * before[i] + s * after[j])[chosen]
        assert energy(restored, observed) < 0.25 * min(energy(before, observed), energy(after, observed))


# --- on disk


def test_the_embedded_file_is_the_default_output(default):
    embedded = ad.read_h5ad(EMBEDDED)
    assert EMBEDDED.stat().st_size < 2e6
    exact = ["time", "day", "fate"]
    pd.testing.assert_frame_equal(embedded.obs[exact], default.obs[exact], check_exact=True)
    np.testing.assert_allclose(embedded.obs["growth_rate"], default.obs["growth_rate"], rtol=1e-4)
    np.testing.assert_array_equal(embedded.layers["counts"].toarray(), default.layers["counts"].toarray())
    np.testing.assert_allclose(embedded.X, default.X, rtol=1e-4)
    for key in ("X_latent", "velocity_latent"):
        np.testing.assert_allclose(embedded.obsm[key], default.obsm[key], rtol=1e-4, atol=1e-5)
    sign = np.sign((embedded.obsm["X_pca"] * default.obsm["X_pca"]).sum(0))  # LAPACK builds may differ by it
    np.testing.assert_allclose(embedded.obsm["X_pca"] * sign, default.obsm["X_pca"], rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")  # anndata's default, not ours
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_survives_the_disk(tmp_path, form):
    adata = small()
    getattr(adata, f"write_{form}")(tmp_path / "adata")
    back = getattr(ad, f"read_{form}")(tmp_path / "adata")
    assert_same(adata, back)
    assert back.uns["simulation"].keys() == adata.uns["simulation"].keys()
    np.testing.assert_array_equal(back.uns["simulation"]["times"], adata.uns["simulation"]["times"])


# --- errors


@pytest.mark.parametrize(
    "times", [(0.0,), (0.0, 2.0, 1.0), (0.0, 1.0, 1.0), (0.0, np.nan), (0.0, np.inf), [[0.0, 1.0]]]
)
def test_times_must_increase(times):
    with pytest.raises(ValueError, match="strictly increasing order, found"):
        simulated_differentiation(times=times)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_cells": 17}, "at least 3 per snapshot, 18 for 6 times, found 17"),
        ({"n_genes": 9}, "between 1 and 9 for n_genes=9 and n_cells=1500, found 10"),
        ({"n_cells": 18, "n_pcs": 18}, "between 1 and 17"),
        ({"n_pcs": 0}, "found 0"),
    ],
)
def test_sizes_must_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        simulated_differentiation(**kwargs)
