"""Grids: from a file or from arguments to the same units, with errors that name what there is."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from sctraj import datasets
from sctraj.benchmark import Data, _methods, grid_of, make_grid, read_grid, register, run_grid
from sctraj.benchmark._execute import Progress, duration
from sctraj.benchmark._grid import FAMILIES, NAMES, data_of
from sctraj.benchmark._judge import DIVERGENCES
from sctraj.benchmark._plan import _pairs, as_text, estimate, jobs_of, workers_that_fit
from sctraj.benchmark._store import Store
from sctraj.datasets._courses import Family

TOML = """
data = ["cycle"]
methods = ["ot-cfm", "sb-cfm"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def test_a_frame_for_all_is_one_for_those_that_take_it():
    methods = ["uot-cfm", "ot-cfm", "sb-cfm"]
    shared = make_grid(data=[Data("cycle", "cycle")], tasks=["leave-one-out"], methods=methods, references=False,
                       settings={"frame": ["fixed", "moving"], "n_steps": 5})  # fmt: skip
    assert [(one.method, dict(one.settings).get("frame")) for one in shared.units] == [
        ("uot-cfm", "fixed"), ("uot-cfm", "moving"), ("ot-cfm", None), ("sb-cfm", None),
    ]  # fmt: skip
    assert all(dict(one.settings)["n_steps"] == 5 for one in shared.units)
    own = make_grid(data=[Data("cycle", "cycle")], tasks=["leave-one-out"], methods=["ot-cfm"], references=False,
                    settings={"ot-cfm": {"frame": ["fixed", "moving"]}})  # fmt: skip
    assert [dict(one.settings) for one in own.units] == [{"frame": "fixed"}, {"frame": "moving"}]  # refused when run
    with pytest.raises(ValueError, match=r"expected a method that takes a frame .* for frame='moving', found none"):
        make_grid(data=[Data("cycle", "cycle")], tasks=["leave-one-out"], methods=["ot-cfm"],
                  settings={"frame": "moving"})  # fmt: skip


def test_everything_is_multiplied_out_in_one_order(tmp_path):
    path = written(
        tmp_path,
        """
        tasks = ["leave-one-out", "extrapolation"]
        methods = ["ot-cfm", "sb-cfm"]
        seeds = [3, 1]
        strict = [false, true]
        starts = ["both", "before"]
        references = false
        bootstraps = 3
        threads = 2
        [settings]
        n_steps = [10, 20]
        [settings.sb-cfm]
        sigma = 1.0
        n_steps = 5
        [[data]]
        source = "branching"
        n_cells = 100
        times = [0, 1, 2]
        [[data]]
        source = "cells.h5ad"
        name = "mine"
        time_key = "day"
        use_rep = "X_umap"
        labels = "kind"
        n_dims = 0
        times = { D0 = 0, "D1.5" = 1.5 }
        """,
    )
    grid = read_grid(path)
    assert grid == read_grid(path)
    first, second = grid.data
    assert first == Data("branching", "branching", (("n_cells", 100), ("times", (0, 1, 2))))
    assert second == Data(
        "mine", str(tmp_path / "cells.h5ad"), (), "day", "X_umap", "kind", 0, (("D0", 0.0), ("D1.5", 1.5))
    )
    assert (grid.bootstraps, grid.threads) == (3, 2)
    # per data set and form: two starts of leave-one-out, and of these the one that extrapolation can have
    assert len(grid.units) == len(set(grid.units)) == 2 * 2 * (2 + 1) * (2 + 1)
    assert {unit.start for unit in grid.units if unit.task == "extrapolation"} == {"before"}
    assert {unit.seeds for unit in grid.units} == {(3, 1)}
    assert {unit.settings for unit in grid.units if unit.method == "ot-cfm"} == {(("n_steps", 10),), (("n_steps", 20),)}
    assert {unit.settings for unit in grid.units if unit.method == "sb-cfm"} == {(("n_steps", 5), ("sigma", 1.0))}
    assert [unit.data for unit in grid.units] == sorted(unit.data for unit in grid.units)


def test_arguments_and_a_file_make_the_same_grid(tmp_path):
    made = make_grid([Data("cycle", "cycle")], tasks=["leave-one-out"], methods=["ot-cfm", "sb-cfm"])
    assert read_grid(written(tmp_path, TOML)) == made
    assert grid_of(Data("cycle", "cycle"), methods=["ot-cfm", "sb-cfm"]) == made
    both = grid_of(Data("cycle", "cycle"), methods=["ot-cfm"], strict=True)
    assert {unit.strict for unit in both.units} == {False, True}


def test_references_come_along_where_they_exist():
    made = make_grid([Data("cycle", "cycle")], tasks=["leave-one-out", "extrapolation"], methods=["ot-cfm", "previous"])
    found = {
        task: [unit.method for unit in made.units if unit.task == task] for task in ("leave-one-out", "extrapolation")
    }
    assert found["leave-one-out"] == ["ot-cfm", "previous", "next", "ot-interpolation", "noise-reference"]
    assert found["extrapolation"] == ["ot-cfm", "previous", "ot-interpolation", "noise-reference"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method = ['ot-cfm']\n", r'no key "method" in .*grid\.toml; there are: data, tasks, methods.*mean methods'),
        ("tasks = ['leave-one-in']\n", r'no task "leave-one-in"; there are: leave-one-out, .*mean leave-one-out'),
        ("starts = ['after']\n", 'no start "after"; there are: both, before, first'),
        ("starts = []\n", "at least one start"),
        ("seeds = 0\n", "at least one whole number of at least 0, found 0"),
        ("seeds = [1.5]\n", r"whole number of at least 0, found \[1.5\]"),
        ("seeds = [1, 1]\n", "distinct seeds"),
        ("seeds = true\n", "expected a whole number or a list for seeds"),
        ("strict = 'yes'\n", "expected true or false or a list for strict"),
        ("bootstraps = -1\n", "bootstraps of at least 0, found -1"),
        ("threads = 0\n", "threads of at least 1, found 0"),
        ("device = 'gpu'\n", "a device of auto, cpu, cuda, mps, found 'gpu'"),
        ("[settings]\nn_step = 3\n", r'no setting "n_step"; there are: .*mean n_steps'),
        ("[settings]\nn_steps = []\n", "for n_steps, found"),
        ("[settings]\nn_steps = [10, 10]\n", r"distinct values of n_steps, found \[10, 10\]"),
        ("[settings.uot-cfm]\nn_steps = 3\n", 'no method "uot-cfm"; there are: ot-cfm, sb-cfm'),
        ("seeds = \n", "expected TOML"),
    ],
)
def test_what_cannot_be_understood_is_an_error_that_names_what_can(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_grid(written(tmp_path, f"{TOML}{text}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = ['cycle']\n", "expected methods in"),
        ("methods = ['ot-cfm']\n", "expected data in"),
        ("data = ['cycle']\nmethods = ['ot-cfn']\n", r'no method "ot-cfn"; there are: uot-cfm, .*mean ot-cfm'),
        ("data = ['cycle']\nmethods = ['no_such.module:f']\n", "that can be imported"),
        ("data = ['cycle', 'cycle']\nmethods = ['ot-cfm']\n", "distinct names of data sets"),
        ("data = ['cite-seq']\nmethods = ['ot-cfm']\n", 'no data set "cite-seq".*there are: branching, .*multiome'),
        ("methods = ['ot-cfm']\n[[data]]\nname = 'x'\n", "with a source"),
        ("methods = ['ot-cfm']\ndata = 'cycle'\n", "expected a list for data in"),
        ("methods = ['ot-cfm']\ndata = [3]\n", "with a source, a name or a path, found 3"),
        ("methods = ['ot-cfm']\n[[data]]\nsource = 'cycle'\nn_dims = 'five'\n", "a whole number for n_dims of cycle"),
        ("methods = ['ot-cfm']\n[[data]]\nsource = 'x.csv'\ntimes = [0, 1]\n", "a table for times of x.csv"),
        ("methods = ['ot-cfm']\n[[data]]\nsource = 'x.csv'\ntimes = { D0 = 'a' }\n", 'a number for the time "D0"'),
        ("methods = ['ot-cfm']\n[[data]]\nsource = 'cycle'\nn_cell = 5\n", 'no key of a data set "n_cell".*n_cells'),
        ("methods = ['ot-cfm']\n[[data]]\nsource = 'cite'\nn_cells = 5\n", 'no key of a data set "n_cells" for cite'),
    ],
)
def test_so_are_data_and_methods(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_grid(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing"):
        read_grid(tmp_path / "no.toml")
    with pytest.raises(FileNotFoundError, match="found nothing"):
        data_of("no.h5ad", tmp_path).load()


def test_names_of_data_sets_are_those_of_the_package():
    assert get_args(Family) == FAMILIES
    for name in NAMES:
        assert data_of(name).name == name
    published = [name.replace("-", "_") for name in NAMES if name not in (*FAMILIES, "simulated")]
    assert set(published) <= set(datasets.__all__)


def test_cells_are_read_as_described(tmp_path):
    adata = datasets.simulated_course("cycle", 60, times=(0, 1, 3))
    adata.obs["day"] = [f"D{t:g}" for t in adata.obs["time"]]
    adata.obsm["X_other"] = adata.obsm["X_pca"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    told = {"source": "cells.h5ad", "time_key": "day", "times": {"D0": 0, "D1": 1, "D3": 3}}
    np.testing.assert_array_equal(data_of(told, tmp_path).load().obs["day"], adata.obs["time"])
    np.testing.assert_array_equal(
        np.unique(data_of(told | {"index_clock": True}, tmp_path).load().obs["day"]), [0, 1, 2]
    )
    for told_more, expected in (({}, [0, 1, 3]), ({"index_clock": True}, [0, 1, 2])):  # of cells that are there, too
        given = data_of(told | told_more, tmp_path).given(adata)
        np.testing.assert_array_equal(np.unique(given.obs["day"]), expected)
    assert adata.obs["day"].iloc[0] == "D0"
    for times in ({"D0": 0, "D1": 1}, {}):
        with pytest.raises(ValueError, match=r'found none for .*D3; give them in the grid file: times = \{ "D'):
            data_of(told | {"times": times}, tmp_path).load()
    with pytest.raises(KeyError, match="there are: time"):
        data_of(told | {"time_key": "when"}, tmp_path).load()
    table = pd.DataFrame(adata.obsm["X_pca"], columns=[f"PC{k}" for k in range(5)]).assign(
        hour=adata.obs["time"].to_numpy()
    )
    table.to_csv(tmp_path / "cells.csv", index=False)
    read = data_of({"source": "cells.csv", "time_key": "hour", "use_rep": "PC"}, tmp_path).load()
    np.testing.assert_allclose(read.obsm["PC"], adata.obsm["X_pca"], rtol=1e-6)
    np.testing.assert_array_equal(read.obs["hour"], adata.obs["time"])


def test_the_recipe_as_representation_is_the_strict_forms_common_space(cells):
    from sctraj.benchmark._course import read_course

    data = Data("x", "simulated", use_rep="recipe", n_dims=4)
    ready = data.ready(cells)
    assert "recipe" not in cells.obsm
    published = read_course(ready, "time", "recipe", 4, None, strict=False)
    strict = read_course(cells, "time", "X_pca", 4, None, strict=True)
    np.testing.assert_allclose(published.points, strict.points, atol=1e-5)
    assert Data("x", "simulated").ready(cells) is cells
    with pytest.raises(ValueError, match="n_dims"):
        Data("x", "simulated", use_rep="recipe", n_dims=0).ready(cells)


# --- the plan ------------------------------------------------------------------------------------------------------
@pytest.fixture
def planned() -> tuple[list, dict[str, ad.AnnData]]:
    data = Data("cycle", "cycle", (("n_cells", 90),))
    cells = {"cycle": data.load()}
    return jobs_of(make_grid([data], tasks=["leave-one-out"], methods=["ot-cfm"], seeds=2), cells), cells


def test_keys_do_not_depend_on_the_run_and_change_with_the_data(planned):
    jobs, cells = planned
    assert len({job.key for job in jobs}) == len(jobs) == 5
    data = Data("cycle", "cycle", (("n_cells", 90),))
    grid = make_grid([data], tasks=["leave-one-out"], methods=["ot-cfm"], seeds=2)
    assert [job.key for job in jobs_of(grid, cells)] == [job.key for job in jobs]
    cells["cycle"].obsm["X_pca"][0, 0] += 1
    assert {job.key for job in jobs_of(grid, cells)}.isdisjoint(job.key for job in jobs)
    threads = make_grid([data], tasks=["leave-one-out"], methods=["ot-cfm"], seeds=2, threads=2)
    assert {job.key for job in jobs_of(threads, cells)}.isdisjoint(job.key for job in jobs_of(grid, cells))


def test_a_task_that_a_course_is_too_short_for_is_refused_before_anything_runs(planned):
    data = Data("cycle", "cycle", (("n_cells", 30), ("times", (0, 1, 2))))
    grid = make_grid([data], tasks=["leave-two-out"], methods=["ot-cfm"])
    with pytest.raises(ValueError, match="at least 4 snapshots"):
        jobs_of(grid, {"cycle": data.load()})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ot-cfm", {"settings": {"n_steps": "many"}}, "expected a number for n_steps of ot-cfm, found 'many'"),
        ("ot-cfm", {"settings": {"n_steps": 0}}, "n_steps to be a whole number of at least 1, found 0"),
        ("ot-cfm", {"settings": {"field": "closed"}}, "a field of neural, closed-form, found 'closed'"),
        ("ot-cfm", {"settings": {"path": "bent"}}, "expected a path of .*found 'bent'"),
        ("sb-cfm", {"settings": {"path": "straight"}}, "no path for sb-cfm"),
        (f"{__name__}:a_method", {"settings": {f"{__name__}:a_method": {"sped": 1}}}, "unexpected keyword.*'sped'"),
        ("ot-cfm", {"strict": True}, "^cycle: .*found a finished representation alone.*Leave strict out"),
        ("ot-cfm", {"n_dims": 50}, '^cycle: expected n_dims up to 5, the size of "X_pca", found 50'),
        ("given", {}, r'workers? processes can import, found "given".*"module:function"'),
        ("__main__:given", {}, r'can import, found "__main__:given".*"module:function"'),
    ],
)
def test_what_would_fail_in_a_worker_is_refused_before_any_starts(tmp_path, monkeypatch, method, options, message):
    monkeypatch.setattr(_methods, "_REGISTERED", {})
    monkeypatch.setattr(sys.modules["__main__"], "given", a_method, raising=False)
    register("given", a_method)
    data = Data("cycle", "cycle", (("n_cells", 90),), n_dims=options.pop("n_dims", 5))
    cells = data.load()
    bare = ad.AnnData(obs=cells.obs, obsm={"X_pca": cells.obsm["X_pca"]})
    grid = make_grid([data], tasks=["leave-one-out"], methods=[method], **options)
    with pytest.raises((ValueError, TypeError), match=message):
        run_grid(grid, tmp_path / "out", cells={"cycle": bare})
    assert not (tmp_path / "out").exists()


def test_so_are_cells_without_a_label_and_snapshots_too_small_for_two_halves(tmp_path):
    cells = datasets.simulated_course("cycle", 90, times=(0, 1, 2))
    cells.obs["type"] = pd.Categorical(["a"] * 80 + [None] * 10)
    grid = grid_of(Data("cycle", "cycle", labels="type"), methods=["ot-cfm"])
    with pytest.raises(ValueError, match=r'^cycle: expected a label for every cell in obs\["type"\]; 10 have none'):
        run_grid(grid, tmp_path / "out", cells={"cycle": cells})
    few = cells[[*np.flatnonzero(cells.obs["time"] != 1), *np.flatnonzero(cells.obs["time"] == 1)[:3]]].copy()
    grid = grid_of(Data("cycle", "cycle"), methods=["ot-cfm"])
    with pytest.raises(ValueError, match=r"^cycle: expected at least 4 cells .*found 3 at time 1; .*references"):
        run_grid(grid, tmp_path / "out", cells={"cycle": few})
    assert not (tmp_path / "out").exists()
    assert len(jobs_of(grid_of(Data("cycle", "cycle"), methods=["ot-cfm"], references=False), {"cycle": few})) == 1


def test_where_genes_are_there_and_no_components_the_recipe_is_offered(cells):
    cells = ad.AnnData(cells.X, cells.obs)
    with pytest.raises(KeyError, match=r'No representation "X_pca".*there are: none.*or "recipe"'):
        Data("x", "simulated").ready(cells)
    assert Data("x", "simulated", use_rep="X").ready(cells) is cells


def test_a_changed_method_is_computed_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path, data = tmp_path / "of_my_own.py", Data("cycle", "cycle", (("n_cells", 90),))
    keys = []
    for k in range(2):
        path.write_text(f"from functools import partial\n\ncopy = partial(lambda *given: given[0].points[{k}])\n")
        grid = make_grid([data], tasks=["leave-one-out"], methods=["of_my_own:copy"], references=False)
        keys.append(jobs_of(grid, {"cycle": data.load()})[0].key)
    assert keys[0] != keys[1]


def a_method(snapshots, time, rng, speed=0.0):
    return snapshots.points[0]


def test_estimates_grow_with_what_is_asked_for(planned):
    jobs, cells = planned
    unit = jobs[0].unit
    few, small = estimate(unit, cells["cycle"], "time", n_dims=5)
    many, _ = estimate(type(unit)(**{**vars(unit), "seeds": tuple(range(20))}), cells["cycle"], "time", n_dims=5)
    _, large = estimate(unit, datasets.simulated_course("cycle", 9000), "time", n_dims=5)
    assert many > 3 * few
    assert large > small + 8 * 1500**2
    # clouds that are too large to meet whole do not cost their square
    of = [cells["cycle"][np.resize(np.arange(90), 100_000 * k)] for k in (1, 2)]
    (more, larger), (most, largest) = (estimate(unit, one, "time", n_dims=5) for one in of)
    assert most < 2.2 * more
    assert largest < 2.2 * larger


def test_plans_of_large_snapshots_look_at_the_pairs_of_thinned_ones_in_blocks():
    assert _pairs([100, 200, 50], "uot-cfm", None) == pytest.approx(30_000)  # all of both intervals; rounding
    most = {method: _pairs([100_000, 100_000], method, None) for method in ("uot-cfm", "ot-cfm", "sb-cfm")}
    assert most["uot-cfm"] == pytest.approx(6000 * 1500)
    assert most["ot-cfm"] == pytest.approx(6000 * 3000)
    assert most["sb-cfm"] > 10 * most["ot-cfm"]  # which thins nothing
    assert _pairs([100_000, 100_000], "uot-cfm", 100) == pytest.approx(6000 * 100)


def test_half_samples_and_the_strict_form_take_their_time(planned):
    jobs, cells = planned
    of = partial(estimate, adata=cells["cycle"], time_key="time", n_dims=5)
    baseline = jobs[1].unit
    assert baseline.method == "previous"
    none, some, many = (of(baseline, bootstraps=b)[0] for b in (0, DIVERGENCES, 3 * DIVERGENCES))
    assert some > 3 * none
    assert many - some < 2 * (some - none)  # without the divergence
    assert of(replace(baseline, seeds=tuple(range(9))))[0] == none  # judged once, as it has no seed
    assert of(replace(baseline, strict=True), bootstraps=DIVERGENCES)[0] > 1.5 * some  # in two spaces


def test_the_plan_learns_from_what_the_folder_holds(planned, tmp_path):
    jobs, _ = planned
    store = Store(tmp_path)
    assert "another machine's pace" in as_text(jobs, None, 2)
    store.write(jobs[0].key, pd.DataFrame({"value": [1.0]}), {"seconds": 1000 * jobs[0].work, "planned": jobs[0].work})
    text = as_text(jobs, store, 1)
    assert "measured units of this folder" in text
    assert "5 units, 1 of them there" in text
    lines = text.splitlines()
    assert "there" in lines[1]
    assert "min" in lines[2]


def test_as_many_workers_as_asked_or_as_fit(planned, monkeypatch):
    jobs, _ = planned
    assert workers_that_fit(jobs, 7, "cpu") == 7
    monkeypatch.setattr("sctraj._memory.available_memory", lambda: 1)
    assert workers_that_fit(jobs, None, "cpu") == 1
    with pytest.raises(ValueError, match="at least one"):
        workers_that_fit(jobs, 0, "cpu")


def test_time_left_is_unknown_until_a_unit_has_shown_its_pace(planned):
    jobs, _ = planned
    lines: list[str] = []
    progress = Progress(jobs, lines.append)
    progress.finished(jobs[1], None, {}, 2)  # was there, or failed: says nothing about the pace
    assert "time left: unknown" in lines[-1]
    progress.finished(jobs[0], 10 * jobs[0].work, {}, 1)
    left = 10 * sum(job.work for job in jobs[2:])
    assert progress.left({}, 1) == pytest.approx(left)
    assert f"time left: about {duration(left)}" in lines[-1]
    assert progress.left({}, 100) == pytest.approx(
        10 * max(job.work for job in jobs[2:])
    )  # the longest is still to come
    assert progress.left({jobs[2].key: 10 * jobs[2].work}, 1) == pytest.approx(left - 10 * jobs[2].work)
    for job in jobs[2:]:
        progress.finished(job, 1.0, {}, 1)
    assert lines[-1] == "5 of 5 units, 100% of the planned work"


def test_lengths_of_time_are_for_people():
    assert [duration(s) for s in (0.1, 59, 90, 5400, 200000)] == ["1 s", "59 s", "1.5 min", "1.5 h", "2.3 d"]
