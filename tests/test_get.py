"""Which cells are given back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData

from sctraj import get, pp, tl


@pytest.fixture
def followed(cells: AnnData) -> AnnData:
    tl.fit_flow(cells, field="closed-form")
    tl.trajectories(cells, 2, solver="euler", n_steps=1)
    return cells


def test_a_mask_chooses_its_cells_in_memory_and_in_a_store(followed: AnnData, tmp_path) -> None:
    mask = followed.obs["time"] == followed.obs["time"].median()
    chosen = followed.obs_names[mask]
    assert 0 < len(chosen) < followed.n_obs
    in_memory = get.trajectories(followed)
    tl.trajectories(followed, 2, solver="euler", n_steps=1, store=str(tmp_path / "store"))
    for whole in (in_memory, get.trajectories(followed)):
        for rows in (mask, mask.to_numpy(), mask.tolist(), mask.astype("boolean"), np.flatnonzero(mask), chosen):
            pd.testing.assert_frame_equal(get.trajectories(followed, rows=rows), whole.loc[list(chosen)])


def test_numbers_and_names_keep_their_order(followed: AnnData) -> None:
    whole = get.trajectories(followed)
    for rows in ([5, 0, -1], np.array([5, 0, 599], np.uint64)):
        pd.testing.assert_frame_equal(
            get.trajectories(followed, rows=rows), whole.loc[["cell_5", "cell_0", followed.obs_names[-1]]]
        )
    named = get.trajectories(followed, rows=["cell_5", "cell_0"])
    pd.testing.assert_frame_equal(named, whole.loc[["cell_5", "cell_0"]])
    assert get.trajectories(followed, rows=[]).empty


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([True, False], ValueError, r"mask of 600 booleans.*found bool of shape \(2,\)"),
        (np.zeros((600, 1), bool), ValueError, r"mask of 600 booleans.*\(600, 1\)"),
        (pd.array([True, None] * 300, dtype="boolean"), ValueError, "found object"),
        ([1.7], ValueError, "numbers or names.*found float64"),
        ([1, None], ValueError, "numbers or names.*found object"),
        (3, ValueError, r"shape \(\)"),
        ([600], IndexError, "up to 599.*found 600"),
        ([0, -601], IndexError, "found -601"),
        (["cell_1", "cel_2"], KeyError, "1 of 2 are not in adata.obs_names: cel_2"),
    ],
)
def test_what_names_no_cells_is_refused(followed: AnnData, rows, error, message) -> None:
    with pytest.raises(error, match=message):
        get.trajectories(followed, rows=rows)


def test_a_mask_of_no_cell_is_refused(followed: AnnData) -> None:
    with pytest.raises(ValueError, match=rf"a mask that is False at all {followed.n_obs} cells"):
        get.trajectories(followed, rows=followed.obs["time"] == -1)
    assert len(get.trajectories(followed, rows=[])) == 0


@pytest.mark.parametrize(
    ("t", "shape", "message"),
    [
        (1.0, (4,), r"points \(n, \d+\), found shape \(4,\); a single one is x\[None\]"),
        (1.0, (3, 2), r"points \(n, \d+\), found shape \(3, 2\)"),
        (np.nan, None, "finite time, found nan"),
        (np.inf, None, "finite time, found inf"),
    ],
)
def test_a_field_refuses_what_is_no_time_or_no_points(followed: AnnData, t, shape, message) -> None:
    points = followed.obsm["X_pca"][:3] if shape is None else np.zeros(shape)
    with pytest.raises(ValueError, match=message):
        get.vector_field(followed)(t, points)


def test_a_field_gives_what_it_is_asked_for_at_points_that_are_an_array(followed: AnnData) -> None:
    field = get.vector_field(followed)
    x = followed.obsm["X_pca"][:7]
    points = torch.as_tensor(x).expand(field.members, *x.shape)
    np.testing.assert_array_equal(field(1.0, x, "growth"), field.growth(1.0, points).mean(0)[:, 0])
    np.testing.assert_array_equal(field(1.0, x), field(1.0, x, "velocity"))
    with pytest.raises(ValueError, match="expected one of velocity, score, growth, found 'mass'"):
        field(1.0, x, "mass")
    with pytest.raises(ValueError, match="a field with a score"):
        field(1.0, x, "score")
    with pytest.raises(ValueError, match="expected one time, found 3"):
        field(np.arange(3), x)


def test_what_was_written_of_other_cells_is_not_given_back(followed: AnnData) -> None:
    some = followed[::2].copy()
    assert len(get.velocity(some)) == some.n_obs
    for stale in (followed, some):
        stale.obsm["X_pca"] = -stale.obsm["X_pca"]
        for one in (get.velocity, get.trajectories):
            with pytest.raises(ValueError, match=r"other times or coordinates.*tl\.fit_flow again"):
                one(stale)
    del some.uns["flow"]  # as `anndata.concat` leaves it
    assert len(get.velocity(some)) == some.n_obs


@pytest.mark.parametrize("use_rep", ["X_pca", "X_std", "X"])
def test_trends_of_genes_are_the_trajectories_decoded(cells: AnnData, use_rep) -> None:
    if use_rep == "X_std":
        pp.standardize(cells, n_dims=4)
    tl.fit_flow(cells, use_rep=use_rep, field="closed-form")
    tl.trajectories(cells, 2, solver="euler", n_steps=1)
    names = list(cells.var_names[[7, 2]])
    rows = [5, 300]
    found = get.trajectories(cells, rows=rows, genes=names)
    assert list(found.columns) == names
    points = get.trajectories(cells, rows=rows).to_numpy(np.float64)
    mean = np.asarray(cells.X.mean(axis=0)).ravel()
    if use_rep == "X":
        expected = points[:, [7, 2]]
    else:
        if use_rep == "X_std":
            points = points * cells.uns["X_std"]["std"] + cells.uns["X_std"]["mean"]
        expected = points @ cells.varm["PCs"][[7, 2], : points.shape[1]].T + mean[[7, 2]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32
    pd.testing.assert_frame_equal(get.trajectories(cells, rows=rows, genes=names[0]), found[names[:1]])
    with pytest.raises(KeyError, match=r"not in adata\.var_names: nobody"):
        get.trajectories(cells, genes=["nobody"])


def test_genes_that_a_flow_does_not_lead_to_are_refused(cells: AnnData) -> None:
    cells.var["highly_variable"] = np.arange(cells.n_vars) != 3
    sc.pp.pca(cells, n_comps=4)
    tl.fit_flow(cells, field="closed-form")
    tl.trajectories(cells, 2, solver="euler", n_steps=1)
    assert get.trajectories(cells, genes=cells.var_names[[4, 2]]).notna().all(axis=None)
    with pytest.raises(KeyError, match=f"{cells.var_names[3]} has no loading"):
        get.trajectories(cells, genes=cells.var_names[2:4])
    del cells.varm["PCs"]
    with pytest.raises(ValueError, match=r'none: no varm\["PCs"\]'):
        get.trajectories(cells, genes=cells.var_names[:1])
