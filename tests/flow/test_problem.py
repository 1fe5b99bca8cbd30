"""Laws of what a fit is given by default: how wide paths are, how far velocities tell, how many pairs are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sctraj.flow.coupling import GrowingPlan
from sctraj.flow.plans import Plans
from sctraj.flow.problem import default_sigma, displacement, make_problems
from sctraj.flow.snapshots import Snapshots


def cells(n: int, seed: int, d=2) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("method", "expected"), [("ot-cfm", 0.3), ("uot-cfm", 0.3), ("sb-cfm", 0.9 / 2)])
def test_sigma_is_a_tenth_of_the_displacement_and_a_bridges_three_tenths_per_root_of_the_gap(method, expected):
    x = cells(20, 0, d=3)
    assert default_sigma(Snapshots((0.0, 4.0), (x, x + 3)), method, Plans()) == pytest.approx(expected)


def test_where_nothing_moves_a_bridge_has_no_sigma_by_default():
    x = cells(20, 0)
    with pytest.raises(ValueError, match="snapshots that differ, to take the sigma of sb-cfm from"):
        default_sigma(Snapshots((0.0, 1.0), (x, x.clone())), "sb-cfm", Plans())


def test_a_score_is_measured_in_a_bridges_largest_standard_deviation():
    x = cells(20, 0)
    snapshots = Snapshots((0.0, 1.0, 7.0), (x, x + 1, x + 2))
    for method, expected in (("sb-cfm", 2.0 * math.sqrt(3.5) / 2), ("ot-cfm", 0.0)):
        made, _ = make_problems(snapshots, method=method, path=None, sigma=2.0, seeds=[0], validate=False)
        assert made[0].std == pytest.approx(expected)  # sigma sqrt(s (1 - s) gap), half-way


def test_cells_without_weight_are_no_part_of_the_displacement_of_large_snapshots():
    x = torch.cat([cells(600, 0), cells(600, 1) + 1000])
    y = torch.cat([x[:600] + 3, x[600:]])
    snapshots = Snapshots((0.0, 1.0), (x, y), 2 * (torch.arange(1200) < 600,))
    assert displacement(snapshots, Plans()) == pytest.approx(3)


def test_velocities_fade_over_an_interval_beside_a_very_short_one_on_either_side():
    asked = set()

    class Watched(Plans):
        def by_velocity(self, plan, interval, velocity0, velocity1, time, *, kin_alone) -> GrowingPlan:
            asked.add((interval.t0, time))
            return super().by_velocity(plan, interval, velocity0, velocity1, time, kin_alone=kin_alone)

    times = (0.0, 1.0, 1.01, 2.0)
    snapshots = Snapshots(times, tuple(cells(8, k) for k in range(4)))
    make_problems(
        snapshots, method="uot-cfm", path=None, sigma=0.1, seeds=[0], validate=False, plans=Watched()
    )  # fmt: skip
    # over (8 g)^2 / h, by the gap g beside the length h; the short one itself has its own length
    assert dict(asked) == pytest.approx({0.0: 0.08**2, 1.0: 0.01, 1.01: 0.08**2 / 0.99})
    assert len(asked) == 3


def test_where_a_coupling_lists_no_pairs_four_a_cell_are_drawn():
    snapshots = Snapshots((0.0, 1.0), (cells(7, 0), cells(9, 1)))
    (one,), _ = make_problems(snapshots, method="i-cfm", path=None, sigma=0.1, seeds=[0], validate=False)
    assert len(one.listed(0).i) == 4 * (7 + 9)
