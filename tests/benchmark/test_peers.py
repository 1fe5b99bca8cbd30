"""Other people's methods in the same grid, and yours from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from sctraj import cli, datasets

COPY = "def copy(snapshots, time, rng):\n    return snapshots.points[0]\n"


@pytest.fixture
def peers(monkeypatch):
    """The modules beside the adapters, which need no peer."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.peers import common, run

    return SimpleNamespace(common=common, run=run)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that Python does not look into by itself."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_peer_that_is_absent_is_left_out_with_the_reason_and_the_others_meet_one_grid(
    here, peers, monkeypatch, capsys
):
    run = peers.run
    monkeypatch.syspath_prepend(here)
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

    # the same folder twice is each method once; the copy of the first snapshot is the baseline where that is the next
    monkeypatch.setattr(sys, "argv", ["run", "--table", "out", "out"])
    run.main()
    lines = capsys.readouterr().out.splitlines()
    assert "energy | energy, unweighted | V | W1 |" in lines[0]
    assert sorted(line.split(" | ")[0][2:] for line in lines[2:]) == sorted(
        ["there", "previous", "next", "ot-interpolation", "noise-reference"]
    )
    energies = [float(line.split(" | ")[1].split(" ")[0]) for line in lines[2:]]
    assert energies == sorted(energies)
    mean = found.query("metric == 'energy' and method == 'a_peer:copy'")["mean"].item()
    assert f"| there | {mean:.3f} |" in "\n".join(lines)


@pytest.mark.parametrize(
    ("time", "before", "way"),
    # the last lies beyond, two of the last gap's lengths
    [(1.0, 0, 0.5), (3.5, 1, 0.5), (2.0, 0, 1.0), (5.0, 1, 1.0), (11.0, 2, 2.0)],
)
def test_a_clock_that_counts_snapshots_gives_every_gap_one_length(peers, time, before, way):
    assert peers.common.on_snapshot_clock((0.0, 2.0, 5.0), time) == (before, way)


def test_a_clock_needs_a_snapshot_to_begin_at(peers):
    with pytest.raises(ValueError, match="kept snapshot before time 0"):
        peers.common.on_snapshot_clock((0.0, 2.0), 0.0)


def test_a_peer_draws_from_seeded_global_states_and_leaves_them_as_they_were(peers):
    def drawn(seed):
        with peers.common.seeded(np.random.default_rng(seed)):
            return np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    before = np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()  # noqa: NPY002
    first = drawn(0)
    assert drawn(0) == first != drawn(1)
    assert (np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()) == before  # noqa: NPY002


def test_a_method_of_the_current_folder_from_the_first_snapshot(here):
    (here / "in_this_folder.py").write_text(COPY)
    datasets.simulated_course("cycle", 90).write_h5ad("cells.h5ad")
    run = ["benchmark", "cells.h5ad", "--methods", "in_this_folder:copy", "--start", "first", "--n-seeds", "1"]
    result = CliRunner().invoke(cli.main, [*run, "--bootstraps", "0", "--jobs", "1"])
    assert result.exit_code == 0, result.output
    found = pd.read_csv(here / "sctraj_benchmark" / "benchmark.csv")
    assert set(found["start"]) == {"first"}
    assert "in_this_folder:copy" in set(found["method"])
