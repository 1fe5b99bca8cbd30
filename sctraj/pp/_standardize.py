"""Compute the space in which the published protocol works: `standardize`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .._adata import check_anndata, check_key, own, read_rep
from .._log import logger

if TYPE_CHECKING:
    from anndata import AnnData


def standardize(
    adata: AnnData, use_rep: str = "X_pca", *, n_dims: int = 5, key_added: str = "X_std", copy: bool = False
) -> AnnData | None:
    """Scale the first dimensions of a representation to mean 0 and standard deviation 1 over all cells.

    With the defaults, this gives the space of the published five-dimensional leave-one-timepoint-out protocol.
    Distances in it are in units of standard deviations.

    Parameters
    ----------
    adata
        Annotated data, cells in rows.
    use_rep
        Key of ``adata.obsm``, or ``"X"`` for the matrix itself (a sparse one is made dense).
    n_dims
        Number of dimensions to take, starting with the first.
    key_added
        Name of the representation and of the record that are written.
    copy
        Return a modified copy and leave `adata` unchanged.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Sets:

    ``obsm[key_added]`` : float32, n_obs x n_dims
        Per dimension, the value minus the mean, divided by the population standard deviation (``ddof=0``).
    ``uns[key_added]`` : dict
        ``use_rep``, and ``mean`` and ``std`` (float64, n_dims each) in the units of `use_rep`.

    Raises
    ------
    KeyError
        No such representation.
    TypeError
        `n_dims` is not an integer.
    ValueError
        Fewer dimensions than `n_dims`; a dimension with the same value for every cell; values that are not finite; a
        `key_added` that names the source, or something that was not written by this function. `adata` is then left as
        it was.

    Notes
    -----
    The mean and standard deviation are computed from the cells of every snapshot, including any that is held out later.
    The published numbers are defined in this way; a protocol that must not do this fits the space without the held-out
    snapshot.
    """
    check_anndata(adata)
    if key_added == use_rep:
        raise ValueError(f'key_added is "{use_rep}", the source, which is never overwritten. Pass another.')
    check_key(key_added)
    record = adata.uns.get(key_added)
    ours = isinstance(record, Mapping) and {"use_rep", "mean", "std"} <= {*record}
    for slot, name in ((adata.obsm, "obsm"), (adata.uns, "uns")):
        if key_added in slot and not ours:
            raise ValueError(
                f'adata.{name}["{key_added}"] is there already, without the record of sctraj.pp.standardize. Pass '
                f'another key_added, or delete it first: del adata.{name}["{key_added}"].'
            )
    n_dims = operator.index(n_dims)
    values = read_rep(adata, use_rep)
    if not 1 <= n_dims <= values.shape[1]:
        raise ValueError(
            f'n_dims must be 1 to {values.shape[1]}, the number of dimensions of "{use_rep}", not {n_dims}. '
            f"Pass another n_dims, or another use_rep."
        )
    values = values[:, :n_dims].astype(np.float64)
    # differences by rounding do not count as variation: 0.3 and 0.1 + 0.2
    constant = np.flatnonzero(np.ptp(values, axis=0) <= 4 * np.finfo(np.float64).eps * np.abs(values).max(axis=0))
    if constant.size:
        raise ValueError(
            f'Expected dimensions that vary between cells; of "{use_rep}", dimension {", ".join(map(str, constant))} '
            f"(the first is 0) has one value for all {len(values)} cells. Leave it out of the representation."
        )
    mean, std = values.mean(axis=0), values.std(axis=0)

    adata = own(adata, copy=copy)
    adata.obsm[key_added] = ((values - mean) / std).astype(np.float32)
    adata.uns[key_added] = {"use_rep": use_rep, "mean": mean, "std": std}
    logger.info(
        f'standardized the first {n_dims} dimensions of "{use_rep}"; wrote obsm["{key_added}"], uns["{key_added}"]'
    )
    return adata if copy else None
