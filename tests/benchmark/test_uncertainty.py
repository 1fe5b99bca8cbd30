"""Intervals, paired differences, skill and ranks: that they cover, cancel, scale, and hold back where they should."""

from __future__ import annotations

from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from sctraj.benchmark import _judge
from sctraj.benchmark._evaluate import Unit, evaluate
from sctraj.benchmark._uncertainty import PAIRED, SUMMARY, _interval, leak, paired, summary
from sctraj.flow.distance import energy_distance, sinkhorn_divergence, wasserstein

FOLDS, SEEDS, HALVES = (1.0, 2.5), (0, 1, 2), 40


def table(levels, *, metric="w1", noise=0.02, seeds=SEEDS, halves=HALVES, start="both", folds=FOLDS, rng=0, own=0.0):
    """A table of methods at given levels; cells move all methods alike, and each by itself as much as ``own``."""
    rng = np.random.default_rng(rng)
    shared = {(f, b): noise * rng.standard_normal() for f in folds for b in range(halves)}
    rows = []
    for method, level in levels.items():
        for fold in folds:
            for seed in seeds:
                for b in range(-1, halves):
                    value = level + (own + (b < 0 and own)) * rng.standard_normal() + shared.get((fold, b), 0.0)
                    value += 0.3 * (b >= 0)  # fewer cells are further apart
                    where = {"data": "d", "task": "t", "strict": False, "start": start, "space": "common"}
                    rows.append(
                        where
                        | {"method": method, "held_out": fold, "seed": seed, "metric": metric}
                        | {"value": value, "error": np.nan, "bootstrap": b}
                    )
    return pd.DataFrame(rows)


LEVELS = {"previous": 2.0, "ot-interpolation": 1.5, "noise-reference": 0.5, "good": 1.0, "bad": 3.0}


def of(found, method, column):
    return found.set_index("method").loc[method, column]


# --- half-samples of real distances
@pytest.mark.parametrize(("metric", "shift"), [("w1", 0.7), ("energy", 0.7), ("energy", 0.0), ("sinkhorn", 0.7)])
def test_half_samples_vary_as_much_as_the_distance_itself_does(monkeypatch, metric, shift):
    """Their variance is that of the estimate between data sets; too large, never too small, where the laws are one."""
    regularised = partial(sinkhorn_divergence, epsilon=3.0)
    distance = {"w1": wasserstein, "energy": energy_distance, "sinkhorn": regularised}[metric]
    monkeypatch.setattr(
        _judge,
        "_distances",
        lambda judge, *, divergence: {metric: (distance(judge.restored, judge.observed, weights_x=judge.mass), 0.0)},
    )
    n, d = 40, 3
    estimates, variances = [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((3 * n, d)).astype(np.float32)
        x[n:, 0] += shift
        obs = pd.DataFrame({"time": np.repeat([0.0, 1.0, 2.0], n)}, index=[f"c{i}" for i in range(3 * n)])
        cells = ad.AnnData(obs=obs, obsm={"X_pca": x})
        unit = Unit("cells", "leave-one-out", "previous", (), False, "before", (0,))
        found = evaluate(unit, cells, time_key="time", use_rep="X_pca", n_dims=None, bootstraps=25)
        estimates.append(found.query("bootstrap == -1")["value"].item())
        variances.append(found.query("bootstrap >= 0")["value"].var(ddof=1))
    ratio = np.sqrt(np.mean(variances) / np.var(estimates, ddof=1))
    assert 0.8 < ratio < (1.3 if shift else 2.2)


@pytest.mark.parametrize("course", ["line", "zigzag"])
def test_a_mean_over_folds_knows_that_they_share_snapshots(monkeypatch, course):
    """A snapshot is held out in one fold and moved in the next: what it does to both cancels on a line, or adds up."""
    monkeypatch.setattr(
        _judge,
        "_distances",
        lambda judge, *, divergence: {"w1": (wasserstein(judge.restored, judge.observed), 0.0)},
    )
    n, times = 30, np.arange(6.0)
    estimates, variances = [], []
    for seed in range(60):
        x = np.random.default_rng(seed).standard_normal((len(times) * n, 1)).astype(np.float32)
        x[:, 0] += 9 * np.repeat(times if course == "line" else times % 2, n)
        obs = pd.DataFrame({"time": np.repeat(times, n)}, index=[f"c{i}" for i in range(len(x))])
        unit = Unit("cells", "leave-one-out", "previous", (), False, "before", (0,))
        cells = ad.AnnData(obs=obs, obsm={"X_pca": x})
        found = evaluate(unit, cells, time_key="time", use_rep="X_pca", n_dims=None, bootstraps=25)
        means = found.groupby("bootstrap")["value"].mean()
        estimates.append(means[-1])
        variances.append(means[0:].var(ddof=1))
    assert 0.8 < np.sqrt(np.mean(variances) / np.var(estimates, ddof=1)) < 1.25


def test_the_interval_covers():
    """Student's, of two sources: between few seeds, and between half-samples."""
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(2000):
        cells = rng.standard_normal()
        seeds = cells + rng.standard_normal(4)
        halves = rng.standard_normal(100)
        _, low, high = _interval(seeds.mean(), seeds, halves - halves.mean())
        hit += low < 0 < high
    assert 0.93 < hit / 2000 < 0.97


def test_two_seeds_that_disagree_leave_one_degree_of_freedom():
    _, low, high = _interval(0.0, np.array([-1.0, 1.0]), np.linspace(-1e-6, 1e-6, 100))
    assert high == -low == pytest.approx(student.ppf(0.975, 1), rel=1e-6)  # the seeds' mean has the variance 1


def test_half_samples_in_which_a_metric_was_not_taken_do_not_count():
    rows = table({"good": 1.0}, metric="sinkhorn")
    rows.loc[rows["bootstrap"] >= 8, "value"] = np.nan
    found, few = summary(rows), summary(rows[rows["bootstrap"] < 8])
    assert of(found, "good", "n_bootstraps") == 8
    assert of(found, "good", "low") < of(found, "good", "mean") < of(found, "good", "high")
    pd.testing.assert_frame_equal(found, few)


def test_the_mean_is_that_of_all_cells_and_the_bias_of_fewer_cells_is_gone():
    found = summary(table(LEVELS))
    assert list(found.columns) == SUMMARY
    assert of(found, "good", "mean") == pytest.approx(1.0)
    low, high = of(found, "good", "low"), of(found, "good", "high")
    assert (low + high) / 2 == pytest.approx(1.0)
    assert 0 < high - low < 0.1  # half-samples lie .3 higher


def test_cells_do_not_count_anew_for_every_seed():
    one, many = (summary(table(LEVELS, seeds=tuple(range(n)))) for n in (1, 8))
    widths = [of(found, "good", "high") - of(found, "good", "low") for found in (one, many)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert np.isnan(of(one, "good", "sd"))


def test_more_disagreement_between_seeds_makes_it_wider():
    few, much = (summary(table(LEVELS, own=own)) for own in (0.0, 0.2))
    assert of(much, "good", "high") - of(much, "good", "low") > 3 * (of(few, "good", "high") - of(few, "good", "low"))


# --- paired differences
def test_what_moves_two_methods_alike_cancels():
    found = paired(table(LEVELS), metric="w1")
    assert list(found.columns) == PAIRED
    row = found.query("method == 'good' and other == 'bad'").iloc[0]
    np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), -2.0, atol=1e-9)
    assert len(found) == len(LEVELS) * (len(LEVELS) - 1) / 2


def test_only_what_both_have_is_compared():
    rows = pd.concat([table({"good": 1.0}, seeds=(0, 1, 2)), table({"bad": 3.0}, seeds=(2, 5), halves=7)])
    found = paired(rows, metric="w1").iloc[0]
    assert (found["n_seeds"], found["n_bootstraps"], found["n_held_out"]) == (1, 7, 2)
    nowhere = pd.concat([table({"good": 1.0}, seeds=(0,)), table({"bad": 3.0}, seeds=(5,))])
    assert paired(nowhere, metric="w1").empty
    with pytest.raises(ValueError, match="expected a metric of w1, found 'w7'"):
        paired(rows, metric="w7")


def test_a_time_held_out_in_two_folds_counts_twice():
    rows = table({"good": 1.0, "bad": 2.0}, noise=0, halves=2, folds=(1.0,))
    again = rows.assign(value=rows["value"] + 1)
    found = summary(pd.concat([rows, again]))
    assert of(found, "good", "mean") == pytest.approx(1.5)
    assert of(found, "good", "n_held_out") == 2


def test_half_a_unit_is_refused():
    rows = table({"good": 1.0})
    with pytest.raises(ValueError, match="every held-out snapshot with every seed, found 5 of 6 of good"):
        summary(rows[~((rows["seed"] == 1) & (rows["held_out"] == 2.5))])


def test_twice_too_much_variance_is_as_wrong_as_half_of_it():
    rows = table({"twice": 2.0, "half": 0.5, "right": 1.0}, metric="variance_ratio", noise=0, halves=3)
    rows.loc[rows["bootstrap"] >= 0, "value"] -= 0.3
    found = paired(rows, metric="variance_ratio").set_index(["method", "other"])["difference"]
    assert dict(found)["twice", "half"] == pytest.approx(0)
    assert dict(found)["twice", "right"] == pytest.approx(np.log(2))
    assert of(summary(rows), "twice", "mean") == pytest.approx(2)


def test_the_leak_is_paired_so_that_what_moves_both_forms_alike_cancels():
    published = table(LEVELS, noise=0.5)
    strict = table({name: level + 0.2 for name, level in LEVELS.items()}, noise=0.5).assign(strict=True)
    own = strict.assign(space="own", value=9.0)
    for rows in ([published, strict, own], [own, strict, published]):
        found = leak(pd.concat(rows), metric="w1")
        assert found["method"].tolist() == list(LEVELS)
        np.testing.assert_allclose(found[["leak", "low", "high"]].astype(float), 0.2, atol=1e-9)
    assert leak(published, metric="w1").empty
    wide = leak(pd.concat([published, table(LEVELS, noise=0.5, rng=1).assign(strict=True)]), metric="w1")
    assert (wide["low"] < 0).all()
    assert (wide["high"] > 0).all()


# --- skill and ranks
def test_skill_is_0_at_the_best_baseline_1_at_the_noise_and_linear_between():
    found = summary(table(LEVELS))
    wanted = {"previous": -0.5, "ot-interpolation": 0.0, "noise-reference": 1.0, "good": 0.5, "bad": -1.5}
    for method, skill in wanted.items():
        assert of(found, method, "skill") == pytest.approx(skill)
    assert of(found, "ot-interpolation", "skill_low") == of(found, "ot-interpolation", "skill_high") == 0


def test_skill_does_not_depend_on_the_unit_of_length():
    rows = table(LEVELS, own=0.05)
    one, other = summary(rows), summary(rows.assign(value=10 * rows["value"]))
    columns = ["skill", "skill_low", "skill_high", "rank"]
    pd.testing.assert_frame_equal(one[columns], other[columns])
    np.testing.assert_allclose(other["high"] - other["low"], 10 * (one["high"] - one["low"]))


def test_the_interval_of_skill_covers():
    hit = 0
    for seed in range(40):
        found = summary(table(LEVELS, own=0.1, rng=seed, halves=8, noise=0.0, folds=(1.0,)))
        hit += of(found, "good", "skill_low") < 0.5 < of(found, "good", "skill_high")
    assert hit >= 34  # of 38 expected


@pytest.mark.parametrize(("moves", "slope"), [("noise-reference", 0.5), ("ot-interpolation", 0.5), ("good", 1.0)])
def test_whatever_skill_is_made_of_makes_it_uncertain(moves, slope):
    """At skill k = 1/2 = (b - m) / (b - n): dk = ((1 - k) db - dm + k dn) / (b - n), each alone."""
    still = {name: level for name, level in LEVELS.items() if name != moves}
    found = summary(pd.concat([table(still, noise=0), table({moves: LEVELS[moves]}, noise=0.05)]))
    width = of(found, "good", "skill_high") - of(found, "good", "skill_low")
    assert width == pytest.approx(slope * (of(found, moves, "high") - of(found, moves, "low")))


def test_where_nothing_is_to_be_gained_there_is_no_skill():
    level = {"previous": 0.501, "noise-reference": 0.5, "good": 0.4}
    assert summary(table(level, own=0.05))["skill"].isna().all()
    assert summary(table({"good": 1.0, "noise-reference": 0.5}))["skill"].isna().all()


def test_no_rank_without_an_interval():
    found = summary(table(LEVELS, halves=0))
    assert found[["low", "high", "rank", "skill_low", "skill_high"]].isna().all(axis=None)
    assert of(found, "good", "skill") == pytest.approx(0.5)
    ranked = summary(table(LEVELS))
    assert ranked.loc[ranked["rank"].notna(), ["low", "high"]].notna().all(axis=None)
    # one method without half-samples: what cannot be compared has no rank
    rows = table(LEVELS)
    partly = summary(rows[(rows["method"] != "good") | (rows["bootstrap"] < 0)])
    assert np.isnan(of(partly, "good", "rank"))


def test_what_is_not_known_has_no_interval_skill_or_rank():
    rows = table(LEVELS)
    rows.loc[(rows["method"] == "good") & (rows["held_out"] == 1.0) & (rows["bootstrap"] < 0), "value"] = np.nan
    found = summary(rows)
    assert found.query("method == 'good'")[["mean", "low", "skill", "rank"]].isna().all(axis=None)
    assert of(found, "bad", "skill") == pytest.approx(of(summary(table(LEVELS)), "bad", "skill"))
    for baseline in ("previous", "ot-interpolation"):  # nobody can say which is best
        rows = table(LEVELS)
        rows.loc[(rows["method"] == baseline) & (rows["bootstrap"] < 0), "value"] = np.nan
        assert summary(rows)["skill"].isna().all()


def test_ranks_are_shared_by_those_that_cannot_be_told_apart():
    found = summary(table(LEVELS))
    assert [of(found, m, "rank") for m in ("good", "ot-interpolation", "previous", "bad")] == [1, 2, 3, 4]
    assert np.isnan(of(found, "noise-reference", "rank"))
    same = summary(table({"one": 1.0, "two": 1.001, "three": 3.0}, own=0.05))
    assert [of(same, m, "rank") for m in ("one", "two", "three")] == [1, 1, 3]


def test_ranks_hold_for_all_pairs_at_once():
    # of 15 pairs 3.1 deviations are needed, of five 2.7 and of one 2.0
    levels = {"a": 0.0, "b": 2.9, "c": 100.0, "d": 200.0, "e": 300.0, "f": 400.0}
    rows = table(levels, noise=0, seeds=(0,), folds=(1.0,))
    halves = np.random.default_rng(0).standard_normal(HALVES)
    rows.loc[(rows["method"] == "a") & (rows["bootstrap"] >= 0), "value"] += halves / halves.std(ddof=1)
    found = summary(rows)
    assert [of(found, m, "rank") for m in levels] == [1, 1, 3, 4, 5, 6]


def test_baselines_stand_beside_every_start():
    baselines = {name: LEVELS[name] for name in ("previous", "ot-interpolation", "noise-reference")}
    rows = pd.concat([table(baselines, start="both"), table({"good": 1.0}, start="before")])
    found = summary(rows).query("start == 'before'")
    assert of(found, "good", "skill") == pytest.approx(0.5)
    assert set(found["method"]) == {*baselines, "good"}
    both = pd.concat([rows, table({"good": 1.2}, start="both")])
    assert of(summary(both).query("start == 'both'"), "good", "skill") == pytest.approx(0.3)
