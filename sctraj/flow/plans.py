"""Which coupling a method has, and couplings solved once for all the folds that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coupling import Coupling, GrowingPlan, blocked, entropic, growing, independent, paired_by_velocity
from .coupling.blocked import BLOCK, at_once
from .probability_path import ProbabilityPath
from .snapshots import Interval, to_device


def couple(
    interval: Interval,
    path: ProbabilityPath | None,
    method: str,
    rng: torch.Generator,
    block: int | None = None,
    device: torch.device | None = None,
) -> Coupling:
    """Return a method's coupling of one interval; ``rng`` serves only where the whole plan does not fit.

    The path serves only for ``"sb-cfm"``, whose coupling depends on its sigma. Snapshots of more than ``block`` cells
    (by default 3,000) are met in blocks, except for ``"sb-cfm"``, whose potentials fit whatever the snapshots are.
    These are found on the ``device``, by default the cells' own, where all that is returned is.
    """
    if method == "uot-cfm":
        return growing(interval, rng, block=block)
    if method == "ot-cfm":
        return blocked(interval, rng, block=block or BLOCK)
    if method == "sb-cfm":
        assert path is not None
        plan = entropic(interval, epsilon=2 * path.sigma**2 * interval.length, device=device)
        return to_device(plan, interval.x0.device)
    return independent(interval)


class Plans:
    """Couplings solved so far, for snapshots that share intervals, as those of the folds do, and how to solve them.

    A coupling is found again where the interval, what is asked of it and the state of the random numbers are the same:
    so the draws of blocks are those of couplings made one by one. It lives as long as its owner puts problems together.

    Parameters
    ----------
    block
        Cells a side of the blocks that larger snapshots are coupled in; None: as `couple` has it.
    device
        Where the plans of ``"sb-cfm"`` are solved; None: where the cells are. (mps, which has no float64, leaves them
        there too.) Those of growing populations are of blocks, solved by the processors at once.

    Raises
    ------
    ValueError
        If block is not a whole number of at least 2.
    """

    def __init__(self, block: int | None = None, device: torch.device | None = None) -> None:
        if block is not None and not (block >= 2 and block % 1 == 0):
            raise ValueError(f"expected block to be a whole number of cells of at least 2, found {block}")
        self.block = None if block is None else int(block)
        self.device = None if device is None or device.type == "mps" else device
        self._known: list[_Solved] = []
        self._anew: list[_PairedAnew] = []

    def couple(self, interval: Interval, path: ProbabilityPath | None, method: str, rng: torch.Generator) -> Coupling:
        """Return what `couple` does, from those known if it is among them."""
        what = method, path.sigma if path is not None and method == "sb-cfm" else None
        before = rng.get_state()
        for known in self._known:
            if known.what == what and _same(known.interval, interval) and torch.equal(known.before, before):
                rng.set_state(known.after)
                return known.coupling
        coupling = couple(interval, path, method, rng, self.block, self.device)
        self._known.append(_Solved(interval, what, before, rng.get_state(), coupling))
        return coupling

    def by_velocity(
        self,
        plan: GrowingPlan,
        interval: Interval,
        velocity0: Tensor | None,
        velocity1: Tensor | None,
        *,
        kin_alone: bool,
    ) -> GrowingPlan:
        """Return what `paired_by_velocity` does, from those known if it is among them."""
        for known in self._anew:
            same = known.before is plan and known.kin_alone == kin_alone
            if same and all(map(_equal, known.velocities, (velocity0, velocity1))):
                return known.plan
        found = paired_by_velocity(plan, interval, velocity0, velocity1, kin_alone=kin_alone)
        if len(plan.meetings) == 1:  # of large snapshots, whose blocks are hardly ever the same, it would fill memory
            self._anew.append(_PairedAnew(plan, (velocity0, velocity1), kin_alone, found))
        return found

    def prepare(self, intervals: Sequence[Interval], method: str, seed: int, n_threads: int) -> None:
        """Solve couplings of small snapshots, to which random numbers do not matter, on several threads at once."""
        distinct: list[Interval] = []
        for interval in intervals:
            small = max(len(interval.x0), len(interval.x1)) <= (self.block or BLOCK)
            if small and not any(_same(interval, other) for other in distinct):
                distinct.append(interval)

        def solve(interval: Interval) -> None:
            self.couple(interval, None, method, torch.Generator().manual_seed(seed))

        at_once(solve, [(interval,) for interval in distinct], n_threads)


@dataclass(frozen=True)
class _Solved:
    """A coupling, what was asked for, and the states of the random numbers before and after."""

    interval: Interval
    what: tuple[str, float | None]
    before: Tensor
    after: Tensor
    coupling: Coupling


@dataclass(frozen=True)
class _PairedAnew:
    """A plan, the velocities at both ends by which it was made anew, whether its kin alone, and the new one."""

    before: GrowingPlan
    velocities: tuple[Tensor | None, Tensor | None]
    kin_alone: bool
    plan: GrowingPlan


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _same(one: Interval, other: Interval) -> bool:
    """Whether two intervals are between the same cells with the same masses; cells are compared by identity."""
    if (one.t0, one.t1) != (other.t0, other.t1) or one.x0 is not other.x0 or one.x1 is not other.x1:
        return False
    return all(torch.equal(a, b) for a, b in ((one.mass0, other.mass0), (one.mass1, other.mass1))) and (
        one.growth0 is other.growth0
    )
