"""What a unit measures: what is held out stays out, methods meet the contract, and numbers agree with those known."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from sctraj import datasets, pp, tl
from sctraj.benchmark import _course, _evaluate, _judge, _methods
from sctraj.benchmark._course import prepare, read_course
from sctraj.benchmark._evaluate import COLUMNS, Unit, evaluate, restorations
from sctraj.benchmark._judge import half_sample
from sctraj.benchmark._methods import Cloud, Query, call, find_method, own_settings, register
from sctraj.benchmark._representation import fit_recipe, log_normalised, to_common
from sctraj.benchmark._tasks import TASKS, find_task
from sctraj.flow import baselines, distance, pairwise_estimates, plans
from sctraj.flow.snapshots import Snapshots

CLOSED = (("field", "closed-form"),)
SHORT = (("n_steps", 5), ("width", 8))


@pytest.fixture(scope="module")
def course(_simulated) -> ad.AnnData:
    """200 cells with counts at six uneven times."""
    cells = _simulated[::3].copy()
    cells.X = cells.layers["counts"].toarray()
    return cells


def unit(method="ot-interpolation", task="leave-one-out", settings=(), strict=False, start="before", seeds=(0,)):
    return Unit("cells", task, method, settings, strict, start, seeds)


def measured(adata, one, n_dims=3, **options):
    return evaluate(one, adata, time_key="time", use_rep="X_pca", n_dims=n_dims, **options)


def everything(adata, one):
    """What a strict unit computes without the held-out cells: recipes, kept cells and restorations, fold by fold."""
    read = read_course(adata, "time", "X_pca", 3, None, strict=True)
    found = restorations(one, read, find_task(one.task), device="cpu")
    return [
        (
            *(np.asarray(value) for value in dataclasses.astuple(r.prepared.recipe)),
            *(x.numpy() for x in r.prepared.snapshots.points),
            r.cloud.points,
            r.cloud.mass,
        )
        for r in found
    ]


def same_bits(one, other):
    return len(one) == len(other) and all(
        a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True)
    )


# --- what is held out
def folds(name, n=6, size=40, seed=0):
    index = [np.arange(size * k, size * (k + 1)) for k in range(n)]
    return list(TASKS[name].folds([float(k) for k in range(n)], index, seed))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("n", [5, 6, 8])
def test_no_cell_is_both_kept_and_held_out_and_times_are_restored_between_or_beyond(name, n):
    for fold in folds(name, n):
        kept, held_out = np.concatenate(fold.kept), np.concatenate(fold.held_out)
        assert not set(kept) & set(held_out)
        assert len(held_out) > 0
        assert list(fold.times) == sorted(fold.times)
        assert min(fold.held_out_times) > fold.times[0]
        assert (max(fold.held_out_times) > fold.times[-1]) == (name == "extrapolation")


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("leave-one-out", [(1,), (2,), (3,), (4,)]),
        ("leave-two-out", [(1, 2), (2, 3), (3, 4)]),
        ("extrapolation", [(5,)]),
        ("every-2nd", [(1, 3)]),
        ("every-4th", [(1, 2, 3)]),
        ("cells", [(1,), (2,), (3,), (4,)]),
    ],
)
def test_tasks_hold_out_what_they_are_named_after(name, held_out):
    assert [fold.held_out_times for fold in folds(name)] == held_out
    assert all(len(one) == (8 if name == "cells" else 40) for fold in folds(name) for one in fold.held_out)


def test_cells_are_split_by_seed_and_every_other_task_is_not():
    for name in TASKS:
        first, again, other = ([np.concatenate(f.held_out).tolist() for f in folds(name, seed=s)] for s in (0, 0, 1))
        assert first == again
        assert (first != other) == (name == "cells")


@pytest.mark.parametrize("name", TASKS)
def test_a_course_too_short_is_refused_with_the_reason(name):
    task = TASKS[name]
    with pytest.raises(
        ValueError, match=f"expected at least {task.least} snapshots for {name} .*found {task.least - 1}"
    ):
        folds(name, task.least - 1)
    assert folds(name, task.least)


@pytest.mark.parametrize(("task", "start"), [("extrapolation", "both"), ("cells", "both"), ("leave-one-out", "after")])
def test_a_start_that_does_not_suit_the_task_is_refused(course, task, start):
    with pytest.raises(ValueError, match=f"expected a start of .* for {task}, found '{start}'"):
        measured(course, unit(task=task, start=start))


# --- the strict form
def scrambled(adata, rows, rng):
    """The same cells, those at some rows replaced by others that have nothing to do with them."""
    other = adata.copy()
    other.X[rows] = rng.permutation(other.X[rows].T).T * rng.integers(1, 50, other.n_vars) + rng.integers(0, 900)
    return other


@pytest.mark.parametrize(
    ("method", "task", "settings"),
    [
        ("ot-cfm", "leave-two-out", CLOSED),
        ("ot-cfm", "extrapolation", SHORT),
        ("ot-interpolation", "leave-one-out", ()),
        ("ot-cfm", "cells", CLOSED),
    ],
)
def test_held_out_cells_change_no_bit_of_the_fold(course, monkeypatch, method, task, settings):
    monkeypatch.setattr(_course, "fit_recipe", lambda raw, n_dims: fit_recipe(raw, n_dims, n_genes=25))
    rng = np.random.default_rng(0)
    one = unit(method, task, settings, strict=True)
    before = everything(course, one)
    read = read_course(course, "time", "X_pca", 3, None, strict=True)
    n = 0
    for number, fold in enumerate(TASKS[task].folds(read.times, read.index, 0)):
        here = slice(n, n := n + len(fold.held_out))
        if number > 0 and settings:  # one fold tells as much as all, and takes less time
            break
        after = everything(scrambled(course, np.concatenate(fold.held_out), rng), one)
        assert all(same_bits(a, b) for a, b in zip(before[here], after[here], strict=True))


def test_the_same_test_catches_a_recipe_that_saw_all_cells(course, monkeypatch):
    one = unit(strict=True)
    kept = prepare

    def leaky(read, fold):
        return dataclasses.replace(kept(read, fold), recipe=read.recipe)

    monkeypatch.setattr(_evaluate, "prepare", leaky)
    before = everything(course, one)
    read = read_course(course, "time", "X_pca", 3, None, strict=True)
    after = everything(scrambled(course, read.index[1], np.random.default_rng(0)), one)
    assert not same_bits(before[0], after[0])


def test_kept_cells_do_change_the_fold(course):
    read = read_course(course, "time", "X_pca", 3, None, strict=True)
    other = everything(scrambled(course, read.index[2], np.random.default_rng(0)), unit(strict=True))
    assert not same_bits(everything(course, unit(strict=True))[0], other[0])


def test_strict_rows_stand_in_both_spaces_and_others_in_the_common_one_alone(course):
    assert set(measured(course, unit(strict=True))["space"]) == {"own", "common"}
    assert set(measured(course, unit())["space"]) == {"common"}


def test_a_finished_representation_is_refused_where_the_recipe_must_be_refitted(course):
    bare = ad.AnnData(obs=course.obs, obsm={"X_pca": course.obsm["X_pca"]})
    with pytest.raises(ValueError, match=r"finished representation alone.*Leave strict out"):
        measured(bare, unit(strict=True))
    assert len(measured(bare, unit()))
    scaled = course.copy()
    scaled.X = (scaled.X - scaled.X.mean(axis=0)).astype(np.float32)
    with pytest.raises(ValueError, match=r"negative values.*leave strict out"):
        measured(scaled, unit(strict=True))


def test_real_data(real_data):
    body = ad.read_h5ad(real_data("embryoid_body_2750.h5ad"))
    with pytest.raises(ValueError, match="finished representation alone"):
        measured(body, unit(strict=True), 5)
    cells = ad.read_h5ad(real_data("ipsc_cardiomyocyte_1081.h5ad"))
    pp.parse_time(cells, "day")
    found = evaluate(unit("previous", strict=True), cells, time_key="time", use_rep="X", n_dims=5)
    assert sorted(found["held_out"].unique()) == [1, 1.5, 2, 2.5]
    assert not {"gene_mean", "gene_variance", "w1"} - set(found["metric"])


# --- the recipe
def test_the_recipe_is_a_linear_map_with_an_inverse_on_its_own_points(course):
    raw = course.X
    recipe = fit_recipe(raw, 4)
    points = recipe.project(raw)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(np.cov(points.T, ddof=0), np.eye(4), atol=1e-8)
    expression = np.zeros((len(raw), raw.shape[1]))
    expression[:, recipe.genes] = recipe.decode(points)
    again = dataclasses.replace(recipe, counts=False).project(expression)
    np.testing.assert_allclose(again, points, atol=1e-10)
    np.testing.assert_allclose(to_common(points, recipe, recipe), points, atol=1e-10)


def test_with_all_components_nothing_is_lost_on_the_way_to_the_common_space(course):
    raw = course.X
    common, n = fit_recipe(raw, 3), raw.shape[1]
    own = fit_recipe(raw[50:], n)
    np.testing.assert_allclose(to_common(own.project(raw), own, common), common.project(raw), atol=1e-8)
    few = fit_recipe(raw[50:], 3)
    lost = to_common(few.project(raw), few, common) - common.project(raw)
    assert 0 < np.square(lost).sum() < np.square(common.project(raw)).sum()


def test_genes_that_the_fold_lacks_stay_at_the_common_mean(course):
    values = log_normalised(course.X)
    common = fit_recipe(values, 3)
    silent = values.copy()
    silent[:, :5] = 0  # in the fold's cells
    own = fit_recipe(silent, values.shape[1] - 5)
    filled = values.copy()
    filled[:, :5] = values[:, :5].mean(axis=0)
    np.testing.assert_allclose(to_common(own.project(silent), own, common), common.project(filled), atol=1e-8)


def test_the_components_are_scanpy_s(course):
    import scanpy as sc

    values = ad.AnnData(log_normalised(course.X))
    sc.pp.scale(values)
    sc.pp.pca(values, n_comps=3, svd_solver="full")
    theirs = values.obsm["X_pca"] / values.obsm["X_pca"].std(axis=0)
    ours = fit_recipe(course.X, 3).project(course.X)
    np.testing.assert_allclose(np.abs(np.corrcoef(theirs.T, ours.T)[:3, 3:]), np.eye(3), atol=1e-3)


def test_counts_are_log_normalised_and_expression_is_left_alone(course):
    assert fit_recipe(course.X, 3).counts
    already = log_normalised(course.X)
    recipe = fit_recipe(already, 3)
    assert not recipe.counts
    np.testing.assert_array_equal(recipe.project(already), fit_recipe(course.X, 3).project(course.X))


# --- methods
def test_leave_one_out_agrees_with_the_verb(course):
    """Two ways to the same numbers: the grid's unit, and `tl.leave_one_out`."""
    cells = course[course.obs["time"] < 5].copy()
    pp.standardize(cells, n_dims=3)
    for start, own, others in (("both", "uot-cfm", ()), ("before", "ot-cfm", baselines.BASELINES)):
        tl.leave_one_out(cells, use_rep="X_std", methods=[own], field="closed-form", start=start, n_seeds=1)
        wanted = cells.uns["leave_one_out"].query("method != 'noise-reference'")
        wanted = wanted.set_index(["method", "time", "metric"])["value"]
        for method, settings in ((own, CLOSED), *((name, ()) for name in others)):
            one = unit(method, settings=settings, start=start)
            found = evaluate(one, cells, time_key="time", use_rep="X_std", n_dims=None)
            values = found.set_index(["held_out", "metric"])["value"].drop("sinkhorn", level="metric")
            np.testing.assert_allclose(values, wanted[method].loc[values.index], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_a_unit_of_a_moving_frame_differs_and_agrees_with_the_verb(course, strict):
    energies = {}
    for frame in ("fixed", "moving"):
        rows = measured(course, unit("uot-cfm", settings=(*CLOSED, ("frame", frame)), strict=strict, start="both"))
        energies[frame] = rows[(rows["metric"] == "energy") & (rows["space"] == "common")]["value"].to_numpy()
        if not strict:
            cells = pp.standardize(course, n_dims=3, copy=True)
            tl.leave_one_out(cells, use_rep="X_std", field="closed-form", n_seeds=1, frame=frame)
            table = cells.uns["leave_one_out"]
            of_verb = table[(table["method"] == "uot-cfm") & (table["metric"] == "energy")]["value"]
            np.testing.assert_allclose(energies[frame], of_verb, rtol=1e-6)
    assert (np.abs(energies["moving"] - energies["fixed"]) > 1e-6).all()


def test_farther_snapshots_are_moved_as_by_the_verb():
    cells = datasets.simulated_course("branching", 240, times=np.linspace(0, 4, 8), sample_effects=1.5)
    tl.leave_one_out(cells, **dict(SHORT), n_seeds=1)
    wanted = cells.uns["leave_one_out"].query("method == 'uot-cfm'").set_index(["time", "metric"])["value"]
    one = unit("uot-cfm", settings=SHORT, start="both")
    found = evaluate(one, cells, time_key="time", use_rep="X_pca", n_dims=None)
    values = found.set_index(["held_out", "metric"])["value"].drop("sinkhorn", level="metric")
    np.testing.assert_allclose(values, wanted.loc[values.index], rtol=2e-5, atol=1e-5)
    read = read_course(cells, "time", "X_pca", None, None, strict=False)
    times = cells.obs["time"].unique()
    clouds = [one.cloud for one in restorations(one, read, TASKS["leave-one-out"], device="cpu")]
    assert clouds[0].origins == (times[0], times[2], times[3])  # there is no second one before
    assert clouds[2].origins == (times[2], times[4], times[1], times[5])
    assert all(sum(cloud.parts) == len(cloud.points) for cloud in clouds)


def test_a_unit_is_trained_as_one_batch_in_which_members_do_not_meet(course, monkeypatch):
    sizes = []
    make_field = _methods.make_field

    def counted(kind, problems, *rest, **options):
        sizes.append(len(problems))
        return make_field(kind, problems, *rest, **options)

    monkeypatch.setattr(_methods, "make_field", counted)
    both = measured(course, unit("ot-cfm", settings=SHORT, seeds=(3, 5)))
    assert sizes == [8]  # four folds, two seeds
    alone = measured(course, unit("ot-cfm", settings=SHORT, seeds=(5,)))
    of_both = both[both["seed"] == 5].reset_index(drop=True)
    np.testing.assert_allclose(of_both["value"], alone["value"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(both.query("seed == 3")["value"], of_both["value"])


def test_folds_of_one_space_solve_a_shared_interval_once(course, monkeypatch):
    solved = []
    growing = plans.growing

    def counted(interval, *rest, **options):
        solved.append((interval.t0, interval.t1))
        return growing(interval, *rest, **options)

    monkeypatch.setattr(plans, "growing", counted)
    one = unit("uot-cfm", settings=CLOSED, start="both", seeds=(3, 5))
    shared = measured(course, one)
    assert len(solved) == len(set(solved)) == 5 + 4  # intervals, and gaps
    solved.clear()
    measured(course, dataclasses.replace(one, strict=True))
    assert len(solved) == 4 * 4  # spaces of their own share nothing
    solved.clear()

    def anew(read):
        return tuple(torch.from_numpy(read.points[rows].astype(np.float32)) for rows in read.index)

    monkeypatch.setattr(_course.Course, "snapshots", property(anew))
    pd.testing.assert_frame_equal(measured(course, one), shared, check_exact=True)
    assert len(solved) == 4 * 4


def test_a_snapshot_of_which_cells_are_held_out_is_no_whole_one(course):
    read = read_course(course, "time", "X_pca", 3, None, strict=False)
    for k, fold in enumerate(TASKS["cells"].folds(read.times, read.index, 0), start=1):
        kept = prepare(read, fold).snapshots.points
        assert [x is y for x, y in zip(kept, read.snapshots)] == [j != k for j in range(6)]
        for x, rows in zip(kept, fold.kept):
            np.testing.assert_array_equal(x, read.points[rows].astype(np.float32))


def test_from_the_first_snapshot_the_whole_way_is_integrated(course):
    read = read_course(course, "time", "X_pca", None, None, strict=False)
    before, first = (
        restorations(unit("ot-cfm", settings=CLOSED, start=s), read, TASKS["leave-one-out"], device="cpu")
        for s in ("before", "first")
    )
    # its first is the one before, reached in finer steps
    np.testing.assert_allclose(before[0].cloud.points, first[0].cloud.points, atol=5e-3)
    assert {len(one.cloud.points) for one in first} == {len(read.index[0])}
    moved = [one.cloud.points.mean(axis=0) - read.points[read.index[0]].mean(axis=0) for one in first]
    assert np.linalg.norm(moved[3]) > np.linalg.norm(moved[0])


def moving(snapshots, time, rng, speed=0.0):
    return snapshots.points[0] + speed * (time - snapshots.times[0]), np.arange(len(snapshots.points[0])) + 1.0


def like_previous(snapshots, time, rng):
    return snapshots.points[max(k for k, t in enumerate(snapshots.times) if t < time)]


def moved_in_place(snapshots, time, rng):
    x = snapshots.points[0]
    for _ in range(3):
        x += 0.5
    return x


def random_cells(snapshots, time, rng):
    return rng.standard_normal((9, snapshots.dimension))


def test_any_callable_is_a_method_registered_or_by_its_path(course, monkeypatch):
    monkeypatch.setattr(_methods, "_REGISTERED", {})
    register("moving", moving)
    one = measured(course, unit("moving", settings=(("speed", 0.5),)))
    two = measured(course, unit(f"{__name__}:moving", settings=(("speed", 0.5),)))
    assert set(one["method"]) == {"moving (speed=0.5)"}
    np.testing.assert_array_equal(one["value"], two["value"])
    assert (one.query("metric == 'w1'")["value"].array != one.query("metric == 'w1_unweighted'")["value"].array).all()
    for taken in ("ot-cfm", "previous", "a:b", ""):
        with pytest.raises(ValueError, match="name of your own"):
            register(taken, moving)
    with pytest.raises(TypeError, match="callable"):
        register("text", "moving")


def test_a_method_that_moves_cells_in_place_meets_them_unmoved(course):
    found = measured(course, unit(f"{__name__}:moved_in_place", task="every-4th", seeds=(0, 1)))
    first, second = (found.query(f"seed == {seed}")["value"].to_numpy() for seed in (0, 1))
    np.testing.assert_array_equal(first, second)
    query = Query(Snapshots((0.0, 3.0), (torch.zeros(3, 2), torch.ones(3, 2))), (1.0, 2.0), 0)
    clouds = call(moved_in_place, query, np.random.default_rng(0), {}, name="it")
    assert [np.unique(cloud.points) for cloud in clouds] == [1.5, 1.5]
    assert not query.snapshots.points[0].any()


def test_a_random_method_depends_on_the_seed_alone(course):
    path = f"{__name__}:random_cells"
    one, again = (measured(course, unit(path, seeds=(0, 1))) for _ in range(2))
    pd.testing.assert_frame_equal(one, again)
    assert not np.allclose(one.query("seed == 0")["value"], one.query("seed == 1")["value"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((5, 4)), r"points \(n, 2\) from it, found shape \(5, 4\)"),
        (np.array([[0.0, np.nan], [1.0, 2.0]]), "finite points from it, found 1 of 2 with NaN or inf"),
        ((np.zeros((5, 2)), np.ones(4)), "5 weights"),
        ((np.zeros((5, 2)), -np.ones(5)), "not below zero"),
    ],
)
def test_what_cannot_be_used_is_refused(answer, message):
    query = Query(Snapshots((0.0, 2.0), (torch.zeros(3, 2), torch.ones(3, 2))), (1.0,), 0)
    with pytest.raises(ValueError, match=message):
        call(lambda *_: answer, query, np.random.default_rng(0), {}, name="it")


def test_unknown_methods_and_settings_are_refused(course):
    for name in ("otcfm", "nowhere.at_all:f", f"{__name__}:absent"):
        with pytest.raises(ValueError, match="expected a method"):
            find_method(name)
    with pytest.raises(TypeError, match=r"expected settings of field.*found widht"):
        own_settings("ot-cfm", {"widht": 3})
    with pytest.raises(TypeError, match="speed"):
        measured(course, unit("noise-reference", settings=(("speed", 1),)))
    with pytest.raises(ValueError, match=r"block.*found 1"):
        own_settings("ot-cfm", {"block": 1})
    assert own_settings("ot-cfm", {"block": 100})["block"] == 100
    with pytest.raises(ValueError, match=r"frame.*found 'still'"):
        own_settings("uot-cfm", {"frame": "still"})
    with pytest.raises(TypeError, match="expected text for frame of uot-cfm, found 2"):
        own_settings("uot-cfm", {"frame": 2})
    with pytest.raises(
        ValueError, match="expected no frame for ot-cfm with path=None, which needs no kin, found 'moving'"
    ):
        own_settings("ot-cfm", {"frame": "moving"})
    assert own_settings("ot-cfm", {"frame": "moving", "path": "hermite"})["frame"] == "moving"
    assert own_settings("ot-cfm", {})["n_steps"] == 500  # tl.leave_one_out's own


def test_cells_at_a_seen_time_are_restored_from_the_snapshot_before(course):
    read = read_course(course, "time", "X_pca", None, None, strict=False)
    for one in restorations(unit("previous", task="cells"), read, TASKS["cells"], device="cpu"):
        k = read.times.index(one.held_out)
        before = set(map(tuple, read.points[read.index[k - 1]]))
        assert set(map(tuple, one.cloud.points)) <= before  # not from the cells seen at the time itself


def test_beyond_the_last_snapshot_interpolation_draws_the_chords_out(course):
    read = read_course(course, "time", "X_pca", None, None, strict=False)
    (one,) = restorations(unit(task="extrapolation"), read, TASKS["extrapolation"], device="cpu")
    t0, t1, t = read.times[3:]
    start, end = (read.points[read.index[k]].mean(axis=0) for k in (3, 4))
    mean = one.cloud.mass @ one.cloud.points
    np.testing.assert_allclose(mean, start + (t - t0) / (t1 - t0) * (end - start), atol=1e-4)
    with pytest.raises(ValueError, match="after time 7"):
        measured(course, unit("next", task="extrapolation"))


# --- numbers
def test_a_perfect_restoration_has_no_distance(course, monkeypatch):
    read = read_course(course, "time", "X_pca", 3, None, strict=False)
    truth = {t: read.points[rows] for t, rows in zip(read.times, read.index)}
    monkeypatch.setattr(_methods, "_REGISTERED", {"truth": lambda snapshots, time, rng: truth[time]})
    found = measured(course, unit("truth")).groupby("metric")["value"].agg(["min", "max"])
    np.testing.assert_allclose(found.loc[["w1", "w2", "sinkhorn"]], 0, atol=1e-5)
    np.testing.assert_allclose(found.loc["variance_ratio"], 1, rtol=1e-10)
    assert (found.loc[["energy", "mmd"]] < 0).all(axis=None)  # unbiased: the same cells are closer than two samples


@pytest.mark.parametrize("even", [True, False])
def test_distances_are_to_the_last_bit_those_taken_alone(monkeypatch, even):
    """Though all pairs are met once for them; each as public metrics give it, of pairs in blocks too."""
    rng = np.random.default_rng(0)
    x, y, mass = rng.normal(size=(500, 3)), rng.normal(size=(450, 3)), np.ones(500) if even else rng.random(500)
    judge = _judge.Judge(x, mass / mass.sum(), y, None, None, None, (500,), 2.0)
    divergence = distance.sinkhorn_divergence(x, y, epsilon=0.05 * 2.0**2, weights_x=judge.mass)
    for largest, exact in ((10_000, True), (400, False)):
        monkeypatch.setattr(pairwise_estimates, "LARGEST_PAIRWISE", largest)
        found = _judge._distances(judge, divergence=True)
        assert found["sinkhorn"] == (divergence, 0)
        weights = judge.mass
        alone = {
            "mmd": distance.estimated_mmd(x, y, bandwidth=2.0, weights_x=weights),
            "energy": distance.estimated_energy_distance(x, y, weights_x=weights),
            "energy_about_mean": distance.estimated_energy_distance(x, y, weights_x=weights, about_mean=True),
        }
        if not even:
            alone["energy_unweighted"] = distance.estimated_energy_distance(x, y)
            alone["w1_unweighted"] = distance.estimated_wasserstein(x, y)
        for name, estimate in alone.items():
            assert found[name] == estimate[:2], name
        assert (found["energy"].error == 0) == exact
        assert (found["energy"] == found["energy_unweighted"]) == even


def test_composition_is_the_total_variation_between_label_shares(course, monkeypatch):
    cells = course.copy()
    side = cells.obsm["X_pca"][:, 0] > np.median(cells.obsm["X_pca"][:, 0])
    cells.obs["side"] = np.where(side, "right", "left")
    far = np.zeros((4, 3))
    far[:, 0] = [50, 50, 50, -50]  # three among cells of the right, one of the left
    weights = np.array([1.0, 1, 1, 3])
    register_as = {"far": lambda *_: (far, weights)}
    monkeypatch.setattr(_methods, "_REGISTERED", register_as)
    found = measured(cells, unit("far"), labels="side").query("metric == 'composition'").set_index("held_out")["value"]
    shares = cells.obs.groupby("time", observed=True)["side"].apply(lambda s: (s == "right").mean())
    np.testing.assert_allclose(found, np.abs(shares.loc[found.index] - 0.5), atol=1e-10)
    with pytest.raises(KeyError, match="No column"):
        measured(cells, unit(), labels="nowhere")


def test_gene_errors_are_those_of_the_decoded_cells(course, monkeypatch):
    """A method that gives back the held-out cells as the fold sees them errs by what the components leave out alone."""
    found = measured(course, unit("noise-reference", strict=True, seeds=(0, 1, 2))).query("space == 'own'")
    bad = measured(course, unit("previous", strict=True)).query("space == 'own'")
    for metric in ("gene_mean", "gene_variance"):
        assert found.query(f"metric == '{metric}'")["value"].mean() < bad.query(f"metric == '{metric}'")["value"].mean()
    read = read_course(course, "time", "X_pca", 3, None, strict=True)
    one = restorations(unit("previous", strict=True), read, TASKS["leave-one-out"], device="cpu")[0]
    recipe = one.prepared.recipe
    error = recipe.decode(one.cloud.points).mean(axis=0) - recipe.expression(course.X[read.index[1]]).mean(axis=0)
    first = bad.query("metric == 'gene_mean'")["value"].iloc[0]
    assert first == pytest.approx(np.sqrt(np.mean(error**2)))


def test_gene_errors_go_by_the_restorations_masses_and_unbiased_variances():
    rng, mass = np.random.default_rng(0), np.arange(1, 7) / 21
    restored, measured, seen = (rng.normal(size=(n, 3)) for n in (6, 7, 7))
    judge = _judge.Judge(restored[:, :2], mass, seen[:, :2], None, None, (restored, measured, seen), (6,), 2.0)
    found = _judge._distances(judge, divergence=False)
    mean = mass @ restored - measured.mean(axis=0)
    variance = np.diag(np.cov(restored.T, aweights=mass)) - seen.var(axis=0, ddof=1)
    assert found["gene_mean"].value == pytest.approx(np.sqrt(np.mean(mean**2)))
    assert found["gene_variance"].value == pytest.approx(np.sqrt(np.mean(variance**2)))


def test_rows_are_tidy(course):
    one = unit("uot-cfm", settings=CLOSED, task="every-2nd", start="both", seeds=(0, 7))
    found = measured(course, one, bootstraps=2, labels="fate")
    assert tuple(found.columns) == COLUMNS
    keys = ["held_out", "seed", "space", "metric", "bootstrap"]
    assert not found.duplicated(keys).any()
    assert set(found["seed"]) == {0, 7}
    assert set(found["bootstrap"]) == {-1, 0, 1}
    assert set(found["method"]) == {"uot-cfm (field=closed-form)"}
    assert found["value"].notna().all()
    many = measured(course, unit("previous"), bootstraps=_judge.DIVERGENCES + 2).groupby("metric")["bootstrap"].max()
    assert (many["sinkhorn"], many["w1"]) == (_judge.DIVERGENCES - 1, _judge.DIVERGENCES + 1)
    assert found["error"].isna().all()  # few cells: all distances are exact
    assert set(found["metric"]) == {*_judge.METRICS, "composition"}
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="at least one seed"):
            measured(course, dataclasses.replace(one, seeds=seeds))


def test_a_divergence_that_does_not_converge_costs_no_other_distance(course, monkeypatch):
    def hopeless(*_, **__):
        raise RuntimeError("Sinkhorn: expected marginals to within 0.0001")

    monkeypatch.setattr(_judge, "sinkhorn_divergence", hopeless)
    found = measured(course, unit("previous"), bootstraps=1)
    assert found.query("metric == 'sinkhorn'")["value"].isna().all()
    assert found.query("metric != 'sinkhorn'")["value"].notna().all()


# --- half-samples
def test_all_methods_meet_the_same_half_of_the_held_out_cells(course):
    read = read_course(course, "time", "X_pca", 3, None, strict=False)
    task = TASKS["leave-one-out"]
    one, two = (
        restorations(unit(m, settings=s, start="both"), read, task, device="cpu")
        for m, s in (("previous", ()), ("ot-cfm", CLOSED))
    )
    for a, b in zip(one, two):
        m = len(read.index[1 + a.number[0]])
        (of_a, seen_a), (of_b, seen_b) = (half_sample(r, m, 3) for r in (a, b))
        np.testing.assert_array_equal(seen_a, seen_b)
        assert len(seen_a) == m // 2
        first, last = b.cloud.parts
        np.testing.assert_array_equal(of_a, of_b[of_b < first])  # both move the snapshot before
        assert (len(of_b[of_b < first]), len(of_b[of_b >= first])) == (first // 2, last // 2)
        assert not np.array_equal(seen_a, half_sample(a, m, 4)[1])
        for drawn, elsewhere in zip((of_b, seen_b), half_sample(dataclasses.replace(b, split=1), m, 3)):
            assert not np.array_equal(drawn, elsewhere)  # of other folds
    for a, b in pairwise(one):  # a snapshot that is held out in one fold is moved in the next
        np.testing.assert_array_equal(half_sample(a, len(b.cloud.points), 3)[1], half_sample(b, 9, 3)[0])
    peer = restorations(unit(f"{__name__}:like_previous"), read, task, device="cpu")
    assert all(np.array_equal(half_sample(a, 9, 3)[0], half_sample(b, 9, 3)[0]) for a, b in zip(one, peer))


def test_the_noise_reference_s_halves_share_no_cell(course):
    read = read_course(course, "time", "X_pca", 3, None, strict=False)
    for one in restorations(unit("noise-reference"), read, TASKS["leave-one-out"], device="cpu"):
        rows = read.index[1 + one.number[0]]
        assert one.half.sum() == len(rows) // 2
        np.testing.assert_array_equal(one.cloud.points, read.points[rows[one.half]])
        restored, observed = half_sample(one, int((~one.half).sum()), 0)
        drawn = half_sample(dataclasses.replace(one, half=None, cloud=Cloud(*[np.zeros(2)] * 2, (2,))), len(rows), 0)[1]
        both = {*np.flatnonzero(one.half)[restored], *np.flatnonzero(~one.half)[observed]}
        assert both == set(drawn)  # the very cells that the others meet


def test_a_half_keeps_each_side_s_share_of_the_mass(course):
    read = read_course(course, "time", "X_pca", 3, None, strict=False)
    one = restorations(unit("ot-cfm", settings=CLOSED, start="both"), read, TASKS["leave-one-out"], device="cpu")[1]
    judge = dict(one.spaces(read))["common"]
    rows = half_sample(one, len(judge.observed), 0)
    n = one.cloud.parts[0]
    first = rows[0] < n
    uneven = np.arange(1.0, 1 + len(judge.mass))
    for mass in (one.cloud.mass, uneven / uneven.sum()):
        part = dataclasses.replace(judge, mass=mass).half(*rows)
        assert part.mass[first].sum() == pytest.approx(mass[:n].sum())
        assert part.mass.sum() == pytest.approx(1)
