"""Laws of distances by place and velocity: they are the work of two ways, and pair cells whose ways go on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sctraj._adata import read_snapshots
from sctraj.datasets import simulated_course
from sctraj.flow import problem
from sctraj.flow.coupling import exact, growing, paired_by_velocity, unbalanced
from sctraj.flow.coupling.phase_space import in_phase_space
from sctraj.flow.probability_path import Hermite, Pairs
from sctraj.flow.problem import make_problems
from sctraj.flow.snapshots import Interval, Snapshots

T0, T1 = 1.5, 4.0
LENGTH = T1 - T0


def cells(n: int, seed: int, d=3) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def interval_of(x0: Tensor, x1: Tensor) -> Interval:
    return Interval(T0, T1, x0, x1, *(torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in (x0, x1)))


def cloud(n0=12, n1=9, d=3) -> tuple[Interval, Tensor, Tensor]:
    return interval_of(cells(n0, 0, d), cells(n1, 1, d) + 1), cells(n0, 2, d), cells(n1, 3, d)


def bending(pairs: Pairs) -> Tensor:
    """``length^3`` times the integral of the squared acceleration along each pair's path, by finite differences."""
    s = torch.linspace(0, 1, 4001, dtype=torch.float64)
    speed = torch.stack([Hermite(0.0).moments(pairs, at.reshape(1, 1)).mean_rate for at in s])  # (4001, n, d)
    acceleration = speed.diff(dim=0) / (s[1] * pairs.length)
    return pairs.length**3 * acceleration.square().sum(2).sum(0) * s[1] * pairs.length


def test_squared_distances_are_the_work_of_straight_ways_and_bent_ones():
    interval, v0, v1 = cloud()
    space = in_phase_space(interval, v0, v1)
    found = torch.cdist(space.x0[:9], space.x1).diagonal().square()
    x0, x1 = interval.x0[:9], interval.x1
    moved = (x1 - x0).square().sum(1)  # length x integral of the squared chord velocity
    pairs = Pairs(x0, x1, T0, T1, v0[:9], v1)
    torch.testing.assert_close(found, moved + bending(pairs), rtol=1e-6, atol=0)  # 4,000 steps of a parabola


def test_speeding_up_costs_as_over_a_time():
    interval, v0, v1 = cloud()
    for known in ((v0, v1), (v0, None), (None, v1)):
        own = torch.cdist(interval.x0, interval.x1).square()
        whole, half = (
            torch.cdist(space.x0, space.x1).square() - own
            for space in (in_phase_space(interval, *known, time=time) for time in (None, LENGTH / 2))
        )
        torch.testing.assert_close(half, whole / 4, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("times", [(0, 1, 1.01, 5), (0, 0.1, 4, 4.1), (0, 1, 2, 3)])
def test_velocities_from_a_very_short_gap_do_not_lead_pairs_astray(times):
    drift = torch.tensor([1.0, 0.0], dtype=torch.float64)  # of a cloud whose cells are drawn anew each time
    snapshots = Snapshots(times, tuple(cells(150, k, 2) + t * drift for k, t in enumerate(times)))
    found = []
    for rounds in (0, problem.ROUNDS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(problem, "ROUNDS", rounds)
            (one,), _ = make_problems(
                snapshots, method="uot-cfm", path=None, sigma=0.1, seeds=(0,), validate=False
            )  # fmt: skip
        k = max(range(3), key=lambda k: times[k + 1] - times[k])
        pairs, interval = one.listed(k), snapshots.intervals()[k]
        beside = interval.x1[pairs.j] - interval.x0[pairs.i] - interval.length * drift
        found.append(float(pairs.middle @ beside.norm(dim=1)))
    by_place, by_velocity = found
    assert by_velocity < 1.1 * by_place  # at random they would be 1.77 apart, by place they are .4 to .8


@pytest.mark.parametrize("free", [0, 1])
def test_where_a_velocity_is_not_known_it_is_the_one_that_bends_least(free):
    interval, v0, v1 = cloud(9, 9)
    known = (None, v1) if free == 0 else (v0, None)
    found = torch.cdist(*(getattr(in_phase_space(interval, *known), x) for x in ("x0", "x1"))).diagonal()
    # of the cost 12 |d/h - (v0 + v1)/2|^2 + |v1 - v0|^2, zero slope in v0: v0 = (3 d/h - v1) / 2
    least = (3 * (interval.x1 - interval.x0) / LENGTH - known[1 - free]) / 2
    for change, sign in ((0.0, 0), (0.1, 1), (-0.1, 1)):
        both = (least + change, v1) if free == 0 else (v0, least + change)
        other = torch.cdist(*(getattr(in_phase_space(interval, *both), x) for x in ("x0", "x1"))).diagonal()
        if sign == 0:
            torch.testing.assert_close(found, other, rtol=1e-9, atol=0)
        else:
            assert bool((other > found + 1e-4).all())


def test_the_first_coordinates_are_the_cells_own_centred_and_all_where_no_velocity_is_known():
    interval, v0, v1 = cloud()
    assert in_phase_space(interval, None, None) is interval
    for known in ((v0, v1), (v0, None), (None, v1)):
        space = in_phase_space(interval, *known)
        shifts = torch.cat([own - x[:, :3] for own, x in ((interval.x0, space.x0), (interval.x1, space.x1))])
        torch.testing.assert_close(shifts, interval.x0.mean(0).expand_as(shifts), rtol=0, atol=1e-14)
        assert space.x0.shape[1] == space.x1.shape[1] == 3 * (1 + sum(v is not None for v in known))


def sums(index: Tensor, mass: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add_(0, index, mass)


@pytest.mark.parametrize("block", [20, 3000])
def test_cells_on_their_way_through_each_other_are_paired_with_themselves(block):
    # two groups swap sides; where they are alone, every cell is paired with the other group
    start = torch.cat([cells(30, 0), cells(30, 1) + torch.tensor([4.0, 0, 0])])
    velocity = torch.tensor([[4.0, 0, 0], [-4.0, 0, 0]]).double().repeat_interleave(30, 0) / LENGTH
    interval = interval_of(start, start + LENGTH * velocity)
    plan = growing(interval, torch.Generator().manual_seed(0), block=block)
    again = paired_by_velocity(plan, interval, velocity, velocity)
    side = torch.arange(60) < 30
    kept = [float(p.pairs.middle[side[p.pairs.i] == side[p.pairs.j]].sum()) for p in (plan, again)]
    # blocks of random cells have not as many of a group on both sides: of 10 some 2 are too many or too few
    assert kept[0] < 0.1
    assert kept[1] > (0.75 if block == 20 else 0.95)
    if block == 3000:
        # with itself, but for what takes part of a cell at one end and not at the other, as read from places
        assert float(again.pairs.middle[again.pairs.i == again.pairs.j].sum()) > 0.8
        for kin, own in (("descendants", interval.x1), ("ancestors", interval.x0)):
            torch.testing.assert_close(getattr(again, kin), own, rtol=0, atol=0.7)  # entropy: a few alike
            off = [float((getattr(p, kin) - own).norm(dim=1).mean()) for p in (plan, again)]
            assert off[0] > 3  # the other side is 4 away
            assert off[1] < 0.35
    for mass, index in ((again.pairs.mass0, again.pairs.i), (again.pairs.mass1, again.pairs.j)):
        torch.testing.assert_close(sums(index, mass, 60), interval.mass0, rtol=0, atol=1e-14)
    assert again.blocks is plan.blocks  # what takes part of each cell is read from places alone


def test_a_plan_of_pairs_alone_is_refused():
    interval, v0, v1 = cloud(10, 12)
    plan = growing(interval, torch.Generator())
    with pytest.raises(ValueError, match="couple the interval first"):
        paired_by_velocity(plan.pairs_alone, interval, v0, v1)


@pytest.mark.parametrize("growth", [None, torch.linspace(-1, 1, 40, dtype=torch.float64)])
def test_without_velocities_the_plan_stays(growth):
    interval = replace(cloud(40, 50)[0], growth0=growth)
    plan = growing(interval, torch.Generator())
    again = paired_by_velocity(plan, interval, None, None)
    for name in ("i", "j", "mass0", "mass1"):
        assert torch.equal(getattr(plan.pairs, name), getattr(again.pairs, name))
    assert torch.equal(plan.descendants, again.descendants)
    assert torch.equal(plan.ancestors, again.ancestors)


@pytest.mark.parametrize("block", [20, 3000])
def test_cells_without_mass_change_nothing_and_marginals_are_the_snapshots_with_a_prior_too(block):
    interval, v0, v1 = cloud(60, 50)
    mass0, mass1 = interval.mass0.clone(), interval.mass1.clone()
    mass0[::5] = mass1[::7] = 0.0
    growth = torch.linspace(-1, 1, 60, dtype=torch.float64)
    sparse = replace(interval, mass0=mass0 / mass0.sum(), mass1=mass1 / mass1.sum(), growth0=growth)
    plan = growing(sparse, torch.Generator().manual_seed(0), block=block)
    again = paired_by_velocity(plan, sparse, v0, v1)
    for mass, index, expected in (
        (again.pairs.mass0, again.pairs.i, sparse.mass0),
        (again.pairs.mass1, again.pairs.j, sparse.mass1),
    ):
        torch.testing.assert_close(sums(index, mass, len(expected)), expected, rtol=0, atol=1e-14)
    assert bool(again.descendants.isfinite().all() and again.ancestors.isfinite().all())
    if block == 20:  # elsewhere cut
        return
    some0, some1 = mass0 > 0, mass1 > 0
    fewer = replace(
        sparse, x0=sparse.x0[some0], x1=sparse.x1[some1], mass0=sparse.mass0[some0], mass1=sparse.mass1[some1],
        growth0=growth[some0],
    )  # fmt: skip
    without = paired_by_velocity(growing(fewer, torch.Generator()), fewer, v0[some0], v1[some1])
    torch.testing.assert_close(again.descendants[some0], without.descendants, rtol=0, atol=1e-3)  # plans' tolerance
    torch.testing.assert_close(again.ancestors[some1], without.ancestors, rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", [20, 3000])
def test_kin_alone_are_those_of_the_whole_and_pairs_stay(block):
    interval, v0, v1 = cloud(90, 100)
    plan = growing(interval, torch.Generator().manual_seed(0), block=block)
    whole, alone = (paired_by_velocity(plan, interval, v0, v1, kin_alone=only) for only in (False, True))
    assert alone.pairs is plan.pairs
    assert alone.blocks is whole.blocks is plan.blocks
    for kin in ("descendants", "ancestors"):
        before, found, asked = (getattr(p, kin) for p in (plan, whole, alone))
        assert torch.equal(asked, found)
        assert float((found - before).abs().max()) > 0.1


def test_further_rounds_keep_the_unit_of_the_first_unless_rounding_forbids_it():
    interval, v0, v1 = cloud(40, 50)
    plan = growing(interval, torch.Generator())
    assert plan.unit is None  # that of places is none of phase space
    first = paired_by_velocity(plan, interval, v0, v1)
    assert first.unit == pytest.approx(exact(in_phase_space(interval, v0, v1)).cost, rel=1e-12)
    second = paired_by_velocity(first, interval, 2 * v0, v1)
    assert second.unit == first.unit
    anew = paired_by_velocity(plan, interval, 2 * v0, v1)
    assert anew.unit > 1.1 * first.unit
    assert torch.equal(second.pairs.j, anew.pairs.j)  # the exact plan knows no unit
    assert not torch.equal(second.descendants, anew.descendants)
    assert paired_by_velocity(first, interval, 1e6 * v0, v1).unit > 1e3 * first.unit  # a smaller one would be refused


def test_kin_are_those_of_a_plan_as_soft_as_phase_space_is_wide():
    interval, v0, v1 = cloud(30, 40)
    found = paired_by_velocity(growing(interval, torch.Generator()), interval, v0, v1)
    space = in_phase_space(interval, v0, v1)
    variance = sum(x.var(0, correction=0).sum() for x in (space.x0, space.x1)) / 2
    alone = unbalanced(space, epsilon=0.05 * found.unit, penalty=found.unit + 8 * float(variance))
    torch.testing.assert_close(found.descendants, alone.descendants(interval.x1), rtol=0, atol=1e-9)  # rounding
    torch.testing.assert_close(found.ancestors, alone.ancestors(interval.x0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True)])
def test_cells_far_from_zero_are_paired_as_near_it_in_single_precision(known):
    interval, v0, v1 = cloud(200, 150)
    velocities = [v.float() if some else None for v, some in zip((v0, v1), known)]
    near = replace(interval, x0=interval.x0.float(), x1=interval.x1.float())
    # in steps of 2^-5, which both places have in single precision
    near = replace(near, x0=(near.x0 * 32).round() / 32, x1=(near.x1 * 32).round() / 32)
    far = replace(near, x0=near.x0 + 2**18, x1=near.x1 + 2**18)
    plans = [exact(in_phase_space(one, *velocities)) for one in (near, far)]
    shared = {*zip(plans[0].i.tolist(), plans[0].j.tolist())} & {*zip(plans[1].i.tolist(), plans[1].j.tolist())}
    assert len(shared) > 0.99 * len(plans[0].i)


def test_an_exact_cost_that_is_known_is_the_one_that_would_be_found():
    interval, _, _ = cloud(40, 50)
    found = growing(interval, torch.Generator())
    known = growing(interval, torch.Generator(), exact_cost=exact(interval).cost)
    assert torch.equal(found.descendants, known.descendants)
    other = growing(interval, torch.Generator(), exact_cost=2 * exact(interval).cost)
    assert not torch.equal(found.descendants, other.descendants)
    grown = replace(interval, growth0=torch.linspace(-1, 1, 40, dtype=torch.float64))  # its plans have other marginals
    one, two = (growing(grown, torch.Generator(), exact_cost=cost) for cost in (None, 1.0))
    assert torch.equal(one.descendants, two.descendants)


def test_units_of_cells_and_of_time_change_nothing():
    interval, v0, v1 = cloud(40, 50)
    plan = growing(interval, torch.Generator())
    one = paired_by_velocity(plan, interval, v0, v1)
    other_units = Interval(10 * T0, 10 * T1, 7 * interval.x0 + 3, 7 * interval.x1 + 3, interval.mass0, interval.mass1)
    other_plan = growing(other_units, torch.Generator())
    other = paired_by_velocity(other_plan, other_units, 0.7 * v0, 0.7 * v1)
    assert torch.equal(one.pairs.i, other.pairs.i)
    assert torch.equal(one.pairs.j, other.pairs.j)
    torch.testing.assert_close(other.pairs.mass0, one.pairs.mass0, rtol=0, atol=1e-6)  # the soft plan's tolerance
    torch.testing.assert_close(other.descendants, 7 * one.descendants + 3, rtol=0, atol=1e-3)


def test_lineages_that_cross_are_told_apart_by_their_velocities(monkeypatch):
    adata = simulated_course("crossing", 1000, rng=7)
    snapshots = read_snapshots(adata, "time", "X_pca", least=3).snapshots.without(2)  # where they meet
    marker = adata.obsm["X_latent"][:, 2] > 0  # which lineage; in X_pca it is one of five coordinates, and noisy
    lineage = [marker[adata.obs["time"] == time] for time in snapshots.times]
    same = {"method": "uot-cfm", "path": None, "sigma": None, "seeds": (0,), "validate": False}

    def kept() -> float:
        (one,), _ = make_problems(snapshots, **same)
        shares = []
        for k in range(len(snapshots) - 1):
            pairs = one.listed(k)
            own = lineage[k][pairs.i.numpy()] == lineage[k + 1][pairs.j.numpy()]
            shares.append(float(pairs.middle[torch.from_numpy(own)].sum()))
        return float(np.mean(shares))

    by_velocity = kept()
    monkeypatch.setattr(problem, "ROUNDS", 0)
    by_place = kept()
    assert 1 - by_velocity < (1 - by_place) / 2


def test_two_snapshots_alone_have_no_velocities_to_go_by():
    snapshots = read_snapshots(simulated_course("cycle", 300, rng=1), "time", "X_pca", least=3).snapshots
    two = snapshots.without(4).without(3).without(2).without(1)
    (one,), _ = make_problems(two, method="uot-cfm", path=None, sigma=None, seeds=(0,), validate=False)
    plan = growing(two.intervals()[0], torch.Generator())
    assert torch.equal(one.listed(0).i, plan.pairs.i)
    assert torch.equal(one.listed(0).mass1, plan.pairs.mass1)
