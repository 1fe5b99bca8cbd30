"""MIOFlow 0.1.14 as a method of the benchmark: its ODE, trained interval by interval on the OT loss, on coordinates.

The package's defaults are used (100 epochs, all cells of a snapshot in each step, no density loss), without its
autoencoder, in whose space distances would differ. Its clock counts kept snapshots; the snapshot before is moved.
"""

from __future__ import annotations

import tempfile

import anndata as ad
import numpy as np
import pandas as pd
import torch
from mioflow.mioflow import MIOFlow
from torchdiffeq import odeint

from sctraj.flow.snapshots import Snapshots

from .common import on_snapshot_clock, seeded, silent

N_EPOCHS = 100


def restore(snapshots: Snapshots, time: float, rng: np.random.Generator, n_epochs: int = N_EPOCHS) -> np.ndarray:
    points = [x.double().numpy() for x in snapshots.points]
    labels = np.repeat(snapshots.times, [len(x) for x in points])
    cells = ad.AnnData(obs=pd.DataFrame({"time": labels}, index=[str(n) for n in range(len(labels))]))
    cells.obsm["X_rep"] = np.concatenate(points)
    before, span = on_snapshot_clock(snapshots.times, time)
    with tempfile.TemporaryDirectory() as folder, seeded(rng), silent():
        fitted = MIOFlow(
            cells, gaga_input_key="X_rep", obs_time_key="time", debug_level="warning", use_cuda=False,
            n_epochs=n_epochs, exp_dir=folder,
        ).fit()  # fmt: skip
    start = torch.from_numpy((points[before] - fitted.mean_vals) / fitted.std_vals).float()
    with torch.no_grad():
        moved = odeint(fitted.ode_model, start, torch.tensor([before, before + span]))[-1]
    return moved.numpy() * fitted.std_vals + fitted.mean_vals
