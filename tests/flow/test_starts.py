"""Laws of where a population is moved from: shares, sides, ends, and how much farther snapshots count."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sctraj.flow.starts import farther_share, origins, reach

FEW = (0.0, 1.0, 4.0, 6.0, 7.0)
MANY = (0.0, 1.0, 4.0, 6.0, 7.0, 7.5, 9.0)
LONG = tuple(float(k) for k in range(15))


@pytest.mark.parametrize("times", [FEW, MANY, LONG], ids=len)
@pytest.mark.parametrize("farther", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("time", [0.5, 1.0, 2.0, 4.0, 5.9, 6.5])
def test_each_side_counts_by_its_nearness_in_time_however_many_share_it(times, time, farther):
    found = origins(times, time, "both", farther=farther)
    moved = [times[origin.snapshot] for origin in found]
    assert time not in moved
    assert len(set(moved)) == len(moved)
    sides = [t for t in reversed(times) if t < time], [t for t in times if t > time]
    nearest = [side[0] for side in sides]
    assert moved[:2] == nearest
    before = sum(origin.share for origin, t in zip(found, moved) if t < time)
    assert before == pytest.approx((nearest[1] - time) / (nearest[1] - nearest[0]), abs=1e-12)
    assert sum(origin.share for origin in found) == pytest.approx(1, abs=1e-12)
    for side in sides:
        own = [(t, origin) for t, origin in zip(moved, found) if t in side]
        most = min(len(side), reach(len(times))) if farther else 1
        assert [t for t, _ in own] == side[:most]
        assert [origin.gaps for _, origin in own] == list(range(1, most + 1))
        for (_, near), (_, far) in pairwise(own):
            assert far.share == pytest.approx(farther * near.share, abs=1e-12)


def test_of_longer_courses_more_snapshots_are_moved():
    assert [reach(n) for n in (2, 6, 7, 14, 15, 22, 100)] == [1, 1, 2, 2, 3, 3, 3]


def test_who_hardly_counts_stays_where_it_is():
    assert [o.gaps for o in origins(LONG, 7.5, "both", farther=0.3)] == [1, 1, 2, 2, 3, 3]
    assert [o.gaps for o in origins(LONG, 7.5, "both", farther=0.1)] == [1, 1, 2, 2]  # the third would have a hundredth
    found = origins(LONG, 7.5, "both", farther=0.04)
    assert [(o.snapshot, o.share) for o in found] == [(7, 0.5), (8, 0.5)]


def test_at_the_ends_of_the_course_the_nearest_has_all_of_its_side():
    found = origins(MANY, 0.25, "both", farther=1.0)
    assert [(o.snapshot, o.share) for o in found] == [(0, 0.75), (1, 0.125), (2, 0.125)]
    found = origins(MANY, 8.25, "both", farther=1.0)
    assert [(o.snapshot, o.share) for o in found] == [(5, 0.25), (6, 0.5), (4, 0.25)]


def test_of_few_snapshots_and_without_farther_ones_there_are_the_neighbours_alone():
    for times, farther in ((FEW, 1.0), (MANY, 0.0)):
        assert [(o.snapshot, o.share) for o in origins(times, 2.5, "both", farther=farther)] == [(1, 0.5), (2, 0.5)]


@pytest.mark.parametrize(("time", "snapshot"), [(0.5, 0), (2.0, 1), (4.0, 1), (9.5, 6)])
def test_the_snapshot_before_is_alone(time, snapshot):
    assert origins(MANY, time, "before", farther=1.0) == [(snapshot, 1.0, 1)]


@pytest.mark.parametrize(("time", "start"), [(0.0, "before"), (-1.0, "both"), (9.0, "both"), (10.0, "both")])
def test_a_side_without_snapshots_is_refused(time, start):
    with pytest.raises(ValueError, match="expected a time with a snapshot before it"):
        origins(MANY, time, start, farther=0.0)


def test_noise_makes_farther_ones_count_where_it_can_be_told():
    assert farther_share(7, 0.25) == 0.75
    assert farther_share(7, 1.0) == 0.0
    assert farther_share(6, 0.25) == 0.0
    assert farther_share(7, None) == 0.0
