"""The exponential, in the way that is fastest on a CPU."""

from __future__ import annotations

import math

from torch import Tensor

BITS = 1 / math.log(2)


def exp_(x: Tensor) -> Tensor:
    """Replace ``x`` by its exponential.

    By ``exp2``: on a CPU ``x.exp_()`` takes three times as long, and forty times as long where the result underflows.
    """
    return x.mul_(BITS).exp2_()
