"""Sinkhorn's algorithm, for hard marginals (entropic transport) and soft ones (unbalanced transport) alike.

It alternates between the potentials of both sides. Annealing of epsilon, starts from a sample of the cells,
extrapolation and Newton steps save iterations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..snapshots import Interval
from .kernel import Kernel

logger = logging.getLogger(__name__)

ANNEALING = 10  # iterations at each larger epsilon
BLUNT = 100.0  # soft marginals need no annealing if the cost's scale is at most so many epsilons
SOFT = 10.0  # and their penalty at most so many times the cost's scale
SAMPLE = 1500  # at most so many cells a side are solved first if there are more than twice as many
NEAR = 1e-2  # error at which the sample is solved: its potentials are off by the sample's noise anyway
MEMORY = 3  # previous iterations from which the next is extrapolated
FARTHEST = 30.0  # in epsilons: a potential is extrapolated by at most this
ROUNDING = 0.05  # float32 will do for a relative error of a plan's entry of this times the current error or tolerance
TOO_SLOW = 0.1  # if more than this part of the error is left after `newton_every` iterations, Newton steps are taken
CONJUGATE_GRADIENTS = 50  # at most so many iterations within a Newton step
SHARPEST = 1e-6  # an epsilon below this fraction of the mean cost is refused: rounding would dominate


@dataclass(frozen=True)
class Ends:
    """Centred cells ``(n0, d)`` and ``(n1, d)``, their log weights, float64, and the cost's scale (about its mean)."""

    x0: Tensor
    x1: Tensor
    log_a: Tensor
    log_b: Tensor
    scale: float


def prepare(interval: Interval, device: torch.device | None) -> Ends:
    """Return an interval's ends in the form that the solver takes, on the device."""
    device = device or interval.x0.device
    if device.type == "mps":
        logger.info("mps has no float64, so Sinkhorn runs on the CPU")
        device = torch.device("cpu")
    x0, x1 = (x.to(device, torch.float64) for x in (interval.x0, interval.x1))
    log_a, log_b = (m.to(device).log() for m in (interval.mass0, interval.mass1))  # -inf where a cell has no mass
    centre = x0.mean(0)
    x0, x1 = x0 - centre, x1 - centre  # so that squares do not cancel far from the origin
    scale = float((log_a.exp() @ x0.square().sum(1)) + (log_b.exp() @ x1.square().sum(1)))
    return Ends(x0, x1, log_a, log_b, scale)


@dataclass(frozen=True)
class Potentials:
    """What the solver found.

    Attributes
    ----------
    f, g
        Potentials ``(n0,)`` and ``(n1,)``; ``f`` is optimal for ``g``.
    best
        ``(n1,)``: soft minimum of ``C - f`` for every column; at the optimum for hard marginals it equals ``g``.
    error
        L1 distance of the column marginal from the optimal one, ``b exp(-g / penalty)``, relative to the latter's mass.
    n_iterations
        Iterations at the last epsilon.
    """

    f: Tensor
    g: Tensor
    best: Tensor
    error: float
    n_iterations: int


def sinkhorn(
    ends: Ends, *, epsilon: float, penalty: float, tolerance: float, max_iterations: int, newton_every: int
) -> Potentials:
    """Find the potentials of the entropic plan, whose marginals hold with the strength ``penalty`` (infinity: exactly).

    Epsilon is lowered in steps from the cost's own scale, except for soft marginals and an epsilon not far below it.
    For large snapshots a sample of the cells is solved first, and its potentials are the start for all cells. The
    iterations at the last epsilon are extrapolated; if that does not help, they start again as plain ones with Newton
    steps. The caller checks whether ``error`` is below ``tolerance``.
    """
    how = _Settings(epsilon, penalty, tolerance, max_iterations, newton_every)
    held = [log_m > -math.inf for log_m in (ends.log_a, ends.log_b)]
    if all(bool(cells.all()) for cells in held):
        return _solve(ends, how)
    few = replace(ends, x0=ends.x0[held[0]], x1=ends.x1[held[1]], log_a=ends.log_a[held[0]], log_b=ends.log_b[held[1]])
    return _extended(_solve(few, how), few, ends, held, epsilon, penalty)


@dataclass(frozen=True)
class _Settings:
    """What `sinkhorn` is asked for."""

    epsilon: float
    penalty: float
    tolerance: float
    max_iterations: int
    newton_every: int


def _solve(ends: Ends, how: _Settings) -> Potentials:
    """Find the potentials of cells that all have mass: from a sample of many cells, else by annealing."""
    if max(len(ends.log_a), len(ends.log_b)) > 2 * SAMPLE:
        some = _sample(ends)
        near = _solve(some, replace(how, tolerance=max(how.tolerance, NEAR)))
        across = Kernel(some.x0, ends.x1, some.log_a, ends.log_b, keep=False)
        best = across.soft_minimum(near.f, how.epsilon, rows=False)
        g, larger = _softness(how.penalty, how.epsilon) * best, []
    else:
        # soft marginals keep potentials small, so they are found from zero unless epsilon is small
        blunt = how.penalty <= SOFT * ends.scale <= SOFT * BLUNT * how.epsilon
        g, larger = torch.zeros_like(ends.log_b), [] if blunt else annealing(ends.scale, how.epsilon)[:-1]
    kernel = Kernel(ends.x0, ends.x1, ends.log_a, ends.log_b)
    for epsilon in larger:
        g = _iterate(kernel, g, replace(how, epsilon=epsilon, max_iterations=ANNEALING), extrapolate=False).g
    return _iterate(kernel, g, how, extrapolate=True)


def _iterate(kernel: Kernel, g: Tensor, how: _Settings, *, extrapolate: bool) -> Potentials:
    """Iterate at one epsilon from the potentials ``g``, extrapolating or else with Newton steps.

    While extrapolating, an iteration whose error has risen is undone, and extrapolation begins anew from the plain
    iteration. If too much of the error is left when a Newton step would be due, all begins again without extrapolation,
    with Newton steps.
    """
    (log_a, log_b), epsilon, penalty = kernel.log_mass, how.epsilon, how.penalty
    softness, start, plain = _softness(penalty, epsilon), g, g
    mix = Mixing(log_b.exp(), FARTHEST * epsilon) if extrapolate else None
    error = math.inf
    for iteration in range(1, how.max_iterations + 1):
        # Chizat et al. 2018, scaling algorithms: the rows' marginal is now a exp(-f / penalty)
        kernel.rounding = ROUNDING * max(how.tolerance, min(error, NEAR))
        f, best = kernel.soft_minima(g, epsilon, softness)  # the columns' is b exp((g - best) / epsilon)
        weight = torch.softmax(log_b - g / penalty, 0)
        last, error = error, float(weight @ torch.expm1((g - best) / epsilon + g / penalty).abs())
        if error < how.tolerance:
            break
        if iteration == 1:
            mark = error  # later the error whenever a Newton step is due
        if iteration % how.newton_every == 0:
            if mix is None:
                g = _newton(kernel, f, g, epsilon, penalty)
                continue
            if error > TOO_SLOW * mark:  # extrapolation did not help
                g, mix = start, None
                continue
            mark = error
        if mix is not None and not error <= last:  # extrapolated too far
            g, mix = plain, Mixing(log_b.exp(), FARTHEST * epsilon)
            continue
        plain = softness * best
        if penalty < math.inf:
            # the best of all (f + shift, g - shift), which have the same plan (Sejourne et al. 2022)
            log_masses = [torch.logsumexp(log_m - h / penalty, 0) for log_m, h in ((log_a, f), (log_b, plain))]
            plain = plain - penalty / 2 * (log_masses[0] - log_masses[1])
        g = plain if mix is None else mix(g, plain)
    return Potentials(f, g, best, error, iteration)


class Mixing:
    """Extrapolate a fixed-point iteration from its last steps (Anderson 1965; Walker & Ni 2011, type II).

    Sinkhorn's error falls by a constant factor per iteration, in a direction that a few steps show.

    Parameters
    ----------
    weight
        Weights of the coordinates, ``(n,)``, in the norm of a step.
    farthest
        If extrapolation would move any coordinate by more than this, there is none.
    """

    def __init__(self, weight: Tensor, farthest: float) -> None:
        self.weight, self.farthest = weight, farthest
        self.points: list[Tensor] = []
        self.steps: list[Tensor] = []

    def __call__(self, at: Tensor, then: Tensor) -> Tensor:
        """Return the next point after ``at``, which the plain iteration maps to ``then``; both ``(n,)``."""
        step = then - at
        self.points, self.steps = [*self.points[-MEMORY:], at], [*self.steps[-MEMORY:], step]
        if len(self.steps) == 1:
            return then
        changes = torch.stack([before - step for before in self.steps[:-1]])  # (m, n)
        moves = torch.stack([before - at for before in self.points[:-1]])
        gram = (changes * self.weight) @ changes.T
        gram.diagonal().mul_(1 + 1e-12).add_(1e-300)
        shares = torch.linalg.solve_ex(gram, (changes * self.weight) @ step).result  # without making the host wait
        change = shares @ (moves + changes)
        return then - torch.where(change.abs().amax() <= self.farthest, change, 0)


def _extended(
    found: Potentials, few: Ends, ends: Ends, held: list[Tensor], epsilon: float, penalty: float
) -> Potentials:
    """Return the potentials of all cells from those of cells with mass; the rest get the best for the other side's."""
    softness = _softness(penalty, epsilon)
    rows = Kernel(ends.x0, few.x1, ends.log_a, few.log_b, keep=False)
    columns = Kernel(few.x0, ends.x1, few.log_a, ends.log_b, keep=False)
    f = softness * rows.soft_minimum(found.g, epsilon, rows=True)
    best = columns.soft_minimum(found.f, epsilon, rows=False)
    g = softness * best
    f[held[0]], best[held[1]], g[held[1]] = found.f, found.best, found.g
    return replace(found, f=f, g=g, best=best)


def _sample(ends: Ends) -> Ends:
    """Return at most ``SAMPLE`` of the cells with mass of each side, always the same ones."""
    rng, sides = torch.Generator().manual_seed(0), []
    for x, log_mass in ((ends.x0, ends.log_a), (ends.x1, ends.log_b)):
        cells = torch.nonzero(log_mass > -math.inf).squeeze(1)
        chosen = cells[torch.randperm(len(cells), generator=rng)[:SAMPLE].to(cells.device)]
        sides.append((x[chosen], log_mass[chosen] - torch.logsumexp(log_mass[chosen], 0)))
    (x0, log_a), (x1, log_b) = sides
    return replace(ends, x0=x0, x1=x1, log_a=log_a, log_b=log_b)


def annealing(start: float, end: float) -> list[float]:
    """Return epsilons that fall by factors of four from the cost's scale to the final one."""
    n = max(0, math.ceil(math.log(start / end, 4))) if start > end else 0
    return [end * 4**k for k in range(n, 0, -1)] + [end]


def _softness(penalty: float, epsilon: float) -> float:
    """Return the factor on a soft minimum; one if the marginals are hard."""
    return 1.0 if penalty == math.inf else penalty / (penalty + epsilon)


def _newton(kernel: Kernel, f: Tensor, g: Tensor, epsilon: float, penalty: float) -> Tensor:
    """Take one Newton step on the semi-dual, which is concave; return the new ``g``.

    Up to a constant the semi-dual is
    ``F(g) = -(penalty + epsilon) <a, e^(-f(g) / penalty)> - penalty <b, e^(-g / penalty)>``, or ``<a, f(g)> + <b, g>``
    if marginals are hard. Sinkhorn's iterations alone exchange mass between well separated groups of cells at a rate of
    ``exp(-gap / epsilon)``; if marginals are soft, they approach the groups' masses by a factor of
    ``1 - 2 epsilon / penalty`` per iteration. These few slow modes are what conjugate gradients find first (the
    Sinkhorn-Newton method, Brauer et al. 2017).
    """
    (log_a, log_b), softness = kernel.log_mass, _softness(penalty, epsilon)
    r, target = (log_a - f / penalty).exp(), (log_b - g / penalty).exp()  # marginals; the columns' is the target
    plan = kernel.plan(f, g, epsilon)
    c = plan.columns(torch.ones_like(r))
    gradient = target - c
    diagonal = (c + epsilon / penalty * target).clamp(min=1e-300)
    weight = softness / r.clamp(min=1e-300)

    def hessian(v: Tensor) -> Tensor:  # -epsilon F'', positive semi-definite
        return diagonal * v - plan.there_and_back(v, weight)

    step = epsilon * conjugate_gradients(hessian, gradient, diagonal)
    slope = float(gradient @ step)
    kernel.rounding = 0.0  # rounding in float32 would hide a small step's gain
    for halving in range(12):
        change = step / 2**halving
        f_trial = softness * kernel.soft_minimum(g + change, epsilon, rows=True)
        # the difference of F directly, as its values cancel if the penalty is large
        loss = _loss(r, f - f_trial, penalty, (penalty + epsilon)) + _loss(target, -change, penalty, penalty)
        if -loss >= 0.1 * slope / 2**halving:
            return softness * kernel.soft_minimum(f_trial, epsilon, rows=False)
    return softness * kernel.soft_minimum(f, epsilon, rows=False)


def _loss(marginal: Tensor, fall: Tensor, penalty: float, strength: float) -> float:
    """Return ``strength <marginal, e^(fall / penalty) - 1>``, a side's loss in the semi-dual for a fall ``(n,)``."""
    return float(marginal @ fall) if penalty == math.inf else strength * float(marginal @ torch.expm1(fall / penalty))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Solve ``matrix v = right`` roughly, for a positive semi-definite matrix, preconditioned by its diagonal."""
    v, r = torch.zeros_like(right), right.clone()
    z = r / diagonal
    direction, rz = z.clone(), r @ z
    smallest = 1e-4 * float(rz)
    for _ in range(CONJUGATE_GRADIENTS):
        image = matrix(direction)
        alpha = rz / (direction @ image).clamp(min=1e-300)
        v, r = v + alpha * direction, r - alpha * image
        z = r / diagonal
        rz, last = r @ z, rz
        if float(rz) <= smallest:
            break
        direction = z + rz / last * direction
    return v
