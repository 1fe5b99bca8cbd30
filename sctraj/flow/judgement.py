"""Compare a restoration with the observed cells: their distances, and each observed cell's share of W1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .clouds import Estimate, as_cloud, median_distance
from .distance import variance_ratio
from .distance_estimates import estimated_wasserstein, restoration_plan
from .pairwise_estimates import estimated_pairwise, within
from .restoration import Restoration
from .threads import at_once

METRICS = ("w1", "w2", "mmd", "energy", "energy_about_mean", "variance_ratio")
EVEN = 1e-9  # relative difference of masses up to which all cells weigh the same
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
    x, y, weights = restoration.points, observed.points, {"weights_x": restoration.mass, "weights_y": observed.mass}
    plan = restoration_plan(x, y, **weights, rng=rng)
    w1 = Estimate(plan.distance, plan.error, 0)
    found = distances(x, y, **weights, bandwidth=observed.bandwidth, within_y=observed.within, w1=w1, rng=rng)
    return Judgement(
        {name: found[name].value for name in METRICS},
        {name: found[f"{name}_unweighted"].value for name in UNWEIGHTED},
        plan.share,
        plan.barycentre,
        {name: estimate.error for name, estimate in found.items() if estimate.error > 0},
    )


def distances(
    x: ArrayLike,
    y: ArrayLike,
    *,
    weights_x: ArrayLike | None,
    weights_y: ArrayLike | None = None,
    bandwidth: float,
    within_y: NDArray[np.float64] | None = None,
    w1: Estimate | None = None,
    rng: int = 0,
) -> dict[str, Estimate]:
    """Measure the distances between restored cells ``x`` ``(n, d)`` and observed cells ``y`` ``(m, d)``.

    Parameters
    ----------
    weights_x, weights_y
        Masses of the cells; None if all weigh the same.
    bandwidth
        Bandwidth of the MMD's kernel.
    within_y
        The result of `pairwise_estimates.within` for ``y``, if it is already known.
    w1
        The Wasserstein-1 distance, if it is already known.
    rng
        Seed of the blocks from which distances between many cells are estimated.

    Returns
    -------
    The distances by the names of ``METRICS`` and, with ``_unweighted``, those of ``UNWEIGHTED`` with all restored cells
    weighing the same.
    """
    mass = as_cloud(x, weights_x).mass
    uneven = float(mass.max() - mass.min()) > EVEN * float(mass.mean())
    # one pass over all pairs serves all distances that are means over pairs, with both weightings
    weightings = [weights_x, None] if uneven else [weights_x]
    pairwise, about_mean = estimated_pairwise(
        x, y, bandwidth=bandwidth, weights_x=weightings, weights_y=weights_y, rng=rng, within_y=within_y
    )
    w1 = w1 or estimated_wasserstein(x, y, rng=rng, weights_x=weights_x, weights_y=weights_y)
    found = {
        "w1": w1,
        "w2": estimated_wasserstein(x, y, p=2, rng=rng, weights_x=weights_x, weights_y=weights_y),
        "mmd": pairwise[0].mmd,
        "energy": pairwise[0].energy,
        "energy_about_mean": about_mean,
        "variance_ratio": Estimate(variance_ratio(x, y, weights_x=weights_x, weights_y=weights_y), 0.0, 0),
    }
    plain = found
    if uneven:
        plain = {"w1": estimated_wasserstein(x, y, weights_y=weights_y, rng=rng), "energy": pairwise[1].energy}
    return found | {f"{name}_unweighted": plain[name] for name in UNWEIGHTED}


def judge_all(tasks: Sequence[tuple[Restoration, Tensor]]) -> list[Judgement]:
    """Judge restorations, each against its observed cells, on as many threads as torch has; the number changes no bit.

    What depends on the observed cells alone is computed once for restorations that are compared with the same tensor.
    """
    observed = {id(cells): Observed(cells) for _, cells in tasks}
    largest = max((len(restoration.points) * len(cells) for restoration, cells in tasks), default=1)
    parts = [(restoration, observed[id(cells)]) for restoration, cells in tasks]
    return at_once(judge, parts, most=max(1, JUDGED_ENTRIES // largest))
