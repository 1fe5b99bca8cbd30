"""Laws of the closed-form field: it minimises the objective, keeps the marginals, moves masses, and minds no units."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.interpolate import CubicHermiteSpline
from scipy.stats import norm
from torch import Tensor

from sctraj.flow import closed_form as module
from sctraj.flow import problem as problem_module
from sctraj.flow.closed_form import ClosedFormField, _nearest, closed_form
from sctraj.flow.coupling import GrowingPlan, WeightedPairs
from sctraj.flow.distance import energy_distance
from sctraj.flow.hold_out import hold_out_problems, restore
from sctraj.flow.integrate import Integration, push, simulate, transport
from sctraj.flow.probability_path import BrownianBridge, Hermite, Straight, Trigonometric
from sctraj.flow.problem import METHODS, Problem, make_problems
from sctraj.flow.restoration import moved
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.tangents import Tangents

CPU = torch.device("cpu")
TIMES = (0.0, 1.0, 4.0, 6.0)


def make(times=TIMES, sizes=(40, 30, 50, 35), *, seed=0, shift=0.0, unit=1.0, hours=1.0, delay=0.0) -> Snapshots:
    rng = torch.Generator().manual_seed(seed)
    clouds = [torch.randn(n, 2, generator=rng, dtype=torch.float64) + t for n, t in zip(sizes, times)]
    return Snapshots(tuple(hours * t + delay for t in times), tuple(unit * x + shift for x in clouds))


def field_of(*problems: Problem, dtype=torch.float64) -> ClosedFormField:
    return closed_form(problems, device=CPU, dtype=dtype)


def fields(snapshots: Snapshots, method: str, *, path=None, seeds=(0,), sigma=None, dtype=torch.float64):
    problems, _ = make_problems(snapshots, method=method, path=path, sigma=sigma, seeds=seeds, validate=False)
    return field_of(*problems, dtype=dtype)


def hand_made(x0, x1, mass0, mass1, path, *, t0=1.5, t1=4.0, velocities=()) -> Problem:
    """Pairs (x0_p, x1_p) of known masses: cells are paired in order."""
    x0, x1, mass0, mass1 = (torch.as_tensor(v, dtype=torch.float64) for v in (x0, x1, mass0, mass1))
    snapshots = Snapshots((t0, t1), (x0, x1), (mass0, mass1))
    index = torch.arange(len(x0))
    plan = GrowingPlan(WeightedPairs(index, index, *snapshots.mass), x1, x0)
    zero = x0.new_zeros(x0.shape[-1])
    tangents = Tangents(velocities, ((zero, zero),), reliability=1.0) if velocities else None
    return Problem(snapshots, (plan,), path, 0, tangents)


def grid(n=60, members=1, seed=3, reach=3.0) -> Tensor:
    return reach * torch.randn(members, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2


# ---- the minimiser


LINE = {"x0": np.array([-1.0, 0.3, 2.0]), "x1": np.array([1.0, 2.5, -0.5]), "t0": 1.5, "t1": 4.0, "sigma": 0.7}
BIRTHS = {"mass0": np.array([0.5, 0.2, 0.3]), "mass1": np.array([0.1, 0.6, 0.3])}


def on_a_line(mass0, mass1) -> ClosedFormField:
    x0, x1 = LINE["x0"][:, None], LINE["x1"][:, None]
    return field_of(hand_made(x0, x1, mass0, mass1, BrownianBridge(LINE["sigma"])))


def law_on_a_line(t: float, mass0, mass1) -> tuple[np.ndarray, np.ndarray, float]:
    """Masses, means and the standard deviation of the bridges at time t."""
    length = LINE["t1"] - LINE["t0"]
    s = (t - LINE["t0"]) / length
    spread = LINE["sigma"] * math.sqrt(s * (1 - s) * length)
    return (1 - s) * mass0 + s * mass1, (1 - s) * LINE["x0"] + s * LINE["x1"], spread


@pytest.mark.parametrize("s", [0.02, 0.3, 0.5, 0.9])
def test_with_the_bridges_own_spread_the_continuity_equation_holds(s):
    t, h = LINE["t0"] + s * (LINE["t1"] - LINE["t0"]), 1e-5
    masses = BIRTHS["mass0"], BIRTHS["mass1"]
    x = np.linspace(-6, 8, 20_001)

    def cumulative(t: float) -> np.ndarray:
        m, mean, spread = law_on_a_line(t, *masses)
        return norm.cdf(x[:, None], mean, spread) @ m

    m, mean, spread = law_on_a_line(t, *masses)
    density = norm.pdf(x[:, None], mean, spread) @ m
    at = on_a_line(*masses).evaluate(t, torch.tensor(x)[None, :, None])
    velocity, growth, score = (v[0, :, 0].numpy() for v in (at.velocity, at.growth, at.score))
    # d/dt P(X < x) = - p v + the mass that grows below x: differences are good to h^2 and rounding over h, 1e-10
    born = np.array([trapezoid((density * growth)[:k], x[:k]) for k in range(1, len(x) + 1, 400)])
    rate = (cumulative(t + h) - cumulative(t - h))[::400] / (2 * h)
    np.testing.assert_allclose(rate, born - (density * velocity)[::400], rtol=0, atol=1e-5)  # the trapezoid rule's
    assert np.abs(born).max() > 0.02  # there is something to compare
    assert born[-1] == pytest.approx(0, abs=1e-6)  # the total is kept
    inside = density > 1e-6 * density.max()
    slope = np.gradient(density, x)[inside] / density[inside]
    # differences over 7e-4, squared and over spread^2, against slopes of up to 5 / spread
    np.testing.assert_allclose(score[inside], slope, rtol=1e-3, atol=1e-3 / spread)


def test_with_the_bridges_own_spread_it_is_the_posterior_mean_of_the_pairs():
    masses = np.array([0.5, 0.2, 0.3]), np.array([0.5, 0.2, 0.3])
    field = on_a_line(*masses)
    assert not field.grows
    for s in (0.1, 0.5, 0.75):
        t = LINE["t0"] + s * (LINE["t1"] - LINE["t0"])
        m, mean, spread = law_on_a_line(t, *masses)
        for x in (-2.0, 0.4, 3.0):
            posterior = m * norm.pdf(x, mean, spread)
            posterior /= posterior.sum()
            # a Brownian bridge at x drifts to its end in the time that is left; its flow's velocity is that drift less
            # sigma^2/2 times the score (Tong et al. 2023b, eq. 5)
            drift = (LINE["x1"] - x) / (LINE["t1"] - t)
            score = -(x - mean) / spread**2
            truth = posterior @ (drift - LINE["sigma"] ** 2 / 2 * score)
            at = field.evaluate(t, torch.full((1, 1, 1), x, dtype=torch.float64))
            assert float(at.velocity) == pytest.approx(truth, rel=1e-10)  # rounding
            assert float(at.score) == pytest.approx(posterior @ score, rel=1e-10)


@pytest.mark.parametrize("end", [0, 1])
def test_a_bridges_velocity_at_its_ends_is_that_of_the_pairs(end):
    # the spread keeps a margin there, and cells off the mean path by as much would be pulled back by half the velocity
    field = on_a_line(*2 * (np.full(3, 1 / 3),))
    x, t = (torch.tensor(LINE[f"x{end}"])[None, :, None], LINE[f"t{end}"])
    at = field.evaluate(t, x)
    chord = torch.tensor(LINE["x1"] - LINE["x0"]) / (LINE["t1"] - LINE["t0"])
    torch.testing.assert_close(at.velocity[0, :, 0], chord, rtol=1e-9, atol=0)
    # and the drift of the bridge, velocity and half the score times sigma^2, is the same
    torch.testing.assert_close(at.score[0, :, 0], torch.zeros(3).double(), rtol=0, atol=1e-9)
    near = field.evaluate(t + (1 - 2 * end) * 1e-4, x + (1 - 2 * end) * 1e-4 * chord[None, :, None])
    torch.testing.assert_close(near.velocity, at.velocity, rtol=1e-3, atol=1e-3)  # no jump at the margin


def test_it_is_the_regression_that_a_network_is_trained_on():
    rng = np.random.default_rng(0)
    n, draws = 12, 6000
    x0, x1 = rng.normal(size=(n, 2)), rng.normal(size=(n, 2)) + 2
    problem = hand_made(x0, x1, rng.exponential(size=n), rng.exponential(size=n), BrownianBridge(0.6))
    field = field_of(problem)
    drawn = problem.sample(1, draws, torch.Generator().manual_seed(0))
    x, t, weight = drawn.path.x[0], drawn.path.t[0], drawn.weight[0]
    each = [field.evaluate(float(now), here[None, None]) for now, here in zip(t, x)]
    s = (t - 1.5) / 2.5
    damp = (s * (1 - s)).sqrt()  # tames the bridge's velocity at the ends
    residuals = {
        "velocity": (drawn.path.velocity[0] - torch.cat([at.velocity[0] for at in each])) * damp,
        "score": (drawn.path.score[0] - torch.cat([at.score[0] for at in each])) * damp,
        "growth": drawn.growth[0] - torch.cat([at.growth[0] for at in each]),
    }
    tests = torch.cat([torch.ones_like(s), s - 0.5, x, torch.sin(2 * x), torch.cos(3 * x) * s], 1)
    for name, residual in residuals.items():
        for k in range(residual.shape[1]):
            # the error of a conditional mean is orthogonal to every function of (t, x)
            products = weight * residual[:, k : k + 1] * tests
            error = products.mean(0) / (products.std(0) / math.sqrt(draws))
            assert float(error.abs().max()) < 4, name  # standard errors
    assert float(residuals["growth"].std()) > 0.05  # there is something to average


# ---- paths


def test_one_pair_moves_along_its_cubic():
    start, end, v0, v1 = (torch.tensor([v]).double() for v in ([0.0, 1.0], [3.0, 0.5], [-1.0, 2.0], [4.0, -0.2]))
    problem = hand_made(start, end, [1.0], [1.0], Hermite(0.1), velocities=(v0, v1))
    field = field_of(problem)
    cubic = CubicHermiteSpline([1.5, 4.0], torch.cat([start, end]), torch.cat([v0, v1]))
    for t in (1.5, 2.0, 3.3, 4.0):
        moved = push(field, start[None], 1.5, t, Integration("rk4", 4, 1e-6))
        # Runge-Kutta integrates a quadratic in time without error: rounding
        np.testing.assert_allclose(moved[0, 0], cubic(t), rtol=0, atol=1e-12)
        velocity = field.velocity(t, start[None] + 5.0)  # whatever the place
        np.testing.assert_allclose(velocity[0, 0], cubic(t, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("path", "reliability"), [("hermite", 1.0), ("hermite", 0.4), ("straight", 1.0)])
def test_curved_paths_go_through_a_snapshot_at_one_velocity_but_for_turns_not_taken(monkeypatch, path, reliability):
    # seen through a needle's eye, a cell at its own time has its own paths' velocity
    monkeypatch.setattr(module, "NEIGHBOURS", 1)
    monkeypatch.setattr(module, "FLOOR", 1e-3)
    (problem,), _ = make_problems(make(), method="uot-cfm", path=path, sigma=1e-3, seeds=(0,), validate=False)
    if problem.tangents is not None:
        problem = replace(problem, tangents=replace(problem.tangents, reliability=reliability))
    field, x = field_of(problem), make().points[2][None]
    before, after = (field.velocity(4.0 + step, x) for step in (-1e-9, 0.0))
    kink = before - after
    if problem.tangents is None:
        assert float(kink.abs().max()) > 0.1
    else:  # that is the same for all cells: what the population's own turn lacks
        at_end, at_start = problem.tangents.turns[1][1], problem.tangents.turns[2][0]
        lacking = (1 - reliability) * (at_start - at_end)
        # a step of 1e-9 in time, over a bandwidth of a thousandth
        assert float((kink - lacking).abs().max()) < 1e-6
        assert float(lacking.norm()) > 0.1 or reliability == 1


@pytest.mark.parametrize(("method", "dtype"), [("uot-cfm", torch.float64), ("ot-cfm", torch.float32)])
def test_pushing_the_start_lands_in_the_held_out_snapshot(method, dtype):
    n, far, times = 300, 8.0, (0.0, 1.0, 4.0)

    def sample(t: float, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(n, 2, generator=rng, dtype=torch.float64) + torch.tensor([far * t / 4, 0.0])

    noise = np.array([energy_distance(sample(1.0, 2 * k), sample(1.0, 2 * k + 1)) for k in range(10, 30)])
    snapshots = Snapshots(times, tuple(sample(t, seed).to(dtype) for seed, t in enumerate(times)))
    held_out, problems, _ = hold_out_problems(
        snapshots, method=method, path=None, sigma=None, seeds=(0,), validate=False
    )
    for start in ("before", "both"):
        (restored,) = restore(
            field_of(*problems, dtype=dtype), snapshots, held_out, Integration("rk4", 20, 1e-5), start=start
        )
        distance = energy_distance(restored.points, snapshots.points[1], weights_x=restored.mass)
        # what two samples of the truth are apart, four standard deviations; standing still it would be 2.1
        assert distance < noise.mean() + 4 * noise.std()
        assert distance < 0.05


def test_the_bridges_flow_and_its_sde_end_at_the_target():
    x0, x1 = grid(200, seed=1, reach=1.0)[0], grid(200, seed=2, reach=0.5)[0] + 3
    snapshots = Snapshots((1.0, 3.5), (x0, x1))
    field = fields(snapshots, "sb-cfm", sigma=0.5)
    assert field.has_score
    noise = max(energy_distance(grid(200, seed=k, reach=0.5)[0] + 3, x1) for k in range(20, 40))
    there = push(field, x0[None], 1.0, 3.5, Integration("rk4", 20, 1e-5))[0]
    rng = torch.Generator().manual_seed(0)
    noisy = simulate(field, x0[None], 1.0, 3.5, sigma=0.5, n_steps=60, rng=rng)[0]
    for y in (there, noisy):
        assert energy_distance(y, x1) < noise + 0.01  # a sample of the target; a step at the end, 0.05^2 apart


# ---- growth


def two_groups(n=20, gap=300.0, weights0=(1 / 3, 2 / 3), weights1=(1 / 2, 1 / 2), path=None) -> Problem:
    rng = np.random.default_rng(1)
    x0, x1 = (rng.normal(size=(2 * n, 2)) + np.repeat([[0.0, 0.0], [gap, 0.0]], n, 0) for _ in range(2))
    return hand_made(x0, x1, np.repeat(weights0, n), np.repeat(weights1, n), path or Straight(0.1))


@pytest.mark.parametrize("path", [Straight(0.1), Hermite(0.1), BrownianBridge(0.4), Trigonometric(0.1)])
def test_groups_grow_at_their_own_rates(path):
    n, t0, length = 20, 1.5, 2.5
    problem = two_groups(n, path=path)
    field = field_of(problem)
    assert field.grows
    x0 = problem.snapshots.points[0][None]
    for s in (0.01, 0.5, 0.8, 0.99):
        stretch = math.cos(s * math.pi / 2) + math.sin(s * math.pi / 2) if isinstance(path, Trigonometric) else 1.0
        growth = field.growth(t0 + s * length, stretch * x0)[0, :, 0]  # each group where it is at that time
        for own, (m0, m1) in ((slice(None, n), (1 / 3, 1 / 2)), (slice(n, None), (2 / 3, 1 / 2))):
            rate = (m1 - m0) / ((1 - s) * m0 + s * m1) / length  # masses linear in time
            np.testing.assert_allclose(growth[own], rate, rtol=1e-9)  # all of a group alike: rounding
    if not isinstance(path, BrownianBridge):  # which keeps off the ends
        moved = transport(field, x0, t0, t0 + length, Integration("rk4", 20, 1e-6))
        # the integral of m' / m by Simpson's rule over steps of a twentieth: (1/20)^4 / 2880 x fourth derivative
        np.testing.assert_allclose(moved.log_mass[0, :n].exp(), 3 / 2, rtol=1e-7)
        np.testing.assert_allclose(moved.log_mass[0, n:].exp(), 3 / 4, rtol=1e-7)
        total = problem.snapshots.mass[0] @ moved.log_mass[0].exp()
        assert float(total) == pytest.approx(1, rel=1e-7)


def test_a_growing_coupling_carries_groups_to_their_weights():
    n = 60
    rng = np.random.default_rng(1)
    x0, x1 = (torch.tensor(rng.normal(size=(2 * n, 2)) + np.repeat([[0, 0], [40, 0]], n, 0)) for _ in range(2))
    mass = torch.tensor(np.repeat([1.0, 2.0], n))
    snapshots = Snapshots((1.5, 4.0), (x0, x1 + torch.tensor([0.0, 5.0])), (mass, torch.ones(2 * n)))
    field = fields(snapshots, "uot-cfm")
    moved = transport(field, x0[None], 1.5, 4.0, Integration("rk4", 20, 1e-6))
    carried = snapshots.mass[0] * moved.log_mass[0].exp()
    # cells of a group differ by e^(+-0.1) (distances of 5 against a penalty of 300), which averages out but for what
    # the kernel smooths: second order
    assert float(carried[:n].sum()) == pytest.approx(1 / 2, abs=0.01)
    assert float(carried[n:].sum()) == pytest.approx(1 / 2, abs=0.01)
    back = transport(field, moved.points, 4.0, 1.5, Integration("rk4", 20, 1e-6))
    np.testing.assert_allclose(back.log_mass, -moved.log_mass, atol=0.01)  # Runge-Kutta through a rough field


@pytest.mark.parametrize("method", ["ot-cfm", "i-cfm", "sb-cfm", "vp-cfm"])
def test_a_balanced_coupling_grows_nothing(method):
    field = fields(make(), method)
    assert not field.grows
    assert field.evaluate(2.0, grid()).growth is None
    assert not field.growth(2.0, grid()).any()


def test_pairs_that_begin_or_end_without_mass_are_finite():
    path = Straight(0.1)
    problem = hand_made([[0.0], [1.0], [9.0]], [[0.0], [2.0], [9.5]], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], path)
    field = field_of(problem)
    x = torch.linspace(-1, 3, 9).double().reshape(1, -1, 1)
    for t in (1.5, 2.0, 4.0):
        at = field.evaluate(t, x)
        assert bool(at.velocity.isfinite().all() and at.growth.isfinite().all())


# ---- how it is computed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tile", [1, 333])
def test_tiles_give_the_whole(monkeypatch, method, tile):
    field, x = fields(make(), method, seeds=(0, 1)), grid(50, members=2)
    whole = field.evaluate(2.0, x)
    monkeypatch.setattr(module, "TILE", tile)
    tiled = field.evaluate(2.0, x)
    for name in ("velocity", "score", "growth"):
        a, b = getattr(whole, name), getattr(tiled, name)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # rounding of distances, over the bandwidth


@pytest.mark.parametrize("method", METHODS)
def test_members_together_are_each_alone(method):
    data = [make(), make((0.0, 2.0, 9.0), (25, 45, 20), seed=5), make(unit=30.0, shift=100.0)]
    problems = [make_problems(s, method=method, path=None, sigma=None, seeds=(k,), validate=False)[0][0]
                for k, s in enumerate(data)]  # fmt: skip
    together, x = field_of(*problems), torch.cat([grid(), grid(seed=4), 30 * grid(seed=5) + 100])
    assert together.members == 3
    t = torch.tensor([2.0, 5.0, 0.3])[:, None, None]
    all_of_them = together.evaluate(t, x)
    for m, problem in enumerate(problems):
        alone = field_of(problem).evaluate(float(t[m]), x[m : m + 1])
        for name in ("velocity", "score", "growth"):
            one, every = getattr(alone, name), getattr(all_of_them, name)
            assert (one is None) == (every is None)
            if one is not None:
                assert torch.equal(one[0], every[m])
        assert together.scale[m] == field_of(problem).scale[0]
    same, ensemble = x[:1].expand(3, -1, -1), together.ensemble()
    mean = ensemble.evaluate(2.0, x[:1]).velocity
    torch.testing.assert_close(mean[0], together.evaluate(2.0, same).velocity.mean(0))
    torch.testing.assert_close(ensemble.bandwidth(2.0, x[:1])[0], together.bandwidth(2.0, same).mean(0))
    torch.testing.assert_close(ensemble.scale[0], together.scale.mean(0))


@pytest.mark.parametrize("path", ["straight", "hermite"])
@pytest.mark.parametrize(("t0", "t1"), [(0.5, 5.0), (5.0, 0.5), (0.0, 6.0), (6.0, 0.0)])
def test_a_way_over_snapshots_is_that_from_one_to_the_next(path, t0, t1):
    field, x, fine = fields(make(), "ot-cfm", path=path), grid(20), Integration("rk4", 60, 1e-6)
    stops = [t0, *(t for t in (TIMES if t0 < t1 else TIMES[::-1]) if min(t0, t1) < t < max(t0, t1)), t1]
    parts = x
    for first, last in pairwise(stops):
        parts = push(field, parts, first, last, replace(fine, n_steps=30))
    torch.testing.assert_close(push(field, x, t0, t1, fine), parts, rtol=0, atol=1e-3)  # of neither's steps


def test_members_that_cross_other_snapshots_do_not_mind_each_other():
    problems, _ = make_problems(make(), method="ot-cfm", path=None, sigma=None, seeds=[0], validate=False)
    field, x, way = field_of(*problems, *problems), grid(20, members=2), Integration("rk4", 40, 1e-6)
    together = push(field, x, torch.tensor([0.0, 0.5]), torch.tensor([1.0, 6.0]), way)
    alone = push(field_of(*problems), x[:1], 0.0, 1.0, way)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)  # it has no fewer steps than by itself
    (leg, *_) = field.legs(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 5.5]))
    assert leg.t1.tolist() == [1.0, 5.5]


def test_nothing_to_put_together():
    with pytest.raises(ValueError, match="at least one problem"):
        closed_form([], device=CPU, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, None) for method in METHODS),
        ("uot-cfm", "straight"),
        ("i-cfm", "hermite"),
        ("ot-cfm", "land"),
        ("uot-cfm", "rbf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_there_and_back(method, path, dtype):
    field = fields(make(), method, path=path, seeds=range(11), dtype=dtype)  # more than ten: names share a beginning
    arrays = {name: value.copy() for name, value in field.to_arrays().items()}
    assert all(isinstance(value, np.ndarray) and "/" not in name for name, value in arrays.items())
    again = ClosedFormField.from_arrays(arrays)
    assert (again.members, again.dimension, again.has_score, again.grows) == (
        11,
        2,
        field.has_score,
        field.grows,
    )
    assert torch.equal(again.scale, field.scale)
    x = grid(members=11).to(dtype)
    for t in (0.5, 2.0, 6.0):
        one, other = field.evaluate(t, x), again.evaluate(t, x)
        for name in ("velocity", "score", "growth"):
            a, b = getattr(one, name), getattr(other, name)
            assert a is b is None or (torch.equal(a, b) and a.dtype == dtype)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_is_the_same_field(method):
    x = grid(reach=1.0)
    double, single = (fields(make(), method, dtype=dtype) for dtype in (torch.float64, torch.float32))
    a, b = double.velocity(2.0, x), single.velocity(2.0, x.float()).double()
    # 6e-8 of squares of 30, over a bandwidth squared of 0.02 at least: 1e-4, times what velocities differ by
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    assert torch.equal(single.velocity(2.0, x.float()), single.double().float().velocity(2.0, x.float()))
    torch.testing.assert_close(single.double().velocity(2.0, x), a, rtol=0, atol=1e-3)  # all of it follows


@pytest.mark.parametrize(("method", "path"), [*((method, None) for method in METHODS), ("uot-cfm", "land")])
def test_all_of_it_moves_to_another_device(method, path):
    moved = fields(make(), method, path=path).to("meta")  # stands in for a GPU: what stays behind would be refused
    at = moved.evaluate(2.0, grid().to("meta"))
    assert at.velocity.device.type == "meta"
    assert moved.scale.device.type == "meta"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_ends_of_time_and_beyond_and_far_away_it_is_finite(method, dtype):
    field = fields(make(), method, dtype=dtype)
    for x in (grid().to(dtype), 1e4 * grid().to(dtype), make().points[0].to(dtype)[None]):
        for t in (-100.0, 0.0, 1.0, 6.0, 1e3):
            at = field.evaluate(t, x)
            assert all(v is None or bool(v.isfinite().all()) for v in (at.velocity, at.score, at.growth))
    for inside, beyond in ((0.0, -100.0), (6.0, 1e3)):  # time stands still there
        assert torch.equal(field.velocity(inside, grid().to(dtype)), field.velocity(beyond, grid().to(dtype)))


def test_a_snapshots_time_in_single_precision_is_that_time():
    times = (0.1, 1.3, 4.1)  # 1.3 in single precision is less
    clouds = make(times, (20, 20, 20)).points
    field = fields(Snapshots(times, clouds), "ot-cfm", dtype=torch.float32)
    x = clouds[1].float()[None]
    following = field.velocity(1.3 + 1e-6, x)
    for t in (1.3, torch.tensor(1.3), torch.tensor([1.3])[:, None, None]):
        torch.testing.assert_close(field.velocity(t, x), following, rtol=0, atol=1e-3)
    assert float((field.velocity(1.3 - 1e-6, x) - following).abs().max()) > 0.1


def test_the_bandwidth_is_the_distance_to_the_fifth_nearest_path_point():
    snapshots, t = make(), 2.3
    (problem,), _ = make_problems(snapshots, method="ot-cfm", path=None, sigma=1e-6, seeds=(0,), validate=False)
    i, j = (problem.listed(1).i, problem.listed(1).j)
    s = (t - TIMES[1]) / (TIMES[2] - TIMES[1])
    points = (1 - s) * snapshots.points[1][i] + s * snapshots.points[2][j]
    x = grid()
    wanted = torch.cdist(x[0], points).sort(1).values[:, 4]
    found = field_of(problem).bandwidth(t, x)[0, :, 0]
    assert float(found.min()) < float(found.max()) / 3  # a local one
    torch.testing.assert_close(found, wanted.clamp(min=float(found.min())), rtol=1e-6, atol=0.0)
    bridge = fields(snapshots, "sb-cfm", sigma=0.7)
    sd = 0.7 * math.sqrt(s * (1 - s) * (TIMES[2] - TIMES[1]))
    torch.testing.assert_close(bridge.bandwidth(t, x), torch.full_like(x[..., :1], sd), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("sigma", "least"), [(0.0, 5 / 20), (10.0, 10.0 / 10)])
def test_the_bandwidth_is_a_twentieth_of_the_displacement_or_a_tenth_of_sigma_at_least(sigma, least):
    x, even = np.zeros((6, 2)), np.full(6, 1 / 6)
    field = field_of(
        hand_made(x, x + np.array([3.0, 4.0]), even, even, Straight(sigma))
    )  # all of six pairs at one place
    at = torch.tensor([[[1.2, 1.6]]], dtype=torch.float64)
    assert float(field.bandwidth(2.5, at)) == pytest.approx(least)


def test_jittered_starts_are_as_wide_as_the_kernel():
    n, still = 4000, make().points[1]
    field = field_of(hand_made(still, still, torch.ones(30), torch.ones(30), Straight(0.1)))  # nothing moves
    start = still[:1].expand(n, -1)
    for jitter in (0.5, 1.0):
        (there,) = moved(
            field,
            [(start, torch.ones(n))],
            [1.5],
            [4.0],
            Integration("rk4", 1),
            jitter=jitter,
            seeds=[0],
        )
        wanted = jitter * float(field.bandwidth(1.5, start[None, :1]))
        assert float(there.points.std(0).square().mean().sqrt()) == pytest.approx(wanted, rel=0.03)  # 8,000 numbers
        assert float((there.points.mean(0) - start[0]).norm()) < 4 * wanted * math.sqrt(2 / n)


def test_both_sides_jitter_on_their_own():
    still = make().points[1]  # 30 cells that stay where they are
    snapshots = Snapshots((0.0, 1.0, 2.0), (still, still, still))
    field = field_of(hand_made(still, still, torch.ones(30), torch.ones(30), Straight(0.1), t0=0.0, t1=2.0))
    (there,) = restore(field, snapshots, [1], Integration("rk4", 1, 1e-5), start="both", jitter=1.0)
    before, after = ((there.points[rows] - still).flatten() for rows in (slice(30), slice(30, 60)))
    assert abs(float(torch.corrcoef(torch.stack([before, after]))[0, 1])) < 0.5  # of 60 numbers, 4 sd; the same: 1


def test_jitter_is_the_same_alone_and_beside_larger_snapshots():
    snapshots = make((0.0, 1.5, 4.0, 5.0, 6.0), (40, 30, 50, 7, 35))
    asked = {"method": "ot-cfm", "path": None, "sigma": None, "seeds": (0,), "validate": False}
    held_out, problems, _ = hold_out_problems(snapshots, **asked)
    how = Integration("rk4", 20, 1e-6)
    together = restore(field_of(*problems), snapshots, held_out, how, start="both", jitter=1.0)
    for k, problem, found in zip(held_out, problems, together, strict=True):
        alone, plain = (
            restore(field_of(problem), snapshots, [k], how, start="both", jitter=jitter)[0] for jitter in (1.0, 0.0)
        )
        # distances to pairs are rounded otherwise among other numbers of cells
        torch.testing.assert_close(found.points, alone.points, rtol=0, atol=1e-9)
        assert float((alone.points - plain.points).abs().mean()) > 0.1


@pytest.mark.parametrize(("method", "path"), [*((method, None) for method in METHODS), ("ot-cfm", "land")])
def test_units_of_length_and_time_and_their_origins_do_not_matter(monkeypatch, method, path):
    monkeypatch.setattr(problem_module, "N_STEPS", 20)  # of a learned path: they bend it
    unit, hours, shift, delay = 1000.0, 24.0, -3.0e4, 500.0
    data = (make(), make(unit=unit, hours=hours, shift=shift, delay=delay))
    plain, other = (fields(snapshots, method, path=path) for snapshots in data)
    x = grid(reach=1.0)
    for t in (0.0, 0.9, 2.5, 6.0):
        a, b = plain.evaluate(t, x), other.evaluate(hours * t + delay, unit * x + shift)
        # rounding, made larger by Sinkhorn's potentials (converged to 1e-3 and 1e-6, by the same steps)
        torch.testing.assert_close(b.velocity * hours / unit, a.velocity, rtol=1e-6, atol=1e-6)
        if a.score is not None:
            torch.testing.assert_close(b.score * unit, a.score, rtol=1e-6, atol=1e-6)
        if a.growth is not None:
            torch.testing.assert_close(b.growth * hours, a.growth, rtol=1e-6, atol=1e-6)


def test_a_million_pairs_take_seconds():
    n = 1_000_000
    x0 = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    index, mass = torch.arange(n), torch.full((n,), 1 / n, dtype=torch.float64)
    snapshots = Snapshots((0.0, 2.0), (x0, x0 + 3.0))
    plan = GrowingPlan(WeightedPairs(index, index, mass, mass), x0, x0)
    started = time.perf_counter()
    field = field_of(Problem(snapshots, (plan,), Straight(0.1), 0), dtype=torch.float32)
    velocity = field.velocity(1.0, x0[None, :50] + 1.5)
    assert time.perf_counter() - started < 20  # two on the machine it was written on; a busy one takes longer
    torch.testing.assert_close(velocity, torch.full_like(velocity, 1.5), rtol=1e-3, atol=0)  # sums of 1e6 in single


@pytest.mark.parametrize("m", [3, 64, 320, 321, 1000, 1024])
def test_the_fifth_nearest_is_that_of_all(m):
    distance2 = torch.rand(20, m, generator=torch.Generator().manual_seed(m)).round(decimals=2)  # with ties
    expected = distance2.sort(1).values[:, min(4, m - 1), None]
    assert torch.equal(_nearest(distance2, 5), expected)
