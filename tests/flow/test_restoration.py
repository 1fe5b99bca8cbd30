"""Laws of restorations: their weights, and what the shrinkage controls take away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sctraj.flow.restoration import CONTROLS, Restoration


def test_weights_sum_to_one():
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    assert Restoration(points).weights.tolist() == [1 / 30] * 30
    weights = Restoration(points, torch.arange(30.0).double()).weights
    torch.testing.assert_close(weights, torch.arange(30.0).double() / 435, rtol=1e-15, atol=0)


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]


def uneven(n=60, d=5) -> Restoration:
    """Weighted points with a mean far from zero, of different variances along axes that are not the coordinates'."""
    rng = torch.Generator().manual_seed(3)
    scale = torch.linspace(1, 3, d, dtype=torch.float64)
    points = (torch.randn(n, d, generator=rng, dtype=torch.float64) * scale) @ rotation(d) + 7
    return Restoration(points, torch.rand(n, generator=rng, dtype=torch.float64) + 0.1)


def covariance(restoration: Restoration) -> tuple[Tensor, Tensor]:
    mean = restoration.weights @ restoration.points
    deviation = restoration.points - mean
    return mean, deviation.T @ (restoration.weights[:, None] * deviation)


def test_shrinking_scales_the_covariance_and_keeps_mean_and_masses():
    before = uneven()
    after = CONTROLS["shrunk"](before)
    (mean, spread), (new_mean, new_spread) = covariance(before), covariance(after)
    torch.testing.assert_close(new_mean, mean, rtol=1e-12, atol=0)  # rounding, here and below
    torch.testing.assert_close(new_spread, 0.8**2 * spread, rtol=1e-10, atol=1e-12)
    assert after.mass is before.mass


@pytest.mark.parametrize(("d", "kept"), [(1, 1), (4, 1), (5, 2), (50, 13)])
def test_flattening_keeps_the_first_quarter_of_the_components_rounded_up(d, kept):
    before = uneven(d=d)
    after = CONTROLS["flattened"](before)
    (mean, spread), (new_mean, new_spread) = covariance(before), covariance(after)
    torch.testing.assert_close(new_mean, mean, rtol=1e-10, atol=0)
    variances = torch.linalg.eigvalsh(new_spread).flip(0)
    truth = torch.linalg.eigvalsh(spread).flip(0)
    torch.testing.assert_close(variances[:kept], truth[:kept], rtol=1e-10, atol=0)
    torch.testing.assert_close(variances[kept:], torch.zeros(d - kept).double(), rtol=0, atol=1e-12)
    assert after.mass is before.mass


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_do_not_depend_on_the_axes(name):
    before, turn = uneven(), rotation(5).T
    after = CONTROLS[name](before).points
    turned = CONTROLS[name](Restoration(before.points @ turn, before.mass)).points
    torch.testing.assert_close(turned, after @ turn, rtol=1e-10, atol=1e-12)  # rounding


def test_smoothing_goes_half_way_to_the_mean_of_the_ten_nearest_others():
    before = torch.randn(22, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.arange(22) % 2
    before = before + 100 * groups[:, None]  # two groups of eleven: everyone's ten nearest are the rest of their own
    after = CONTROLS["smoothed"](Restoration(before)).points
    for group in (0, 1):
        own = before[groups == group]
        others = (own.sum(0) - own) / 10
        torch.testing.assert_close(after[groups == group], (own + others) / 2, rtol=1e-12, atol=0)  # rounding
