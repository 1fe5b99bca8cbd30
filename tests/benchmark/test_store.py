"""Finished units: the same bits back, no half file, and a run that goes on after a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from sctraj.benchmark import Unit, _plan, _store, _workers
from sctraj.benchmark._files import from_text, to_text, write_durably
from sctraj.benchmark._store import Store, fingerprint, key_of

UNIT = Unit("a", "leave-one-out", "previous", (), False, "both", (0, 1))
# A grid of six small units that leave a mark when they begin, take as long as told and, if "fatal", kill their process
# or raise.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from sctraj.benchmark import Data, evaluate, make_grid, run_grid

marks, fatal = Path(sys.argv[2]), sys.argv[4].split(",")

def slowly(unit, adata, **how):
    name = f"{unit.method}-{unit.task}"
    with (marks / "begun").open("a") as file:
        file.write(f"{name} {os.getpid()}\\n")
    if f"kill:{name}" in fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    if f"raise:{name}" in fatal:
        raise ValueError("too few cells of <b>this</b> kind")
    table = evaluate(unit, adata, **how)
    time.sleep(float(sys.argv[3]))
    return table

if __name__ == "__main__":
    grid = make_grid(
        [Data("cells", str(marks.parent / "cells.h5ad"))], tasks=["leave-one-out", "extrapolation"],
        methods=["i-cfm", "previous", "ot-interpolation"], settings={"n_steps": 3, "width": 8}, seeds=2,
        references=False, bootstraps=2,
    )
    jobs = 2 if len(sys.argv) > 5 else 1
    run_grid(grid, sys.argv[1], compute=slowly, jobs=jobs, dask=sys.argv[5] if len(sys.argv) > 5 else None)
"""
N_UNITS = 6


# --- tables and files ----------------------------------------------------------------------------------------------
def test_a_table_reads_back_bit_for_bit():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**64, 2000, dtype=np.uint64).view(np.float64)
    bits = bits[~np.isnan(bits)]  # of nan there is one: which of its many bits are set says nothing
    odd = [0.1 + 0.2, 5e-324, -0.0, math.inf, -math.inf, math.nan, 1e22, np.nextafter(1, 2)]
    values = np.concatenate([odd, bits])
    n = len(values)
    text = ["", "nan", "NA", "a,b", 'a "b"', "two\nlines", "\r\n", "<script>", "ü – 好", " x ", "1e5", "True", "a:b"]
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    table = pd.DataFrame(
        {
            "value": values,
            "single": single,
            "seed": rng.integers(-(2**62), 2**62, n),
            "strict": rng.random(n) < 0.5,
            "with:colon": np.resize(np.array(text, dtype=object), n),
            "mixed": np.resize(np.array([None, 1, 0.1, "x", np.float64(0.3), np.int64(7)], dtype=object), n),
        }
    )  # fmt: skip
    with np.errstate(over="ignore"):
        back = from_text(to_text(table))
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    for name in ("value", "single"):
        assert back[name].to_numpy().tobytes() == table[name].to_numpy().tobytes()
    assert to_text(back) == to_text(table)


def test_a_table_without_rows_keeps_its_types():
    table = pd.DataFrame({"value": np.zeros(0), "seed": np.zeros(0, np.int64), "strict": np.zeros(0, bool)})
    pd.testing.assert_frame_equal(from_text(to_text(table)), table)


def test_an_untyped_table_is_what_pandas_reads(tmp_path):
    table = pd.DataFrame({"method": ["a,b", "c"], "value": [0.1 + 0.2, math.nan]})
    (tmp_path / "table.csv").write_text(to_text(table, typed=False))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv", float_precision="round_trip"), table)


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "unit.csv"
    write_durably(path, "old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_durably(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["unit.csv"]
    assert path.read_text() == "old"


# --- keys ----------------------------------------------------------------------------------------------------------
def test_a_key_changes_with_everything_that_numbers_depend_on(monkeypatch):
    context = {"fingerprint": "x", "n_dims": 5}
    units = [
        replace(UNIT, **change)
        for change in (
            {}, {"data": "b"}, {"task": "cells"}, {"method": "next"}, {"settings": (("n_steps", 3),)}, {"strict": True},
            {"start": "before"}, {"seeds": (0,)},
        )
    ]  # fmt: skip
    keys = [key_of(unit, context) for unit in units] + [key_of(UNIT, context | {"fingerprint": "y"})]
    monkeypatch.setattr(_store, "code_hash", lambda: "changed")
    keys.append(key_of(UNIT, context))
    monkeypatch.setattr(_store, "versions", lambda: {"torch": "99"})
    keys.append(key_of(UNIT, context))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert key_of(replace(UNIT), dict(reversed(context.items()))) == keys[0]


def test_a_fingerprint_changes_with_names_times_coordinates_expression_and_labels(cells):
    def of(adata: ad.AnnData, labels: str | None = None) -> str:
        return fingerprint(adata, time_key="time", use_rep="X_pca", labels=labels)

    def changed(what: Callable[[ad.AnnData], object]) -> str:
        other = cells.copy()
        what(other)
        return of(other, "fate")

    def set_label(adata: ad.AnnData) -> None:
        adata.obs["fate"] = ["other", *adata.obs["fate"].astype(str)[1:]]

    def add_one(adata: ad.AnnData) -> None:
        adata.X[0, :3] = adata.X[0, :3] + 1

    def nudge(adata: ad.AnnData) -> None:
        adata.obsm["X_pca"][0, 0] = np.nextafter(adata.obsm["X_pca"][0, 0], np.float32(np.inf))

    def rename(adata: ad.AnnData) -> None:
        adata.obs_names = ["x", *adata.obs_names[1:]]

    found = [of(cells), of(cells, "fate"), *map(changed, (set_label, add_one, nudge, rename))]
    assert len(set(found)) == len(found)
    assert of(cells.copy()) == found[0]
    with pytest.raises(KeyError, match="there are"):
        of(cells, "kind")


# --- claims --------------------------------------------------------------------------------------------------------
def test_a_claim_holds_off_others_until_it_is_released(tmp_path):
    store, other = Store(tmp_path), Store(tmp_path)
    claim = store.claim("key")
    assert claim is not None
    assert other.claim("key") is None
    claim.release()
    again = other.claim("key")
    assert again is not None
    again.release()


def test_a_failure_is_forgotten_once_the_unit_is_stored(tmp_path):
    store = Store(tmp_path)
    store.fail("key", {"error": "no"})
    assert not store.has("key")
    assert store.failure("key") == {"error": "no"}
    store.write("key", pd.DataFrame({"value": [0.1]}), {"seconds": 1.0})
    assert store.failure("key") is None
    assert store.has("key")
    assert store.records() == [{"seconds": 1.0}]


def test_every_worker_leases_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_workers, "n_gpus", lambda: 2)
    leases, seen = [], []
    for _ in range(3):  # three workers on a machine with two: the last has to share
        monkeypatch.setattr(_workers, "_GPU", [])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        _workers._receive({}, "cuda")
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        leases += _workers._GPU
    assert seen == ["0", "1", ""]
    for lease in leases:
        lease.release()


def test_a_gpu_that_is_named_is_not_leased_and_has_one_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_workers, "n_gpus", lambda: 2)
    monkeypatch.setattr(_plan, "n_gpus", lambda: 2)
    monkeypatch.setattr(_workers, "_GPU", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    _workers._receive({}, "cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not _workers._GPU
    assert [_plan.workers_that_fit([], None, device) for device in ("cuda", "cuda:1")] == [2, 1]


# --- real kills ----------------------------------------------------------------------------------------------------
class Runs:
    """Processes that run the script on cells of their own, each told a folder and how to behave."""

    def __init__(self, where: Path) -> None:
        from sctraj.datasets import simulated_course

        self.script = where / "grid.py"
        self.script.write_text(SCRIPT)
        simulated_course("branching", 60).write_h5ad(where / "cells.h5ad")
        self.where = where
        self.started: list[subprocess.Popen[str]] = []

    def marks(self, name: str) -> Path:
        """A folder for marks, beside the cells."""
        path = self.where / name
        path.mkdir(exist_ok=True)
        return path

    def start(self, out: Path, marks: Path, *, pause: float = 0.0, fatal: str = "", dask: str = "") -> subprocess.Popen:
        command = [str(self.script), str(out), str(marks), str(pause), fatal, *([dask] if dask else [])]
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        """Leave nothing of them."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("runs"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def whole(runs: Runs) -> bytes:
    """The final table of a run that nothing happens to."""
    out = runs.where / "whole"
    finish(runs.start(out, runs.marks("whole-marks")))
    return (out / "benchmark.csv").read_bytes()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out = process.communicate(timeout=180)[0]
    assert process.returncode == code, out
    return out


def begun(marks: Path) -> list[tuple[str, int]]:
    """Units that have begun, with their processes, in order."""
    path = marks / "begun"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(name, int(pid)) for name, pid in (line.split() for line in lines)]


def stored(out: Path) -> set[str]:
    """Units that are stored, as their processes name them."""
    units = [json.loads(path.with_suffix(".json").read_text())["unit"] for path in (out / "units").glob("*.csv")]
    return {f"{unit['method']}-{unit['task']}" for unit in units}


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_run_is_finished_by_two_at_once_that_share_what_is_left(runs, whole, tmp_path):
    out, first, second = tmp_path / "out", runs.marks("first"), runs.marks("second")
    process = runs.start(out, first, pause=1.0)
    wait_until(process, lambda: bool(stored(out)) and len(begun(first)) > len(stored(out)))
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = stored(out)
    assert 0 < len(kept) < N_UNITS
    assert not (out / "benchmark.csv").exists()
    logs = [finish(both) for both in [runs.start(out, second, pause=0.5) for _ in range(2)]]
    assert any(f"{len(kept)} of {N_UNITS} units were there from earlier runs" in log for log in logs)
    assert all("wrote benchmark.csv" in log for log in logs)
    names = [name for name, _ in begun(second)]
    assert len(names) == len(set(names)) == N_UNITS - len(kept)  # none was computed twice
    assert kept.isdisjoint(names)
    assert (out / "benchmark.csv").read_bytes() == whole
    assert not list(out.rglob("*.part"))


def test_parquet_holds_the_same_table(runs, whole):
    pytest.importorskip("pyarrow", reason="the table is written as parquet where pyarrow is")
    parquet = pd.read_parquet(runs.where / "whole" / "benchmark.parquet")
    table = pd.read_csv(runs.where / "whole" / "benchmark.csv")
    pd.testing.assert_frame_equal(parquet, table, check_dtype=False, rtol=1e-12)


def test_units_that_fail_or_take_their_process_along_do_not_stop_the_others(runs, tmp_path):
    out, fatal = tmp_path / "out", "kill:previous-leave-one-out,raise:ot-interpolation-extrapolation"
    out.mkdir()
    (out / "published.csv").write_text("of an earlier run\n")
    log = finish(runs.start(out, runs.marks("fatal"), fatal=fatal), 1)
    assert stored(out) == {
        "i-cfm-leave-one-out", "ot-interpolation-leave-one-out", "i-cfm-extrapolation", "previous-extrapolation",
    }  # fmt: skip
    assert "2 of 6 units failed" in log
    assert f"traces in {out / 'failed'}" in log
    assert not (out / "published.csv").exists()
    failures = pd.read_csv(out / "failures.csv")["error"].tolist()
    assert "killed twice" in failures[0]
    assert failures[1] == "ValueError: too few cells of <b>this</b> kind"
    page = (out / "report.html").read_text()
    assert "too few cells of &lt;b&gt;this&lt;/b&gt; kind" in page
    assert "<b>" not in page


def test_a_dask_worker_that_is_killed_mid_task_changes_nothing(runs, whole, tmp_path):
    pytest.importorskip("distributed")
    out, marks = tmp_path / "out", runs.marks("dask")
    process = runs.start(out, marks, pause=1.0, dask="local")
    wait_until(process, lambda: bool(stored(out)) and len(begun(marks)) > len(stored(out)))
    name, pid = next((name, pid) for name, pid in reversed(begun(marks)) if name not in stored(out))
    os.kill(pid, signal.SIGKILL)
    finish(process)
    tries = [other for unit, other in begun(marks) if unit == name]
    assert len(tries) == 2
    assert pid == tries[0] != tries[1]
    assert (out / "benchmark.csv").read_bytes() == whole
