"""Compare velocities and growth rates at the cells with the truth, on simulated courses.

python benchmarks/velocities.py --quick             # 10 s: one small data set, from which nothing follows
python benchmarks/velocities.py --jobs 2            # the table of docs/benchmarks.md

Flows are fitted to all snapshots and judged at the cells of all but the first and the last, in the latent space:
*cosine* between found and true velocity; *length*, the component of the found velocity along the true one as a share of
the latter (both are medians over cells that move at a third of the median speed or more); *growth*, the root mean
square of found minus true rate, both about their snapshot's mean, together with the rms of the true rates, which is the
error of a guess of zero, and the correlation of both. Values are means over snapshots, then over draws. Courses with
diffusion have no unique true velocity and are left out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from courses import DIFFUSE, load, on_draws
from tables import shown, table

from sctraj import tl
from sctraj.datasets._courses import Family

COURSES = [
    f"{family}{effects}" for family in get_args(Family) if family not in DIFFUSE for effects in ("", "+effects", ":12")
]
METHODS = {
    "uot-cfm": {},
    "moving frame": {"frame": "moving"},
    "closed-form field": {"field": "closed-form"},
    "ot-cfm": {"method": "ot-cfm"},
}
SLOW = 1 / 3  # of the median speed, below which a cell has no direction to speak of
MEASURES = ("cosine", "length", "growth", "correlation")


def judged(name: str, seed: int, n_cells: int, real: Path, n_steps: int | None) -> list[dict]:
    if name.startswith(DIFFUSE):
        return []
    torch.set_num_threads(1)
    logging.getLogger("sctraj").setLevel(logging.WARNING)  # of this process
    adata, _ = load(name, seed, n_cells, real)
    rows = []
    for method, settings in METHODS.items():
        steps = {} if n_steps is None or "field" in settings else {"n_steps": n_steps}
        tl.fit_flow(adata, rng=seed, **settings, **steps)
        for time in sorted(adata.obs["time"].unique())[1:-1]:
            own = (adata.obs["time"] == time).to_numpy()
            true = adata.obsm["drift_latent"][own].astype(float)
            found = adata.obsm["flow_velocity"][own] @ adata.varm["latent_axes"][:, : true.shape[1]]
            speed = np.linalg.norm(true, axis=1)
            moving = speed > SLOW * np.median(speed)
            along = (found * true).sum(1)[moving] / speed[moving]
            row = {"data": name, "method": method, "cosine": np.median(along / np.linalg.norm(found[moving], axis=1))}
            row["length"] = np.median(along / speed[moving])
            if "flow_growth" in adata.obs:
                rates = (adata.obs[column][own].to_numpy(dtype=float) for column in ("flow_growth", "growth_rate"))
                growth, truth = (rate - rate.mean() for rate in rates)
                row |= {"growth": np.sqrt(np.mean((growth - truth) ** 2)), "true": truth.std()}
                if truth.any():
                    row["correlation"] = np.corrcoef(growth, truth)[0, 1]
            rows.append(row)
    return rows


def report(frame: pd.DataFrame) -> str:
    """A row a data set; by method cosine, length, and where it has growth its error (of what a guess of zero has)."""
    rows = []
    for name, part in frame.groupby("data", sort=False):
        cells = []
        for method in METHODS:
            mean = part[part["method"] == method][[*MEASURES, "true"]].mean()
            text = ", ".join(shown(mean[measure], 2) for measure in MEASURES[:2])
            if np.isfinite(mean["growth"]):
                text += f"; {shown(mean['growth'], 2)} of {shown(mean['true'], 2)}"
            if np.isfinite(mean["correlation"]):
                text += f", {shown(mean['correlation'], 2)}"
            cells.append(text)
        rows.append([name, *cells])
    return table(["cosine, length; growth, correlation", *METHODS], rows)


def main() -> None:
    print(report(on_draws(__doc__.splitlines()[0], COURSES, judged, seeds=2)))


if __name__ == "__main__":
    main()
