"""The op on a GPU: one program a token and column tile forward, one a pair backward; each sum in one order."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pairs import Pairs
from ..triton_parts import narrow, opaque

COLUMNS = 1024
"""Of a tile; a row of fewer takes the next power of two."""


@triton.jit
def _sum(
    Rows,
    Weight,
    ByToken,
    Offsets,
    Lengths,
    Out,
    experts,
    n,
    WEIGHTED: tl.constexpr,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
):
    token = tl.program_id(0)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    here = columns < n
    if SLOTS > 0:
        begin, end = token * SLOTS, token * SLOTS + SLOTS
    else:
        begin = tl.load(Lengths + token - 1, mask=token > 0, other=0)
        end = tl.load(Lengths + token)
    real = tl.load(Offsets + experts - 1)
    acc = tl.zeros((N,), tl.float32)
    for at in range(begin, end):
        pair = tl.load(ByToken + at)
        limit = tl.where(pair < real, n, 0)
        row = tl.load(Rows + pair * n + columns, mask=columns < limit, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(Weight + pair).to(tl.float32)
        acc += row
    tl.store(Out + token.to(tl.int64) * n + columns, narrow(acc, Out.dtype.element_ty), mask=here)


@triton.jit
def _spread(
    Grad,
    Y,
    Weight,
    Token,
    Offsets,
    ToY,
    ToWeight,
    experts,
    n,
    grad_row,
    grad_column,
    NEEDS_Y: tl.constexpr,
    N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    limit = tl.where(pair < tl.load(Offsets + experts - 1), n, 0)
    token = tl.load(Token + pair)
    weight = tl.load(Weight + pair).to(tl.float32)
    total = tl.zeros((N,), tl.float32)
    for at in range(0, n, N):
        columns = at + tl.arange(0, N)
        inside = columns < limit
        grad = tl.load(Grad + token * grad_row + columns * grad_column, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_Y:
            total += grad * tl.load(Y + pair * n + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(ToY + pair * n + columns, narrow(grad * weight, ToY.dtype.element_ty), mask=columns < n)
    if NEEDS_Y:
        tl.store(ToWeight + pair, tl.sum(total, 0).to(ToWeight.dtype.element_ty))


def _fake_sum(rows: Tensor, weight: Tensor | None, by_token: Tensor, offsets: Tensor, ends: Tensor | None, tokens: int, slots: int) -> Tensor:  # fmt: skip
    return rows.new_empty(tokens, rows.shape[1])


@opaque(_fake_sum)
def total(rows: Tensor, weight: Tensor | None, by_token: Tensor, offsets: Tensor, ends: Tensor | None, tokens: int, slots: int) -> Tensor:  # fmt: skip
    """[P, N] -> [T, N]; `slots` is 0 where `ends` [T] tells where in `by_token` a token's pairs end."""
    out = rows.new_empty(tokens, rows.shape[1])
    n = rows.shape[1]
    if out.numel():
        wide = min(COLUMNS, triton.next_power_of_2(n))
        _sum[(tokens, triton.cdiv(n, wide))](
            rows, weight, by_token, offsets, ends, out, len(offsets), n, WEIGHTED=weight is not None, SLOTS=slots, N=wide
        )  # fmt: skip
    return out


def _fake_spread(
    grad: Tensor, y: Tensor | None, weight: Tensor, token: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(len(token), grad.shape[1]), weight.new_empty(len(token))


@opaque(_fake_spread)
def spread(grad: Tensor, y: Tensor | None, weight: Tensor, token: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(w_p * grad_t, <grad_t, y_p>) of every pair; the second is not written without `y`."""
    to_y, to_weight = _fake_spread(grad, y, weight, token, offsets)
    n = grad.shape[1]
    if to_y.numel():
        wide = min(COLUMNS, triton.next_power_of_2(n))
        _spread[(len(token),)](
            grad, y, weight, token, offsets, to_y, to_weight, len(offsets), n, grad.stride(0), grad.stride(1), NEEDS_Y=y is not None, N=wide
        )  # fmt: skip
    return to_y, to_weight


def combine(y: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`moeforge_kernels.combine.combine`."""
    return _Combine.apply(y, pairs.weight, pairs._replace(weight=pairs.weight.detach()))


def sum_rows(rows: Tensor, pairs: Pairs, weight: Tensor | None) -> Tensor:
    """[P, N] -> [T, N], summed in float32, times `weight` [P] where given. Not differentiable."""
    ends = None if pairs.slots else pairs.lengths().cumsum(0)
    return total(
        rows.contiguous(),
        None if weight is None else weight.contiguous(),
        pairs.by_token,
        pairs.offsets,
        ends,
        pairs.tokens,
        pairs.slots or 0,
    )


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        return sum_rows(y, pairs, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, weight, ctx.pairs = inputs
        ctx.save_for_backward(y.contiguous() if ctx.needs_input_grad[1] else None, weight.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weight = ctx.saved_tensors
        to_y, to_weight = spread(grad, y, weight, ctx.pairs.token, ctx.pairs.offsets)
        return to_y, to_weight if y is not None else None, None
