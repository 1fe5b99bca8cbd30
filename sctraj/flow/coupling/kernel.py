"""The kernel by which Sinkhorn's algorithm multiplies: kept in memory if it fits, else computed anew in tiles."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache, cached_property

import torch
from torch import Tensor

from ..exponential import exp_

logger = logging.getLogger(__name__)

MOST_KEPT = 2**24  # entries: a matrix up to this size is kept (128 MiB in float64), a larger one is computed row by row
TILE = 2**20  # entries handled at once on a CPU: what its caches hold
FEWEST = 8  # rows of a tile, at least, as each tile reads all of the other side
REACH = 100.0  # potentials that exceed the absorbed ones by more epsilons than this are absorbed instead
FAINTEST = 1e-200  # smallest sum over a row of the kernel that entries lost to underflow cannot have changed


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Return squared Euclidean distances, ``(n0, n1)``."""
    products = torch.addmm(x1.square().sum(1), x0, x1.T, alpha=-2)
    return products.add_(x0.square().sum(1)[:, None]).clamp_(min=0)


@cache
def _fuses(device: torch.device) -> bool:
    """Say whether a device can run `fused`: a CUDA device on which Triton works, which is tried once."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    few = torch.zeros(1, 1, dtype=torch.float64, device=device)
    try:
        from .fused import row_sums

        row_sums(few, few, few[0])
    except Exception as error:  # Triton is missing, or lacks a compiler
        logger.info("Triton does not work here (%s): kernels of large snapshots are made in tiles", error)
        return False
    return True


class Room:
    """Memory for a matrix, reused: on a CPU fresh memory of this size costs more than computing what goes into it."""

    def __init__(self, like: Tensor) -> None:
        self.room = like.new_empty(0)

    def __call__(self, m: int, n: int) -> Tensor:
        """Return the memory as a matrix ``(m, n)``; what the last call returned is overwritten."""
        if self.room.numel() < m * n:
            self.room = self.room.new_empty(m * n)
        return self.room[: m * n].view(m, n)


def fits(x0: Tensor, x1: Tensor) -> bool:
    """Say whether a matrix of all pairs is small enough to be kept."""
    return len(x0) * len(x1) <= MOST_KEPT


def split(cells: Tensor, n: int) -> tuple[Tensor, ...]:
    """Split cells such that each part against ``n`` others has at most ``MOST_KEPT`` entries, fewer on a CPU."""
    return cells.split(_rows(cells.device, n))


def _rows(device: torch.device, n: int) -> int:
    rows = MOST_KEPT // n
    return max(1, min(rows, max(TILE // n, FEWEST)) if device.type == "cpu" else rows)


def tiles(x0: Tensor, x1: Tensor) -> Iterator[Tensor]:
    """Yield row indices of ``x0`` in parts small enough to be compared with all of ``x1`` at once."""
    return iter(split(torch.arange(len(x0), device=x0.device), len(x1)))


def slices(x0: Tensor, x1: Tensor) -> Iterator[slice]:
    """Yield the same parts as slices, whose bounds the host knows without asking the device."""
    step = _rows(x0.device, len(x1))
    return (slice(first, first + step) for first in range(0, len(x0), step))


class Kernel:
    """Soft minima over the costs ``C_ij = |x0_i - x1_j|^2``, and plans as linear maps.

    If it fits, ``K_ij = exp((f_i + g_j - C_ij) / epsilon)`` is kept beside the costs, with some potentials ``f, g``
    absorbed in it. A soft minimum is then a product of ``K`` and a vector, as long as the potentials given are near the
    absorbed ones (stabilised scaling, Schmitzer 2019). If they are not, it is computed in the log domain, and the
    potentials are absorbed anew. If the kernel does not fit, its entries are computed in tiles, in float32 where
    rounding permits, and the tiles are summed up in float64.

    Parameters
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_a, log_b
        Logarithms of their weights; ``-inf`` for a cell without mass.
    keep
        Whether there will be more than one product.

    Attributes
    ----------
    rounding
        Tolerated relative error of an entry, to be set by the caller; 0: that of float64.
    """

    def __init__(self, x0: Tensor, x1: Tensor, log_a: Tensor, log_b: Tensor, *, keep: bool = True) -> None:
        self.cells, self.log_mass, self.rounding = (x0, x1), (log_a, log_b), 0.0
        keep = keep and fits(x0, x1)
        self.cost = squared_distances(x0, x1) if keep else None  # bit for bit the same from both sides
        self.kept = x0.new_empty(len(x0), len(x1)) if keep else None
        self.absorbed = torch.zeros_like(log_a), torch.zeros_like(log_b)
        self.epsilon = 0.0  # that of the kept kernel; none yet
        self.rooms = {dtype: Room(x0.new_empty(0, dtype=dtype)) for dtype in (torch.float32, torch.float64)}

    def soft_minimum(self, potential: Tensor, epsilon: float, *, rows: bool) -> Tensor:
        """Return ``-epsilon log sum_j b_j exp((potential_j - C_ij) / epsilon)`` for every row (or column)."""
        here, there = (0, 1) if rows else (1, 0)
        absorbed = potential
        if self.kept is not None and epsilon == self.epsilon:
            scaling, rise = self._scaling(potential, there)
            total = self.kept @ scaling if rows else scaling @ self.kept
            sound = (rise.max() <= REACH) & (total.max() < math.inf)
            if float(torch.where(sound, total.min(), 0)) > FAINTEST:
                return self.absorbed[here] - epsilon * total.log()
            if float(rise.max()) <= REACH:
                absorbed = self.absorbed[there]  # for far cells the best for the other side, if marginals are soft
        weight = self.log_mass[there] + potential / epsilon
        if self._fused(epsilon):
            largest, total = self.sums(here, weight, epsilon)
            return -epsilon * (largest + total.log())
        parts = []
        for tile, exponent in self._exponents(here, weight, epsilon):
            largest = exponent.amax(1, keepdim=True)
            log_sum = self._exp_(exponent.sub_(largest)).sum(1).log_().add_(largest.squeeze(1))
            parts.append(log_sum.double() - self.squares[here][tile] / epsilon)
        found = -epsilon * torch.cat(parts)
        if self.kept is not None:
            self._absorb(*((found, absorbed) if rows else (absorbed, found)), epsilon)
        return found

    def soft_minima(self, g: Tensor, epsilon: float, softness: float) -> tuple[Tensor, Tensor]:
        """Return ``f``, ``softness`` times the rows' soft minima over ``g``, and the columns' over that ``f``.

        In tiles each entry is computed once for both: a row's ``f`` is known as soon as its tile is, so the plan's
        column sums ``c`` grow tile by tile, and the columns' soft minima are ``g - epsilon log(c / b)``.
        """
        if self.kept is not None or self._fused(epsilon):
            f = softness * self.soft_minimum(g, epsilon, rows=True)
            return f, self.soft_minimum(f, epsilon, rows=False)
        log_a, log_b = self.log_mass
        f, sums, most = torch.empty_like(log_a), torch.zeros_like(g), torch.zeros_like(g[:1])
        for tile, exponent in self._exponents(0, log_b + g / epsilon, epsilon):
            largest = exponent.amax(1, keepdim=True)
            entries = exp_(exponent.sub_(largest))
            shift = largest.squeeze(1).double() - self.squares[0][tile] / epsilon
            f[tile] = -softness * epsilon * (entries.sum(1).double().log() + shift)
            scaling = (log_a[tile] + f[tile] / epsilon + shift).exp()
            sums += (scaling.to(entries) @ entries).double()
            most += scaling.sum()  # no sum exceeds it, as entries are at most one
        best = g - epsilon * (sums.log() - log_b)
        # a column without mass has no sum, and that of a column far from all rows may have underflowed
        sound = (sums > 1e8 * torch.finfo(self._dtype(epsilon)).tiny * (most + len(f))) & (sums < math.inf)
        lost = torch.nonzero(~sound).squeeze(1)
        if len(lost):
            there = Kernel(self.cells[0], self.cells[1][lost], log_a, log_b[lost], keep=False)
            best[lost] = there.soft_minimum(f, epsilon, rows=False)
        return f, best

    def plan(self, f: Tensor, g: Tensor, epsilon: float) -> Plan:
        """Return the plan ``a_i b_j exp((f_i + g_j - C_ij) / epsilon)`` as a linear map."""
        if self._fused(epsilon):
            return FusedPlan(self, f, g, epsilon)
        if self.kept is None:
            log_a, log_b = self.log_mass
            rise = f / epsilon - self.squares[0] / epsilon

            def made() -> Iterator[tuple[slice, Tensor]]:
                for tile, exponent in self._exponents(0, g / epsilon, epsilon):
                    yield tile, exp_(exponent.add_(rise[tile, None].to(exponent)))

            return TiledPlan(made, log_a.exp(), log_b.exp())
        kept = self.kept
        if epsilon != self.epsilon or any(
            float(self._scaling(h, side)[1].abs().max()) > REACH for side, h in enumerate((f, g))
        ):
            self._absorb(f, g, epsilon)
        scalings = (self._scaling(h, side)[0] for side, h in enumerate((f, g)))
        return TiledPlan(lambda: iter([(slice(0, len(f)), kept)]), *scalings)

    def _scaling(self, potential: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return a side's masses times scalings, and the scalings' logarithms (0 for cells without mass): ``(n,)``."""
        rise = (potential - self.absorbed[side]) / self.epsilon
        log_mass = self.log_mass[side]
        return (log_mass + rise).exp(), rise.masked_fill(log_mass == -math.inf, 0)

    def _absorb(self, f: Tensor, g: Tensor, epsilon: float) -> None:
        assert self.kept is not None
        self.absorbed, self.epsilon = (f, g), epsilon
        rise = f / epsilon - self.squares[0] / epsilon
        for tile, exponent in self._exponents(0, g / epsilon, epsilon):
            self.kept[tile] = self._exp_(exponent.add_(rise[tile, None]))

    def _exp_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its exponential, to the last bit if a kernel is kept, for tolerances near rounding."""
        return exp_(x) if self.kept is None else x.exp_()

    def _fused(self, epsilon: float) -> bool:
        """Say whether entries are never stored: if none are kept and the device can sum them up as it computes them."""
        if self.kept is not None or not _fuses(self.cells[0].device):
            return False
        from .fused import MOST_COORDINATES, ROUNDING

        return self.cells[0].shape[1] <= MOST_COORDINATES and self._may_round(ROUNDING, epsilon)

    def sums(self, here: int, weight: Tensor, epsilon: float, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum ``exp(weight_j - C_ij / epsilon) values_j`` over ``j`` for every cell of a side, if fused.

        Returns
        -------
        ``(m,)`` each: the largest exponent of a row, and the sum divided by its exponential.
        """
        from .fused import row_sums

        there = 1 - here
        largest, total = row_sums(
            self.cells[here] * (2 / epsilon), self.cells[there], weight - self.squares[there] / epsilon, values
        )
        return largest - self.squares[here] / epsilon, total

    @cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared lengths of the cells, ``(n0,)`` and ``(n1,)``; zero if costs are kept, as these include them."""
        first, second = ((x.square() if self.cost is None else torch.zeros_like(x)).sum(1) for x in self.cells)
        return first, second

    @cached_property
    def largest_cost(self) -> float:
        """An upper bound of the costs."""
        return float((self.squares[0].max().sqrt() + self.squares[1].max().sqrt()) ** 2)

    def _dtype(self, epsilon: float) -> torch.dtype:
        """Return the precision of tiles: float32 if the rounding of an exponent is then tolerated."""
        single = self.kept is None and self._may_round(torch.finfo(torch.float32).eps, epsilon)
        return torch.float32 if single else torch.float64

    def _may_round(self, by: float, epsilon: float) -> bool:
        """Say whether errors of the costs by this fraction of the largest are tolerated."""
        return self.rounding > 0 and by * self.largest_cost / epsilon <= self.rounding

    def _exponents(self, here: int, weight: Tensor, epsilon: float) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of a side's ``m`` cells with ``weight_j - (C_ij - squares_i) / epsilon``, ``(m, n)``.

        Each tile overwrites the last.
        """
        if self.cost is not None:
            cost = self.cost if here == 0 else self.cost.T
            for tile in slices(self.cells[here], self.cells[1 - here]):
                out = self.rooms[torch.float64](len(cost[tile]), len(weight))
                yield tile, torch.add(weight, cost[tile], alpha=-1 / epsilon, out=out)
            return
        there, dtype = 1 - here, self._dtype(epsilon)
        own, other = (self.cells[side].to(dtype) for side in (here, there))
        weight = (weight - self.squares[there] / epsilon).to(dtype)
        for tile in slices(own, other):
            out = self.rooms[dtype](len(own[tile]), len(other))
            yield tile, torch.addmm(weight, own[tile], other.T, alpha=2 / epsilon, out=out)


class Plan(ABC):
    """A plan ``P``, ``(n0, n1)``, as a linear map."""

    @abstractmethod
    def columns(self, u: Tensor) -> Tensor:
        """Return ``P^T u``, ``(n1,)``."""

    @abstractmethod
    def there_and_back(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return ``P^T diag(weight) P v``, ``(n1,)``."""


class TiledPlan(Plan):
    """A plan ``P = diag(left) K diag(right)``.

    ``made`` yields slices of rows with the entries of ``K`` there; a tile is valid only until the next is computed.
    """

    def __init__(self, made: Callable[[], Iterator[tuple[slice, Tensor]]], left: Tensor, right: Tensor) -> None:
        self.made, self.left, self.right = made, left, right

    def columns(self, u: Tensor) -> Tensor:
        """Return ``P^T u``, ``(n1,)``."""
        found, u = torch.zeros_like(self.right), u * self.left
        for rows, entries in self.made():
            found += u[rows].to(entries) @ entries
        return self.right * found

    def there_and_back(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return ``P^T diag(weight) P v``, ``(n1,)``, computing each tile once."""
        found, v, weight = torch.zeros_like(v), v * self.right, weight * self.left * self.left
        for rows, entries in self.made():
            found += (weight[rows].to(entries) * (entries @ v.to(entries))) @ entries
        return self.right * found


class FusedPlan(Plan):
    """A plan of potentials ``f, g`` and a kernel whose entries are never stored."""

    def __init__(self, kernel: Kernel, f: Tensor, g: Tensor, epsilon: float) -> None:
        self.kernel, self.potentials, self.epsilon = kernel, (f, g), epsilon

    def columns(self, u: Tensor) -> Tensor:
        """Return ``P^T u``, ``(n1,)``."""
        return self._times(1, u)

    def there_and_back(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return ``P^T diag(weight) P v``, ``(n1,)``."""
        return self._times(1, weight * self._times(0, v))

    def _times(self, here: int, values: Tensor) -> Tensor:
        """Multiply a vector of the other side: return ``P v`` if ``here`` is 0, ``P^T v`` if it is 1."""
        there = 1 - here
        log_mass = [h / self.epsilon + log_m for h, log_m in zip(self.potentials, self.kernel.log_mass)]
        largest, total = self.kernel.sums(here, log_mass[there], self.epsilon, values)
        return total * (largest + log_mass[here]).exp()
