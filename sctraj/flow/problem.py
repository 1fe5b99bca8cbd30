"""What a fit is given: snapshots, a coupling for each interval and a probability path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .coupling import Coupling, blocked, entropic, independent
from .probability_path import BrownianBridge, PathSample, ProbabilityPath, Straight, Trigonometric
from .snapshots import Interval, Snapshots

METHODS = ("ot-cfm", "i-cfm", "sb-cfm", "vp-cfm")

# sigma, where none is given, as a fraction of the displacement per root of the mean gap: scale- and unit-free
STRAIGHT_FRACTION = 0.1
BRIDGE_FRACTION = 0.3
HELD_BACK = 0.1  # of each snapshot's cells, where early stopping is asked for
DISPLACEMENT_CELLS = 1000  # cells a side at most from which the displacement is estimated


@dataclass(frozen=True)
class Problem:
    """One member's data: the pairs of cells it may see and the path between them.

    Attributes
    ----------
    snapshots
        The kept snapshots.
    couplings
        One per interval.
    path
        The law of x_t between the two ends of a pair.
    seed
        Of the member's own random stream: first weights, pairs, times and noise depend on it and on the kept
        snapshots alone, never on the other members.
    """

    snapshots: Snapshots
    couplings: tuple[Coupling, ...]
    path: ProbabilityPath
    seed: int

    @property
    def std(self) -> float:
        """Largest standard deviation of the path over the mean gap; what the score is measured in."""
        if isinstance(self.path, BrownianBridge):
            return self.path.sigma * math.sqrt(self.snapshots.mean_gap) / 2
        return 0.0

    def sample(self, n_steps: int, n_pairs: int, rng: torch.Generator) -> tuple[PathSample, Tensor]:
        """Draw ``n_steps`` batches of ``n_pairs`` pairs, shared evenly among the intervals.

        Returns
        -------
        Points and targets with leading axes ``(n_steps, n_pairs)``, and the length of each pair's interval
        ``(n_pairs, 1)``.
        """
        intervals = self.snapshots.intervals()
        share, rest = divmod(n_pairs, len(intervals))
        x0, x1, t0, length = [], [], [], []
        for k, (interval, coupling) in enumerate(zip(intervals, self.couplings, strict=True)):
            n = share + (k < rest)
            i, j = coupling.sample(n_steps * n, rng)
            x0.append(interval.x0[i].reshape(n_steps, n, -1))
            x1.append(interval.x1[j].reshape(n_steps, n, -1))
            t0.append(interval.x0.new_full((n, 1), interval.t0))
            length.append(interval.x0.new_full((n, 1), interval.length))
        start, gap = torch.cat(t0), torch.cat(length)  # (n_pairs, 1)
        return self.path.sample(torch.cat(x0, 1), torch.cat(x1, 1), start, start + gap, rng), gap


def displacement(snapshots: Snapshots) -> float:
    """Root mean square displacement per coordinate under the exact coupling, over the kept intervals.

    Of snapshots with more than 1,000 cells an evenly spaced thousand stands for the whole.
    """
    squares = []
    for interval in snapshots.intervals():
        rows, columns = (_thin(len(x), x.device) for x in (interval.x0, interval.x1))
        m0, m1 = interval.mass0[rows], interval.mass1[columns]
        thinned = replace(interval, x0=interval.x0[rows], x1=interval.x1[columns], mass0=m0, mass1=m1)
        squares.append(blocked(thinned, torch.Generator(), block=DISPLACEMENT_CELLS).cost)
    return math.sqrt(sum(squares) / len(squares) / snapshots.dimension)


def default_sigma(snapshots: Snapshots, method: str) -> float:
    """Return the sigma of a method where none is given, from the kept snapshots alone.

    A bridge's is a diffusivity, ``BRIDGE_FRACTION`` of the rms displacement per root of the mean gap; the others' is
    a length, ``STRAIGHT_FRACTION`` of the rms displacement over the mean gap.
    """
    if method == "sb-cfm":
        return BRIDGE_FRACTION * displacement(snapshots) / math.sqrt(snapshots.mean_gap)
    return STRAIGHT_FRACTION * displacement(snapshots)


def make_path(snapshots: Snapshots, method: str, sigma: float) -> ProbabilityPath:
    """Return a method's probability path."""
    if method == "sb-cfm":
        if not sigma > 0:
            raise ValueError(f"expected a positive sigma for sb-cfm, found {sigma}; its limit at 0 is method='ot-cfm'")
        return BrownianBridge(sigma)
    if method == "vp-cfm":
        return Trigonometric(sigma, centre=torch.cat(snapshots.points).mean(0))
    return Straight(sigma)


def couple(interval: Interval, path: ProbabilityPath, method: str, rng: torch.Generator) -> Coupling:
    """Return a method's coupling of one interval; ``rng`` serves only where the whole plan does not fit."""
    if method == "ot-cfm":
        return blocked(interval, rng)
    if method == "sb-cfm":
        return entropic(interval, epsilon=2 * path.sigma**2 * interval.length)
    return independent(interval)


def make_problems(
    snapshots: Snapshots, *, method: str, sigma: float | None, seeds: Sequence[int], validate: bool
) -> tuple[list[Problem], list[Problem]]:
    """Put together the problems of members that share their snapshots: sigma, path and couplings, one per seed.

    Parameters
    ----------
    snapshots
        At least two; all else is computed from these (kept) snapshots alone.
    method
        ``"i-cfm"``: independent coupling, straight path. ``"ot-cfm"``: exact coupling (in blocks where snapshots are
        large), straight path. ``"sb-cfm"``: entropic coupling, Brownian bridge. ``"vp-cfm"``: independent coupling,
        trigonometric path. All after Tong et al. 2023, table 1.
    sigma
        Spread of the path in the user's units (a length; for ``"sb-cfm"`` a length per root of time); None for
        ``default_sigma``.
    seeds
        Of the members' own random streams.
    validate
        Whether to hold back a tenth of each snapshot's cells.

    Returns
    -------
    The problems to train on, and those of the held-back cells (none unless ``validate``).
    """
    if method not in METHODS:
        raise ValueError(f"expected a method of {METHODS}, found {method!r}")
    if len(snapshots) < 2:
        raise ValueError(f"expected at least two snapshots, found {len(snapshots)}; a flow runs between them")
    path = make_path(snapshots, method, default_sigma(snapshots, method) if sigma is None else sigma)
    rng = torch.Generator().manual_seed(0)  # blocks and held-back cells belong to the data, not to a member's stream
    parts = hold_back(snapshots, fraction=HELD_BACK, rng=rng) if validate else (snapshots,)
    problems: list[list[Problem]] = [[], []]
    for part, cells in zip(problems, parts):
        couplings = tuple(couple(interval, path, method, rng) for interval in cells.intervals())
        part.extend(Problem(cells, couplings, path, seed) for seed in seeds)
    return problems[0], problems[1]


def hold_back(snapshots: Snapshots, *, fraction: float, rng: torch.Generator) -> tuple[Snapshots, Snapshots]:
    """Split every snapshot's cells at random into those to train on and a ``fraction`` to validate on."""
    train, validation = [], []
    for x in snapshots.points:
        n = min(max(1, round(fraction * len(x))), len(x) - 1)
        order = torch.randperm(len(x), generator=rng).to(x.device)
        validation.append(order[:n].sort().values)
        train.append(order[n:].sort().values)
    first, second = (
        Snapshots(
            snapshots.times,
            tuple(x[rows] for x, rows in zip(snapshots.points, part)),
            tuple(m[rows] for m, rows in zip(snapshots.mass, part)),
        )
        for part in (train, validation)
    )
    return first, second


def _thin(n: int, device: torch.device) -> Tensor:
    return torch.linspace(0, n - 1, min(n, DISPLACEMENT_CELLS), device=device, dtype=torch.float64).round().long()
