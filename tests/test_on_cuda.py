"""The verbs on a real CUDA device, beside a CPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sctraj
from sctraj.datasets import simulated_course

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("field", ["neural", "closed-form"])
@pytest.mark.parametrize("method", ["uot-cfm", "sb-cfm"])
def test_a_fit_writes_what_a_cpu_writes(method, field):
    cells = {}
    for device in ("cuda", "cpu"):
        adata = simulated_course("branching", 600)
        sctraj.tl.fit_flow(adata, method=method, field=field, device=device)
        sctraj.tl.trajectories(adata, times=4, device=device)
        cells[device] = adata
    assert cells["cuda"].uns["flow"]["params"]["device"] == "cuda"
    for slot in ("flow_velocity", "flow_trajectories"):
        one, other = (np.asarray(cells[device].obsm[slot]).reshape(600, -1) for device in ("cuda", "cpu"))
        error = np.linalg.norm(one - other, axis=1) / np.linalg.norm(other - other.mean(0), axis=1).mean()
        # a network's and a sampled plan's random numbers are others there
        assert np.median(error) < (1e-3 if (method, field) == ("uot-cfm", "closed-form") else 0.2)


def test_a_field_fitted_there_is_read_anywhere():
    adata = simulated_course("branching", 300)
    sctraj.tl.fit_flow(adata, device="cuda", n_steps=20)
    field = sctraj.get.vector_field(adata)
    assert field(0.5, adata.obsm["X_pca"][:5]).shape == (5, adata.obsm["X_pca"].shape[1])


@pytest.mark.parametrize("field", ["neural", "closed-form"])
def test_leave_one_out_agrees_with_a_cpu(field):
    means = {}
    for device in ("cuda", "cpu"):
        adata = simulated_course("branching", 900)
        sctraj.tl.leave_one_out(adata, methods=["uot-cfm", "ot-cfm"], field=field, device=device, n_seeds=2)
        means[device] = sctraj.get.leave_one_out(adata, metric="w1")["mean"]
    for method in ("uot-cfm", "ot-cfm", "ot-interpolation"):
        assert means["cuda"][method] == pytest.approx(means["cpu"][method], rel=1e-3 if field != "neural" else 0.1)
