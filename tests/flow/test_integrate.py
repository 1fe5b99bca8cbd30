"""Laws of the integrators: the exact flow of linear fields, orders of convergence, marginals of the SDE."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from sctraj.flow import integrate
from sctraj.flow.integrate import Integration, push, simulate, transport
from sctraj.flow.vector_field import FieldSample, Leg

SPIRAL = torch.tensor([[[-0.3, -1.0], [1.0, -0.1]], [[0.2, 0.5], [-0.4, 0.1]]], dtype=torch.float64)


class Linear:
    """``v(t, x) = t A x``, one ``A`` ``(d, d)`` per member: the flow is ``expm(A (t1^2 - t0^2) / 2)``."""

    has_score = False

    def __init__(self, matrices: Tensor) -> None:
        self.matrices, self.scale = matrices, torch.ones(len(matrices), 1, 1, dtype=torch.float64)

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        return FieldSample(t * x @ self.matrices.mT, None)

    def legs(self, t0, t1):
        return [Leg(self, t0, t1)]

    def truth(self, x: Tensor, t0: Tensor | float, t1: Tensor | float) -> Tensor:
        area = torch.as_tensor(t1**2 - t0**2, dtype=torch.float64).reshape(-1, 1, 1) / 2
        return x @ torch.linalg.matrix_exp(self.matrices * area).mT


class Gaussian:
    """The marginal flow of N(0, 0.5 + t^2) in every coordinate, with its score."""

    has_score = True
    scale = torch.ones(1, 1, 1, dtype=torch.float64)

    def legs(self, t0, t1):
        return [Leg(self, t0, t1)]

    @staticmethod
    def variance(t: Tensor | float) -> Tensor | float:
        return 0.5 + t**2

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        # continuity equation of N(0, var): v = var' / (2 var) x
        return FieldSample(t / self.variance(t) * x, -x / self.variance(t))


def cells(n=50, members=2, seed=0) -> Tensor:
    return torch.randn(members, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(solver, n_steps, t0=0.3, t1=1.7) -> float:
    field, x = Linear(SPIRAL), cells()
    y = push(field, x, t0, t1, Integration(solver, n_steps, 1e-6))
    return float((y - field.truth(x, t0, t1)).norm())


@pytest.mark.parametrize(("solver", "n_steps", "order"), [("euler", 400, 1), ("rk4", 20, 4)])
def test_order_of_convergence(solver, n_steps, order):
    coarse, fine, finest = (error(solver, n_steps * k) for k in (1, 2, 4))
    # halving the step: 2^order, but for the next term of the error, itself halved each time
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert math.log2(fine / finest) == pytest.approx(order, abs=0.08)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize(("t0", "t1"), [(0.3, 1.7), (1.7, 0.3)])
def test_dopri5_meets_its_tolerance(tolerance, t0, t1):
    field, x = Linear(SPIRAL), cells()
    y = push(field, x, t0, t1, Integration("dopri5", 1, tolerance))
    # the tolerance is that of a step; some tens of steps add up
    assert float((y - field.truth(x, t0, t1)).abs().max()) < 30 * tolerance


def test_there_and_back():
    field, x = Linear(SPIRAL), cells()
    there = push(field, x, 0.3, 1.7, Integration("rk4", 200, 1e-6))
    back = push(field, there, 1.7, 0.3, Integration("rk4", 200, 1e-6))
    assert float((there - x).abs().max()) > 0.5
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)  # (1.4/200)^4 = 2e-9 a way


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_each_member_has_its_own_times_and_direction(solver):
    field, x = Linear(SPIRAL), cells()
    t0, t1 = torch.tensor([0.3, 2.0]), torch.tensor([1.1, -0.5])
    y = push(field, x, t0, t1, Integration(solver, 200, 1e-8))
    # rk4: (2.5/200)^4 = 2e-8; dopri5 as above; the times are single precision
    torch.testing.assert_close(y, field.truth(x, t0.double(), t1.double()), rtol=0, atol=1e-6)


def test_no_time_no_motion():
    x = cells()
    for solver in ("euler", "rk4"):
        assert torch.equal(push(Linear(SPIRAL), x, 1.0, 1.0, Integration(solver, 3, 1e-6)), x)
    assert torch.equal(simulate(Gaussian(), x, 1.0, 1.0, sigma=0.5, n_steps=3, rng=torch.Generator().manual_seed(0)), x)


@pytest.mark.parametrize(("solver", "atol"), [("euler", 1e-13), ("rk4", 1e-13), ("dopri5", 1e-5)])
@pytest.mark.parametrize("met", [2, 14])
def test_how_many_cells_are_met_at_once_does_not_matter(monkeypatch, solver, atol, met):
    field, x = Linear(SPIRAL), cells()
    whole = push(field, x, 0.3, 1.7, Integration(solver, 20, 1e-6))
    monkeypatch.setattr(integrate, "CELLS", met)
    chunked = push(field, x, 0.3, 1.7, Integration(solver, 20, 1e-6))
    # fixed grids to rounding; dopri5's shared steps to ten times its tolerance
    torch.testing.assert_close(chunked, whole, rtol=0, atol=atol)


@pytest.mark.parametrize(("solver", "atol"), [("euler", 1e-13), ("rk4", 1e-13), ("dopri5", 1e-5)])
def test_a_cell_does_not_depend_on_its_companions(solver, atol):
    field, x = Linear(SPIRAL), cells()
    company = torch.cat([x, 100 * cells(seed=1)], 1)
    alone, among = (push(field, y, 0.3, 1.7, Integration(solver, 20, 1e-6)) for y in (x, company))
    torch.testing.assert_close(among[:, :50], alone, rtol=0, atol=atol)  # as above


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_steps_are_those_of_torchdiffeq_bit_for_bit(solver, dtype):
    def rate(s, y):
        return torch.sin(3 * s) * y.flip(-1) - 0.1 * y.square()

    def grid(rate, y, ends):
        return torch.linspace(0, 1, 14, dtype=dtype)

    y = torch.randn(2, 7, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    theirs = odeint(rate, y, ends, method=solver, options={"grid_constructor": grid})[-1]
    assert torch.equal(integrate._in_steps(rate, y, solver, 13), theirs)


@pytest.mark.parametrize("n_steps", [0, -1, math.inf, math.nan])
def test_a_grid_needs_a_step(n_steps):
    with pytest.raises(ValueError, match="at least one step"):
        push(Linear(SPIRAL), cells(), 0.0, 1.0, Integration("rk4", n_steps, 1e-6))


class Growing(Linear):
    """`Linear` with the growth rate ``constant + slope t + pull x_0`` of each member."""

    def __init__(self, matrices: Tensor, constant=(0.0, 0.0), slope=(0.0, 0.0), pull=0.0) -> None:
        super().__init__(matrices)
        self.constant, self.slope = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (constant, slope))
        self.pull = pull

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        rate = self.constant + self.slope * t + self.pull * x[..., :1]
        return FieldSample(super().evaluate(t, x).velocity, None, rate)


SPANS = [(0.3, 1.7), (1.7, 0.3), (torch.tensor([0.3, 2.0]).double(), torch.tensor([1.1, -0.5]).double())]


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize(("t0", "t1"), SPANS)
def test_a_constant_growth_rate_is_integrated_exactly(solver, t0, t1):
    field = Growing(SPIRAL, constant=(0.7, -1.3))
    moved = transport(field, cells(), t0, t1, Integration(solver, 7, 1e-6))
    truth = torch.tensor([[0.7], [-1.3]], dtype=torch.float64) * torch.as_tensor(t1 - t0, dtype=torch.float64).reshape(
        -1, 1
    )
    torch.testing.assert_close(moved.log_mass, truth.expand(2, 50), rtol=0, atol=1e-12)  # any solver's: rounding


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize(("t0", "t1"), SPANS)
def test_a_growth_rate_linear_in_time_is_integrated_exactly(solver, t0, t1):
    field = Growing(SPIRAL, constant=(0.7, -1.3), slope=(2.0, 0.5))
    moved = transport(field, cells(), t0, t1, Integration(solver, 7, 1e-6))
    first, last = (torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1) for t in (t0, t1))
    constant, slope = (torch.tensor(v, dtype=torch.float64).reshape(2, 1) for v in ((0.7, -1.3), (2.0, 0.5)))
    area = constant * (last - first) + slope * (last**2 - first**2) / 2
    torch.testing.assert_close(moved.log_mass, area.expand(2, 50), rtol=0, atol=1e-12)  # of second order: rounding


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_dopri5_meets_its_tolerance_of_masses_in_any_unit_of_the_cells(unit):
    field = Growing(SPIRAL, constant=(0.7, -1.3), slope=(2.0, 0.5))
    field.scale = unit * field.scale
    moved = transport(field, unit * cells(), 0.3, 1.7, Integration("dopri5", 1, 1e-6))
    true = torch.tensor([0.7, -1.3]) * 1.4 + torch.tensor([2.0, 0.5]) * (1.7**2 - 0.3**2) / 2
    torch.testing.assert_close(moved.log_mass, true.double()[:, None].expand(2, 50), rtol=0, atol=1e-5)


class Swinging(Linear):
    """The velocity ``speed cos(20 t)`` in every coordinate and the growth rate ``rate cos(20 t)``, everywhere."""

    def __init__(self, speed: float, rate: float, scale: float) -> None:
        super().__init__(torch.zeros(1, 2, 2, dtype=torch.float64))
        self.speed, self.rate, self.scale = speed, rate, torch.full((1, 1, 1), scale, dtype=torch.float64)

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        swing = torch.cos(20 * torch.as_tensor(t, dtype=x.dtype)) * torch.ones_like(x)
        return FieldSample(self.speed * swing, None, self.rate * swing[..., :1])


@pytest.mark.parametrize(("speed", "rate", "scale"), [(1e-6, 0, 1e-6), (1, 0, 1), (1e6, 0, 1e6), (0, 20, 1)])
def test_dopri5_heeds_cells_in_any_unit_of_theirs_and_masses_where_cells_stay(speed, rate, scale):
    moved = transport(Swinging(speed, rate, scale), scale * cells(members=1), 0, 1, Integration("dopri5", 1, 1e-4))
    way = moved.points - scale * cells(members=1)
    truth = math.sin(20) / 20
    # a step's tolerance, of which some tens add up
    torch.testing.assert_close(way, torch.full_like(way, speed * truth), rtol=0, atol=1e-3 * scale)
    torch.testing.assert_close(moved.log_mass, torch.full_like(moved.log_mass, rate * truth), rtol=0, atol=1e-2)


def test_growth_is_integrated_along_the_cells_way():
    # with v = t x A the integral of t x_0 is known from that of dx/dt: x(t1) - x(t0) = A int t x dt
    class Along(Growing):
        def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
            return FieldSample(Linear.evaluate(self, t, x).velocity, None, t * x[..., :1])

    field, x = Along(SPIRAL), cells()
    moved = transport(field, x, 0.3, 1.7, Integration("rk4", 100, 1e-6))
    truth = (torch.linalg.inv(SPIRAL) @ (field.truth(x, 0.3, 1.7) - x).mT)[:, 0]
    torch.testing.assert_close(moved.log_mass, truth, rtol=0, atol=1e-7)  # (1.4 / 100)^4 = 4e-8
    torch.testing.assert_close(moved.points, field.truth(x, 0.3, 1.7), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("solver", "atol"), [("rk4", 1e-7), ("dopri5", 1e-5)])
def test_forwards_and_backwards_give_the_mass_back(solver, atol):
    field, x = Growing(SPIRAL, constant=(0.3, 0.3), slope=(-1.0, 2.0), pull=1.5), cells()
    there = transport(field, x, 0.3, 1.7, Integration(solver, 100, 1e-7))
    back = transport(field, there.points, 1.7, 0.3, Integration(solver, 100, 1e-7))
    assert float(there.log_mass.std()) > 0.5
    # (1.4 / 100)^4 a way; a hundred times the tolerance
    torch.testing.assert_close(back.log_mass, -there.log_mass, rtol=0, atol=atol)


def test_mass_does_not_move_cells_and_is_nothing_where_nothing_grows():
    x = cells()
    plain = transport(Linear(SPIRAL), x, 0.3, 1.7, Integration("rk4", 20, 1e-6))
    assert plain.log_mass.shape == (2, 50)
    assert not plain.log_mass.any()
    grown = transport(Growing(SPIRAL, pull=3.0), x, 0.3, 1.7, Integration("rk4", 20, 1e-6))
    torch.testing.assert_close(grown.points, plain.points, rtol=0, atol=1e-13)  # rounding
    assert torch.equal(plain.points, push(Linear(SPIRAL), x, 0.3, 1.7, Integration("rk4", 20, 1e-6)))


@pytest.mark.parametrize("met", [2, 14])
def test_tiling_does_not_change_masses(monkeypatch, met):
    field, x = Growing(SPIRAL, pull=3.0), cells()
    whole = transport(field, x, 0.3, 1.7, Integration("rk4", 20, 1e-6))
    monkeypatch.setattr(integrate, "CELLS", met)
    tiled = transport(field, x, 0.3, 1.7, Integration("rk4", 20, 1e-6))
    torch.testing.assert_close(tiled.log_mass, whole.log_mass, rtol=0, atol=1e-13)  # rounding


@pytest.mark.parametrize("sigma", [0.3, 1.2])
@pytest.mark.parametrize(("t0", "t1"), [(0.2, 2.0), (2.0, 0.2)])
def test_the_sde_keeps_the_marginals_in_both_directions(t0, t1, sigma):
    field, n = Gaussian(), 20_000
    x = math.sqrt(field.variance(t0)) * cells(n, members=1)
    y = simulate(field, x, t0, t1, sigma=sigma, n_steps=200, rng=torch.Generator().manual_seed(7))
    ratio = float(y.square().mean()) / field.variance(t1)
    # four standard errors of 2n squares, 2%, and Euler's own error, of the order of the step: 1.8/200
    assert ratio == pytest.approx(1, abs=4 / math.sqrt(n) + 0.01)
    # noise makes the ends forget: deterministic transport would keep the correlation at one
    correlation = float((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt())
    assert correlation < 0.99


class OrnsteinUhlenbeck:
    """A velocity and a score whose forward drift, velocity + sigma^2/2 score, is ``-theta x``."""

    def __init__(self, theta: float, sigma: float) -> None:
        self.theta, self.sigma = theta, sigma
        self.scale, self.has_score = torch.ones(1, 1, 1, dtype=torch.float64), True

    def legs(self, t0, t1):
        return [Leg(self, t0, t1)]

    def evaluate(self, t, x):
        score = -x / 0.7  # of any Gaussian: the drift is what counts
        return FieldSample(-self.theta * x - self.sigma**2 / 2 * score, score)


def test_the_sde_has_the_variance_of_an_ornstein_uhlenbeck_process():
    theta, sigma, n = 1.5, 0.8, 40_000
    for start, time in ((0.0, 0.4), (0.0, 3.0), (2.0, 0.4)):
        x = torch.full((1, n, 1), start, dtype=torch.float64)
        rng = torch.Generator().manual_seed(3)
        field = OrnsteinUhlenbeck(theta, sigma)
        y = simulate(field, x, 0.0, time, sigma=sigma, n_steps=int(400 * time), rng=rng)
        variance = sigma**2 / (2 * theta) * -math.expm1(-2 * theta * time)
        # four standard errors, and Euler's own error, theta times the step
        assert float(y.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n) + theta / 400)
        mean = start * math.exp(-theta * time)
        assert float(y.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n) + start * theta / 400)


def test_each_member_has_its_own_sigma():
    field, n = Gaussian(), 5000
    x = cells(n, members=1).expand(2, n, 2) * math.sqrt(field.variance(0.2))
    rng = torch.Generator().manual_seed(0)
    y = simulate(field, x, 0.2, 2.0, sigma=torch.tensor([0.1, 1.0]), n_steps=100, rng=rng)
    calm, wild = ((y[k] - math.sqrt(field.variance(2.0) / field.variance(0.2)) * x[k]).square().mean() for k in (0, 1))
    assert float(wild) > 10 * float(calm)  # noise of variance sigma^2 a unit of time: about a hundred


def test_tiny_sigma_is_the_ode():
    x = cells()
    still = push(Gaussian(), x, 0.2, 2.0, Integration("euler", 50, 1e-6))
    noisy = simulate(Gaussian(), x, 0.2, 2.0, sigma=1e-8, n_steps=50, rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy, still, rtol=0, atol=2e-7)  # sigma times a few standard deviations, amplified


@pytest.mark.parametrize("met", [2, 14])
def test_tiling_does_not_change_a_simulation(monkeypatch, met):
    def run() -> Tensor:
        return simulate(Gaussian(), cells(), 0.2, 2.0, sigma=0.5, n_steps=20, rng=torch.Generator().manual_seed(3))

    whole = run()
    monkeypatch.setattr(integrate, "CELLS", met)
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-13)  # the same noise: rounding


def test_simulation_needs_a_score():
    with pytest.raises(ValueError, match="score"):
        simulate(Linear(SPIRAL), cells(), 0.0, 1.0, sigma=0.1, n_steps=5, rng=torch.Generator())
