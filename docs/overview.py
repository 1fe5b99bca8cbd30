"""Draw the README's picture: `python docs/overview.py` writes docs/images/overview.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import sctraj

adata = sctraj.datasets.simulated_differentiation()
sctraj.tl.fit_flow(adata)
sctraj.tl.trajectories(adata, times=29)
sctraj.tl.leave_one_out(adata, methods=("uot-cfm", "ot-cfm", "i-cfm"))

figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained", width_ratios=(1, 1, 1.25))
sctraj.pl.velocity(adata, basis="X_latent", kind="stream", ax=axes[0])
axes[0].set_title("velocity, learned from six snapshots")
sctraj.pl.trajectories(adata, basis="X_latent", n_cells=80, ax=axes[1])
axes[1].set_title("every cell's own trajectory")
sctraj.pl.leave_one_out(adata, metric="energy", ax=axes[2])
axes[2].set_title("how well a hidden snapshot is restored")
figure.savefig(Path(__file__).parent / "images" / "overview.png", dpi=110)
