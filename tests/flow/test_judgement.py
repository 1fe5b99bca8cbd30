"""Laws of judging: what is measured between a restoration and the observed cells, and how it is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sctraj.flow import distance_estimates, pairwise_estimates
from sctraj.flow.distance import energy_distance, median_distance, mmd, variance_ratio, wasserstein
from sctraj.flow.judgement import METRICS, UNWEIGHTED, Observed, judge, judge_all
from sctraj.flow.restoration import CONTROLS, Restoration


def clouds(n: int, m: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two normal samples in the plane, the second moved along the diagonal."""
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(k, 2, generator=rng, dtype=torch.float64) + s for k, s in ((n, 0.0), (m, shift)))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_judge_measures_what_it_says(weighted):
    x, y = clouds(30, 20)
    a, b = ((torch.arange(1.0, len(v) + 1) if weighted else None) for v in (x, y))
    judgement = judge(Restoration(x, a), Observed(y, b))
    assert tuple(judgement.values) == METRICS
    weights = {"weights_x": a, "weights_y": b}
    assert judgement.values["w1"] == wasserstein(x, y, **weights)
    assert judgement.values["w1"] <= judgement.values["w2"] == wasserstein(x, y, p=2, **weights)
    assert judgement.values["energy"] == energy_distance(x, y, **weights)
    about_mean = energy_distance(x, y, about_mean=True, **weights)
    assert judgement.values["energy_about_mean"] == pytest.approx(about_mean, rel=1e-10)  # rounding
    assert judgement.values["mmd"] == mmd(x, y, bandwidth=median_distance(y), **weights)
    assert judgement.values["variance_ratio"] == variance_ratio(x, y, **weights)
    assert np.average(judgement.share, weights=b) == pytest.approx(judgement.values["w1"], rel=1e-12)  # rounding


@pytest.mark.parametrize("mass", [None, torch.arange(1.0, 21)])
def test_unweighted_is_what_uniform_weights_give(mass):
    x, y = clouds(30, 20, 0.5)
    weights = torch.arange(1.0, 31).double() ** 2
    judgement = judge(Restoration(x, weights), Observed(y, mass))
    uniform = judge(Restoration(x), Observed(y, mass))
    assert tuple(judgement.unweighted) == UNWEIGHTED == tuple(uniform.unweighted)
    for name in UNWEIGHTED:
        assert judgement.unweighted[name] == pytest.approx(uniform.values[name], rel=1e-12)  # rounding
        assert uniform.unweighted[name] == uniform.values[name]
        assert judgement.values[name] != pytest.approx(judgement.unweighted[name], rel=0.01)  # masses matter here


@pytest.mark.parametrize("weighted", [False, True])
def test_every_estimate_says_its_error(monkeypatch, weighted):
    monkeypatch.setattr(distance_estimates, "LARGEST_EXACT", 300)
    monkeypatch.setattr(distance_estimates, "SIZES", (16, 32, 64, 128))
    monkeypatch.setattr(distance_estimates, "PLAN_BLOCK", 64)
    monkeypatch.setattr(pairwise_estimates, "LARGEST_PAIRWISE", 300)
    x, y = clouds(700, 600)
    judgement = judge(Restoration(x, torch.arange(1.0, 701) if weighted else None), Observed(y))
    estimated = {"w1", "w2", "mmd", "energy", "energy_about_mean", "w1_unweighted", "energy_unweighted"}
    assert set(judgement.errors) == estimated
    assert (judgement.errors["w1"] != judgement.errors["w1_unweighted"]) == weighted


def test_what_folds_share_changes_no_bit():
    x, y = clouds(30, 20, 0.5)
    tasks = [(Restoration(x), y), (Restoration(x[:9] + 1), y), (Restoration(y), x)]
    for (restoration, observed), judgement in zip(tasks, judge_all(tasks), strict=True):
        assert judgement.values == judge(restoration, Observed(observed.clone())).values


def test_a_perfect_restoration_is_at_zero():
    y = clouds(30, 20)[0]
    values = judge(Restoration(y.flip(0)), Observed(y)).values
    assert values["w1"] == values["w2"] == 0
    assert values["variance_ratio"] == pytest.approx(1, rel=1e-14)  # rounding
    assert values["energy"] < 0  # closer than two samples of one law, whose unbiased distance is zero on average
    assert values["mmd"] < 0


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_gain_by_w1_and_lose_by_the_energy_distance(name):
    # what they are for: two samples of one law in many dimensions, one of them with variance taken away
    x, y = torch.randn(2, 150, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    honest, control = (
        judge(restoration, Observed(y)).values for restoration in (Restoration(x), CONTROLS[name](Restoration(x)))
    )
    assert control["variance_ratio"] < 0.9 < honest["variance_ratio"]
    assert control["w1"] < honest["w1"]
    assert control["energy"] > honest["energy"] + 0.05  # sampling moves it by about .02


def test_judging_at_once_is_judging_one_by_one():
    x, y = clouds(30, 20, 0.5)
    uneven = torch.arange(1.0, 31)
    tasks = [(Restoration(x, uneven), y), (Restoration(x[:9]), y), (Restoration(y[3:]), x), (Restoration(x, uneven), x)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = judge_all(tasks)
    finally:
        torch.set_num_threads(n_threads)
    for (restoration, observed), found in zip(tasks, together, strict=True):
        alone = judge(restoration, Observed(observed))
        assert (found.values, found.unweighted) == (alone.values, alone.unweighted)
        assert torch.equal(found.share, alone.share)
