"""How finely time is cut where nobody says."""

from __future__ import annotations

from ..flow.integrate import Solver

RK4_STEPS = 10  # per mean gap: off by some 1e-4 of the data's spread, far less than any field is
OTHER_STEPS = 50  # of first order


def steps_per_gap(solver: Solver, *, stochastic: bool = False) -> int:
    """Return the steps of a fixed grid per mean gap between snapshots."""
    return RK4_STEPS if solver == "rk4" and not stochastic else OTHER_STEPS
