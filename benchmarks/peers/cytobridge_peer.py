"""CytoBridge 1.4 as a method of the benchmark: regularised unbalanced flow matching, velocity, growth and score.

The settings are those of its authors' `crufm` configuration, which the package lacks: five layers of 256, 3,000 steps
of 400 pairs per interval, cosine learning rate from .005. Times are real, in mean gaps from the first one; the snapshot
before is moved by velocity and growth.
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from CytoBridge.tl.methods import ODEFunc
from CytoBridge.tl.models import DynamicalModel
from CytoBridge.tl.trainer import TrainingPipeline
from torchdiffeq import odeint

from sctraj.flow.snapshots import Snapshots

from .common import on_snapshot_clock, seeded, silent

N_STEPS, BATCH_SIZE, EULER_STEPS = 3000, 400, 100
DEEP = {"hidden_dim": 256, "n_layers": 5, "residual": False}
MODEL = {
    "components": ["velocity", "growth", "score"],
    "velocity_net": DEEP,
    "growth_net": DEEP,
    "score_net": {"hidden_dim": 256, "n_layers": 4},
}
STAGE = {
    "name": "Train_FM", "mode": "flow_matching", "lr": 0.005, "sigma": 0.05, "train_strategy": "v+g+s",
    "scheduler_type": "cosine", "save_strategy": "best", "flow_matching": {"lambda_penalty": 1},
}  # fmt: skip


def restore(
    snapshots: Snapshots, time: float, rng: np.random.Generator, n_steps: int = N_STEPS
) -> tuple[np.ndarray, np.ndarray]:
    gap = (snapshots.times[-1] - snapshots.times[0]) / (len(snapshots.times) - 1)
    times = [(t - snapshots.times[0]) / gap for t in snapshots.times]
    cells = [x.float() for x in snapshots.points]
    stage = STAGE | {"epochs": n_steps, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory() as folder, seeded(rng), silent():
        config = {"model": MODEL, "ckpt_dir": folder, "training": {"defaults": {"sigma": 0.05}, "plan": [stage]}}
        model = DynamicalModel(cells[0].shape[1], MODEL)
        model = TrainingPipeline(model, config, BATCH_SIZE, torch.device("cpu"), data=cells).train(cells, times)
    before, _ = on_snapshot_clock(snapshots.times, time)
    way = torch.linspace(times[before], (time - snapshots.times[0]) / gap, EULER_STEPS + 1)
    zeros = torch.zeros(len(cells[before]), 1)
    state = cells[before], zeros, zeros  # points, log mass, energy
    points, log_mass, _ = odeint(ODEFunc(model, use_mass=True), state, way, method="euler")  # its score needs gradients
    return points[-1].detach().numpy(), log_mass[-1, :, 0].detach().exp().numpy()
