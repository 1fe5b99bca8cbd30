"""Euclidean distances between two clouds: by products in many dimensions, without the precision that these lose."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FEW_DIMENSIONS = 16  # up to so many, differences take no longer
NEAR = 1 / 16  # of a point's distance from the centre: nearer pairs are computed again by differences
MANY_NEAR = 16  # if one in so many pairs is that near, all are
CENTRAL = 64  # at least so many points, whose median is the centre
GATHERED = 2**22  # at most so many numbers in the differences computed at once


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return all distances ``(n, m)`` between points ``(n, d)`` and ``(m, d)``, float64 on the CPU.

    In many dimensions ``|x|^2 - 2 x y + |y|^2``, about a centre, takes a fifth of the time of differences, but is off
    by the rounding of the squares. Where that would be more than some 1e-12 of a distance, the distance is computed
    from differences after all; so points at one place have distance zero.
    """
    if x.shape[1] <= FEW_DIMENSIONS:
        return _by_differences(x, y)
    centre = y[:: max(1, len(y) // CENTRAL)].median(0).values  # which no outlying point moves
    from_centre = x - centre
    found = torch.cdist(from_centre, y - centre, compute_mode="use_mm_for_euclid_dist")
    # it is enough to look at x: if only y is far from the centre, the pair is not near
    near = (found <= NEAR * from_centre.norm(dim=1, keepdim=True)).numpy()
    if np.count_nonzero(near) * MANY_NEAR > near.size:
        return _by_differences(x, y)
    for part in torch.from_numpy(np.flatnonzero(near)).split(max(1, GATHERED // x.shape[1])):
        i, j = part // len(y), part % len(y)
        found[i, j] = (x[i] - y[j]).norm(dim=1)
    return found


def _by_differences(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
