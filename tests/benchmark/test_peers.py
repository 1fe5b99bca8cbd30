"""Other people's methods in the same grid, and yours from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from sctraj import cli, datasets

COPY = "def copy(snapshots, time, rng):\n    return snapshots.points[0]\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that Python does not look into by itself."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_peer_that_is_absent_is_left_out_with_the_reason_and_the_others_meet_one_grid(here, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    monkeypatch.syspath_prepend(here)
    from benchmarks.peers import run

    (here / "a_peer.py").write_text(COPY)
    monkeypatch.setattr(run, "OWN", ())
    monkeypatch.setattr(run, "PEERS", {"there": "a_peer:copy", "gone": "a_peer_that_is_gone:copy"})
    monkeypatch.setattr(sys, "argv", ["run", "--seeds", "1", "--bootstraps", "2", "--jobs", "1", "-o", "out"])
    run.main()
    assert "left out gone: No module named 'a_peer_that_is_gone'" in capsys.readouterr().out
    assert "left out: gone" in (here / "out" / "report.html").read_text()
    found = pd.read_csv(here / "out" / "summary.csv")
    assert set(found["method"]) == {"a_peer:copy", "previous", "next", "ot-interpolation", "noise-reference"}
    assert found.query("metric == 'w1' and method == 'a_peer:copy'")[["low", "high"]].notna().all(axis=None)


def test_a_method_of_the_current_folder_from_the_first_snapshot(here):
    (here / "in_this_folder.py").write_text(COPY)
    datasets.simulated_course("cycle", 90).write_h5ad("cells.h5ad")
    run = ["benchmark", "cells.h5ad", "--methods", "in_this_folder:copy", "--start", "first", "--n-seeds", "1"]
    result = CliRunner().invoke(cli.main, [*run, "--bootstraps", "0", "--jobs", "1"])
    assert result.exit_code == 0, result.output
    found = pd.read_csv(here / "sctraj_benchmark" / "benchmark.csv")
    assert set(found["start"]) == {"first"}
    assert "in_this_folder:copy" in set(found["method"])
