"""Which coupling belongs to a method; and couplings, each solved once for all the folds that share it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .clouds import spacing
from .coupling import (
    Coupling,
    GrowingPlan,
    SparsePlan,
    blocked,
    entropic,
    growing,
    independent,
    paired_by_velocity,
)
from .coupling.blocked import BLOCK, cells_a_side
from .coupling.growing import WHOLE, Frame
from .probability_path import ProbabilityPath
from .snapshots import Interval, Snapshots, thinned, to_device
from .threads import at_once

logger = logging.getLogger(__name__)

MOST_CELLS = 6_000  # that are coupled per snapshot: twice as many take twice as long and restore nothing better
BLOCKS_SEED = 0  # blocks belong to the data and are the same for all members


class Plans:
    """The couplings solved so far, for snapshots that share intervals (as folds do), and how to solve new ones.

    A coupling is reused if the interval and what is asked of it are the same. The blocks of large snapshots are drawn
    from one seed, anew for each interval, so they are the same too. To be discarded once the problems are made.

    Parameters
    ----------
    block
        Cells a side of the blocks in which larger snapshots are coupled. By default snapshots of more than 3,000 cells
        are coupled in blocks, and of more than 1,500 by the coupling of growing populations.
    device
        Where the plans of ``"sb-cfm"`` are solved. None: where the cells are, as also for mps, which has no float64.
        The plans of growing populations consist of blocks, which the processors solve in parallel.
    frame
        Of the plans of growing populations, see `growing`.

    Raises
    ------
    ValueError
        If block is not a whole number of at least 2, or the frame is unknown.
    """

    def __init__(self, block: int | None = None, device: torch.device | None = None, frame: Frame = "fixed") -> None:
        if frame not in get_args(Frame):
            raise ValueError(f"expected a frame of {get_args(Frame)}, found {frame!r}")
        if block is not None and not (block >= 2 and block % 1 == 0):
            raise ValueError(f"expected block to be a whole number of cells of at least 2, found {block}")
        self.frame: Frame = frame
        self.block = None if block is None else int(block)
        self.device = None if device is None or device.type == "mps" else device
        self._known: list[_Solved] = []
        self._anew: list[_PairedAnew] = []
        self._few: list[tuple[Snapshots, Snapshots]] = []
        self._spacings: list[tuple[Tensor, float]] = []

    def taking_part(self, snapshots: Snapshots) -> Snapshots:
        """Return the snapshots with the cells that are coupled: at most 6,000 of each, or a block if that is larger.

        The choice is random and depends on a snapshot's own weights alone (see `thinned`). The same snapshots always
        give the same tensors, by which couplings are recognised.
        """
        for known, few in self._few:
            if known is snapshots:
                return few
        few = thinned(snapshots, max(MOST_CELLS, self.block or 0))
        self._few.append((snapshots, few))
        if few is not snapshots:
            sizes = ", ".join(f"{len(some):,} of {len(x):,}" for some, x in zip(few.points, snapshots.points))
            logger.info("cells of the snapshots that are coupled: %s", sizes)
        return few

    def spacing(self, cells: Tensor) -> float:
        """Return how far apart a snapshot's cells are (`clouds.spacing`), measured once."""
        for known, found in self._spacings:
            if known is cells:
                return found
        found = spacing(cells)
        self._spacings.append((cells, found))
        return found

    def couple(self, interval: Interval, path: ProbabilityPath | None, method: str) -> Coupling:
        """Return a method's coupling of one interval, solved once.

        The path is used for ``"sb-cfm"`` alone, whose coupling depends on its sigma.
        """
        what = method, path.sigma if path is not None and method == "sb-cfm" else None
        for known in self._known:
            if known.what == what and _same(known.interval, interval):
                return known.coupling
        coupling = self._solve(interval, path, method)
        self._known.append(_Solved(interval, what, coupling))
        return coupling

    def growing(self, interval: Interval) -> GrowingPlan:
        """Return the coupling of a growing population, which also says who each cell's kin are; solved once."""
        plan = self.couple(interval, None, "uot-cfm")
        assert isinstance(plan, GrowingPlan)
        return plan

    def _solve(self, interval: Interval, path: ProbabilityPath | None, method: str) -> Coupling:
        rng = torch.Generator().manual_seed(BLOCKS_SEED)
        if method == "uot-cfm":
            return growing(interval, rng, frame=self.frame, block=self.block, exact_cost=self._exact_cost(interval))
        if method == "ot-cfm":
            return blocked(interval, rng, block=self.block or BLOCK)
        if method == "sb-cfm":
            assert path is not None
            plan = entropic(interval, epsilon=2 * path.sigma**2 * interval.length, device=self.device)
            return to_device(plan, interval.x0.device)
        return independent(interval)

    def _exact_cost(self, interval: Interval) -> float | None:
        """Return the cost of the interval's exact plan if it is known, as it may be if sigma is the default."""
        for known in self._known:
            if isinstance(known.coupling, SparsePlan) and _same(known.interval, interval):
                return known.coupling.cost
        return None

    def by_velocity(
        self,
        plan: GrowingPlan,
        interval: Interval,
        velocity0: Tensor | None,
        velocity1: Tensor | None,
        time: float,
        *,
        kin_alone: bool,
    ) -> GrowingPlan:
        """Return the plan of `paired_by_velocity`, solved once."""
        what = time, kin_alone, _digest(velocity0), _digest(velocity1)
        for known in self._anew:
            if known.before is plan and known.what == what:
                return known.plan
        found = paired_by_velocity(plan, interval, velocity0, velocity1, time=time, kin_alone=kin_alone)
        self._anew.append(_PairedAnew(plan, what, found))
        return found

    def forget_velocities(self) -> None:
        """Forget the plans of `by_velocity`: kin, ``(n, d)`` float64 a side, are of no use once problems are made."""
        self._anew.clear()

    def prepare(self, intervals: Sequence[Interval], method: str) -> None:
        """Solve exact and growing couplings of small snapshots in parallel (of large ones, the blocks are parallel)."""
        if method not in ("uot-cfm", "ot-cfm"):
            return
        distinct: list[Interval] = []
        for interval in intervals:
            small = cells_a_side(interval) <= (self.block or (WHOLE if method == "uot-cfm" else BLOCK))
            known = any(one.what == (method, None) and _same(one.interval, interval) for one in self._known)
            if small and not known and not any(_same(interval, other) for other in distinct):
                distinct.append(interval)
        at_once(self.couple, [(interval, None, method) for interval in distinct])


@dataclass(frozen=True)
class _Solved:
    """A coupling, and the interval, method and sigma for which it was solved."""

    interval: Interval
    what: tuple[str, float | None]
    coupling: Coupling


@dataclass(frozen=True)
class _PairedAnew:
    """A plan, what it was paired anew by (time, whether for kin alone, the velocities' digests), and the new plan."""

    before: GrowingPlan
    what: tuple[float, bool, bytes, bytes]
    plan: GrowingPlan


def _digest(values: Tensor | None) -> bytes:
    """Return a hash of a tensor's values; keeping the velocities themselves would take as much memory as the kin."""
    return b"" if values is None else hashlib.sha256(values.cpu().numpy().tobytes()).digest()


def _same(one: Interval, other: Interval) -> bool:
    """Say whether two intervals have the same cells (compared by identity) with the same masses."""
    if (one.t0, one.t1) != (other.t0, other.t1) or one.x0 is not other.x0 or one.x1 is not other.x1:
        return False
    return all(torch.equal(a, b) for a, b in ((one.mass0, other.mass0), (one.mass1, other.mass1))) and (
        one.growth0 is other.growth0
    )
