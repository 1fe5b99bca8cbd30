"""Measure how well a flow restores snapshots that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch

from .. import _adata
from .._log import logger
from ..flow import hold_out
from ..flow.baselines import BASELINES
from ..flow.fields import FieldKind, distinct_seeds, farther_shares, make_field
from ..flow.flow_matching import Training, pick_device
from ..flow.integrate import AS_PUBLISHED
from ..flow.judgement import Judgement, judge_all
from ..flow.plans import Frame, Plans
from ..flow.problem import METHODS, WITH_PATH, check_method
from ..flow.restoration import Restoration
from ..flow.starts import Start
from ._doubts import say_doubts
from ._field import check_field, check_jitter, finds_kin, fit_record, path_name, warn_of_unused
from ._fit_flow import Path
from ._seeds import member_seeds, seed_of
from ._verdict import about_estimates, mean_energies, say_if_another_fit, say_what_tells_nothing

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import Tensor, nn

    from .._adata import Cells
    from ..flow.snapshots import Snapshots
    from ..flow.vector_field import VectorField

# least number of cells in a held-out snapshot for which distances are informative: two halves of so many, normal in 5
# dimensions, have an energy distance of 0 +- 0.2 standard deviations of a coordinate; two halves of 4, 0 +- 1.2
TELLING = 20
STARTS = {
    "both": "all cells of the snapshots before and after the held-out one, weighted by nearness in time; those farther "
    "out on a side each weigh farther times the next nearer one",
    "before": "all cells of the snapshot before the held-out one",
}


def leave_one_out(
    adata: AnnData,
    time_key: str = "time",
    *,
    use_rep: str = "X_pca",
    methods: Sequence[str] = ("uot-cfm",),
    path: Path | None = None,
    field: FieldKind = "neural",
    growth_key: str | None = None,
    frame: Frame = "fixed",
    start: Start = "both",
    jitter: float = 0.0,
    n_seeds: int = 5,
    sigma: float | None = None,
    block: int | None = None,
    module: nn.Module | None = None,
    width: int = 64,
    depth: int = 3,
    n_steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 5e-3,
    weight_decay: float = 1e-5,
    ema_decay: float = 0.99,
    patience: int | None = None,
    device: str = "auto",
    rng: int | np.random.Generator = 0,
    progress: bool = False,
    key_added: str = "flow",
    copy: bool = False,
) -> AnnData | None:
    """Hold out every interior snapshot in turn, restore it, and measure how far off the restoration is.

    For each interior snapshot t, train without it, move all observed cells of the snapshots before and after t to its
    time along the flow (Euler, 100 steps per gap, in real time), and compare them with all observed cells of t. With
    ``start="before"``, only the snapshot before is moved; this is the published protocol (Tong et al. 2023, section
    5.2). All folds and seeds of a method are trained in one batch.

    Restored cells carry masses. At the fraction ``s`` of the gap, the cells from before weigh ``1 - s`` in total and
    those from after weigh ``s``; if the flow has growth, each cell gains or loses mass on its way. Distances are
    weighted by these masses; ``w1_unweighted`` and ``energy_unweighted`` weight all restored cells alike.
    ``energy_about_mean`` is the energy distance with both populations centred at their own means. The excess of
    ``energy`` over it shows that the restored population is off as a whole, as when a sample has an age or a batch of
    its own; a composition of its own affects both. For clusters that are far apart, ``energy_about_mean`` is above zero
    even between two samples of one law, so compare it with that of the noise reference.

    The held-out cells enter no coupling, no sigma, no scaling and no weight. But a representation computed on all
    cells (a PCA, a standardisation) has itself seen them; the distances are then a little too good, for every
    method and baseline alike.

    Parameters
    ----------
    adata
        Annotated data, cells in rows. At least three snapshots: the first and the last with at least three cells, and
        those between, which are held out, with at least four. If a held-out snapshot has fewer than 20 cells, this is
        logged: distances to so few cells say little (least of all those of the noise reference, between two halves of
        them) but are included in the means over times.
    time_key
        Column of ``obs`` with real times, as numbers.
    use_rep
        Representation of the cells: a key of ``obsm``, or ``"X"``.
    methods
        One or more of ``"uot-cfm"``, ``"ot-cfm"``, ``"i-cfm"``, ``"sb-cfm"``, ``"vp-cfm"``; see `sctraj.tl.fit_flow`.
    path, field, growth_key, frame
        As in `sctraj.tl.fit_flow`. They are used only for the methods that take them.
    start
        Which snapshots are moved to the held-out time: the neighbours on ``"both"`` sides, or the one ``"before"``.
        With a neural field on curved paths and at least seven kept snapshots, ``"both"`` also takes the second snapshot
        on each side (with at least 15, the third too) if single samples are noisy, because the samples' errors cancel
        better among more of them. How much each counts relative to the next nearer one is ``farther`` in the protocol;
        unweighted distances count all their cells alike.
    jitter
        Standard deviation of normal noise added to the cells that are moved, in bandwidths of a closed-form field. If
        the kernel is that of the path (``"sb-cfm"``), the flow preserves the law of its pairs from starting points that
        are as wide as the kernel (1). A local kernel is as wide in every coordinate as the fifth nearest pair is
        distant: 1 is then too much (in 5 dimensions V, the variance ratio, becomes 1.5 to 2.5) and 0 a little too
        little.
    n_seeds
        Fits per held-out snapshot and method. Closed-form fields of ``"uot-cfm"`` and ``"ot-cfm"`` do not depend on a
        seed and are computed once; for the other methods, pairs are drawn anew for every seed.
    sigma, block, module, width, depth, n_steps, batch_size, learning_rate, weight_decay, ema_decay, patience
        As in `sctraj.tl.fit_flow`. A sigma that is given is used for every method: as a length, and for ``"sb-cfm"`` as
        a length per square root of time.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator.
    progress
        Show progress bars.
    key_added
        Prefix of the slots.
    copy
        Return a modified copy and leave `adata` unchanged.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Sets:

    ``uns["leave_one_out"]`` : DataFrame
        Tidy table with columns ``method`` (the methods; the baselines ``previous``, ``next`` and ``ot-interpolation``;
        ``noise-reference``, two random halves of the held-out snapshot), ``time``, ``seed``, ``metric`` (``w1``,
        ``w2``, ``mmd`` (squared), ``energy``, ``energy_about_mean``, ``variance_ratio``, ``w1_unweighted``,
        ``energy_unweighted``) and ``value``. Distances between many thousand cells are estimated; the table then also
        holds their standard errors (``w1_error``, ...). If `key_added` is not "flow", the name is
        ``{key_added}_leave_one_out``.
    ``uns["leave_one_out_protocol"]`` : dict
        How the table was obtained: all options; the path of each method; the sigma of each fold and, by interval, its
        spreads (with three snapshots, folds have two, whose paths are bridges; a fit to all three has other paths); the
        versions; the sizes of the halves.
    ``obsm[key_added + "_w1"]`` : DataFrame, n_obs x methods
        The cell's share of its snapshot's W1, as a mean over seeds, such that the mean over the cells of a held-out
        snapshot is that W1. NaN in the first and the last snapshot.
    ``obsm[key_added + "_restored"]`` : float32, n_obs x d
        Where the transport plan between restored and observed cells places the prediction for this cell (first method,
        first seed). NaN in the first and the last snapshot.

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        Times, cells or parameters that cannot be used; slots that hold something else than a leave-one-out. `adata` is
        then left as it was.
    TypeError
        `module` is not an instance of ``torch.nn.Module``.
    RuntimeError
        The Sinkhorn iteration or the training did not converge.
    """
    _adata.check_own(adata, copy=copy)
    _adata.check_table_key(adata, key_added, use_rep)
    options = _options([methods] if isinstance(methods, str) else list(methods), path, growth_key, sigma)
    methods = list(options)
    where = pick_device(device)
    training = Training(module, width, depth, n_steps, batch_size, learning_rate, weight_decay, ema_decay, patience)
    plans = Plans(block, where, frame)
    seed = seed_of(rng)
    seeds = member_seeds(seed, n_seeds)
    if start not in get_args(Start):
        raise ValueError(f"expected a start of {get_args(Start)}, found {start!r}")
    check_field(field, module)
    check_jitter(jitter, field)
    cells = _adata.read_snapshots(adata, time_key, use_rep, least=3, growth_key=growth_key)
    snapshots = cells.snapshots
    _check_sizes(snapshots)
    warn_of_unused(
        leave_one_out, field, training, methods=methods, path=path, block=block, growth_key=growth_key, frame=frame
    )
    say_doubts(adata, cells, use_rep, growth_key)
    if len(snapshots) == 3 and "uot-cfm" in methods and "sb-cfm" not in methods:
        logger.info("of three snapshots two are kept; on simulated ones sb-cfm then restores better: compare it, too")

    validate = patience is not None and field == "neural"
    folds = _folds(snapshots, options, plans, seeds, field=field, sigma=sigma, validate=validate)
    paths = {method: path_name(options[method].path, of.problems[0]) for method, of in folds.items()}
    asked = {"use_rep": use_rep, "time_key": time_key, "growth_key": growth_key, "field": field, "frame": frame}
    say_if_another_fit(adata, key_added, paths, asked if sigma is None else asked | {"sigma": sigma})
    farther = {
        method: farther_shares(field, of.problems) if start == "both" else [0.0] * len(of.problems)
        for method, of in folds.items()
    }
    found: list[_Found] = []
    for method, of in folds.items():
        fitted = make_field(field, of.problems, of.validation, training, where, progress=progress).vector_field
        found += _restored(method, fitted, snapshots, of.held_out, start, farther[method], jitter)
    references, halves = _references(snapshots, seeds, plans if block is None else Plans())
    found += references

    judged = judge_all([(one.restoration, one.observed) for one in found])
    energies, noise = mean_energies([(one.method, one.k, of.values["energy"]) for one, of in zip(found, judged)])
    kin = any(finds_kin(method, own.path) for method, own in options.items())
    record = fit_record(
        field, training, time_key=time_key, use_rep=use_rep, growth_key=growth_key, block=block, device=where,
        frame=frame if kin else None,
    )  # fmt: skip
    protocol = record | {
        "methods": np.array(methods),
        "paths": np.array(list(paths.values())),
        "n_seeds": n_seeds,
        "seed": seed,
        "start": STARTS[start],
        "jitter": jitter,
        "integration": f"{AS_PUBLISHED.solver}, {AS_PUBLISHED.n_steps} steps a gap, real time",
        **_of_folds(snapshots, folds, farther, neural=field == "neural"),
        "noise_reference_sizes": np.array(halves),
        "leak": f"{use_rep} was computed beforehand: if on all cells, it has seen the held-out snapshots",
        "versions": _adata.versions(),
        "fingerprint": cells.fingerprint,
    }
    adata = _adata.own(adata, copy=copy)
    written = _write(adata, key_added, cells, methods, list(zip(found, judged)), protocol)
    estimates = about_estimates([of.errors for of in judged])
    logger.info(
        f"energy distance to the held-out snapshots, mean over {len(snapshots) - 2} time(s) and {n_seeds} seed(s) "
        f"({field} field): {', '.join(f'{name} {value:.3g}' for name, value in energies.items())}. {estimates}"
        f"The noise reference's halves have {_sizes(halves)} cells. {use_rep} was computed beforehand: if on all "
        f"cells, it has seen the held-out snapshots. Wrote {written}"
    )
    say_what_tells_nothing(methods, energies, noise)
    return adata if copy else None


class _Options(NamedTuple):
    """The options that one of several methods takes from those given for all."""

    path: Path | None
    prior: bool


def _options(
    methods: Sequence[str], path: Path | None, growth_key: str | None, sigma: float | None
) -> dict[str, _Options]:
    """Return the options that each method takes, checked; an option that no method takes is refused with the first."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise ValueError(f"expected distinct methods of {METHODS}, found {methods}")
    found = {}
    for method in methods:
        bends = method in WITH_PATH or not {*methods} & {*WITH_PATH}
        grows = method == "uot-cfm" or "uot-cfm" not in methods
        found[method] = own = _Options(path if bends else None, growth_key is not None and grows)
        check_method(method, path=own.path, sigma=sigma, prior=own.prior)
    return found


def _folds(
    snapshots: Snapshots,
    options: Mapping[str, _Options],
    plans: Plans,
    seeds: Sequence[int],
    *,
    field: FieldKind,
    sigma: float | None,
    validate: bool,
) -> dict[str, hold_out.Folds]:
    """Return the problems of all folds and seeds by method; methods share plans, with a prior or without."""
    without_prior = replace(snapshots, growth=()) if snapshots.growth else snapshots
    return {
        method: hold_out.hold_out_problems(
            snapshots if own.prior else without_prior,
            method=method,
            path=own.path,
            sigma=sigma,
            seeds=distinct_seeds(field, method, seeds),
            validate=validate,
            plans=plans,
        )
        for method, own in options.items()
    }


def _write(
    adata: AnnData,
    key: str,
    cells: Cells,
    methods: Sequence[str],
    judged: Sequence[tuple[_Found, Judgement]],
    protocol: Mapping[str, object],
) -> str:
    """Write the table, its protocol and the results by cell; return the slots' names."""
    rows = [row for one, judgement in judged for row in _rows(one, judgement, cells.snapshots.times[one.k])]
    by_cell = {method: _by_cell(cells, [pair for pair in judged if pair[0].method == method]) for method in methods}
    table = _adata.table_name(key)
    record, w1, restored = (name.format(table=table, key=key) for name in (_adata.PROTOCOL, _adata.W1, _adata.RESTORED))
    adata.uns[table], adata.uns[record] = pd.DataFrame(rows), dict(protocol)
    adata.obsm[w1] = pd.DataFrame({method: shares for method, (shares, _) in by_cell.items()}, index=adata.obs_names)
    adata.obsm[restored] = by_cell[methods[0]][1]
    return f'uns["{table}"], uns["{record}"], obsm["{w1}"], obsm["{restored}"]'


def _sizes(halves: Sequence[tuple[int, int]]) -> str:
    """Return the sizes of all folds' halves in words; if they differ, the smallest and the largest."""
    least, most = (f"{a} + {b}" for a, b in (min(halves, key=sum), max(halves, key=sum)))
    return least if least == most else f"{least} to {most}"


def _check_sizes(snapshots: Snapshots) -> None:
    """Raise if a snapshot to hold out has too few cells, or all of them at one place; log those with few cells."""
    few = []
    for k in hold_out.interior(snapshots):
        if (n := len(snapshots.points[k])) < hold_out.SMALLEST_HELD_OUT:
            raise ValueError(
                f"expected at least {hold_out.SMALLEST_HELD_OUT} cells in every held-out snapshot, found {n} at time "
                f"{snapshots.times[k]:g}; merge it with another or leave its cells out"
            )
        if bool((snapshots.points[k] == snapshots.points[k][0]).all()):
            raise ValueError(
                f"expected cells that differ in every held-out snapshot, found {n} of the same at time "
                f"{snapshots.times[k]:g}; check the representation or leave them out"
            )
        if n < TELLING:
            few.append(f"{snapshots.times[k]:g} ({n})")
    if few:
        logger.warning(
            f"fewer than {TELLING} cells in held-out snapshots, at time (cells): {', '.join(few)}; distances there say "
            f"little, those of the noise reference least, and are in the means over times; merge these times with "
            f"others, or look at the table time by time"
        )


def _of_folds(
    snapshots: Snapshots,
    folds: Mapping[str, hold_out.Folds],
    farther: Mapping[str, Sequence[float]],
    *,
    neural: bool,
) -> dict[str, np.ndarray]:
    """Return the held-out times and, as methods x times, what all fits of a method to a fold have in common."""
    each = [[of.problems[first] for first in of.firsts()] for of in folds.values()]
    none = [np.nan] * (len(snapshots) - 2)  # a fold's intervals
    return {
        "held_out_times": np.array([snapshots.times[k] for k in hold_out.interior(snapshots)]),
        "sigma": np.array([[p.path.sigma for p in one] for one in each]),
        "spreads": np.array([[p.spreads if neural and p.spreads else none for p in one] for one in each]),
        "reliability": np.array(
            [[np.nan if p.tangents is None else p.tangents.reliability for p in one] for one in each]
        ),
        "farther": np.array([[farther[method][first] for first in of.firsts()] for method, of in folds.items()]),
    }


@dataclass(frozen=True)
class _Found:
    """A restoration of snapshot ``k`` by a method's fit with the ``seed``-th seed, and the cells to compare it with."""

    method: str
    k: int
    seed: int
    restoration: Restoration
    observed: Tensor


def _restored(
    method: str,
    field: VectorField,
    snapshots: Snapshots,
    held_out: Sequence[int],
    start: Start,
    farther: Sequence[float],
    jitter: float,
) -> list[_Found]:
    """Restore every member's held-out snapshot; the seeds of one fold are consecutive."""
    restorations = hold_out.restore(
        field,
        snapshots,
        held_out,
        AS_PUBLISHED,
        start=start,
        farther=farther,
        jitter=jitter,
    )
    n_seeds = held_out.count(held_out[0])
    return [
        _Found(method, k, member % n_seeds, restoration, snapshots.points[k])
        for member, (k, restoration) in enumerate(zip(held_out, restorations))
    ]


def _by_cell(cells: Cells, judged: Sequence[tuple[_Found, Judgement]]) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell's share of W1 ``(n_obs,)``, mean over seeds, and its first seed's barycentre ``(n_obs, d)``."""
    snapshots = cells.snapshots
    share: list[np.ndarray | None] = [None] * len(snapshots)  # the first and the last stay None
    barycentre: list[np.ndarray | None] = [None] * len(snapshots)
    n_seeds = 1 + max(one.seed for one, _ in judged)
    for one, judgement in judged:
        so_far, part = share[one.k], judgement.share.numpy() / n_seeds
        share[one.k] = part if so_far is None else so_far + part
        if one.seed == 0:
            barycentre[one.k] = judgement.barycentre.numpy()
    return _adata.write_by_cell(cells, share, np.float64), _adata.write_by_cell(cells, barycentre)


def _rows(one: _Found, judged: Judgement, time: float) -> list[dict[str, object]]:
    """Return the table rows of one judgement."""
    values = judged.values | {f"{name}_unweighted": value for name, value in judged.unweighted.items()}
    values |= {f"{name}_error": error for name, error in judged.errors.items()}
    same = {"method": one.method, "time": time, "seed": one.seed}
    return [same | {"metric": metric, "value": value} for metric, value in values.items()]


def _references(snapshots: Snapshots, seeds: Sequence[int], plans: Plans) -> tuple[list[_Found], list[tuple[int, int]]]:
    """Return the baselines and the noise reference, and the sizes of the latter's halves."""
    found, sizes = [], []
    bridges = [hold_out.across(snapshots, k, plans) for k in hold_out.interior(snapshots)]
    plans.prepare(bridges, "ot-cfm")
    for name in BASELINES:
        for k in hold_out.interior(snapshots):
            found.append(_Found(name, k, 0, hold_out.baseline(snapshots, k, name, plans), snapshots.points[k]))
    for k in hold_out.interior(snapshots):
        for number, seed in enumerate(seeds):
            first, second = hold_out.halves(snapshots.points[k], torch.Generator().manual_seed(seed + k))
            found.append(_Found(hold_out.NOISE_REFERENCE, k, number, Restoration(first), second))
        sizes.append((len(first), len(second)))
    return found, sizes
