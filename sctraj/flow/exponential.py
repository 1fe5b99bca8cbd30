"""The exponential, as a CPU takes it fastest."""

from __future__ import annotations

import math

from torch import Tensor

BITS = 1 / math.log(2)


def exp_(x: Tensor) -> Tensor:
    """Replace ``x`` by its exponential.

    By ``exp2``: on a CPU ``x.exp_()`` takes three times as long, and forty times where what comes of it underflows.
    """
    return x.mul_(BITS).exp2_()
