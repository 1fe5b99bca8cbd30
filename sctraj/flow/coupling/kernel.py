"""What Sinkhorn's algorithm multiplies by: kept, with potentials absorbed, where it fits; made in tiles where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WHOLE = 2**24  # entries: any matrix up to this size is kept (128 MiB in float64), a larger one is made anew row by row
KERNEL = 8  # times that: the largest kernel that is kept (1 GiB), its costs being made anew when they are needed
TILE = 2**20  # entries met at once on a CPU: what its caches hold
REACH = 100.0  # potentials that exceed the absorbed ones by more epsilons than this are absorbed in their turn
FAINTEST = 1e-200  # smallest sum over a row of the kernel that entries lost to underflow cannot have changed


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared Euclidean distances, ``(n0, n1)``."""
    products = torch.addmm(x1.square().sum(1), x0, x1.T, alpha=-2)
    return products.add_(x0.square().sum(1)[:, None]).clamp_(min=0)


class Room:
    """A matrix to write into, again and again: fresh memory of this size costs a CPU more than what is put there."""

    def __init__(self, like: Tensor) -> None:
        self.room = like.new_empty(0)

    def __call__(self, m: int, n: int) -> Tensor:
        """Return it as ``(m, n)``; what the last call returned is lost."""
        if self.room.numel() < m * n:
            self.room = self.room.new_empty(m * n)
        return self.room[: m * n].view(m, n)


def fits(x0: Tensor, x1: Tensor) -> bool:
    """Say whether a matrix of all pairs may be kept."""
    return len(x0) * len(x1) <= WHOLE


def split(cells: Tensor, n: int) -> tuple[Tensor, ...]:
    """Split indices of cells such that a part against ``n`` others has at most ``WHOLE`` entries, fewer on a CPU."""
    return cells.split(_rows(cells.device, n))


def _rows(device: torch.device, n: int) -> int:
    return max(1, (min(WHOLE, TILE) if device.type == "cpu" else WHOLE) // n)


def tiles(x0: Tensor, x1: Tensor) -> Iterator[Tensor]:
    """Yield row indices of ``x0`` in parts small enough to be met against all of ``x1`` at once."""
    return iter(split(torch.arange(len(x0), device=x0.device), len(x1)))


def slices(x0: Tensor, x1: Tensor) -> Iterator[slice]:
    """Yield the same parts as slices, whose bounds the host knows without asking the device."""
    step = _rows(x0.device, len(x1))
    return (slice(first, first + step) for first in range(0, len(x0), step))


class Kernel:
    """Soft minima over the costs ``C_ij = |x0_i - x1_j|^2``, and plans as linear maps.

    Where it fits, ``K_ij = exp((f_i + g_j - C_ij) / epsilon)`` is kept (a small one with the costs, a large one alone),
    some potentials ``f, g`` being absorbed in it. A soft minimum is then a product of ``K`` and a vector, as long as
    the potentials asked for are near the absorbed ones (Schmitzer 2019, stabilised scaling). Where they are not, it is
    found in the log domain, and the potentials are absorbed anew.

    Parameters
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_a, log_b
        Logarithms of their weights; ``-inf`` for a cell without mass.
    keep
        Whether there will be more products than one.
    """

    def __init__(self, x0: Tensor, x1: Tensor, log_a: Tensor, log_b: Tensor, *, keep: bool = True) -> None:
        self.cells, self.log_mass = (x0, x1), (log_a, log_b)
        self.cost = squared_distances(x0, x1) if keep and fits(x0, x1) else None
        self.squares, self.room = (x0.square().sum(1), x1.square().sum(1)), Room(x0)
        keep = keep and len(x0) * len(x1) <= KERNEL * WHOLE
        self.kept = x0.new_empty(len(x0), len(x1)) if keep else None
        self.absorbed = torch.zeros_like(log_a), torch.zeros_like(log_b)
        self.epsilon = 0.0  # of the kernel kept; none yet

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
                absorbed = self.absorbed[there]  # of far cells the best for the other side, where marginals are soft
        weight = self.log_mass[there] + potential / epsilon
        parts = []
        for tile in slices(self.cells[here], self.cells[there]):
            exponent = self._exponent(tile, here, weight, epsilon)
            largest = exponent.amax(1, keepdim=True)
            parts.append(exponent.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1)))
        found = -epsilon * torch.cat(parts)
        if self.kept is not None:
            self._absorb(*((found, absorbed) if rows else (absorbed, found)), epsilon)
        return found

    def plan(self, f: Tensor, g: Tensor, epsilon: float) -> Plan:
        """Return the plan ``a_i b_j exp((f_i + g_j - C_ij) / epsilon)`` as a linear map."""
        if self.kept is None:
            log_a, log_b = self.log_mass

            def make(rows: slice) -> Tensor:
                return self._exponent(rows, 0, g / epsilon, epsilon).add_((f / epsilon)[rows, None]).exp_()

            return Plan(make, list(slices(*self.cells)), log_a.exp(), log_b.exp())
        kept = self.kept
        if epsilon != self.epsilon or any(
            float(self._scaling(h, side)[1].abs().max()) > REACH for side, h in enumerate((f, g))
        ):
            self._absorb(f, g, epsilon)
        scalings = (self._scaling(h, side)[0] for side, h in enumerate((f, g)))
        return Plan(lambda _: kept, [slice(0, len(f))], *scalings)

    def _scaling(self, potential: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return a side's masses times scalings, and the scalings' logarithms (0 for cells without mass): ``(n,)``."""
        rise = (potential - self.absorbed[side]) / self.epsilon
        log_mass = self.log_mass[side]
        return (log_mass + rise).exp(), rise.masked_fill(log_mass == -math.inf, 0)

    def _absorb(self, f: Tensor, g: Tensor, epsilon: float) -> None:
        assert self.kept is not None
        self.absorbed, self.epsilon = (f, g), epsilon
        for rows in slices(*self.cells):
            self._exponent(rows, 0, g / epsilon, epsilon, out=self.kept[rows]).add_((f / epsilon)[rows, None]).exp_()

    def _exponent(self, tile: slice, here: int, weight: Tensor, epsilon: float, out: Tensor | None = None) -> Tensor:
        """Return ``weight_j - C_ij / epsilon`` of a slice of a side's ``m`` cells and of all of the other's.

        ``(m, n)``, in ``out`` or where the next call will write.
        """
        there = 1 - here
        own, other = self.cells[here][tile], self.cells[there]
        out = self.room(len(own), len(weight)) if out is None else out
        if self.cost is not None:
            cost = (self.cost if here == 0 else self.cost.T)[tile]
            return torch.add(weight, cost, alpha=-1 / epsilon, out=out)
        torch.addmm(weight - self.squares[there] / epsilon, own, other.T, alpha=2 / epsilon, out=out)
        return out.sub_((self.squares[here][tile] / epsilon)[:, None])


class Plan:
    """A plan ``P = diag(left) K diag(right)``, ``(n0, n1)``, as a linear map; ``K`` is made in tiles of rows.

    A tile need not outlast the making of the next.
    """

    def __init__(self, make: Callable[[slice], Tensor], tiles: list[slice], left: Tensor, right: Tensor) -> None:
        self.make, self.tiles, self.left, self.right = make, tiles, left, right

    def columns(self, u: Tensor) -> Tensor:
        """Return ``P^T u``, ``(n1,)``."""
        u = u * self.left
        return self.right * torch.stack([u[rows] @ self.make(rows) for rows in self.tiles]).sum(0)

    def there_and_back(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return ``P^T diag(weight) P v``, ``(n1,)``, each tile being made once."""
        v, weight = v * self.right, weight * self.left * self.left
        found = torch.zeros_like(v)
        for rows in self.tiles:
            tile = self.make(rows)
            found += (weight[rows] * (tile @ v)) @ tile
        return self.right * found
