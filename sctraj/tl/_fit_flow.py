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
from ..flow.plans import Plans
from ..flow.problem import Problem, check_method, default_sigma, make_problems, taking_part
from ..flow.snapshots import resampled
from ._doubts import say_doubts
from ._field import check_field, fit_record, path_name, warn_of_unused
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

    The default pairs cells of consecutive snapshots by unbalanced optimal transport, lets a pair's mass change on its
    way and its path bend towards the cells' kin (mean ancestors in the snapshot before, mean descendants in the one
    after), and trains a network on the velocities and growth rates along these paths.

    Parameters
    ----------
    adata
        Annotated data, cells in rows; at least two snapshots of at least three cells.
    time_key
        Column of ``obs`` with real times, numbers; text is read by `sctraj.pp.parse_time`.
    use_rep
        Representation of the cells: a key of ``obsm``, or ``"X"``.
    method
        ``"uot-cfm"``: cells of consecutive snapshots are paired by unbalanced optimal transport, and parts of the
        population may grow or shrink relative to each other. ``"ot-cfm"``: by exact optimal transport, mass is
        conserved. ``"i-cfm"``: at random. ``"sb-cfm"``: by a Schroedinger bridge; also gives a score, and so a
        stochastic flow. ``"vp-cfm"``: at random, along variance-preserving paths. The default is the most accurate
        where a snapshot is left out of four or more; of three ``"sb-cfm"`` is, and cells that are followed once round
        a cycle keep to it best by ``"ot-cfm"``.
    path
        Of the first three methods: ``"hermite"``, cubic paths through a cell at a velocity measured from its kin
        before and after; turns that the whole population takes are taken less where they come and go with single
        snapshots, as samples that are off make them; ``"uot-cfm"`` then pairs cells by where they go as well as by
        where they are. ``"straight"``. ``"land"`` or ``"rbf"``: learned to keep to the cells under that metric
        (Kapusniak et al. 2024), for courses known to bend round a hole: they narrow populations elsewhere.
        None: hermite for ``"uot-cfm"``, straight for the others.
    field
        ``"neural"``: a network trained by flow matching; its cost at a cell does not grow with the number of pairs.
        ``"closed-form"``: a kernel average of the pairs' velocities, without training, and without a seed but for
        methods whose pairs are drawn (all but the first two; four a cell are taken); less accurate (1.0 to
        1.1 times the energy distance of held-out real snapshots, up to 1.9 times of simulated ones) but where cells
        are few and dimensions many.
    growth_key
        Column of ``obs`` with prior growth rates (log mass change per unit of time, such as from a proliferation
        signature), for ``"uot-cfm"``. Only differences between cells count: numbers of sampled cells tell nothing
        about the population's total. It is weighed against the snapshots, which move rates back where both contradict.
    sigma
        Spread of the probability path, in units of the representation (for ``"sb-cfm"`` per root of time). By default
        a fixed fraction of the root mean square displacement between snapshots, which a single cell far from all others
        can make large: cells more than 100 times the median distance from their snapshot's median are logged. A neural
        field of ``"uot-cfm"`` then has its paths wider (the ``spreads``): by how far apart cells are, so that it is
        told what to do between them; between two snapshots alone as Brownian bridges are. A sigma that is given is the
        whole spread: one taken from an earlier fit's ``params`` gives narrower paths than that fit had.
    block
        Cells a side of the blocks in which ``"uot-cfm"`` and ``"ot-cfm"`` couple snapshots with more cells than that
        (the geometric mean of both) and curved paths find kin, of each at most 6,000 (or a block); what is done is
        logged. By default snapshots of up to 1,500 cells (for ``"ot-cfm"`` 3,000) are coupled whole, larger ones in
        blocks of at most 1,000 (3,000). Larger blocks come nearer to optimal transport, and take a time that grows as
        their square or more.
    module
        Your own network instead of the built-in one: maps standardised times ``(B, 1)`` and points ``(B, d)`` to
        ``(B, d)``, or ``(B, 2 d)`` (velocity, score) for ``"sb-cfm"``. For ``"uot-cfm"`` to ``(B, d + 1)`` (velocity,
        growth): with ``(B, d)`` the flow does not grow, which is logged. Without randomness of its own (dropout).
    n_members
        Fits trained together; more than one give ``_velocity_sd``. Those of a neural field differ by their seeds, so
        that it is what training leaves open, and not that other cells might have been sampled: less than the
        uncertainty. Each of a closed-form field has a bootstrap of every snapshot's cells, so that it has both.
    width
        Units of a hidden layer of the built-in network. This and what follows up to `patience` are of the neural field;
        where they are given in vain, this is logged.
    depth
        Hidden layers of the built-in network.
    n_steps
        Steps of the optimiser.
    batch_size
        Pairs of cells per interval in each step; of more than five intervals as many in all as of five.
    learning_rate
        AdamW's highest rate (one-cycle schedule).
    weight_decay
        AdamW's weight decay.
    ema_decay
        Decay of the weights' moving average.
    patience
        Stop early: hold back a tenth of every snapshot's cells, look at their loss every 25 steps, and stop after
        this many looks without improvement. None: train for `n_steps`.
    device
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` or ``"mps"``.
    rng
        Seed or Generator. The same on the same machine gives the same bits on the CPU.
    progress
        Show a progress bar.
    key_added
        Name of the flow: prefix of the slots.
    copy
        Return a changed copy and leave `adata` alone.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Sets:

    ``uns[key_added]`` : dict
        ``params`` (with the sigma and seed used, and of curved paths the ``reliability``, the share of the
        population's turns that the first member takes: to tell it takes four snapshots, with fewer it is 1; and
        ``farther``, how much `sctraj.tl.interpolate` counts a snapshot beside the next nearer one; of paths that are
        wider than sigma the ``spreads``, one per interval, between two snapshots alone that half-way),
        ``weights`` (arrays), ``loss``, ``validation_loss``, ``times``, ``versions``, ``fingerprint``.
    ``obsm[key_added + "_velocity"]`` : float32, n_obs x d
        Velocity at the cell's own time, in units of the representation per unit of time; the members' mean. By
        ``"uot-cfm"`` it is 3 to 29 % too short on simulated courses, as a part of each move is read as growth.
    ``obs[key_added + "_growth"]`` : float32
        Log mass change per unit of time, relative to the mean over the snapshot's cells; where the flow grows. It
        orders cells rather than measures them: of what fates differ by about half is found, and cells that are ahead
        of others seem to grow a little.
    ``obs[key_added + "_velocity_sd"]`` : float32
        Root mean square deviation of the members' velocities from their mean, where there are several.

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        Times, cells or parameters that cannot be used; slots that hold what no flow wrote. `adata` is then as it was.
    TypeError
        A module that is none.
    RuntimeError
        Sinkhorn or the training did not converge.
    """
    _adata.check_own(adata, copy=copy)
    _adata.check_flow_key(adata, key_added, use_rep)
    check_method(method, path=path, sigma=sigma, prior=growth_key is not None)
    where = pick_device(device)
    check_field(field, module)
    training = Training(module, width, depth, n_steps, batch_size, learning_rate, weight_decay, ema_decay, patience)
    plans = Plans(block, where)
    seed = seed_of(rng)
    seeds = member_seeds(seed, n_members)
    cells = _adata.read_snapshots(adata, time_key, use_rep, least=2, growth_key=growth_key)
    warn_of_unused(fit_flow, field, training, methods=[method], path=path, block=block, growth_key=growth_key)
    say_doubts(adata, cells, use_rep, growth_key)

    validate = patience is not None and field == "neural"
    make = partial(make_problems, method=method, path=path, validate=validate, plans=plans)
    problems: list[Problem] = []
    validation: list[Problem] = []
    if field == "closed-form" and n_members > 1:  # every member has a bootstrap of the cells that take part
        some = taking_part(cells.snapshots, method, path, plans)
        common = default_sigma(some, method, plans) if sigma is None else sigma
        for one in seeds:
            problems += make(resampled(some, one), sigma=common, seeds=[one])[0]
            plans.forget_velocities()  # which only folds share
    else:
        problems, validation = make(cells.snapshots, sigma=sigma, seeds=seeds)
        plans.forget_velocities()
    result = make_field(field, problems, validation, training, where, progress=progress)
    snapshots = cells.snapshots
    at_cells = [_at_cells(result.vector_field, *one) for one in zip(snapshots.times, snapshots.points, snapshots.mass)]

    adata = _adata.own(adata, copy=copy)
    used = problems[0].path.sigma
    params = fit_record(
        field, training, time_key=time_key, use_rep=use_rep, growth_key=growth_key, block=block, device=where
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
    logger.info(
        f"{method} ({field} field) fitted to {len(cells.snapshots)} snapshots of {cells.n_obs} cells in {use_rep}, "
        f"sigma = {used:.4g}{wider}, on {where}; wrote {', '.join(written)}"
        f"{'; removed what an earlier flow left: ' + ', '.join(removed) if removed else ''}"
    )
    return adata if copy else None


def _write_cells(
    adata: AnnData, cells: _adata.Cells, key: str, at_cells: Sequence[_AtCells], field: VectorField
) -> tuple[list[str], list[str]]:
    """Write what holds at the cells and remove what an earlier flow of this name left; return the slots of both."""
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
    """The members' mean velocity ``(n, d)``, its spread ``(n,)`` and the mean growth rate ``(n,)`` at cells.

    Growth rates are relative to the mean over the cells.
    """

    velocity: np.ndarray
    spread: np.ndarray
    growth: np.ndarray


@torch.no_grad()
def _at_cells(field: VectorField, t: float, x: torch.Tensor, mass: torch.Tensor) -> _AtCells:
    """Evaluate a field at one snapshot's cells ``(n, d)`` of masses ``(n,)``."""
    parts = []
    for cells in x.to(field.scale).split(CELLS):
        each = field.evaluate(t, cells.expand(field.members, *cells.shape))  # velocity: (M, n, d)
        mean = each.velocity.mean(0)
        deviation = (each.velocity - mean).square().sum(-1).sum(0)
        growth = torch.zeros_like(deviation) if each.growth is None else each.growth.mean(0).squeeze(-1)
        parts.append((mean, (deviation / max(1, field.members - 1)).sqrt(), growth))
    velocity, spread, growth = (torch.cat(column).cpu() for column in zip(*parts))
    # known up to a rate that all cells of a time share, which a network leaves where it likes
    growth = growth - (mass @ growth.double() / mass.sum()).to(growth)
    return _AtCells(velocity.numpy(), spread.numpy(), growth.numpy())
