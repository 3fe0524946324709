"""The Triton kernel of a grouped product: gather in, bias and (gated) activation on the way out.

Nothing is padded or copied: a tile of rows never crosses from one expert to the next (tiles.py), its rows are read where they are,
and what stands between two products is computed while the accumulator is still in registers.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_parts import activate, multiply, narrow, opaque
from .tiles import tiles

GROUP = tl.constexpr(8)
"""Row tiles that walk along the columns together: their weights and rows stay in the L2 cache."""


@triton.jit
def place(program, row_tiles, column_tiles):
    """(row tile, column tile) of a program."""
    wide = GROUP * column_tiles
    first = program // wide * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + program % wide % height, program % wide // height


@triton.jit
def _product(A, W, Bias, Out, Pre, Token, Expert, Row, Offsets, row_tiles, pairs, experts, n, depth,
             a_row, a_depth, w_expert, w_row, w_depth,
             GATHER: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SAVE: tl.constexpr, CLEAR: tl.constexpr,
             M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    row_tile, column_tile = place(tl.program_id(0), row_tiles, tl.cdiv(n, N))
    expert = tl.load(Expert + row_tile).to(tl.int64)
    rows = tl.load(Row + row_tile) + tl.arange(0, M)
    columns = column_tile * N + tl.arange(0, N)
    here = columns < n
    out = Out + rows.to(tl.int64)[:, None] * n + columns[None, :]
    if expert >= experts:
        if CLEAR:  # noqa: SIM102 - known when compiled, the other is not
            if expert == experts:
                tl.store(out, tl.zeros((M, N), Out.dtype.element_ty), mask=(rows < pairs)[:, None] & here[None, :])
        return
    real = rows < tl.load(Offsets + expert)
    source = rows.to(tl.int64)
    if GATHER:
        source = tl.load(Token + rows, mask=real, other=0)
    steps = tl.arange(0, K)
    a = A + source[:, None] * a_row + steps[None, :] * a_depth
    w = W + expert * w_expert + columns[None, :].to(tl.int64) * w_row + steps[:, None] * w_depth
    acc = tl.zeros((M, N), tl.float32)
    value = tl.zeros((M, N), tl.float32)
    for at in range(0, depth, K):
        inside = steps < depth - at
        part = tl.load(a, mask=real[:, None] & inside[None, :], other=0.0)
        mask = inside[:, None] & here[None, :]
        acc = multiply(part, tl.load(w, mask=mask, other=0.0), acc)
        if GATED:
            value = multiply(part, tl.load(w + n * w_row, mask=mask, other=0.0), value)
        a += K * a_depth
        w += K * w_depth
    mask = real[:, None] & here[None, :]
    width = n
    if GATED:
        width = 2 * n
    if BIAS:
        acc += tl.load(Bias + expert * width + columns, mask=here, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value += tl.load(Bias + expert * width + n + columns, mask=here, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        # rounded first, so that backward differentiates what forward computed
        acc = narrow(acc, Pre.dtype.element_ty).to(tl.float32)
        pre = Pre + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(pre, narrow(acc, Pre.dtype.element_ty), mask=mask)
        if GATED:
            value = narrow(value, Pre.dtype.element_ty).to(tl.float32)
            tl.store(pre + n, narrow(value, Pre.dtype.element_ty), mask=mask)
    made = activate(acc, ACT)
    if GATED:
        made *= value
    tl.store(out, narrow(made, Out.dtype.element_ty), mask=mask)


def _fake(a: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor | None, offsets: Tensor, pairs: int, activation: str,
          gated: bool, save: bool, clear: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = weight.shape[1]
    return a.new_empty(pairs, rows // 2 if gated else rows), a.new_empty(pairs if save else 0, rows)


@opaque(_fake)
def product(a: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor | None, offsets: Tensor, pairs: int, activation: str,
            gated: bool, save: bool, clear: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """act(W[expert_p] a_row(p) + b[expert_p]) for every real pair; gated: act of the first half of W's rows times the second half.

    Args:
        a: [T, K] where `token` is given, else [P, K]; any strides.
        weight: [E, N, K] (N = 2F where gated); any strides.
        token: [P] rows of `a`.
        save: also keep what the activation was given.
        clear: rows of empty pairs are zero; otherwise they are not written.

    Returns:
        ([P, N or F], [P, N] what the activation was given, or [0, N]).
    """
    out, pre = _fake(a, weight, bias, token, offsets, pairs, activation, gated, save, clear)
    experts, _, depth = weight.shape
    n = out.shape[1]
    if not out.numel():
        return out, pre
    shape = tuning.Shape.of(pairs, experts, n, depth)
    blocks = tuning.blocks("gated" if gated else "product", shape, a.dtype, a.device)
    expert, row = tiles(offsets, pairs, blocks.m)
    _product[(len(expert) * triton.cdiv(n, blocks.n),)](
        a, weight, None if bias is None else bias.contiguous(), out, pre, token, expert, row, offsets, len(expert), pairs, experts, n, depth,
        a.stride(0), a.stride(1), weight.stride(0), weight.stride(1), weight.stride(2),
        GATHER=token is not None, BIAS=bias is not None, ACT=activation, GATED=gated, SAVE=save, CLEAR=clear,
        M=blocks.m, N=blocks.n, K=blocks.k, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, pre
