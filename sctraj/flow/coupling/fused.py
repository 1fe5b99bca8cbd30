"""Sums of exponentials over all pairs of two clouds in one pass of a CUDA device: no matrix, no tile in its memory."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # pairs that a program meets at once
FEW = 8  # coordinates up to which products are sums of single terms; more are left to the tensor cores, in float32
LOWEST = -1e30  # instead of minus infinity, from which nothing can be subtracted


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x,  # (d, m)
    y,  # (d, n)
    weight,  # (n,)
    values,  # (n,)
    largest,  # out: (m,)
    total,  # out: (m,) float64
    m,
    n,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # coordinates of a product on tensor cores, 0: none is
    VALUED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOWEST: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < m
    top = tl.full((ROWS,), LOWEST, weight.dtype.element_ty)
    sums = tl.zeros((ROWS,), tl.float64)
    if PADDED > 0:
        k = tl.arange(0, PADDED)
        a = tl.load(x + k[None, :] * m + rows[:, None], mask=inside[:, None] & (k[None, :] < D), other=0.0)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < n
        exponent = tl.load(weight + columns, mask=there, other=LOWEST)[None, :]
        if PADDED > 0:
            b = tl.load(y + k[:, None] * n + columns[None, :], mask=there[None, :] & (k[:, None] < D), other=0.0)
            exponent = exponent + tl.dot(a, b, input_precision="tf32x3")
        else:
            for c in tl.static_range(D):
                own = tl.load(x + c * m + rows, mask=inside, other=0.0)
                other = tl.load(y + c * n + columns, mask=there, other=0.0)
                exponent = exponent + own[:, None] * other[None, :]
        higher = tl.maximum(top, tl.max(exponent, 1))
        entries = tl.exp2(exponent - higher[:, None])
        if VALUED:
            entries = entries * tl.load(values + columns, mask=there, other=0.0)[None, :]
        sums = sums * tl.exp2(top - higher).to(tl.float64) + tl.sum(entries, 1).to(tl.float64)
        top = higher
    tl.store(largest + rows, top, mask=inside)
    tl.store(total + rows, sums, mask=inside)


def row_sums(
    x: Tensor, y: Tensor, weight: Tensor, values: Tensor | None = None, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return of every row ``e_ij = weight_j + x_i . y_j`` the largest entry and ``sum_j exp(e_ij - largest) values_j``.

    Parameters
    ----------
    x, y
        ``(m, d)`` and ``(n, d)``, float64, on one CUDA device.
    weight
        ``(n,)``, float64; minus infinity, or far above -1e30.
    values
        ``(n,)``; ones by default.
    dtype
        In which entries are made; sums are float64.

    Returns
    -------
    ``(m,)`` each, float64.
    """
    (m, d), n, bits = x.shape, len(y), 1 / math.log(2)
    padded = 0 if d <= FEW or dtype == torch.float64 else max(16, triton.next_power_of_2(d))
    ends = (end.to(dtype).T.contiguous() for end in (x * bits, y))
    weight = (weight * bits).to(dtype)
    valued = values is not None
    values = weight if values is None else values.to(dtype)
    largest, total = torch.empty_like(x[:, 0], dtype=dtype), torch.empty_like(x[:, 0])
    _kernel[(triton.cdiv(m, ROWS),)](
        *ends, weight, values, largest, total, m, n, D=d, PADDED=padded, VALUED=valued, ROWS=ROWS, COLUMNS=COLUMNS,
        LOWEST=LOWEST,
    )  # fmt: skip
    return largest.double() / bits, total
