"""Seeds: derived once from the user's ``rng``, then passed down."""

from __future__ import annotations

import numpy as np

from ._steps import check_whole


def seed_of(rng: int | np.random.Generator) -> int:
    """Return the seed for ``rng``: the seed itself, or a number drawn from the Generator."""
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**62))
    if isinstance(rng, bool) or not isinstance(rng, (int, np.integer)) or not 0 <= rng < 2**63:
        raise ValueError(f"expected rng to be a seed of at least 0 or a numpy Generator, found {rng!r}")
    return int(rng)


def member_seeds(seed: int, n: int) -> list[int]:
    """Return ``n`` independent seeds for members."""
    check_whole("members or seeds", n)
    states = np.random.SeedSequence(seed).generate_state(int(n), np.uint64)
    return [int(state >> np.uint64(2)) for state in states]
