"""The published protocol on the data that it was published with, and published values to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._grid import PUBLISHED, Data, Grid, make_grid
from ._report import points

if TYPE_CHECKING:
    from anndata import AnnData

# Mean W1 in 5 dimensions, without the deviations between seeds, as collected in the project's note on the protocol:
# OT-CFM, I-CFM, SB-CFM, [SF]2M and TrajectoryNet after Tong et al. 2023 ("Simulation-free Schroedinger bridges via
# score and flow matching"), OT-MFM after Kapusniak et al. 2024 ("Metric flow matching"). The note does not say which
# paper reports Cell-MNN and the interpolation.
VALUES: dict[str, dict[str, float]] = {
    "SB-CFM (sigma 1)": {"embryoid-body": 1.221, "cite": 1.067, "multiome": 1.129},
    "I-CFM": {"embryoid-body": 0.872, "cite": 0.965, "multiome": 1.085},
    "TrajectoryNet": {"embryoid-body": 0.848},
    "[SF]2M-Exact": {"embryoid-body": 0.793, "cite": 0.920, "multiome": 0.933},
    "OT-CFM": {"embryoid-body": 0.790, "cite": 0.882, "multiome": 0.937},
    "exact OT interpolation, no network": {"embryoid-body": 0.749, "cite": 0.821, "multiome": 0.830},
    "OT-MFM (metric flow matching)": {"embryoid-body": 0.713, "cite": 0.724, "multiome": 0.890},
    "Cell-MNN": {"embryoid-body": 0.690, "cite": 0.791, "multiome": 0.742},
}
SAME = {
    "sb-cfm": "SB-CFM (sigma 1)",
    "i-cfm": "I-CFM",
    "ot-cfm": "OT-CFM",
    "ot-interpolation": "exact OT interpolation, no network",
}
METHODS = ("ot-cfm", "i-cfm", "sb-cfm", "uot-cfm")
SIGMA = {"ot-cfm": 0.1, "i-cfm": 0.1, "sb-cfm": 1.0}  # as published; the default method uses its own default
INDEX, REAL = "index clock", "real clock"


def published_data(names: Sequence[str] = tuple(PUBLISHED)) -> tuple[list[Data], dict[str, AnnData], dict[str, str]]:
    """Return the published data sets that are available, with each clock; their cells; and why others are not.

    Embryoid bodies were sampled at even times, so there the index clock equals the real one.
    """
    data: list[Data] = []
    cells: dict[str, AnnData] = {}
    reasons: dict[str, str] = {}
    for name in names:
        even = name == "embryoid-body"
        forms = [Data(f"{name}, {INDEX}", name, index_clock=True)] + ([] if even else [Data(f"{name}, {REAL}", name)])
        try:
            loaded = {one.name: one.load() for one in forms}
        except (OSError, ValueError) as error:
            reasons[name] = " ".join(str(error).split())
            continue
        data += forms
        cells |= loaded
    return data, cells, reasons


def published_grid(
    data: Sequence[Data],
    *,
    n_seeds: int = 5,
    device: str = "cpu",
    threads: int = 1,
    bootstraps: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Grid:
    """Return the published protocol: 5 dimensions standardised over all cells, moving the snapshot before."""
    return make_grid(
        data,
        tasks=("leave-one-out",),
        methods=METHODS,
        settings={**(settings or {}), **{name: {"sigma": sigma} for name, sigma in SIGMA.items()}},
        seeds=n_seeds,
        starts=("before",),
        device=device,
        threads=threads,
        bootstraps=bootstraps,
    )


def beside_published(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean W1 over held-out times, ± sd over seeds, by method and clock, next to the published values.

    All published values are included, even for data sets that were not available.
    """
    rows = points(table, "w1")
    rows = rows.assign(method=rows["method"].str.partition(" (")[0])
    methods = [*METHODS, *(name for name in dict.fromkeys(rows["method"]) if name not in METHODS)]
    out: dict[str, dict[str, str]] = {SAME.get(name, name): {} for name in methods}
    out |= {name: {} for name in VALUES if name not in out}
    columns: list[str] = []
    for name in PUBLISHED:
        columns.append(f"{name}, published")
        for method, values in VALUES.items():
            out[method][columns[-1]] = f"{values[name]:.3f}" if name in values else ""
        for clock in (INDEX, REAL):
            here = rows[rows["data"] == f"{name}, {clock}"]
            columns += [f"{name}, here, {clock}"] if len(here) else []
            for method, own in here.groupby("method"):
                by_seed = own.groupby("seed")["value"].mean()
                spread = f" ± {by_seed.std(ddof=1):.3f}" if np.ptp(by_seed) > 0 else ""
                out[SAME.get(str(method), str(method))][columns[-1]] = f"{by_seed.mean():.3f}{spread}"
    return pd.DataFrame(
        [{"method": method} | {column: values.get(column, "") for column in columns} for method, values in out.items()],
        columns=["method", *columns],
    )
