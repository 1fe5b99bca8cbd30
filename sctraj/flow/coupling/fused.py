"""Sums of exponentials over all pairs of two clouds in one pass of a CUDA device: no matrix, no tile in its memory."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 128, 32, 4  # pairs that a program meets at once, by so many threads / 32
PROGRAMS = 2048  # at least, where there are columns enough: they are split among as many
MOST_COORDINATES = 64  # those of a program's cells have to fit a multiprocessor's shared memory
# of an exponent, over the largest cost: three products in tf32 make up for its few bits (2^-22.7 was the most met)
ROUNDING = 2.0**-22
LOWEST = -1e30  # where the largest begins: from minus infinity nothing can be subtracted


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x,  # (d, m)
    y,  # (d, n)
    weight,  # (n,)
    values,  # (n,)
    largest,  # out: (splits, m)
    total,  # out: (splits, m), float64
    m,
    n,
    share,  # columns of a split
    D: tl.constexpr,
    PADDED: tl.constexpr,  # coordinates, as many as the tensor cores ask for
    VALUED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOWEST: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < m
    first = tl.program_id(1) * share
    top = tl.full((ROWS,), LOWEST, tl.float32)
    sums = tl.zeros((ROWS,), tl.float64)
    k = tl.arange(0, PADDED)
    a = tl.load(x + k[None, :] * m + rows[:, None], mask=inside[:, None] & (k[None, :] < D), other=0.0)
    for start in range(first, min(first + share, n), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < n  # a share is a whole number of blocks
        b = tl.load(y + k[:, None] * n + columns[None, :], mask=there[None, :] & (k[:, None] < D), other=0.0)
        exponent = tl.dot(a, b, input_precision="tf32x3")
        exponent += tl.load(weight + columns, mask=there, other=-float("inf"))[None, :]
        higher = tl.maximum(top, tl.max(exponent, 1))
        entries = tl.exp2(exponent - higher[:, None])
        if VALUED:
            entries = entries * tl.load(values + columns, mask=there, other=0.0)[None, :]
        sums = sums * tl.exp2(top - higher).to(tl.float64) + tl.sum(entries, 1).to(tl.float64)
        top = higher
    out = tl.program_id(1) * m + rows
    tl.store(largest + out, top, mask=inside)
    tl.store(total + out, sums, mask=inside)


def row_sums(x: Tensor, y: Tensor, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return of every row ``e_ij = weight_j + x_i . y_j`` the largest entry and ``sum_j exp(e_ij - largest) values_j``.

    Entries are float32, sums of blocks of them are added up in float64.

    Parameters
    ----------
    x, y
        ``(m, d)`` and ``(n, d)``, float64, on one CUDA device; at most ``MOST_COORDINATES``.
    weight
        ``(n,)``, float64; minus infinity, or far above -1e30.
    values
        ``(n,)``; ones by default.

    Returns
    -------
    ``(m,)`` each, float64.
    """
    (m, d), n, bits = x.shape, len(y), 1 / math.log(2)
    programs = triton.cdiv(m, ROWS)
    splits = max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(n, 4 * COLUMNS)))
    share = triton.cdiv(triton.cdiv(n, splits), COLUMNS) * COLUMNS
    splits = triton.cdiv(n, share)
    ends = (end.float().T.contiguous() for end in (x * bits, y))
    weight = (weight * bits).float()
    largest, total = weight.new_empty(splits, m), x.new_empty(splits, m)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # a kernel runs where its caller is
        _kernel[(programs, splits)](
            *ends, weight, weight if values is None else values.float(), largest, total, m, n, share,
            D=d, PADDED=max(16, triton.next_power_of_2(d)), VALUED=values is not None,
            ROWS=ROWS, COLUMNS=COLUMNS, LOWEST=LOWEST, num_warps=WARPS,
        )  # fmt: skip
    top = largest.amax(0)
    return top.double() / bits, (total * (largest - top).double().exp2()).sum(0)
