"""Compare a restoration with the observed cells: their distances, and each observed cell's share of W1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .clouds import Estimate, median_distance
from .distance import variance_ratio
from .distance_estimates import estimated_wasserstein, restoration_plan
from .pairwise_estimates import estimated_pairwise, within
from .restoration import Restoration
from .threads import at_once

METRICS = ("w1", "w2", "mmd", "energy", "energy_about_mean", "variance_ratio")
UNWEIGHTED = ("w1", "energy")  # also computed without the restoration's own masses, all of its points weighing the same
JUDGED_ENTRIES = 2**27  # of all cost matrices of restorations judged in parallel, a GiB; a plan takes a few times that


@dataclass(frozen=True)
class Judgement:
    """A restoration's distances by the names of ``METRICS``, and each observed cell's share and barycentre.

    ``unweighted`` has those of ``UNWEIGHTED`` with all points of the restoration weighing the same; ``errors`` has the
    standard errors of the distances, of either kind, that were estimated because there are too many points for all
    pairs.
    """

    values: dict[str, float]
    unweighted: dict[str, float]
    share: Tensor
    barycentre: Tensor
    errors: dict[str, float]


class Observed:
    """The cells of a held-out snapshot, ``points`` ``(m, d)`` and their ``mass``, and what all comparisons share."""

    def __init__(self, points: Tensor, mass: Tensor | None = None) -> None:
        self.points, self.mass = points, mass

    @cached_property
    def bandwidth(self) -> float:
        """The cells' median distance, which is the bandwidth of the MMD's kernel."""
        return median_distance(self.points)

    @cached_property
    def within(self) -> NDArray[np.float64] | None:
        """Kernel means over the pairs of these cells, see `pairwise_estimates.within`."""
        return within(self.points, bandwidth=self.bandwidth, weights=self.mass)


def judge(restoration: Restoration, observed: Observed, *, rng: int = 0) -> Judgement:
    """Measure the distances between a restoration and the observed cells of the held-out snapshot.

    If there are many points, some are estimates (see `distance.Estimate`) from blocks that ``rng`` draws.
    """
    x, y, weights = restoration.points, observed.points, [restoration.mass]
    if restoration.mass is not None and not bool((restoration.mass == restoration.mass[0]).all()):
        weights.append(None)
    plan = restoration_plan(x, y, weights_x=restoration.mass, weights_y=observed.mass, rng=rng)
    both = {"weights_x": restoration.mass, "weights_y": observed.mass}
    pairwise, about_mean = estimated_pairwise(
        x,
        y,
        bandwidth=observed.bandwidth,
        weights_x=weights,
        weights_y=observed.mass,
        rng=rng,
        within_y=observed.within,
    )
    found = {
        "w1": Estimate(plan.distance, plan.error, 0),
        "w2": estimated_wasserstein(x, y, p=2, rng=rng, **both),
        "mmd": pairwise[0].mmd,
        "energy": pairwise[0].energy,
        "energy_about_mean": about_mean,
    }
    equal = {name: found[name] for name in UNWEIGHTED}
    if len(weights) > 1:
        equal = {"w1": estimated_wasserstein(x, y, weights_y=observed.mass, rng=rng), "energy": pairwise[1].energy}
    values = {name: estimate.value for name, estimate in found.items()}
    values["variance_ratio"] = variance_ratio(x, y, **both)
    errors = found | {f"{name}_unweighted": estimate for name, estimate in equal.items()}
    return Judgement(
        values,
        {name: estimate.value for name, estimate in equal.items()},
        plan.share,
        plan.barycentre,
        {name: estimate.error for name, estimate in errors.items() if estimate.error > 0},
    )


def judge_all(tasks: Sequence[tuple[Restoration, Tensor]]) -> list[Judgement]:
    """Judge restorations, each against its observed cells, on as many threads as torch has; the number changes no bit.

    What depends on the observed cells alone is computed once for restorations that are compared with the same tensor.
    """
    observed = {id(cells): Observed(cells) for _, cells in tasks}
    largest = max((len(restoration.points) * len(cells) for restoration, cells in tasks), default=1)
    parts = [(restoration, observed[id(cells)]) for restoration, cells in tasks]
    return at_once(judge, parts, most=max(1, JUDGED_ENTRIES // largest))
