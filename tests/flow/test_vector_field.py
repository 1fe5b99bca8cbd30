"""Laws of a field's own units: its data's centre and spread, as their weights have them."""

from __future__ import annotations

import pytest
import torch

from sctraj.flow.snapshots import Snapshots
from sctraj.flow.vector_field import scaling


def test_a_cell_of_twice_the_weight_counts_as_two():
    x, y = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (torch.tensor([3.0, 1, 1, 2]), torch.ones(4))
    weighted, repeated = (
        scaling(snapshots, std=0.0)
        for snapshots in (Snapshots((0.0, 1.0), (x, y), weights), Snapshots((0.0, 1.0), (x[[0, 0, 0, 1, 2, 3, 3]], y)))
    )
    torch.testing.assert_close(weighted.shift, repeated.shift)
    assert weighted.scale == pytest.approx(repeated.scale)
