"""Fates and ancestry: against lineages that are known, against a computation by hand, and what is refused."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch import nn

import sctraj
from sctraj.flow.integrate import Integration, transport
from sctraj.tl import _fates as verb

QUICK = {"n_steps": 30, "batch_size": 32}


@pytest.fixture
def lineages() -> AnnData:
    """Two lineages far apart that drift alike: 3 times x 40 cells, in an order of no meaning."""
    rng = np.random.default_rng(0)
    lineage, time = np.tile([0, 1], 60), np.repeat([0.0, 1.0, 3.0], 40)
    points = np.stack([2.0 * time, 8.0 * lineage], 1) + 0.3 * rng.standard_normal((120, 2))
    obs = pd.DataFrame(
        {"time": time, "lineage": pd.Categorical(np.array(["CD4/CD8", "B"])[lineage])},
        index=[f"cell_{i}" for i in range(120)],
    )
    return AnnData(obs=obs, obsm={"X_pca": points.astype(np.float32)})[rng.permutation(120)].copy()


def test_cells_end_in_their_own_lineage_and_came_from_it(lineages: AnnData) -> None:
    sctraj.tl.fit_flow(lineages, field="closed-form")
    for time in (None, 0.0, 1.0):  # fates, ancestry, and both
        sctraj.tl.fates(lineages, "lineage", time)
        found = sctraj.get.fates(lineages)
        assert list(found.columns) == ["B", "CD4/CD8"]
        assert (found.idxmax(axis=1) == lineages.obs["lineage"]).all()
        assert (found.max(axis=1) == 1).all()
        assert lineages.uns["flow"]["fates"]["time"] == (3.0 if time is None else time)


def test_fates_are_shares_of_the_nearest_cells_over_members(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, n_members=2, **QUICK)
    sctraj.tl.fates(cells, "fate", 5.5, n_neighbors=7, n_steps=4)
    there = (cells.obs["time"] == 5.5).to_numpy()
    labels = cells.obs["fate"][there].to_numpy()
    field, gap = sctraj.get.vector_field(cells), 7.0 / 5
    for time in (2.5, 7.0):
        own = (cells.obs["time"] == time).to_numpy()
        start = torch.from_numpy(cells.obsm["X_pca"][own]).expand(2, -1, -1)
        steps = int(np.ceil(4 * abs(5.5 - time) / gap))
        ends = transport(field, start, time, 5.5, Integration("rk4", steps)).points.numpy()
        distance = np.linalg.norm(ends[:, :, None] - cells.obsm["X_pca"][there], axis=-1)  # members x own x there
        nearest = labels[np.argsort(distance, axis=-1)[..., :7]]
        here = cells.obsm["X_pca"][own]
        alike = np.argsort(np.linalg.norm(here[:, None] - here, axis=-1), axis=-1)[:, :7]
        for group in ("A", "B"):
            expected = (nearest == group).mean(axis=(0, 2))[alike].mean(axis=1)
            np.testing.assert_allclose(sctraj.get.fates(cells)[group][own], expected, atol=1e-6)
    assert len(np.unique(sctraj.get.fates(cells)["A"][cells.obs["time"] == 2.5])) > 3


def test_cells_of_the_time_keep_their_group_and_those_without_one_do_not_vote(lineages: AnnData) -> None:
    last = np.flatnonzero(lineages.obs["time"] == 3)
    lineages.obs.loc[lineages.obs_names[last[:10]], "lineage"] = np.nan
    lineages.obs.loc[lineages.obs["time"] < 3, "lineage"] = np.nan  # asked of nobody
    sctraj.tl.fit_flow(lineages, field="closed-form")
    sctraj.tl.fates(lineages, "lineage")
    found = sctraj.get.fates(lineages)
    assert found.iloc[last[:10]].isna().all(axis=None)
    assert (found.iloc[last[10:]].idxmax(axis=1) == lineages.obs["lineage"].iloc[last[10:]]).all()
    before = found[(lineages.obs["time"] < 3).to_numpy()]
    np.testing.assert_allclose(before.sum(axis=1), 1)


def test_all_cells_with_a_group_are_asked_where_they_are_fewer_than_neighbours(lineages: AnnData) -> None:
    last = np.flatnonzero(lineages.obs["time"] == 3)
    keep = [*last[lineages.obs["lineage"].iloc[last] == "B"][:1], *last[lineages.obs["lineage"].iloc[last] != "B"][:3]]
    lineages.obs["few"] = lineages.obs["lineage"].where(np.isin(np.arange(120), keep))
    sctraj.tl.fit_flow(lineages, field="closed-form")
    sctraj.tl.fates(lineages, "few", n_neighbors=10)
    moved = sctraj.get.fates(lineages)[(lineages.obs["time"] < 3).to_numpy()]
    np.testing.assert_allclose(moved, np.tile([0.25, 0.75], (80, 1)))


def test_samples_of_the_stochastic_flow_spread_fates(cells: AnnData) -> None:
    sctraj.tl.fit_flow(cells, method="sb-cfm", **QUICK)
    found = []
    for draws, seed in ((None, 0), (4, 0), (4, 0), (4, 1)):
        sctraj.tl.fates(cells, "fate", n_neighbors=1, n_draws=draws, n_steps=5, rng=seed)
        found.append(sctraj.get.fates(cells)[cells.obs["time"] < 7])
    single, draws, again, others = found
    assert set(np.unique(single)) == {0.0, 1.0}
    assert set(np.unique(draws)) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert draws.equals(again)
    assert not draws.equals(others)


def test_cells_on_disk_have_the_same_fates(cells: AnnData, tmp_path) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for one in (cells, backed):
        sctraj.tl.fates(one, "fate", 3.5)
    pd.testing.assert_frame_equal(sctraj.get.fates(backed), sctraj.get.fates(cells))
    with pytest.raises(ValueError, match="a backed one and copy=True"):
        sctraj.tl.fates(backed, "fate", copy=True)


def test_neighbours_are_sought_among_cells_evenly_chosen_of_many(lineages: AnnData, monkeypatch) -> None:
    x = np.arange(10.0)[:, None]
    monkeypatch.setattr(verb, "MOST_ASKED", 4)  # rows 0, 3, 6 and 9
    assert verb._nearest(np.array([[4.0], [8.0]]), x, 2).tolist() == [[3, 6], [9, 6]]
    monkeypatch.setattr(verb, "MOST_ASKED", 20)  # half of a snapshot's cells, of both lineages
    sctraj.tl.fit_flow(lineages, field="closed-form")
    sctraj.tl.fates(lineages, "lineage", n_neighbors=2)
    assert (sctraj.get.fates(lineages).idxmax(axis=1) == lineages.obs["lineage"]).all()


def test_slots_survive_a_file_and_go_with_the_flow(cells: AnnData, tmp_path) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form", key_added="mine")
    copy = sctraj.tl.fates(cells, "fate", key="mine", copy=True)
    assert "mine_fates" not in cells.obsm
    assert "fates" not in cells.uns["mine"]
    assert copy.obsm["mine_fates"].dtype == np.float32
    copy.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(sctraj.get.fates(read, key="mine"), sctraj.get.fates(copy, key="mine"))
    assert read.uns["mine"]["fates"]["groupby"] == "fate"
    some = copy[::3].copy()
    pd.testing.assert_frame_equal(sctraj.get.fates(some, key="mine"), sctraj.get.fates(copy, key="mine")[::3])
    sctraj.tl.fit_flow(copy, field="closed-form", key_added="mine")  # another flow has other fates
    with pytest.raises(KeyError, match=r"tl\.fates"):
        sctraj.get.fates(copy, key="mine")


class Away(nn.Module):
    """Everything moves along the first coordinate, far beyond all cells; the last column is growth."""

    def __init__(self) -> None:
        super().__init__()
        self.speed = nn.Parameter(torch.tensor(1e3))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.speed.expand(len(x), 1), 0 * x], 1)


def test_cells_that_come_out_beside_the_sampled_ones_are_said(cells: AnnData, caplog) -> None:
    sctraj.tl.fit_flow(cells, module=Away(), learning_rate=1e-12, n_steps=1, batch_size=6)
    caplog.set_level(logging.WARNING, "sctraj")
    sctraj.tl.fates(cells, "fate", module=Away(), n_steps=1)
    assert "100% of the cells of time 5.5 arrive at time 7 where no cells were sampled" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (("absent",), KeyError, r'No column "absent"'),
        (("growth_rate",), ValueError, r"Expected groups of cells .* found numbers"),
        (("fate", 4.0), ValueError, r"expected the time of a snapshot.* there are 0, 1, 2\.5, 3\.5, 5\.5, 7"),
        (("fate", "D7"), ValueError, r"expected the time of a snapshot"),
        (("fate", True), ValueError, r"expected the time of a snapshot.* found True"),
        ((["fate"],), KeyError, r"No column"),
        (("late", 0.0), ValueError, r'expected cells of time 0 with a group in obs\["late"\], found none'),
    ],
)
def test_what_cannot_be_asked_is_refused(cells: AnnData, arguments, error, told) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    cells.obs["late"] = cells.obs["fate"].where(cells.obs["time"] > 5)
    with pytest.raises(error, match=told):
        sctraj.tl.fates(cells, *arguments)
    assert "flow_fates" not in cells.obsm


def test_numbers_that_cannot_be_used_are_refused(cells: AnnData) -> None:
    with pytest.raises(KeyError, match="No flow"):
        sctraj.tl.fates(cells, "fate")
    sctraj.tl.fit_flow(cells, field="closed-form")
    for name in ("n_neighbors", "n_draws"):
        for value in (0, 1.5, True, "3"):
            with pytest.raises(ValueError, match=f"expected a whole number of {name}"):
                sctraj.tl.fates(cells, "fate", **{name: value})
    with pytest.raises(ValueError, match=r"expected a flow with a score for n_draws=3"):
        sctraj.tl.fates(cells, "fate", n_draws=3)
    cells.obsm["flow_fates"] = np.zeros((600, 2))
    with pytest.raises(ValueError, match=r'found adata\.obsm\["flow_fates"\] without the record'):
        sctraj.tl.fates(cells, "fate")
    with pytest.raises(KeyError, match=r"which names the groups. Call sctraj\.tl\.fates"):
        sctraj.get.fates(cells)


def test_what_is_doubtful_of_groups_is_said(cells: AnnData, caplog) -> None:
    sctraj.tl.fit_flow(cells, field="closed-form")
    last = (cells.obs["time"] == 7).to_numpy()
    caplog.set_level(logging.INFO, "sctraj")

    def said(labels, **options) -> str:
        caplog.clear()
        cells.obs["label"] = labels
        sctraj.tl.fates(cells, "label", **options)
        return caplog.text

    fate = cells.obs["fate"]
    plain = said(fate)
    sizes = fate[last].value_counts()
    assert f'fates at time 7 by obs["label"] (cells: B {sizes["B"]}, A {sizes["A"]}; without a group 0)' in plain
    assert not any(word in plain for word in ("no group", "by name", "one group", "blurs"))
    assert "ancestry at time 0 " in said(cells.obs["day"].astype(str) + fate.astype(str), time=0.0)
    some = fate.where((fate != "A") | (np.arange(600) % 2 == 0))
    assert "of the cells of time 7 have no group" in said(some)
    assert "groups ['nan'] by name" in said(some.astype(object).fillna("nan"))
    assert "are of one group" in said(cells.obs["day"])
    rare = fate.astype(object)
    rare.iloc[np.flatnonzero(last)[:2]] = "rare"
    assert "1 of 3 groups at time 7 have fewer cells than n_neighbors=15, which blurs them: rare" in said(rare)


def test_times_are_met_as_they_are_shown() -> None:
    times = (0.0, float(np.float32(5.1)), 7 / 1.2)
    assert verb._snapshot_at(5.1, times) == 1
    assert verb._snapshot_at(5.8333, times) == 2
    with pytest.raises(ValueError, match="expected the time of a snapshot"):
        verb._snapshot_at(5.2, times)


def test_numbers_of_any_kind_and_cells_in_parts_give_the_same(cells: AnnData, monkeypatch) -> None:
    sctraj.tl.fit_flow(cells, method="sb-cfm", n_members=2, **QUICK)
    sctraj.tl.fates(cells, "fate", 5.5, n_neighbors=4, n_steps=3)
    whole = sctraj.get.fates(cells)
    monkeypatch.setattr(verb, "SLAB", 40_000)  # some dozens of cells
    sctraj.tl.fates(cells, "fate", np.array(5.5), n_neighbors=4.0, n_steps=3)
    pd.testing.assert_frame_equal(sctraj.get.fates(cells), whole, atol=1e-6)
    sctraj.tl.fates(cells, "fate", 5.5, n_neighbors=4, n_steps=3, n_draws=3.0)
    drawn = sctraj.get.fates(cells)[(cells.obs["time"] != 5.5).to_numpy()].to_numpy()
    shares = drawn * (4 * 2 * 3 * 4)  # neighbours there, members, draws, neighbours here
    np.testing.assert_allclose(shares, shares.round(), atol=1e-3)
    assert (shares.round() % 2).any()
