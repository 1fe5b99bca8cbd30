"""Laws of the cells' velocities at their snapshots: straight courses, circles, turning points, units."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sctraj.flow.coupling import GrowingPlan, WeightedPairs, growing
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.tangents import tangents

TIMES = (0.5, 1.5, 4.5, 5.0)
NONE = torch.zeros(0)
EMPTY = WeightedPairs(NONE.long(), NONE.long(), NONE, NONE)


def spread(n=20, d=2, seed=0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def course(at, times=TIMES, n=20) -> tuple[Snapshots, list[GrowingPlan]]:
    """Cells whose place at time t is ``at(t)`` ``(n, d)``, and who their kin are: themselves."""
    points = tuple(at(t) for t in times)
    plans = [GrowingPlan(EMPTY, descendants=later, ancestors=earlier) for earlier, later in pairwise(points)]
    return Snapshots(times, points), plans


def inner(at, times=TIMES) -> list[Tensor]:
    first, *found, last = tangents(*course(at, times))
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
        found, truth = tangents(single, plans)[k], tangents(snapshots, plans)[k]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)  # rounding of the cells, over 0.5


def test_two_snapshots_have_no_inner_ones():
    snapshots, plans = course(lambda t: spread() + t, (0.0, 1.0))
    assert tangents(snapshots, plans) == (None, None)


def test_a_population_that_drifts_far_has_the_drifts_velocity():
    drift, times, n = torch.tensor([40.0, -30.0], dtype=torch.float64), (0.0, 1.0, 3.5, 4.0), 150
    snapshots = Snapshots(times, tuple(spread(n, seed=seed) + drift * t for seed, t in enumerate(times)))
    plans = [growing(interval, torch.Generator()) for interval in snapshots.intervals()]
    for found in tangents(snapshots, plans)[1:-1]:
        # kin are means over a kernel as wide as a snapshot: a cell's place in its snapshot, over the shorter gap,
        # three deviations of 1 / 0.5 against a speed of 50, and growth of first order, 4 / shift (see test_growing)
        assert float((found - drift).norm(dim=1).max()) < 3 / 0.5 * math.sqrt(2) + 1
        torch.testing.assert_close(found.mean(0), drift, rtol=0, atol=0.02 * 50)
