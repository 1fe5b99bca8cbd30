"""Continuous trajectories between single-cell snapshots by conditional flow matching."""

import lazy_loader as _lazy

__version__ = "0.1.0"

# SPEC 1: torch, POT, scanpy and matplotlib are imported on first use
__getattr__, __dir__, _ = _lazy.attach_stub(__name__, __file__)

__all__ = ["__version__", "benchmark", "datasets", "get", "metrics", "pl", "pp", "tl"]
