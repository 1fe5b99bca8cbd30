from __future__ import annotations

import html
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import anndata
import click
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from sctraj import __version__, benchmark, cli, datasets, get, pl, pp, tl

QUICK = ("--n-steps", "20", "--batch-size", "32", "--device", "cpu")


def sctraj(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


def well(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def options_of(command: str) -> dict[str, click.Parameter]:
    verb = cli.main.commands[command]
    return {one.name: one for one in verb.get_params(click.Context(verb)) if one.name}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def source(cells: anndata.AnnData, here: Path) -> Path:
    path = here / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The embedded example, one seed and few steps, from a directory that holds nothing."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = well(sctraj("benchmark", "--n-seeds", 1, "--methods", "ot-cfm,i-cfm", *QUICK))
    return result, folder / "sctraj_benchmark"


# --- options -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "function", "elsewhere"),
    [
        ("fit", tl.fit_flow, {"module", "copy"}),
        ("benchmark", tl.leave_one_out, {"module", "copy", "key_added", "methods"}),
        ("benchmark", benchmark.run, {"folder", "options"}),
        ("benchmark", benchmark.grid_of, {"others"}),
        ("benchmark", benchmark.run_grid, {"folder", "cells", "compute", "beside", "notes"}),
    ],
)
def test_every_parameter_is_an_option_with_the_default_of_the_signature(command, function, elsewhere):
    found = options_of(command)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    expected = {one.name: one.default for one in parameters if one.name not in elsewhere}
    assert {name: found[name].default for name in expected if name in found} == expected


def test_defaults_that_are_other_functions_are_theirs_too():
    assert options_of("benchmark")["n_dims"].default == inspect.signature(pp.standardize).parameters["n_dims"].default
    for name, option in options_of("plot").items():
        for draw in (pl.loss, pl.trajectories, pl.velocity, pl.leave_one_out):
            if name != "kind" and name in inspect.signature(draw).parameters:
                assert option.default == inspect.signature(draw).parameters[name].default


def test_help_is_the_docstrings():
    shown = " ".join(CliRunner().invoke(cli.main, ["benchmark", "--help"], terminal_width=1000).output.split())
    assert "Fits per held-out snapshot and method." in shown
    assert "ot-cfm, i-cfm, sb-cfm" in shown
    assert "As in" not in shown


@pytest.mark.parametrize("command", ["fit", "benchmark", "plot"])
def test_every_option_has_a_help_of_its_own(command):
    helps = [one.help for one in options_of(command).values() if isinstance(one, click.Option)]
    assert None not in helps
    assert sorted({*helps}) == sorted(helps)


def test_the_basis_is_not_said_to_be_of_one_plot_alone():
    assert options_of("plot")["basis"].help.startswith("A matrix in adata.obsm")


def test_a_method_that_does_not_exist_is_a_usage_error():
    result = sctraj("fit", "cells.h5ad", "-o", "out.h5ad", "--method", "cfm")
    assert result.exit_code == 2
    assert "'ot-cfm', 'i-cfm', 'sb-cfm', 'vp-cfm'" in result.stderr


def test_a_type_that_cannot_be_typed_is_refused():
    with pytest.raises(TypeError, match="command line"):
        cli.click_type(dict[str, int])


# --- as a program --------------------------------------------------------------------------------------------------
def test_as_a_module_it_says_its_version(tmp_path):
    run = [sys.executable, "-m", "sctraj", "--version"]
    assert __version__ in subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, json, click.testing; from sctraj import cli;"
        "shown = click.testing.CliRunner().invoke(cli.main, ['--help']);"
        "print(json.dumps([shown.exit_code, sorted({'torch', 'scanpy', 'anndata', 'pandas'} & set(sys.modules))]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [0, []]


# --- errors --------------------------------------------------------------------------------------------------------
def test_expected_errors_are_one_line_and_code_1(source, here):
    (here / "text.h5ad").write_text("no hdf5")
    pd.DataFrame({"a": [1]}).to_csv(here / "table.csv")
    out = here / "out.h5ad"
    wrong = {
        "found nothing": ("fit", "nowhere.h5ad", "-o", out),
        "found another folder": ("fit", here, "-o", out),
        "found something else": ("fit", "text.h5ad", "-o", out),
        "ends in .h5ad": ("fit", source, "-o", "out.txt"),
        "no folder": ("fit", source, "-o", here / "no" / "out.h5ad"),
        'No column "when"': ("fit", source, "-o", out, "--time-key", "when"),
        "No representation": ("fit", source, "-o", out, "--use-rep", "X_umap"),
        "--parse-time": ("fit", source, "-o", out, "--time-key", "day"),
        "expected a finite sigma": ("fit", source, "-o", out, "--sigma", "-1"),
        "Pass one of them as --parse-time": ("fit", source, "-o", out, "--parse-time", "stage"),
        "Leave --pca out": ("fit", source, "-o", out, "--pca", 3),
        "expected distinct methods": ("benchmark", source, "--methods", "ot-cfm,guess"),
        "--n-dims must be": ("benchmark", source, "--n-dims", 50),
        "found a file": ("benchmark", source, "-o", here / "text.h5ad"),
        'No flow in adata.uns["other"]': ("plot", source, "-o", "a.png", "--kind", "loss", "--key", "other"),
        "ends in .png": ("plot", source, "-o", "a.bmp"),
    }
    for message, arguments in wrong.items():
        result = sctraj(*arguments)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("standardized")]
        assert result.exit_code == 1, arguments
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        assert message in lines[0]
    assert not out.exists()


def test_labels_in_the_usual_column_of_times_can_be_read_as_the_error_says(source, here):
    cells = anndata.read_h5ad(source)
    cells.obs["time"] = "D" + cells.obs["time"].astype(str)
    cells.write_h5ad(here / "text.h5ad")
    fit = ("fit", here / "text.h5ad", "-o", here / "out.h5ad", "--field", "closed-form")
    told = sctraj(*fit).output
    assert 'Read them with --parse-time "time" --time-key "time_parsed".' in told
    assert sctraj(*fit, "--parse-time", "time", "--time-key", "time_parsed").exit_code == 0


@pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore:Consolidated metadata")
def test_a_zarr_store_is_read_as_a_file_is(source, here):
    anndata.read_h5ad(source).write_zarr(here / "cells.zarr")
    for there in (source, here / "cells.zarr"):
        assert sctraj("fit", there, "-o", here / f"{there.suffix[1:]}.h5ad", "--field", "closed-form").exit_code == 0
    one, other = (anndata.read_h5ad(here / f"{suffix}.h5ad") for suffix in ("h5ad", "zarr"))
    np.testing.assert_array_equal(one.obsm["flow_velocity"], other.obsm["flow_velocity"])
    (here / "cells.zarr" / "obs").rename(here / "elsewhere")
    assert "anndata cannot read" in sctraj("fit", here / "cells.zarr", "-o", here / "out.h5ad").output


@pytest.mark.parametrize("command", ["fit", "benchmark"])
def test_errors_of_reading_times_name_the_options_of_the_command_line(source, here, command):
    wrong = {
        'obs["time"] is there already': ("--parse-time", "day"),
        '--time-key is "day", the source column': ("--parse-time", "day", "--time-key", "day"),
        "--time-key must be a name": ("--parse-time", "day", "--time-key", "a/b"),
    }
    for message, arguments in wrong.items():
        result = sctraj(command, source, "-o", here / "out.h5ad", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "--time-key" in result.stderr
        assert "key_added" not in result.stderr
    assert not (here / "out.h5ad").exists()


@pytest.mark.parametrize("command", ["fit", "benchmark"])
@pytest.mark.parametrize("option", [("--unit", "day"), ("--window", "midpoint")])
def test_options_of_reading_times_need_a_column_to_read(source, here, command, option):
    result = sctraj(command, source, "-o", here / "out.h5ad", *option)
    assert result.exit_code == 2
    assert f"{option[0]} has no meaning without --parse-time" in result.stderr
    assert not (here / "out.h5ad").exists()


def test_an_hdf5_file_that_anndata_cannot_read_is_one_line_as_well(here):
    import h5py

    with h5py.File(here / "other.h5ad", "w") as file:
        file["obs"] = np.zeros(3)
    result = sctraj("fit", "other.h5ad", "-o", "out.h5ad")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Expected an h5ad file")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--time-key", "day"), 'Read them with --parse-time "day".'),
        (("--time-key", "when"), "Pass one of them as --time-key."),
        (("--method", "sb-cfm", "--sigma", "0"), "its limit at 0 is --method ot-cfm"),
        (("--use-rep", "X_umap_"), "--use-rep"),
    ],
)
def test_errors_are_in_terms_of_the_command_line(source, options, says):
    cells = anndata.read_h5ad(source)
    cells.obs["day"] = [f"day {time:g}" for time in cells.obs["time"]]
    cells.write_h5ad(source)
    result = sctraj("fit", source, "-o", "out.h5ad", *options)
    assert says in result.stderr
    assert "sctraj.pp" not in result.stderr
    assert "_key" not in result.stderr


def test_what_is_quoted_or_of_the_user_stays():
    flags = {"time_key": "--time-key", "method": "--method"}
    as_they_are = ('found "time_key" in obs', "my_method=3", "another method", "time_keys", 'obs["method"]')
    for message in (*as_they_are, "a/time_key/b.h5ad", "time_key.h5ad"):
        assert cli.as_options(message, flags) == message
    assert cli.as_options("pass method='a-b', time_key=\"day\".", flags) == "pass --method a-b, --time-key day."


def test_debug_lets_the_error_through(source):
    result = sctraj("fit", source, "-o", "out.h5ad", "--time-key", "when", "--debug")
    assert isinstance(result.exception, KeyError)


def test_other_errors_are_not_dressed_up(source, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "prepare", broken)
    assert isinstance(sctraj("fit", source, "-o", "out.h5ad").exception, ZeroDivisionError)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail() -> None:
        with benchmark.written_whole(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [one.name for one in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "old"


# --- fit -----------------------------------------------------------------------------------------------------------
def test_fit_writes_what_the_function_writes(source, cells, here):
    well(sctraj("fit", source, "-o", "out.h5ad", "--method", "sb-cfm", "--rng", 3, "--trajectories", *QUICK))
    written = anndata.read_h5ad(here / "out.h5ad")
    tl.fit_flow(cells, method="sb-cfm", rng=3, n_steps=20, batch_size=32, device="cpu")
    np.testing.assert_array_equal(written.obsm["flow_velocity"], cells.obsm["flow_velocity"])
    assert written.obsm["flow_trajectories"].shape == (600, 24, 6)  # 20 even times, and four of the snapshots'
    assert get.vector_field(written).has_score


def test_fit_reads_times_from_text_and_computes_components(source, cells, here):
    del cells.obs["time"], cells.obsm["X_pca"]
    cells.write_h5ad(source)
    well(sctraj("fit", source, "-o", "out.h5ad", "--parse-time", "day", "--unit", "hour", "--pca", 4, *QUICK))
    written = anndata.read_h5ad(here / "out.h5ad")
    assert written.obs["time"].max() == 7 * 24
    assert written.obsm["flow_velocity"].shape == (600, 4)


def test_output_may_be_the_input(source):
    well(sctraj("fit", source, "-o", source, "--key-added", "mine", *QUICK))
    assert "mine_velocity" in anndata.read_h5ad(source).obsm


# --- benchmark -----------------------------------------------------------------------------------------------------
def test_benchmark_runs_anywhere_and_its_files_agree(benchmarked):
    result, folder = benchmarked
    assert sorted(path.name for path in folder.iterdir()) == [
        "benchmark.h5ad",
        "leave_one_out.csv",
        "leave_one_out.png",
    ]
    adata = anndata.read_h5ad(folder / "benchmark.h5ad")
    table = pd.read_csv(folder / "leave_one_out.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(table, get.leave_one_out(adata), check_dtype=False, check_exact=True)
    assert set(table["method"]) > {"ot-cfm", "i-cfm", "previous", "noise-reference"}
    for metric, title in (("energy", "energy distance"), ("w1", "Wasserstein-1")):
        lines = result.stdout[result.stdout.index(title) :].splitlines()
        for name, mean in get.leave_one_out(adata, metric=metric)["mean"].items():
            assert f"{mean:.3f}" in next(line for line in lines if line.startswith(str(name)))
    assert "t = 2.5" in result.stdout
    assert "Protocol: " in result.stdout


def test_benchmark_judges_in_the_published_space_unless_told_otherwise(benchmarked, source, here):
    standardized = anndata.read_h5ad(benchmarked[1] / "benchmark.h5ad")
    np.testing.assert_allclose(standardized.obsm["X_std"].std(0), np.ones(5), rtol=1e-5)
    assert standardized.uns["leave_one_out_protocol"]["use_rep"] == "X_std"
    well(sctraj("benchmark", source, "--n-dims", 0, "-o", "as_is", "--n-seeds", 1, "--methods", "i-cfm", *QUICK))
    as_is = anndata.read_h5ad(here / "as_is" / "benchmark.h5ad")
    assert as_is.uns["leave_one_out_protocol"]["use_rep"] == "X_pca"
    assert as_is.obsm["flow_restored"].shape == (600, 6)
    adata = anndata.read_h5ad(source)
    adata.obsm["X_std"] = adata.obsm["X_pca"][:, :2]  # another's, which stays
    adata.write_h5ad(source)
    well(sctraj("benchmark", source, "-o", "beside", "--n-seeds", 1, "--methods", "i-cfm", *QUICK))
    beside = anndata.read_h5ad(here / "beside" / "benchmark.h5ad")
    np.testing.assert_array_equal(beside.obsm["X_std"], adata.obsm["X_std"])
    assert beside.uns["leave_one_out_protocol"]["use_rep"] == "X_std_benchmark"


def test_a_path_is_for_the_methods_that_take_one(source, here):
    options = ("--path", "hermite", "--methods", "ot-cfm,sb-cfm", "--n-seeds", 1)
    well(sctraj("benchmark", source, *options, *QUICK))
    record = anndata.read_h5ad(here / "sctraj_benchmark" / "benchmark.h5ad").uns["leave_one_out_protocol"]
    assert list(record["paths"]) == ["hermite", "brownianbridge"]


def test_benchmark_replaces_the_results_of_an_earlier_run(source, here):
    for n_seeds in (1, 2):
        well(sctraj("benchmark", source, "--n-seeds", n_seeds, "--methods", "i-cfm", *QUICK))
    assert pd.read_csv(here / "sctraj_benchmark" / "leave_one_out.csv")["seed"].max() == 1


# --- benchmark in units --------------------------------------------------------------------------------------------
PARQUET = ["benchmark.parquet"] if importlib.util.find_spec("pyarrow") else []
GRID_FILES = ["benchmark.csv", *PARQUET, "paired.csv", "report.html", "summary.csv", "wide.csv"]
TINY = ("--n-seeds", 1, "--n-steps", 3, "--width", 8, "--device", "cpu", "--jobs", 1, "--bootstraps", 2)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_tasks_and_the_strict_form_go_in_units_and_are_resumed(source, here):
    run = ("benchmark", source, "--methods", "i-cfm", "--tasks", "extrapolation", "--strict", *TINY)
    first = well(sctraj(*run))
    folder = here / "sctraj_benchmark"
    assert written(folder) == GRID_FILES
    assert "cells, extrapolation, strict, from before, common space: Wasserstein-1 distance" in first.stdout
    table = pd.read_csv(folder / "benchmark.csv")
    assert set(table["strict"]) == {False, True}
    assert {"i-cfm (n_steps=3, width=8)", "previous", "ot-interpolation", "noise-reference"} == set(table["method"])
    before = (folder / "benchmark.csv").read_bytes()
    again = well(sctraj(*run, "--plan"))
    assert "8 units, 8 of them there" in again.stdout
    assert "nothing left to do" in again.stdout
    warning = "cells: strict beside published: the published form is in X_pca, not in the strict form's own recipe"
    assert warning in first.stderr
    assert html.escape(warning.partition(": the")[2]) in (folder / "report.html").read_text()
    assert "differ by more than the leak" not in well(sctraj(*run, "--plan", "--use-rep", "recipe")).stderr
    assert "8 of 8 units were there" in well(sctraj(*run)).stderr
    assert (folder / "benchmark.csv").read_bytes() == before


def test_a_plan_writes_and_computes_nothing(here):
    (here / "grid.toml").write_text('data = ["branching"]\nmethods = ["ot-cfm"]\nseeds = 2\n')
    shown = well(sctraj("benchmark", "--grid", "grid.toml", "--plan", "-o", "out")).stdout
    assert "5 units, 0 of them there" in shown
    assert "GiB" in shown
    assert not (here / "out").exists()


def test_options_that_would_do_nothing_are_usage_errors(source, here):
    (here / "grid.toml").write_text('data = ["branching"]\nmethods = ["ot-cfm"]\n')
    wrong = {
        "--rng has no meaning with --grid": ("--grid", "grid.toml", "--rng", 1),
        "IN has no meaning with --grid": (source, "--grid", "grid.toml"),
        "--tasks has no meaning with --published": ("--published", "--tasks", "cells"),
        "--growth-key has no meaning with --jobs": (source, "--growth-key", "growth", "--jobs", 1),
        "--jitter has no meaning with --tasks": (source, "--jitter", 1, "--tasks", "cells"),
    }
    for message, arguments in wrong.items():
        result = sctraj("benchmark", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_errors_of_a_grid_are_one_line_and_code_1(source, here, monkeypatch):
    (here / "grid.toml").write_text('data = ["branching"]\nmethods = ["ot-cfm"]\nseed = 3\n')
    monkeypatch.setitem(sys.modules, "distributed", None)
    wrong = {
        'no key "seed"': ("--grid", "grid.toml"),
        "Expected a TOML file, found nothing": ("--grid", "no.toml"),
        'no task "guess"': (source, "--tasks", "guess"),
        'pip install "sctraj[dask]"': (source, "--dask", "local", "--methods", "i-cfm", *TINY),
    }
    for message, arguments in wrong.items():
        result = sctraj("benchmark", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr.splitlines()[-1]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, anndata.AnnData | None]:
    """What the published data sets are taken to be; None where one cannot be had."""
    there: dict[str, anndata.AnnData | None] = dict.fromkeys(("embryoid_body", "cite", "multiome"))

    def of(name: str) -> anndata.AnnData:
        adata = there[name]
        if adata is None:
            raise ConnectionError(f"expected to download {name}, found no way to")
        return adata.copy()

    for name in there:
        monkeypatch.setattr(datasets, name, lambda name=name, **_: of(name))
    return there


def test_the_published_protocol_on_what_can_be_had(published, here):
    published["embryoid_body"] = datasets.simulated_course("branching", 60)
    published["cite"] = datasets.simulated_course("crossing", 48, times=(2, 3, 4, 7))
    tiny = ("--n-seeds", 1, "--n-steps", 2, "--width", 4, "--device", "cpu", "--jobs", 1)
    result = well(sctraj("benchmark", "--published", *tiny))
    assert "skipped multiome: expected to download multiome" in result.stderr
    assert written(here / "sctraj_benchmark") == sorted([*GRID_FILES, "published.csv"])
    table = pd.read_csv(here / "sctraj_benchmark" / "published.csv").set_index("method")
    assert table.loc["OT-CFM", "embryoid-body, published"] == 0.790
    assert table.loc["OT-CFM", ["cite, here, index clock", "cite, here, real clock"]].notna().all()
    assert "skipped: multiome" in (here / "sctraj_benchmark" / "report.html").read_text()


def test_the_published_protocol_without_any_data_says_so(published, here):
    result = sctraj("benchmark", "--published")
    assert result.exit_code == 1
    *reasons, last = result.stderr.splitlines()
    assert [line.split(":")[0] for line in reasons] == ["skipped embryoid-body", "skipped cite", "skipped multiome"]
    assert last.startswith("Error: none of the published data sets can be had (embryoid-body, cite, multiome)")
    assert not (here / "sctraj_benchmark").exists()


# --- plot ----------------------------------------------------------------------------------------------------------
def drawn(path: Path) -> bool:
    """Whether a picture has anything but its background, here at least a percent of it."""
    image = matplotlib.image.imread(path)[..., :3]
    return bool((image != image[0, 0]).any(-1).mean() > 0.01)


def test_plots_are_written(source, benchmarked, here):
    well(sctraj("fit", source, "-o", "out.h5ad", "--trajectories", *QUICK))
    for kind in ("velocity", "stream", "trajectories", "loss"):
        well(sctraj("plot", "out.h5ad", "-o", f"{kind}.png", "--kind", kind))
    for kind in ("leave-one-out", "map"):
        well(sctraj("plot", benchmarked[1] / "benchmark.h5ad", "-o", f"{kind}.png", "--kind", kind))
    well(sctraj("plot", "out.h5ad", "-o", "fates.png", "--basis", "latent", "--color", "fate"))
    pictures = list(here.glob("*.png"))
    assert len(pictures) == 7
    assert all(drawn(path) for path in pictures)
    assert drawn(benchmarked[1] / "leave_one_out.png")


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("stream", "sctraj fit IN -o OUT."),
        ("loss", "sctraj fit IN -o OUT."),
        ("leave-one-out", "sctraj benchmark IN -o FOLDER, and plot FOLDER/benchmark.h5ad."),
        ("map", "sctraj benchmark IN -o FOLDER, and plot FOLDER/benchmark.h5ad."),
    ],
)
def test_what_a_plot_misses_is_said_with_the_command_that_writes_it(source, kind, command):
    result = sctraj("plot", source, "-o", "a.png", "--kind", kind)
    assert result.exit_code == 1
    assert result.stderr.strip().endswith(f"Here: {command}")


@pytest.mark.parametrize(("kind", "option"), [("loss", "--color"), ("leave-one-out", "--basis")])
def test_an_option_that_a_plot_does_not_take_is_a_usage_error(source, kind, option):
    result = sctraj("plot", source, "-o", "a.png", "--kind", kind, option, "fate")
    assert result.exit_code == 2
    assert f"{option} has no meaning for --kind {kind}" in result.stderr
