"""A branching, growing population whose velocity and growth are known."""

from collections.abc import Sequence
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

# The landscape. z = (p, b): progress along the lineage and the side of the branch, in arbitrary latent units.
_DRIFT_END, _DRIFT_EXTRA, _DRIFT_DECAY = 0.45, 0.45, 3.0  # progress per unit of time; its excess at t = 0 decays
_SPLIT, _SPLIT_WIDTH = 1.2, 0.25  # the progress at which the ridge between the fates rises, and how gradually
_PARTING, _RIDGE = 0.5, 0.25  # how fast the fates move apart per unit of time, and the half-width of the ridge
_GROWTH_MEAN, _GROWTH_CONTRAST = 0.15, 0.08  # per unit of time; fate B divides faster than fate A
_START_SD = 0.22  # standard deviation of the progenitors around the origin
_COMMITTED = 0.6  # |b| beyond which a cell is labelled by its fate
_STEP = 0.05  # step of RK4; the error over the default times is below 1e-6
_MIN_CELLS = 3  # per snapshot
_DISPERSION, _MEAN_COUNT, _LIBRARY_SD = 0.03, 6.0, 0.2  # of the negative binomial counts
_SWITCH = 2.2  # half the width of a gene's response, in latent units


def simulated_differentiation(
    n_cells: int = 1500,
    *,
    times: Sequence[float] = (0.0, 1.0, 2.5, 3.5, 5.5, 7.0),
    n_genes: int = 150,
    n_pcs: int = 10,
    rng: int | np.random.Generator = 0,
) -> ad.AnnData:
    """Simulate snapshots of a population that differentiates into two fates and grows.

    Progenitors progress along p until a ridge rises between them, and then part to its sides, b < 0 (fate A) and b > 0
    (fate B). They follow the deterministic flow of :func:`differentiation_velocity` and differ only in where they
    start. Mass grows by :func:`differentiation_growth`, faster in fate B. Every snapshot has its own cells, drawn in
    proportion to the mass along their paths, and its number of cells follows the population's mass.

    Parameters
    ----------
    n_cells
        Total number of cells in all snapshots; each snapshot has at least 3.
    times
        Times of the snapshots in days, strictly increasing. The progenitors start at the first one. The defaults are
        unevenly spaced and span the branching, which happens at about day 2.
    n_genes
        Number of genes.
    n_pcs
        Number of principal components of `X`; at most `n_genes` and fewer than `n_cells`.
    rng
        Seed or generator. The same seed gives the same cells, bit for bit on one machine.

    Returns
    -------
    AnnData of `n_cells` x `n_genes`, ordered by time, with

    - `X`, float32: log1p of the counts, scaled to the median total count
    - `layers["counts"]`, sparse float32: negative binomial counts, whose means are smooth functions of the latent state
    - `obsm["X_latent"]`, n_obs x 2, float32: the true state (p, b)
    - `obsm["velocity_latent"]`, n_obs x 2, float32: its true velocity, per day
    - `obsm["X_pca"]`, n_obs x n_pcs, with `varm["PCs"]` and `uns["pca"]`: principal components of `X`
    - `obs["time"]`, float64, in days; `obs["day"]`, ordered categorical: the same times as text ("D0", "D2.5")
    - `obs["fate"]`, categorical: "progenitor" while abs(b) <= 0.6, then "A" or "B"
    - `obs["growth_rate"]`, float64: the true log mass change rate, per day
    - `uns["simulation"]`: the arguments, and the population's `mass` at each time relative to the first

    Raises
    ------
    ValueError
        If the times are not finite and strictly increasing, or a number is too small for the others.

    Examples
    --------
    >>> adata = simulated_differentiation(300)
    >>> adata.obs["day"].cat.categories.tolist()
    ['D0', 'D1', 'D2.5', 'D3.5', 'D5.5', 'D7']
    """
    when = _checked_times(times)
    _check_sizes(n_cells, len(when), n_genes, n_pcs)
    seed = {} if isinstance(rng, np.random.Generator) else {"seed": int(rng)}
    rng = np.random.default_rng(rng)

    mass = _population_mass(when, rng)
    sizes = _snapshot_sizes(n_cells, mass)
    latent = np.concatenate([_draw_snapshot(n, when[0], t, rng) for n, t in zip(sizes, when)])  # n_cells x 2
    time = np.repeat(when, sizes)
    counts = _draw_counts(latent, n_genes, rng)

    arguments = {"n_cells": n_cells, "n_genes": n_genes, "n_pcs": n_pcs, "times": when} | seed
    labels = [f"D{t:g}" for t in when]
    adata = ad.AnnData(
        X=_log_normalised(counts),
        obs=pd.DataFrame(
            {
                "time": time,
                "day": pd.Categorical(np.repeat(labels, sizes), categories=labels, ordered=True),
                "fate": _fates(latent),
                "growth_rate": differentiation_growth(time, latent),
            },
            index=[f"cell_{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"gene_{j}" for j in range(n_genes)]),
        obsm={
            "X_latent": latent.astype(np.float32),
            "velocity_latent": differentiation_velocity(time, latent).astype(np.float32),
        },
        layers={"counts": sparse.csr_matrix(counts, dtype=np.float32)},
        uns={"simulation": arguments | {"mass": mass}},
    )
    import scanpy as sc  # takes seconds to load, and courses do not need it

    # a full decomposition in float64: in float32, close eigenvalues of the noise would rotate the last components
    sc.pp.pca(adata, n_comps=n_pcs, svd_solver="full", dtype="float32")
    adata.X = adata.X.astype(np.float32)
    params = adata.uns["pca"]["params"]
    adata.uns["pca"]["params"] = {k: v for k, v in params.items() if v is not None}  # older anndata cannot write None
    return adata


def differentiation_velocity(t: ArrayLike, z: ArrayLike) -> NDArray[np.float64]:
    r"""Compute the true velocity of :func:`simulated_differentiation`.

    The field is a gradient, so it has no rotation: :math:`f(t, z) = -\nabla U(t, z)` with the landscape
    :math:`U(t, p, b) = -c(t)\, p - k\, a(p)\, w \log\cosh(b / w)`. It consists of a slope :math:`c(t)` that flattens
    in time and a ridge of half-width :math:`w` along b = 0 that rises from zero, :math:`a = 0`, to its final height,
    :math:`a = 1`.

    Parameters
    ----------
    t
        Time in days, a scalar or one per state.
    z
        States (p, b), ... x 2.

    Returns
    -------
    Velocities per day, ... x 2.
    """
    p, b = np.moveaxis(np.asarray(z, dtype=np.float64), -1, 0)
    risen = 0.5 + 0.5 * np.tanh(0.5 * (p - _SPLIT) / _SPLIT_WIDTH)  # a(p), the logistic function
    slope = risen * (1 - risen) / _SPLIT_WIDTH  # a'(p)
    drift = _DRIFT_END + _DRIFT_EXTRA * np.exp(-np.asarray(t) / _DRIFT_DECAY)  # c(t)
    log_cosh = np.logaddexp(b / _RIDGE, -b / _RIDGE) - np.log(2)
    # -dU/dp = c + k a' w log cosh(b / w),  -dU/db = k a tanh(b / w)
    return np.stack([drift + _PARTING * slope * _RIDGE * log_cosh, _PARTING * risen * np.tanh(b / _RIDGE)], axis=-1)


def differentiation_growth(t: ArrayLike, z: ArrayLike) -> NDArray[np.float64]:
    """Compute the true growth of :func:`simulated_differentiation`, the log mass change rate, constant in time.

    Parameters
    ----------
    t
        Time in days, a scalar or one per state.
    z
        States (p, b), ... x 2.

    Returns
    -------
    Rates per day, of the shape of `z` without its last axis.
    """
    b = np.asarray(z, dtype=np.float64)[..., 1]
    return _GROWTH_MEAN + _GROWTH_CONTRAST * np.tanh(2 * b) + np.zeros_like(np.asarray(t, dtype=np.float64))


def _checked_times(times: Sequence[float]) -> NDArray[np.float64]:
    when = np.asarray(times, dtype=np.float64)
    if when.ndim != 1 or len(when) < 2 or not np.isfinite(when).all() or (np.diff(when) <= 0).any():
        raise ValueError(
            f"times must be two or more finite numbers in strictly increasing order, found {times!r}. "
            "Sort them and drop duplicates and missing values."
        )
    return when


def _check_sizes(n_cells: int, n_times: int, n_genes: int, n_pcs: int) -> None:
    if n_cells < _MIN_CELLS * n_times:
        raise ValueError(
            f"n_cells must be at least {_MIN_CELLS} per snapshot, {_MIN_CELLS * n_times} for {n_times} times, "
            f"found {n_cells}. Ask for more cells or fewer times."
        )
    if not 1 <= n_pcs <= min(n_genes, n_cells - 1):
        raise ValueError(
            f"n_pcs must be between 1 and {min(n_genes, n_cells - 1)} for n_genes={n_genes} and n_cells={n_cells}, "
            f"found {n_pcs}. Ask for fewer components or more genes."
        )


def _flow(z: NDArray, t0: float, t1: float) -> tuple[NDArray, NDArray]:
    """Move cells at z (n x 2) from t0 to t1 by RK4; return their states and the log of the mass (n) each has become."""
    log_mass = np.zeros(len(z))
    n_steps = int(np.ceil((t1 - t0) / _STEP))
    for i in range(n_steps):
        h = (t1 - t0) / n_steps
        t = t0 + i * h
        k1 = differentiation_velocity(t, z)
        k2 = differentiation_velocity(t + h / 2, z + h / 2 * k1)
        k3 = differentiation_velocity(t + h / 2, z + h / 2 * k2)
        k4 = differentiation_velocity(t + h, z + h * k3)
        after = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        middle = (z + after) / 2 + h / 8 * (k1 - differentiation_velocity(t + h, after))  # Hermite, third order
        g0, g1, g2 = (differentiation_growth(t, y) for y in (z, middle, after))
        log_mass += h / 6 * (g0 + 4 * g1 + g2)  # int g dt along the path, by Simpson's rule
        z = after
    return z, log_mass


def _progenitors(n: int, rng: np.random.Generator) -> NDArray:
    return _START_SD * rng.standard_normal((n, 2))


def _population_mass(times: NDArray, rng: np.random.Generator, n: int = 2000) -> NDArray:
    """Compute the mass at each time relative to the first: the mean of exp(int g dt) over `n` progenitors."""
    z, log_mass, mass = _progenitors(n, rng), np.zeros(n), [1.0]
    for t0, t1 in pairwise(times):
        z, gained = _flow(z, t0, t1)
        log_mass += gained
        mass.append(float(np.exp(log_mass).mean()))
    return np.array(mass)


def _snapshot_sizes(n_cells: int, mass: NDArray) -> NDArray[np.int64]:
    """Return numbers of cells that sum to `n_cells`: the minimum plus a share in proportion to the mass."""
    spare = n_cells - _MIN_CELLS * len(mass)
    ends = np.rint(spare * np.concatenate([[0.0], np.cumsum(mass) / mass.sum()])).astype(np.int64)
    return _MIN_CELLS + np.diff(ends)


def _draw_snapshot(n: int, t0: float, t1: float, rng: np.random.Generator) -> NDArray:
    """Draw `n` independent cells of the grown population at t1: n x 2, by rejection."""
    most = (_GROWTH_MEAN + _GROWTH_CONTRAST) * (t1 - t0)  # no path gains more log mass than this
    kept = np.empty((0, 2))
    while len(kept) < n:
        z, log_mass = _flow(_progenitors(4 * n, rng), t0, t1)
        kept = np.concatenate([kept, z[np.log(rng.random(len(z))) < log_mass - most]])
    return kept[:n]


def _fates(latent: NDArray) -> pd.Categorical:
    b = latent[:, 1]
    names = np.where(np.abs(b) <= _COMMITTED, "progenitor", np.where(b < 0, "A", "B"))
    return pd.Categorical(names, categories=["progenitor", "A", "B"])


def _draw_counts(latent: NDArray, n_genes: int, rng: np.random.Generator) -> NDArray:
    """Draw negative binomial counts, n x n_genes; a gene's log mean is a sigmoid along a random latent direction."""
    angle = rng.uniform(0, 2 * np.pi, n_genes)
    threshold = np.array([2.2, 0.0]) + np.array([1.6, 1.4]) * rng.standard_normal((n_genes, 2))  # where it switches
    height = rng.gamma(4.0, 0.5, n_genes)
    along = ((latent[:, None, :] - threshold) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)).sum(-1)
    level = np.log(_MEAN_COUNT) + rng.normal(0, 0.8, n_genes)
    log_mean = level + 0.5 * height * np.tanh(along / _SWITCH)  # n x n_genes
    library = np.exp(_LIBRARY_SD * rng.standard_normal((len(latent), 1)))
    # a Poisson whose rate is Gamma distributed: variance = mean + dispersion * mean^2
    return rng.poisson(rng.gamma(1 / _DISPERSION, _DISPERSION * library * np.exp(log_mean)))


def _log_normalised(counts: NDArray) -> NDArray[np.float64]:
    total = counts.sum(1, keepdims=True)
    return np.log1p(counts * (np.median(total) / np.maximum(total, 1)))
