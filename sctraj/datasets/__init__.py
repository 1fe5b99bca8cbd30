"""Data sets: simulated, with the truth known; published, downloaded when first asked for; the user's own."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
