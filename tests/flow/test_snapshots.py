"""Laws of the snapshots: real times, normalised masses, and holding out by leaving out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sctraj.flow.coupling import blocked, entropic, exact, growing
from sctraj.flow.coupling.blocked import blocks
from sctraj.flow.problem import make_problems
from sctraj.flow.snapshots import Snapshots, hold_back, resampled, sampled, thinned, to_device

TIMES = (0.0, 1.5, 2.0, 7.0)


def make(times=TIMES, sizes=(4, 3, 6, 5), d=2, mass=()) -> Snapshots:
    rng = torch.Generator().manual_seed(0)
    return Snapshots(times, tuple(torch.randn(n, d, generator=rng) for n in sizes), mass)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((0.0, 2.0, 2.0, 7.0), "increasing"),
        ((0.0, 2.0, 1.5, 7.0), "increasing"),
        ((0.0, math.nan, 2.0, 7.0), "increasing"),
        ((0.0, 1.5, 2.0, math.inf), "finite"),
        ((-math.inf, 1.5, 2.0, 7.0), "finite"),
        ((0.0, 1.5, 2.0), "one snapshot per time"),
        ((0.0, 1e6, 1e6 + 1, 2e6), "subtract the first time"),
    ],
)
def test_times_must_increase(times, message):
    with pytest.raises(ValueError, match=message):
        make(times)


def test_small_gaps_near_zero_are_fine_beside_large_ones():
    assert make((0.0, 1e-3, 1.0, 1e6)).times == (0.0, 1e-3, 1.0, 1e6)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(0, 2)), "non-empty"),
        ((torch.zeros(3, 2), torch.zeros(3, 3)), "one dimension"),
        ((torch.zeros(3, 2), torch.zeros(3)), "one dimension"),
        ((torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)), "floating-point"),
    ],
)
def test_points_must_be_clouds_of_one_dimension(points, message):
    with pytest.raises(ValueError, match=message):
        Snapshots((0.0, 1.0), points)


def test_no_snapshot_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        Snapshots((), ())


@pytest.mark.parametrize("second", [[-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 1.0], [1.0, 1.0]])
def test_mass_must_be_non_negative_with_a_positive_sum(second):
    with pytest.raises(ValueError, match="snapshot 1"):
        make((0.0, 1.0), (2, 3), mass=(torch.ones(2), torch.tensor(second)))


def test_mass_sums_to_one_and_keeps_its_proportions():
    snapshots = make((0.0, 1.0), (2, 3), mass=(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0, 8.0])))
    for mass in (*snapshots.mass, *make().mass):
        assert mass.dtype == torch.float64
        assert float(mass.sum()) == pytest.approx(1, abs=1e-15)  # rounding
    assert snapshots.mass[0].tolist() == [0.25, 0.75]
    assert snapshots.mass[1].tolist() == [0.0, 0.2, 0.8]
    assert make().mass[1].tolist() == [1 / 3] * 3


@pytest.mark.parametrize("k", [1, 2])
def test_without_merges_the_gap_to_its_real_length(k):
    full = make(mass=tuple(torch.arange(1.0, n + 1) for n in (4, 3, 6, 5)))
    held_out = full.without(k)
    assert held_out.times == TIMES[:k] + TIMES[k + 1 :]
    before, bridge = full.intervals()[k - 1], held_out.intervals()[k - 1]
    assert (bridge.t0, bridge.t1) == (TIMES[k - 1], TIMES[k + 1])
    assert bridge.length == full.intervals()[k - 1].length + full.intervals()[k].length
    assert torch.equal(bridge.x0, before.x0)
    assert torch.equal(bridge.mass1, full.mass[k + 1])
    assert all(not torch.equal(x, full.points[k]) for x in held_out.points)
    assert sum(i.length for i in held_out.intervals()) == TIMES[-1] - TIMES[0]


def test_without_an_end_or_beyond():
    assert make().without(0).times == TIMES[1:]
    assert make().without(3).times == TIMES[:-1]
    for k in (-1, 4):
        with pytest.raises(IndexError):
            make().without(k)


def test_mean_gap_is_the_mean_length():
    snapshots = make()
    lengths = [interval.length for interval in snapshots.intervals()]
    assert snapshots.mean_gap == pytest.approx(sum(lengths) / 3, rel=1e-15)


# ---- growth


def with_growth(times=TIMES, sizes=(4, 3, 6, 5)) -> Snapshots:
    """Every cell's rate is its first coordinate, so that it is known wherever the cell goes."""
    snapshots = make(times, sizes)
    return replace(snapshots, growth=tuple(x[:, 0].clone() for x in snapshots.points))


def assert_rates_go_with_their_cells(snapshots: Snapshots) -> None:
    assert len(snapshots.growth) == len(snapshots)
    for x, rate in zip(snapshots.points, snapshots.growth):
        assert torch.equal(rate, x[:, 0])


def test_growth_goes_with_its_cells():
    snapshots = with_growth()
    for k in range(4):
        assert_rates_go_with_their_cells(snapshots.without(k))
    for part in hold_back(snapshots, fraction=0.4, rng=torch.Generator().manual_seed(0)):
        assert_rates_go_with_their_cells(part)
    assert_rates_go_with_their_cells(resampled(snapshots, 3))
    assert_rates_go_with_their_cells(to_device(snapshots, torch.device("cpu")))
    for interval in snapshots.intervals():
        assert torch.equal(interval.growth0, interval.x0[:, 0])  # of the cells at the start


@pytest.mark.parametrize(("fraction", "part"), [(0.9, 0), (0.1, 1)])
def test_of_the_smallest_snapshot_a_cell_is_trained_on_and_one_held_back(fraction, part):
    split = hold_back(make(), fraction=fraction, rng=torch.Generator().manual_seed(0))
    assert [len(x) for x in split[part].points] == [1, 1, 1, 1]


def test_blocks_take_their_cells_growth_along():
    interval = with_growth((0.0, 1.0), (50, 40)).intervals()[0]
    for rows, _, part, _ in blocks(interval, torch.Generator().manual_seed(0), block=10):
        assert torch.equal(part.growth0, interval.growth0[rows])
        assert torch.equal(part.growth0, part.x0[:, 0])


def test_without_growth_there_is_none():
    assert make().growth == make().without(1).growth == resampled(make(), 0).growth == ()
    assert all(interval.growth0 is None for interval in make().intervals())


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ((torch.zeros(2), torch.zeros(2)), "3 finite growth rates in snapshot 1"),
        ((torch.zeros(2, 1), torch.zeros(3)), "2 finite growth rates in snapshot 0"),
        ((torch.zeros(2), torch.tensor([0.0, math.nan, 0.0])), "snapshot 1"),
        ((torch.tensor([math.inf, 0.0]), torch.zeros(3)), "snapshot 0"),
        ((torch.zeros(2),), "longer than|shorter than"),
    ],
)
def test_growth_must_be_a_finite_rate_for_every_cell(growth, message):
    with pytest.raises(ValueError, match=message):
        Snapshots((0.0, 1.0), (torch.zeros(2, 2), torch.ones(3, 2)), growth=growth)


def test_a_prior_reaches_the_plan():
    snapshots = make((0.0, 2.0), (30, 30))
    rates = (torch.linspace(-1, 1, 30), torch.zeros(30))
    plans = []
    for data in (snapshots, replace(snapshots, growth=rates)):
        problems, _ = make_problems(data, method="uot-cfm", path=None, sigma=None, seeds=(0,), validate=False)
        pairs = problems[0].listed(0)
        log_ratio = torch.zeros(30).double().index_add_(0, pairs.i, pairs.mass1).mul(30).log()
        plans.append(float(torch.corrcoef(torch.stack([log_ratio, rates[0].double()]))[0, 1]))
    assert plans[1] > 0.8 > 0.5 > plans[0]  # rates of -2 to 2 over the interval, against distances' own


# ---- the bootstrap


def test_resampled_weights_are_those_expected_on_average():
    mass = (torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.ones(30))
    snapshots = make((0.0, 1.0), (4, 30), mass=mass)
    draws = [resampled(snapshots, seed) for seed in range(2000)]
    for k, n in enumerate((4, 30)):
        weights = torch.stack([d.mass[k] for d in draws])
        expected = snapshots.mass[k]
        # n draws by weight p have a frequency of variance p (1 - p) / n; four standard errors of 2000
        error = (weights.mean(0) - expected).abs()
        assert bool((error <= 4 * (expected * (1 - expected) / n / 2000).sqrt() + 1e-12).all())
        variance = expected * (1 - expected) / n
        # of 2000 draws: four times sqrt(kurtosis / 2000), which is below sqrt(30/2000) for a binomial of mean one
        torch.testing.assert_close(weights.var(0), variance, rtol=0.35, atol=1e-12)
        assert bool((weights * n - (weights * n).round() < 1e-9).all())  # whole numbers of draws
    assert bool((torch.stack([d.mass[0][2] for d in draws]) == 0).all())  # without mass it is never drawn


def test_resampled_leaves_all_but_the_weights():
    snapshots = make()
    drawn = resampled(snapshots, 1)
    assert drawn.times == snapshots.times
    assert all(torch.equal(a, b) for a, b in zip(drawn.points, snapshots.points, strict=True))
    again, other = resampled(snapshots, 1), resampled(snapshots, 2)
    assert all(torch.equal(a, b) for a, b in zip(drawn.mass, again.mass))
    assert not all(torch.equal(a, b) for a, b in zip(drawn.mass, other.mass))
    before = torch.get_rng_state()
    resampled(snapshots, 1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- large snapshots


def test_sampled_cells_have_mass_and_are_the_weights_alone():
    mass = torch.rand(200, generator=torch.Generator().manual_seed(3))
    mass[::3] = 0.0
    few, many = sampled(mass, 20), sampled(mass, 90)
    assert (len(few), len(many)) == (20, 90)
    assert len(few.unique()) == 20
    assert bool((mass[few] > 0).all())
    assert bool(torch.isin(few, many).all())  # so that a coarser coupling's cells take part in a finer one
    assert torch.equal(sampled(mass.clone(), 20), few)
    assert torch.equal(sampled(mass, 199), mass.nonzero().squeeze(1))  # no more than there are
    assert torch.equal(sampled(torch.ones(20), 20), torch.arange(20))
    drawn = torch.stack([torch.isin(torch.arange(n), sampled(torch.ones(n), n // 4))[:1000] for n in range(2000, 2030)])
    assert 0.2 < drawn.double().mean() < 0.3  # of the first cells as of all: four standard errors are 0.01


def test_thinned_snapshots_keep_cells_weights_and_growth_together_and_small_ones_as_they_are():
    mass = tuple(torch.arange(n, dtype=torch.float64) for n in (30, 50, 60, 70))
    snapshots = replace(with_growth((0.0, 1.0, 2.0, 3.0), (30, 50, 60, 70)), mass=mass)
    few = thinned(snapshots, 55)
    assert [len(x) for x in few.points] == [30, 50, 55, 55]
    assert_rates_go_with_their_cells(few)
    assert all(few.points[k] is snapshots.points[k] for k in (0, 1))
    for k in (2, 3):
        rows = sampled(snapshots.mass[k], 55)
        assert torch.equal(few.points[k], snapshots.points[k][rows])
        assert bool((few.mass[k] > 0).all())  # the first cell of each had none
        torch.testing.assert_close(few.mass[k], snapshots.mass[k][rows] / snapshots.mass[k][rows].sum())
    assert thinned(snapshots, 70) is snapshots
    assert thinned(few, 55) is few
    uniform = make((0.0, 1.0), (50, 60))
    assert thinned(uniform, 60) is uniform


@pytest.mark.parametrize(
    "couple",
    [
        exact,
        lambda interval: blocked(interval, torch.Generator(), block=8),
        lambda interval: entropic(interval, epsilon=1.0),
        lambda interval: growing(interval, torch.Generator()),
        lambda interval: growing(interval, torch.Generator(), block=8),
    ],
)
def test_every_coupling_takes_resampled_snapshots(couple):
    interval = resampled(make((0.0, 1.0), (25, 30)), 0).intervals()[0]
    assert bool((interval.mass0 == 0).any())  # a third of the cells
    i, j = couple(interval).sample(5000, torch.Generator().manual_seed(0))
    assert bool((interval.mass0[i] > 0).all() and (interval.mass1[j] > 0).all())


def test_to_device_keeps_records():
    snapshots = make()
    moved = to_device(snapshots, torch.device("cpu"))
    assert type(moved) is Snapshots
    assert moved.times == snapshots.times
    assert all(torch.equal(a, b) for a, b in zip(moved.points, snapshots.points, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved.mass, snapshots.mass, strict=True))
    # meta stands in for a GPU: every tensor of a record must go, nested ones too
    away = to_device((snapshots.intervals()[0], ("text", 3)), torch.device("meta"))
    assert all(getattr(away[0], name).device.type == "meta" for name in ("x0", "x1", "mass0", "mass1"))
    assert (away[0].t0, away[0].t1, away[1]) == (0.0, 1.5, ("text", 3))


@pytest.mark.parametrize("make_plan", [exact, lambda interval: entropic(interval, epsilon=1.0)])
def test_couplings_survive_the_move(make_plan):
    plan = make_plan(make().intervals()[0])
    moved = to_device(plan, torch.device("cpu"))
    draws = [p.sample(50, torch.Generator().manual_seed(0)) for p in (plan, moved)]
    assert torch.equal(torch.stack(draws[0]), torch.stack(draws[1]))
