"""Time steps of the integration: defaults, and checks of the user's options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import get_args

import numpy as np

from .._log import logger
from ..flow.integrate import Solver

RK4_STEPS = 10  # per mean gap: the error is some 1e-4 of the data's spread, far less than that of any field
OTHER_STEPS = 50  # for first-order solvers
TOLERANCE = 1e-4  # for solvers that choose their own steps
AS_SHOWN = 1e-3  # of the smallest gap: so far from a snapshot's time is still that time
STIFF = 10  # times as many steps if velocities grow without bound towards the snapshots, as those of a bridge do


def steps_per_gap(solver: Solver, *, stochastic: bool = False, stiff: bool = False) -> int:
    """Return the number of steps of a fixed grid per mean gap between snapshots."""
    return (RK4_STEPS if solver == "rk4" and not stochastic else OTHER_STEPS) * (STIFF if stiff else 1)


def steps_between(per_gap: float, t0: float, t1: float, mean_gap: float) -> int:
    """Return the number of steps between two times; a length in excess by rounding only adds none."""
    return max(1, math.ceil(per_gap * abs(t1 - t0) / mean_gap - 1e-9))


def near(time: float, times: Sequence[float]) -> int | None:
    """Return the number of the snapshot whose time this is, as times are shown or kept in single precision, or None."""
    off = np.abs(np.asarray(times) - time)
    nearest = int(off.argmin())
    smallest = float(np.diff(times).min()) if len(times) > 1 else 1.0
    return nearest if off[nearest] <= AS_SHOWN * smallest else None


def check_steps(solver: Solver, n_steps: float, tolerance: float) -> None:
    """Raise a ValueError for an unknown solver, steps that are not a whole number, or a tolerance not above zero."""
    if solver not in get_args(Solver):
        raise ValueError(f"expected a solver of {', '.join(get_args(Solver))}, found {solver!r}")
    check_whole("n_steps", n_steps, "; leave it out for the default")
    if not tolerance > 0:
        raise ValueError(f"expected a positive tolerance, found {tolerance!r}; leave it out for the default")


def check_whole(what: str, number: float, advice: str = "") -> None:
    """Raise a ValueError unless ``number`` is a whole number of at least one."""
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (real and 1 <= number < math.inf and number == int(number)):
        raise ValueError(f"expected a whole number of {what}, at least 1, found {number!r}{advice}")


def warn_of_unused_steps(
    solver: Solver, n_steps: int | None, tolerance: float, *, default: float, stochastic: bool = False
) -> None:
    """Log which of the options have no effect; ``default`` is the tolerance that counts as not given."""
    own = solver == "dopri5" and not stochastic
    unused = {
        "solver": stochastic and solver != "rk4",
        "n_steps": n_steps is not None and own,
        "tolerance": tolerance != default and not own,
    }
    if given := [name for name, is_given in unused.items() if is_given]:
        steps = "the simulation" if stochastic else solver
        logger.warning(f"{', '.join(given)} given, without effect on the steps of {steps}")
