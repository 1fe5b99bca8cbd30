"""Laws of the distances: what they are on laws known in closed form, and that noise alone is zero where promised."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, pdist
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance

from sctraj.flow import clouds, distance
from sctraj.flow.distance import (
    energy_distance,
    estimated_wasserstein,
    median_distance,
    mmd,
    sinkhorn_divergence,
    sliced_wasserstein,
    variance_ratio,
    wasserstein,
)


def w2(x, y, **kwargs):
    return wasserstein(x, y, p=2, **kwargs)


def mmd_one(x, y, **kwargs):
    return mmd(x, y, bandwidth=1.0, **kwargs)


def sinkhorn(x, y, **kwargs):
    return sinkhorn_divergence(x, y, epsilon=0.5, **kwargs)


TRANSPORT = [wasserstein, w2, sliced_wasserstein, sinkhorn]
UNBIASED = [energy_distance, mmd_one]
SYMMETRIC = TRANSPORT + UNBIASED
ALL = [*SYMMETRIC, variance_ratio]
SHIFT = np.array([3.0, -4.0, 0.0])  # of length 5


def two_clouds(n=40, m=30, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 1.5 * rng.normal(size=(m, d)) + 1


@pytest.mark.parametrize("measure", TRANSPORT)
def test_identical_clouds_are_at_zero(measure):
    x, _ = two_clouds()
    # rounding of squares of the order of one, whose root W2 takes; Sinkhorn's three problems to its tolerance of 1e-4
    assert measure(x, x[::-1]) == pytest.approx(0, abs=1e-4 if measure is sinkhorn else 1e-7)


@pytest.mark.parametrize("measure", SYMMETRIC)
def test_symmetry(measure):
    x, y = two_clouds()
    # rounding; Sinkhorn solves for the other side first, to its tolerance of 1e-4 of potentials of the order of ten
    assert measure(x, y) == pytest.approx(measure(y, x), rel=1e-3 if measure is sinkhorn else 1e-10)


@pytest.mark.parametrize("p", [1, 2])
def test_a_shifted_cloud_is_as_far_as_its_shift(p):
    x, _ = two_clouds()
    assert wasserstein(x, x + SHIFT, p=p) == pytest.approx(5, rel=1e-12)  # optimal for any cloud: rounding


@pytest.mark.parametrize("measure", ALL)
def test_moving_both_clouds_changes_nothing(measure):
    x, y = two_clouds()
    # the coordinates lose eleven bits; Sinkhorn stops within its tolerance
    assert measure(x + 1000, y + 1000) == pytest.approx(measure(x, y), rel=1e-6 if measure is sinkhorn else 1e-10)


@pytest.mark.parametrize(
    ("measure", "power"), [(wasserstein, 1), (w2, 1), (sliced_wasserstein, 1), (energy_distance, 1)]
)
def test_units(measure, power):
    x, y = two_clouds()
    assert measure(24 * x, 24 * y) == pytest.approx(24**power * measure(x, y), rel=1e-10)  # rounding


def test_units_of_those_with_a_scale_of_their_own():
    x, y = two_clouds()
    assert mmd(24 * x, 24 * y) == pytest.approx(mmd(x, y), rel=1e-10)  # the bandwidth follows the data
    assert sinkhorn_divergence(24 * x, 24 * y) == pytest.approx(24**2 * sinkhorn_divergence(x, y), rel=1e-6)  # so here


def test_w2_between_gaussians():
    rng = np.random.default_rng(0)
    n, root = 1500, np.array([[1.5, 0.0], [0.8, 0.6]])
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(n, 2)) @ root.T + [2.0, 1.0]
    truth = float(ot.gaussian.bures_wasserstein_distance(np.zeros(2), np.array([2.0, 1.0]), np.eye(2), root @ root.T))
    # noise of the means: sqrt((1 + 2.6) / n) = 0.05 against 2.3; the bias of samples is smaller in two dimensions
    assert w2(x, y) == pytest.approx(truth, rel=0.05)


def test_w1_and_w2_in_one_dimension():
    x, y = two_clouds(d=1, n=30)
    assert wasserstein(x, y) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-12)  # the same, sorted
    assert w2(x, y) == pytest.approx(math.sqrt(np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2)), rel=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_sliced_in_one_dimension_is_the_whole(p):
    x, y = two_clouds(d=1)
    a, b = (np.random.default_rng(s).exponential(size=n) for s, n in ((1, 40), (2, 30)))
    whole = wasserstein(x, y, p=p, weights_x=a, weights_y=b)
    # two directions, one law; rounding
    assert sliced_wasserstein(x, y, p=p, weights_x=a, weights_y=b) == pytest.approx(whole, rel=1e-9)


def test_sliced_of_a_shift_is_the_mean_projection():
    x, _ = two_clouds()
    value = sliced_wasserstein(x, x + SHIFT, n_projections=4000)
    # E (direction . shift)^2 = |shift|^2 / d; relative error of the mean of 4000 squares: sqrt(0.8/4000), halved
    assert value == pytest.approx(5 / math.sqrt(3), rel=0.03)
    assert sliced_wasserstein(x, x + SHIFT, rng=4) == sliced_wasserstein(x, x + SHIFT, rng=np.random.default_rng(4))


@pytest.mark.parametrize("measure", TRANSPORT)
def test_whole_weights_are_repeated_points(measure):
    x, y = two_clouds()
    a, b = (np.random.default_rng(s).integers(1, 4, size=n) for s, n in ((1, 40), (2, 30)))
    weighted = measure(x, y, weights_x=a, weights_y=b)
    # one law written twice: rounding, and Sinkhorn's tolerance
    assert measure(x.repeat(a, 0), y.repeat(b, 0)) == pytest.approx(weighted, rel=1e-4 if measure is sinkhorn else 1e-9)


@pytest.mark.parametrize("measure", ALL)
def test_equal_weights_are_no_weights_and_zero_weight_is_no_point(measure):
    x, y = two_clouds()
    plain = measure(x, y)
    tolerance = 1e-6 if measure is sinkhorn else 1e-9  # Sinkhorn stops within its tolerance; else rounding
    assert measure(x, y, weights_x=np.full(40, 7.0), weights_y=torch.full((30,), 0.1)) == pytest.approx(plain, rel=1e-6)
    far_x, far_y = np.concatenate([x, x[:3] + 9]), np.concatenate([y[:2] - 9, y])
    a, b = np.r_[np.ones(40), np.zeros(3)], np.r_[np.zeros(2), np.ones(30)]
    assert measure(far_x, far_y, weights_x=a, weights_y=b) == pytest.approx(plain, rel=tolerance)


@pytest.mark.parametrize("measure", UNBIASED)
@pytest.mark.parametrize("weighted", [False, True])
def test_two_samples_of_one_law_give_zero_on_average(measure, weighted):
    rng = np.random.default_rng(0)
    values = []
    for _ in range(400):
        x, y = rng.normal(size=(12, 2)), rng.normal(size=(9, 2))
        weights = {"weights_x": rng.exponential(size=12), "weights_y": rng.exponential(size=9)} if weighted else {}
        values.append(measure(x, y, **weights))
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(400)  # three standard errors
    assert min(values) < 0  # no clipping


def test_energy_of_averages_of_two_samples_is_below_zero_and_of_both_samples_together_is_not():
    """Why an interpolation at rest comes out too low: its points are means of two draws, not draws."""
    rng, n, d = np.random.default_rng(0), 100, 2
    averages, together, within = [], [], []
    for _ in range(40):
        x, y, law = (rng.standard_normal((m, d)) for m in (n, n, 3000))
        i, j = linear_sum_assignment(cdist(x, y) ** 2)
        averages.append(distance.energy_distance((x[i] + y[j]) / 2, law))
        together.append(distance.energy_distance(np.concatenate([x, y]), law))
        within.append(pdist(x).mean())
    for found, expected in ((averages, -np.mean(within) / (2 * n)), (together, 0.0)):
        assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / math.sqrt(len(found)))
    assert np.mean(averages) < -0.005


def test_energy_is_the_mean_over_distinct_pairs():
    x, y = two_clouds()
    truth = 2 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean()
    assert energy_distance(x, y) == pytest.approx(truth, rel=1e-10)  # rounding


def test_energy_against_scipy_in_one_dimension():
    x, y = two_clouds(d=1)
    # scipy's is the root of the V-statistic, which counts each cell's zero distance to itself
    excess = pdist(x).mean() / 40 + pdist(y).mean() / 30
    assert scipy_energy(x[:, 0], y[:, 0]) ** 2 - excess == pytest.approx(energy_distance(x, y), rel=1e-9)  # rounding


def test_weighted_energy_is_an_expectation_over_distinct_draws():
    x, y = two_clouds(n=5, m=4)
    a, b = np.array([0.1, 0.3, 0.2, 0.25, 0.15]), np.array([0.4, 0.3, 0.2, 0.1])

    def within(points, mass):
        pairs = [(i, j) for i in range(len(mass)) for j in range(len(mass)) if i != j]
        weight = [mass[i] * mass[j] for i, j in pairs]
        return np.average([np.linalg.norm(points[i] - points[j]) for i, j in pairs], weights=weight)

    truth = 2 * a @ cdist(x, y) @ b - within(x, a) - within(y, b)
    assert energy_distance(x, y, weights_x=a, weights_y=b) == pytest.approx(truth, rel=1e-10)  # rounding


def test_energy_about_the_mean_stretches_what_meets_as_an_unbiased_variance_does():
    x, y = two_clouds()
    mass = np.random.default_rng(1).exponential(size=len(x))
    mass /= mass.sum()
    a = (x - mass @ x) / np.sqrt(1 - 2 * mass + np.sum(mass**2))[:, None]
    b = (y - y.mean(0)) * math.sqrt(30 / 29)
    within = (mass @ cdist(x, x) @ mass) / (1 - np.sum(mass**2)) + pdist(y).mean()
    found = energy_distance(x + SHIFT, y, weights_x=mass, about_mean=True)
    assert found == pytest.approx(2 * mass @ cdist(a, b).mean(1) - within, rel=1e-9)  # rounding
    assert 0 < found < energy_distance(x, y, weights_x=mass)  # one is wider, and off by one in every dimension


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", [1, 5])
def test_energy_about_the_mean_of_two_samples_of_one_normal_law_is_zero_on_average(d, weighted):
    rng = np.random.default_rng(0)
    weights = {"weights_x": rng.exponential(size=12), "weights_y": rng.exponential(size=9)} if weighted else {}

    def draws(times):
        return ((rng.normal(size=(12, d)), rng.normal(size=(9, d))) for _ in range(times))

    values = [energy_distance(x, y, about_mean=True, **weights) for x, y in draws(2000)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(2000)  # three standard errors
    narrow = [energy_distance(x, 0.5 * y, about_mean=True) for x, y in draws(200)]
    assert np.mean(narrow) > 5 * np.std(narrow) / math.sqrt(200)


def test_mmd_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    n, d, h = 1500, 2, 1.3
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d)) + np.array([1.0, 0.0])
    # E k(X, Y) = (h^2/(h^2+2))^(d/2) exp(-|mean difference|^2 / (2 (h^2+2)))
    truth = 2 * h**2 / (h**2 + 2) * (1 - math.exp(-1 / (2 * (h**2 + 2))))
    assert mmd(x, y, bandwidth=h) == pytest.approx(truth, rel=0.15)  # noise of the order of 2/sqrt(n truth) = 0.15


def test_the_bandwidth_is_the_observed_cells_own():
    x, y = two_clouds()
    h = median_distance(y)
    assert h == pytest.approx(np.median(pdist(y)), rel=0.02)  # of 435 distances torch takes the lower of the middle
    for restored in (x, 5 * x, x[:7]):
        assert mmd(restored, y) == mmd(restored, y, bandwidth=h)
    assert mmd(x, y) != pytest.approx(mmd(y, x), rel=1e-3)  # so the order of the arguments matters


def test_sinkhorn_tends_to_w2_squared():
    x, y = two_clouds(n=25, m=25)
    truth = w2(x, y) ** 2
    gaps = [abs(sinkhorn_divergence(x, y, epsilon=e) - truth) for e in (3.0, 0.3, 0.03)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02 * truth  # of the order of epsilon log n = 0.1, half of it cancelled, against a W2^2 of 5


def test_sinkhorn_tends_to_the_distance_of_means():
    x, y = two_clouds()
    truth = float(np.square(x.mean(0) - y.mean(0)).sum())
    assert sinkhorn_divergence(x, y, epsilon=1e5) == pytest.approx(truth, rel=1e-3)  # Feydy et al.: cost / epsilon


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_variance_ratio_goes_with_the_square(factor):
    _, y = two_clouds()
    assert variance_ratio(factor * y + 7, y) == pytest.approx(factor**2, rel=1e-12)  # rounding


def test_variance_ratio_is_of_unbiased_variances():
    x, y = two_clouds()
    assert variance_ratio(x, y) == pytest.approx(x.var(0, ddof=1).sum() / y.var(0, ddof=1).sum(), rel=1e-12)  # rounding


@pytest.mark.parametrize("measure", UNBIASED)
@pytest.mark.parametrize("tile", [1, 100])
def test_tiles_change_nothing(monkeypatch, measure, tile):
    x, y = two_clouds()
    weights = {"weights_x": np.random.default_rng(1).exponential(size=40)}
    whole = measure(x, y, **weights)
    monkeypatch.setattr(clouds, "TILE", tile)
    assert measure(x, y, **weights) == pytest.approx(whole, rel=1e-10)  # the order of a sum


@pytest.mark.parametrize("measure", ALL)
def test_tensors_of_any_precision_do(measure):
    x, y = (v.astype(np.float32) for v in two_clouds())
    assert measure(torch.tensor(x), torch.tensor(y)) == measure(x.astype(np.float64), y.astype(np.float64))


@pytest.mark.parametrize("measure", ALL)
def test_arrays_of_any_layout_do(measure):
    x, y = two_clouds()
    truth = measure(x, y)
    frozen = np.asfortranarray(x)
    frozen.flags.writeable = False
    assert measure(frozen, y.tolist()) == pytest.approx(truth, rel=1e-12)  # the order of a sum
    backwards = np.ascontiguousarray(x[::-1])[::-1]  # the same cells, a negative stride
    assert measure(backwards, y, weights_x=np.ones(40)[::-1]) == pytest.approx(truth, rel=1e-9)  # rounding


@pytest.mark.parametrize("measure", ALL)
def test_sparse_points_are_their_dense_ones(measure):
    x, y = (np.where(v > 0, v, 0) for v in two_clouds())
    truth = measure(x, y)
    for form in (sparse.csr_matrix, sparse.coo_array):
        assert measure(form(x), form(y)) == truth
    assert measure(torch.tensor(x).to_sparse(), y) == truth


@pytest.mark.parametrize("measure", ALL)
def test_what_is_no_cloud_is_an_error(measure):
    x, y = two_clouds()
    for bad in (x[:, :2], x[:0], x[:, 0], np.where(x > 2, np.nan, x), np.where(x > 2, np.inf, x)):
        with pytest.raises(ValueError, match="expected"):
            measure(bad, y)
    for weights in (np.ones(39), -np.ones(40), np.zeros(40), np.full(40, np.nan), np.full(40, np.inf)):
        with pytest.raises(ValueError, match="weights"):
            measure(x, y, weights_x=weights)


@pytest.mark.parametrize("measure", [*UNBIASED, variance_ratio])
def test_unbiased_distances_need_pairs(measure):
    x, y = two_clouds()
    with pytest.raises(ValueError, match="two points"):
        measure(x[:1], y)
    with pytest.raises(ValueError, match="two points"):
        measure(x, y, weights_y=np.eye(30)[4])


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_no_ratio_to_a_variance_of_zero(value):
    x, _ = two_clouds()
    y = np.full((30, 3), value)  # of 0.1 the mean is rounded
    y[3] = 9
    with pytest.raises(ValueError, match="observed points that vary, found 29 at one place"):
        variance_ratio(x, y, weights_y=np.arange(30) != 3)
    assert variance_ratio(y[:3], x) == pytest.approx(0, abs=1e-30)  # rounding


def test_many_equal_observed_cells_still_have_a_bandwidth():
    x, y = two_clouds()
    y[:25] = y[0]
    assert np.median(pdist(y)) == 0
    assert mmd(x, y) == mmd(x, y, bandwidth=median_distance(y))
    assert sinkhorn_divergence(x, y) > 0


def test_numbers_of_projections_and_powers_out_of_range():
    x, y = two_clouds()
    for n in (0, -1, 2.5, math.nan):
        with pytest.raises(ValueError, match="projections, at least 1, found"):
            sliced_wasserstein(x, y, n_projections=n)
    for p in (0, 0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="p of at least 1, found"):
            sliced_wasserstein(x, y, p=p)


def test_powers_and_bandwidths_out_of_range():
    x, y = two_clouds()
    for p in (0, 3, 1.5):
        with pytest.raises(ValueError, match="p of 1 or 2"):
            wasserstein(x, y, p=p)
    for h in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bandwidth"):
            mmd(x, y, bandwidth=h)
    with pytest.raises(ValueError, match="bandwidth"):
        mmd(x, np.ones((5, 3)))


def test_an_exact_plan_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(distance, "LARGEST_PLAN", 34)
    x, y = two_clouds()
    with pytest.raises(ValueError, match=r"at most 34 points a side.*found 35.*estimated_wasserstein"):
        wasserstein(x, y)
    with pytest.raises(ValueError, match="p of 1 or 2"):
        estimated_wasserstein(x, y, p=3)


def test_a_divergence_that_does_not_converge_speaks_of_its_own_epsilon():
    x, y = np.random.default_rng(0).normal(size=(2, 30, 2))
    x[0] = 1e6
    with pytest.raises(ValueError, match="expected an epsilon at which Sinkhorn converges, found"):
        sinkhorn_divergence(x, y)
    assert np.isfinite(sinkhorn_divergence(x, y, epsilon=1e8))
