"""Benchmarks of methods x tasks x data sets x seeds, computed in units that can be resumed; tables and a report."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
