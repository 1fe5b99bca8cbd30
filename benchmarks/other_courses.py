"""Write two more real time courses for restoration.py and the peers, whose held-out snapshots influenced no choice.

python benchmarks/other_courses.py HSMMSingleCell/data destiny/data --output others

- ``myoblast_271.h5ad``: differentiating human skeletal myoblasts, 0, 24, 48 and 72 hours after the switch of medium,
  271 cells (Trapnell et al. 2014; R package HSMMSingleCell, Artistic-2.0). ``X``: log(1 + FPKM) of the 2,000 most
  variable among genes that have 1 FPKM in at least ten cells.
- ``mouse_embryo_428.h5ad``: mouse embryos of 2 to 64 cells, qPCR of 48 genes, 428 cells (Guo et al. 2010; ``guo_norm``
  of the R package destiny, GPL-3). ``X``: as in the package, normalised by each cell's endogenous controls. Time is the
  number of divisions.

Both packages are available from Bioconductor and in some Linux distributions. This needs ``pip install rdata``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import rdata
import scanpy as sc

N_GENES, EXPRESSED_IN = 2000, 10
HOURS, CELLS = (0, 24, 48, 72), (2, 4, 8, 16, 32, 64)


def read(path: Path) -> Any:
    """Read the one object of a file of R's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes of Bioconductor, read as plain records
        (found,) = rdata.read_rda(path).values()
    return found


def timed(x: np.ndarray, genes: Sequence[Any], obs: pd.DataFrame, time: str, expected: Sequence[int]) -> ad.AnnData:
    """Cells by genes, with their labels and among them the clock; as many different times as expected."""
    if (found := sorted(set(obs[time]))) != list(expected):
        raise ValueError(f"expected {time} {list(expected)}, found {found}")
    return ad.AnnData(np.asarray(x, dtype=np.float32), obs=obs, var=pd.DataFrame(index=[str(gene) for gene in genes]))


def myoblasts(folder: Path) -> ad.AnnData:
    fpkm, sheet = read(folder / "HSMM_expr_matrix.rda"), read(folder / "HSMM_sample_sheet.rda")
    hours = [int(str(hour)) for hour in sheet["Hours"]]  # a factor
    obs = pd.DataFrame({"hours": hours}, index=[str(name) for name in sheet.index])
    if list(fpkm.dim_1.values) != list(obs.index):
        raise ValueError(f"expected one order of cells in {folder / 'HSMM_expr_matrix.rda'} and the sample sheet")
    adata = timed(fpkm.values.T, fpkm.dim_0.values, obs, "hours", HOURS)
    adata.obs["time"] = adata.obs["hours"].astype(float)
    adata = adata[:, (adata.X >= 1).sum(0) >= EXPRESSED_IN].copy()
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=N_GENES)
    return adata[:, adata.var["highly_variable"]].copy()


def embryos(folder: Path) -> ad.AnnData:
    found = read(folder / "guo_norm.rda")
    expression, cells = found.assayData["exprs"], found.phenoData.data
    obs = pd.DataFrame({"num_cells": cells["num_cells"].to_numpy(dtype=int)}, index=[str(i) for i in range(len(cells))])
    adata = timed(expression.values.T, expression.dim_0.values, obs, "num_cells", CELLS)
    adata.obs["time"] = np.log2(adata.obs["num_cells"].to_numpy(dtype=float))
    return adata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("myoblasts", type=Path, help="folder of HSMM_expr_matrix.rda and HSMM_sample_sheet.rda")
    parser.add_argument("embryos", type=Path, help="folder of guo_norm.rda")
    parser.add_argument("-o", "--output", type=Path, default=Path("others"), help="folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for adata, name in ((myoblasts(args.myoblasts), "myoblast"), (embryos(args.embryos), "mouse_embryo")):
        path = args.output / f"{name}_{adata.n_obs}.h5ad"
        adata.write_h5ad(path)
        print(f"{path}: {adata.n_obs} cells x {adata.n_vars} genes, times {sorted(set(adata.obs['time']))}")


if __name__ == "__main__":
    main()
