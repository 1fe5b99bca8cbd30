"""Laws of the couplings: the right plan, the right marginals, and draws that follow the plan."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import chisquare

from sctraj.flow.coupling import blocked, entropic, exact, independent, kernel, optimal_plan, sinkhorn, unbalanced
from sctraj.flow.coupling.blocked import blocks
from sctraj.flow.coupling.independent import draw_each
from sctraj.flow.snapshots import Interval


def make_interval(n0, n1, *, d=2, weighted=False, seed=0, t0=1.3, t1=4.1) -> Interval:
    rng = np.random.default_rng(seed)
    masses = [rng.exponential(size=n) if weighted else np.ones(n) for n in (n0, n1)]
    x0, x1 = rng.normal(size=(n0, d)), 0.7 * rng.normal(size=(n1, d)) + 1
    mass0, mass1 = (torch.tensor(m / m.sum()) for m in masses)
    return Interval(t0, t1, torch.tensor(x0), torch.tensor(x1), mass0, mass1)


def squared(interval: Interval) -> np.ndarray:
    return cdist(interval.x0.numpy(), interval.x1.numpy(), "sqeuclidean")


def dense(plan, interval: Interval) -> np.ndarray:
    matrix = np.zeros((len(interval.x0), len(interval.x1)))
    np.add.at(matrix, (plan.i.numpy(), plan.j.numpy()), plan.mass.numpy())
    return matrix


def assert_marginals(matrix: np.ndarray, interval: Interval, atol: float) -> None:
    np.testing.assert_allclose(matrix.sum(1), interval.mass0.numpy(), rtol=0, atol=atol)
    np.testing.assert_allclose(matrix.sum(0), interval.mass1.numpy(), rtol=0, atol=atol)


def test_exact_is_the_linear_assignment_of_equal_snapshots():
    interval = make_interval(60, 60)
    plan = exact(interval)
    rows, columns = linear_sum_assignment(squared(interval))
    order = plan.i.argsort()
    assert (plan.i[order].numpy() == rows).all()
    assert (plan.j[order].numpy() == columns).all()
    assert plan.cost == pytest.approx(squared(interval)[rows, columns].mean(), rel=1e-12)  # rounding


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_of_unequal_snapshots_has_the_optimal_cost_and_both_marginals(weighted):
    interval = make_interval(40, 55, weighted=weighted)
    plan = exact(interval)
    best = ot.emd2(interval.mass0.numpy(), interval.mass1.numpy(), squared(interval))
    assert plan.cost == pytest.approx(best, rel=1e-12)  # the same linear programme: rounding
    matrix = dense(plan, interval)
    assert_marginals(matrix, interval, atol=1e-14)  # rounding of masses of the order of 1/50
    assert (matrix * squared(interval)).sum() == pytest.approx(plan.cost, rel=1e-12)
    assert len(plan.i) <= 40 + 55 - 1  # a vertex of the transport polytope


def test_blocked_keeps_both_marginals_whatever_the_weights():
    interval = make_interval(90, 67, weighted=True)
    interval.mass0[3] = 0.0
    interval.mass0[:] /= interval.mass0.sum()
    plan = blocked(interval, torch.Generator().manual_seed(1), block=20)
    assert_marginals(dense(plan, interval), interval, atol=1e-12)  # cells cut at block borders add up to rounding
    assert not (plan.i == 3).any()


def test_blocked_costs_between_exact_and_independent():
    interval = make_interval(200, 150, weighted=True)
    plan = blocked(interval, torch.Generator().manual_seed(1), block=40)
    product = interval.mass0.numpy() @ squared(interval) @ interval.mass1.numpy()
    assert exact(interval).cost < plan.cost < product
    assert (dense(plan, interval) * squared(interval)).sum() == pytest.approx(plan.cost, rel=1e-10)  # rounding


def test_larger_blocks_come_closer_to_the_exact_cost():
    interval = make_interval(240, 240)
    costs = [
        np.mean([blocked(interval, torch.Generator().manual_seed(seed), block=block).cost for seed in range(5)])
        for block in (10, 30, 121)
    ]
    assert costs[0] > costs[1] > costs[2] > exact(interval).cost


def test_small_snapshots_get_the_exact_plan_from_blocked():
    interval = make_interval(30, 41, weighted=True)
    plan, whole = blocked(interval, torch.Generator(), block=41), exact(interval)
    assert torch.equal(plan.i, whole.i)
    assert torch.equal(plan.j, whole.j)
    assert torch.equal(plan.mass, whole.mass)


def test_blocks_are_drawn_of_large_snapshots_alone_and_said(caplog):
    interval = make_interval(50, 40)
    with caplog.at_level(logging.INFO, logger="sctraj"):
        assert len(blocked(interval, torch.Generator(), block=50).i.unique()) == 50
        assert not caplog.text  # a snapshot met whole is nothing to tell
        assert len(blocked(interval, torch.Generator(), block=20).i.unique()) == 50
    assert "50 and 40 cells in 3 blocks" in caplog.text


def test_cells_without_mass_make_no_blocks(caplog):
    interval = make_interval(50, 40, weighted=True)
    interval.mass0[::2] = interval.mass1[::2] = 0.0
    with caplog.at_level(logging.INFO, logger="sctraj"):
        assert len(blocked(interval, torch.Generator(), block=25).i.unique()) == 25
    assert not caplog.text


def test_few_cells_beside_many_are_met_whole_or_by_some_in_every_block(caplog):
    with caplog.at_level(logging.INFO, logger="sctraj"):
        blocked(make_interval(9, 100), torch.Generator(), block=30)  # as many pairs as of 30 a side
        assert not caplog.text
        parts = list(blocks(make_interval(30, 3000), torch.Generator(), block=101))  # of 300 a side
    assert [len(part.x0) >= 10 and len(part.x1) >= 1000 for _, _, part, _ in parts] == [True] * 3


def test_the_number_of_threads_changes_no_bit(threads_of_torch):
    interval = make_interval(300, 260, weighted=True)
    rngs = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, three = (threads_of_torch(n, lambda rng=rng: blocked(interval, rng, block=40)) for n, rng in zip((1, 3), rngs))
    for name in ("i", "j", "mass"):
        assert torch.equal(getattr(one, name), getattr(three, name))


def with_far_cells(interval: Interval) -> Interval:
    interval.x0[:2] *= 300.0
    interval.x1[4] *= -300.0
    interval.mass0[3] = interval.mass1[0] = 0.0
    for mass in (interval.mass0, interval.mass1):
        mass /= mass.sum()
    return interval


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("rows", [True, False])
def test_soft_minima_are_those_of_the_log_domain_wherever_the_potentials_are(rows, size):
    interval, epsilon = with_far_cells(make_interval(40, 30, weighted=True)), 0.05
    log_a, log_b = interval.mass0.log(), interval.mass1.log()
    found = kernel.Kernel(interval.x0, interval.x1, log_a, log_b)
    rng = torch.Generator().manual_seed(0)
    start = torch.zeros(30, dtype=torch.float64)
    f = found.soft_minimum(start, epsilon, rows=True)
    found.soft_minimum(f, epsilon, rows=False)
    near = found.absorbed[1 if rows else 0]
    there = near + size * epsilon * torch.randn(len(near), generator=rng, dtype=torch.float64)  # in epsilons
    cost = torch.cdist(interval.x0, interval.x1, compute_mode="donot_use_mm_for_euclid_dist").square()
    cost, log_mass = (cost, log_b) if rows else (cost.T, log_a)
    expected = -epsilon * torch.logsumexp(log_mass + (there - cost) / epsilon, 1)
    for _ in range(2):  # from far the first absorbs the potentials, with which the second is near
        torch.testing.assert_close(found.soft_minimum(there, epsilon, rows=rows), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(
        found.soft_minimum(there, 3 * epsilon, rows=rows),
        -3 * epsilon * torch.logsumexp(log_mass + (there - cost) / (3 * epsilon), 1),
        rtol=1e-12,
        atol=1e-9,
    )


def test_what_the_kept_kernel_lost_to_underflow_comes_back_with_its_potential():
    x0, x1 = (torch.tensor(x, dtype=torch.float64) for x in ([[0.0]], [[0.0], [math.sqrt(760.0)]]))
    half = torch.tensor([0.5, 0.5]).double().log()
    found = kernel.Kernel(x0, x1, torch.zeros(1).double(), half)
    found.soft_minimum(torch.zeros(2).double(), 1.0, rows=True)  # e^-760 is no float64
    there = torch.tensor([-200.0, 700.0]).double()  # and e^(700 - 760) is more than e^-200
    assert float(found.soft_minimum(there, 1.0, rows=True)) == pytest.approx(60 + math.log(2), rel=1e-12)


@pytest.mark.parametrize("softness", [1.0, 0.9])
@pytest.mark.parametrize(("rounding", "dtype"), [(0.0, torch.float64), (1e-2, torch.float32)])
def test_one_pass_over_the_tiles_gives_the_soft_minima_of_both_sides(monkeypatch, rounding, dtype, softness):
    interval, epsilon = make_interval(40, 30, weighted=True), 0.5
    interval.x0[:2] *= 30.0  # far from all, but not too far for float32
    interval.x1[4] *= -30.0
    interval.mass1[[0, 7]] = 0.0
    log_a, log_b = interval.mass0.log(), (interval.mass1 / interval.mass1.sum()).log()
    monkeypatch.setattr(kernel, "MOST_KEPT", 100)
    tiled = kernel.Kernel(interval.x0, interval.x1, log_a, log_b)
    tiled.rounding = rounding
    made = []
    room = kernel.Room.__call__
    monkeypatch.setattr(kernel.Room, "__call__", lambda self, m, n: made.append(room(self, m, n)) or made[-1])
    g = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f, best = tiled.soft_minima(g, epsilon, softness)
    tiles = [part for part in made if part.shape[1] == 30]
    assert {part.dtype for part in tiles} == {dtype}
    assert sum(len(part) for part in tiles) == 40  # each entry once
    cost = torch.cdist(interval.x0, interval.x1, compute_mode="donot_use_mm_for_euclid_dist").square()
    f_true = -softness * epsilon * torch.logsumexp(log_b + (g - cost) / epsilon, 1)
    best_true = -epsilon * torch.logsumexp(log_a + (f_true - cost.T) / epsilon, 1)
    error = 1e-12 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    scale = float(cost.max())
    torch.testing.assert_close(f, f_true, rtol=0, atol=error * scale)
    torch.testing.assert_close(best, best_true, rtol=0, atol=error * scale)
    assert float(cost.max()) <= tiled.largest_cost


def test_float32_is_taken_only_where_its_rounding_may_pass():
    interval = make_interval(20, 20)
    found = kernel.Kernel(interval.x0, interval.x1, *(m.log() for m in (interval.mass0, interval.mass1)), keep=False)
    assert found._dtype(1.0) == torch.float64
    found.rounding = 1e-4
    assert found._dtype(1.0) == torch.float32
    assert found._dtype(1e-4) == torch.float64
    interval.x0[0] = 1e4
    far = kernel.Kernel(interval.x0, interval.x1, *found.log_mass, keep=False)
    far.rounding = 1e-4
    assert far._dtype(1.0) == torch.float64


@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_a_plan_in_tiles_keeps_the_marginals_that_it_says(monkeypatch, caplog, tolerance):
    interval = make_interval(200, 150, weighted=True)
    caplog.set_level("INFO", logger="sctraj")
    entropic(interval, epsilon=0.2, tolerance=tolerance)
    assert not caplog.text  # kept whole
    monkeypatch.setattr(kernel, "MOST_KEPT", 1000)
    plan = entropic(interval, epsilon=0.2, tolerance=tolerance)
    assert "of the plan's 200 x 150 pairs only dual potentials are kept" in caplog.text
    matrix = plan.matrix()
    rounding = sinkhorn.ROUNDING * tolerance  # what float32 may add
    assert float((matrix.sum(1) - interval.mass0).abs().sum()) < rounding
    error = float((matrix.sum(0) - interval.mass1).abs().sum())
    assert error < tolerance + rounding
    assert plan.marginal_error == pytest.approx(error, abs=rounding)


def test_mixing_ends_a_linear_iteration_in_as_many_steps_as_it_has_rates():
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 50, generator=rng, dtype=torch.float64)).Q
    rates = torch.tensor([0.99, 0.9, 0.5]).double().repeat(17)[:50]
    matrix, goal = basis @ torch.diag(rates) @ basis.T, torch.randn(50, generator=rng, dtype=torch.float64)
    mix, at = sinkhorn.Mixing(torch.ones(50).double() / 50, math.inf), torch.zeros(50).double()
    errors = []
    for _ in range(6):
        at = mix(at, goal + matrix @ (at - goal))
        errors.append(float((at - goal).norm()))
    assert errors[0] > 0.5 * float(goal.norm())
    assert errors[4] < 1e-6 * errors[0]
    short = sinkhorn.Mixing(torch.ones(50).double() / 50, 1e-3)
    at = torch.zeros(50).double()
    for _ in range(3):
        there = goal + matrix @ (at - goal)
        at = short(at, there)
        assert torch.equal(at, there)  # farther than it may


def test_extrapolation_spares_most_iterations(monkeypatch):
    interval = make_interval(80, 70, weighted=True)

    def n_iterations() -> int:
        ends = sinkhorn.prepare(interval, None)
        return sinkhorn.sinkhorn(
            ends, epsilon=0.02, penalty=math.inf, tolerance=1e-6, max_iterations=20_000, newton_every=10**9
        ).n_iterations

    with_it = n_iterations()
    monkeypatch.setattr(sinkhorn.Mixing, "__call__", lambda self, at, then: then)
    assert 4 * with_it < n_iterations()


@pytest.fixture
def absorbed(monkeypatch) -> list[kernel.Kernel]:
    """Kernels, once for each time that one was filled."""
    calls, absorb = [], kernel.Kernel._absorb
    monkeypatch.setattr(kernel.Kernel, "_absorb", lambda self, *args: (calls.append(self), absorb(self, *args)))
    return calls


def solved(interval: Interval, penalty: float, epsilon: float):
    if penalty == math.inf:
        return entropic(interval, epsilon=epsilon, tolerance=1e-9)
    return unbalanced(interval, epsilon=epsilon, penalty=penalty, tolerance=1e-9)


@pytest.mark.parametrize(("penalty", "epsilon"), [(1.0, 0.1), (math.inf, 0.5)])
def test_absorbing_potentials_changes_the_way_and_not_the_plan(monkeypatch, absorbed, penalty, epsilon):
    interval = with_far_cells(make_interval(60, 45, weighted=True))
    plan = solved(interval, penalty, epsilon)
    few = len(absorbed)
    monkeypatch.setattr(kernel, "REACH", -1.0)  # nothing is near enough: all in the log domain
    other = solved(interval, penalty, epsilon)
    assert plan.n_iterations == other.n_iterations
    assert few < (len(absorbed) - few) / 4  # products with a kernel instead
    torch.testing.assert_close(plan.matrix(), other.matrix(), rtol=1e-7, atol=1e-14)  # rounding of costs of 1e5


@pytest.mark.parametrize(("penalty", "epsilon"), [(1.0, 0.01), (math.inf, 0.05)])
def test_starting_from_a_sample_changes_the_way_and_not_the_plan(monkeypatch, absorbed, penalty, epsilon):
    interval = make_interval(400, 300, weighted=True)
    interval = replace(
        interval, mass0=interval.mass0.index_fill(0, torch.arange(200), 0.0) / interval.mass0[200:].sum()
    )

    def of_all_cells() -> int:
        return sum(len(one.log_mass[0]) == 200 for one in absorbed)  # that have mass

    plan = solved(interval, penalty, epsilon)
    many = of_all_cells()
    monkeypatch.setattr(sinkhorn, "SAMPLE", 40)
    other = solved(interval, penalty, epsilon)
    assert 0 < of_all_cells() - many < many  # whole kernels: none on the way down to the last epsilon
    assert not bool((plan.f == other.f).all())  # it did start elsewhere
    torch.testing.assert_close(plan.matrix(), other.matrix(), rtol=1e-5, atol=1e-12)  # the tolerance, over the least


def test_a_blunt_plan_from_a_sample_is_the_plan(monkeypatch):
    interval = make_interval(400, 300, weighted=True)
    assert sinkhorn.prepare(interval, None).scale < sinkhorn.BLUNT * 0.05
    plan = solved(interval, 1.0, 0.05)
    monkeypatch.setattr(sinkhorn, "SAMPLE", 40)
    other = solved(interval, 1.0, 0.05)
    assert not bool((plan.f == other.f).all())
    torch.testing.assert_close(plan.matrix(), other.matrix(), rtol=1e-5, atol=1e-12)


def at_few_places(seed: int) -> Interval:
    rng = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(n, 3, generator=rng, dtype=torch.float64).repeat(m, 1) for n, m in ((5, 8), (4, 9)))
    return Interval(0.0, 1.0, x0, x1, *(torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in (x0, x1)))


def in_two_groups(distance: float) -> Interval:
    """Two groups whose shares are swapped: mass has to be made and destroyed, or to go all the way."""
    interval = make_interval(60, 45)
    sides = [torch.arange(len(x)) < len(x) * share for x, share in ((interval.x0, 0.2), (interval.x1, 0.8))]
    x0, x1 = (x + distance * side[:, None] for x, side in zip((interval.x0, interval.x1), sides))
    return replace(interval, x0=x0, x1=x1)


@pytest.fixture
def passes(monkeypatch) -> list[object]:
    """An entry for each time that a plan's entries, whole or by rows or columns, were gone through."""
    calls: list[object] = []
    for owner, names in ((kernel.Kernel, ("soft_minima", "soft_minimum")), (kernel.TiledPlan, ("there_and_back",))):
        for name in names:
            monkeypatch.setattr(owner, name, counting(getattr(owner, name), calls))
    return calls


def counting(function, calls):
    def counted(*args, **options):
        calls.append(args[0])
        return function(*args, **options)

    return counted


@pytest.mark.parametrize("penalty", [0.02, 1.0, 5.0])
@pytest.mark.parametrize(
    "interval",
    [
        make_interval(60, 45, weighted=True),
        with_far_cells(make_interval(60, 45, weighted=True)),
        *map(at_few_places, (3, 4, 7)),
        *map(in_two_groups, (3.0, 100.0)),
    ],
    ids=["weighted", "far", "places 3", "places 4", "places 7", "groups", "groups far"],
)
def test_soft_marginals_need_no_way_down_to_a_blunt_epsilon(monkeypatch, passes, interval, penalty):
    scale = sinkhorn.prepare(interval, None).scale
    how = {"epsilon": 1.01 * scale / sinkhorn.BLUNT, "penalty": penalty * scale, "tolerance": 1e-9}
    found = unbalanced(interval, **how, max_iterations=200)
    few = len(passes)
    monkeypatch.setattr(sinkhorn, "BLUNT", 0.0)
    slow = unbalanced(interval, **how)
    assert few < len(passes) - few
    torch.testing.assert_close(found.matrix(), slow.matrix(), rtol=1e-5, atol=1e-12)  # the tolerance, over the least


@pytest.mark.parametrize("whole", [2**24, 100])
@pytest.mark.parametrize("seed", [3, 4, 7])
def test_extrapolation_does_not_lead_astray_where_many_cells_are_at_few_places(monkeypatch, seed, whole):
    interval = at_few_places(seed)
    monkeypatch.setattr(kernel, "MOST_KEPT", whole)
    scale = sinkhorn.prepare(interval, None).scale
    for fraction in (1e-2, 3e-3, 1e-3, 1e-4, 1e-5):
        assert entropic(interval, epsilon=fraction * scale, max_iterations=100).marginal_error < 1e-3


def test_a_cell_whose_mass_is_no_float32_is_met_in_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "MOST_KEPT", 1)
    x0, x1 = torch.zeros(1, 1).double(), torch.tensor([[0.0], [10.0]]).double()
    found = kernel.Kernel(x0, x1, torch.zeros(1).double(), torch.tensor([1e-50, 1.0], dtype=torch.float64).log())
    found.rounding = 1e-3
    f, best = found.soft_minima(torch.zeros(2).double(), 0.5, 1.0)
    assert found._dtype(0.5) == torch.float32
    expected = 50 * math.log(10) / 2  # it is near, which outweighs that it has next to no mass
    torch.testing.assert_close(f, torch.tensor([expected]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(best, torch.tensor([-expected, 100 - expected]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("whole", [2**24, 1000])
@pytest.mark.parametrize("penalty", [1.0, math.inf])
def test_cells_without_mass_far_from_all_that_have_some_do_no_harm(monkeypatch, whole, penalty):
    interval, far = make_interval(60, 45, weighted=True), torch.arange(10)
    interval.x0[far] += 300.0  # between them and those of the other side an entry of the plan is beyond all numbers
    interval.x1[far] += 300.0
    few = replace(
        interval, x0=interval.x0[10:], x1=interval.x1[10:],
        mass0=interval.mass0[10:] / interval.mass0[10:].sum(), mass1=interval.mass1[10:] / interval.mass1[10:].sum(),
    )  # fmt: skip
    interval = replace(
        interval,
        mass0=torch.cat([torch.zeros(10).double(), few.mass0]),
        mass1=torch.cat([torch.zeros(10).double(), few.mass1]),
    )
    monkeypatch.setattr(kernel, "MOST_KEPT", whole)
    made, columns = [], kernel.TiledPlan.columns
    monkeypatch.setattr(kernel.TiledPlan, "columns", lambda self, u: made.append(columns(self, u)) or made[-1])
    plan, without = solved(interval, penalty, 0.02), solved(few, penalty, 0.02)
    assert made  # Newton steps were taken
    assert all(bool(part.isfinite().all()) for part in made)
    assert plan.n_iterations <= 2 * without.n_iterations
    torch.testing.assert_close(plan.matrix()[10:, 10:], without.matrix(), rtol=1e-5, atol=1e-12)
    assert float(plan.matrix()[:10].sum() + plan.matrix()[:, :10].sum()) == 0


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_entropic_marginals_hold_to_the_tolerance(tolerance):
    interval = make_interval(50, 35, weighted=True)
    plan = entropic(interval, epsilon=0.3, tolerance=tolerance)
    matrix = plan.matrix().numpy()
    np.testing.assert_allclose(matrix.sum(1), interval.mass0.numpy(), rtol=1e-10)  # exact by construction: rounding
    error = np.abs(matrix.sum(0) - interval.mass1.numpy()).sum()
    assert error < tolerance
    assert plan.marginal_error == pytest.approx(error, rel=1e-3, abs=1e-12)  # what it says is what it is


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 20.0])
def test_entropic_is_the_plan_of_an_independent_solver(epsilon):
    interval = make_interval(30, 41, weighted=True)
    plan = entropic(interval, epsilon=epsilon, tolerance=1e-10)
    a, b = interval.mass0.numpy(), interval.mass1.numpy()
    theirs = ot.sinkhorn(
        a, b, squared(interval), epsilon, method="sinkhorn_log", stopThr=1e-10, numItermax=50_000, warn=False
    )
    # both marginals are within 1e-10 of one; the plan's condition number at the smallest epsilon is about 1e3
    np.testing.assert_allclose(plan.matrix().numpy(), theirs, rtol=0, atol=1e-7 / 30)


def test_entropic_lies_between_its_limits():
    interval = make_interval(40, 40)
    best, product = exact(interval).cost, squared(interval).mean()
    costs = [
        float((entropic(interval, epsilon=e, tolerance=1e-6).matrix().numpy() * squared(interval)).sum())
        for e in (1e-3, 0.1, 1.0, 1e4)
    ]
    assert best < costs[0] < costs[1] < costs[2] < costs[3] < product
    assert costs[0] == pytest.approx(best, rel=1e-2)  # suboptimality of the order of epsilon, against a cost of one
    assert costs[3] == pytest.approx(product, rel=1e-3)  # cost / epsilon


def test_well_separated_clusters_of_unequal_masses_converge():
    rng = np.random.default_rng(0)
    far = np.array([20.0, 0.0])
    x0 = np.concatenate([rng.normal(size=(30, 2)), far + rng.normal(size=(70, 2))])
    x1 = np.concatenate([rng.normal(size=(60, 2)), far + rng.normal(size=(40, 2))])
    uniform = torch.full((100,), 0.01, dtype=torch.float64)
    interval = Interval(0.0, 1.0, torch.tensor(x0), torch.tensor(x1), uniform, uniform)
    plan = entropic(interval, epsilon=0.5, tolerance=1e-6, max_iterations=200)  # plain Sinkhorn: e^(gap/epsilon)
    matrix = plan.matrix().numpy()
    blocks = [[matrix[:30, :60].sum(), matrix[:30, 60:].sum()], [matrix[30:, :60].sum(), matrix[30:, 60:].sum()]]
    # what the masses force, and not a cell more: crossing back and forth would cost e^(-2 gap^2/epsilon)
    np.testing.assert_allclose(blocks, [[0.3, 0.0], [0.3, 0.4]], atol=1e-6)  # the marginals' tolerance


@pytest.mark.parametrize("whole", [100, 700])
def test_tiled_entropic_equals_whole(monkeypatch, whole):
    interval = make_interval(60, 45, weighted=True)
    kept = entropic(interval, epsilon=0.2, tolerance=1e-8)
    assert kept.cumulative is not None
    monkeypatch.setattr(kernel, "MOST_KEPT", whole)
    tiled = entropic(interval, epsilon=0.2, tolerance=1e-8)
    assert tiled.cumulative is None
    assert tiled.n_iterations == kept.n_iterations
    np.testing.assert_allclose(tiled.matrix(), kept.matrix(), rtol=1e-8, atol=1e-16)  # rounding of exponents


@pytest.mark.parametrize(("a", "b", "sigma"), [(1.0, 1.0, 1.0), (1.0, 2.0, 0.6), (0.5, 1.5, 1.2)])
def test_entropic_plan_between_gaussians_has_the_bridge_covariance(a, b, sigma):
    nodes, weights = hermegauss(60)  # a quadrature of N(0, 1): the discrete problem is the continuous one
    mass = torch.tensor(weights / weights.sum())
    x = torch.tensor(nodes)[:, None]
    t0, t1 = 1.3, 2.3
    interval = Interval(t0, t1, a * x, b * x, mass, mass)
    plan = entropic(interval, epsilon=2 * sigma**2 * (t1 - t0), tolerance=1e-9)
    covariance = float(((a * x) * plan.matrix() * (b * x).T).sum())
    s = sigma**2 * (t1 - t0)
    # Bunne et al. 2023, theorem 3; quadrature of e^(smooth) with 60 nodes is good to far below 1e-5
    assert covariance == pytest.approx((-s + math.sqrt(s**2 + 4 * a**2 * b**2)) / 2, rel=1e-5)


def test_too_small_an_epsilon_is_refused_and_sigma_named():
    interval = make_interval(20, 20)
    with pytest.raises(ValueError, match="sigma"):
        entropic(interval, epsilon=1e-8)
    with pytest.raises(ValueError, match="positive epsilon"):
        entropic(interval, epsilon=0.0)
    with pytest.raises(ValueError, match="positive epsilon"):
        entropic(interval, epsilon=math.nan)


def test_no_convergence_is_an_error_not_a_plan():
    with pytest.raises(RuntimeError, match="Sinkhorn"):
        entropic(make_interval(30, 30, weighted=True), epsilon=0.05, max_iterations=1, tolerance=1e-14)


def tiled_entropic(interval):
    return entropic(interval, epsilon=0.8, tolerance=1e-8)


COUPLINGS = {
    "exact": (exact, lambda interval: dense(exact(interval), interval)),
    "blocked": (
        lambda interval: blocked(interval, torch.Generator().manual_seed(0), block=5),
        lambda interval: dense(blocked(interval, torch.Generator().manual_seed(0), block=5), interval),
    ),
    "independent": (independent, lambda interval: np.outer(interval.mass0, interval.mass1)),
    "entropic": (tiled_entropic, lambda interval: tiled_entropic(interval).matrix().numpy()),
    "entropic-tiled": (tiled_entropic, lambda interval: tiled_entropic(interval).matrix().numpy()),
}


@pytest.fixture(params=list(COUPLINGS))
def coupling(request, monkeypatch):
    if request.param == "entropic-tiled":
        monkeypatch.setattr(kernel, "MOST_KEPT", 16)
    return COUPLINGS[request.param]


def test_draws_follow_the_plan(coupling):
    make, matrix = coupling
    interval = make_interval(8, 6, weighted=True)
    interval.mass0[2] = interval.mass1[0] = interval.mass1[5] = 0.0  # in the middle and at both ends
    for mass in (interval.mass0, interval.mass1):
        mass /= mass.sum()
    n = 40_000
    i, j = make(interval).sample(n, torch.Generator().manual_seed(3))
    counts = np.zeros((8, 6))
    np.add.at(counts, (i.numpy(), j.numpy()), 1)
    assert counts[2].sum() == counts[:, 0].sum() == counts[:, 5].sum() == 0  # cells without mass never come up
    plan = matrix(interval)
    likely = n * plan > 5  # where the chi-square approximation holds; the rest in one
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(n * plan[likely], n * plan[~likely].sum())
    if expected[-1] < 5:
        assert observed[-1] < 20  # a Poisson number of mean 5 exceeds 20 once in a million
        observed, expected = observed[:-1], expected[:-1] * (observed[:-1].sum() / expected[:-1].sum())
    assert chisquare(observed, expected).pvalue > 1e-3  # fixed seed: it passes or fails for good


def test_same_generator_same_draws(coupling):
    make, _ = coupling
    interval = make_interval(8, 6, weighted=True)
    first, second, other = (make(interval).sample(200, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(torch.stack(first), torch.stack(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_origin_the_plan_is_the_same(coupling, dtype):
    _, matrix = coupling
    near = make_interval(20, 15, weighted=True)
    x0, x1 = ((x * 256).round() / 256 for x in (near.x0, near.x1))  # so that adding 1e4 is exact, in float32 too
    plans = [
        matrix(Interval(1.3, 4.1, (x0 + shift).to(dtype), (x1 + shift).to(dtype), near.mass0, near.mass1))
        for shift in (0, 10_000)
    ]
    np.testing.assert_allclose(plans[1], plans[0], rtol=0, atol=1e-10)  # rounding in float64


def test_each_row_is_drawn_by_its_masses():
    mass = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mass[0, [0, 3]] = mass[1, 4] = 0.0
    n = 40_000
    drawn = draw_each(mass.repeat_interleave(n, 0), torch.Generator().manual_seed(3)).reshape(2, n)
    for row, columns in zip(mass / mass.sum(1, keepdim=True), drawn):
        found = torch.bincount(columns, minlength=5) / n
        assert bool((found[row == 0] == 0).all())
        torch.testing.assert_close(found.double(), row, rtol=0, atol=4 * math.sqrt(0.25 / n))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("n", [100, 400])
def test_exact_plans_are_so_in_any_unit(n, p):
    rng = torch.Generator().manual_seed(n)
    x, y = (torch.randn(m, 3, generator=rng, dtype=torch.float64) for m in (n, n + 20))
    a, b = (torch.full((len(z),), 1 / len(z), dtype=torch.float64) for z in (x, y))
    cost = optimal_plan(x, y, a, b, p=p).cost
    for unit in (1e-10, 1e-7, 1e7):
        assert optimal_plan(unit * x, unit * y, a, b, p=p).cost / unit**p == pytest.approx(cost, rel=1e-9)
