"""Prepare an AnnData: the clock (`parse_time`) and the space (`standardize`)."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
