"""Laws of plans: each is solved once for all the folds that share it, as if every fold were alone."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from sctraj.flow import plans as plans_module
from sctraj.flow.coupling import entropic, growing
from sctraj.flow.hold_out import across, baseline, hold_out_problems
from sctraj.flow.plans import Plans
from sctraj.flow.probability_path import BrownianBridge
from sctraj.flow.problem import make_problems
from sctraj.flow.snapshots import Snapshots


def make(times, sizes) -> Snapshots:
    rng = torch.Generator().manual_seed(0)
    return Snapshots(times, tuple(torch.randn(n, 2, generator=rng, dtype=torch.float64) for n in sizes))


@pytest.mark.parametrize("method", ["ot-cfm", "uot-cfm"])
def test_folds_share_what_they_have_in_common_and_nothing_else(method):
    snapshots = make(times=(0.0, 1.0, 4.0, 6.0, 9.0), sizes=(20, 15, 25, 30, 10))
    same = {"method": method, "path": "straight", "sigma": None, "seeds": [0], "validate": False}
    _, problems, _ = hold_out_problems(snapshots, **same)
    assert problems[0].couplings[2] is problems[1].couplings[2]  # 6 to 9
    assert problems[1].couplings[0] is problems[2].couplings[0]  # 0 to 1
    assert len({id(c) for p in problems for c in p.couplings}) == 7
    for k, problem in zip((1, 2, 3), problems):
        alone = make_problems(snapshots.without(k), **same)[0][0]
        assert problem.path.sigma == alone.path.sigma
        for n in range(3):
            shared, own = (p.listed(n) for p in (problem, alone))
            assert torch.equal(shared.i, own.i)
            assert torch.equal(shared.j, own.j)
            assert torch.equal(shared.mass0, own.mass0)
            assert torch.equal(shared.mass1, own.mass1)


def test_folds_share_pairs_by_velocity_where_all_that_tells_it_is_theirs():
    snapshots = make(times=tuple(range(7)), sizes=(20, 15, 25, 30, 10, 20, 15))
    same = {"method": "uot-cfm", "path": None, "sigma": None, "seeds": [0], "validate": False}
    _, problems, _ = hold_out_problems(snapshots, **same)
    fourth, fifth = problems[3].couplings, problems[4].couplings
    # the velocities at 1 go by the plans from 0 to 2, and those by the velocities at 2, by the plan to 3
    assert fourth[0] is fifth[0]
    assert len({id(c) for p in problems for c in p.couplings}) == 5 * 5 - 2  # fourth and fifth; first and second
    for k, problem in zip(range(1, 6), problems):
        alone = make_problems(snapshots.without(k), **same)[0][0]
        assert problem.tangents.reliability == alone.tangents.reliability
        for n in range(5):
            shared, own = (p.listed(n) for p in (problem, alone))
            assert all(torch.equal(getattr(shared, f), getattr(own, f)) for f in ("i", "j", "mass0", "mass1"))


def test_plans_known_are_those_of_the_same_velocities_time_and_question():
    interval = make((0.0, 1.0), (40, 50)).intervals()[0]
    v0, v1 = interval.x0.flip(0), interval.x1.flip(0)
    plan, plans = growing(interval, torch.Generator()), Plans()
    asked = [
        (v0, v1, 1.0, False),
        (v0, 2 * v1, 1.0, False),
        (v0, v1, 0.5, False),
        (v0, v1, 1.0, True),
        (None, v1, 1.0, False),
    ]
    first = [plans.by_velocity(plan, interval, *known, time, kin_alone=only) for *known, time, only in asked]
    again = [plans.by_velocity(plan, interval, *known, time, kin_alone=only) for *known, time, only in asked]
    assert all(one is other for one, other in zip(first, again))
    assert len({id(p) for p in first}) == len(asked)
    plans.forget_velocities()
    assert plans.by_velocity(plan, interval, v0, v1, 1.0, kin_alone=False) is not first[0]


def test_a_coupling_is_known_by_its_cells_masses_times_prior_and_by_what_is_asked():
    snapshots = make((0.0, 1.0), (20, 25))
    one = snapshots.intervals()[0]
    heavier = torch.linspace(1, 2, 20, dtype=torch.float64)
    others = [
        replace(one, t1=2.0),
        replace(one, x0=one.x0.clone()),  # by identity: cells are not compared
        replace(one, mass0=heavier / heavier.sum()),
        replace(one, mass1=one.mass1.flip(0) * torch.linspace(0.9, 1.1, 25, dtype=torch.float64)),
        replace(one, growth0=torch.zeros(20)),
    ]
    plans = Plans()
    first = plans.couple(one, None, "uot-cfm")
    assert plans.couple(snapshots.intervals()[0], None, "uot-cfm") is plans.growing(one) is first
    assert all(plans.couple(other, None, "uot-cfm") is not first for other in others)
    assert plans.couple(one, None, "ot-cfm") is not first
    bridges = [plans.couple(one, BrownianBridge(sigma), "sb-cfm") for sigma in (1.0, 2.0, 1.0)]
    assert bridges[0] is bridges[2] is not bridges[1]
    assert plans.couple(one, BrownianBridge(1.0), "i-cfm") is plans.couple(one, BrownianBridge(2.0), "i-cfm")


def test_the_coupling_of_bridges_is_brownian_motions_but_for_its_ends():
    (interval,) = make((1.0, 3.5), (30, 40)).intervals()
    path = BrownianBridge(0.7)
    plan = Plans().couple(interval, path, "sb-cfm").matrix().log()
    squares = torch.cdist(interval.x0, interval.x1).square()
    motion = -squares / (2 * path.sigma**2 * interval.length)  # of its density, up to a constant
    # what is of one end alone, as the potentials are, is taken off
    plan, motion = (v - v[:1] - v[:, :1] + v[0, 0] for v in (plan, motion))
    torch.testing.assert_close(plan, motion, rtol=0, atol=1e-10)  # rounding


@pytest.mark.parametrize("method", ["uot-cfm", "ot-cfm"])
def test_folds_share_couplings_of_large_snapshots(monkeypatch, method):
    monkeypatch.setattr(plans_module, "MOST_CELLS", 25)
    _, problems, _ = hold_out_problems(
        make((0.0, 1.0, 2.0, 3.0, 4.0), (60,) * 5), method=method, path="straight", sigma=0.5, seeds=[0],
        validate=False, plans=Plans(block=22),
    )  # fmt: skip
    assert problems[1].snapshots.points[0] is problems[2].snapshots.points[0]
    first, second, third = (problem.couplings for problem in problems)
    assert first[2] is second[2]  # from 3 to 4, after what is left out
    assert second[0] is third[0]  # from 0 to 1, before it
    assert len({id(c) for p in problems for c in p.couplings}) == 7


def test_the_cells_that_are_coupled_are_the_same_for_every_method_and_baseline(monkeypatch):
    monkeypatch.setattr(plans_module, "MOST_CELLS", 25)
    snapshots, plans = make((0.0, 1.0, 2.0, 3.0), (60, 10, 60, 60)), Plans(block=22)
    few = plans.taking_part(snapshots)
    assert plans.taking_part(snapshots) is few
    assert [len(x) for x in few.points] == [25, 10, 25, 25]
    same = {"path": None, "sigma": 0.5, "seeds": [0], "validate": False, "plans": plans}
    for method in ("uot-cfm", "ot-cfm"):
        _, problems, _ = hold_out_problems(snapshots, method=method, **same)
        assert all(one.snapshots.points[0] is few.points[0] for one in problems)
    restored = baseline(snapshots, 1, "ot-interpolation", plans)
    pairs = problems[0].couplings[0]  # of ot-cfm, without snapshot 1
    assert torch.equal(restored.points, (few.points[0][pairs.i] + few.points[2][pairs.j]) / 2)
    assert plans.couple(across(snapshots, 1, plans), None, "ot-cfm") is pairs
    assert len(baseline(snapshots, 1, "previous", plans).points) == 60  # which is copied whole


def test_a_block_may_be_larger_than_what_takes_part_otherwise(monkeypatch):
    monkeypatch.setattr(plans_module, "MOST_CELLS", 25)
    sizes = [len(x) for x in Plans(block=40).taking_part(make((0.0, 1.0), (40, 41))).points]
    assert sizes == [40, 40]


def test_blocks_are_drawn_as_if_folds_were_alone(monkeypatch):
    monkeypatch.setattr(plans_module, "BLOCK", 9)
    snapshots = make(times=(0.0, 1.0, 4.0, 6.0, 9.0), sizes=(20, 15, 25, 30, 10))
    same = {"method": "ot-cfm", "path": None, "sigma": 0.1, "seeds": [0], "validate": False}
    _, problems, _ = hold_out_problems(snapshots, **same)
    for k, problem in zip((1, 2, 3), problems):
        alone = make_problems(snapshots.without(k), **same)[0][0]
        for shared, own in zip(problem.couplings, alone.couplings, strict=True):
            assert torch.equal(shared.i, own.i)
            assert torch.equal(shared.j, own.j)


@pytest.mark.parametrize(
    ("method", "path", "taking"),
    [("uot-cfm", None, 25), ("uot-cfm", "straight", 25), ("ot-cfm", None, 25), ("i-cfm", "hermite", 25),
     ("i-cfm", None, 60), ("sb-cfm", None, 60)],
)  # fmt: skip
def test_problems_of_large_snapshots_have_the_cells_that_pairs_are_of(monkeypatch, caplog, method, path, taking):
    monkeypatch.setattr(plans_module, "MOST_CELLS", 25)
    snapshots = make((0.0, 1.0, 2.0), (60, 20, 60))
    with caplog.at_level(logging.INFO, logger="sctraj"):
        (one,), _ = make_problems(
            snapshots, method=method, path=path, sigma=0.5, seeds=(0,), validate=False, plans=Plans(block=22)
        )  # fmt: skip
    assert [len(x) for x in one.snapshots.points] == [taking, 20, taking]
    assert ("25 of 60, 20 of 20, 25 of 60" in caplog.text) == (taking == 25)
    for k, ends in enumerate(one.snapshots.intervals()):
        pairs = one.listed(k)
        assert len(pairs.i.unique()) > 0.9 * len(ends.x0)  # all of those listed, most of those drawn
        assert len(pairs.j.unique()) > 0.9 * len(ends.x1)


def test_the_plans_of_bridges_are_solved_where_asked_and_come_back_to_the_cells(monkeypatch):
    asked, there, snapshots = [], torch.device("cpu"), make((0.0, 1.5, 2.0, 7.0), (4, 3, 6, 5))
    monkeypatch.setattr(
        plans_module, "entropic", lambda *args, **how: asked.append(how["device"]) or entropic(*args, **how)
    )
    for device in (there, None, torch.device("mps")):  # which has no float64
        plans = Plans(device=device)
        made, _ = make_problems(
            snapshots, method="sb-cfm", path=None, sigma=1.0, seeds=[0], validate=False, plans=plans
        )  # fmt: skip
        assert {plan.f.device for plan in made[0].couplings} == {there}
    assert asked == [there] * 3 + [None] * 6
