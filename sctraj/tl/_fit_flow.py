"""Fit a flow between the snapshots of an AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from .. import _adata
from .._log import logger
from ..flow.flow_matching import Training, fit, pick_device
from ..flow.integrate import CELLS
from ..flow.problem import make_problems
from ._seeds import member_seeds, seed_of

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn

    from ..flow.vector_field import VectorField

Method = Literal["ot-cfm", "i-cfm", "sb-cfm", "vp-cfm"]


def fit_flow(
    adata: AnnData,
    time_key: str = "time",
    *,
    use_rep: str = "X_pca",
    method: Method = "ot-cfm",
    sigma: float | None = None,
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

    Parameters
    ----------
    adata
        Annotated data, cells in rows; at least two snapshots of at least three cells.
    time_key
        Column of ``obs`` with real times, numbers; text is read by `sctraj.pp.parse_time`.
    use_rep
        Representation of the cells: a key of ``obsm``, or ``"X"``.
    method
        ``"ot-cfm"``: cells of consecutive snapshots are paired by exact optimal transport. ``"i-cfm"``: at random.
        ``"sb-cfm"``: by a Schroedinger bridge; also gives a score, and so a stochastic flow. ``"vp-cfm"``: at random,
        along variance-preserving paths.
    sigma
        Spread of the probability path, in units of the representation (for ``"sb-cfm"`` per root of time). By default
        a fixed fraction of the root mean square displacement between snapshots.
    module
        Your own network instead of the built-in one: maps standardised times ``(B, 1)`` and points ``(B, d)`` to
        ``(B, d)``, or ``(B, 2 d)`` (velocity, score) for ``"sb-cfm"``. Without randomness of its own (dropout).
    n_members
        Fits from different seeds, trained together; more than one give the velocity's uncertainty.
    width, depth
        Hidden layers of the built-in network.
    n_steps, batch_size
        Steps of the optimiser, and pairs of cells per interval in each.
    learning_rate, weight_decay, ema_decay
        AdamW's highest rate (one-cycle schedule) and weight decay; decay of the weights' moving average.
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
        ``params`` (with the sigma and seed used), ``weights`` (arrays), ``loss``, ``times``, ``versions``,
        ``fingerprint``.
    ``obsm[key_added + "_velocity"]`` : float32, n_obs x d
        Velocity at the cell's own time, in units of the representation per unit of time; the members' mean.
    ``obs[key_added + "_velocity_sd"]`` : float32
        Root mean square deviation of the members' velocities from their mean, where there are several.

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        Times, cells or parameters that cannot be used; `adata` is then as it was.
    RuntimeError
        Sinkhorn or the training did not converge.
    """
    _adata.check_key(key_added)
    where = pick_device(device)
    training = Training(module, width, depth, n_steps, batch_size, learning_rate, weight_decay, ema_decay, patience)
    seed = seed_of(rng)
    seeds = member_seeds(seed, n_members)
    cells = _adata.read_snapshots(adata, time_key, use_rep, least=2)
    problems, validation = make_problems(
        cells.snapshots, method=method, sigma=sigma, seeds=seeds, validate=patience is not None
    )
    result = fit(
        problems, validation=validation, training=training, device=where, dtype=torch.float32, progress=progress
    )
    velocity = [_velocity_at(result.vector_field, t, x) for t, x in zip(cells.snapshots.times, cells.snapshots.points)]

    adata = _adata.own(adata, copy=copy)
    adata.obsm.pop(_adata.TRAJECTORIES.format(key=key_added), None)  # of an earlier flow of this name
    used = problems[0].path.sigma
    params = {
        "method": method, "time_key": time_key, "use_rep": use_rep, "sigma": used, "n_members": n_members,
        "n_obs": adata.n_obs, "n_steps": n_steps, "batch_size": batch_size, "learning_rate": learning_rate,
        "weight_decay": weight_decay, "ema_decay": ema_decay, "seed": seed, "device": str(where),
    }  # fmt: skip
    params |= {"width": width, "depth": depth} if module is None else {"module": type(module).__name__}
    params |= {} if patience is None else {"patience": patience}
    _adata.write_flow(
        adata,
        key_added,
        params=params,
        weights=result.vector_field.to_arrays(),
        loss=result.loss.numpy(),
        validation_loss=result.validation_loss.numpy(),
        cells=cells,
    )
    name = _adata.VELOCITY.format(key=key_added)
    adata.obsm[name] = _adata.write_by_cell(cells, [mean for mean, _ in velocity])
    written = f'uns["{key_added}"], obsm["{name}"]'
    spread = _adata.VELOCITY_SD.format(key=key_added)
    if n_members > 1:
        adata.obs[spread] = _adata.write_by_cell(cells, [sd for _, sd in velocity])
        written += f', obs["{spread}"]'
    elif spread in adata.obs:
        del adata.obs[spread]
    logger.info(
        f"{method} fitted to {len(cells.snapshots)} snapshots of {cells.n_obs} cells in {use_rep}, sigma = {used:.4g}, "
        f"on {where}; wrote {written}"
    )
    return adata if copy else None


@torch.no_grad()
def _velocity_at(field: VectorField, t: float, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the members' mean velocity ``(n, d)`` at one time and its spread ``(n,)``."""
    means, spreads = [], []
    for cells in x.to(field.scale).split(CELLS):
        each = field.velocity(t, cells.expand(field.members, *cells.shape))  # (M, n, d)
        means.append(each.mean(0))
        deviation = (each - each.mean(0)).square().sum(-1).sum(0)
        spreads.append((deviation / max(1, field.members - 1)).sqrt())
    return torch.cat(means).cpu().numpy(), torch.cat(spreads).cpu().numpy()
