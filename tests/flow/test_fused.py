"""Sums in one pass, on a CUDA device, or in Triton's interpreter where Triton is installed without one."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

from sctraj.flow.coupling import entropic, kernel, unbalanced
from sctraj.flow.snapshots import Interval

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before it is imported


@pytest.fixture
def fused(monkeypatch):
    """Kernels that do not fit are fused, wherever they are, in float32 whatever the rounding."""
    monkeypatch.setattr(kernel, "WHOLE", 20)
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
    monkeypatch.setattr(kernel, "WHOLE", 2**24)
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
