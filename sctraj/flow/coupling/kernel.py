"""What Sinkhorn's algorithm multiplies by: kept, with potentials absorbed, where it fits; made in tiles where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WHOLE = 2**24  # entries: a matrix up to this size is kept (128 MiB in float64), a larger one is made anew row by row
TILE = 2**20  # entries met at once on a CPU: what its caches hold
REACH = 100.0  # potentials that exceed the absorbed ones by more epsilons than this are absorbed in their turn
FAINTEST = 1e-200  # smallest sum over a row of the kernel that entries lost to underflow cannot have changed


def squared_distances(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared Euclidean distances, ``(n0, n1)``."""
    return (x0.square().sum(1)[:, None] + x1.square().sum(1)[None, :] - 2 * x0 @ x1.T).clamp_(min=0)


def fits(x0: Tensor, x1: Tensor) -> bool:
    """Say whether a matrix of all pairs may be kept."""
    return len(x0) * len(x1) <= WHOLE


def split(cells: Tensor, n: int) -> tuple[Tensor, ...]:
    """Split indices of cells such that a part against ``n`` others has at most ``WHOLE`` entries, fewer on a CPU."""
    return cells.split(max(1, (min(WHOLE, TILE) if cells.device.type == "cpu" else WHOLE) // n))


def tiles(x0: Tensor, x1: Tensor) -> Iterator[Tensor]:
    """Yield row indices of ``x0`` in parts small enough to be met against all of ``x1`` at once."""
    return iter(split(torch.arange(len(x0), device=x0.device), len(x1)))


class Kernel:
    """Soft minima over the costs ``C_ij = |x0_i - x1_j|^2``, and plans as linear maps.

    Where it fits, ``K_ij = exp((f_i + g_j - C_ij) / epsilon)`` is kept, some potentials ``f, g`` being absorbed in it.
    A soft minimum is then a product of ``K`` and a vector, as long as the potentials asked for are near the absorbed
    ones (Schmitzer 2019, stabilised scaling). Where they are not, it is found in the log domain, and the potentials
    are absorbed anew.

    Parameters
    ----------
    x0, x1
        Cells ``(n0, d)`` and ``(n1, d)``, float64.
    log_a, log_b
        Logarithms of their weights; ``-inf`` for a cell without mass.
    """

    def __init__(self, x0: Tensor, x1: Tensor, log_a: Tensor, log_b: Tensor) -> None:
        self.cells, self.log_mass = (x0, x1), (log_a, log_b)
        self.cost = squared_distances(x0, x1) if fits(x0, x1) else None
        self.kept = None if self.cost is None else torch.empty_like(self.cost)
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
        parts = [
            torch.logsumexp(torch.add(weight, self._costs(tile, here), alpha=-1 / epsilon), 1)
            for tile in tiles(self.cells[here], self.cells[there])
        ]
        found = -epsilon * torch.cat(parts)
        if self.kept is not None:
            self._absorb(*((found, absorbed) if rows else (absorbed, found)), epsilon)
        return found

    def plan(self, f: Tensor, g: Tensor, epsilon: float) -> Plan:
        """Return the plan ``a_i b_j exp((f_i + g_j - C_ij) / epsilon)`` as a linear map."""
        if self.kept is None:
            log_a, log_b = self.log_mass

            def make(rows: Tensor) -> Tensor:
                exponent = torch.add(g / epsilon, self._costs(rows, 0), alpha=-1 / epsilon)
                return exponent.add_((f / epsilon)[rows, None]).exp_()

            return Plan(make, list(tiles(*self.cells)), log_a.exp(), log_b.exp())
        kept = self.kept
        if epsilon != self.epsilon or any(
            float(self._scaling(h, side)[1].abs().max()) > REACH for side, h in enumerate((f, g))
        ):
            self._absorb(f, g, epsilon)
        scalings = (self._scaling(h, side)[0] for side, h in enumerate((f, g)))
        return Plan(lambda _: kept, [torch.arange(len(f), device=f.device)], *scalings)

    def _scaling(self, potential: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return a side's masses times scalings, and the scalings' logarithms (0 for cells without mass): ``(n,)``."""
        rise = (potential - self.absorbed[side]) / self.epsilon
        log_mass = self.log_mass[side]
        return (log_mass + rise).exp(), rise.masked_fill(log_mass == -math.inf, 0)

    def _absorb(self, f: Tensor, g: Tensor, epsilon: float) -> None:
        assert self.kept is not None
        self.absorbed, self.epsilon = (f, g), epsilon
        for rows in tiles(*self.cells):
            part = self.kept[int(rows[0]) : int(rows[-1]) + 1]
            torch.add(g / epsilon, self._costs(rows, 0), alpha=-1 / epsilon, out=part)
            part.add_((f / epsilon)[rows, None]).exp_()

    def _costs(self, tile: Tensor, here: int) -> Tensor:
        """Return the costs of a side's cells ``(m,)``, consecutive ones, to all of the other's ``(m, n)``."""
        if self.cost is None:
            return squared_distances(self.cells[here][tile], self.cells[1 - here])
        cost = self.cost if here == 0 else self.cost.T
        return cost.narrow(0, int(tile[0]), len(tile))


class Plan:
    """A plan ``P = diag(left) K diag(right)``, ``(n0, n1)``, as a linear map; ``K`` is made in tiles of rows."""

    def __init__(self, make: Callable[[Tensor], Tensor], tiles: list[Tensor], left: Tensor, right: Tensor) -> None:
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
