"""torchcfm 1.0.7 as a method of the benchmark: its own matchers and network, and the loop of its single-cell example.

Mini-batch couplings are drawn at every step, one batch per interval; AdamW; an Euler integration of 100 steps from the
snapshot before. As published, the clock counts kept snapshots, so an interval has length one; the time to restore is at
its real fraction of the gap, not in the middle.
"""

from __future__ import annotations

import numpy as np
import torch
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
)
from torchcfm.models.models import MLP

from sctraj.flow.snapshots import Snapshots

from .common import on_snapshot_clock, seeded

N_STEPS, BATCH_SIZE, WIDTH, EULER_STEPS = 3000, 128, 64, 100


def i_cfm(snapshots: Snapshots, time: float, rng: np.random.Generator, n_steps: int = N_STEPS) -> torch.Tensor:
    return _restored(ConditionalFlowMatcher(sigma=0.1), snapshots, time, rng, n_steps)


def ot_cfm(snapshots: Snapshots, time: float, rng: np.random.Generator, n_steps: int = N_STEPS) -> torch.Tensor:
    return _restored(ExactOptimalTransportConditionalFlowMatcher(sigma=0.1), snapshots, time, rng, n_steps)


def sb_cfm(snapshots: Snapshots, time: float, rng: np.random.Generator, n_steps: int = N_STEPS) -> torch.Tensor:
    matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=1.0, ot_method="sinkhorn")
    return _restored(matcher, snapshots, time, rng, n_steps)


def _restored(matcher, snapshots, time, rng, n_steps):
    with seeded(rng):
        model = _trained(matcher, snapshots.points, n_steps)
    before, span = on_snapshot_clock(snapshots.times, time)
    x = snapshots.points[before]
    with torch.no_grad():
        for step in range(EULER_STEPS):
            t = torch.full((len(x), 1), before + span * step / EULER_STEPS)
            x = x + span / EULER_STEPS * model(torch.cat([x, t], 1))
    return x


def _trained(matcher, points, n_steps):
    model = MLP(points[0].shape[1], w=WIDTH, time_varying=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    for _ in range(n_steps):
        ts, xs, us = [], [], []
        for k in range(len(points) - 1):
            x0, x1 = (x[torch.randint(len(x), (BATCH_SIZE,))] for x in points[k : k + 2])
            t, x, u = matcher.sample_location_and_conditional_flow(x0, x1)
            ts.append(t[:, None] + k), xs.append(x), us.append(u)
        loss = (model(torch.cat([torch.cat(xs), torch.cat(ts)], 1)) - torch.cat(us)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model
