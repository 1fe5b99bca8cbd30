"""How finely time is cut where nobody says, and checks of what somebody says."""

from __future__ import annotations

import math
import numbers
from typing import get_args

from .._log import logger
from ..flow.integrate import Solver

RK4_STEPS = 10  # per mean gap: off by some 1e-4 of the data's spread, far less than any field is
OTHER_STEPS = 50  # of first order
TOLERANCE = 1e-4  # of steps that a solver chooses itself
STIFF = 10  # times as many where velocities grow without bound towards the snapshots, as a bridge's do


def steps_per_gap(solver: Solver, *, stochastic: bool = False, stiff: bool = False) -> int:
    """Return the steps of a fixed grid per mean gap between snapshots."""
    return (RK4_STEPS if solver == "rk4" and not stochastic else OTHER_STEPS) * (STIFF if stiff else 1)


def steps_between(per_gap: float, t0: float, t1: float, mean_gap: float) -> int:
    """Return the steps of a way between two times; one that is longer by rounding alone has none more."""
    return max(1, math.ceil(per_gap * abs(t1 - t0) / mean_gap - 1e-9))


def check_steps(solver: Solver, n_steps: float, tolerance: float) -> None:
    """Raise a ValueError for a solver that is unknown, steps that are no whole number, or a tolerance of none."""
    if solver not in get_args(Solver):
        raise ValueError(f"expected a solver of {', '.join(get_args(Solver))}, found {solver!r}")
    check_whole("n_steps", n_steps, "; leave it out for the default")
    if not tolerance > 0:
        raise ValueError(f"expected a positive tolerance, found {tolerance!r}; leave it out for the default")


def check_whole(what: str, number: float, advice: str = "") -> None:
    """Raise a ValueError for what is no whole number of at least one."""
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (real and 1 <= number < math.inf and number == int(number)):
        raise ValueError(f"expected a whole number of {what}, at least 1, found {number!r}{advice}")


def warn_of_unused_steps(
    solver: Solver, n_steps: int | None, tolerance: float, *, default: float, stochastic: bool = False
) -> None:
    """Log which of the options nothing uses, ``default`` being the tolerance where none is given."""
    own = solver == "dopri5" and not stochastic
    unused = {
        "solver": stochastic and solver != "rk4",
        "n_steps": n_steps is not None and own,
        "tolerance": tolerance != default and not own,
    }
    if given := [name for name, is_given in unused.items() if is_given]:
        steps = "the simulation" if stochastic else solver
        logger.warning(f"{', '.join(given)} given, without effect on the steps of {steps}")
