from __future__ import annotations

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.quiver import Quiver

from sctraj import _adata, get, pl, pp, tl
from sctraj.flow.vector_field import MLP, NeuralField, Scaling
from sctraj.pl._basis import MOST_CELLS, find_basis, projection, thin
from sctraj.pl._cells import GREY
from sctraj.pl._velocity import grid_average

DAYS = np.array([0.0, 1.0, 3.0, 4.0])
TIMES = np.linspace(0.0, 4.0, 9)
VELOCITY = np.array([1.0, 0.5, -0.2, 0.0])
LINEAR = np.array([[0.3, -1.0], [2.0, 0.4], [0.1, 0.1], [-0.2, 0.5]])
EVERY_PLOT = {
    "loss": lambda a, **k: pl.loss(a, **k),
    "trajectories": lambda a, **k: pl.trajectories(a, **k),
    "trajectories, embedding": lambda a, **k: pl.trajectories(a, basis="linear", color="kind", **k),
    "velocity": lambda a, **k: pl.velocity(a, **k),
    "velocity, stream": lambda a, **k: pl.velocity(a, kind="stream", color="amount", **k),
    "leave_one_out": lambda a, **k: pl.leave_one_out(a, **k),
    "leave_one_out, map": lambda a, **k: pl.leave_one_out(a, kind="map", **k),
}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = dict(matplotlib.rcParams)  # noqa: TID251 - read, to see that nobody writes
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before  # noqa: TID251


def constant_field() -> NeuralField:
    """A field that is `VELOCITY` everywhere."""
    network = MLP([5, 4], [torch.Generator()])
    with torch.no_grad():
        network.weights[0].zero_()
        network.biases[0].copy_(torch.from_numpy(VELOCITY))
    return NeuralField(network, [Scaling(torch.zeros(4), 1.0, 0.0, 1.0, 0.0)]).float()


@pytest.fixture
def adata() -> anndata.AnnData:
    """A cloud that drifts along a known constant velocity, with every slot that the plots read."""
    rng = np.random.default_rng(0)
    day = np.repeat(DAYS, 100)
    n = day.size
    x = rng.normal(size=(n, 4)) + np.outer(day, VELOCITY)
    cells = [f"cell{i}" for i in range(n)]
    obs = pd.DataFrame({"day": day, "kind": pd.Categorical(rng.choice(["a", "b"], n)), "amount": rng.random(n)}, cells)
    a = anndata.AnnData(np.zeros((n, 2), np.float32), obs=obs)
    a.obsm["X_pca"], a.obsm["X_linear"] = x, x @ LINEAR
    a.obsm["flow_velocity"] = np.tile(VELOCITY, (n, 1)).astype(np.float32)
    paths = x[:, None] + (TIMES[None, :, None] - day[:, None, None]) * VELOCITY
    a.obsm["flow_trajectories"] = paths.astype(np.float32)
    share = rng.random((n, 2))
    share[np.isin(day, DAYS[[0, -1]])] = np.nan
    a.obsm["flow_w1"] = pd.DataFrame(share, index=cells, columns=["ot-cfm", "i-cfm"])
    a.uns["flow"] = {
        "params": {"use_rep": "X_pca", "time_key": "day", "method": "ot-cfm", "n_obs": n},
        "trajectory_times": TIMES,
        "weights": constant_field().to_arrays(),
        "times": DAYS,
        "loss": np.array([1, 2]) + rng.random((200, 2)),
        "validation_loss": np.full((8, 2), 1.5),
    }
    a.uns["flow"]["fingerprint"] = _adata.read_snapshots(a, "day", "X_pca", least=1).fingerprint
    a.uns["day"] = {"unit": "days"}
    seeds = {"ot-cfm": 3, "i-cfm": 3, "previous": 1, "next": 1, "ot-interpolation": 1, "noise-reference": 4}
    rows = [
        (method, time, seed, metric, level + 0.1 * time + 0.05 * seed**2)
        for level, (method, count) in enumerate(seeds.items())
        for time in DAYS[1:-1]
        for seed in range(count)
        for metric in ("w1", "energy", "variance_ratio")
    ]
    a.uns["leave_one_out"] = pd.DataFrame(rows, columns=["method", "time", "seed", "metric", "value"])
    a.uns["leave_one_out_protocol"] = {"time_key": "day"}
    return a


def artists(ax, kind):
    return [one for one in ax.collections if type(one) is kind]


def same_points(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices hold the same rows in whatever order."""
    return np.allclose(a[np.lexsort(a.T)], b[np.lexsort(b.T)])


# --- every plot ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EVERY_PLOT)
def test_it_draws_in_the_axes_it_is_given_and_nowhere_else(adata, name):
    figure, (left, right) = plt.subplots(1, 2, layout="constrained")
    assert EVERY_PLOT[name](adata, ax=left) is left
    assert left.has_data()
    assert not right.has_data()
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_it_makes_one_figure_of_its_own_whose_legend_covers_no_data(adata, name):
    ax = EVERY_PLOT[name](adata)
    assert len(plt.get_fignums()) == 1
    ax.figure.canvas.draw()
    if ax.get_legend() is not None:
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
    whole = ax.figure.bbox.padded(1)
    drawn = ax.figure.get_tightbbox().transformed(ax.figure.dpi_scale_trans)
    assert whole.x0 <= drawn.x0
    assert drawn.x1 <= whole.x1
    assert whole.y0 <= drawn.y0
    assert drawn.y1 <= whole.y1


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_a_view_and_a_shuffle_are_drawn_as_well(adata, name):
    shuffled = adata[np.random.default_rng(1).permutation(adata.n_obs)[:300]]
    assert EVERY_PLOT[name](shuffled).has_data()
    assert shuffled.is_view


def test_it_changes_nothing_in_adata(adata):
    before = adata.copy()
    for draw in EVERY_PLOT.values():
        draw(adata)
        plt.close("all")
    assert list(adata.obs) == list(before.obs)
    assert set(adata.uns) == set(before.uns)
    assert set(adata.obsm) == set(before.obsm)


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_an_ordinary_subplot_keeps_its_legend_off_its_neighbour_and_the_colour_bar(adata, name):
    figure, axes = plt.subplots(2, 2, figsize=(12, 9))
    cell = axes[1, 0].get_window_extent().frozen()
    ax = EVERY_PLOT[name](adata, ax=axes[1, 0])
    bars = [other.get_tightbbox() for other in figure.axes if other not in axes]
    assert ax.get_window_extent().width > cell.width / 2
    assert figure.get_layout_engine() is None
    if ax.get_legend() is not None:
        legend = ax.get_legend().get_window_extent()
        assert legend.x1 < axes[1, 1].get_window_extent().x0
        assert legend.y1 < cell.y1 + 2
        assert not legend.overlaps(ax.get_window_extent())
        assert not any(legend.overlaps(bar) for bar in bars)
    figure.tight_layout()
    figure.canvas.draw()
    whole, drawn = figure.bbox.padded(1), ax.get_tightbbox()
    assert whole.x0 <= drawn.x0
    assert drawn.x1 <= whole.x1
    assert drawn.y1 <= whole.y1


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_a_part_of_a_figure_is_drawn_in_as_well(adata, name):
    left, right = plt.figure(figsize=(9, 4), layout="constrained").subfigures(1, 2)
    ax = EVERY_PLOT[name](adata, ax=left.subplots())
    ax.figure.figure.canvas.draw()
    assert ax.has_data()
    assert not right.axes


def test_axes_placed_by_hand_stay(adata):
    ax = plt.figure().add_axes((0.1, 0.1, 0.5, 0.8))
    pl.loss(adata, ax=ax)
    assert ax.get_position().bounds == pytest.approx((0.1, 0.1, 0.5, 0.8))


def test_what_is_black_on_white_is_white_on_black(adata):
    adata.uns["flow"]["loss"] = np.linspace(2, 1, 50)[:, None] + np.arange(7)
    adata.uns["flow"]["validation_loss"] = np.empty((0, 7))
    for style, expected in (("default", "black"), ("dark_background", "white")):
        with plt.style.context(style):
            (quiver,) = artists(pl.velocity(adata), Quiver)
            (lines,) = artists(pl.velocity(adata, kind="stream"), LineCollection)
            seventh = pl.loss(adata).lines[-1]
        assert to_rgba(quiver.get_facecolor()[0]) == to_rgba(expected)
        assert to_rgba(lines.get_color()[0]) == to_rgba(expected)
        assert to_rgba(seventh.get_color()) == to_rgba(expected)


# --- loss ----------------------------------------------------------------------------------------------------------
def test_loss_lines_are_the_raw_values_their_running_mean_and_the_validation(adata):
    table = get.loss(adata)
    raw, smooth, validation, *_ = pl.loss(adata).lines
    np.testing.assert_array_equal(raw.get_ydata(), table["0"])
    middle = table["0"].to_numpy()[98:102]  # a window of 200 / 50 steps
    assert smooth.get_ydata()[100] == pytest.approx(middle.mean())
    np.testing.assert_array_equal(validation.get_xdata(), 25 * np.arange(1, 9))
    assert validation.get_color() == raw.get_color() == smooth.get_color()


def test_loss_axis_is_logarithmic_only_where_that_helps(adata):
    assert pl.loss(adata).get_yscale() == "linear"
    adata.uns["flow"]["loss"] *= np.logspace(0, -3, 200)[:, None]
    assert pl.loss(adata).get_yscale() == "log"


def test_loss_of_many_members_has_a_short_legend(adata):
    adata.uns["flow"]["loss"] = np.linspace(2, 1, 50)[:, None] + np.arange(15)
    adata.uns["flow"]["validation_loss"] = np.empty((0, 15))
    assert [text.get_text() for text in pl.loss(adata).get_legend().get_texts()] == [
        "running means, 15 members",
        "every step",
    ]


# --- projection ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", [None, "X_pca", "pca", "copy"])
def test_a_plane_of_the_representations_own_columns_is_a_slice(adata, basis):
    x = adata.obsm["X_pca"]
    adata.obsm["copy"] = x[:, :3].copy()
    plane = find_basis(adata, basis, dims=(2, 0), use_rep="X_pca")
    points = np.random.default_rng(0).normal(size=(20, 4)) * 100  # far from any cell
    project = projection(plane, x, dims=(2, 0))
    np.testing.assert_array_equal(project(points), points[:, [2, 0]])
    np.testing.assert_allclose(project.velocities(x, x**2), (x**2)[:, [2, 0]], rtol=1e-9, atol=1e-9)


def test_a_linear_basis_is_recovered_inside_the_cloud():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(20_000, 3))
    map_ = rng.normal(size=(3, 2))
    a = anndata.AnnData(obs=pd.DataFrame(index=np.arange(len(x)).astype(str)), obsm={"X_pca": x, "X_umap": x @ map_})
    project = projection(find_basis(a, "umap", dims=(0, 1), use_rep="X_pca"), x, dims=(0, 1))
    inside = rng.uniform(-0.7, 0.7, size=(200, 3))
    spread = np.std(x @ map_)
    error = np.linalg.norm(project(inside) - inside @ map_, axis=1)
    assert np.sqrt(np.mean(error**2)) < 0.03 * spread
    assert error.max() < 0.1 * spread
    velocity = rng.normal(size=inside.shape)
    found, true = project.velocities(inside, velocity), velocity @ map_
    cosine = np.sum(found * true, 1) / np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
    assert np.median(cosine) > 0.99
    assert np.median(np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)) == pytest.approx(1, abs=0.1)


def test_velocities_keep_their_length_where_cells_end():
    """At the rim of the cells their means can move to one side only, but velocities there are as large as elsewhere."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(3000, 3))
    a = anndata.AnnData(
        obs=pd.DataFrame(index=np.arange(len(x)).astype(str)), obsm={"X_pca": x, "X_umap": 2 * x[:, 1:]}
    )
    project = projection(find_basis(a, "umap", dims=(0, 1), use_rep="X_pca"), x, dims=(0, 1))
    rim = rng.uniform(-0.7, 0.7, size=(100, 3))
    rim[:, 1] = 1.0
    for way in (1.0, -1.0):  # out of the cells and into them
        length = project.velocities(rim, np.tile([0.0, way, 0.0], (100, 1)))[:, 0] * way
        assert np.median(length) == pytest.approx(2, rel=0.1)
    bare = (project(rim + 0.1 * np.eye(3)[1])[:, 0] - project(rim - 0.1 * np.eye(3)[1])[:, 0]) / 0.2
    assert np.median(bare) < 1.5  # which means by themselves would not keep


def test_an_embedding_is_never_left_and_what_is_missing_stays_missing(adata):
    x = adata.obsm["X_pca"].copy()
    x[0] = np.nan
    project = projection(find_basis(adata, "linear", dims=(0, 1), use_rep="X_pca"), x, dims=(0, 1))
    far = project(np.array([[1e6, 0, 0, 0], [np.nan, 0, 0, 0]]))
    assert (far[0] <= adata.obsm["X_linear"].max(0)).all()
    assert np.isnan(far[1]).all()


def test_cells_at_rest_have_no_velocity_in_the_plane(adata):
    x = adata.obsm["X_pca"]
    project = projection(find_basis(adata, "linear", dims=(0, 1), use_rep="X_pca"), x, dims=(0, 1))
    np.testing.assert_array_equal(project.velocities(x, np.zeros_like(x)), 0)


def test_thinning_keeps_all_of_few_and_a_bounded_number_of_many():
    np.testing.assert_array_equal(thin(5), np.arange(5))
    many = thin(1_000_000)
    assert many.size == np.unique(many).size == MOST_CELLS
    assert many[-1] == 999_999


def test_an_unknown_basis_lists_those_present_and_too_few_columns_are_counted(adata):
    with pytest.raises(KeyError, match=r"basis='umap'.*X_pca.*X_linear"):
        pl.velocity(adata, basis="umap")
    with pytest.raises(ValueError, match=r"dims=\(0, 2\).*X_linear.*2"):
        pl.trajectories(adata, basis="linear", dims=(0, 2))
    assert plt.get_fignums() == []


def test_a_plane_of_genes_is_named_after_them(adata):
    plane = find_basis(adata, None, dims=(1, 0), use_rep="X")
    assert plane.labels == ("1", "0")
    assert find_basis(adata, "pca", dims=(1, 0), use_rep="X_pca").labels == ("PC2", "PC1")


# --- trajectories --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", [None, "linear"])
def test_paths_are_the_projected_trajectories_coloured_by_time(adata, basis):
    ax = pl.trajectories(adata, basis=basis, n_cells=7, rng=3)
    (lines,) = artists(ax, LineCollection)
    chosen = np.sort(np.random.default_rng(3).choice(adata.n_obs, size=7, replace=False))
    plane = find_basis(adata, basis, dims=(0, 1), use_rep="X_pca")
    project = projection(plane, adata.obsm["X_pca"], dims=(0, 1))
    expected = np.stack([project(path) for path in adata.obsm["flow_trajectories"][chosen]])  # 7 x 9 x 2
    segments = np.array(lines.get_segments()).reshape(7, TIMES.size - 1, 2, 2)
    np.testing.assert_allclose(segments[:, :, 0], expected[:, :-1], rtol=1e-6)
    np.testing.assert_allclose(segments[:, :, 1], expected[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(lines.get_array().reshape(7, -1)[0], (TIMES[1:] + TIMES[:-1]) / 2)
    (points,) = artists(ax, PathCollection)
    assert same_points(
        np.column_stack([points.get_offsets(), points.get_array()]),
        np.column_stack([plane.cells, adata.obs["day"]]),
    )
    assert points.get_rasterized()
    assert points.norm.vmin == lines.norm.vmin == 0
    assert points.norm.vmax == lines.norm.vmax == 4
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["day (days)"]


def test_more_paths_than_cells_and_none_at_all(adata):
    (lines,) = artists(pl.trajectories(adata, n_cells=10_000), LineCollection)
    assert len(lines.get_segments()) == adata.n_obs * (TIMES.size - 1)
    (lines,) = artists(pl.trajectories(adata, n_cells=0), LineCollection)
    assert len(lines.get_segments()) == 0


def test_the_cells_whose_paths_are_shown_can_be_chosen(adata):
    (lines,) = artists(pl.trajectories(adata, rows=["cell5", "cell120"]), LineCollection)
    starts = np.array(lines.get_segments()).reshape(2, TIMES.size - 1, 2, 2)[:, 0, 0]
    np.testing.assert_allclose(starts, adata.obsm["flow_trajectories"][[5, 120], 0, :2], rtol=1e-6)
    (lines,) = artists(pl.trajectories(adata, rows=adata.obs["day"] == 0, n_cells=30, rng=1), LineCollection)
    chosen = np.sort(np.random.default_rng(1).choice(100, size=30, replace=False))
    starts = np.array(lines.get_segments()).reshape(30, TIMES.size - 1, 2, 2)[:, 0, 0]
    np.testing.assert_allclose(starts, adata.obsm["X_pca"][chosen, :2], rtol=1e-5)
    with pytest.raises(KeyError, match=r"not in adata\.obs_names"):
        pl.trajectories(adata, rows=["nobody"])


@pytest.mark.parametrize("gone", ["cells", "places"])
def test_paths_are_not_drawn_among_cells_of_other_times(adata, gone):
    late = (adata.obs["day"] >= 3).to_numpy()
    if gone == "cells":
        adata = adata[~late].copy()
    else:
        adata.obsm["X_linear"][late] = np.nan
    assert pl.trajectories(adata, basis="X_pca").has_data()  # there they are where they are
    with pytest.raises(ValueError, match=r"of day 3, 4 there are none .*rows="):
        pl.trajectories(adata, basis="linear")
    adata.obsm["flow_trajectories"] = adata.obsm["flow_trajectories"][:, :3]
    adata.uns["flow"]["trajectory_times"] = TIMES[:3]  # paths that end before
    assert pl.trajectories(adata, basis="linear").has_data()


@pytest.mark.parametrize("draw", [pl.velocity, pl.trajectories])
def test_a_snapshot_by_itself_has_the_colour_it_has_among_all(adata, draw):
    ax = draw(adata[adata.obs["day"] == 1].copy())
    points = artists(ax, PathCollection)[0]
    assert (points.norm.vmin, points.norm.vmax) == (0, 4)


def test_missing_stretches_of_a_path_are_left_out(adata):
    adata.obsm["flow_trajectories"][:, :3] = np.nan
    (lines,) = artists(pl.trajectories(adata, n_cells=5, basis="linear"), LineCollection)
    assert len(lines.get_segments()) == 5 * (TIMES.size - 4)


def test_a_category_colours_the_cells_and_scanpys_colours_are_kept(adata):
    adata.uns["kind_colors"] = ["#112233", "#445566"]
    ax = pl.trajectories(adata, color="kind")
    (points,) = artists(ax, PathCollection)
    colors = points.get_facecolors()
    where = {tuple(place): color for place, color in zip(np.round(points.get_offsets(), 8).tolist(), colors[:, :3])}
    expected = {"a": to_rgba("#112233")[:3], "b": to_rgba("#445566")[:3]}
    for place, kind in zip(np.round(adata.obsm["X_pca"][:, :2], 8).tolist(), adata.obs["kind"]):
        np.testing.assert_allclose(where[tuple(place)], expected[kind])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_missing_categories_are_grey_and_numbers_get_a_bar(adata):
    adata.obs.loc["cell0", "kind"] = np.nan
    adata.obs.loc["cell1", "amount"] = np.nan
    (points,) = artists(pl.velocity(adata, color="kind"), PathCollection)
    assert len(np.unique(points.get_facecolors(), axis=0)) == 3
    ax = pl.velocity(adata, color="amount")
    assert ax.get_legend() is None
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["amount"]


def test_a_colour_bar_spans_the_finite_values_and_the_others_are_grey(adata):
    values = adata.obs["amount"].to_numpy(copy=True)
    values[:3] = np.inf, -np.inf, np.nan
    adata.obs["amount"] = values
    (points,) = artists(pl.trajectories(adata, color="amount"), PathCollection)
    assert (points.norm.vmin, points.norm.vmax) == (values[3:].min(), values[3:].max())
    points.update_scalarmappable()
    grey = (points.get_facecolors()[:, :3] == to_rgba(GREY)[:3]).all(1)
    assert same_points(points.get_offsets()[grey], adata.obsm["X_pca"][:3, :2])


LONG = [f"progenitor of the lineage called {letter}" for letter in "abcdefghijkl"]


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize(
    ("size", "rows", "names", "least"),
    [
        ((9, 7), 2, LONG, 0.42),
        ((7, 5), 1, LONG, 0.45),
        ((3.3, 2.5), 1, LONG, 0.37),
        ((3.3, 2.5), 1, ["a", "b"], 0.5),
        ((6.4, 4.8), 1, [f"cluster {i}" for i in range(60)], 0.35),
    ],
)
def test_a_legend_and_a_bar_leave_the_axes_room_and_keep_off_each_other(adata, layout, size, rows, names, least):
    kinds = np.resize(names, adata.n_obs).astype(object)
    kinds[-1] = None
    adata.obs["kind"] = pd.Categorical(kinds, categories=names)
    figure, axes = plt.subplots(rows, rows, figsize=size, layout=layout, squeeze=False)
    if layout is None:
        figure.subplots_adjust(left=0.2, right=0.98, bottom=0.2, wspace=0.3, hspace=0.5)
    cell = axes[0, 0].get_window_extent().frozen()
    ax = pl.trajectories(adata, color="kind", ax=axes[0, 0])
    figure.canvas.draw()
    legend, (bar,) = ax.get_legend(), [other for other in figure.axes if other not in axes]
    boxes = [ax.get_window_extent(), legend.get_window_extent(), bar.get_tightbbox()]
    assert boxes[0].width > least * figure.bbox.width / rows
    assert not any(one.overlaps(other) for one, other in ((boxes[0], boxes[1]), (boxes[1], boxes[2])))
    assert not boxes[2].overlaps(ax.xaxis.get_tightbbox())
    assert boxes[1].x1 <= (figure.bbox.x1 if layout else cell.x1) + 2
    assert boxes[1].y0 >= boxes[2].y0 - 2
    shown = [text.get_text() for text in legend.get_texts()]
    assert len({*shown}) == len(names) + 1
    assert shown[-1] == "missing"
    assert to_rgba(legend.legend_handles[-1].get_color()) == to_rgba(GREY)
    assert bar.get_xlabel() == "day (days)"


@pytest.mark.parametrize("n", [12, 24, 60])
def test_many_categories_have_the_colours_that_scanpy_gives_them(adata, n):
    import scanpy as sc

    adata.obs["kind"] = pd.Categorical(np.resize([f"{i:03}" for i in range(n)], adata.n_obs))
    ours = [handle.get_color() for handle in pl.velocity(adata, color="kind").get_legend().legend_handles]
    sc.pl.embedding(adata, "X_pca", color="kind", show=False)
    assert [to_rgba(one) for one in ours] == [to_rgba(one) for one in adata.uns["kind_colors"]]


def test_growth_is_centred_at_none_and_a_few_extreme_cells_take_no_colours(adata):
    growth = np.random.default_rng(0).normal(0.1, 1, adata.n_obs)
    growth[:3] = 50, -80, 70
    adata.obs["flow_growth"], adata.obs["flow_velocity_sd"] = growth, np.abs(growth)
    (points,) = artists(pl.velocity(adata, color="flow_growth"), PathCollection)
    assert points.norm.vmin == -points.norm.vmax
    assert 2 < points.norm.vmax < 3
    middle = np.array(points.cmap(0.5)[:3])
    assert np.ptp(middle) < 0.02  # grey, between two hues
    (points,) = artists(pl.trajectories(adata, color="flow_velocity_sd"), PathCollection)
    assert (points.norm.vmin, points.norm.vmax < 3) == (np.abs(growth).min(), True)
    adata.obs["mine"] = growth  # a column of the user's keeps its whole range
    (points,) = artists(pl.trajectories(adata, color="mine"), PathCollection)
    assert (points.norm.vmin, points.norm.vmax) == (-80, 70)


# --- velocity ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("basis", "truth"), [(None, VELOCITY[:2]), ("linear", VELOCITY @ LINEAR)])
def test_arrows_point_along_the_known_velocity(adata, basis, truth):
    ax = pl.velocity(adata, basis=basis)
    (quiver,) = artists(ax, Quiver)
    u, v = np.asarray(quiver.U), np.asarray(quiver.V)
    cosine = (u * truth[0] + v * truth[1]) / np.hypot(u, v) / np.linalg.norm(truth)
    assert np.quantile(cosine, 0.1) > (0.9999 if basis is None else 0.8)
    if basis is None:
        np.testing.assert_allclose(np.column_stack([u, v]), np.tile(truth, (u.size, 1)), rtol=1e-6)
    assert (quiver.angles, quiver.scale_units) == ("xy", "xy")


def test_arrow_tips_are_inside_the_axes(adata):
    ax = pl.velocity(adata)
    (quiver,) = artists(ax, Quiver)
    tips = quiver.XY + np.column_stack([quiver.U, quiver.V]) / quiver.scale
    assert (tips[:, 0] <= ax.get_xlim()[1]).all()
    assert (tips[:, 1] <= ax.get_ylim()[1]).all()


def test_grid_points_without_cells_are_empty():
    rng = np.random.default_rng(0)
    places = np.concatenate([rng.normal(0, 0.3, (200, 2)), rng.normal(10, 0.3, (200, 2))])
    arrows = np.where(np.arange(400)[:, None] < 200, [1.0, 0.0], [0.0, 2.0])
    x, y, mean = grid_average(places, arrows, n_grid=30, bandwidth=0.7, min_mass=0.03)
    filled = np.isfinite(mean).all(-1)
    assert not filled[(y > 3) & (y < 7)].any()
    assert not filled[:, (x > 3) & (x < 7)].any()
    np.testing.assert_allclose(mean[np.ix_(y < 2, x < 2)][filled[np.ix_(y < 2, x < 2)]][:, 0], 1.0)
    np.testing.assert_allclose(mean[np.ix_(y > 8, x > 8)][filled[np.ix_(y > 8, x > 8)]][:, 1], 2.0)


def test_a_coarser_grid_has_the_same_arrows_where_both_have_some(adata):
    day = adata.obs["day"].to_numpy()
    adata.obsm["flow_velocity"][:, :2] = np.column_stack([np.cos(day), np.sin(day)])
    fine, coarse = (artists(pl.velocity(adata, density=density), Quiver)[0] for density in (1, 10 / 28))  # every third
    assert coarse.N < fine.N / 6
    apart = np.abs(coarse.XY[:, None] - fine.XY[None]).max(2)
    both = apart.min(1) < 1e-6
    assert both.mean() > 0.8
    for one in ("U", "V"):
        scaled = getattr(coarse, one)[both], getattr(fine, one)[apart.argmin(1)[both]]
        np.testing.assert_allclose(*scaled, atol=1e-6)


def test_streamlines_run_along_the_known_velocity_and_keep_every_cell_in_view(adata):
    ax = pl.velocity(adata, kind="stream")
    (lines,) = artists(ax, LineCollection)
    run = np.array([segment[-1] - segment[0] for segment in lines.get_segments()])
    run = run[np.linalg.norm(run, axis=1) > 0]
    cosine = run @ VELOCITY[:2] / np.linalg.norm(run, axis=1) / np.linalg.norm(VELOCITY[:2])
    np.testing.assert_allclose(cosine, 1.0, atol=1e-4)
    cells = adata.obsm["X_pca"]
    assert ax.get_xlim()[0] < cells[:, 0].min()
    assert ax.get_ylim()[1] > cells[:, 1].max()


def test_streamlines_are_as_much_thinner_and_their_heads_smaller_as_a_panel_is(adata):
    widths, heads = [], []
    for size in ((6.4, 4.8), (2.6, 2)):
        ax = pl.velocity(adata, kind="stream", ax=plt.subplots(figsize=size)[1])
        widths.append(np.max(artists(ax, LineCollection)[0].get_linewidths()))
        heads.append(max(patch.get_mutation_scale() for patch in ax.patches))
    assert widths[1] / widths[0] == pytest.approx(0.6, abs=0.05)
    assert heads[1] / heads[0] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("kind", ["arrows", "stream"])
def test_a_field_at_rest_is_drawn_without_warnings(adata, kind):
    adata.obsm["flow_velocity"] = np.zeros_like(adata.obsm["flow_velocity"])
    ax = pl.velocity(adata, kind=kind)
    ax.figure.canvas.draw()
    (cells,) = [c for c in artists(ax, PathCollection) if len(c.get_offsets()) == adata.n_obs]
    assert same_points(cells.get_offsets(), adata.obsm["X_pca"][:, :2])


def test_one_fast_cell_does_not_shrink_the_other_arrows(adata):
    (usual,) = artists(pl.velocity(adata), Quiver)
    farthest = adata.obsm["X_pca"][:, 0].argmax()
    adata.obsm["flow_velocity"][farthest] *= 1e3
    (quiver,) = artists(pl.velocity(adata), Quiver)
    assert quiver.scale < 3 * usual.scale


# --- leave one out -------------------------------------------------------------------------------------------------
def values(adata, method, metric="energy"):
    table = adata.uns["leave_one_out"]
    return table[(table["method"] == method) & (table["metric"] == metric)].groupby("time")["value"]


def test_methods_are_their_means_and_bars_reach_over_the_seeds(adata):
    ax = pl.leave_one_out(adata)
    for container, name in zip(ax.containers, ["ot-cfm", "i-cfm"]):
        line, caps, _ = container
        np.testing.assert_array_equal(line.get_xdata(), DAYS[1:-1])  # real times, not their ranks
        np.testing.assert_allclose(line.get_ydata(), values(adata, name).mean())
        np.testing.assert_allclose(caps[0].get_ydata(), values(adata, name).min())
        np.testing.assert_allclose(caps[1].get_ydata(), values(adata, name).max())
    assert ax.get_xlabel() == "held-out day (days)"


def test_where_distances_are_estimated_bars_reach_a_standard_error_farther(adata):
    table = adata.uns["leave_one_out"]
    errors = table[(table["metric"] == "energy") & table["method"].isin(["ot-cfm", "next"])]
    errors = errors.assign(metric="energy_error", value=0.1 * errors["time"])
    adata.uns["leave_one_out"] = pd.concat([table, errors])
    ax = pl.leave_one_out(adata)
    bars = {one.get_label(): one.lines for one in ax.containers}
    for name, error in (("ot-cfm", 0.1 * DAYS[1:-1]), ("i-cfm", 0.0)):
        _, caps, _ = bars[name]
        np.testing.assert_allclose(caps[0].get_ydata(), values(adata, name).min() - error)
        np.testing.assert_allclose(caps[1].get_ydata(), values(adata, name).max() + error)
    (baseline,) = (lines for name, lines in bars.items() if name not in ("ot-cfm", "i-cfm"))  # of "next" alone
    np.testing.assert_allclose(baseline[1][1].get_ydata(), values(adata, "next").mean() + 0.1 * DAYS[1:-1])
    assert "error of estimate" in ax.get_legend().get_title().get_text()


def test_a_unit_that_nobody_knows_is_left_out(adata):
    pp.parse_time(adata, "day")
    assert adata.uns["time"]["unit"] == "unknown"
    adata.uns["flow"]["params"]["time_key"] = adata.uns["leave_one_out_protocol"]["time_key"] = "time"
    assert pl.leave_one_out(adata).get_xlabel() == "held-out time"
    assert [other.get_ylabel() for other in pl.velocity(adata).figure.axes[1:]] == ["time"]


def test_every_distance_that_is_written_has_words_on_its_axis(cells):
    tl.leave_one_out(cells, methods=("uot-cfm",), field="closed-form", n_seeds=1)
    for metric in cells.uns["leave_one_out"]["metric"].unique():
        if not metric.endswith("_error"):
            assert " " in pl.leave_one_out(cells, metric=metric).get_ylabel()


def test_baselines_are_dashed_and_the_noise_reference_is_a_band(adata):
    ax = pl.leave_one_out(adata, metric="w1")
    for name in ("previous", "next", "ot-interpolation"):
        (line,) = (line for line in ax.lines if line.get_label() == name)
        np.testing.assert_allclose(line.get_ydata(), values(adata, name, "w1").mean())
        assert line.get_linestyle() != "-"
    band = ax.collections[0].get_paths()[0].get_extents()
    noise = values(adata, "noise-reference", "w1")
    assert (band.x0, band.x1) == (1.0, 3.0)
    assert band.y0 == pytest.approx((noise.mean() - noise.std(ddof=0)).min())
    assert band.y1 == pytest.approx((noise.mean() + noise.std(ddof=0)).max())


def test_copies_far_above_everything_else_are_cut_off_and_said_so(adata):
    whole = pl.leave_one_out(adata)
    assert not [text for text in whole.get_legend().get_texts() if "above" in text.get_text()]
    table = adata.uns["leave_one_out"]
    far = table["method"] == "next"
    table["value"] = table["value"].where(~far, 100 + table["value"])
    ax = pl.leave_one_out(adata)
    rest = table[~table["method"].isin(["previous", "next"]) & (table["metric"] == "energy")]["value"].max()
    assert rest < ax.get_ylim()[1] < 2 * rest
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert told[-3:] == ["previous", "next (above)", "ot-interpolation"]
    assert pl.leave_one_out(adata, metric="variance_ratio").get_ylim()[1] > 100  # a ratio may be anything


@pytest.mark.parametrize("times", [DAYS[1:-1], DAYS[1:2]])
def test_the_noise_reference_of_one_seed_is_a_line(adata, times):
    table = adata.uns["leave_one_out"]
    adata.uns["leave_one_out"] = table[(table["seed"] == 0) & table["time"].isin(times)]
    ax = pl.leave_one_out(adata)
    (line,) = (line for line in ax.lines if line.get_label() == "noise reference")
    assert set(line.get_ydata()) == set(values(adata, "noise-reference").mean())
    assert np.ptp(line.get_xdata()) > 0
    assert len([text for text in ax.get_legend().get_texts() if "noise" in text.get_text()]) == 1


@pytest.mark.parametrize(("metric", "said"), [("energy", False), ("w1", True), ("w2", True)])
def test_where_the_halves_lift_the_noise_reference_the_legend_says_so(adata, metric, said):
    adata.uns["leave_one_out"] = adata.uns["leave_one_out"].replace({"metric": {"energy": metric}})
    legend = [text.get_text() for text in pl.leave_one_out(adata, metric=metric).get_legend().get_texts()]
    (noise,) = (text for text in legend if "noise" in text)
    assert ("half the cells" in noise) == said


def test_a_single_held_out_time_still_has_a_band(adata):
    table = adata.uns["leave_one_out"]
    adata.uns["leave_one_out"] = table[table["time"] == 1.0]
    band = pl.leave_one_out(adata).collections[0].get_paths()[0].get_extents()
    assert band.width > 0


def test_one_method_keeps_its_colour_when_drawn_alone(adata):
    both, alone = pl.leave_one_out(adata), pl.leave_one_out(adata, method="i-cfm")
    assert len(alone.containers) == 1
    assert alone.containers[0][0].get_color() == both.containers[1][0].get_color()


@pytest.mark.parametrize("basis", [None, "linear"])
@pytest.mark.parametrize("method", [None, "i-cfm"])
def test_the_map_shows_each_cells_distance_and_greys_the_ends(adata, method, basis):
    ax = pl.leave_one_out(adata, kind="map", method=method, basis=basis)
    ends, held_out = artists(ax, PathCollection)
    share = adata.obsm["flow_w1"][method or "ot-cfm"].to_numpy()
    cells = adata.obsm["X_pca" if basis is None else "X_linear"][:, :2]
    known = np.isfinite(share)
    assert same_points(
        np.column_stack([held_out.get_offsets(), held_out.get_array()]), np.column_stack([cells, share])[known]
    )
    assert same_points(np.asarray(ends.get_offsets()), cells[~known])
    assert [bar.get_ylabel() for bar in ax.figure.axes[1:]] == [f"distance to the restored cells, {method or 'ot-cfm'}"]
    assert held_out.get_rasterized()
    assert held_out.get_sizes()[0] == ends.get_sizes()[0]


def test_the_maps_legend_shows_a_dot_however_small_the_cells(adata):
    ax = pl.leave_one_out(adata, kind="map")
    (dot,) = ax.get_legend().legend_handles
    assert ax.get_legend().get_texts()[0].get_text() == "first and last snapshot"
    assert dot.get_markersize() == 6
    assert to_rgba(dot.get_color()) == to_rgba(GREY)


def test_a_map_of_the_first_snapshot_alone_is_grey(adata):
    ax = pl.leave_one_out(adata[adata.obs["day"] == 0], kind="map")
    assert len(artists(ax, PathCollection)) == 1


def test_the_map_needs_no_fit_where_the_protocol_names_the_representation(adata):
    del adata.uns["flow"]
    with pytest.raises(KeyError, match="basis="):
        pl.leave_one_out(adata, kind="map")
    assert pl.leave_one_out(adata, kind="map", basis="linear").has_data()
    adata.uns["leave_one_out_protocol"]["use_rep"] = "X_pca"
    assert pl.leave_one_out(adata, kind="map").get_xlabel() == "PC1"


# --- cells that changed after the fit ------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["neural", "closed-form"])
def fitted(request, _simulated) -> anndata.AnnData:
    made = _simulated.copy()
    tl.fit_flow(made, field=request.param, n_members=2, n_steps=50)
    tl.trajectories(made, 4, solver="euler", n_steps=2)
    return made


def flip(a):
    a.obsm["X_pca"] = a.obsm["X_pca"] * np.where(np.arange(a.obsm["X_pca"].shape[1]) == 0, -1, 1)


def double(a):
    a.obs["time"] = a.obs["time"] * 2


def mix(a):
    a.obs["time"] = np.random.default_rng(0).permutation(a.obs["time"])


def narrow(a):
    a.obsm["X_pca"] = a.obsm["X_pca"][:, :3]


PARTS = {
    "all": slice(None),
    "some": slice(100, 400),
    "shuffled": np.random.default_rng(0).permutation(600),
    "one snapshot": np.arange(600) >= 550,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("draw", [pl.velocity, pl.trajectories])
def test_cells_are_drawn_as_they_were_fitted_and_refused_as_they_were_not(fitted, draw, part):
    there = fitted[PARTS[part]].copy()
    assert draw(there).has_data()
    plt.close("all")
    for change in (flip, double, mix, narrow):
        if change is mix and there.obs["time"].nunique() == 1:
            continue
        stale = there.copy()
        change(stale)
        with pytest.raises(ValueError, match=r"other times or coordinates.*tl\.fit_flow again"):
            draw(stale)
        assert plt.get_fignums() == []


def test_cells_by_other_names_are_drawn_and_cells_without_a_velocity_left_out(fitted):
    there = fitted.copy()
    there.obs_names = [f"other {name}" for name in there.obs_names]
    there.obsm["flow_velocity"][:5] = np.nan
    assert pl.velocity(there).has_data()


# --- errors --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("draw", "verb"),
    [
        (lambda a: pl.loss(a), "fit_flow"),
        (lambda a: pl.velocity(a), "fit_flow"),
        (lambda a: pl.trajectories(a), "fit_flow"),
        (lambda a: pl.leave_one_out(a), "leave_one_out"),
        (lambda a: pl.leave_one_out(a, kind="map"), "leave_one_out"),
    ],
)
def test_a_missing_slot_names_the_function_to_run_first(adata, draw, verb):
    bare = anndata.AnnData(adata.X, obs=adata.obs)
    with pytest.raises(KeyError, match=rf"tl\.{verb}"):
        draw(bare)
    assert plt.get_fignums() == []


def test_missing_trajectories_name_the_function_to_run_first(adata):
    del adata.obsm["flow_trajectories"]
    with pytest.raises(KeyError, match=r"tl\.trajectories"):
        pl.trajectories(adata)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda a: pl.velocity(a, kind="lines"), r"kind='lines'.*arrows.*stream"),
        (lambda a: pl.leave_one_out(a, kind="lines"), r"kind='lines'.*distances.*map"),
        (lambda a: pl.leave_one_out(a, metric="w3"), r"metric='w3'.*w1.*energy.*variance_ratio"),
        (lambda a: pl.leave_one_out(a, method="previous"), r"method='previous'.*ot-cfm.*i-cfm"),
        (lambda a: pl.leave_one_out(a, kind="map", method="cfm"), r"method='cfm'.*ot-cfm.*i-cfm"),
    ],
)
def test_an_unknown_option_lists_the_valid_ones(adata, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(adata)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", EVERY_PLOT)
def test_axes_that_are_several_are_refused(adata, name):
    axes = plt.subplots(2, 2)[1]
    with pytest.raises(TypeError, match=r"one Axes, found ndarray of shape \(2, 2\)"):
        EVERY_PLOT[name](adata, ax=axes)
    assert not any(ax.has_data() for ax in axes.flat)


@pytest.mark.parametrize("draw", [pl.velocity, pl.trajectories])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gene_colours_the_cells(adata, draw, sparse):
    adata.var_names = ["Sox2", "day"]
    adata.X = np.column_stack([np.arange(adata.n_obs), np.zeros(adata.n_obs)]).astype(np.float32)
    if sparse:
        adata.X = scipy.sparse.csr_matrix(adata.X)
    points = artists(draw(adata, color="Sox2"), PathCollection)[0]
    np.testing.assert_allclose(np.sort(points.get_array()), np.arange(adata.n_obs))
    points = artists(draw(adata, color="day"), PathCollection)[0]
    assert points.get_array().max() == 4  # a column hides a gene


@pytest.mark.parametrize(
    "names",
    [
        ["CD4 naive memory", "CD4 mixed memory", "CD8 naive memory", "CD8 mixed memory"],
        [f"cluster {n} of the committed" for n in range(20)],
        [f"a{'b' * n}{'c' * (30 - n)}d" for n in range(8)],
        ["progenitor", "progenitor 2"],
    ],
)
@pytest.mark.parametrize("width", [2.5, 6.4])
def test_no_two_names_in_a_legend_are_alike(adata, names, width):
    rng = np.random.default_rng(0)
    adata.obs["type"] = pd.Categorical(rng.choice(names, adata.n_obs), categories=names)
    ax = plt.subplots(figsize=(width, 3))[1]
    shown = [text.get_text() for text in pl.velocity(adata, color="type", ax=ax).get_legend().get_texts()]
    assert len({*shown}) == len(names)


def test_an_unknown_colour_lists_the_columns(adata):
    with pytest.raises(KeyError, match=r"color='gene' is neither a column .*nor one gene.*day.*kind.*amount"):
        pl.velocity(adata, color="gene")
    with pytest.raises(KeyError, match="color='gene'"):
        pl.trajectories(adata, color="gene")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda a: pl.velocity(a, min_mass=2), r"min_mass=2 .*from 0 to 1"),
        (lambda a: pl.velocity(a, min_mass=-0.1), r"min_mass=-0\.1"),
        (lambda a: pl.velocity(a, density=0), r"density=0 .*above 0"),
        (lambda a: pl.velocity(a, density=-1), r"density=-1"),
        (lambda a: pl.velocity(a, density=np.nan), r"density=nan"),
        (lambda a: pl.velocity(a, density=np.inf), r"density=inf"),
        (lambda a: pl.velocity(a, density="high"), r"density='high'"),
        (lambda a: pl.velocity(a, dims=0), r"dims=0 .*two columns of 'X_pca', which has 4"),
        (lambda a: pl.velocity(a, dims=(0, 1.5)), r"dims=\(0, 1\.5\)"),
        (lambda a: pl.velocity(a, dims="01"), r"dims='01'"),
        (lambda a: pl.velocity(a, color=["kind", "day"]), r"color=\['kind', 'day'\].*one column"),
        (lambda a: pl.trajectories(a, color=["kind", "day"]), r"color=\['kind', 'day'\].*one column"),
        (lambda a: pl.trajectories(a, n_cells=-1), r"n_cells=-1 .*whole number of at least 0"),
        (lambda a: pl.trajectories(a, n_cells=2.5), r"n_cells=2\.5"),
        (lambda a: pl.leave_one_out(a, kind="map", metric="mmd"), r"metric='mmd' .*left out for kind='map'"),
        (lambda a: pl.leave_one_out(a, basis="linear"), r"basis='linear' .*left out for kind='distances'"),
    ],
)
def test_a_bad_argument_says_what_was_expected(adata, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(adata)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "empty",
    [
        np.full(400, np.nan),
        np.full(400, np.inf),
        pd.array([None] * 400, dtype="Int64"),
        pd.Categorical([None] * 400, categories=["a"]),
    ],
)
def test_a_colour_without_a_value_is_refused(adata, empty):
    adata.obs["empty"] = empty
    with pytest.raises(ValueError, match=r"adata\.obs\['empty'\].*all 400 are missing"):
        pl.velocity(adata, color="empty")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", ["arrows", "stream"])
def test_the_ends_of_the_ranges_are_drawn(adata, kind):
    for options in ({"density": 0.01}, {"density": 0.5, "min_mass": 0}, {"min_mass": 1, "dims": np.array([1, 0])}):
        assert pl.velocity(adata, kind=kind, **options).has_data()


def test_times_that_are_text_name_the_parser(adata):
    adata.obs["day"] = "D" + adata.obs["day"].astype(str)
    with pytest.raises(ValueError, match=r"pp\.parse_time"):
        pl.velocity(adata)


def test_of_one_value_the_colour_bar_has_one_tick(adata):
    adata.obs["amount"] = DAYS[1]
    ax = pl.velocity(adata, color="amount")
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert [float(tick) for tick in bar.get_yticks()] == [DAYS[1]]
