"""Laws of the cells' velocities at their snapshots (straight courses, circles, turning points, units), and of turns."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sctraj.flow.coupling import GrowingPlan, WeightedPairs, growing
from sctraj.flow.plans import Plans
from sctraj.flow.problem import make_problems
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.tangents import reliability, tangents, velocities

TIMES = (0.5, 1.5, 4.5, 5.0)


def spread(n=20, d=2, seed=0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def course(at, times=TIMES, n=20) -> tuple[Snapshots, list[GrowingPlan]]:
    """Cells whose place at time t is ``at(t)`` ``(n, d)``, and who their kin are: themselves."""
    points = tuple(at(t) for t in times)
    each, mass = torch.arange(len(points[0])), torch.full((len(points[0]),), 1 / len(points[0]), dtype=torch.float64)
    pairs = WeightedPairs(each, each, mass, mass)
    plans = [GrowingPlan(pairs, descendants=later, ancestors=earlier) for earlier, later in pairwise(points)]
    return Snapshots(times, points), plans


def inner(at, times=TIMES) -> list[Tensor]:
    first, *found, last = velocities(*course(at, times))
    assert first is None
    assert last is None
    return found


def circle(speed: float, radius=3.0):
    """Cells all round a circle, and their velocity at time t."""
    start = torch.linspace(0, 6, 20, dtype=torch.float64)

    def at(t: float) -> Tensor:
        angle = start + speed * t
        return radius * torch.stack([angle.cos(), angle.sin()], 1)

    def velocity(t: float) -> Tensor:
        return speed * at(t) @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

    return at, velocity


def test_a_straight_course_has_its_velocity_whatever_the_gaps():
    start, velocity = spread(), spread(seed=1)  # each cell its own
    for found in inner(lambda t: start + velocity * t):
        torch.testing.assert_close(found, velocity, rtol=1e-12, atol=1e-12)  # rounding


def test_on_a_straight_course_the_speed_is_the_geometric_mean_of_slow_and_fast():
    start, direction = spread(), torch.nn.functional.normalize(spread(seed=1))
    distance = dict(zip(TIMES, (0.0, 1.0, 28.0, 29.0)))  # speeds of 1, 9 and 2
    for found, speed in zip(inner(lambda t: start + direction * distance[t]), (3.0, math.sqrt(18))):
        torch.testing.assert_close(found, speed * direction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turn", [0.1, 0.7, 1.5])  # radians a gap; beyond 1.59 the speed is taken off
def test_uniform_circular_motion_over_even_gaps_has_its_tangent_and_the_speed_of_its_chords(turn):
    at, velocity = circle(turn / 2)
    times = (0.0, 2.0, 4.0, 6.0)
    chord = 2 * 3.0 * math.sin(turn / 2) / 2  # a gap of 2
    for t, found in zip(times[1:], inner(at, times)):
        # by symmetry; rounding. The mean of both chords is shorter by cos(turn/2): by a quarter at 1.5
        truth = chord * torch.nn.functional.normalize(velocity(t))
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_over_uneven_gaps_the_direction_is_tangential_to_third_order():
    def error(speed: float) -> float:
        at, velocity = circle(speed)
        worst = 0.0
        for t, found in zip((1.0, 4.0), inner(at, (0.0, 1.0, 4.0, 4.5))):
            cosine, sine = (torch.nn.functional.normalize(v) for v in (velocity(t), at(t)))
            worst = max(worst, float(torch.atan2((found * sine).sum(1), (found * cosine).sum(1)).abs().max()))
        return worst

    # a parabola's direction: halving the angles takes off 2^3; weights of the gaps the wrong way round: first order
    assert error(0.2) / error(0.1) == pytest.approx(8, rel=0.05)  # the next order, (0.6/2)^2 / 4 = 2%


def test_at_a_turning_point_the_speed_goes_to_zero():
    start, out = spread(), spread(seed=1)
    (still,) = inner(lambda t: start + out * (1 - abs(t - 1)), (0.0, 1.0, 2.0))  # there and back over even gaps
    torch.testing.assert_close(still, torch.zeros_like(out), rtol=0, atol=1e-12)
    # nearly there and back, by an angle short of a half turn: speed falls in proportion, without a jump
    speeds = []
    for angle in (0.02, 0.01):
        rotation = torch.tensor(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        places = {0.0: start, 1.0: start + out, 2.0: start + out - out @ rotation}
        (found,) = inner(places.__getitem__, (0.0, 1.0, 2.0))
        speeds.append(found.norm(dim=1) / out.norm(dim=1))
    torch.testing.assert_close(speeds[0] / speeds[1], torch.full((20,), 2.0).double(), rtol=1e-3, atol=0)  # sin: 4e-5
    # over uneven gaps it keeps the nearer side's direction, and never more than the geometric mean of both speeds
    sides = inner(lambda t: start + out * (-1) ** TIMES.index(t))  # gaps of 1, 3 and 0.5
    for found, nearer, product in zip(sides, (-1, -1), (1 * 3, 3 * 0.5)):
        assert bool((found.norm(dim=1) <= (1 + 1e-12) * 2 * out.norm(dim=1) / math.sqrt(product)).all())
        torch.testing.assert_close(*(torch.nn.functional.normalize(v) for v in (found, nearer * out)))


def test_cells_that_do_not_move_have_no_velocity():
    start, velocity = spread(), spread(seed=1)
    for found in inner(lambda t: start):
        assert torch.equal(found, torch.zeros_like(start))
    for found in inner(lambda t: start + velocity * max(0.0, t - TIMES[1]), TIMES[:3]):  # at rest until the second
        assert float(found.abs().max()) < 1e-100


def test_units_time_and_axes_do_not_matter():
    def at(t: float) -> Tensor:
        return torch.sin(spread() + t * spread(seed=1)) + t

    unit, hours, delay = 37.0, 24.0, 100.0
    quarter = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    other_times = tuple(hours * t + delay for t in TIMES)
    other = inner(lambda t: unit * at((t - delay) / hours) @ quarter - 40, other_times)
    for plain, scaled in zip(inner(at), other, strict=True):
        torch.testing.assert_close(scaled, unit / hours * plain @ quarter, rtol=1e-9, atol=1e-9)  # rounding
    back = inner(lambda t: at(-t), tuple(-t for t in reversed(TIMES)))
    for plain, reverse in zip(inner(at), reversed(back), strict=True):
        torch.testing.assert_close(reverse, -plain, rtol=1e-12, atol=1e-12)  # backwards in time


def test_single_precision_stays_and_is_computed_in_double():
    at = circle(0.3)[0]
    snapshots, plans = course(at)
    single = Snapshots(snapshots.times, tuple(x.float() for x in snapshots.points))
    for k in (1, 2):
        found, truth = velocities(single, plans)[k], velocities(snapshots, plans)[k]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)  # rounding of the cells, over 0.5


def test_two_snapshots_have_no_inner_ones():
    snapshots, plans = course(lambda t: spread() + t, (0.0, 1.0))
    assert velocities(snapshots, plans) == (None, None)


def together(turn: float, radius=3.0):
    """Cells that all move alike, round a circle, by ``turn`` per unit of time."""
    cells, centre = spread(), circle(turn, radius)[0]
    return lambda t: cells + centre(t)[:1]


def along_arcs(at, times, reliability=1.0) -> tuple[Tensor | None, ...]:
    snapshots, plans = course(at, times)
    return tangents(snapshots, plans, plans, reliability, arcs=True).velocities


@pytest.mark.parametrize("turn", [0.3, 1.5])
def test_along_an_arc_a_population_that_turns_does_not_cut_the_corner(turn):
    at, times = together(turn), (0.0, 1.0, 2.0, 3.0)
    _, v0, v1, _ = along_arcs(at, times)
    half_way = (at(1.0) + at(2.0)) / 2 + (v0 - v1) / 8  # of a cubic with these velocities over a gap of 1
    torch.testing.assert_close(half_way, at(1.5), rtol=1e-12, atol=1e-12)  # rounding
    torch.testing.assert_close(v0.norm(dim=1), v0.new_full((20,), 3 * 4 * math.tan(turn / 4)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_arcs_are_as_long_as_turns_are_reliable(share):
    times = (0.0, 1.0, 2.0)
    _, chords, _ = velocities(*course(together(1.5), times))
    _, found, _ = along_arcs(together(1.5), times, share)
    factor = 2 * math.tan(share * 1.5 / 4) / math.sin(share * 1.5 / 2) if share else 1.0
    torch.testing.assert_close(found, factor * chords, rtol=1e-12, atol=1e-12)


def test_cells_that_do_not_move_together_have_no_arc_in_common():
    at, times = (
        circle(1.0)[0],
        (0.0, 1.0, 2.0, 3.0),
    )  # all round the circle, of which 20 cells from 0 to 6 miss a little
    for chords, found in zip(velocities(*course(at, times))[1:-1], along_arcs(at, times)[1:-1]):
        assert bool((found.norm(dim=1) < 1.01 * chords.norm(dim=1)).all())
    still = spread() - spread().mean(0)
    _, found, _ = along_arcs(lambda t: still * (1 + t), (0.0, 1.0, 2.0))  # a burst: no mean at all
    torch.testing.assert_close(found, still, rtol=1e-6, atol=1e-6)


def test_of_cells_half_of_which_rest_half_of_the_root_of_the_squares_turns():
    turn, times = 1.0, (0.0, 1.0, 2.0)
    moving = (torch.arange(20) % 2)[:, None]
    at = together(turn)
    _, found, _ = along_arcs(lambda t: at(0.0) + moving * (at(t) - at(0.0)), times)
    # the mean is half of a speed, the root mean square a speed over the root of 2, before and after alike
    angle = turn / math.sqrt(2)
    speed = 2 * math.tan(angle / 4) / math.sin(angle / 2) * 2 * 3.0 * math.sin(turn / 2)
    expected = torch.where(moving[:, 0] > 0, speed, 0.0)
    torch.testing.assert_close(found.norm(dim=1), expected.double(), rtol=1e-6, atol=1e-9)


def test_cells_at_rest_stay_at_rest_along_arcs():
    _, found, _ = along_arcs(lambda t: spread(), (0.0, 1.0, 2.0))
    assert torch.equal(found, torch.zeros_like(found))


def test_in_a_moving_frame_speeds_are_along_arcs():
    same = {"method": "uot-cfm", "path": None, "sigma": None, "seeds": (0,), "validate": False}
    at = together(1.0)
    snapshots = Snapshots(tuple(range(5)), tuple(at(float(t)) for t in range(5)))
    speed = {}
    for frame in ("fixed", "moving"):
        (problem,), _ = make_problems(snapshots, plans=Plans(frame=frame), **same)
        speed[frame] = float(problem.tangents.velocities[2].mean(0).norm())
    assert speed["fixed"] < 3 * 2 * math.sin(0.5) < 3 < speed["moving"] < 3 * 4 * math.tan(0.25)  # chord, arc, cubic


def test_a_population_that_drifts_far_has_the_drifts_velocity():
    drift, times, n = torch.tensor([40.0, -30.0], dtype=torch.float64), (0.0, 1.0, 3.5, 4.0), 150
    snapshots = Snapshots(times, tuple(spread(n, seed=seed) + drift * t for seed, t in enumerate(times)))
    plans = [growing(interval, torch.Generator()) for interval in snapshots.intervals()]
    for found in velocities(snapshots, plans)[1:-1]:
        # kin are means over a kernel as wide as a snapshot: a cell's place in its snapshot, over the shorter gap,
        # three deviations of 1 / 0.5 against a speed of 50, and growth of first order, 4 / shift (see test_growing)
        assert float((found - drift).norm(dim=1).max()) < 3 / 0.5 * math.sqrt(2) + 1
        torch.testing.assert_close(found.mean(0), drift, rtol=0, atol=0.02 * 50)


# ---- which turns to trust

UNEVEN = (0.0, 2.0, 2.5, 4.0, 5.0, 5.5, 7.0)


def accelerated(times, accelerations) -> list[Tensor]:
    """Places at the times, from rest, whose second differences over these gaps are what is given, ``(T - 2, d)``."""
    places, velocity = [torch.zeros_like(accelerations[0])] * 2, torch.zeros_like(accelerations[0])
    for (t0, t1, t2), acceleration in zip(zip(times, times[1:], times[2:]), accelerations):
        velocity = velocity + acceleration * (t2 - t0) / 2
        places.append(places[-1] + velocity * (t2 - t1))
    return places


def shifted(times, *, own: float, noise: float, d=4000, seed=0) -> float:
    """Reliability where the cells share a course of independent accelerations, and each snapshot has noise of its own.

    In many dimensions, so that correlations are what they are expected to be.
    """
    rng = torch.Generator().manual_seed(seed)
    steps = own * torch.randn(len(times) - 2, d, generator=rng, dtype=torch.float64)
    offsets = noise * torch.randn(len(times), d, generator=rng, dtype=torch.float64)
    places = dict(zip(times, (place + offset for place, offset in zip(accelerated(times, steps), offsets))))
    return reliability(*course(lambda t: places[t] + spread(3, d), times, n=3))


def test_turns_that_come_and_go_with_single_snapshots_are_noise():
    # where gaps take turns neighbouring accelerations of noise have less in common than over even ones
    for times in (UNEVEN, tuple(range(6)), (0.0, 1.0, 4.0, 5.0, 8.0, 9.0)):
        # correlations of 4,000 dimensions: .016 each, over -2/3, and no fewer than three of them
        assert shifted(times, own=0.0, noise=1.0) < 0.03
        assert shifted(times, own=1.0, noise=0.0) > 0.97


@pytest.mark.parametrize("noise", [0.2, 0.4, 0.8])
def test_the_share_of_noise_among_turns_is_found(noise):
    # over even gaps of 1: noise has a second difference of variance 6, accelerations are of variance 1
    truth = 1 / (1 + 6 * noise**2)
    assert shifted(tuple(range(7)), own=1.0, noise=noise) == pytest.approx(truth, abs=0.04)


def test_a_course_that_lasts_is_trusted():
    assert reliability(*course(lambda t: spread())) == 1  # at rest
    assert reliability(*course(lambda t: spread() + t * spread(seed=1) + t**2 * spread(seed=2))) == 1
    at, _ = circle(1.0)
    assert reliability(*course(at, (0.0, 1.0, 2.0, 3.0, 4.0))) == 1  # a radian a gap
    # a quarter turn and more: what was one way is the other a gap later, as noise would have it
    assert 0 < reliability(*course(circle(2.0)[0], (0.0, 1.0, 2.0, 3.0, 4.0))) < 1


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 1.0, 3.0)])
def test_with_fewer_than_two_interior_snapshots_there_is_nothing_to_go_by(times):
    assert reliability(*course(lambda t: spread(seed=int(t)), times)) == 1


def test_units_time_axes_and_direction_do_not_matter_to_reliability():
    places = {t: spread(seed=k) + 0.1 * t**2 for k, t in enumerate(UNEVEN)}
    quarter = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    plain = reliability(*course(places.__getitem__, UNEVEN))
    assert 0.1 < plain < 0.9
    for hours in (24.0, -1.0):
        times = sorted(hours * t + 100 for t in UNEVEN)
        moved = {hours * t + 100: 37 * x @ quarter - 40 for t, x in places.items()}
        assert reliability(*course(moved.__getitem__, tuple(times))) == pytest.approx(plain, rel=1e-9)  # rounding


def test_what_cells_do_beside_their_population_is_no_noise():
    out = spread(seed=1)
    out -= out.mean(0)  # there and back, each cell its own way: the population stays
    turn = torch.tensor([0.1, -0.2], dtype=torch.float64)
    places = {t: spread() + turn * t**2 + out * (-1) ** k for k, t in enumerate(UNEVEN)}
    assert reliability(*course(places.__getitem__, UNEVEN)) == 1


def jittered(d: int) -> Snapshots:
    """A drift, and samples that are off as a whole."""
    shifts = 3 * torch.randn(5, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Snapshots(tuple(range(5)), tuple(spread(60, d, seed=k) + 6 * k + shifts[k] for k in range(5)))


@pytest.mark.parametrize("method", ["uot-cfm", "ot-cfm", "i-cfm"])
def test_the_population_turns_as_far_as_is_reliable_and_cells_beside_it_as_they_do(method):
    (problem,), _ = make_problems(jittered(2), method=method, path="hermite", sigma=None, seeds=(0,), validate=False)
    intervals, bent = problem.snapshots.intervals(), problem.tangents
    plans = [growing(interval, torch.Generator()) for interval in intervals]
    assert bent.reliability == reliability(problem.snapshots, plans)  # by places alone
    for k, interval in enumerate(intervals):
        i, j = (rows.reshape(-1) for rows in torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij"))
        mass = torch.full((3600,), 1 / 3600, dtype=torch.float64)  # independent: all pairs alike
        if method != "i-cfm":
            pairs = problem.listed(k)
            i, j, mass = pairs.i, pairs.j, pairs.middle
        chord = (interval.x1[j] - interval.x0[i]) / interval.length
        for share in (1.0, 0.25):
            both = replace(bent, reliability=share).at(k, i, j, chord)
            for end, (velocity, rows) in enumerate(zip(bent.velocities[k : k + 2], (i, j))):
                own = (chord if velocity is None else velocity[rows]) - chord
                mean = mass @ own
                expected = own - mean + share * mean
                torch.testing.assert_close(both[end] - chord, expected, rtol=0, atol=1e-9)  # rounding
                torch.testing.assert_close(bent.turns[k][end], mean, rtol=0, atol=1e-9)
                assert (float(mean.norm()) > 0.1) == (velocity is not None)


def test_paths_turn_as_far_as_the_cells_to_train_on_bear_it():
    same = {"sigma": None, "seeds": (0,)}
    (problem,), _ = make_problems(jittered(40), method="uot-cfm", path=None, validate=False, **same)
    plans = [growing(interval, torch.Generator()) for interval in problem.snapshots.intervals()]
    assert problem.tangents.reliability == reliability(problem.snapshots, plans)  # not of pairs chosen to turn alike
    assert problem.tangents.reliability < 0.35  # two correlations of 40 dimensions: .16 each, over -2/3
    (train,), (held_back,) = make_problems(jittered(40), method="ot-cfm", path="hermite", validate=True, **same)
    assert held_back.tangents.reliability == train.tangents.reliability < 0.35
    assert not torch.equal(held_back.tangents.turns[0][1], train.tangents.turns[0][1])  # of its own cells
    (straight,), _ = make_problems(jittered(40), method="ot-cfm", path=None, validate=False, **same)
    assert straight.tangents is None
