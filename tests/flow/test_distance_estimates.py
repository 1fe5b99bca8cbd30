"""Estimates of Wasserstein distances of large clouds, on clouds for which the exact ones can still be found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sctraj.flow import distance_estimates
from sctraj.flow.clouds import as_cloud
from sctraj.flow.distance import wasserstein
from sctraj.flow.distance_estimates import estimated_wasserstein, restoration_plan

SHIFT = np.array([3.0, -4.0, 0.0])  # of length 5


def clouds(n=40, m=30, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 1.5 * rng.normal(size=(m, d)) + 1


@pytest.mark.parametrize("weighted", [False, True])
def test_shares_average_to_w1_and_barycentres_to_the_restored_mean(weighted):
    x, y = (torch.tensor(v) for v in clouds())
    a, b = (torch.tensor(np.random.default_rng(s).exponential(size=n)) for s, n in ((1, 40), (2, 30)))
    if not weighted:
        a, b = torch.ones(40), torch.ones(30)
    plan = restoration_plan(x, y, weights_x=a if weighted else None, weights_y=b if weighted else None)
    truth = wasserstein(x, y, weights_x=a, weights_y=b)
    assert plan.distance == pytest.approx(truth, rel=1e-7)  # rounding of single-precision uniform weights
    assert np.average(plan.share, weights=b) == pytest.approx(plan.distance, rel=1e-12)  # rounding
    mean = np.average(plan.barycentre, weights=b, axis=0)
    np.testing.assert_allclose(mean, np.average(x, weights=a, axis=0), rtol=1e-10, atol=1e-12)  # rounding


def test_a_shift_is_shared_evenly_and_undone_by_the_barycentre():
    x = torch.tensor(clouds()[0])
    plan = restoration_plan(x + torch.tensor(SHIFT), x, weights_x=None, weights_y=None)
    assert plan.distance == pytest.approx(5, rel=1e-12)
    # W1 has many plans for a shift; all agree on the cost, not on the pairs, so only the mean is bound
    assert float(plan.share.mean()) == pytest.approx(5, rel=1e-12)
    same = restoration_plan(x.flip(0), x, weights_x=None, weights_y=None)
    torch.testing.assert_close(same.barycentre, x, rtol=0, atol=1e-15)  # each cell meets itself
    assert float(same.share.max()) == 0.0


@pytest.fixture
def small_blocks(monkeypatch):
    """The estimators at an eighth of their size."""
    for name, value in (("LARGEST_EXACT", 300), ("SIZES", (16, 32, 64, 128)), ("PLAN_BLOCK", 64)):
        monkeypatch.setattr(distance_estimates, name, value)


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


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("law", ["near", "far", "weighted"])
@pytest.mark.usefixtures("small_blocks")
def test_the_estimate_is_as_near_to_the_exact_distance_as_it_says(law, p):
    misses, said, blocks_miss = [], [], []
    for seed in range(4):
        x, y, weights = large_clouds(law, seed)
        truth = wasserstein(x, y, p=p, **weights)
        found = estimated_wasserstein(x, y, p=p, rng=seed, **weights)
        a, b = (as_cloud(v, w) for v, w in ((x, weights.get("weights_x")), (y, weights.get("weights_y"))))
        blocks = distance_estimates._some_blocks(a, b, 128, 99, np.random.default_rng(0))
        largest = [distance_estimates._cost(*pair, p) for pair in blocks]
        misses.append(found.value - truth)
        said.append(found.error)
        blocks_miss.append(np.mean(largest) ** (1 / p) - truth)
    # of four misses in units of the error each came with, the rms; at most twice one says too little, but seldom
    assert np.sqrt(np.mean(np.square(misses) / np.square(said))) < 2
    # far nearer than the blocks' own distance, which is too large by what a sample of 128 is worth
    assert np.mean(blocks_miss) > 0
    assert np.sqrt(np.mean(np.square(misses))) < 0.7 * np.mean(blocks_miss)
    assert max(said) < 0.2 * truth


@pytest.mark.usefixtures("small_blocks")
def test_estimates_are_exact_where_they_can_be_and_repeat():
    estimated, exact = estimated_wasserstein, wasserstein
    x, y, _ = large_clouds("far", 0, n=290)
    assert estimated(x, y, rng=0) == (pytest.approx(exact(x, y), rel=1e-12), 0.0, 290)  # rounding
    x, y, _ = large_clouds("far", 0)
    assert estimated(x, y, rng=3) == estimated(x, y, rng=np.random.default_rng(3))
    assert estimated(x, y, rng=3).value != estimated(x, y, rng=4).value
    assert estimated(x, y, rng=3).error > 0


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.usefixtures("small_blocks")
def test_no_estimate_is_below_the_distance_of_the_means(p):
    x, _, _ = large_clouds("near", 0)
    shift = np.full(5, 100.0)
    found = estimated_wasserstein(x, x + shift, p=p, rng=0)
    assert found.value == pytest.approx(100 * math.sqrt(5), abs=max(4 * found.error, 1e-9))
    assert found.value >= 100 * math.sqrt(5) * (1 - 1e-12)  # rounding


def carried_on(found):
    """What the estimator makes of costs that were found in blocks of 16 points of two clouds far from each other."""
    x, y, _ = large_clouds("near", 0)
    clouds = as_cloud(x, None), as_cloud(y + 40, None)
    return distance_estimates._extrapolated(*clouds, 16, found, 1, np.random.default_rng(0))


@pytest.mark.usefixtures("small_blocks")
def test_what_blocks_differ_by_is_part_of_the_error():
    same, apart = (carried_on(costs * 2) for costs in ([100.0, 100.0], [99.0, 101.0]))
    assert apart.error**2 - same.error**2 == pytest.approx(1 / 4)  # of the mean of four, of variance 1


@pytest.mark.usefixtures("small_blocks")
def test_what_the_law_of_sizes_misses_is_part_of_the_error(monkeypatch):
    costs = {16: 201.0, 32: 200.6, 64: 200.4, 128: 200.0}  # .4, .2 and so .1 at last: it takes off four times as much
    monkeypatch.setattr(
        distance_estimates, "_cost", lambda a, b, p: costs[min(costs, key=lambda size: abs(size - len(a.points)))]
    )
    assert carried_on([201.0] * 4).error > 0.05  # nothing else differs


@pytest.mark.parametrize("n_blocks", [1, 2, 7, 30])
@pytest.mark.parametrize("weights", ["equal", "exponential", "one heavy", "many zero"])
def test_blocks_together_are_the_clouds(n_blocks, weights):
    rng = np.random.default_rng(0)
    mass = {
        "equal": np.ones(45), "exponential": rng.exponential(size=45), "one heavy": np.r_[50.0, np.ones(44)],
        "many zero": np.r_[np.ones(9), np.zeros(36)],
    }[weights]  # fmt: skip
    a, b = as_cloud(rng.normal(size=(45, 2)), mass), as_cloud(rng.normal(size=(100, 2)), None)
    for cloud, side in ((a, 0), (b, 1)):
        together = torch.zeros(len(cloud.mass), dtype=torch.float64)
        for block in (pair[side] for pair in distance_estimates._blocks(a, b, n_blocks, np.random.default_rng(1))):
            assert float(block.mass.sum()) == pytest.approx(1, rel=1e-12)  # rounding
            assert bool((block.mass > 0).all()) or n_blocks == 1
            assert torch.equal(block.points, cloud.points[block.rows])
            together.index_add_(0, block.rows, block.whole * block.mass)
        torch.testing.assert_close(together, cloud.mass, rtol=0, atol=1e-9)  # slivers at the cuts


@pytest.mark.parametrize("law", ["far", "weighted"])
@pytest.mark.usefixtures("small_blocks")
def test_shares_of_a_large_restoration_average_to_the_estimate(law):
    x, y, weights = large_clouds(law, 0)
    a, b = weights.get("weights_x"), weights.get("weights_y")
    plan = restoration_plan(torch.tensor(x), torch.tensor(y), rng=0,
                            weights_x=None if a is None else torch.tensor(a),
                            weights_y=None if b is None else torch.tensor(b))  # fmt: skip
    truth = wasserstein(x, y, **weights)
    assert 0 < plan.error < 0.1 * truth
    assert abs(plan.distance - truth) < 3 * plan.error
    assert np.average(plan.share, weights=b) == pytest.approx(plan.distance, rel=1e-9)  # rounding
    mean = np.average(plan.barycentre, weights=b, axis=0)
    np.testing.assert_allclose(mean, np.average(x, weights=a, axis=0), atol=1e-7)  # slivers at the cuts
    assert bool((plan.share >= 0).all())


@pytest.mark.parametrize("p", [1, 2])
def test_clouds_at_one_place_and_clouds_that_are_all_but_the_same_have_finite_errors(monkeypatch, p):
    monkeypatch.setattr(distance_estimates, "LARGEST_EXACT", 500)
    z = np.random.default_rng(0).normal(size=(2000, 1))
    assert estimated_wasserstein(np.zeros((2000, 1)), np.zeros((2000, 1)), p=p)[:2] == (0.0, 0.0)
    for y in (z, z + 1e-9):
        value, error, _ = estimated_wasserstein(z, y, p=p)
        assert 0 <= value < 0.2
        assert error < 0.2


def test_an_observed_cell_without_weight_has_no_share_and_stays():
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=(30, 2)), rng.normal(size=(20, 2)), np.r_[np.ones(15), np.zeros(5)]
    plan = restoration_plan(x, y, weights_x=None, weights_y=weights)
    np.testing.assert_array_equal(plan.share[15:], 0)
    np.testing.assert_array_equal(plan.barycentre[15:], y[15:])
    assert float(plan.share @ torch.from_numpy(weights / weights.sum())) == pytest.approx(plan.distance, rel=1e-9)
