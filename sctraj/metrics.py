"""Distances between two clouds of cells, as arrays in, one float out."""

from .flow.distance import energy_distance, mmd, sinkhorn_divergence, sliced_wasserstein, variance_ratio, wasserstein

__all__ = ["energy_distance", "mmd", "sinkhorn_divergence", "sliced_wasserstein", "variance_ratio", "wasserstein"]
