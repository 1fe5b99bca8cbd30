"""Sinkhorn's algorithm for hard and soft marginals alike: annealing, absorbed potentials, Newton steps."""

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

ANNEALING = 10  # iterations at each epsilon on the way down
BLUNT = 100.0  # epsilons that the cost's scale comes to at most where soft marginals need no way down,
SOFT = 10.0  # and the cost's scales that their penalty comes to at most
SAMPLE = 1500  # cells a side at most that come first, where there are more than twice as many
NEAR = 1e-2  # error at which these have served: their potentials are off by the sample's noise anyway
MEMORY = 3  # last iterations from which the next is extrapolated
FARTHEST = 30.0  # epsilons that a potential is extrapolated by at most
ROUNDING = 0.05  # of the error so far, or the tolerance: relative error of a plan's entry for which float32 will do
SLOW = 0.1  # of the error left after as many iterations as lie between Newton steps: if more is, those are taken
CONJUGATE_GRADIENTS = 50  # iterations at most within a Newton step
SHARPEST = 1e-6  # epsilon below this fraction of the mean cost is refused: rounding would rule


@dataclass(frozen=True)
class Ends:
    """Cells ``(n0, d)`` and ``(n1, d)``, centred, their log weights, float64, and the cost's scale (about its mean)."""

    x0: Tensor
    x1: Tensor
    log_a: Tensor
    log_b: Tensor
    scale: float


def prepare(interval: Interval, device: torch.device | None) -> Ends:
    """Return an interval's ends as the solver takes them, on the device."""
    device = device or interval.x0.device
    if device.type == "mps":
        logger.info("mps has no float64, so Sinkhorn runs on the CPU")
        device = torch.device("cpu")
    x0, x1 = (x.to(device, torch.float64) for x in (interval.x0, interval.x1))
    log_a, log_b = (m.to(device).log() for m in (interval.mass0, interval.mass1))  # -inf where a cell has no mass
    centre = x0.mean(0)
    x0, x1 = x0 - centre, x1 - centre  # squares of small numbers: no cancellation far from the origin
    scale = float((log_a.exp() @ x0.square().sum(1)) + (log_b.exp() @ x1.square().sum(1)))
    return Ends(x0, x1, log_a, log_b, scale)


@dataclass(frozen=True)
class Potentials:
    """What the solver found.

    Attributes
    ----------
    f, g
        Potentials ``(n0,)`` and ``(n1,)``; ``f`` is the best for ``g``.
    best
        ``(n1,)``: soft minimum of ``C - f`` over the columns; ``g`` at the optimum of hard marginals.
    error
        L1 distance of the column marginal from the best, ``b exp(-g / penalty)``, relative to that one's mass.
    n_iterations
        At the last epsilon.
    """

    f: Tensor
    g: Tensor
    best: Tensor
    error: float
    n_iterations: int


def sinkhorn(
    ends: Ends, *, epsilon: float, penalty: float, tolerance: float, max_iterations: int, newton_every: int
) -> Potentials:
    """Find the potentials of the entropic plan, whose marginals hold at the strength ``penalty`` (infinity: are hard).

    Epsilon is lowered by steps from the cost's own scale, but for soft marginals and an epsilon not far below it; of
    large snapshots on a sample of the cells, whose potentials then start all others. Iterations at the last one are
    extrapolated; where that does not serve they begin again, as plain ones and Newton steps. The caller judges whether
    ``error`` is below ``tolerance``.
    """
    held = [log_m > -math.inf for log_m in (ends.log_a, ends.log_b)]
    if not all(bool(cells.all()) for cells in held):
        few = replace(
            ends, x0=ends.x0[held[0]], x1=ends.x1[held[1]], log_a=ends.log_a[held[0]], log_b=ends.log_b[held[1]]
        )
        found = sinkhorn(
            few, epsilon=epsilon, penalty=penalty, tolerance=tolerance, max_iterations=max_iterations,
            newton_every=newton_every,
        )  # fmt: skip
        return _extended(found, few, ends, held, epsilon, penalty)
    log_a, log_b = ends.log_a, ends.log_b
    # soft marginals do not let potentials run far: they are found from nothing, unless epsilon is small
    blunt = penalty <= SOFT * ends.scale <= SOFT * BLUNT * epsilon
    g, epsilons = torch.zeros_like(log_b), [epsilon] if blunt else annealing(ends.scale, epsilon)
    iterations, error = 0, math.inf
    if max(len(log_a), len(log_b)) > 2 * SAMPLE:
        some = _sample(ends)
        near = sinkhorn(
            some, epsilon=epsilon, penalty=penalty, tolerance=max(tolerance, NEAR), max_iterations=max_iterations,
            newton_every=newton_every,
        )  # fmt: skip
        across = Kernel(some.x0, ends.x1, some.log_a, log_b, keep=False)
        g, epsilons = _softness(penalty, epsilon) * across.soft_minimum(near.f, epsilon, rows=False), [epsilon]
    kernel = Kernel(ends.x0, ends.x1, log_a, log_b)
    for eps in epsilons:
        softness, start, plain = _softness(penalty, eps), g, g
        mix = Mixing(log_b.exp(), FARTHEST * eps) if eps == epsilon else None
        error = math.inf
        for iterations in range(1, (max_iterations if eps == epsilon else ANNEALING) + 1):
            # Chizat et al. 2018, scaling algorithms: the rows' marginal is now a exp(-f / penalty)
            kernel.rounding = ROUNDING * max(tolerance, min(error, NEAR))
            f, best = kernel.soft_minima(g, eps, softness)  # the columns' is b exp((g - best) / eps)
            weight = torch.softmax(log_b - g / penalty, 0)
            last, error = error, float(weight @ torch.expm1((g - best) / eps + g / penalty).abs())
            if error < tolerance:
                break
            if iterations == 1:
                mark = error  # and then that of every Newton step's turn
            if iterations % newton_every == 0:
                if mix is None:
                    g = _newton(kernel, f, g, eps, penalty)
                    continue
                if error > SLOW * mark:  # it led nowhere: from the start again, without
                    g, mix = start, None
                    continue
                mark = error
            if mix is not None and not error <= last:  # too far: on from where the plain iteration had come to
                g, mix = plain, Mixing(log_b.exp(), FARTHEST * eps)
                continue
            then = softness * best
            if penalty < math.inf:
                # the best of all (f + shift, g - shift), which share one plan (Sejourne et al. 2022)
                log_masses = [torch.logsumexp(log_m - h / penalty, 0) for log_m, h in ((log_a, f), (log_b, then))]
                then = then - penalty / 2 * (log_masses[0] - log_masses[1])
            plain = then
            g = then if mix is None else mix(g, then)
    return Potentials(f, g, best, error, iterations)


class Mixing:
    """Extrapolate a fixed-point iteration from its last steps (Anderson 1965; Walker & Ni 2011, type II).

    Sinkhorn's error falls by a constant factor an iteration, whose direction a few steps tell.

    Parameters
    ----------
    weight
        Of the coordinates ``(n,)`` in the norm of a step.
    farthest
        Extrapolation by more than this, in any coordinate, is none.
    """

    def __init__(self, weight: Tensor, farthest: float) -> None:
        self.weight, self.farthest = weight, farthest
        self.points: list[Tensor] = []
        self.steps: list[Tensor] = []

    def __call__(self, at: Tensor, then: Tensor) -> Tensor:
        """Return where to go on from ``at``, for which the iteration has ``then``; both ``(n,)``."""
        step = then - at
        self.points, self.steps = [*self.points[-MEMORY:], at], [*self.steps[-MEMORY:], step]
        if len(self.steps) == 1:
            return then
        changes = torch.stack([before - step for before in self.steps[:-1]])  # (m, n)
        moves = torch.stack([before - at for before in self.points[:-1]])
        gram = (changes * self.weight) @ changes.T
        gram.diagonal().mul_(1 + 1e-12).add_(1e-300)
        shares = torch.linalg.solve_ex(gram, (changes * self.weight) @ step).result  # which has no device wait
        change = shares @ (moves + changes)
        return then - torch.where(change.abs().amax() <= self.farthest, change, 0)


def _extended(
    found: Potentials, few: Ends, ends: Ends, held: list[Tensor], epsilon: float, penalty: float
) -> Potentials:
    """Return the potentials of all cells, those without mass having the best for the other side's, from the others'."""
    softness = _softness(penalty, epsilon)
    rows = Kernel(ends.x0, few.x1, ends.log_a, few.log_b, keep=False)
    columns = Kernel(few.x0, ends.x1, few.log_a, ends.log_b, keep=False)
    f = softness * rows.soft_minimum(found.g, epsilon, rows=True)
    best = columns.soft_minimum(found.f, epsilon, rows=False)
    g = softness * best
    f[held[0]], best[held[1]], g[held[1]] = found.f, found.best, found.g
    return replace(found, f=f, g=g, best=best)


def _sample(ends: Ends) -> Ends:
    """Return at most ``SAMPLE`` cells of each side, of those that have mass; always the same ones."""
    rng, sides = torch.Generator().manual_seed(0), []
    for x, log_mass in ((ends.x0, ends.log_a), (ends.x1, ends.log_b)):
        cells = torch.nonzero(log_mass > -math.inf).squeeze(1)
        chosen = cells[torch.randperm(len(cells), generator=rng)[:SAMPLE].to(cells.device)]
        sides.append((x[chosen], log_mass[chosen] - torch.logsumexp(log_mass[chosen], 0)))
    (x0, log_a), (x1, log_b) = sides
    return replace(ends, x0=x0, x1=x1, log_a=log_a, log_b=log_b)


def annealing(start: float, end: float) -> list[float]:
    """Return epsilons falling by factors of four from the cost's scale to the one asked for."""
    n = max(0, math.ceil(math.log(start / end, 4))) if start > end else 0
    return [end * 4**k for k in range(n, 0, -1)] + [end]


def _softness(penalty: float, epsilon: float) -> float:
    """Return what a soft minimum is multiplied by: one where the marginals are hard."""
    return 1.0 if penalty == math.inf else penalty / (penalty + epsilon)


def _newton(kernel: Kernel, f: Tensor, g: Tensor, epsilon: float, penalty: float) -> Tensor:
    """Take one Newton step on the semi-dual, which is concave; return the new ``g``.

    Up to a constant it is ``F(g) = -(penalty + epsilon) <a, e^(-f(g) / penalty)> - penalty <b, e^(-g / penalty)>``, or
    ``<a, f(g)> + <b, g>`` where marginals are hard. Sinkhorn alone exchanges mass between well separated groups of
    cells at a rate of ``exp(-gap / epsilon)``, and where marginals are soft it approaches their masses by a factor of
    ``1 - 2 epsilon / penalty`` an iteration. These few slow modes are what conjugate gradients find first (Brauer et
    al. 2017, the Sinkhorn-Newton method).
    """
    (log_a, log_b), softness = kernel.log_mass, _softness(penalty, epsilon)
    r, target = (log_a - f / penalty).exp(), (log_b - g / penalty).exp()  # marginals, the columns' as it should be
    plan = kernel.plan(f, g, epsilon)
    c = plan.columns(torch.ones_like(r))
    gradient = target - c
    diagonal = (c + epsilon / penalty * target).clamp(min=1e-300)
    weight = softness / r.clamp(min=1e-300)

    def hessian(v: Tensor) -> Tensor:  # -epsilon F'', positive semi-definite
        return diagonal * v - plan.there_and_back(v, weight)

    step = epsilon * conjugate_gradients(hessian, gradient, diagonal)
    slope = float(gradient @ step)
    kernel.rounding = 0.0  # a small step's gain would not be seen beside float32's rounding
    for halving in range(12):
        change = step / 2**halving
        f_trial = softness * kernel.soft_minimum(g + change, epsilon, rows=True)
        # F's difference, not F's values: those cancel where the penalty is large
        loss = _loss(r, f - f_trial, penalty, (penalty + epsilon)) + _loss(target, -change, penalty, penalty)
        if -loss >= 0.1 * slope / 2**halving:
            return softness * kernel.soft_minimum(f_trial, epsilon, rows=False)
    return softness * kernel.soft_minimum(f, epsilon, rows=False)


def _loss(marginal: Tensor, fall: Tensor, penalty: float, strength: float) -> float:
    """Return ``strength <marginal, e^(fall / penalty) - 1>``, what a side of the semi-dual loses by a fall ``(n,)``."""
    return float(marginal @ fall) if penalty == math.inf else strength * float(marginal @ torch.expm1(fall / penalty))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Solve ``matrix v = right`` for a positive semi-definite matrix, roughly, preconditioned by its diagonal."""
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
