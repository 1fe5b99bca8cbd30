"""Random streams: made once at the door, handed down as seeds."""

from __future__ import annotations

import math
import numbers

import numpy as np


def seed_of(rng: int | np.random.Generator) -> int:
    """Return the seed that stands for ``rng``: itself, or a number drawn from a Generator."""
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**62))
    if isinstance(rng, bool) or not isinstance(rng, (int, np.integer)) or not 0 <= rng < 2**63:
        raise ValueError(f"expected rng to be a seed of at least 0 or a numpy Generator, found {rng!r}")
    return int(rng)


def member_seeds(seed: int, n: int) -> list[int]:
    """Return ``n`` independent seeds of members."""
    whole = isinstance(n, numbers.Real) and not isinstance(n, bool) and 1 <= n < math.inf and n == int(n)
    if not whole:
        raise ValueError(f"expected a whole number of members or seeds, at least 1, found {n!r}")
    states = np.random.SeedSequence(seed).generate_state(int(n), np.uint64)
    return [int(state >> np.uint64(2)) for state in states]
