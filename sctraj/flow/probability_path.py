"""Probability paths: the law of x_t given the two ends (x0, x1) of an interval.

The velocity of the population is not observed, but that of a path chosen between two paired cells is known; the average
over the pairs is what the field learns. All paths here are Gaussian,
``p_t(x | x0, x1) = N(mean_t, std_t^2)``, so one formula gives every velocity and score target (Tong et al. 2023,
theorem 2.1): with ``x = mean_t + std_t noise`` the velocity is ``mean_t' + std_t' noise`` and the score
``-noise / std_t``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BRIDGE_MARGIN = 1e-3  # fraction of an interval left out at each end, where the bridge's velocity target diverges
_GOLDEN = 2654435769  # 2^32 / golden ratio: in steps of this size modulo 2^32, any run of numbers is evenly spread


@dataclass(frozen=True)
class Pairs:
    """Pairs of cells at the two ends of their intervals; the leading axes are those of the pairs.

    Attributes
    ----------
    x0, x1
        Ends, ``(..., d)``.
    t0, t1
        Real times of the ends, floats or ``(..., 1)``.
    velocity0, velocity1
        Velocities at the ends of curved paths, ``(..., d)``, per unit of real time.
    spread
        Standard deviation in addition to the path's own, ``(..., 1)``, a length; None for none.
    bridged
        Whether that is a Brownian bridge's, zero at both ends and ``spread`` half-way; else it is constant.
    """

    x0: Tensor
    x1: Tensor
    t0: Tensor | float
    t1: Tensor | float
    velocity0: Tensor | None = None
    velocity1: Tensor | None = None
    spread: Tensor | None = None
    bridged: bool = False

    @property
    def length(self) -> Tensor | float:
        """The lengths of the intervals in real time."""
        return self.t1 - self.t0


@dataclass(frozen=True)
class PathSample:
    """Points on a path and the targets there; the leading axes are those of the pairs.

    Attributes
    ----------
    t
        Real time, ``(..., 1)``.
    x
        Points, ``(..., d)``.
    velocity
        Conditional velocity, ``(..., d)``, per unit of real time.
    score
        Conditional score, the gradient of ``log p_t(x | x0, x1)``, ``(..., d)``; None where ``sigma`` is zero.
    std
        Standard deviation of the path at ``t``, ``(..., 1)``.
    """

    t: Tensor
    x: Tensor
    velocity: Tensor
    score: Tensor | None
    std: Tensor


@dataclass(frozen=True)
class Moments:
    """Mean ``(..., d)`` and standard deviation ``(..., 1)`` of a path, and their derivatives in real time."""

    mean: Tensor
    mean_rate: Tensor
    std: Tensor
    std_rate: Tensor


@dataclass(frozen=True)
class ProbabilityPath(ABC):
    """The law of x_t given the ends of an interval; ``sigma`` sets its spread."""

    sigma: float

    margin = 0.0  # fraction of the interval left out at either end

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"expected a finite sigma of at least 0, found {self.sigma}")

    @abstractmethod
    def moments(self, pairs: Pairs, s: Tensor) -> Moments:
        """Return mean, standard deviation and their rates at the fraction ``s`` ``(..., 1)`` of an interval."""

    def sample(self, pairs: Pairs, rng: torch.Generator) -> PathSample:
        """Draw a time and a point for every pair.

        Times are uniform on the interval (except its margins) and stratified: the times of any run of consecutive pairs
        are evenly spread, which lowers the variance of the loss and introduces no bias.

        Parameters
        ----------
        pairs
            Ends ``(..., d)`` and times.
        rng
            Generator on the pairs' device.
        """
        x0 = pairs.x0
        shape = (*x0.shape[:-1], 1)
        s = _stratified(shape, rng, x0)
        s = self.margin + (1 - 2 * self.margin) * s
        noise = torch.randn(x0.shape, generator=rng, device=x0.device, dtype=x0.dtype)
        at = _wider(self.moments(pairs, s), pairs, s)
        std = at.std.expand(shape)
        return PathSample(
            t=pairs.t0 + s * pairs.length,
            x=at.mean + std * noise,
            velocity=at.mean_rate + at.std_rate * noise,
            score=-noise / std if self.sigma > 0 else None,
            std=std,
        )


def _wider(at: Moments, pairs: Pairs, s: Tensor) -> Moments:
    """Return the moments at the fraction ``s`` with the pairs' spread, independent noise in addition to the path's.

    Variances add up; a bridge's is ``4 s (1 - s) spread^2``; ``std' = (std^2)' / (2 std)``.
    """
    if pairs.spread is None:
        return at
    spread, variance_rate = pairs.spread, 2 * at.std * at.std_rate
    if pairs.bridged:
        variance_rate = variance_rate + 4 * spread.square() * (1 - 2 * s) / pairs.length
        spread = 2 * spread * (s * (1 - s)).sqrt()
    std = torch.hypot(at.std, spread)
    return replace(at, std=std, std_rate=variance_rate / (2 * std).clamp_min(torch.finfo(std.dtype).tiny))


class Straight(ProbabilityPath):
    """A straight line with constant spread: ``N((1-s) x0 + s x1, sigma^2)``.

    The path of I-CFM and OT-CFM, which differ in their coupling (Tong et al. 2023, eq. 12 and 13). ``sigma`` is a
    length.
    """

    def moments(self, pairs: Pairs, s: Tensor) -> Moments:
        """Return mean, standard deviation and their rates at the fraction ``s`` of an interval."""
        chord = pairs.x1 - pairs.x0
        mean, rate = pairs.x0 + s * chord, chord / pairs.length
        return Moments(mean, rate, torch.full_like(s, self.sigma), torch.zeros_like(s))


class Hermite(ProbabilityPath):
    """A cubic curve through both ends with given velocities there, and constant spread.

    ``mean = h00 x0 + h10 (t1-t0) v0 + h01 x1 + h11 (t1-t0) v1`` with the cubic Hermite basis. If the paths before and
    after a snapshot are given the same velocity at a cell, they join there without a corner; if no velocities are
    given, the path is straight. ``sigma`` is a length.
    """

    def moments(self, pairs: Pairs, s: Tensor) -> Moments:
        """Return mean, standard deviation and their rates at the fraction ``s`` of an interval."""
        way = pairs.x1 - pairs.x0
        chord = way / pairs.length
        # the velocities at the ends relative to it
        a, b = (torch.zeros_like(chord) if v is None else v - chord for v in (pairs.velocity0, pairs.velocity1))
        # with u = 1 - s: h10 = s u^2, h11 = -s^2 u
        bend = s * (1 - s) ** 2 * a - s**2 * (1 - s) * b
        bend_rate = (1 - s) * (1 - 3 * s) * a + s * (3 * s - 2) * b
        mean, rate = pairs.x0 + s * way + bend * pairs.length, chord + bend_rate
        return Moments(mean, rate, torch.full_like(s, self.sigma), torch.zeros_like(s))


class BrownianBridge(ProbabilityPath):
    """A Brownian bridge over a real interval: ``N((1-s) x0 + s x1, sigma^2 s (1-s) (t1-t0))``.

    The path of SB-CFM, together with the entropic coupling at ``epsilon = 2 sigma^2 (t1-t0)`` (Tong et al. 2023, eq. 20
    and 21, there for a unit interval). ``sigma`` is a diffusivity: a length per square root of time. Given the ends,
    the velocity has the variance ``sigma^2 (1-2s)^2 / (4 s (1-s) (t1-t0))``, whose integral is not finite, so ``s``
    keeps a margin of 1e-3 from the ends.
    """

    margin = BRIDGE_MARGIN

    def moments(self, pairs: Pairs, s: Tensor) -> Moments:
        """Return mean, standard deviation and their rates at the fraction ``s`` of an interval."""
        chord, length = pairs.x1 - pairs.x0, pairs.length
        unit = (s * (1 - s)).sqrt()  # standard deviation of the unit bridge
        root = math.sqrt(length) if isinstance(length, float) else length**0.5
        std_rate = self.sigma * (1 - 2 * s) / (2 * unit * root)  # d/dt of sigma sqrt(s (1-s) length)
        return Moments(pairs.x0 + s * chord, chord / length, self.sigma * unit * root, std_rate)


@dataclass(frozen=True)
class Trigonometric(ProbabilityPath):
    """The variance-preserving path: ``N(c + cos(pi s / 2) (x0 - c) + sin(pi s / 2) (x1 - c), sigma^2)``.

    The path of VP-CFM (Albergo & Vanden-Eijnden 2023; Tong et al. 2023, table 1). If the ends are independent and have
    the same variance, x_t has it all along. The centre ``c`` ``(d,)`` makes the path shift with its data; ``sigma`` is
    a length.
    """

    centre: Tensor | None = None

    def moments(self, pairs: Pairs, s: Tensor) -> Moments:
        """Return mean, standard deviation and their rates at the fraction ``s`` of an interval."""
        x0, x1 = pairs.x0, pairs.x1
        centre = torch.zeros_like(x0[..., :1]) if self.centre is None else self.centre.to(x0)
        angle = math.pi / 2 * s
        y0, y1 = x0 - centre, x1 - centre
        mean = centre + torch.cos(angle) * y0 + torch.sin(angle) * y1
        mean_rate = math.pi / 2 * (torch.cos(angle) * y1 - torch.sin(angle) * y0) / pairs.length
        return Moments(mean, mean_rate, torch.full_like(s, self.sigma), torch.zeros_like(s))


def _stratified(shape: tuple[int, ...], rng: torch.Generator, like: Tensor) -> Tensor:
    """Draw uniform numbers such that every run of consecutive ones is evenly spread (a Kronecker sequence)."""
    start = torch.randint(2**32, (1,), generator=rng, device=like.device)
    n = math.prod(shape)
    sequence = (start + _GOLDEN * torch.arange(n, device=like.device)) % 2**32  # whole numbers: exact on any device
    # the middle of the bin, so that neither 0 nor 1 occurs
    return ((sequence.to(like.dtype) + 0.5) / 2**32).clamp_(max=1 - 1e-7).reshape(shape)
