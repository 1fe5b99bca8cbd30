"""Laws of the coupling that grows: exact marginals at both ends, mass that changes instead of crossing, and kin."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from sctraj.flow.coupling import GrowingPlan, exact, growing
from sctraj.flow.coupling.growing import MOVES, Penalty
from sctraj.flow.snapshots import Interval

T0, T1 = 1.3, 4.1
TRUE_RATIOS = torch.tensor([3 / 2, 3 / 4], dtype=torch.float64)  # of weights (1/2, 1/2) to (1/3, 2/3)


def interval_of(x0, x1, weights0=None, weights1=None, growth=None) -> Interval:
    x0, x1 = torch.as_tensor(x0), torch.as_tensor(x1)
    masses = (
        torch.ones(len(x)) if w is None else torch.as_tensor(w).double() for x, w in ((x0, weights0), (x1, weights1))
    )
    mass0, mass1 = (m.double() / m.double().sum() for m in masses)
    return Interval(T0, T1, x0, x1, mass0, mass1, growth)


def cloud(n0=60, n1=75, *, seed=0, d=2) -> Interval:
    rng = np.random.default_rng(seed)
    x0, x1 = rng.normal(size=(n0, d)), 0.7 * rng.normal(size=(n1, d)) + 1
    return interval_of(x0, x1, rng.exponential(size=n0), rng.exponential(size=n1))


def groups(gap, *, n=60, rise=0.0, growth=None) -> Interval:
    """Two groups of ``n`` cells, each N(0, 1), ``gap`` apart, moved by ``rise``: (1/3, 2/3) of all become half each."""
    rng = np.random.default_rng(1)
    x0, x1 = (rng.normal(size=(2 * n, 2)) + np.repeat([[0.0, 0.0], [gap, 0.0]], n, 0) for _ in range(2))
    return interval_of(x0, x1 + np.array([0.0, rise]), np.repeat([1.0, 2.0], n), None, growth)


def grown(interval: Interval, seed=0, **options) -> GrowingPlan:
    return growing(interval, torch.Generator().manual_seed(seed), **options)


def sums(index: Tensor, mass: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add_(0, index, mass)


def dense(plan: GrowingPlan, interval: Interval) -> tuple[Tensor, Tensor]:
    """Masses at the start and at the end as matrices ``(n0, n1)``."""
    p, shape = plan.pairs, (len(interval.x0), len(interval.x1))
    zero = torch.zeros(shape, dtype=torch.float64)
    first, last = (zero.index_put((p.i, p.j), mass, accumulate=True) for mass in (p.mass0, p.mass1))
    return first, last


# ---- marginals


def far_cells() -> Interval:
    """Two cells that nothing can reach: what takes part of them is less than a float64 holds."""
    interval = cloud()
    interval.x0[:2] *= 3000.0
    interval.x1[4] *= -3000.0
    return interval


def empty_cells() -> Interval:
    interval = cloud()
    interval.mass0[2] = interval.mass1[0] = interval.mass1[5] = 0.0  # in the middle and at both ends
    interval.mass0[-1] = 0.0
    for mass in (interval.mass0, interval.mass1):
        mass /= mass.sum()
    return interval


INTERVALS = {
    "weighted": cloud,
    "far cells": far_cells,
    "empty cells": empty_cells,
    "prior": lambda: replace(cloud(), growth0=torch.linspace(-1, 1, 60, dtype=torch.float64)),
    "strong prior": lambda: replace(cloud(), growth0=torch.linspace(-500, 0, 60, dtype=torch.float64)),
    "one cell to many": lambda: interval_of(torch.zeros(1, 2).double(), cloud().x1),
    "many cells to one": lambda: interval_of(cloud().x0, torch.zeros(1, 2).double()),
    "single precision": lambda: replace(cloud(), x0=cloud().x0.float() + 1e3, x1=cloud().x1.float() + 1e3),
    "copy": lambda: interval_of(cloud().x0, cloud().x0.flip(0)),
    "one place": lambda: interval_of(torch.ones(7, 2), torch.ones(5, 2)),
}


@pytest.mark.parametrize("frame", ["fixed", "moving"])
@pytest.mark.parametrize("block", [20, 3000])
@pytest.mark.parametrize("name", INTERVALS)
def test_both_marginals_are_the_snapshots(name, block, frame):
    interval = INTERVALS[name]()
    plan = grown(interval, block=block, frame=frame)
    pairs = plan.pairs
    # rounding of masses of some 1/60; a cell at a block's border adds up from two
    torch.testing.assert_close(sums(pairs.i, pairs.mass0, len(interval.x0)), interval.mass0, rtol=0, atol=1e-14)
    torch.testing.assert_close(sums(pairs.j, pairs.mass1, len(interval.x1)), interval.mass1, rtol=0, atol=1e-14)
    assert all(bool(m.isfinite().all() and (m >= 0).all()) for m in (pairs.mass0, pairs.mass1))
    assert bool((pairs.contrast.abs() <= 2).all())
    assert all(bool(kin.isfinite().all()) for kin in (plan.descendants, plan.ancestors))
    if block == 3000:
        assert len(pairs.i) <= len(interval.x0) + len(interval.x1) - 1  # a vertex of the transport polytope


@pytest.mark.parametrize("frame", ["fixed", "moving"])
def test_a_cell_without_mass_is_nobodys_kin(frame):
    interval = empty_cells()
    some0, some1 = interval.mass0 > 0, interval.mass1 > 0
    fewer = interval_of(interval.x0[some0], interval.x1[some1], interval.mass0[some0], interval.mass1[some1])
    plan, without = grown(interval, frame=frame), grown(fewer, frame=frame)
    assert bool(some0[plan.pairs.i].all())
    assert bool(some1[plan.pairs.j].all())
    # both plans converged to 1e-6, times penalty/epsilon = 20, times a displacement of about one
    torch.testing.assert_close(plan.descendants[some0], without.descendants, rtol=0, atol=1e-4)
    torch.testing.assert_close(plan.ancestors[some1], without.ancestors, rtol=0, atol=1e-4)


def test_next_to_nothing_of_a_cell_far_from_all_takes_part():
    interval = cloud()
    interval.x0[0] = 200.0
    (block,) = grown(interval).blocks
    taking = block.marginal0 / interval.mass0
    assert float(taking[0]) < 1e-3
    assert float(taking[1:].min()) > 0.5


# ---- large snapshots


def test_kin_in_blocks_are_near_those_of_all_the_nearer_the_larger_blocks_are():
    interval = cloud(300, 300)
    whole = grown(interval).descendants
    errors = [
        np.mean([float((grown(interval, seed, block=size).descendants - whole).square().mean()) for seed in range(4)])
        for size in (20, 60, 180)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # as the error of a mean does: threefold each


def test_a_cell_that_no_block_has_is_its_own_kin():
    interval = cloud(90, 80)
    interval.mass0[7] = interval.mass1[3] = 0.0
    interval.mass0[:] /= interval.mass0.sum()
    interval.mass1[:] /= interval.mass1.sum()
    plan = grown(interval, block=30)
    assert 7 not in plan.pairs.i
    assert 3 not in plan.pairs.j
    for kin, x, cell in ((plan.descendants, interval.x0, 7), (plan.ancestors, interval.x1, 3)):
        own = (kin == x).all(1)
        assert own.nonzero().flatten().tolist() == [cell]
        assert bool(kin.isfinite().all())


def test_snapshots_too_large_to_be_met_whole_are_met_in_small_blocks(monkeypatch, caplog):
    module = sys.modules["sctraj.flow.coupling.growing"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "WHOLE", 60)
    monkeypatch.setattr(module, "BLOCK", 26)
    with caplog.at_level(logging.INFO, logger="sctraj"):
        grown(cloud(72, 50))  # as many pairs as of 60 a side
        assert not caplog.records
        grown(cloud(73, 50))
        assert "73 and 50 cells in 3 blocks" in caplog.text
        caplog.clear()
        grown(cloud(73, 50), block=80)
        assert not caplog.records


@pytest.mark.parametrize("n", [100, 200])  # two blocks, and four
@pytest.mark.parametrize("seed", range(6))
def test_a_cell_far_away_disturbs_no_block_but_its_own(seed, n):
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(n, 2)), rng.normal(size=(n, 2))
    far = x0.copy()
    far[0] += 1000
    usual, disturbed = (grown(interval_of(x, x1), seed, block=51) for x in (x0, far))
    moved = (usual.descendants - disturbed.descendants).norm(dim=1) > 0.5
    assert moved[0]
    assert moved.sum() <= 55  # of a block


@pytest.mark.parametrize("seed", range(8))
def test_blocks_of_a_cell_each_may_be_copies(seed):
    x = np.random.default_rng(1).normal(size=(12, 2))
    plan = grown(interval_of(x, x[::-1].copy()), seed, block=2)
    torch.testing.assert_close(plan.pairs.mass0.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.8, 0.95])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [2, 3, 5])
def test_most_cells_may_be_at_one_place(block, seed, share):
    rng = np.random.default_rng(seed)
    x0, x1 = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    x0[: int(20 * share)] = x1[: int(20 * share)] = 0
    plan = grown(interval_of(x0, x1), seed, block=block)
    for index, mass in ((plan.pairs.i, plan.pairs.mass0), (plan.pairs.j, plan.pairs.mass1)):
        torch.testing.assert_close(sums(index, mass, 20), torch.full((20,), 0.05, dtype=torch.float64))


def test_the_number_of_threads_changes_no_bit(threads_of_torch):
    interval = cloud(150, 130)
    one, three = (threads_of_torch(n, lambda: grown(interval, block=30)) for n in (1, 3))
    for name in ("i", "j", "mass0", "mass1"):
        assert torch.equal(getattr(one.pairs, name), getattr(three.pairs, name))
    assert torch.equal(one.descendants, three.descendants)
    assert torch.equal(one.ancestors, three.ancestors)


# ---- growth


def test_far_groups_keep_to_themselves_and_their_masses_change_by_the_true_ratios():
    n, gap = 60, 300.0
    interval = groups(gap, n=n)
    balanced = exact(interval)
    # a sixth of all mass has to cross where mass is conserved
    assert float(balanced.mass[balanced.i // n != balanced.j // n].sum()) == pytest.approx(1 / 6, abs=1e-12)
    plan = grown(interval)
    pairs, group = plan.pairs, plan.pairs.i // n
    crossing = group != pairs.j // n
    assert float(pairs.middle[crossing].sum()) < 1e-12  # rounding of the network simplex
    ratio = (pairs.mass1 / pairs.mass0)[~crossing]
    # potentials vary within a group by its largest cost at most, 2 x that over the penalty
    cost = torch.cdist(interval.x0, interval.x1).square()
    ends = ((interval.x0, interval.mass0), (interval.x1, interval.mass1))
    penalty = balanced.cost + 8 * sum(float(m @ (x - m @ x).square().sum(1)) for x, m in ends) / 2
    bound = 2 * float(max(cost[:n, :n].max(), cost[n:, n:].max())) / penalty
    assert bound < 0.01
    assert float((ratio.log() - TRUE_RATIOS[group[~crossing]].log()).abs().max()) < bound
    # kin too: means of cells of the own group
    for kin, there in ((plan.descendants, interval.x1), (plan.ancestors, interval.x0)):
        for own in (slice(None, n), slice(n, None)):
            assert bool((kin[own] >= there[own].min(0).values).all() and (kin[own] <= there[own].max(0).values).all())


def test_growth_of_groups_eight_deviations_apart_is_right_on_average():
    n = 60
    interval = groups(8.0, n=n)
    unit = float(torch.cat([interval.x0, interval.x1]).var(0).sum())  # of the penalty, nearly
    pairs = grown(interval, penalty=Penalty(exact(interval).cost / unit, 1.0)).pairs
    group = pairs.i // n
    ratios = sums(group, pairs.mass1, 2) / sums(group, pairs.mass0, 2)
    torch.testing.assert_close(ratios, TRUE_RATIOS, rtol=1e-6, atol=0)  # crossing costs e^-70, the solver 1e-6
    # its cells differ by the potentials' slope within a group: distances of 2 against a penalty of 64/6, both sides
    error = (pairs.mass1 / pairs.mass0 / TRUE_RATIOS[group]).log().abs()
    assert float(pairs.middle @ error) < 0.2


@pytest.mark.parametrize(("gap", "least"), [(8.0, 0.6), (30.0, 0.99)])
def test_by_default_most_growth_of_far_groups_is_growth_and_not_crossing(gap, least):
    n = 60
    pairs = grown(groups(gap, n=n)).pairs
    group = pairs.i // n
    found = (sums(group, pairs.mass1, 2) / sums(group, pairs.mass0, 2)).log() / TRUE_RATIOS.log()
    assert bool((found > least).all())
    assert bool((found < 1 + 1e-6).all())


def shifted(shift, d, **options) -> tuple[Interval, GrowingPlan, float, float]:
    """Cells that all move alike, N(0, 1) at either end, their plan, and how far what takes part and pairs move."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, d))
    interval = interval_of(x, rng.permutation(x) + shift * np.eye(d)[0])
    plan = grown(interval, **options)
    (block,) = plan.blocks
    taking = block.marginal1 @ interval.x1 - block.marginal0 @ interval.x0
    moved = plan.pairs.middle @ (interval.x1[plan.pairs.j] - interval.x0[plan.pairs.i])
    return interval, plan, float(taking[0]), float(moved[0])


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 10.0, 50.0])
def test_by_default_most_of_a_rigid_shift_is_movement(shift, d):
    interval, _, taking, moved = shifted(shift, d)
    # between normal laws of the standard deviation 1, what takes part is shifted towards the other by this share of the
    # way at each end, where 2 (share shift)^2 / 2 penalties and ((1 - 2 share) shift)^2 are least together
    penalty = 8 * d + exact(interval).cost
    share = 2 / (4 + penalty)
    assert taking == pytest.approx((1 - 2 * share) * shift, rel=0.1)
    assert moved > 0.75 * shift


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 10.0, 50.0])
def test_in_a_moving_frame_nearly_all_of_a_rigid_shift_is_movement(shift, d):
    interval, plan, taking, moved = shifted(shift, d, frame="moving")
    # by place a share of the way is left out, 4 / (4 + penalty) for both ends (see above); in the frame that moves with
    # what is not, the same share of what is left
    share = (4 / (4 + 2 * d + exact(interval).cost / 2)) ** (1 + MOVES)
    # more is movement where the shift is small, as the cells are the same at both ends
    assert 0.95 * (1 - share) * shift < taking < 1.01 * shift
    assert moved > 0.9 * shift
    # kin are where the cells are, and not where the frame has taken them
    for kin, own, way in ((plan.descendants, interval.x0, shift), (plan.ancestors, interval.x1, -shift)):
        assert float((kin - own).mean(0)[0]) == pytest.approx(way, rel=0.1)


@pytest.mark.parametrize("far", [10.0, 100.0])
def test_in_a_moving_frame_a_rigid_shift_grows_nothing_but_at_a_high_order_in_spread_over_shift(far):
    x = torch.tensor(np.random.default_rng(0).normal(size=(300, 2)))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    interval = interval_of(x, x[order] + torch.tensor([far, 0.0]))
    pairs = growing(interval, torch.Generator(), frame="moving", penalty=Penalty(0.0, 1.0)).pairs
    # what takes part by place goes all of the way but 4 / shift, then all of this but 4 / shift^2 of it; over the
    # penalty, shift^2, potentials of the rest say 2 (4 / shift) (4 / shift^2) (x + y) / shift^2. In a fixed frame it is
    # the first order (the test below); no plan is better than its tolerance of 1e-6
    grown_by = float((pairs.middle @ (pairs.mass1 / pairs.mass0).log().square()).sqrt())
    assert grown_by < 2 * 32 / far**5 + 1e-6


def test_groups_that_move_apart_go_each_its_own_way():
    n, gap, way = 150, 12.0, 3.0
    interval = groups(gap, n=n)  # their masses change as well
    ways = torch.tensor([[0.0, -way], [0.0, way]], dtype=torch.float64).repeat_interleave(n, 0)
    parted = replace(interval, x1=interval.x1 + ways)

    def found(frame) -> tuple[float, float]:
        """How far cells go, of their way; and by how much growth differs within groups."""
        pairs = grown(parted, frame=frame).pairs
        moved = ((parted.x1[pairs.j] - parted.x0[pairs.i]) * ways[pairs.i].sign())[:, 1]
        ratio, group = (pairs.mass1 / pairs.mass0).log(), pairs.i // n
        return float(pairs.middle @ moved) / way, max(float(ratio[group == g].std()) for g in (0, 1))

    (short, uneven), (whole, even) = found("fixed"), found("moving")
    assert short < 0.87
    assert whole > 0.95  # in a frame that moved all groups alike it would be short
    assert even < uneven / 3


def two_lineages(n_few, n_many, *, gap=12.0, way=3.0) -> tuple[Interval, Tensor]:
    """Few cells that move one way, and many that move the other, and which are which; nothing grows."""
    rng = np.random.default_rng(0)
    few = np.arange(n_few + n_many) < n_few
    at = np.where(few[:, None], [gap, 0.0], [0.0, 0.0])
    to = np.where(few[:, None], [gap, way], [0.0, -way])
    n = len(few)
    return interval_of(rng.normal(size=(n, 2)) + at, rng.normal(size=(n, 2)) + to), torch.from_numpy(few)


def test_a_lineage_of_few_cells_goes_its_own_way_in_a_moving_frame():
    interval, few = two_lineages(20, 480)
    uneven = {}
    for frame in ("fixed", "moving"):
        pairs = grown(interval, frame=frame).pairs
        uneven[frame] = float((pairs.mass1 / pairs.mass0).log()[few[pairs.i]].std())
    # if they were moved along with the others, its cells would seem to die and to be born
    assert uneven["moving"] < uneven["fixed"] / 3


def test_neighbours_are_the_nearest_cells_with_mass_and_count_by_it():
    module = sys.modules["sctraj.flow.coupling.growing"]
    rng = np.random.default_rng(0)
    cells, values, mass = rng.normal(size=(20, 3)), rng.normal(size=(20, 2)), rng.exponential(size=20)
    mass[::2] = 0.0
    expected = []
    for cell in cells:
        distance = np.where(mass > 0, np.linalg.norm(cells - cell, axis=1), np.inf)
        near = np.argsort(distance)[:3]  # a quarter of ten, at least
        expected.append(np.average(values[near], axis=0, weights=mass[near]))
    cells, values, mass = map(torch.from_numpy, (cells, values, mass))
    found = module._mean_of(module._neighbours(cells, mass), values, mass)
    torch.testing.assert_close(found, torch.from_numpy(np.array(expected)), rtol=1e-12, atol=1e-12)


def test_light_cells_move_nobody_along():
    few, n = 6, 60  # heavy cells, fewer than a neighbourhood has
    rng = np.random.default_rng(0)
    start = rng.normal(size=(n, 2)) + np.where(np.arange(n)[:, None] < few, 0.0, [30.0, 0.0])
    end = rng.normal(size=(few, 2))
    interval = interval_of(start, end, np.where(np.arange(n) < few, 1.0, 1e-20))
    alone = interval_of(start[:few], end)
    (with_them,), (without,) = (grown(one, frame="moving").blocks for one in (interval, alone))
    torch.testing.assert_close(with_them.marginal0[:few], without.marginal0, rtol=0.2, atol=0)


def test_blocks_have_the_neighbours_of_the_whole_snapshot():
    interval, few = two_lineages(24, 1176)
    uneven = {}
    for frame in ("fixed", "moving"):
        blocks = grown(interval, block=400, frame=frame).blocks
        assert len(blocks) == 4  # with some six of the few, less than a neighbourhood
        taking = [(b.marginal0 / b.part.mass0).log()[few[b.i]] for b in blocks]
        uneven[frame] = np.mean([float(one.std()) for one in taking])
    assert uneven["moving"] < uneven["fixed"]  # twice as much, if neighbours were of the block


def test_the_frame_is_the_same_far_from_the_origin():
    interval = cloud()
    far = replace(interval, x0=interval.x0 + 1e7, x1=interval.x1 + 1e7)
    (near,), (away,) = (grown(one, frame="moving").blocks for one in (interval, far))
    torch.testing.assert_close(away.marginal0, near.marginal0, rtol=1e-4, atol=0)  # rounding of 1e7


@pytest.mark.parametrize("far", [10.0, 100.0])
def test_a_rigid_shift_grows_nothing_but_at_first_order_in_spread_over_shift(far):
    x = torch.tensor(np.random.default_rng(0).normal(size=(300, 2)))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([far, 0.0])
    interval = interval_of(x, x[order] + shift)
    plan = growing(interval, torch.Generator(), penalty=Penalty(0.0, 1.0))
    pairs = plan.pairs
    log_ratio = (pairs.mass1 / pairs.mass0).log()
    assert float(pairs.middle @ log_ratio) == pytest.approx(0, abs=2 / far**2)  # even orders cancel
    # a shift's potentials are linear, -2 shift x and 2 shift y; over the penalty, shift^2: 2 (x + y) / shift in all
    first_order = 2 / far * ((x - x.mean(0))[pairs.i, 0] + (x[order] - x.mean(0))[pairs.j, 0])
    apart = float((pairs.middle @ (log_ratio - first_order).square()).sqrt())
    assert apart < (4 / far) ** 2 + 0.05 * 4 / far  # the next order, and epsilon/penalty, by which entropy softens
    # kin: between two N(0, 1) the entropic plan's correlation is c (Bunne et al. 2023, theorem 3), s = epsilon / 2
    half = 0.05 * far**2 / 2
    c = (-half + math.sqrt(half**2 + 4)) / 2
    for kin, own, centre in ((plan.descendants, x, shift), (plan.ancestors, x[order], 0.0)):
        error = kin - (centre + c * own)
        # growth of first order tilts the mean, 4 / shift, by what is not followed; a sample's mean and higher moments
        assert float(error.square().sum(1).mean().sqrt()) < 4 / far + 4 / math.sqrt(300)


def test_backwards_in_time_pairs_kin_and_growth_are_turned_round():
    interval = cloud()
    mirrored = Interval(-T1, -T0, interval.x1, interval.x0, interval.mass1, interval.mass0)
    there, back = grown(interval), grown(mirrored)
    for one, other in zip(dense(there, interval), reversed(dense(back, mirrored))):
        torch.testing.assert_close(one, other.T, rtol=0, atol=2e-5 / 60)  # tolerance x penalty/epsilon, of a cell
    torch.testing.assert_close(there.descendants, back.ancestors, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.ancestors, back.descendants, rtol=0, atol=1e-4)


def test_a_snapshot_and_its_copy_do_not_move_or_grow():
    interval = interval_of(cloud().x0, cloud().x0.flip(0))
    plan = grown(interval)
    pairs = plan.pairs
    heavy = pairs.middle > 1e-12
    assert torch.equal(pairs.j[heavy], 59 - pairs.i[heavy])  # itself
    # what rounding allows: an epsilon of 2e-6 of the cost, a kernel a thousandth as wide as the data
    torch.testing.assert_close(pairs.mass1[heavy], pairs.mass0[heavy], rtol=1e-4, atol=0)
    torch.testing.assert_close(plan.descendants, interval.x0, rtol=0, atol=0.01)
    torch.testing.assert_close(plan.ancestors, interval.x1, rtol=0, atol=0.01)


# ---- a prior


def true_rates(n: int) -> Tensor:
    return (TRUE_RATIOS.log() / (T1 - T0)).repeat_interleave(n)


def descendants_masses(interval: Interval, n: int, **options) -> Tensor:
    pairs = grown(interval, **options).pairs
    return sums(pairs.i // n, pairs.mass1, 2)


@pytest.mark.parametrize("block", [40, 3000])
def test_a_prior_says_what_distances_alone_do_not(block):
    n, rise = 100, 60.0
    # what moves by 60 may as well cross a gap of 10: without a prior the weights do not change
    without = descendants_masses(groups(10.0, n=n, rise=rise), n, block=block)
    torch.testing.assert_close(without, torch.tensor([1 / 3, 2 / 3]).double(), rtol=0, atol=0.05)
    known = descendants_masses(groups(10.0, n=n, rise=rise, growth=true_rates(n)), n, block=block)
    # whole, both ends weigh the same: nothing but first-order effects of the shift, 4 x 5 / 60 at a group's centre,
    # move mass between groups, and of that what is cheaper than the gap; in blocks of 40 a group has 20 +- 3 cells
    torch.testing.assert_close(known, torch.tensor([0.5, 0.5]).double(), rtol=0, atol=0.02 if block == 3000 else 0.05)


def test_a_prior_is_relative():
    n = 60
    plain = grown(groups(6.0, n=n, rise=3.0, growth=true_rates(n)))
    for constant in (-100.0, 7.0, 1e4):
        other = grown(groups(6.0, n=n, rise=3.0, growth=true_rates(n) + constant))
        for name in ("mass0", "mass1"):
            a, b = (getattr(p.pairs, name) for p in (other, plain))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)  # rounding of 1e4 x 2.8, times penalty/epsilon
        torch.testing.assert_close(other.descendants, plain.descendants, rtol=0, atol=1e-8)
    none = grown(groups(6.0, n=n, rise=3.0))
    same = grown(groups(6.0, n=n, rise=3.0, growth=torch.full((2 * n,), 0.3).double()))  # all alike: no prior
    torch.testing.assert_close(same.pairs.mass1, none.pairs.mass1, rtol=1e-9, atol=1e-14)


# ---- units


@pytest.mark.parametrize("block", [25, 3000])
def test_units_of_length_and_time_and_their_origins_do_not_matter(block):
    unit, hours, shift = 37.0, 24.0, -300.0
    rates = torch.linspace(-0.5, 0.5, 60, dtype=torch.float64)
    plain = replace(cloud(), growth0=rates)
    x0, x1 = (unit * x + shift for x in (plain.x0, plain.x1))
    scaled = Interval(hours * T0 + 5, hours * T1 + 5, x0, x1, plain.mass0, plain.mass1, rates / hours)
    one, other = (grown(x, block=block) for x in (plain, scaled))
    for a, b in zip(dense(one, plain), dense(other, scaled)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # rounding of 1e-13 in costs, over epsilon
    torch.testing.assert_close(other.descendants, unit * one.descendants + shift, rtol=0, atol=1e-6)
    torch.testing.assert_close(other.ancestors, unit * one.ancestors + shift, rtol=0, atol=1e-6)


# ---- draws


def test_draws_follow_the_mass_at_mid_interval():
    interval = cloud(8, 6)
    interval.mass0[2] = interval.mass1[0] = 0.0
    for mass in (interval.mass0, interval.mass1):
        mass /= mass.sum()
    plan, n = grown(interval), 40_000
    i, j = plan.sample(n, torch.Generator().manual_seed(3))
    counts = np.zeros((8, 6))
    np.add.at(counts, (i.numpy(), j.numpy()), 1)
    middle = (sum(dense(plan, interval)) / 2).numpy()
    assert counts[middle == 0].sum() == 0
    likely = n * middle > 5  # where the chi-square approximation holds; the rest in one
    observed, expected = (np.append(v[likely], v[~likely].sum()) for v in (counts, n * middle))
    if expected[-1] < 5:
        assert observed[-1] < 20  # a Poisson number of mean 5 exceeds 20 once in a million
        observed, expected = observed[:-1], expected[:-1] * (observed[:-1].sum() / expected[:-1].sum())
    assert chisquare(observed, expected).pvalue > 1e-3  # fixed seed: it passes or fails for good
    # masses at the start, of the same pairs, would be found out
    start = dense(plan, interval)[0].numpy()[likely]
    assert chisquare(counts[likely], start * counts[likely].sum() / start.sum()).pvalue < 1e-6


def test_same_generator_same_draws():
    plan = grown(cloud(8, 6))
    first, second, other = (torch.stack(plan.sample(200, torch.Generator().manual_seed(s))) for s in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
