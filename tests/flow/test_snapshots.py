"""Laws of the snapshots: real times, normalised masses, and holding out by leaving out."""

from __future__ import annotations

import math

import pytest
import torch

from sctraj.flow.coupling import entropic, exact
from sctraj.flow.snapshots import Snapshots, to_device

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
    ],
)
def test_times_must_increase(times, message):
    with pytest.raises(ValueError, match=message):
        make(times)


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


def test_to_device_keeps_records():
    snapshots = make()
    moved = to_device(snapshots, torch.device("cpu"))
    assert type(moved) is Snapshots
    assert moved.times == snapshots.times
    assert all(torch.equal(a, b) for a, b in zip(moved.points, snapshots.points, strict=True))
    for a, b in zip(moved.mass, snapshots.mass, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)  # normalised once more: the last bit
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
