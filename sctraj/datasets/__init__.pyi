from ._simulated import simulated_differentiation as simulated_differentiation

__all__ = ["simulated_differentiation"]
