"""Sums of exponentials over all pairs of two clouds in one pass on a CUDA device, without storing matrix or tiles."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 128, 32, 4  # rows and columns that a program handles at once, by so many threads / 32
PROGRAMS = 2048  # at least so many, if there are enough columns to split among them
MOST_COORDINATES = 64  # the coordinates of a program's cells have to fit into a multiprocessor's shared memory
# error of an exponent, relative to the largest cost: three products in tf32 make up for its few bits (at most 2^-22.7
# was observed)
ROUNDING = 2.0**-22
LOWEST = -1e30  # initial value of the maximum: nothing can be subtracted from minus infinity


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
    share,  # columns per split
    D: tl.constexpr,
    PADDED: tl.constexpr,  # number of coordinates, padded to what the tensor cores require
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
        there = columns < n  # a share consists of whole blocks
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
    """Return, for every row ``e_ij = weight_j + x_i . y_j``, its maximum and ``sum_j exp(e_ij - maximum) values_j``.

    Entries are float32; the sums over blocks are added up in float64.

    Parameters
    ----------
    x, y
        ``(m, d)`` and ``(n, d)``, float64, on one CUDA device; ``d`` at most ``MOST_COORDINATES``.
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
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # a kernel runs on the current device
        _kernel[(programs, splits)](
            *ends, weight, weight if values is None else values.float(), largest, total, m, n, share,
            D=d, PADDED=max(16, triton.next_power_of_2(d)), VALUED=values is not None,
            ROWS=ROWS, COLUMNS=COLUMNS, LOWEST=LOWEST, num_warps=WARPS,
        )  # fmt: skip
    top = largest.amax(0)
    return top.double() / bits, (total * (largest - top).double().exp2()).sum(0)
