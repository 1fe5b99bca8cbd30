"""Estimates of energy distance and MMD of large clouds, on clouds for which all pairs can still be met."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sctraj.flow import distance, pairwise_estimates
from sctraj.flow.clouds import median_distance
from sctraj.flow.distance import energy_distance, mmd
from sctraj.flow.pairwise_estimates import estimated_energy_distance, estimated_mmd, estimated_pairwise, within


@pytest.fixture
def small_blocks(monkeypatch):
    """The estimators at an eighth of their size."""
    monkeypatch.setattr(pairwise_estimates, "LARGEST_PAIRWISE", 300)
    monkeypatch.setattr(pairwise_estimates, "PAIR_BLOCK", 128)


def large_clouds(law, seed, n=700):
    """Two samples of one law, or of two far laws; of equal or of exponential weights, and unequal in number."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 5)), rng.normal(size=(n, 5))
    if law == "far":
        y = 0.5 * y + 1
    if law == "weighted":
        x = np.concatenate([x, 2 * x[: n // 2]])
        return x, y, {"weights_x": rng.exponential(size=len(x)), "weights_y": rng.exponential(size=n)}
    return x, y, {}


@pytest.mark.parametrize("estimated", [estimated_energy_distance, estimated_mmd])
@pytest.mark.usefixtures("small_blocks")
def test_estimates_are_exact_where_they_can_be_and_repeat(estimated):
    exact = getattr(distance, estimated.__name__.removeprefix("estimated_"))
    x, y, _ = large_clouds("far", 0, n=290)
    assert estimated(x, y, rng=0) == (pytest.approx(exact(x, y), rel=1e-12), 0.0, 290)  # rounding
    x, y, _ = large_clouds("far", 0)
    assert estimated(x, y, rng=3) == estimated(x, y, rng=np.random.default_rng(3))
    assert estimated(x, y, rng=3).value != estimated(x, y, rng=4).value
    assert estimated(x, y, rng=3).error > 0


@pytest.mark.parametrize("estimated", [estimated_energy_distance, estimated_mmd])
@pytest.mark.parametrize("law", ["near", "far", "weighted"])
@pytest.mark.usefixtures("small_blocks")
def test_estimates_over_pairs_are_unbiased_and_say_their_error(estimated, law):
    x, y, weights = large_clouds(law, 0)
    options = weights | ({"bandwidth": 2.0} if estimated is estimated_mmd else {})
    truth = getattr(distance, estimated.__name__.removeprefix("estimated_"))(x, y, **options)
    found = [estimated(x, y, rng=seed, **options) for seed in range(30)]
    values, errors = np.array([e.value for e in found]), np.array([e.error for e in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(30)  # three standard errors
    # squares: errors from eight partitions scatter, by half in square, their mean by a tenth
    assert 0.5 < np.mean(errors**2) / values.var() < 2


def together(x, y, weightings, *, shared, rng=0):
    """Both distances of all weightings from one call, and the energy distance about the mean."""
    h = median_distance(y)
    own = within(y, bandwidth=h, weights=None) if shared else None
    found = estimated_pairwise(x, y, bandwidth=h, weights_x=weightings, weights_y=None, rng=rng, within_y=own)
    return [(one.energy, one.mmd) for one in found[0]], found[1]


@pytest.mark.parametrize("shared", [False, True])
def test_weightings_and_kernels_met_together_are_those_met_alone_to_the_bit(shared):
    x, y, weights = large_clouds("weighted", 0, n=200)
    weightings = [weights["weights_x"], None]
    both, shape = together(x, y, weightings, shared=shared)
    for (energy, squared), mass in zip(both, weightings, strict=True):
        assert energy == (energy_distance(x, y, weights_x=mass), 0.0, energy.n_points)
        assert squared == (mmd(x, y, weights_x=mass), 0.0, squared.n_points)
    alone = energy_distance(x, y, weights_x=weightings[0], about_mean=True)
    assert shape == (alone, 0.0, both[0][0].n_points)


@pytest.mark.usefixtures("small_blocks")
def test_estimates_met_together_are_those_met_alone():
    x, y, weights = large_clouds("weighted", 0)
    weightings = [weights["weights_x"], None]
    both, shape = together(x, y, weightings, shared=False, rng=5)
    for (energy, squared), mass in zip(both, weightings, strict=True):
        alone = (f(x, y, weights_x=mass, rng=5) for f in (estimated_energy_distance, estimated_mmd))
        assert energy == pytest.approx(next(alone), rel=1e-10)  # the order of a sum
        assert squared == pytest.approx(next(alone), rel=1e-10)
    alone = estimated_energy_distance(x, y, weights_x=weightings[0], rng=5, about_mean=True)
    assert shape == pytest.approx(alone, rel=1e-10)
    assert within(y, bandwidth=1.0, weights=None) is None  # whose pairs are never all met


@pytest.mark.parametrize("law", ["near", "far", "weighted"])
@pytest.mark.usefixtures("small_blocks")
def test_estimates_about_the_mean_are_unbiased_and_say_their_error(law):
    x, y, weights = large_clouds(law, 0)
    truth = energy_distance(x, y, about_mean=True, **weights)
    found = [estimated_energy_distance(x + 3, y - 2, rng=seed, about_mean=True, **weights) for seed in range(30)]
    values, errors = np.array([e.value for e in found]), np.array([e.error for e in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(30)  # three standard errors
    assert 0.5 < np.mean(errors**2) / values.var() < 2  # as above


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("estimated", [estimated_energy_distance, estimated_mmd])
def test_estimates_far_from_the_origin_are_those_about_it(estimated):
    x, y, _ = large_clouds("far", 0)
    near, far = estimated(x, y, rng=0), estimated(x + 1e5, y + 1e5, rng=0)
    assert far == pytest.approx(near, rel=1e-6)  # the coordinates lose 17 bits of 53


@pytest.mark.parametrize("estimated", [estimated_energy_distance, estimated_mmd])
@pytest.mark.parametrize("few", [2, 9])
@pytest.mark.usefixtures("small_blocks")
def test_a_few_points_beside_many_are_met_whole(estimated, few):
    """The pairs of the many are met in blocks none the less: of 4,000 there are as many as of any two clouds."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4000, 2)), rng.normal(size=(few, 2)) + 1
    met, means = [], pairwise_estimates.mean_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pairwise_estimates,
            "mean_kernels",
            lambda us, vs, *rest: (met.append(len(us[0].points) * len(vs[0].points)), means(us, vs, *rest))[1],
        )
        found = estimated(x, y, bandwidth=1.0) if estimated is estimated_mmd else estimated(x, y)
    assert max(met) < 4000**2 / 10
    exact = mmd(x, y, bandwidth=1.0) if estimated is estimated_mmd else energy_distance(x, y)
    assert found.value == pytest.approx(exact, abs=5 * found.error)
    assert 0 < found.error < 0.02
