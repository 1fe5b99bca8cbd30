"""Laws of the unbalanced plan: its optimum, its limits, and how much of each cell takes part."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist

from sctraj.flow.coupling import blocked, entropic, exact, kernel, sinkhorn, unbalanced
from sctraj.flow.snapshots import Interval


def make_interval(n0=30, n1=41, *, d=2, seed=0) -> Interval:
    rng = np.random.default_rng(seed)
    x0, x1 = rng.normal(size=(n0, d)), 0.7 * rng.normal(size=(n1, d)) + 1
    mass0, mass1 = (torch.tensor(m / m.sum()) for m in (rng.exponential(size=n) for n in (n0, n1)))
    return Interval(1.3, 4.1, torch.tensor(x0), torch.tensor(x1), mass0, mass1)


def with_empty_cells(interval: Interval) -> Interval:
    interval.mass0[2] = interval.mass1[0] = interval.mass1[5] = 0.0  # in the middle and at both ends
    for mass in (interval.mass0, interval.mass1):
        mass /= mass.sum()
    return interval


def clusters(weights0, weights1, gap, n=60) -> Interval:
    """Two groups of cells, each N(0, 1), ``gap`` apart; their weights at the two ends."""
    rng = np.random.default_rng(1)
    x0, x1 = (rng.normal(size=(2 * n, 2)) + np.repeat([[0.0, 0.0], [gap, 0.0]], n, 0) for _ in range(2))
    mass0, mass1 = (torch.tensor(np.repeat(weights, n) / n) for weights in (weights0, weights1))
    return Interval(0.0, 1.0, torch.tensor(x0), torch.tensor(x1), mass0, mass1)


def squared(interval: Interval) -> np.ndarray:
    return cdist(interval.x0.numpy(), interval.x1.numpy(), "sqeuclidean")


def dense(i, j, mass, shape) -> np.ndarray:
    matrix = np.zeros(shape)
    np.add.at(matrix, (i.numpy(), j.numpy()), mass.numpy())
    return matrix


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q) - p + q).sum())


@pytest.mark.parametrize("penalty", [0.05, 1.0, 40.0])
def test_the_plan_is_worth_what_its_potentials_prove(penalty):
    interval, epsilon = make_interval(), 0.1
    plan = unbalanced(interval, epsilon=epsilon, penalty=penalty, tolerance=1e-8)
    q, a, b, f, g = (x.numpy() for x in (plan.matrix(), interval.mass0, interval.mass1, plan.f, plan.g))
    primal = (q * squared(interval)).sum() + epsilon * divergence(q, np.outer(a, b))
    primal += penalty * (divergence(q.sum(1), a) + divergence(q.sum(0), b))
    # Fenchel-Rockafellar: no plan costs less than any potentials' value
    dual = -penalty * (a @ np.expm1(-f / penalty) + b @ np.expm1(-g / penalty)) - epsilon * (q.sum() - 1)
    assert primal == pytest.approx(dual, rel=1e-9)  # the gap is of second order in the residual, times penalty


@pytest.mark.parametrize(("epsilon", "penalty"), [(0.1, 1.0), (0.5, 0.2), (2.0, 10.0)])
def test_it_is_the_plan_of_an_independent_solver(epsilon, penalty):
    interval = make_interval()
    plan = unbalanced(interval, epsilon=epsilon, penalty=penalty, tolerance=1e-10)
    a, b = interval.mass0.numpy(), interval.mass1.numpy()
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        a, b, squared(interval), epsilon, penalty, stopThr=1e-12, numItermax=50_000
    )
    np.testing.assert_allclose(plan.matrix().numpy(), theirs, rtol=1e-7, atol=1e-12)  # penalty/epsilon x tolerances


def test_the_stated_residual_is_the_marginals_distance_from_optimal():
    interval = make_interval()
    plan = unbalanced(interval, epsilon=0.1, penalty=2.0, tolerance=1e-2)
    q, a, b, f, g = (x.numpy() for x in (plan.matrix(), interval.mass0, interval.mass1, plan.f, plan.g))
    np.testing.assert_allclose(q.sum(1), a * np.exp(-f / 2), rtol=1e-10)  # exact by construction: rounding
    best = b * np.exp(-g / 2)
    assert plan.residual == pytest.approx(np.abs(q.sum(0) - best).sum() / best.sum(), rel=1e-8)
    assert 1e-8 < plan.residual < 1e-2  # there is something to measure
    np.testing.assert_allclose(plan.log_ratio0, np.log(q.sum(1) / a), atol=1e-10)
    np.testing.assert_allclose(plan.log_ratio1, np.log(q.sum(0) / b), atol=1e-10)


@pytest.mark.parametrize(("epsilon", "penalty"), [(0.3, 2.0), (5.0, 0.1), (0.01, 0.004)])
def test_between_two_cells_the_mass_that_moves_is_known(epsilon, penalty):
    one = torch.ones(1, dtype=torch.float64)
    x0, x1 = (torch.tensor([x], dtype=torch.float64) for x in ([0.3, 1.0], [1.5, -0.6]))
    plan = unbalanced(Interval(0.0, 1.0, x0, x1, one, one), epsilon=epsilon, penalty=penalty, tolerance=1e-12)
    # p C + (epsilon + 2 penalty) (p log p - p + 1) is least at log p = -C / (epsilon + 2 penalty); C = 4
    assert float(plan.matrix().log()) == pytest.approx(-4 / (epsilon + 2 * penalty), rel=1e-9)


def test_a_large_penalty_gives_the_entropic_plan_at_first_order():
    interval = make_interval()
    balanced = entropic(interval, epsilon=0.1, tolerance=1e-10).matrix().numpy()
    far = []
    for penalty in (1e2, 1e3, 1e4):
        plan = unbalanced(interval, epsilon=0.1, penalty=penalty, tolerance=1e-10)
        far.append(np.abs(plan.matrix().numpy() - balanced).sum())
    np.testing.assert_allclose(far[:-1] / np.array(far[1:]), 10, rtol=0.05)  # next order: cost / penalty, 1 in 100


@pytest.mark.parametrize("make", [lambda: make_interval(80, 70), lambda: clusters((0.3, 0.7), (0.6, 0.4), 12.0)])
def test_a_penalty_of_200_epsilon_takes_no_more_iterations_than_a_small_one(make):
    interval = make()
    epsilon = 0.02 * exact(interval).cost
    iterations = [unbalanced(interval, epsilon=epsilon, penalty=k * epsilon).n_iterations for k in (5, 200, 1e6)]
    # plain Sinkhorn contracts by (1 + epsilon / penalty)^-2: log(1e6) / (2 log(1.005)) = 1385 iterations
    assert max(iterations) <= 50


def test_of_far_groups_the_geometric_mean_of_their_weights_takes_part():
    weights0, weights1, penalty, n = (0.3, 0.7), (0.6, 0.4), 3000.0, 60
    interval = clusters(weights0, weights1, 300.0)
    plan = unbalanced(interval, epsilon=0.5, penalty=penalty)
    q = plan.matrix().numpy()
    assert q[:n, n:].sum() + q[n:, :n].sum() < 1e-12  # moving between them costs 9e4, making and destroying 6e3
    # within a group f and g vary by at most the largest difference of costs, and the ratios by that over the penalty
    cost = squared(interval)
    bound = 2 * max(cost[:n, :n].max(), cost[n:, n:].max()) / penalty
    assert bound < 0.05
    growth = np.repeat(np.log(np.array(weights1) / weights0), n)
    np.testing.assert_allclose(plan.log_ratio0, growth / 2, rtol=0, atol=bound)
    np.testing.assert_allclose(plan.log_ratio1, -growth / 2, rtol=0, atol=bound)


def test_backwards_in_time_the_plan_is_transposed():
    interval = make_interval()
    mirrored = Interval(-4.1, -1.3, interval.x1, interval.x0, interval.mass1, interval.mass0)
    there, back = (unbalanced(x, epsilon=0.1, penalty=2.0, tolerance=1e-10) for x in (interval, mirrored))
    np.testing.assert_allclose(back.matrix().T, there.matrix(), rtol=1e-6)  # penalty/epsilon x tolerance x cells
    np.testing.assert_allclose(back.log_ratio0, there.log_ratio1, atol=1e-6)
    np.testing.assert_allclose(back.log_ratio1, there.log_ratio0, atol=1e-6)
    np.testing.assert_allclose(back.descendants(interval.x0), there.ancestors(interval.x0), atol=1e-6)


def test_units_of_length_do_not_matter():
    interval, c = make_interval(), 37.0
    scaled = dataclasses.replace(interval, x0=c * interval.x0, x1=c * interval.x1)
    plan = unbalanced(interval, epsilon=0.1, penalty=2.0, tolerance=1e-9)
    other = unbalanced(scaled, epsilon=0.1 * c**2, penalty=2.0 * c**2, tolerance=1e-9)
    np.testing.assert_allclose(other.matrix(), plan.matrix(), rtol=1e-6)  # penalty/epsilon x tolerance x cells
    np.testing.assert_allclose(other.log_ratio0, plan.log_ratio0, atol=1e-6)


def test_where_nearly_all_mass_is_destroyed_its_shares_and_kin_are_still_known():
    interval = clusters((0.5, 0.5), (0.5, 0.5), 5.0)
    interval.x1[:] += 40.0  # every cost is at least 1600: the plan's mass is below e^-1600, no float64
    plan = unbalanced(interval, epsilon=0.02, penalty=0.5)
    assert float(plan.matrix().sum()) == 0.0
    assert plan.n_iterations <= 20  # by the best shift; without it 61
    assert plan.log_ratio0.max() < -1000
    plane = torch.ones(120, 1, dtype=torch.float64)
    for kin in (plan.descendants(plane), plan.ancestors(plane)):
        torch.testing.assert_close(kin, plane, rtol=1e-12, atol=0)  # rounding


# tiles in float64 alone go the same way; with those in float32 they come to the same end
@pytest.mark.parametrize(("rounding", "tolerance"), [(0.0, 1e-6), (sinkhorn.ROUNDING, 1e-11)])
@pytest.mark.parametrize("whole", [100, 700])
def test_tiles_give_the_whole(monkeypatch, whole, rounding, tolerance):
    interval = with_empty_cells(make_interval(60, 45))
    monkeypatch.setattr(sinkhorn, "ROUNDING", rounding)
    kept = unbalanced(interval, epsilon=0.2, penalty=4.0, tolerance=tolerance)
    monkeypatch.setattr(kernel, "MOST_KEPT", whole)
    tiled = unbalanced(interval, epsilon=0.2, penalty=4.0, tolerance=tolerance)
    assert not kernel.fits(tiled.x0, tiled.x1)
    assert rounding or tiled.n_iterations == kept.n_iterations
    np.testing.assert_allclose(tiled.matrix(), kept.matrix(), rtol=1e-8, atol=1e-16)  # rounding of exponents
    for name in ("log_ratio0", "log_ratio1"):
        np.testing.assert_allclose(getattr(tiled, name), getattr(kept, name), atol=1e-8)
    np.testing.assert_allclose(tiled.descendants(interval.x1), kept.descendants(interval.x1), rtol=1e-8)
    np.testing.assert_allclose(tiled.ancestors(interval.x0), kept.ancestors(interval.x0), rtol=1e-8)


def test_cells_without_mass_have_a_ratio_and_change_nothing():
    interval = with_empty_cells(make_interval())
    some0, some1 = interval.mass0 > 0, interval.mass1 > 0
    fewer = Interval(1.3, 4.1, interval.x0[some0], interval.x1[some1], interval.mass0[some0], interval.mass1[some1])
    plan, without = (unbalanced(x, epsilon=0.2, penalty=1.0, tolerance=1e-9) for x in (interval, fewer))
    np.testing.assert_allclose(plan.matrix()[some0][:, some1], without.matrix(), rtol=1e-6)  # both within tolerance
    np.testing.assert_allclose(plan.log_ratio0[some0], without.log_ratio0, atol=1e-7)
    assert torch.isfinite(plan.log_ratio0).all()
    assert torch.isfinite(plan.log_ratio1).all()
    # a cell's ratio is a function of where it is: the same as that of a cell with mass in its place
    moved = dataclasses.replace(interval, x0=interval.x0.clone())
    moved.x0[2] = moved.x0[7]
    ratio = unbalanced(moved, epsilon=0.2, penalty=1.0, tolerance=1e-9).log_ratio0
    assert float(ratio[2]) == pytest.approx(float(ratio[7]), abs=1e-10)


def test_far_from_the_origin_and_in_float32_the_plan_is_the_same():
    near = make_interval(20, 15)
    x0, x1 = ((x * 256).round() / 256 for x in (near.x0, near.x1))  # so that adding 1e4 is exact, in float32 too
    plans = [
        unbalanced(dataclasses.replace(near, x0=(x0 + s).float(), x1=(x1 + s).float()), epsilon=0.1, penalty=1.0)
        for s in (0, 10_000)
    ]
    assert plans[0].f.dtype == torch.float64
    np.testing.assert_allclose(plans[1].matrix(), plans[0].matrix(), rtol=0, atol=1e-10)  # rounding in float64


@pytest.mark.parametrize("couple", [exact, lambda interval: blocked(interval, torch.Generator(), block=10)])
def test_pairs_of_balanced_plans_do_not_grow_and_have_both_marginals(couple):
    interval = with_empty_cells(make_interval())
    pairs = couple(interval).pairs
    assert torch.equal(pairs.mass0, pairs.mass1)
    matrix = dense(pairs.i, pairs.j, pairs.mass0, (30, 41))
    np.testing.assert_allclose(matrix.sum(1), interval.mass0, rtol=0, atol=1e-13)  # rounding
    np.testing.assert_allclose(matrix.sum(0), interval.mass1, rtol=0, atol=1e-13)


def test_bad_arguments_are_refused_by_name():
    interval = make_interval(8, 6)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite epsilon"):
            unbalanced(interval, epsilon=bad, penalty=1.0)
        with pytest.raises(ValueError, match="finite penalty"):
            unbalanced(interval, epsilon=0.1, penalty=bad)
    with pytest.raises(ValueError, match="larger epsilon"):
        unbalanced(interval, epsilon=1e-8, penalty=1.0)


def test_no_convergence_is_an_error_not_a_plan():
    with pytest.raises(RuntimeError, match="expected marginals optimal to within 1e-14, found"):
        unbalanced(make_interval(), epsilon=0.05, penalty=5.0, max_iterations=1, tolerance=1e-14)
