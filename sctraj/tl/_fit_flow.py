"""Fit a flow between the snapshots of an AnnData."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from .. import _adata
from .._log import logger
from ..flow.fields import FieldKind, farther_shares, make_field
from ..flow.flow_matching import Training, pick_device
from ..flow.integrate import CELLS
from ..flow.plans import Frame, Plans
from ..flow.problem import Problem, check_method, default_sigma, make_problems, taking_part
from ..flow.snapshots import resampled
from ._doubts import say_doubts
from ._field import check_field, finds_kin, fit_record, path_name, warn_of_unused
from ._seeds import member_seeds, seed_of

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn

    from ..flow.vector_field import VectorField

Method = Literal["uot-cfm", "ot-cfm", "i-cfm", "sb-cfm", "vp-cfm"]
Path = Literal["hermite", "straight", "land", "rbf"]


def fit_flow(
    adata: AnnData,
    time_key: str = "time",
    *,
    use_rep: str = "X_pca",
    method: Method = "uot-cfm",
    path: Path | None = None,
    field: FieldKind = "neural",
    growth_key: str | None = None,
    frame: Frame = "fixed",
    sigma: float | None = None,
    block: int | None = None,
    module: nn.Module | None = None,
    n_members: int = 1,
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
    """Fit the continuous flow between snapshots by conditional flow matching (Tong et al. 2023, arXiv 2302.00482).

    By default, cells of consecutive snapshots are paired by unbalanced optimal transport. Each pair is joined by a path
    along which its mass may change, and which bends towards the cells' kin (mean ancestors in the snapshot before, mean
    descendants in the one after). A network is then trained on the velocities and growth rates along these paths.

    Parameters
    ----------
    adata
        Annotated data, cells in rows; at least two snapshots of at least three cells.
    time_key
        Column of ``obs`` with real times, as numbers; `sctraj.pp.parse_time` converts text.
    use_rep
        Representation of the cells: a key of ``obsm``, or ``"X"``.
    method
        How cells of consecutive snapshots are paired. ``"uot-cfm"``: by unbalanced optimal transport; parts of the
        population may grow or shrink relative to each other. ``"ot-cfm"``: by exact optimal transport; mass is
        conserved. ``"i-cfm"``: at random. ``"sb-cfm"``: by a Schroedinger bridge; also gives a score, and so a
        stochastic flow. ``"vp-cfm"``: at random, along variance-preserving paths. The default is the most accurate
        where one of four or more snapshots is left out; where one of three is left out, ``"sb-cfm"`` is. Cells that are
        followed once round a cycle stay on it best with ``"ot-cfm"``.
    path
        Shape of the paths, for the first three methods. ``"hermite"``: cubic curves that pass through each cell at a
        velocity measured from its kin before and after; turns of the whole population are damped where they come and
        go with single snapshots, as happens when samples are off; ``"uot-cfm"`` then pairs cells by where they are
        going as well as by where they are. ``"straight"``: straight lines. ``"land"`` or ``"rbf"``: curves learned to
        stay near the cells under that metric (Kapusniak et al. 2024), for courses known to bend round a hole;
        elsewhere they narrow populations. None: hermite for ``"uot-cfm"``, straight for the others.
    field
        ``"neural"``: a network trained by flow matching; its cost at a cell does not grow with the number of pairs.
        ``"closed-form"``: a kernel average of the pairs' velocities. Nothing is trained, and with one member the result
        depends on the seed only for methods whose pairs are drawn (all but the first two; four pairs per cell). It is
        less accurate than a network (energy distance 1.0 to 1.1 times as large for held-out real snapshots, up to 1.9
        times for simulated ones), except where cells are few and dimensions many.
    growth_key
        Column of ``obs`` with prior growth rates, for ``"uot-cfm"``: log mass change per unit of time, net of death. A
        kind of cells that doubles in two days, relative to the others, has log 2 / 2 = .35 a day. Only differences
        between cells count, because numbers of sampled cells say nothing about the population's total. The prior is
        weighed against the snapshots, which pull it back only in part where the two contradict each other. So noise
        about the right rates does little harm, but rates that differ too much do: compare `sctraj.tl.leave_one_out`
        with and without the prior.
    frame
        Where ``"uot-cfm"`` tells growth from movement. ``"fixed"``: at the cells' own places, so that part of every
        move is read as growth. ``"moving"``: after cells have been moved along with their neighbours, so that little
        but what is left is; paths of a population that turns then go along arcs. On simulated courses velocities, fates
        and growth rates are then mostly nearer to the truth; held-out snapshots are restored nearly as well there, and
        1 to 2 % less well on the real cells that the default was chosen on. A lineage with fewer than eight of the
        cells of a snapshot that take part (see `block`) is moved along with others. Curved paths of ``"ot-cfm"`` and
        ``"i-cfm"`` change, too.
    sigma
        Width of the probability path, in units of the representation (for ``"sb-cfm"``, per square root of time). By
        default, a fixed fraction of the root mean square displacement between snapshots. A single cell far from all
        others can make this large: cells more than 100 times the median distance from their snapshot's median are
        logged. For a neural field of ``"uot-cfm"``, paths are then made wider (by ``spreads`` in ``params``)
        according to how far apart cells are, so that the field also learns what to do between them; if there are only
        two snapshots, they are as wide as Brownian bridges. A sigma that is given is the whole width: one taken from an
        earlier fit's ``params`` gives narrower paths than that fit had.
    block
        Number of cells per snapshot in a block. Two snapshots with more cells than this (geometric mean of both) are
        coupled block by block by ``"uot-cfm"`` and ``"ot-cfm"``, and kin for curved paths are found in this way too. At
        most 6,000 cells of each snapshot (or one block) take part. What is done is logged. By default, snapshots of up
        to 1,500 cells (3,000 for ``"ot-cfm"``) are coupled whole, and larger ones in blocks of at most 1,000 (3,000).
        Larger blocks come closer to optimal transport; the time grows as their size squared or faster.
    module
        Your own network instead of the built-in one. It maps standardised times ``(B, 1)`` and points ``(B, d)`` to
        ``(B, d)``, or to ``(B, 2 d)`` (velocity, score) for ``"sb-cfm"``, or to ``(B, d + 1)`` (velocity, growth) for
        ``"uot-cfm"``: with ``(B, d)`` the flow then does not grow, which is logged. It must have no randomness of its
        own, such as dropout.
    n_members
        Number of fits that are trained together. If there are several, ``_velocity_sd`` is written. Members of a neural
        field differ by their seeds: their deviation shows what training leaves open, but not that other cells might
        have been sampled, and so understates the uncertainty. Each member of a closed-form field is built from a
        bootstrap sample of every snapshot's cells, so that the deviation includes both.
    width
        Units per hidden layer of the built-in network. This and the following parameters up to `patience` apply to a
        neural field only; if they are given without effect, this is logged.
    depth
        Number of hidden layers of the built-in network.
    n_steps
        Number of optimiser steps.
    batch_size
        Pairs of cells per interval in each step; with more than five intervals, as many in total as with five.
    learning_rate
        Peak learning rate of AdamW (one-cycle schedule).
    weight_decay
        Weight decay of AdamW.
    ema_decay
        Decay of the moving average of the weights.
    patience
        Stop early: hold back a tenth of every snapshot's cells, evaluate their loss every 25 steps, and stop after
        this many evaluations without improvement. None: train for `n_steps`.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator. On the CPU of one machine, the same value gives the same results bit for bit.
    progress
        Show a progress bar.
    key_added
        Name of the flow, and prefix of its slots.
    copy
        Return a modified copy and leave `adata` unchanged.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Sets:

    ``uns[key_added]`` : dict
        ``params``, ``weights`` (arrays), ``loss``, ``validation_loss``, ``times``, ``versions``, ``fingerprint``.
        ``params`` includes the sigma and seed used. For curved paths, it also holds the ``reliability``, the share of
        the population's turns that the first member takes (estimating it needs four snapshots; with fewer it is 1),
        and ``farther``, how much `sctraj.tl.interpolate` counts a snapshot relative to the next nearer one. For paths
        wider than sigma, it holds the ``spreads``, one per interval (with only two snapshots, the one half-way).
    ``obsm[key_added + "_velocity"]`` : float32, n_obs x d
        Velocity at the cell's own time, in units of the representation per unit of time; the members' mean. With
        ``"uot-cfm"`` it is 3 to 29 % too short on simulated courses (1 to 23 % in a moving frame), because part of each
        move is read as growth.
    ``obs[key_added + "_growth"]`` : float32
        Log mass change per unit of time, relative to the mean over the snapshot's cells; only if the flow has growth.
        It ranks cells rather than measures their growth: about half of the difference between fates is found, and
        cells that are ahead of others seem to grow a little.
    ``obs[key_added + "_velocity_sd"]`` : float32
        Root mean square deviation of the members' velocities from their mean; only if there are several members.

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        Times, cells or parameters that cannot be used; slots that hold something else than a flow. `adata` is then
        left as it was.
    TypeError
        `module` is not an instance of ``torch.nn.Module``.
    RuntimeError
        The Sinkhorn iteration or the training did not converge.
    """
    _adata.check_own(adata, copy=copy)
    columns = [time_key] if growth_key is None else [time_key, growth_key]
    _adata.check_flow_key(adata, key_added, use_rep=use_rep, columns=columns)
    check_method(method, path=path, sigma=sigma, prior=growth_key is not None)
    where = pick_device(device)
    check_field(field, module)
    training = Training(module, width, depth, n_steps, batch_size, learning_rate, weight_decay, ema_decay, patience)
    plans = Plans(block, where, frame)
    seed = seed_of(rng)
    seeds = member_seeds(seed, n_members)
    cells = _adata.read_snapshots(adata, time_key, use_rep, least=2, growth_key=growth_key)
    warn_of_unused(
        fit_flow, field, training, methods=[method], path=path, block=block, growth_key=growth_key, frame=frame
    )
    say_doubts(adata, cells, use_rep, growth_key)
    if len(cells.snapshots) == 2 and method == "uot-cfm":
        logger.warning(
            f'two snapshots do not tell growth from movement, so obs["{key_added}_growth"] may be either; '
            f'method="ot-cfm" takes all change to be movement'
        )

    validate = patience is not None and field == "neural"
    make = partial(make_problems, method=method, path=path, validate=validate, plans=plans)
    problems: list[Problem] = []
    validation: list[Problem] = []
    if field == "closed-form" and n_members > 1:  # every member gets a bootstrap sample of the cells that take part
        some = taking_part(cells.snapshots, method, path, plans)
        common = default_sigma(some, method, plans) if sigma is None else sigma
        for one in seeds:
            problems += make(resampled(some, one), sigma=common, seeds=[one])[0]
            plans.forget_velocities()  # only folds share them
    else:
        problems, validation = make(cells.snapshots, sigma=sigma, seeds=seeds)
        plans.forget_velocities()
    result = make_field(field, problems, validation, training, where, progress=progress)
    snapshots = cells.snapshots
    at_cells = [_at_cells(result.vector_field, *one) for one in zip(snapshots.times, snapshots.points, snapshots.mass)]

    adata = _adata.own(adata, copy=copy)
    used = problems[0].path.sigma
    params = fit_record(
        field, training, time_key=time_key, use_rep=use_rep, growth_key=growth_key, block=block, device=where,
        frame=frame if finds_kin(method, path) else None,
    ) | {
        "method": method, "path": path_name(path, problems[0]), "sigma": used, "n_members": n_members,
        "n_obs": adata.n_obs, "seed": seed,
    }  # fmt: skip
    tangents = problems[0].tangents
    if tangents is not None:
        params |= {"reliability": tangents.reliability, "farther": farther_shares(field, problems)[0]}
    wider = ""
    if (spreads := problems[0].spreads) and field == "neural":
        params["spreads"] = np.array(spreads)
        wider = f" and spreads of {min(spreads):.4g} to {max(spreads):.4g}"
        if len(spreads) == 1:
            wider = f" and a spread of {spreads[0]:.4g} half-way"
    store = adata.uns.get(key_added, {}).get(_adata.STORE)
    _adata.write_flow(
        adata,
        key_added,
        params=params,
        weights=result.vector_field.to_arrays(),
        loss=result.loss.numpy(),
        validation_loss=result.validation_loss.numpy(),
        cells=cells,
    )
    written, removed = _write_cells(adata, cells, key_added, at_cells, result.vector_field)
    if store is not None:
        removed.append(f"what named the trajectories in {store}")
    logger.info(
        f"{method} ({field} field) fitted to {len(cells.snapshots)} snapshots of {cells.n_obs} cells in {use_rep}, "
        f"sigma = {used:.4g}{wider}, on {where}; wrote {', '.join(written)}"
        f"{'; removed what an earlier flow left: ' + ', '.join(removed) if removed else ''}"
    )
    return adata if copy else None


def _write_cells(
    adata: AnnData, cells: _adata.Cells, key: str, at_cells: Sequence[_AtCells], field: VectorField
) -> tuple[list[str], list[str]]:
    """Write the values at the cells, remove what an earlier flow of this name left, and return both sets of slots."""
    name = _adata.VELOCITY.format(key=key)
    adata.obsm[name] = _adata.write_by_cell(cells, [at.velocity for at in at_cells])
    written, removed = [f'uns["{key}"]', f'obsm["{name}"]'], []
    columns = {
        _adata.GROWTH: [at.growth for at in at_cells] if field.grows else None,
        _adata.VELOCITY_SD: [at.spread for at in at_cells] if field.members > 1 else None,
    }
    for slot, values in columns.items():
        column = slot.format(key=key)
        if values is not None:
            adata.obs[column] = _adata.write_by_cell(cells, values)
            written.append(f'obs["{column}"]')
        elif column in adata.obs:
            _adata.drop_column(adata, column)
            removed.append(f'obs["{column}"]')
    for slot in (_adata.TRAJECTORIES, _adata.WEIGHTS, _adata.FATES):
        if adata.obsm.pop(name := slot.format(key=key), None) is not None:
            removed.append(f'obsm["{name}"]')
    return written, removed


class _AtCells(NamedTuple):
    """The members' mean velocity ``(n, d)``, their deviation from it ``(n,)`` and mean growth rate ``(n,)`` at cells.

    Growth rates are relative to the mean over the cells.
    """

    velocity: np.ndarray
    spread: np.ndarray
    growth: np.ndarray


@torch.no_grad()
def _at_cells(field: VectorField, t: float, x: torch.Tensor, mass: torch.Tensor) -> _AtCells:
    """Evaluate a field at the cells ``(n, d)`` of one snapshot, with masses ``(n,)``."""
    parts = []
    for cells in x.to(field.scale).split(CELLS):
        each = field.evaluate(t, cells.expand(field.members, *cells.shape))  # velocity: (M, n, d)
        mean = each.velocity.mean(0)
        deviation = (each.velocity - mean).square().sum(-1).sum(0)
        growth = torch.zeros_like(deviation) if each.growth is None else each.growth.mean(0).squeeze(-1)
        parts.append((mean, (deviation / max(1, field.members - 1)).sqrt(), growth))
    velocity, spread, growth = (torch.cat(column).cpu() for column in zip(*parts))
    # growth is determined only up to a rate shared by all cells of a time, which training leaves arbitrary
    growth = growth - (mass @ growth.double() / mass.sum()).to(growth)
    return _AtCells(velocity.numpy(), spread.numpy(), growth.numpy())
