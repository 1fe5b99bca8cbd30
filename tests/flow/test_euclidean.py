"""Distances in many dimensions come from products, and lose nothing by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from sctraj.flow import euclidean
from sctraj.flow.euclidean import distances


def clouds(d, *, shift=0.0):
    """60 and 50 points; of the second ten are at, and ten close to, points of the first, all at other distances."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, d)) + shift
    y = rng.normal(size=(50, d)) + shift
    y[:10] = x[:10]
    y[10:20] = x[10:20] + np.geomspace(1e-9, 1e-1, 10)[:, None]
    return x, y


@pytest.mark.parametrize("d", [5, 50])
@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("gathered", [1, 2**22])
def test_distances_are_right_to_the_last_digits_however_near_and_wherever(monkeypatch, d, shift, gathered):
    monkeypatch.setattr(euclidean, "GATHERED", gathered)
    x, y = clouds(d, shift=shift)
    found = distances(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    np.testing.assert_allclose(found, cdist(x, y), rtol=1e-11)
    assert (found[range(10), range(10)] == 0).all()


def test_points_far_from_all_cost_the_others_no_digit_and_no_time(monkeypatch):
    x, y = clouds(50)
    x[0], y[-1] = 1e6 * x[0], 1e7 * y[-1]
    true = cdist(x, y)
    monkeypatch.setattr(euclidean, "_by_differences", None)
    np.testing.assert_allclose(distances(torch.from_numpy(x), torch.from_numpy(y)), true, rtol=1e-11)


def test_products_alone_would_lose_them(monkeypatch):
    monkeypatch.setattr(euclidean, "NEAR", -1.0)
    x, y = clouds(50)
    found, true = distances(torch.from_numpy(x), torch.from_numpy(y)).numpy(), cdist(x, y)
    assert np.abs(found - true)[10:20, 10:20].diagonal().max() > 1e-9


def test_points_all_at_one_place():
    x = torch.full((20, 50), 3.7, dtype=torch.float64)
    assert not distances(x, x[:7]).any()
