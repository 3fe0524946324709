"""The Triton kernel of a weight's gradient: for each expert, the product of two tall matrices over the rows that it owns."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_parts import multiply, narrow, opaque
from .product import place


@triton.jit
def _gram(A, B, Token, Offsets, Out, Total, n, k, a_row, a_column, b_row, b_column,
          GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, SUM: tl.constexpr,
          M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(n, M), tl.cdiv(k, N)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    row_tile, column_tile = place(tl.program_id(0) % (row_tiles * column_tiles), row_tiles, column_tiles)
    begin = tl.load(Offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(Offsets + expert)
    i, j = row_tile * M + tl.arange(0, M), column_tile * N + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    total = tl.zeros((M,), tl.float32)
    following = tl.load(Token + begin + tl.arange(0, ROWS), mask=begin + tl.arange(0, ROWS) < end, other=0)
    for at in range(begin, end, ROWS):
        pair = at + tl.arange(0, ROWS)
        real = pair < end
        token = following
        # one step ahead: rows whose addresses are loaded in the same step cannot be fetched early
        following = tl.load(Token + pair + ROWS, mask=pair + ROWS < end, other=0)
        row_a, row_b = pair.to(tl.int64), pair.to(tl.int64)
        if GATHER_A:
            row_a = token
        if GATHER_B:
            row_b = token
        a = tl.load(
            A + row_a[None, :] * a_row + i[:, None] * a_column, mask=real[None, :] & (i < n)[:, None], other=0.0
        )
        b = tl.load(
            B + row_b[:, None] * b_row + j[None, :] * b_column, mask=real[:, None] & (j < k)[None, :], other=0.0
        )
        acc = multiply(a, b, acc)
        if SUM:
            total += tl.sum(a.to(tl.float32), 1)
    out = Out + expert.to(tl.int64) * n * k + i.to(tl.int64)[:, None] * k + j[None, :]
    tl.store(out, narrow(acc, Out.dtype.element_ty), mask=(i < n)[:, None] & (j < k)[None, :])
    if SUM:  # noqa: SIM102 - known when compiled, the other is not
        if column_tile == 0:
            tl.store(Total + expert * n + i, narrow(total, Total.dtype.element_ty), mask=i < n)


def _fake(a: Tensor, b: Tensor, token: Tensor, offsets: Tensor, gather_a: bool, gather_b: bool, total: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    experts = offsets.shape[0]
    return a.new_empty(experts, a.shape[1], b.shape[1]), a.new_empty(experts if total else 0, a.shape[1])


@opaque(_fake)
def gram(a: Tensor, b: Tensor, token: Tensor, offsets: Tensor, gather_a: bool, gather_b: bool, total: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum over expert e's pairs of a_p b_p^T, for every e; an expert without pairs gets zeros.

    Args:
        a, b: [P, N], [P, K], or [T, ...] of which row token_p is taken where `gather_...`.
        total: also sum a_p, the gradient of a bias.

    Returns:
        ([E, N, K], [E, N] or [0, N]).
    """
    out, sums = _fake(a, b, token, offsets, gather_a, gather_b, total)
    experts, n, k = out.shape
    if not out.numel():
        return out, sums
    blocks = tuning.blocks("gram", tuning.Shape.of(len(token), experts, n, k), a.dtype, a.device)
    _gram[(experts * triton.cdiv(n, blocks.m) * triton.cdiv(k, blocks.n),)](
        a, b, token, offsets, out, sums, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        GATHER_A=gather_a, GATHER_B=gather_b, SUM=total,
        M=blocks.m, N=blocks.n, ROWS=blocks.k, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, sums
