"""Sums in one pass, on a CUDA device, or in Triton's interpreter where Triton is installed without one."""

from __future__ import annotations

import importlib.util
import math
import os
from importlib import metadata

import pytest
import torch

from sctraj.flow.coupling import entropic, kernel, unbalanced
from sctraj.flow.snapshots import Interval

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE.type == "cpu":
    version, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if version < (3, 7) and numpy >= (2, 4):
        pytest.skip("this Triton's interpreter does not know this NumPy", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"  # before it is imported


@pytest.fixture
def fused(monkeypatch):
    """Kernels that do not fit are fused, wherever they are, in float32 whatever the rounding."""
    monkeypatch.setattr(kernel, "MOST_KEPT", 20)
    monkeypatch.setattr(kernel.Kernel, "_fused", lambda self, epsilon: self.kept is None)


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("n", [3, 201, 1025])
@pytest.mark.parametrize("d", [1, 5, 8, 9, 50])
def test_sums_are_those_of_the_whole_matrix(d, n, valued):
    from sctraj.flow.coupling.fused import row_sums

    rng = torch.Generator().manual_seed(d)
    x, y, weight, values = (torch.randn(*s, generator=rng).double() for s in ((130, d), (n, d), (n,), (n,)))
    weight[1], values[2] = -math.inf, 0.0
    exponent = 3 * weight + x @ y.T
    expected = exponent.exp() @ (values if valued else torch.ones_like(values))
    given = (v.to(DEVICE) for v in (x, y, 3 * weight))
    largest, total = row_sums(*given, values.to(DEVICE) if valued else None)
    found = (total * (largest - exponent.amax(1).to(DEVICE)).exp()).cpu() * exponent.amax(1).exp()
    scale = exponent.exp() @ values.abs() if valued else expected
    size = float(exponent[exponent > -math.inf].abs().max())
    assert float(((found - expected) / scale).abs().max()) < 1e-6 * (5 + size)


def two(n: int, m: int, d: int) -> Interval:
    rng = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(n, d, generator=rng).double(), torch.randn(m, d, generator=rng).double() + 1
    mass0, mass1 = (torch.rand(k, generator=rng).double() + 0.1 for k in (n, m))
    return Interval(0.0, 1.0, x0, x1, mass0 / mass0.sum(), mass1 / mass1.sum())


@pytest.mark.parametrize("d", [2, 12])
def test_plans_are_those_of_a_kernel_that_is_kept(monkeypatch, fused, d):
    interval = two(90, 70, d)
    found = [
        entropic(interval, epsilon=0.5, tolerance=1e-5, device=DEVICE),
        unbalanced(interval, epsilon=0.5, penalty=3.0, tolerance=1e-5, device=DEVICE),
    ]
    monkeypatch.setattr(kernel, "MOST_KEPT", 2**24)
    expected = [
        entropic(interval, epsilon=0.5, tolerance=1e-8),
        unbalanced(interval, epsilon=0.5, penalty=3.0, tolerance=1e-8),
    ]
    for one, other in zip(found, expected):
        assert float((one.matrix().cpu() - other.matrix()).abs().sum()) < 1e-4


@pytest.mark.parametrize("d", [2, 12])
def test_plans_as_linear_maps_are_those_of_tiles(monkeypatch, fused, d):
    from sctraj.flow.coupling.fused import ROUNDING

    interval = two(60, 80, d)
    ends = [v.to(DEVICE) for v in (interval.x0, interval.x1, interval.mass0.log(), interval.mass1.log())]
    rng = torch.Generator().manual_seed(2)
    f, g, v, weight = (torch.rand(k, generator=rng).double().to(DEVICE) for k in (60, 80, 80, 60))
    one = kernel.Kernel(*ends).plan(f, g, 0.7)
    assert isinstance(one, kernel.FusedPlan)
    monkeypatch.setattr(kernel.Kernel, "_fused", lambda self, epsilon: False)
    other = kernel.Kernel(*ends).plan(f, g, 0.7)
    rounding = ROUNDING * one.kernel.largest_cost / 0.7
    torch.testing.assert_close(one.columns(weight), other.columns(weight), rtol=rounding, atol=0)
    both = (plan.there_and_back(v, weight) for plan in (one, other))
    torch.testing.assert_close(*both, rtol=2 * rounding, atol=0)


def test_more_coordinates_than_fit_are_left_to_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "MOST_KEPT", 20)
    monkeypatch.setattr(kernel, "_fuses", lambda device: True)
    made = {}
    for d in (64, 65):
        interval = two(6, 7, d)
        made[d] = kernel.Kernel(interval.x0, interval.x1, interval.mass0.log(), interval.mass1.log())
        assert not made[d]._fused(1e6)  # nothing may be rounded yet
        made[d].rounding = 1e-2
    assert made[64]._fused(1e6)
    assert not made[64]._fused(1e-6)
    assert not made[65]._fused(1e6)


def test_cells_without_mass_add_nothing():
    from sctraj.flow.coupling.fused import row_sums

    ends = [torch.zeros(n, 2, dtype=torch.float64, device=DEVICE) for n in (3, 5)]
    weight = torch.full((5,), -math.inf, dtype=torch.float64, device=DEVICE)
    assert float(row_sums(*ends, weight)[1].abs().max()) == 0
    weight[4] = 0.5
    largest, total = row_sums(*ends, weight)
    torch.testing.assert_close(largest + total.log(), torch.full_like(largest, 0.5), rtol=0, atol=1e-6)
