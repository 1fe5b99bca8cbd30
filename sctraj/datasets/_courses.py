"""Families of simulated time courses with known truth, each difficult in its own way."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import anndata as ad
import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ._simulated import _checked_times

Family = Literal["branching", "cycle", "fast-phase", "crossing", "high-dimensional", "switch"]

_STEP = 0.02  # largest step of the midpoint rule, in days
_AT_ONCE = 2**13  # cells that one processor moves at once
_SURPLUS = 4  # simulated cells per drawn cell; those with more mass are drawn more often
_MIN_CELLS = 3  # per snapshot
# root mean squares of the sample effects of size 1: in mean gaps, in log mass, in standard deviations of the noise
_AGE, _PREFERENCE, _SHIFT = 0.1, 0.5, 0.25


def _no_growth(t: float, z: NDArray) -> NDArray:
    return np.zeros(len(z))


@dataclass(frozen=True)
class _Course:
    """The model of one family: how latent states z (n x k) move, grow and diffuse, and how they are observed."""

    times: tuple[float, ...]  # in days; the population starts at 0
    start: Callable[[int, np.random.Generator], NDArray]
    velocity: Callable[[float, NDArray], NDArray]  # with diffusion, the drift
    noise: NDArray  # standard deviation of the noise in each observed dimension
    growth: Callable[[float, NDArray], NDArray] = _no_growth  # log mass change rate
    diffusion: float = 0.0  # length per square root of time
    curvature: float = 0.0  # amplitude of the waves of the surface on which the latent states are observed


def simulated_course(
    family: Family,
    n_cells: int = 2000,
    *,
    times: Sequence[float] | None = None,
    sample_effects: float = 0.0,
    rng: int | np.random.Generator = 0,
) -> ad.AnnData:
    """Simulate snapshots of a population with one of several kinds of dynamics.

    Every snapshot has its own cells, drawn in proportion to the mass along their paths. All snapshots have the same
    number of cells (or one more), as with a fixed load of a sequencer, so that numbers of cells say nothing about
    growth. A random isometry maps the latent states into the observed space, where each dimension gets its own normal
    noise.

    Parameters
    ----------
    family
        ``"branching"``: two fates part; one grows, the other dwindles. ``"cycle"``: cells move round a ring.
        ``"fast-phase"``: slow movement, then a quick turn, then slow movement again, at uneven times. ``"crossing"``:
        two lineages pass through each other and swap sides; a marker tells them apart. ``"high-dimensional"``: the
        branching course with a third coordinate, on a surface that bends into 6 of 50 dimensions, with more noise.
        ``"switch"``: two genes that repress each other and a clock that drives them apart, all with intrinsic noise.
    n_cells
        Total number of cells in all snapshots; at least 3 per snapshot.
    times
        Times of the snapshots in days, two or more, strictly increasing. The population starts at 0, and the first
        snapshot is taken then or later. By default, each family has its own times.
    sample_effects
        How much snapshots differ in ways other than their time, as cultures and animals do; 0 means not at all. At 1, a
        sample's age is off by a tenth of the mean gap (but never below 0), parts of it are over- or under-sampled by a
        factor of about 1.5, and all its cells are shifted together by a quarter of the noise in every observed
        dimension. These are standard deviations (for the factor, of its logarithm) and proportional to
        `sample_effects`.
    rng
        Seed or generator. The isometry depends on it as well.

    Returns
    -------
    AnnData of `n_cells` x 5 (50 for ``"high-dimensional"``) dimensions, ordered by time, with

    - `X` and `obsm["X_pca"]`, float32: the observed coordinates
    - `obsm["X_latent"]`, float32, in 2 or 3 dimensions: the states without noise and shift
    - `obsm["drift_latent"]`, float32: their drift at the snapshot's time, per day; without diffusion (all families
      except ``"switch"``) this is their velocity
    - `obs["time"]`, float64, in days
    - `obs["growth_rate"]`, float64: the true log mass change rate, per day; 0 except for ``"branching"`` and
      ``"high-dimensional"``
    - `varm["latent_axes"]`, float64: the isometry, with a column for each latent dimension, then those they bend into
    - `uns["simulation"]`: the arguments

    Raises
    ------
    ValueError
        If the family is unknown, there are too few cells, times are not finite and strictly increasing from 0 or
        later, or `sample_effects` is negative or not finite.

    Examples
    --------
    >>> adata = simulated_course("crossing", 300)
    >>> adata.shape, adata.obs["time"].unique().tolist()
    ((300, 5), [0.0, 1.0, 2.0, 3.0, 4.0])
    """
    course, when = _checked_course(family, n_cells, times, sample_effects)
    seed = {} if isinstance(rng, np.random.Generator) else {"seed": int(rng)}
    rng = np.random.default_rng(rng)

    sizes = np.diff(np.round(np.linspace(0, n_cells, len(when) + 1)).astype(int))
    ages = np.maximum(when + sample_effects * _AGE * np.diff(when).mean() * rng.standard_normal(len(when)), 0)
    preference = sample_effects * _PREFERENCE
    latent = np.concatenate([_snapshot(course, n, t, preference, rng) for n, t in zip(sizes, ages)])
    time = np.repeat(when, sizes)
    shift = sample_effects * _SHIFT * course.noise * rng.standard_normal((len(when), len(course.noise)))
    axes = _isometry(course, latent.shape[1], rng)
    noise = course.noise * rng.standard_normal((n_cells, len(course.noise)))
    observed = (_seen(course, latent, axes) + noise + np.repeat(shift, sizes, axis=0)).astype(np.float32)
    by_time = [(t, time == t) for t in when]
    arguments = {"family": family, "n_cells": n_cells, "times": when, "sample_effects": float(sample_effects)}
    return ad.AnnData(
        X=observed,
        obs=pd.DataFrame(
            {"time": time, "growth_rate": np.concatenate([course.growth(t, latent[own]) for t, own in by_time])},
            index=[f"cell_{i}" for i in range(n_cells)],
        ),
        obsm={
            "X_pca": observed.copy(),
            "X_latent": latent.astype(np.float32),
            "drift_latent": np.concatenate([course.velocity(t, latent[own]) for t, own in by_time]).astype(np.float32),
        },
        varm={"latent_axes": axes},
        uns={"simulation": arguments | seed},
    )


def _checked_course(
    family: Family, n_cells: int, times: Sequence[float] | None, sample_effects: float
) -> tuple[_Course, NDArray[np.float64]]:
    """Return the family's course and the times of the snapshots."""
    if family not in get_args(Family):
        raise ValueError(f"family must be one of {', '.join(get_args(Family))}, found {family!r}. Choose one of these.")
    course = _COURSES[family]
    when = _checked_times(course.times if times is None else times).copy()
    if when[0] < 0:
        raise ValueError(f"times must be 0 or later, when the population starts, found {times!r}. Shift or drop them.")
    if n_cells < _MIN_CELLS * len(when):
        raise ValueError(
            f"n_cells must be at least {_MIN_CELLS} per snapshot, {_MIN_CELLS * len(when)} for {len(when)} times, "
            f"found {n_cells}. Ask for more cells or fewer times."
        )
    if not 0 <= sample_effects < np.inf:
        raise ValueError(
            f"sample_effects must be a finite number, 0 or more, found {sample_effects!r}. "
            "Pass 0 for snapshots that differ by their time alone."
        )
    return course, when


def _snapshot(course: _Course, n: int, t: float, preference: float, rng: np.random.Generator) -> NDArray:
    """Draw cells in proportion to their mass at ``t``, with a possible preference for some places; states n x k."""
    z, log_mass = _moved(course, course.start(_SURPLUS * n, rng), 0.0, t, rng)
    # a random plane wave over the latent states, about 4 of their standard deviations long: which parts are preferred
    wave = rng.standard_normal(z.shape[1]) / z.std(0)
    log_mass += preference * np.sqrt(2) * np.sin(z @ wave + rng.uniform(0, 2 * np.pi))
    mass = np.exp(log_mass - log_mass.max())
    # Without replacement, cell i is drawn with probability 1 - exp(-c p_i) for large n. So p_i = mass_i would favour
    # light cells, and p_i = -log(1 - chance_i) is correct. Only strong sample effects need the bound.
    chance = np.minimum(n * mass / mass.sum(), 0.99)
    p = -np.log1p(-chance)
    return z[rng.choice(len(z), n, replace=False, p=p / p.sum())]


def _moved(
    course: _Course, z: NDArray, t0: float, t1: float, rng: np.random.Generator
) -> tuple[NDArray, NDArray[np.float64]]:
    """Move cells at ``z`` from ``t0`` to ``t1``, either way; return their states, n x k, and gains of log mass."""
    if not course.diffusion and len(z) > _AT_ONCE:  # cells move independently of each other
        with ThreadPoolExecutor(joblib.cpu_count()) as threads:
            cells = np.array_split(z, len(z) // _AT_ONCE + 1)
            parts = list(threads.map(lambda some: _moved(course, some, t0, t1, rng), cells))
        return np.concatenate([z for z, _ in parts]), np.concatenate([log_mass for _, log_mass in parts])
    log_mass = np.zeros(len(z))
    steps = int(np.ceil(abs(t1 - t0) / _STEP))
    for k in range(steps):
        now, h = t0 + k * (t1 - t0) / steps, (t1 - t0) / steps
        half = z + h / 2 * course.velocity(now, z)  # the midpoint rule, second order without diffusion
        z = z + h * course.velocity(now + h / 2, half)
        log_mass += h * course.growth(now + h / 2, half)
        if course.diffusion:
            z = z + course.diffusion * np.sqrt(h) * rng.standard_normal(z.shape)
    return z, log_mass


def _isometry(course: _Course, k: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw orthonormal columns, d x k for the latent states or, if they fit, d x 2k to include their bend."""
    d = len(course.noise)
    return np.linalg.qr(rng.standard_normal((d, 2 * k if d >= 2 * k else k)))[0]


def _seen(course: _Course, latent: NDArray, axes: NDArray) -> NDArray:
    """Map latent states into the observed space, bent by ``curvature``."""
    k = latent.shape[1]
    observed = latent @ axes.T[:k]
    if course.curvature:
        observed = observed + course.curvature * np.sin(latent) @ axes.T[k : 2 * k]
    return observed


def carried(adata: ad.AnnData, time: float, to: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move a simulated snapshot's cells to another time by the true dynamics, as a perfect field would.

    Every cell keeps its own noise and its sample's shift.

    Parameters
    ----------
    adata
        From `simulated_course`, of a family without diffusion.
    time, to
        The snapshot's time and the other time, earlier or later, in days.

    Returns
    -------
    Observed coordinates ``(n, d)`` and the factor by which each cell's mass has changed, ``(n,)``.

    Raises
    ------
    ValueError
        If the family has diffusion, so that its cells have no unique destination.
    """
    course = _COURSES[adata.uns["simulation"]["family"]]
    if course.diffusion:
        raise ValueError(
            f"expected a family in which nothing diffuses, found {adata.uns['simulation']['family']!r}; take another"
        )
    own = (adata.obs["time"] == time).to_numpy()
    latent, axes = adata.obsm["X_latent"][own].astype(np.float64), adata.varm["latent_axes"]
    there, log_mass = _moved(course, latent, time, to, np.random.default_rng(0))  # nothing is drawn from it
    return adata.obsm["X_pca"][own] - _seen(course, latent, axes) + _seen(course, there, axes), np.exp(log_mass)


def _sigmoid(x: NDArray) -> NDArray:
    return 0.5 + 0.5 * np.tanh(x / 2)


# --- branching: z = (progress, side); at progress 1 the sides part, side > 0 grows and side < 0 dwindles
def _branching_start(n: int, rng: np.random.Generator) -> NDArray:
    return np.array([0.25, 0.2]) * rng.standard_normal((n, 2))


def _branching_velocity(t: float, z: NDArray) -> NDArray:
    p, b = z.T
    risen = _sigmoid((p - 1.0) / 0.2)
    return np.stack([1.0 - 0.3 * risen, 0.8 * risen * np.tanh(b / 0.2)], 1)


def _branching_growth(t: float, z: NDArray) -> NDArray:
    return 0.35 * np.tanh(2 * z[:, 1])


# --- cycle: an attracting ring of radius 1.5, once round in 7 days
def _cycle_start(n: int, rng: np.random.Generator) -> NDArray:
    angle, radius = 0.5 * rng.standard_normal(n), 1.5 + 0.1 * rng.standard_normal(n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _cycle_velocity(t: float, z: NDArray) -> NDArray:
    radius = np.linalg.norm(z, axis=1, keepdims=True)
    turned = np.stack([-z[:, 1], z[:, 0]], 1)
    return 0.9 * turned + (1.5 - radius) * z / radius


# --- fast phase: a slow drift along the first axis, a quick turn into the second around day 1.7; the third spreads
def _fast_start(n: int, rng: np.random.Generator) -> NDArray:
    return np.array([0.3, 0.3, 0.2]) * rng.standard_normal((n, 3))


def _fast_velocity(t: float, z: NDArray) -> NDArray:
    burst = 2.2 * np.exp(-(((t - 2.0 + 0.5 * z[:, 0]) / 0.4) ** 2))  # cells that are ahead turn earlier
    spread = 0.25 * z[:, 2]
    return np.stack([np.full(len(z), 0.3), burst, spread], 1)


# --- crossing: z = (progress, side, marker); lineages swap sides, and the marker tells them apart
def _crossing_start(n: int, rng: np.random.Generator) -> NDArray:
    lineage = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    z = np.array([0.25, 0.25, 0.2]) * rng.standard_normal((n, 3))
    return z + np.stack([np.zeros(n), 1.6 * lineage, 0.6 * lineage], 1)


def _crossing_velocity(t: float, z: NDArray) -> NDArray:
    return np.stack([np.full(len(z), 0.4), -0.8 * np.tanh(z[:, 2] / 0.2), np.zeros(len(z))], 1)


# --- high-dimensional: the branching course, twice as large, with a third, oscillating coordinate
def _high_start(n: int, rng: np.random.Generator) -> NDArray:
    return np.concatenate([2.0 * _branching_start(n, rng), 0.4 * rng.standard_normal((n, 1))], 1)


def _high_velocity(t: float, z: NDArray) -> NDArray:
    planar = 2.0 * _branching_velocity(t, z[:, :2] / 2.0)
    return np.concatenate([planar, 1.2 * np.cos(0.8 * z[:, :1])], 1)


# --- switch: z = (gene, gene, clock); the genes repress each other, and the clock drives them apart from day 1.4 on
def _switch_start(n: int, rng: np.random.Generator) -> NDArray:
    return np.array([0.9, 0.9, 0.0]) + 0.15 * rng.standard_normal((n, 3))


def _switch_velocity(t: float, z: NDArray) -> NDArray:
    a, b, c = np.maximum(z, 0).T
    drive = 1.0 + 1.8 * _sigmoid((c - 1.0) / 0.3)
    return np.stack([drive / (1 + b**3) - a, drive / (1 + a**3) - b, 0.8 - 0.15 * c], 1)


def _noise(d: int, first: float, last: float) -> NDArray:
    return np.geomspace(first, last, d)


_COURSES = {
    "branching": _Course(
        (0.0, 1.0, 2.0, 3.0, 4.0), _branching_start, _branching_velocity, _noise(5, 0.2, 0.2), _branching_growth
    ),
    "cycle": _Course((0.0, 1.0, 2.0, 3.5, 4.5, 6.0), _cycle_start, _cycle_velocity, _noise(5, 0.2, 0.2)),
    "fast-phase": _Course((0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0), _fast_start, _fast_velocity, _noise(5, 0.2, 0.2)),
    "crossing": _Course((0.0, 1.0, 2.0, 3.0, 4.0), _crossing_start, _crossing_velocity, _noise(5, 0.15, 0.15)),
    "high-dimensional": _Course(
        (0.0, 1.0, 2.0, 3.0, 4.0), _high_start, _high_velocity, _noise(50, 0.7, 0.35),
        lambda t, z: _branching_growth(t, z / 2.0), curvature=0.8,
    ),
    "switch": _Course(
        (0.0, 1.0, 2.0, 3.0, 4.5, 6.0), _switch_start, _switch_velocity, _noise(5, 0.15, 0.15), diffusion=0.25
    ),
}  # fmt: skip
