"""Prepare an AnnData: its times (`parse_time`) and its representation (`standardize`)."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
