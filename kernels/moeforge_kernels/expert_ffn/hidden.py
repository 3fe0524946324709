"""The Triton kernel in the middle of backward: from the output's gradient to the pre-activation's, in one pass.

For a pair p of token t with weight w:

    r_p = D_e^T dout_t                      the product, dout gathered on the way in
    h_p = act(g_p) * u_p                    computed again from what forward kept
    dg_p, du_p = w r_p * (act'(g_p) u_p, act(g_p))
    dw_p = <r_p, h_p> (+ <dout_t, d_e>)     since y_p = D_e h_p + d_e: the answers y need not be kept
    w h_p                                   kept for D's gradient, sum_p dout_t (w h_p)^T
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..grouped_gemm.product import place
from ..grouped_gemm.tiles import tiles
from ..triton_parts import activate, multiply, narrow, opaque, slope


@triton.jit
def _hidden(Grad, W, Pre, Weight, Token, Expert, Row, Offsets, ToPre, Hidden, Dots, row_tiles, pairs, experts, n, depth,
            grad_row, grad_depth, w_expert, w_row, w_depth,
            ACT: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    row_tile, column_tile = place(tl.program_id(0), row_tiles, tl.cdiv(n, N))
    expert = tl.load(Expert + row_tile).to(tl.int64)
    if expert >= experts:
        return
    rows = tl.load(Row + row_tile) + tl.arange(0, M)
    columns = column_tile * N + tl.arange(0, N)
    here = columns < n
    real = rows < tl.load(Offsets + expert)
    source = tl.load(Token + rows, mask=real, other=0)
    steps = tl.arange(0, K)
    a = Grad + source[:, None] * grad_row + steps[None, :] * grad_depth
    w = W + expert * w_expert + columns[None, :].to(tl.int64) * w_row + steps[:, None] * w_depth
    acc = tl.zeros((M, N), tl.float32)
    for at in range(0, depth, K):
        inside = steps < depth - at
        part = tl.load(a, mask=real[:, None] & inside[None, :], other=0.0)
        acc = multiply(part, tl.load(w, mask=inside[:, None] & here[None, :], other=0.0), acc)
        a += K * grad_depth
        w += K * w_depth
    mask = real[:, None] & here[None, :]
    width = n
    if GATED:
        width = 2 * n
    at_pre = rows.to(tl.int64)[:, None] * width + columns[None, :]
    gate = tl.load(Pre + at_pre, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(Weight + rows, mask=real, other=0.0).to(tl.float32)[:, None]
    kind = ToPre.dtype.element_ty
    hidden = activate(gate, ACT)
    scaled = acc * weight
    if GATED:
        value = tl.load(Pre + at_pre + n, mask=mask, other=0.0).to(tl.float32)
        tl.store(ToPre + at_pre + n, narrow(scaled * hidden, kind), mask=mask)
        hidden *= value
        scaled *= value
    tl.store(ToPre + at_pre, narrow(scaled * slope(gate, ACT), kind), mask=mask)
    tl.store(Hidden + rows.to(tl.int64)[:, None] * n + columns[None, :], narrow(hidden * weight, kind), mask=mask)
    dots = tl.sum(tl.where(mask, acc * hidden, 0.0), 1)
    tl.store(Dots + column_tile.to(tl.int64) * pairs + rows, dots, mask=real)


def _fake(grad: Tensor, down: Tensor, pre: Tensor, weight: Tensor, token: Tensor, offsets: Tensor, activation: str, gated: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return pre.new_empty(pre.shape), pre.new_empty(len(pre), down.shape[2]), weight.new_empty(len(pre))


@opaque(_fake)
def hidden_gradient(grad: Tensor, down: Tensor, pre: Tensor, weight: Tensor, token: Tensor, offsets: Tensor, activation: str, gated: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See the module.

    Args:
        grad: [T, D]; any strides.
        down: [E, D, F]; any strides.
        pre: [P, 2F or F].
        weight: [P] float32.

    Returns:
        (dpre [P, 2F or F], w h [P, F], <r, h> [P]); rows of empty pairs are not written.
    """
    to_pre, hidden, dots = _fake(grad, down, pre, weight, token, offsets, activation, gated)
    experts, depth, n = down.shape
    pairs = len(pre)
    if not pairs:
        return to_pre, hidden, dots
    blocks = tuning.blocks("hidden", tuning.Shape.of(pairs, experts, n, depth), pre.dtype, pre.device)
    expert, row = tiles(offsets, pairs, blocks.m)
    column_tiles = triton.cdiv(n, blocks.n)
    # a column tile sums its own part of the dot products; the parts are added in one order
    parts = weight.new_empty(column_tiles, pairs)
    _hidden[(len(expert) * column_tiles,)](
        grad, down, pre, weight, token, expert, row, offsets, to_pre, hidden, parts, len(expert), pairs, experts, n, depth,
        grad.stride(0), grad.stride(1), down.stride(0), down.stride(2), down.stride(1),
        ACT=activation, GATED=gated,
        M=blocks.m, N=blocks.n, K=blocks.k, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return to_pre, hidden, parts.sum(0)
