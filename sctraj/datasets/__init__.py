"""Data sets: simulated ones with known truth, published ones that are downloaded on first use, and the user's own."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
