"""Waddington-OT 1.0.8 as a method of the benchmark: its transport map between the neighbours, and its interpolation.

The defaults of wot are used (epsilon 0.05, lambda1 1, lambda2 50, no growth prior), on the coordinates as they are,
without local PCA.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import wot

from sctraj.flow.baselines import neighbours
from sctraj.flow.snapshots import Snapshots

from .common import seeded


def interpolate(snapshots: Snapshots, time: float, rng: np.random.Generator) -> np.ndarray:
    before, after = neighbours(snapshots, time)
    if before is None or after is None:
        raise ValueError(f"expected kept snapshots on both sides of time {time:g}: wot interpolates between two")
    t0, t1 = snapshots.times[before], snapshots.times[after]
    x0, x1 = (snapshots.points[k].double().numpy() for k in (before, after))
    cells = ad.AnnData(np.concatenate([x0, x1]), obs=pd.DataFrame({"day": np.repeat([t0, t1], [len(x0), len(x1)])}))
    cells.obs_names = [str(n) for n in range(len(cells))]
    model = wot.ot.OTModel(cells, epsilon=0.05, lambda1=1, lambda2=50, local_pca=0)
    plan = model.compute_transport_map(t0, t1).X
    with seeded(rng):
        return wot.ot.interpolate_with_ot(x0, x1, plan, (time - t0) / (t1 - t0), max(len(x0), len(x1)))
