"""Move cells along a field, forwards or backwards in time.

`push` solves the ODE of the velocity, `transport` the same with mass, and `simulate` the SDE of velocity and score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor
from torchdiffeq import odeint

from .vector_field import FieldSample, Leg

Solver = Literal["euler", "rk4", "dopri5"]
CELLS = 2**16  # cells times members handled at once
CELLS_ON_CPU = 2**14  # on a CPU, whose caches hold the network's layers for so many


class Field(Protocol):
    """What can be integrated: velocity, score and growth of M members at real time t and points ``(M, B, d)``."""

    scale: Tensor

    @property
    def has_score(self) -> bool:
        """Whether there is a score."""

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        """Return velocity, score and growth."""

    def bandwidth(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the kernel's standard deviation, ``(M, B, 1)``; zero without a kernel."""

    def legs(self, t0: Tensor, t1: Tensor) -> Sequence[Leg]:
        """Return the ways from ``t0`` to ``t1``, ``(M,)`` each, cut where the field jumps."""


@dataclass(frozen=True)
class Integration:
    """How cells are moved.

    Attributes
    ----------
    solver
        ``"euler"`` or ``"rk4"``, on a fixed grid of ``n_steps`` equal steps: a cell's result does not depend on the
        other cells, up to rounding. ``"dopri5"`` takes adaptive steps that are shared by all cells handled at once, so
        a cell's result depends on the others, within ``tolerance``.
    n_steps
        Steps on the whole way or, if a population crosses several gaps, in each of them. If the way is cut into the
        legs of a closed-form field, they are divided among these, rounded up in each.
    tolerance
        Tolerance of a step of dopri5, relative to the position and to the data's rms deviation; absolute for log
        masses. Errors add up along the way: at 1e-4 cells were off by .2 % of the deviation (rms), single ones by 1 %.
    """

    solver: Solver
    n_steps: int
    tolerance: float = 1e-4


AS_PUBLISHED = Integration("euler", 100)  # in the published protocol (Tong et al. 2023, section 5.2)


@dataclass(frozen=True)
class Moved:
    """The cells after the move, ``(M, n, d)``, and the log of the factor on their mass, ``(M, n)``."""

    points: Tensor
    log_mass: Tensor


def push(field: Field, x: Tensor, t0: Tensor | float, t1: Tensor | float, how: Integration) -> Tensor:
    """Integrate ``dx/dt = v(t, x)`` from ``t0`` to ``t1``: `transport` without the mass; return ``(M, n, d)``."""
    return transport(field, x, t0, t1, how).points


@torch.no_grad()
def transport(field: Field, x: Tensor, t0: Tensor | float, t1: Tensor | float, how: Integration) -> Moved:
    """Integrate ``dx/dt = v(t, x)`` and ``d log(mass)/dt = g(t, x)`` from ``t0`` to ``t1``, which may lie earlier.

    Parameters
    ----------
    x
        Cells of every member, ``(M, n, d)``.
    t0, t1
        Real times: floats, or ``(M,)`` if members differ.
    how
        Solver, steps on the whole way, tolerance.

    Returns
    -------
    Cells at ``t1``, and the log factor on their mass (zero if the field has no growth).
    """
    d = x.shape[-1]
    grows = field.evaluate(_span(t0, t1, x)[0], x[:, :1]).growth is not None
    state = torch.cat([x, torch.zeros_like(x[..., :1])], -1) if grows else x
    for leg, n_steps in _ways(field, t0, t1, len(x), how.n_steps):
        state = _moved_on(leg, state, d, replace(how, n_steps=n_steps))
    return Moved(state[..., :d], state[..., d] if grows else torch.zeros_like(state[..., 0]))


def _moved_on(leg: Leg, state: Tensor, d: int, how: Integration) -> Tensor:
    """Return cells and their log masses ``(M, n, d or d + 1)`` at the end of a leg."""
    start, span = _span(leg.t0, leg.t1, state)
    length = span.to(state.device, non_blocking=True)

    def rate(fraction: Tensor, y: Tensor) -> Tensor:
        at = leg.field.evaluate(start + fraction.cpu() * span, y[..., :d])
        return length * (at.velocity if at.growth is None else torch.cat([at.velocity, at.growth], -1))

    pushed = []
    for cells in _tiles(state):
        if how.solver == "dopri5":
            ends = torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
            atol = how.tolerance * leg.field.scale.min().expand(d)
            atol = torch.cat([atol, atol.new_full((cells.shape[-1] - d,), how.tolerance)])
            pushed.append(odeint(rate, cells, ends, method=how.solver, rtol=how.tolerance, atol=atol)[-1])
        else:
            pushed.append(_in_steps(rate, cells, how.solver, how.n_steps))
    return torch.cat(pushed, 1)


def _ways(
    field: Field, t0: Tensor | float, t1: Tensor | float, members: int, n_steps: int
) -> Iterator[tuple[Leg, int]]:
    """Yield the legs of the members' ways and each leg's number of steps, by the member for which it is largest."""
    first, last = (torch.as_tensor(t, dtype=torch.float64).flatten().cpu().expand(members) for t in (t0, t1))
    legs = field.legs(first, last)
    for leg in legs:
        share = float(((leg.t1 - leg.t0) / (last - first)).nan_to_num().max())
        yield leg, n_steps if len(legs) == 1 else max(1, math.ceil(n_steps * share - 1e-9))


@torch.no_grad()
def simulate(
    field: Field,
    x: Tensor,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    sigma: Tensor | float,
    n_steps: int,
    rng: torch.Generator,
) -> Tensor:
    """Simulate ``dx = drift dt + sigma dW`` from ``t0`` to ``t1``, which may lie earlier, by Euler-Maruyama.

    The drift is ``velocity + sigma^2/2 score`` forwards in time and ``velocity - sigma^2/2 score`` backwards, so that
    both have the marginals of the ODE (Tong et al. 2023b, [SF]2M, eq. 5).

    Parameters
    ----------
    x
        Cells of every member, ``(M, n, d)``.
    t0, t1
        Real times: floats, or ``(M,)`` if members differ; all forwards or all backwards.
    sigma
        Diffusivity: a length per root of time; a float, or ``(M,)``.
    n_steps
        Number of equal steps. At every step the noise is drawn for all cells at once, so the result does not depend on
        how they are split into parts.

    Returns
    -------
    Cells at ``t1``, ``(M, n, d)``.
    """
    if not field.has_score:
        raise ValueError("expected a field with a score, found velocity alone; fit with method='sb-cfm'")
    diffusivity = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1).to(x.device, non_blocking=True)
    for leg, steps in _ways(field, t0, t1, len(x), n_steps):
        start, span = _span(leg.t0, leg.t1, x)
        step = (span / steps).to(x.device, non_blocking=True)
        correction = torch.sign(step) * diffusivity.square() / 2
        for k in range(steps):
            noise = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
            moved = []
            for cells in _tiles(x):
                at = leg.field.evaluate(start + k * (span / steps), cells)
                assert at.score is not None  # field.has_score
                moved.append(cells + step * (at.velocity + correction * at.score))
            x = torch.cat(moved, 1) + diffusivity * step.abs().sqrt() * noise.to(x.device, non_blocking=True)
    return x


def _in_steps(rate: Callable[[Tensor, Tensor], Tensor], y: Tensor, solver: Solver, n_steps: int) -> Tensor:
    """Integrate ``dy/ds = rate(s, y)`` from 0 to 1 in ``n_steps`` equal steps of Euler's method or Kutta's 3/8 rule.

    These are the steps of torchdiffeq, whose own loop makes the host wait for the device at every step, to compare
    times.
    """
    if not n_steps >= 1 or math.isinf(n_steps):
        raise ValueError(f"expected at least one step, found {n_steps}")
    for s0, s1 in pairwise(torch.linspace(0, 1, n_steps + 1, dtype=y.dtype)):
        ds = s1 - s0
        k1 = rate(s0, y)
        if solver == "euler":
            y = y + ds * k1
            continue
        k2 = rate(s0 + ds * (1 / 3), y + ds * k1 * (1 / 3))
        k3 = rate(s0 + ds * (2 / 3), y + ds * (k2 - k1 * (1 / 3)))
        k4 = rate(s1, y + ds * (k1 - k2 + k3))
        y = y + (k1 + 3 * (k2 + k3) + k4) * ds * 0.125
    return y


def _span(t0: Tensor | float, t1: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return start and length of the way, each ``(M or 1, 1, 1)``, on the CPU, as a field may have to inspect times."""
    first, last = (torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1).cpu() for t in (t0, t1))
    return first.to(x.dtype), (last - first).to(x.dtype)


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    """Split cells ``(M, n, d)`` into parts that are handled one at a time."""
    at_once = min(CELLS, CELLS_ON_CPU) if x.device.type == "cpu" else CELLS
    return x.split(max(1, at_once // len(x)), 1)
