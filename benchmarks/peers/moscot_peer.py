"""moscot 0.5.2 as a method of the benchmark: its TemporalProblem between the neighbours, and its interpolation.

The defaults of moscot are used (epsilon 0.001 of the mean cost, balanced). The interpolation is the one behind
``TemporalProblem.compute_interpolated_distance``, which itself does not return the cells.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from moscot.problems.time import TemporalProblem

from sctraj.flow.baselines import neighbours
from sctraj.flow.snapshots import Snapshots


def interpolate(snapshots: Snapshots, time: float, rng: np.random.Generator) -> np.ndarray:
    before, after = neighbours(snapshots, time)
    if before is None or after is None:
        raise ValueError(f"expected kept snapshots on both sides of time {time:g}: moscot interpolates between two")
    t0, t1 = snapshots.times[before], snapshots.times[after]
    x0, x1 = (snapshots.points[k].double().numpy() for k in (before, after))
    times = pd.Categorical(np.repeat([t0, t1], [len(x0), len(x1)]))
    obs = pd.DataFrame({"time": times}, index=[str(n) for n in range(len(times))])
    cells = ad.AnnData(np.concatenate([x0, x1]), obs)
    cells.obsm["X_rep"] = cells.X
    problem = TemporalProblem(cells).prepare("time", joint_attr={"attr": "obsm", "key": "X_rep"}).solve()
    return problem._interpolate_gex_with_ot(
        number_cells=max(len(x0), len(x1)),
        source_data=x0,
        target_data=x1,
        source=t0,
        target=t1,
        interpolation_parameter=(time - t0) / (t1 - t0),
        account_for_unbalancedness=False,
        seed=int(rng.integers(2**31)),
    )
