"""Laws of the learned metric paths: exact ends and rates, less energy, nearer to the data, and nothing but the data."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sctraj.flow.coupling import exact, independent
from sctraj.flow.metric_path import EPSILON, MetricPath, _k_means, diagonal_metric, metric_path
from sctraj.flow.probability_path import Pairs, Straight
from sctraj.flow.snapshots import Snapshots, to_device
from sctraj.flow.vector_field import scaling

SETTINGS = {"n_steps": 150, "batch_size": 64, "width": 32, "learning_rate": 1e-2}
TIMES = (0.5, 1.5, 4.0)
METRICS = ("land", "rbf")
each_metric = pytest.mark.parametrize("metric", METRICS)


def arcs(n=150, dtype=torch.float64):
    """Cells of a half ring of radius one: on its left, on its right, then on all of it, with noise across it."""
    rng = np.random.default_rng(0)
    points = []
    for low, high in ((0.7, 0.85), (0.15, 0.3), (0.0, 1.0)):
        angle, radius = math.pi * rng.uniform(low, high, n), 1 + 0.05 * rng.standard_normal(n)
        points.append(torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)).to(dtype))
    return Snapshots(TIMES, tuple(points))


def fit(snapshots, metric, *, seed=0, couple=exact, sigma=0.2, **changed):
    couplings = [couple(interval) for interval in snapshots.intervals()]
    rng = torch.Generator().manual_seed(seed)
    return metric_path(snapshots, couplings, metric=metric, sigma=sigma, rng=rng, **SETTINGS | changed)


@pytest.fixture(scope="module")
def paths():
    return {metric: fit(arcs(), metric) for metric in METRICS}


def pairs_of(snapshots, k=0, n=100, couple=exact):
    interval = snapshots.intervals()[k]
    i, j = couple(interval).sample(n, torch.Generator().manual_seed(1))
    return Pairs(interval.x0[i], interval.x1[j], interval.t0, interval.t1)


def fractions(n=21):
    return torch.linspace(0, 1, n, dtype=torch.float64)[:, None, None]


def energy(path, pairs, metric, snapshots):
    """Kinetic energy under the metric of h as a share of its mean at the cells, by the trapezoidal rule."""
    units = scaling(snapshots, std=0.0)
    cost = diagonal_metric(snapshots, units, metric, torch.Generator().manual_seed(5))
    usual = cost.density((torch.cat(snapshots.points) - units.shift) / units.scale).mean()
    s = fractions()
    at = path.moments(pairs, s.expand(-1, len(pairs.x0), 1))
    y, rate = ((v - c) / units.scale for v, c in ((at.mean, units.shift), (at.mean_rate * pairs.length, 0.0)))
    density = cost.density(y.flatten(0, 1)).reshape(*y.shape[:2], -1)
    return float(torch.trapezoid((rate.square() / (density / usual + EPSILON)).sum(-1).mean(1), s.flatten()))


@each_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_met_exactly(paths, metric, dtype):
    pairs = pairs_of(arcs(dtype=dtype))
    for s, end in ((0.0, pairs.x0), (1.0, pairs.x1)):
        at = paths[metric].moments(pairs, torch.full((100, 1), s, dtype=dtype))
        assert torch.equal(at.mean, end)


@each_metric
@pytest.mark.parametrize("k", [0, 1])
def test_the_rate_is_the_derivative_of_the_mean_in_real_time(paths, metric, k):
    pairs = pairs_of(arcs(), k)
    s, h = fractions(9)[1:-1].expand(-1, 100, 1), 1e-5
    later, earlier = (paths[metric].moments(pairs, s + step).mean for step in (h, -h))
    numerical = (later - earlier) / (2 * h * (TIMES[k + 1] - TIMES[k]))
    at = paths[metric].moments(pairs, s)
    torch.testing.assert_close(at.mean_rate, numerical, rtol=1e-7, atol=1e-7)  # h^2 and rounding over h
    assert bool((at.std == 0.2).all())
    assert bool((at.std_rate == 0).all())


def test_any_leading_axes_and_times_of_each_pair_give_the_same(paths):
    snapshots, path = arcs(), paths["rbf"]
    first, second = pairs_of(snapshots, 0, 6), pairs_of(snapshots, 1, 6)
    s = torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = [path.moments(pairs, part).mean for pairs, part in zip((first, second), s.split(6))]
    column = torch.ones(6, 1, dtype=torch.float64)
    t0, t1 = (torch.cat([a * column, b * column]) for a, b in ((first.t0, second.t0), (first.t1, second.t1)))
    x0, x1 = torch.cat([first.x0, second.x0]), torch.cat([first.x1, second.x1])
    shaped = [v.reshape(2, 3, 2, -1) for v in (x0, x1, t0, t1)]
    together = path.moments(Pairs(*shaped), s.reshape(2, 3, 2, 1)).mean
    torch.testing.assert_close(together.reshape(12, 2), torch.cat(alone), rtol=0, atol=1e-12)  # order of the sums
    one = path.moments(Pairs(first.x0[0], first.x1[0], first.t0, first.t1), s[0]).mean
    torch.testing.assert_close(one, alone[0][0], rtol=0, atol=1e-12)


@each_metric
def test_paths_cost_less_than_lines_and_are_nearer_to_the_data(paths, metric):
    snapshots, path = arcs(), paths[metric]
    pairs = pairs_of(snapshots)
    assert energy(path, pairs, metric, snapshots) < 0.5 * energy(Straight(0.0), pairs, metric, snapshots)
    middle = torch.full((100, 1), 0.5, dtype=torch.float64)
    # the chord's middle is 1 - cos(0.275 pi) = 0.35 from the ring, the ring's noise is a twentieth
    off, chord_off = ((p.moments(pairs, middle).mean.norm(dim=1) - 1).abs().mean() for p in (path, Straight(0.0)))
    assert float(chord_off) > 0.3
    assert float(off) < 0.1


@each_metric
def test_where_cells_fill_space_evenly_paths_are_nearly_straight(metric):
    generator = torch.Generator().manual_seed(0)
    points = tuple(torch.rand(400, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    snapshots = Snapshots((0.0, 1.0), points)
    path, pairs = fit(snapshots, metric, couple=independent), pairs_of(snapshots, couple=independent)
    middle = torch.full((100, 1), 0.5, dtype=torch.float64)
    bend = (path.moments(pairs, middle).mean - (pairs.x0 + pairs.x1) / 2).norm(dim=1).mean()
    assert float(bend) < 0.1 * float((pairs.x1 - pairs.x0).norm(dim=1).mean())


@each_metric
def test_paths_move_with_unit_and_origin_of_cells_and_time(metric):
    snapshots = arcs()
    factor, shift, hours = 3.7, torch.tensor([10.0, -4.0], dtype=torch.float64), 24.0
    moved = Snapshots(tuple(hours * t + 5 for t in TIMES), tuple(factor * x + shift for x in snapshots.points))
    here, there = fit(snapshots, metric, n_steps=50), fit(moved, metric, n_steps=50)
    for k in (0, 1):
        s = fractions(5).expand(-1, 100, 1)
        a, b = here.moments(pairs_of(snapshots, k), s), there.moments(pairs_of(moved, k), s)
        # rounding, which training amplifies
        torch.testing.assert_close(b.mean, factor * a.mean + shift, rtol=0, atol=1e-7)
        torch.testing.assert_close(b.mean_rate, factor / hours * a.mean_rate, rtol=0, atol=1e-7)


@each_metric
def test_same_seed_same_bits_and_no_global_random_state(metric):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    one, again, other = (fit(arcs(), metric, n_steps=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert all(map(torch.equal, again.weights + again.biases, one.weights + one.biases))
    assert not torch.equal(other.weights[0], one.weights[0])


@each_metric
def test_a_held_out_snapshot_changes_nothing(metric):
    snapshots = arcs()
    points = (snapshots.points[0], 1e6 * torch.ones(3, 2, dtype=torch.float64), snapshots.points[2])
    spoilt = Snapshots(TIMES, points)
    one, other = (fit(s.without(1), metric, n_steps=20) for s in (snapshots, spoilt))
    assert all(map(torch.equal, one.weights + one.biases, other.weights + other.biases))
    assert (one.scale, one.origin, one.gap) == (other.scale, other.origin, other.gap)


def test_every_tensor_moves_to_a_device(paths):
    moved = to_device(paths["land"], torch.device("meta"))
    assert isinstance(moved, MetricPath)
    values = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    tensors = [t for value in values for t in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(t)]
    assert len(tensors) == 7  # three layers and the shift
    assert {t.device.type for t in tensors} == {"meta"}


def test_points_have_the_dtype_of_the_pairs(paths):
    wide, narrow = pairs_of(arcs()), pairs_of(arcs(dtype=torch.float32))
    s = torch.full((100, 1), 0.4, dtype=torch.float64)
    one, other = paths["land"].moments(wide, s), paths["land"].moments(narrow, s.float())
    for name in ("mean", "mean_rate", "std", "std_rate"):
        assert getattr(other, name).dtype == torch.float32
        torch.testing.assert_close(getattr(other, name).double(), getattr(one, name), rtol=0, atol=1e-4)
    assert fit(arcs(dtype=torch.float32), "land", n_steps=2).weights[0].dtype == torch.float32


def test_sampling_needs_no_gradient_and_leaves_none(paths):
    pairs = pairs_of(arcs())
    free = paths["rbf"].sample(pairs, torch.Generator().manual_seed(0))
    with torch.no_grad():
        held = paths["rbf"].sample(pairs, torch.Generator().manual_seed(0))
        trained = fit(arcs(), "rbf", n_steps=5).weights[-1]  # nor does training
    assert torch.equal(trained, fit(arcs(), "rbf", n_steps=5).weights[-1])
    for name in ("t", "x", "velocity", "score", "std"):
        assert not getattr(free, name).requires_grad
        assert torch.equal(getattr(free, name), getattr(held, name))


def test_land_measures_local_variances():
    snapshots = arcs(20)
    units = scaling(snapshots, std=0.0)
    land = diagonal_metric(snapshots, units, "land", torch.Generator())
    cells = ((torch.cat(snapshots.points) - units.shift) / units.scale).numpy()
    distances = np.linalg.norm(cells[:, None] - cells[None], axis=-1)
    assert land.gamma == pytest.approx(np.sort(np.sort(distances, 1)[:, 10])[29], rel=1e-12)  # lower median of 60
    x = torch.tensor([[0.1, -0.3], [1.0, 0.8], [30.0, 30.0]], dtype=torch.float64)
    expected = []
    for point in x.numpy():
        near = np.exp(-np.square(point - cells).sum(1) / (2 * land.gamma**2))
        expected.append([np.average(np.square(cells[:, a] - point[a]) * near) for a in range(2)])
    torch.testing.assert_close(land.density(x), torch.tensor(expected), rtol=1e-9, atol=1e-13)  # rounding


def test_rbf_is_one_at_the_cells_and_nothing_far_away():
    snapshots = arcs()
    units = scaling(snapshots, std=0.0)
    rbf = diagonal_metric(snapshots, units, "rbf", torch.Generator().manual_seed(0))
    h = rbf.density((torch.cat(snapshots.points) - units.shift) / units.scale)
    assert h.shape == (450, 1)
    assert float((h - 1).square().mean().sqrt()) < 0.35  # a smooth fit: cells at the noise's edge have less
    assert float(rbf.density(torch.full((1, 2), 20.0, dtype=torch.float64))) < 1e-6
    assert bool((rbf.weights >= 0).all())


def weighted(x, mass):
    """Twice the same cells, and the units and centres' generator that a metric of theirs is made with."""
    snapshots = Snapshots((0.0, 1.0), (x, x), (mass, mass))
    return snapshots, scaling(snapshots, std=0.0), torch.Generator().manual_seed(0)


@each_metric
def test_among_cells_without_weight_nothing_is_cheap(metric):
    x = torch.cat([arcs().points[2], arcs().points[2] + 30])
    snapshots, units, rng = weighted(x, torch.arange(300) < 150)
    density = diagonal_metric(snapshots, units, metric, rng).density((x - units.shift) / units.scale)
    assert float(density[150:].mean()) < 1e-3 * float(density[:150].mean())


def test_a_centre_whose_cells_are_at_one_place_has_a_reach():
    x = torch.cat([arcs(39).points[2], torch.full((1, 2), 100.0).double()])
    snapshots, units, rng = weighted(x, torch.ones(40))
    rbf = diagonal_metric(snapshots, units, "rbf", rng)
    squares = torch.cdist((x - units.shift) / units.scale, rbf.centres).amin(1).square()
    assert float(squares[39]) < 1e-12  # rounding: the last cell is by itself
    assert float(rbf.precision.max()) <= 10 / float(squares.mean()) * (1 + 1e-9)  # a tenth of the mean square; rounding


def test_a_centre_without_cells_stays_where_it_is():
    x = torch.tensor([[0.0], [0.0], [0.0], [5.0]])  # of three centres two at least begin at one place
    centres, nearest = _k_means(x, 3, torch.Generator().manual_seed(0))
    assert {*centres.flatten().tolist()} <= {0.0, 5.0}
    assert torch.equal(centres[nearest], x)


def test_the_same_pair_bends_otherwise_in_another_interval(paths):
    pairs, s = pairs_of(arcs()), torch.full((100, 1), 0.5, dtype=torch.float64)
    for path in paths.values():
        here, there = (path.moments(Pairs(pairs.x0, pairs.x1, t, t + 1.0), s).mean for t in TIMES[:2])
        assert float((here - there).norm(dim=1).min()) > 1e-4


def test_the_step_size_falls_along_a_cosine():
    rate = 1e-4  # so small that Adam's second step is as long as the first, but for the rate
    path = fit(arcs(), "land", n_steps=2, learning_rate=rate)
    # the last layer starts at zero: it has gone 1, then 1/2 along the cosine
    assert float(path.weights[-1].abs().max()) == pytest.approx(1.5 * rate, rel=0.05)


def test_a_step_has_as_many_pairs_as_asked_for():
    asked = []

    def counted(interval):
        coupling = independent(interval)
        return SimpleNamespace(sample=lambda n, rng: asked.append(n) or coupling.sample(n, rng))

    fit(arcs(20), "land", couple=counted, n_steps=3, batch_size=65)
    assert asked == [3 * 33, 3 * 32]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metric": "euclid"}, "metric"),
        ({"n_steps": 0}, "n_steps"),
        ({"width": 0}, "width"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"batch_size": 1}, "batch_size"),
        ({"sigma": -1.0, "n_steps": 1}, "sigma"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        fit(arcs(20), **{"metric": "land"} | changed)


def test_one_coupling_for_every_interval():
    snapshots = arcs(20)
    couplings = [independent(interval) for interval in snapshots.intervals()]
    rest = {"metric": "land", "sigma": 0.1, "rng": torch.Generator()} | SETTINGS
    with pytest.raises(ValueError, match="one coupling for each of 2 intervals, found 1"):
        metric_path(snapshots, couplings[:1], **rest)
    with pytest.raises(ValueError, match="two snapshots"):
        metric_path(Snapshots((0.0,), snapshots.points[:1]), [], **rest)


@each_metric
def test_training_that_fails_says_so(metric):
    with pytest.raises(RuntimeError, match=r"finite energy, found .* at step .*learning_rate below"):
        fit(arcs(20, torch.float32), metric, learning_rate=1e30)
