"""Laws of the probability paths: each is what its name says in real time, and its targets are its derivatives."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import CubicHermiteSpline
from scipy.stats import kstest

from sctraj.flow.probability_path import BRIDGE_MARGIN, BrownianBridge, Hermite, Pairs, Straight, Trigonometric

T0, T1 = 1.3, 4.1
LENGTH = T1 - T0
N = 200_000
CENTRE = torch.tensor([0.4, -1.0], dtype=torch.float64)
V0, V1 = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, 0.5], [-1.0, 4.0]))  # the cubic's, per unit of real time
PATHS = [Straight(0.3), Hermite(0.3), BrownianBridge(0.6), Trigonometric(0.3, CENTRE)]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def ends(n=N):
    x0 = torch.tensor([1.0, -2.0], dtype=torch.float64).expand(n, 2)
    x1 = torch.tensor([-0.5, 3.0], dtype=torch.float64).expand(n, 2)
    return x0, x1


def draw(path, n=N, seed=0):
    x0, x1 = ends(n)
    return path.sample(Pairs(x0, x1, T0, T1, V0, V1), torch.Generator().manual_seed(seed))


def truth(path, t):
    """Mean and variance of x_t given the ends, in real time, from first principles."""
    x0, x1 = ends(len(t))
    if isinstance(path, BrownianBridge):
        # condition W(t) on W(t1), the covariance of Brownian motion being sigma^2 min(t, t') after t0
        regression = (t - T0) / LENGTH
        return x0 + regression * (x1 - x0), path.sigma**2 * ((t - T0) - regression * (t - T0))
    variance = torch.full_like(t, path.sigma**2)
    if isinstance(path, Trigonometric):  # a rotation of the two deviations by a quarter turn
        turn = torch.exp(1j * math.pi / 2 * (t - T0) / LENGTH)
        return CENTRE + (turn.conj() * torch.complex(x0 - CENTRE, x1 - CENTRE)).real, variance
    if isinstance(path, Hermite):
        spline = CubicHermiteSpline([T0, T1], torch.stack([x0[0], x1[0]]), torch.stack([V0, V1]))
        return torch.from_numpy(spline(t.squeeze(1).numpy())), variance
    return torch.lerp(x0, x1, (t - T0) / LENGTH), variance


@each_path
def test_mean_and_variance_given_the_time(path):
    sample = draw(path)
    mean, variance = truth(path, sample.t)
    deviation = (sample.x - mean) / variance.sqrt()
    torch.testing.assert_close(sample.std.square(), variance, rtol=1e-9, atol=0)  # rounding near the ends
    assert float(sample.t.min()) >= T0
    assert float(sample.t.max()) <= T1
    for part in sample.t.squeeze(1).sort().indices.chunk(10):  # early, ..., late
        z = deviation[part]
        # five standard errors: 1/sqrt(n) of a mean, sqrt(2/n) of a variance
        assert float(z.mean(0).abs().max()) < 5 / math.sqrt(len(part))
        assert float((z.var(0) - 1).abs().max()) < 5 * math.sqrt(2 / len(part))


@each_path
def test_velocity_is_the_rate_of_the_sampled_path_in_real_time(path):
    sample = draw(path, 2000)
    mean, variance = truth(path, sample.t)
    noise = (sample.x - mean) / variance.sqrt()
    h = 1e-6 * LENGTH  # a thousandth of the bridge's margin
    later, earlier = (truth(path, sample.t + step) for step in (h, -h))
    rate = ((later[0] + later[1].sqrt() * noise) - (earlier[0] + earlier[1].sqrt() * noise)) / (2 * h)
    # rounding 1e-16 / 1e-6, and h^2 times a third derivative that grows as distance^-3 from the ends
    torch.testing.assert_close(sample.velocity, rate, rtol=1e-5, atol=1e-6)


@each_path
def test_score_is_the_gradient_of_the_log_density(path):
    sample = draw(path, 2000)
    mean, variance = truth(path, sample.t)
    x = sample.x.clone().requires_grad_()
    torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).sum().backward()
    torch.testing.assert_close(sample.score, x.grad, rtol=1e-9, atol=1e-9)  # rounding near the ends


@each_path
def test_the_path_runs_from_x0_to_x1(path):
    x0, x1 = ends(1)
    for s, end in ((0.0, x0), (1.0, x1)):
        at = path.moments(Pairs(x0, x1, T0, T1, V0, V1), torch.tensor([[s]], dtype=torch.float64))
        torch.testing.assert_close(at.mean, end, rtol=0, atol=1e-15)  # rounding
        assert float(at.std) == (0.0 if isinstance(path, BrownianBridge) else path.sigma)


def test_without_sigma_there_is_no_score_and_the_path_is_a_line():
    sample = draw(Straight(0.0), 100)
    assert sample.score is None
    mean, _ = truth(Straight(0.0), sample.t)
    torch.testing.assert_close(sample.x, mean, rtol=0, atol=1e-14)  # rounding


def test_a_cubic_without_velocities_is_the_line_exactly():
    x0, x1 = ends(1000)
    line, cubic = (
        kind(0.3).sample(Pairs(x0, x1, T0, T1), torch.Generator().manual_seed(0)) for kind in (Straight, Hermite)
    )
    for name in ("t", "x", "velocity", "score", "std"):
        assert torch.equal(getattr(line, name), getattr(cubic, name))


def test_a_cubic_leaves_and_arrives_at_the_velocities_given_in_real_time():
    x0, x1 = ends(3)
    generator = torch.Generator().manual_seed(0)
    v0, v1 = (torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t0 = torch.tensor([[0.0], [-3.0], [7.0]], dtype=torch.float64)
    length = torch.tensor([[0.25], [1.0], [6.0]], dtype=torch.float64)
    pairs = Pairs(x0, x1, t0, t0 + length, v0, v1)
    for s, expected in ((0.0, v0), (1.0, v1)):
        at = Hermite(0.0).moments(pairs, torch.full((3, 1), s, dtype=torch.float64))
        torch.testing.assert_close(at.mean_rate, expected, rtol=0, atol=1e-14)  # rounding


def test_a_cubic_course_is_met_exactly():
    coefficients = torch.tensor([[1.0, 2.0], [-0.5, 1.5], [0.3, -0.7], [-0.2, 0.4]], dtype=torch.float64)
    power = torch.arange(4, dtype=torch.float64)

    def course(t):
        return t**power @ coefficients

    def velocity(t):
        return (power[1:] * t ** power[:-1]) @ coefficients[1:]

    t0, t1 = (torch.tensor([[t]], dtype=torch.float64) for t in (T0, T1))
    s = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None]
    at = Hermite(0.0).moments(Pairs(course(t0), course(t1), T0, T1, velocity(t0), velocity(t1)), s)
    torch.testing.assert_close(at.mean, course(T0 + s * LENGTH), rtol=0, atol=1e-13)  # rounding
    torch.testing.assert_close(at.mean_rate, velocity(T0 + s * LENGTH), rtol=0, atol=1e-13)


def test_two_cubics_that_share_a_tangent_join_smoothly():
    points = torch.tensor([[1.0, -2.0], [0.0, 1.0], [4.0, 1.5]], dtype=torch.float64)
    tangent = torch.tensor([1.5, 0.75], dtype=torch.float64)
    times = (0.0, 1.0, 4.0)
    before = Pairs(points[0], points[1], times[0], times[1], velocity1=tangent)  # the other ends: no velocity is given
    after = Pairs(points[1], points[2], times[1], times[2], velocity0=tangent)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    left, right = Hermite(0.0).moments(before, one), Hermite(0.0).moments(after, zero)
    torch.testing.assert_close(left.mean, right.mean, rtol=0, atol=1e-15)  # rounding
    torch.testing.assert_close(left.mean_rate, right.mean_rate, rtol=0, atol=1e-15)
    kink = Straight(0.0).moments(before, one).mean_rate - Straight(0.0).moments(after, zero).mean_rate
    assert float(kink.norm()) > 1  # lines do not


def test_vp_keeps_the_variance_of_independent_ends():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (CENTRE + 2 * torch.randn(N, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    sample = Trigonometric(0.0, CENTRE).sample(Pairs(x0, x1, T0, T1), generator)
    for part in sample.t.squeeze(1).sort().indices.chunk(5):
        assert float((sample.x[part].var(0) / 4 - 1).abs().max()) < 5 * math.sqrt(2 / len(part))  # five standard errors


def test_bridge_keeps_its_margin():
    t = draw(BrownianBridge(0.6)).t
    s = (t - T0) / LENGTH
    assert BRIDGE_MARGIN == BrownianBridge.margin == 1e-3
    assert BRIDGE_MARGIN <= float(s.min()) < BRIDGE_MARGIN + 1e-4  # N evenly spread times reach within a few / N
    assert 1 - BRIDGE_MARGIN - 1e-4 < float(s.max()) <= 1 - BRIDGE_MARGIN


def test_variance_of_the_bridge_velocity():
    path = BrownianBridge(0.6)
    sample = draw(path)
    x0, x1 = ends()
    s = (sample.t - T0) / LENGTH
    away = ((s - 0.5).abs() > 0.05).squeeze(1)  # in the middle it vanishes
    closed = path.sigma**2 * (1 - 2 * s).square() / (4 * s * (1 - s) * LENGTH)
    z = ((sample.velocity - (x1 - x0) / LENGTH) / closed.sqrt())[away]
    for part in sample.t[away].squeeze(1).sort().indices.chunk(10):
        assert float((z[part].var(0) - 1).abs().max()) < 5 * math.sqrt(2 / len(part))  # five standard errors


def test_the_margin_hardly_biases_the_end_of_the_bridge():
    a, b, sigma = 1.0, 2.0, 0.6
    path = BrownianBridge(sigma)
    s1 = sigma**2 * LENGTH
    c = (-s1 + math.sqrt(s1**2 + 4 * a**2 * b**2)) / 2  # the Schroedinger bridge between N(0, a^2) and N(0, b^2)
    ends_covariance = torch.tensor([[a * a, c], [c, b * b]], dtype=torch.float64)
    unit = torch.eye(2, dtype=torch.float64)

    def rate(s: float) -> float:  # of the marginal field v(t, x) = rate x: the regression of velocity on x
        at = path.moments(Pairs(*unit, T0, T1), torch.tensor([s], dtype=torch.float64))
        variance = at.mean @ ends_covariance @ at.mean + at.std**2
        return float((at.mean_rate @ ends_covariance @ at.mean + at.std * at.std_rate) / variance)

    def frozen(s: float) -> float:  # what is learnt: nothing within the margin
        return rate(min(max(s, path.margin), 1 - path.margin))

    margins = [path.margin, 1 - path.margin]
    exact, _ = quad(rate, 1e-12, 1 - 1e-12, points=margins, epsabs=1e-10)
    learnt, _ = quad(frozen, 0, 1, points=margins, epsabs=1e-10)
    assert a**2 * math.exp(2 * LENGTH * exact) == pytest.approx(b**2, rel=1e-8)  # the field does take a to b
    # the field is smooth, so freezing it costs margin^2 times its slope: 1e-6 times about ten
    assert a**2 * math.exp(2 * LENGTH * learnt) == pytest.approx(b**2, rel=2e-5)


def test_any_run_of_times_is_spread_evenly():
    s = ((draw(Straight(0.1), 20_000).t - T0) / LENGTH).squeeze(1).numpy()
    independent = np.random.default_rng(0).random(20_000)
    n = 64

    def discrepancy(u: np.ndarray) -> np.ndarray:  # Kolmogorov's distance from uniform, of every run
        runs = np.sort(np.lib.stride_tricks.sliding_window_view(u, n)[::37], axis=1)
        return np.maximum(np.arange(1, n + 1) / n - runs, runs - np.arange(n) / n).max(1)

    # golden-ratio steps: of the order of log(n)/n, below 0.05 for 64; independent ones: 0.83/sqrt(n) = 0.1
    assert discrepancy(s).max() < 0.05 < np.median(discrepancy(independent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_are_uniform_over_seeds(dtype):
    x = torch.zeros(12, 1, dtype=dtype)
    draws = [Straight(0.1).sample(Pairs(x, x, T0, T1), torch.Generator().manual_seed(seed)).t for seed in range(2000)]
    s = ((torch.stack(draws).squeeze(-1) - T0) / LENGTH).double().numpy()  # (seeds, 12)
    for position in (0, 1, 11):
        assert kstest(s[:, position], "uniform").pvalue > 1e-3  # fixed seeds: passes or fails for good


def test_times_lie_strictly_inside_in_single_precision():
    x = torch.zeros(2**20, 1)
    t = BrownianBridge(0.5).sample(Pairs(x, x, 0.0, 1.0), torch.Generator().manual_seed(0)).t
    assert 0 < float(t.min()) < float(t.max()) < 1  # else the bridge's velocity is infinite


@pytest.mark.parametrize("sigma", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("path", [Straight, Hermite, BrownianBridge, Trigonometric])
def test_sigma_must_be_finite_and_not_negative(path, sigma):
    with pytest.raises(ValueError, match="sigma"):
        path(sigma)


def test_hours_for_days():
    x0, x1 = ends(500)
    hours = 24.0
    days = BrownianBridge(0.6).sample(Pairs(x0, x1, T0, T1), torch.Generator().manual_seed(0))
    pairs = Pairs(x0, x1, hours * T0, hours * T1)
    slow = BrownianBridge(0.6 * hours**-0.5).sample(pairs, torch.Generator().manual_seed(0))
    for name, factor in (("t", hours), ("x", 1.0), ("velocity", 1 / hours), ("score", 1.0), ("std", 1.0)):
        torch.testing.assert_close(getattr(slow, name), factor * getattr(days, name), rtol=1e-9, atol=1e-12)  # rounding


def test_times_of_each_pair_its_own_interval():
    x0, x1 = ends(400)
    t0 = torch.tensor([0.0, 10.0], dtype=torch.float64).repeat(200)[:, None]
    length = torch.tensor([1.0, 5.0], dtype=torch.float64).repeat(200)[:, None]
    sample = BrownianBridge(0.6).sample(Pairs(x0, x1, t0, t0 + length), torch.Generator().manual_seed(0))
    s = (sample.t - t0) / length
    assert float(s.min()) > 0
    assert float(s.max()) < 1
    # a Brownian motion's variance at the middle of an interval is a quarter of sigma^2 times its length
    torch.testing.assert_close(sample.std.square() / (s * (1 - s)), 0.36 * length, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", [Straight(0.3), Hermite(0.3), BrownianBridge(0.4)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("bridged", [False, True])
def test_spreads_widen_the_law_and_its_velocities_follow(path, bridged):
    """A point of the law keeps its quantile: it moves as the mean does, and out and in as the width does."""
    x0, x1 = ends()
    pairs = Pairs(x0, x1, T0, T1, V0, V1, spread=torch.full((N, 1), 0.7).double(), bridged=bridged)
    sample = path.sample(pairs, torch.Generator().manual_seed(0))
    s, length = (sample.t - T0) / (T1 - T0), T1 - T0
    noise = -sample.score * sample.std

    def point(s: torch.Tensor) -> torch.Tensor:
        at = path.moments(pairs, s)
        shape = 4 * s * (1 - s) if bridged else 1.0
        return at.mean + (at.std.square() + 0.49 * shape).sqrt() * noise

    torch.testing.assert_close(sample.x, point(s), rtol=1e-6, atol=1e-6)
    near = (s > 0.01) & (s < 0.99)  # a bridge's own width changes without bound at its ends
    step = 1e-6
    rate = (point(s + step) - point(s - step)) / (2 * step * length)
    torch.testing.assert_close(sample.velocity * near, rate * near, rtol=1e-5, atol=1e-5)


def test_a_spread_beside_nothing_moves_nothing():
    x0, _ = ends(10)
    for bridged in (False, True):
        pairs = Pairs(x0, x0, T0, T1, spread=torch.zeros(10, 1).double(), bridged=bridged)
        sample = Straight(0.0).sample(pairs, torch.Generator().manual_seed(0))
        assert torch.equal(sample.x, x0)
        assert torch.equal(sample.velocity, torch.zeros_like(x0))


@pytest.mark.parametrize("path", [Straight(0.3), Hermite(0.3)], ids=lambda path: type(path).__name__)
def test_spreads_add_to_sigma_as_independent_noise_and_leave_velocities(path):
    x0, x1 = ends()
    pairs = Pairs(x0, x1, T0, T1, V0, V1)
    spread = torch.where(torch.arange(N) < N // 2, 0.4, 1.6)[:, None].double()
    plain, wide = (path.sample(p, torch.Generator().manual_seed(0)) for p in (pairs, replace(pairs, spread=spread)))
    for name in ("t", "velocity"):
        assert torch.equal(getattr(wide, name), getattr(plain, name))
    mean = plain.x + plain.score * plain.std.square()
    for part, expected in ((slice(None, N // 2), 0.5), (slice(N // 2, None), math.hypot(0.3, 1.6))):
        torch.testing.assert_close(wide.std[part], torch.full_like(wide.std[part], expected))
        assert float((wide.x - mean)[part].square().mean().sqrt()) == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(wide.score, (mean - wide.x) / wide.std.square(), rtol=1e-6, atol=1e-9)
