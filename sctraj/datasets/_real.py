"""Published time courses, downloaded from where their authors deposited them."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from ._download import Source, fetched
from ._load import read_arrays

_MENDELEY = "https://data.mendeley.com/public-files/datasets/hhny5ff7yj/files"
EMBRYOID_BODY = Source(
    "eb_velocity_v5.npz",
    "https://github.com/KrishnaswamyLab/TrajectoryNet/raw/master/data/eb_velocity_v5.npz",
    "git:06b92296690840bb4c146085b6cd18ad89667c74",
)
CITE = Source(
    "op_cite_inputs_0.h5ad",
    f"{_MENDELEY}/1862acf5-6294-4eb1-8644-d1c6d25e4126/file_downloaded",
    "sha256:fa1d117df3d6c23e0b80a997a259bcac3a79ad27d581e1a6654e107c39885e4c",
)
MULTIOME = Source(
    "op_train_multi_targets_0.h5ad",
    f"{_MENDELEY}/5f4b6e5b-f122-4f5a-8ede-0d188c5cf00c/file_downloaded",
    "sha256:a16c28ef861503111bb2f4c6ab6b1d5ed3df07d49eb0baa7378515fc098af4d2",
)

_WINDOWS = ("Day 00-03", "Day 06-09", "Day 12-15", "Day 18-21", "Day 24-27")  # of the five embryoid-body samples
_DAYS = (2.0, 3.0, 4.0, 7.0)  # of the two courses from Kaggle


def embryoid_body(*, cache: str | os.PathLike[str] | None = None, progress: bool = True) -> ad.AnnData:
    """Load embryoid bodies over 27 days, five snapshots: the benchmark file of TrajectoryNet, downloaded once.

    Differentiating human embryonic stem cells, sampled in windows of three days (Moon et al. 2019), with principal
    components and RNA velocity as published with TrajectoryNet (Tong et al. 2020). TrajectoryNet, OT-CFM and others
    report results on these. The content is checked against its id in that git repository.

    Parameters
    ----------
    cache
        Folder of the downloaded file; by default the environment variable ``SCTRAJ_DATA``, or else the user's cache
        folder.
    progress
        Whether to show a progress bar while downloading.

    Returns
    -------
    AnnData of n_obs x 0, in the file's order, with

    - `obsm["X_pca"]`, n_obs x 100, float32: principal components, as in the file (not standardised)
    - `obsm["velocity_pca"]`, n_obs x 100, float32: RNA velocity in these components, per its own unit of time
    - `obs["time"]`, float64: 0, 1, 2, 3, 4, as in the published benchmarks, in steps of 6 days
    - `obs["day"]`, ordered categorical: the windows, "Day 00-03" to "Day 24-27"; for real days
      ``sctraj.pp.parse_time(adata, "day", window="midpoint")``
    - `uns["dataset"]`: name, address, hash of the content, and reference

    Raises
    ------
    ConnectionError
        If the file is not in the cache folder and cannot be downloaded; the message says where to put it.
    ValueError
        If the file has another content, or is not laid out as above.
    """
    path = fetched(EMBRYOID_BODY, cache=cache, progress=progress)
    # "delta_embedding", also in the file, is the velocity in two PHATE coordinates (TrajectoryNet, dataset.py)
    arrays = read_arrays(path, ("pcs", "pcs_delta", "sample_labels"))
    pcs, velocity, label = arrays["pcs"], arrays["pcs_delta"], arrays["sample_labels"]
    if pcs.ndim != 2 or velocity.shape != pcs.shape or label.shape != pcs.shape[:1]:
        raise ValueError(
            f"expected pcs and pcs_delta of one shape (n, d) and sample_labels (n,) in {path}, found "
            f"{pcs.shape}, {velocity.shape}, {label.shape}"
        )
    if not np.array_equal(np.unique(label), np.arange(len(_WINDOWS))):
        raise ValueError(f"expected sample_labels 0 to {len(_WINDOWS) - 1} in {path}, found {np.unique(label)}")
    code = label.astype(int)
    day = pd.Categorical.from_codes(code, categories=list(_WINDOWS), ordered=True)
    return ad.AnnData(
        obs=pd.DataFrame({"time": code.astype(float), "day": day}, index=[f"cell_{i}" for i in range(len(code))]),
        obsm={"X_pca": pcs.astype(np.float32), "velocity_pca": velocity.astype(np.float32)},
        uns={"dataset": _described("embryoid_body", EMBRYOID_BODY, "Moon et al. 2019, Tong et al. 2020")},
    )


def cite(*, cache: str | os.PathLike[str] | None = None, progress: bool = True) -> ad.AnnData:
    """Load blood stem cells on days 2, 3, 4 and 7, CITE-seq: as published with OT-CFM, downloaded once (1.2 GB).

    One donor's cells from the Open Problems competition of 2022 (Kaggle, "Multimodal Single-Cell Integration"),
    selected and reduced by Tong et al. (2023) and published as Mendeley Data hhny5ff7yj, version 1. The content is
    checked against its SHA-256. The genes remain in the downloaded file, which ``anndata.read_h5ad`` can read.

    Parameters
    ----------
    cache
        Folder of the downloaded file; by default the environment variable ``SCTRAJ_DATA``, or else the user's cache
        folder.
    progress
        Whether to show a progress bar while downloading.

    Returns
    -------
    AnnData of n_obs x 0, in the file's order, with

    - `obsm["X_pca"]`, float32: principal components, as in the file (not standardised)
    - `obs["time"]`, float64: the real days
    - `obs`: the file's own columns (`day` and others)
    - `uns["dataset"]`: name, address, hash of the content, and reference

    Raises
    ------
    ConnectionError
        If the file is not in the cache folder and cannot be downloaded; the message says where to put it.
    ValueError
        If the file has another content, or is not laid out as above.
    """
    path = fetched(CITE, cache=cache, progress=progress)
    return _read_course(path, _described("cite", CITE, "Tong et al. 2023"))


def multiome(*, cache: str | os.PathLike[str] | None = None, progress: bool = True) -> ad.AnnData:
    """Load blood stem cells on days 2, 3, 4 and 7, Multiome: as published with OT-CFM, downloaded once (1.1 GB).

    These are the RNA measurements by the other technology in the competition that :func:`cite` comes from.

    Parameters
    ----------
    cache
        Folder of the downloaded file; by default the environment variable ``SCTRAJ_DATA``, or else the user's cache
        folder.
    progress
        Whether to show a progress bar while downloading.

    Returns
    -------
    AnnData laid out as that of :func:`cite`.

    Raises
    ------
    ConnectionError
        If the file is not in the cache folder and cannot be downloaded; the message says where to put it.
    ValueError
        If the file has another content, or is not laid out as expected.
    """
    path = fetched(MULTIOME, cache=cache, progress=progress)
    return _read_course(path, _described("multiome", MULTIOME, "Tong et al. 2023"))


def _read_course(path: Path, description: dict[str, str]) -> ad.AnnData:
    """Read the cells and principal components, but not the genes, of one of the two courses from Kaggle."""
    try:
        whole = ad.read_h5ad(path, backed="r")
    except Exception as error:
        raise ValueError(f"expected an h5ad file, found one that anndata cannot read: {path} ({error})") from error
    try:
        if "day" not in whole.obs or "X_pca" not in whole.obsm:
            found = f"obs {list(whole.obs)}, obsm {list(whole.obsm)}"
            raise ValueError(f'expected obs["day"] and obsm["X_pca"] in {path}, found {found}')
        obs, pca = whole.obs.copy(), np.asarray(whole.obsm["X_pca"], dtype=np.float32)
    finally:
        whole.file.close()
    obs["time"] = pd.to_numeric(obs["day"].astype(str), errors="coerce").to_numpy(dtype=np.float64)
    if tuple(sorted(obs["time"].unique())) != _DAYS:
        raise ValueError(f'expected days {_DAYS} in obs["day"] of {path}, found {sorted(obs["day"].unique())}')
    return ad.AnnData(obs=obs, obsm={"X_pca": pca}, uns={"dataset": description})


def _described(name: str, source: Source, reference: str) -> dict[str, str]:
    return {"name": name, "url": source.url, "content": source.known, "reference": reference}
