"""Distances between two clouds of cells: arrays in, one float out; for large clouds, an estimate with its error."""

from .flow.distance import (
    energy_distance,
    estimated_energy_distance,
    estimated_mmd,
    estimated_wasserstein,
    mmd,
    sinkhorn_divergence,
    sliced_wasserstein,
    variance_ratio,
    wasserstein,
)

__all__ = [
    "energy_distance",
    "estimated_energy_distance",
    "estimated_mmd",
    "estimated_wasserstein",
    "mmd",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "variance_ratio",
    "wasserstein",
]
