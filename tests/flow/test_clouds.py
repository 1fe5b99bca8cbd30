"""Clouds, and means over all of their pairs: met once or twice, in one tile or many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from sctraj.flow import clouds
from sctraj.flow.clouds import (
    as_cloud,
    distinct_means,
    gaussian,
    identity,
    mean_kernels,
    median_distance,
    share_astray,
    spacing,
)

KERNELS = [identity, gaussian(1.5)]


def drawn(n, seed, d, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + shift, rng.exponential(size=n)


def test_median_distance_of_a_thinned_cloud():
    y = np.random.default_rng(0).normal(size=(1500, 2))
    # an even selection of independent cells is a sample of 400: 1.25 sd / sqrt(n) or so
    assert median_distance(y, n_cells=400) == pytest.approx(median_distance(y), rel=0.1)


def test_median_distance_among_many_equal_cells():
    y = np.concatenate([np.zeros((45, 2)), np.random.default_rng(0).normal(size=(15, 2)) + 3])
    distance = pdist(y)
    assert np.median(distance) == 0
    assert median_distance(y) == pytest.approx(np.median(distance[distance > 0]), rel=0.02)  # torch: the lower middle
    assert median_distance(np.concatenate([y[:30], y[45:46]])) == pytest.approx(np.linalg.norm(y[45]), rel=1e-12)
    few = np.zeros((60, 2))
    few[7] = 3, 4  # not among the three that are selected
    assert median_distance(few, n_cells=3) == 5
    assert median_distance(np.ones((60, 2))) == median_distance(np.ones((1, 2))) == 0


def test_values_that_are_not_finite_are_counted():
    y = np.ones((5, 2))
    y[1], y[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="finite points, found NaN or inf in 2 of 5"):
        as_cloud(y, None)


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("tile", [1, 100, 2**20])
@pytest.mark.parametrize("itself", [False, True])
def test_means_of_kernels_are_sums_over_all_pairs(monkeypatch, d, tile, itself):
    monkeypatch.setattr(clouds, "TILE", tile)
    (x, a), (y, b) = drawn(40, 0, d), drawn(40 if itself else 30, 0 if itself else 1, d)
    weightings = [(a, b), (np.ones(len(x)), np.ones(len(y))), (a, np.ones(len(y)))][: 2 if itself else 3]
    us = [as_cloud(x, first) for first, _ in weightings]
    vs = us if itself else [as_cloud(y, second) for _, second in weightings]
    distance = cdist(x, y)
    truth = [
        [first @ kernel @ second / first.sum() / second.sum() for first, second in weightings]
        for kernel in (distance, np.exp(-(distance**2) / (2 * 1.5**2)))
    ]
    np.testing.assert_allclose(mean_kernels(us, vs, KERNELS), truth, rtol=1e-12)


@pytest.mark.parametrize("d", [3, 20])
def test_means_lose_nothing_far_from_the_origin(d):
    found = []
    for shift in (0.0, 1e5):
        (x, a), (y, _) = drawn(40, 0, d, shift), drawn(30, 1, d, shift)
        us, vs = [as_cloud(x, a)], [as_cloud(y, None)]
        found.append(np.stack([mean_kernels(us, vs, KERNELS), distinct_means(us, KERNELS)]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)  # the coordinates lose 17 bits of 53


def test_kernels_leave_distances_alone():
    distance = torch.tensor([0.0, 1.0, 2.0])
    for kernel in KERNELS:
        kernel(distance)
    assert distance.tolist() == [0, 1, 2]


def test_points_are_astray_beyond_where_any_cell_is_from_the_others():
    cells = torch.arange(20.0)[:, None]  # of the cells at the ends the fifth nearest other one is 5 away
    points = torch.tensor([[0.5], [19.9], [20.0], [20.1], [-1.1]])  # 4.5, 4.9, 5, 5.1 and 5.1 away
    assert share_astray(points, cells) == pytest.approx(2 / 5)
    assert share_astray(cells, cells) == 0
    assert share_astray(torch.tensor([[3.0], [float("nan")]]), cells) == 0.5
    assert share_astray(torch.tensor([[0.5], [3.0]]), cells[:2]) == 0.5  # two cells, 1 apart: the nearest counts


def test_spacing_is_the_median_distance_to_the_fifth_nearest_other_cell():
    cells = torch.arange(20.0)[:, None]  # 3 away but for the two cells at each end, 5 and 4
    assert spacing(cells) == 3
    assert spacing(torch.cat([cells, torch.tensor([[1e6]])])) == 3  # no single cell moves it
    assert spacing(10 * cells + 7) == 30
    assert spacing(cells[:2]) == 1
    assert spacing(cells[:4]) == 1  # of few cells the one half-way to the farthest
    assert spacing(cells[:1]) == 0
    assert spacing(cells.repeat(6, 1)) == 3  # each place once
    assert spacing(torch.zeros(9, 3)) == 0
    many = torch.arange(5000.0)[:, None]  # a thousand are asked, but all may be near
    assert spacing(many) == 3
