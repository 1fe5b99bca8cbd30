"""Optimal plans over a short list of pairs: they are those among all, or there is none."""

from __future__ import annotations

import sys

import numpy as np
import ot
import pytest
import torch

from sctraj.flow.coupling import optimal_plan, shortlist
from sctraj.flow.coupling.shortlist import shortlisted


def problem(law, weights, p, n=150, m=110):
    """Costs between two clouds, and masses."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    if law == "far":
        y = 0.5 * y + 10
    if law == "line":
        x, y = x * [1, 0, 0], y * [1, 0, 0]
    if law == "clusters":  # that differ in mass, so that much has to go from one to the other
        x, y = x + [50, 0, 0] * (rng.random((n, 1)) < 0.3), y + [50, 0, 0] * (rng.random((m, 1)) < 0.7)
    if law == "ties":
        x, y = x.round(), y.round()
    cost = np.linalg.norm(x[:, None] - y, axis=-1) ** p
    a, b = (np.ones(k) if weights == "equal" else rng.exponential(size=k) ** 3 + 1e-6 for k in (n, m))
    return tuple(torch.from_numpy(v) for v in (cost, a / a.sum(), b / b.sum()))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weights", ["equal", "uneven"])
@pytest.mark.parametrize("law", ["near", "far", "line", "clusters", "ties"])
def test_the_plan_is_optimal_among_all_pairs(monkeypatch, law, weights, p):
    monkeypatch.setattr(shortlist, "PAIRS", 3)  # so that pairs have to be added
    monkeypatch.setattr(shortlist, "ROUNDS", 30)
    cost, a, b = problem(law, weights, p)
    i, j, mass = shortlisted(cost, a, b)
    truth = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    assert float(mass @ cost[i, j]) == pytest.approx(truth, rel=1e-10)  # what is proven, and rounding
    for index, marginal in ((i, a), (j, b)):
        torch.testing.assert_close(torch.zeros_like(marginal).index_add_(0, index, mass), marginal, rtol=0, atol=1e-12)
    assert len(mass) < len(a) + len(b)
    assert (np.diff(i.numpy() * len(b) + j.numpy()) > 0).all()  # row by row, none twice


def test_equal_numbers_of_equal_cells_are_matched():
    cost, a, b = problem("near", "equal", 1, n=90, m=90)
    i, j, mass = shortlisted(cost, a, b)
    plan = ot.emd(a.numpy(), b.numpy(), cost.numpy())
    np.testing.assert_array_equal(np.nonzero(plan), np.stack([i, j]))
    np.testing.assert_array_equal(plan[i, j], mass)


def test_a_plan_that_is_not_proven_is_none(monkeypatch):
    monkeypatch.setattr(shortlist, "PAIRS", 1)
    monkeypatch.setattr(shortlist, "ROUNDS", 1)
    assert shortlisted(*problem("clusters", "uneven", 1)) is None


@pytest.mark.parametrize("proven", [True, False])
def test_large_plans_are_those_of_all_pairs(monkeypatch, proven):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 3, generator=rng), torch.randn(60, 3, generator=rng)
    a, b = torch.rand(80, generator=rng).double(), torch.rand(60, generator=rng).double()
    a[3:9] = b[:7] = 0
    truth = optimal_plan(x, y, a, b, p=1)
    module = sys.modules[optimal_plan.__module__]  # the package has a function of its name
    monkeypatch.setattr(module, "SMALLEST", 0)
    if not proven:
        monkeypatch.setattr(module, "shortlisted", lambda *_: None)
    found = optimal_plan(x, y, a, b, p=1)
    assert torch.equal(found.i, truth.i)
    assert torch.equal(found.j, truth.j)
    torch.testing.assert_close(found.mass, truth.mass, rtol=1e-9, atol=1e-15)
    assert found.cost == pytest.approx(truth.cost, rel=1e-12)
