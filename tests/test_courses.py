from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import norm

from sctraj.datasets import _courses, simulated_course

FAMILIES = get_args(_courses.Family)
FLOWS = ["cycle", "fast-phase", "crossing"]  # nothing diffuses, nothing grows
SLOTS = ("X_latent", "drift_latent", "X_pca")


def small(family="branching", **kwargs):
    return simulated_course(family, **{"n_cells": 60, "times": (0.0, 0.5, 1.5), "sample_effects": 1.0} | kwargs)


def latent(adata, t):
    return adata.obsm["X_latent"][adata.obs["time"] == t].astype(float)


def push(course, z, t0, t1, step=0.005):
    """States at t1 of cells at z at t0, and the log mass that each has gained, by RK4."""
    log_mass = np.zeros(len(z))
    n_steps = int(np.ceil((t1 - t0) / step))
    h = (t1 - t0) / n_steps
    for t in t0 + h * np.arange(n_steps):
        k1 = course.velocity(t, z)
        k2 = course.velocity(t + h / 2, z + h / 2 * k1)
        k3 = course.velocity(t + h / 2, z + h / 2 * k2)
        k4 = course.velocity(t + h, z + h * k3)
        log_mass += h * course.growth(t + h / 2, z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z, log_mass


def differ(x, y, rng):
    """Whether the energy distance of two samples is above that of each of 300 random relabellings of them."""
    distance = cdist(np.concatenate([x, y]), np.concatenate([x, y]))
    sign = np.concatenate([np.full(len(x), 1 / len(x)), np.full(len(y), -1 / len(y))])
    labels = np.stack([sign, *(rng.permutation(sign) for _ in range(300))])
    energy = -((labels @ distance) * labels).sum(1)
    return energy[0] > energy[1:].max()


def assert_same(a, b):
    """Bit for bit."""
    pd.testing.assert_frame_equal(a.obs, b.obs, check_exact=True)
    np.testing.assert_array_equal(a.X, b.X)
    for key in SLOTS:
        np.testing.assert_array_equal(a.obsm[key], b.obsm[key])


# --- randomness


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_fixes_every_bit_and_leaves_the_global_generator_alone(family):
    before = np.random.get_state()  # noqa: NPY002
    assert_same(small(family, rng=4), small(family, rng=4))
    assert_same(small(family, rng=4), small(family, rng=np.random.default_rng(4)))
    after = np.random.get_state()  # noqa: NPY002
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert not np.array_equal(small(family, rng=4).obsm["X_latent"], small(family, rng=5).obsm["X_latent"])


def test_a_generator_is_consumed():
    rng = np.random.default_rng(4)
    first, second = small(rng=rng), small(rng=rng)
    assert not np.array_equal(first.obsm["X_latent"], second.obsm["X_latent"])
    assert "seed" not in first.uns["simulation"]


@pytest.mark.parametrize("family", FLOWS)
def test_every_snapshot_has_its_own_cells(family):
    """A cell moved by the flow is nowhere in the next snapshot, and none is drawn twice."""
    adata = simulated_course(family, 600, times=(0.0, 1.0), rng=2)
    moved, _ = push(_courses._COURSES[family], latent(adata, 0.0), 0.0, 1.0)
    assert cdist(moved, latent(adata, 1.0)).min() > 1e-4
    assert len(np.unique(adata.obsm["X_latent"], axis=0)) == 600


# --- how the population moves


@pytest.mark.parametrize("family", FLOWS)
def test_drift_is_the_time_derivative_of_the_flow(family):
    """Without growth a seed draws the same cells at any time: those a little later less those a little before."""
    h, when = 0.01, np.array([1.0, 1.7, 2.5])
    before, now, after = (simulated_course(family, 300, times=when + shift, rng=3) for shift in (-h, 0, h))
    slope = (after.obsm["X_latent"].astype(float) - before.obsm["X_latent"]) / (2 * h)
    np.testing.assert_allclose(now.obsm["drift_latent"], slope, atol=2e-3)
    assert np.abs(slope).max() > 0.5


@pytest.mark.parametrize("family", FLOWS)
def test_the_flow_takes_every_snapshot_to_the_next(family):
    """Up to sampling error, at the family's own times; half the way is told apart, but for one slow half day."""
    rng, course = np.random.default_rng(0), _courses._COURSES[family]
    adata = simulated_course(family, 400 * len(course.times), rng=1)
    slower = []
    for t0, t1 in zip(course.times, course.times[1:]):
        z = latent(adata, t0)
        moved, _ = push(course, z, t0, t1)
        assert not differ(moved, latent(adata, t1), rng)
        slower.append(differ((z + moved) / 2, latent(adata, t1), rng))
    assert sum(slower) >= len(slower) - 1


@pytest.mark.parametrize("family", ["branching", *FLOWS, "high-dimensional"])
def test_carried_cells_are_a_sample_of_the_other_time(family):
    """Weighted by their mass, seen with their own noise, forwards and backwards."""
    rng, times = np.random.default_rng(0), (0.5, 2.0)
    adata = simulated_course(family, 4000, times=times, rng=1)
    for time, to in (times, times[::-1]):
        there, mass = _courses.carried(adata, time, to)
        of_mass = rng.choice(len(there), 300, replace=False, p=mass / mass.sum())  # a few of many: nearly by mass
        own = rng.permutation(np.flatnonzero(adata.obs["time"] == to))[:300]
        assert not differ(there[of_mass], adata.obsm["X_pca"][own], rng)
        assert differ(adata.obsm["X_pca"][adata.obs["time"] == time][:300], adata.obsm["X_pca"][own], rng)


def test_carried_cells_keep_their_noise_and_their_samples_shift():
    adata = small("crossing", n_cells=300)
    there, mass = _courses.carried(adata, 0.5, 1.5)
    moved, _ = push(_courses._COURSES["crossing"], latent(adata, 0.5), 0.5, 1.5)
    own = adata.obs["time"] == 0.5
    axes = adata.varm["latent_axes"]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)  # 5 dimensions hold no bend
    rest = adata.obsm["X_pca"][own] - adata.obsm["X_latent"][own] @ axes.T
    np.testing.assert_allclose(there, moved @ axes.T + rest, atol=1e-3)  # the midpoint rule's steps of .02 days
    assert (mass == 1).all()


def test_cells_that_diffuse_are_not_carried():
    with pytest.raises(ValueError, match="in which nothing diffuses, found 'switch'"):
        _courses.carried(small("switch"), 0.5, 1.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_truth_in_the_slots_is_that_of_the_cells(family):
    """Also with sample effects, under which it is the law at the snapshot's time, not at its age."""
    adata, course = small(family, n_cells=300), _courses._COURSES[family]
    for t in adata.obs["time"].unique():
        z, own = latent(adata, t), adata.obs["time"] == t
        np.testing.assert_allclose(adata.obsm["drift_latent"][own], course.velocity(t, z), atol=1e-5)
        np.testing.assert_allclose(adata.obs["growth_rate"][own], course.growth(t, z), atol=1e-6)
    assert (np.ptp(adata.obs["growth_rate"]) > 0.1) == (family in ("branching", "high-dimensional"))


def test_crossing_lineages_swap_sides():
    adata = simulated_course("crossing", 2000, rng=0)
    for t, share in ((0.0, 1.0), (4.0, 0.0)):
        _, side, marker = latent(adata, t).T
        assert (side * marker > 0).mean() == pytest.approx(share, abs=0.01)
        assert np.abs(side).mean() == pytest.approx(1.6, abs=0.1)  # the same places at either time
        assert (side > 0).mean() == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 400))


def test_the_switch_diffuses():
    """Its clock is an Ornstein-Uhlenbeck process, whose mean and variance are known; its genes part."""
    n, when = 4000, (0.0, 1.0, 4.0)
    adata = simulated_course("switch", 3 * n, times=when, rng=0)
    for t in when:
        clock, kept = latent(adata, t)[:, 2], np.exp(-0.15 * t)  # dc = (0.8 - 0.15 c) dt + 0.25 dW
        variance = 0.15**2 * kept**2 + 0.25**2 * (1 - kept**2) / 0.3
        assert clock.mean() == pytest.approx(0.8 / 0.15 * (1 - kept), abs=4 * np.sqrt(variance / n) + 2e-3)
        assert clock.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / n) + 5e-3)
    apart = [np.abs(z[:, 0] - z[:, 1]).mean() for z in (latent(adata, t) for t in when)]
    assert apart[2] > 1.5 > 0.5 > apart[0]


# --- growth


@pytest.mark.parametrize("family", ["branching", "high-dimensional"])
def test_snapshots_sample_the_grown_population(family):
    """The share of side > 0 is that of the mass exp(int g dt) of an independent population, within 4 s.d."""
    n, reference, course = 6000, 30_000, _courses._COURSES[family]
    adata = simulated_course(family, 2 * n, times=(2.0, 4.0), rng=1)
    for t in (2.0, 4.0):
        z, log_mass = push(course, course.start(reference, np.random.default_rng(2)), 0.0, t, step=0.05)
        mass, grown = np.exp(log_mass), z[:, 1] > 0
        expected = mass[grown].sum() / mass.sum()
        error = np.sqrt(expected * (1 - expected) * (1 / n + mass.max() / mass.mean() / reference))
        assert abs((latent(adata, t)[:, 1] > 0).mean() - expected) < 4 * error
        assert expected - 0.5 > 15 * error  # which is what no growth would give


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_cells_tell_nothing_about_growth(family):
    when = (0.0, 0.3, 1.5, 2.0)
    for effects in (0.0, 2.0):
        adata = simulated_course(family, 103, times=when, sample_effects=effects)
        assert adata.obs["time"].is_monotonic_increasing
        assert adata.obs["time"].unique().tolist() == list(when)
        assert sorted(adata.obs["time"].value_counts()) == [25, 26, 26, 26]


# --- observation


@pytest.mark.parametrize("family", FAMILIES)
def test_observation_is_an_isometry_a_bend_and_noise(family):
    """X regressed on the states (and, where bent, their sines) has orthogonal rows, and leaves the stated noise."""
    n, course = 4000, _courses._COURSES[family]
    adata = simulated_course(family, n, rng=6)
    z, x = adata.obsm["X_latent"].astype(float), adata.X.astype(float)
    inputs = np.concatenate([z, np.sin(z)], 1) if course.curvature else z
    rows = np.linalg.lstsq(inputs, x, rcond=None)[0]
    expected = np.repeat([1.0, course.curvature**2], z.shape[1])[: len(rows)]
    # the rows' errors have the covariance ``spread`` in each dimension, times its noise's variance
    spread = np.linalg.inv(inputs.T @ inputs)
    error = course.noise.max() * np.sqrt(np.outer(spread.diagonal(), expected))
    gram = rows @ rows.T - (course.noise**2).sum() * spread
    assert (np.abs(gram - np.diag(expected)) < 4.5 * (error + error.T)).all()
    residual = x - inputs @ rows
    np.testing.assert_allclose(residual.std(0), course.noise, rtol=4.5 / np.sqrt(2 * n))
    np.testing.assert_allclose(np.corrcoef(residual.T), np.eye(len(course.noise)), atol=4.5 / np.sqrt(n))
    np.testing.assert_array_equal(adata.obsm["X_pca"], adata.X)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "high-dimensional"])
def test_distances_are_latent_distances_and_noise(family):
    """E |x_i - x_j|^2 = |z_i - z_j|^2 + 2 sum of the noise's variances."""
    adata, course = simulated_course(family, 1000, rng=7), _courses._COURSES[family]
    slope, intercept = np.polyfit(pdist(adata.obsm["X_latent"]) ** 2, pdist(adata.X) ** 2, 1)
    assert slope == pytest.approx(1, abs=0.03)
    assert intercept == pytest.approx(2 * (course.noise**2).sum(), rel=0.2)


# --- sample effects


def shifts(effects, seed, n=200, when=(0.0, 0.05, 0.1, 0.15, 0.2)):
    """Of each sample against the others, in standard deviations of the noise; times are so close that states agree."""
    adata = simulated_course("cycle", n * len(when), times=when, sample_effects=effects, rng=seed)
    z, x = adata.obsm["X_latent"].astype(float), adata.X.astype(float)
    sample = np.eye(len(when)).repeat(n, axis=0)
    within_z, within_x = (y - sample @ (sample.T @ y) / n for y in (z, x))
    means = sample.T @ (x - z @ np.linalg.lstsq(within_z, within_x, rcond=None)[0]) / n
    return (means - means.mean(0)) / _courses._COURSES["cycle"].noise


@pytest.mark.parametrize(("effects", "size"), [(0.0, 0.0), (1.0, 0.25), (2.0, 0.5)])
def test_a_sample_is_shifted_by_the_stated_part_of_the_noise(effects, size):
    """Over 40 seeds, 5 samples and 5 dimensions; the mean of n = 200 cells adds 1 / n to the variance."""
    variance = np.mean([(shifts(effects, seed) ** 2).sum() / (4 * 5) for seed in range(40)])
    assert variance == pytest.approx(size**2 + 1 / 200, rel=4 * np.sqrt(2 / 800))


def test_without_sample_effects_no_sample_is_shifted():
    """In standard errors, of n = 4000 cells: a shift of 0.015 of the noise would show."""
    off = np.stack([shifts(0.0, seed, n=4000) for seed in range(100, 110)]) * np.sqrt(4000 / (1 - 1 / 5))
    assert np.abs(off).max() < 4.5
    assert (off**2).mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 200))


@pytest.mark.parametrize(("effects", "size"), [(0.0, 0.0), (1.0, 0.2)])
def test_a_samples_age_is_off_by_the_stated_part_of_the_mean_gap(monkeypatch, effects, size):
    """Crossing cells progress by 0.4 a day from N(0, 0.25), so that their mean is a clock; gaps are of 2 days."""
    monkeypatch.setattr(_courses, "_PREFERENCE", 0.0)
    monkeypatch.setattr(_courses, "_STEP", 0.2)  # progress is linear in time
    when, n, ages = np.array([1.0, 3.0, 5.0]), 200, []
    for seed in range(60):
        adata = simulated_course("crossing", 3 * n, times=when, sample_effects=effects, rng=seed)
        ages.append([latent(adata, t)[:, 0].mean() / 0.4 - t for t in when])
    assert np.var(ages) == pytest.approx(size**2 + (0.25 / 0.4) ** 2 / n, rel=4 * np.sqrt(2 / 180))


@pytest.mark.parametrize(("effects", "factor"), [(0.0, 1.0), (1.0, 1.5)])
def test_parts_of_a_sample_are_over_and_under_sampled_by_the_stated_factor(effects, factor):
    """The start of branching is normal: over 25 parts of equal mass, counts spread by that and by their own noise."""
    spread = []
    for seed in range(30):
        adata = simulated_course("branching", 4000, times=(0.0, 1e-3), sample_effects=effects, rng=seed)
        part = (5 * norm.cdf(latent(adata, 0.0) / [0.25, 0.2])).astype(int)
        counts = np.bincount(5 * part[:, 0] + part[:, 1], minlength=25)
        spread.append(np.var(np.log(counts)) - 1 / 80)  # 80 cells a part
    assert np.exp(np.sqrt(max(np.mean(spread), 0.0))) == pytest.approx(factor, abs=0.1)


# --- the form


def test_slots_and_dtypes():
    for family in FAMILIES:
        adata = small(family)
        assert adata.shape == (60, 50 if family == "high-dimensional" else 5)
        assert {one.dtype for one in (adata.X, *(adata.obsm[key] for key in SLOTS))} == {np.dtype(np.float32)}
        assert {adata.obs[key].dtype for key in ("time", "growth_rate")} == {np.dtype(np.float64)}


def test_the_record_of_the_times_is_its_own():
    when = np.array([0.0, 1.0])
    adata = small(times=when)
    when[1] = 7.0
    np.testing.assert_array_equal(adata.uns["simulation"]["times"], [0.0, 1.0])


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")  # anndata's default, not ours
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_survives_the_disk(tmp_path, form):
    """And what is recorded gives the same cells again."""
    adata = small("switch", rng=9)
    getattr(adata, f"write_{form}")(tmp_path / "adata")
    back = getattr(ad, f"read_{form}")(tmp_path / "adata")
    assert_same(adata, back)
    arguments = dict(back.uns["simulation"])
    assert arguments.keys() == {"family", "n_cells", "times", "sample_effects", "seed"}
    assert_same(adata, simulated_course(rng=arguments.pop("seed"), **arguments))


# --- errors


@pytest.mark.parametrize(
    "times", [(0.0,), (0.0, 2.0, 1.0), (0.0, 1.0, 1.0), (0.0, np.nan), (np.nan, 1.0), (0.0, np.inf), [[0.0, 1.0]]]
)
def test_times_must_increase(times):
    with pytest.raises(ValueError, match=r"strictly increasing order, found .*\. Sort them"):
        simulated_course("cycle", times=times)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"family": "spiral"}, "one of branching, cycle, .*, found 'spiral'. Choose"),
        ({"times": (-1.0, 1.0)}, "0 or later, when the population starts, found .*-1.0.*Shift"),
        ({"n_cells": 8}, "at least 3 per snapshot, 9 for 3 times, found 8. Ask"),
        ({"sample_effects": -0.5}, "finite number, 0 or more, found -0.5. Pass 0"),
        ({"sample_effects": np.nan}, "0 or more, found nan"),
        ({"sample_effects": np.inf}, "0 or more, found inf"),
    ],
)
def test_arguments_must_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)
