"""The uncertainty of a benchmark's numbers: intervals of means, of differences between methods, and of skill.

Two things vary: the seed of a fit, and which cells were sampled. The held-out times are fixed: an interval refers to
the times in the data, not to other times.

Seeds
    The variance between the seeds' means, divided by their number.
Cells
    The variance over half-samples: half of every snapshot's cells, drawn without replacement, and the same ones for all
    methods, seeds and folds, whether they are held out or moved. If a method does not say which cells it moved, its
    restored cells count, by their position, as those of the snapshot before. For a mean over n cells, the variance of
    such halves about the whole is that of the mean itself, ``s^2/m (1 - m/n) = s^2/n`` at ``m = n/2``, so that no
    rescaling is needed (Shao & Wu 1989).
    Drawing n cells with replacement, the naive bootstrap, fails here. Cells drawn twice are pairs at distance zero,
    which pulls the U-statistics (energy, mmd) below their expectation; and W1 is then measured from the empirical
    measure, not from the law, which in many dimensions is a bias larger than the variation to be estimated. A
    half-sample contains no cell twice, so U-statistics stay unbiased. W1 is larger between fewer cells, but this bias
    is the same for all half-samples and cancels, since only their variation about their own mean counts. By the central
    limit theorem of W1 about its expectation, this variation falls as n^(-1/2) in any dimension (del Barrio & Loubes
    2019). If two laws are nearly the same, the U-statistics are degenerate and halves vary too much (by up to the root
    of 3): the interval is then too wide, never too narrow. For W1 it is a little too narrow, because between fewer
    cells W1 has a higher floor and responds less to a shift. For two methods with the same expected W1, the interval of
    the difference covered the true one in .9 of simulations (3 dimensions, 60 and 150 cells), that of their energy
    distances in .945 to .955. What an interval covers is the distance expected between as many cells as there are,
    which for W1 is larger than the distance between the laws.

Half-samples do not include the uncertainty of the fit itself: methods are not trained anew on fewer cells.

Both variances are added, and the interval is Student's, with degrees of freedom after Welch & Satterthwaite; with two
seeds it is wide. Without half-samples, no interval is given, because that of baselines, which have no seeds, would have
no width.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from ..flow.baselines import BASELINES
from ..flow.hold_out import NOISE_REFERENCE
from ._judge import POINT

LEVEL = 0.95
GROUP = ["data", "task", "strict", "start", "space", "metric"]
SUMMARY = [
    *GROUP, "method", "mean", "sd", "low", "high", "skill", "skill_low", "skill_high", "rank", "n_held_out", "n_seeds",
    "n_bootstraps",
]  # fmt: skip
PAIRED = [*GROUP, "method", "other", "difference", "low", "high", "n_held_out", "n_seeds", "n_bootstraps"]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Average a benchmark's table, with intervals, skill and, if there are intervals, ranks.

    Parameters
    ----------
    table
        Rows of `evaluate`, of any number of units.

    Returns
    -------
    One row per data set, task, ``strict``, start, space, metric and method. ``mean`` is taken over held-out snapshots,
    then seeds; ``sd`` is that between seeds; ``low`` and ``high`` are the 95 % interval of the mean. ``skill``, with
    ``skill_low`` and ``skill_high``, is (best baseline - method) / (best baseline - noise reference): 1 if only noise
    is left, 0 if the method is no better than the baseline that is best on average, and nan if no best baseline is
    clearly above the noise reference. ``rank`` is one more than the number of methods that are better beyond chance,
    with simultaneous intervals of all paired differences in a row's group (Bonferroni); methods that cannot be
    distinguished share a rank. The noise reference has no rank. Without half-samples, intervals, skill's intervals and
    ranks are nan.

    Skill and ranks of ``variance_ratio`` are computed from the absolute value of its logarithm, which is ideally 0.
    """
    rows = []
    for group, values in _groups(table):
        base = _best_baseline(values)
        noise = values[NOISE_REFERENCE].loss if NOISE_REFERENCE in values else None
        ranks = _ranks(values)
        for name, one in values.items():
            mean, low, high = one.raw.interval()
            found = {"mean": mean, "sd": one.raw.sd, "low": low, "high": high, "rank": ranks.get(name, np.nan)}
            found |= dict(zip(("skill", "skill_low", "skill_high"), _skill(one.loss, base, noise)))
            rows.append(group | {"method": name} | found | one.raw.sizes)
    return pd.DataFrame(rows, columns=SUMMARY)


def paired(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Compare methods in pairs on the same folds, seeds and half-samples.

    Parameters
    ----------
    table
        Rows of `evaluate`, of any number of units.
    metric
        One of the values in ``table["metric"]``.

    Returns
    -------
    One row per data set, task, ``strict``, start, space and pair of methods: ``difference`` is ``method`` minus
    ``other``, below zero if ``method`` is better, with its 95 % interval ``low`` to ``high``. For ``variance_ratio``
    it is the difference between absolute logarithms. The intervals are not simultaneous: one in twenty fails to cover.

    Raises
    ------
    ValueError
        If the table has no such metric.
    """
    there = list(table["metric"].unique())
    if metric not in there:
        raise ValueError(f"expected a metric of {', '.join(there)}, found {metric!r}")
    rows = []
    for group, values in _groups(table[table["metric"] == metric]):
        for (name, one), (other, two) in itertools.combinations(values.items(), 2):
            difference = one.loss.less(two.loss)
            if difference is None:  # no common fold and seed
                continue
            mean, low, high = difference.interval()
            found = {"method": name, "other": other, "difference": mean, "low": low, "high": high}
            rows.append(group | found | difference.sizes)
    return pd.DataFrame(rows, columns=PAIRED)


def leak(table: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Return what each method loses if the representation has not seen the held-out cells, in the common space.

    One row per data set, task, start and method that is present in both forms: ``leak`` is strict minus published, with
    its 95 % interval ``low`` to ``high`` (nan without half-samples). Both forms use the same half-samples and seeds.
    """
    rows = table[(table["metric"] == metric) & (table["space"] == "common")]
    where, out = ["data", "task", "start", "method"], []
    for key, own in rows.groupby(where, sort=False):
        forms = {bool(strict): _read(part, metric).raw for strict, part in own.groupby("strict")}
        difference = forms[True].less(forms[False]) if len(forms) == 2 else None
        if difference is not None:
            out.append(dict(zip(where, key)) | dict(zip(("leak", "low", "high"), difference.interval())))
    return pd.DataFrame(out, columns=[*where, "leak", "low", "high"])


# --- one method's numbers in one group
@dataclass(frozen=True)
class _Values:
    """Values of a method: held-out snapshots x seeds x half-samples, of which the first is the estimate from all cells.

    Attributes
    ----------
    values
        The values, ``(F, S, 1 + B)``.
    folds, seeds, halves
        Labels along the axes; ``halves`` without the first.
    """

    values: NDArray[np.float64]
    folds: tuple[Hashable, ...]
    seeds: tuple[Hashable, ...]
    halves: tuple[Hashable, ...]

    @property
    def mean(self) -> float:
        """Mean over held-out snapshots, then seeds."""
        return float(self.by_seed.mean())

    @property
    def by_seed(self) -> NDArray[np.float64]:
        """Mean over held-out snapshots, ``(S,)``."""
        return self.values[:, :, 0].mean(axis=0)

    @property
    def by_half(self) -> NDArray[np.float64]:
        """Deviation of each half-sample from their mean, ``(B,)``, in which the bias of fewer cells cancels."""
        halves = self.values[:, :, 1:].mean(axis=(0, 1))
        return halves - halves.mean() if len(halves) else halves

    @property
    def sd(self) -> float:
        """Standard deviation between seeds; nan if there is only one."""
        return float(self.by_seed.std(ddof=1)) if len(self.seeds) > 1 else float("nan")

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of held-out snapshots, seeds and half-samples."""
        return {"n_held_out": len(self.folds), "n_seeds": len(self.seeds), "n_bootstraps": len(self.halves)}

    def interval(self, level: float = LEVEL) -> tuple[float, float, float]:
        """Return the mean and its interval."""
        return _interval(self.mean, self.by_seed, self.by_half, level)

    def less(self, other: _Values) -> _Values | None:
        """Return the difference from another method where both have values; None if there is no such place."""
        two = self.matched(other)
        return None if two is None else _Values(two[0].values - two[1].values, *two[0].axes)

    def matched(self, *others: _Values) -> tuple[_Values, ...] | None:
        """Restrict methods to where all have values; return None if there is no such place."""
        every = (self, *others)
        axes = [
            tuple(sorted(set(one).intersection(*rest), key=list(one).index))
            for one, *rest in zip(*(v.axes for v in every))
        ]
        if not axes[0] or not axes[1]:
            return None
        cut = []
        for v in every:
            folds, seeds, halves = ([one.index(a) for a in axis] for one, axis in zip(v.axes, axes))
            values = v.values[np.ix_(folds, seeds, [0, *(1 + h for h in halves)])]
            cut.append(_Values(values, *axes))
        return tuple(cut)

    @property
    def axes(self) -> tuple[tuple[Hashable, ...], ...]:
        """Labels of folds, seeds and half-samples."""
        return self.folds, self.seeds, self.halves


@dataclass(frozen=True)
class _Method:
    """A method's values as measured, and as a loss, of which less is better."""

    raw: _Values
    loss: _Values


def _interval(
    mean: float, by_seed: NDArray[np.float64], by_half: NDArray[np.float64], level: float = LEVEL
) -> tuple[float, float, float]:
    """Return the mean with Student's interval from the variance between seeds and between half-samples."""
    if len(by_half) < 2:
        return mean, float("nan"), float("nan")
    parts = [(float(by_half.var(ddof=1)), len(by_half) - 1)]
    if len(by_seed) > 1:
        parts.append((float(by_seed.var(ddof=1)) / len(by_seed), len(by_seed) - 1))
    variance = sum(v for v, _ in parts)
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / sum(v**2 / df for v, df in parts)  # Welch & Satterthwaite
    margin = float(stats.t.ppf((1 + level) / 2, freedom)) * variance**0.5
    return mean, mean - margin, mean + margin


def _groups(table: pd.DataFrame) -> Iterator[tuple[dict[str, object], dict[str, _Method]]]:
    """Yield each group's columns and its methods' values; baselines, which have no start, are in every group."""
    where = [c for c in GROUP if c != "start"]
    for key, rows in table.groupby(where, sort=False):
        references = rows[rows["method"].isin([*BASELINES, NOISE_REFERENCE])]
        for start, own in rows.groupby("start", sort=False):
            elsewhere = references[~references["method"].isin(own["method"].unique())]
            first = elsewhere.groupby("method")["start"].transform("first")
            every = pd.concat([own, elsewhere[elsewhere["start"] == first]])
            group = dict(zip(where, key)) | {"start": start}
            metric = str(group["metric"])
            found = {str(name): _read(part, metric) for name, part in every.groupby("method", sort=False)}
            yield {c: group[c] for c in GROUP}, found


def _read(rows: pd.DataFrame, metric: str) -> _Method:
    """Arrange one method's rows; a time that is held out in several folds counts once per fold."""
    same = ["held_out", "seed", "bootstrap"]
    rows = rows.assign(fold=list(zip(rows["held_out"], rows.groupby(same).cumcount())))
    wide = rows.pivot(index=["fold", "seed"], columns="bootstrap", values="value").sort_index()
    folds, seeds = (tuple(wide.index.get_level_values(n).unique()) for n in range(2))
    complete = pd.MultiIndex.from_product([folds, seeds])
    if POINT not in wide.columns or len(wide) < len(complete):
        raise ValueError(
            f"expected every held-out snapshot with every seed, found {len(wide)} of {len(complete)} of "
            f"{rows['method'].iloc[0]}; evaluate the whole unit"
        )
    halves = tuple(int(b) for b in wide.columns if b != POINT and not wide[b].isna().any())
    values = wide.loc[complete, [POINT, *halves]].to_numpy().reshape(len(folds), len(seeds), -1)
    raw = _Values(values, folds, seeds, halves)
    loss = np.abs(np.log(values)) if metric == "variance_ratio" else values
    return _Method(raw, _Values(loss, *raw.axes))


# --- skill and ranks
def _best_baseline(values: dict[str, _Method]) -> _Values | None:
    there = [values[name].loss for name in BASELINES if name in values]
    if any(np.isnan(one.mean) for one in there):  # if a value is unknown, so is which is best
        return None
    return min(there, key=lambda v: v.mean, default=None)


def _skill(method: _Values, base: _Values | None, noise: _Values | None) -> tuple[float, float, float]:
    """Return (base - method) / (base - noise), and its interval by the delta method."""
    nan = float("nan")
    matched = None if base is None or noise is None else method.matched(base, noise)
    if matched is None:
        return nan, nan, nan
    method, base, noise = matched
    possible = base.less(noise)
    assert possible is not None  # they are matched
    room, low, _ = possible.interval()
    if not room > 0 or low <= 0:  # nan (without half-samples) does not count here
        return nan, nan, nan
    skill = (base.mean - method.mean) / room

    def influence(part: str) -> NDArray[np.float64]:
        b, m, n = (getattr(v, part) for v in (base, method, noise))
        return ((1 - skill) * b - m + skill * n) / room  # d skill = (db - dm - skill (db - dn)) / room

    return _interval(skill, influence("by_seed"), influence("by_half"))


def _ranks(values: dict[str, _Method]) -> dict[str, float]:
    """Return one more than the number of methods that are better beyond chance, in simultaneous comparisons."""
    names = [name for name in values if name != NOISE_REFERENCE]
    n_pairs = max(1, len(names) * (len(names) - 1) // 2)
    better = dict.fromkeys(names, 0)
    unknown: set[str] = set()
    for one, two in itertools.combinations(names, 2):
        difference = values[one].loss.less(values[two].loss)
        low, high = (np.nan, np.nan) if difference is None else difference.interval(1 - (1 - LEVEL) / n_pairs)[1:]
        if np.isnan(low):
            unknown |= {one, two}
        better[one] += low > 0
        better[two] += high < 0
    if len(names) == 1 and np.isnan(values[names[0]].loss.interval()[1]):
        unknown |= set(names)
    return {name: np.nan if name in unknown else 1.0 + better[name] for name in names}
