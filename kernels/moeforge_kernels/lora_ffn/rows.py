"""The Triton kernels over rows of pairs: from the frozen maps' answers to an expert's hidden rows, and back.

A tile is M pairs of one expert by N of the columns [first, first + n) of F. Ranks are one step of a product (R is r filled up to a power
of two), so what the activation gets never leaves the registers. What is summed over F has a slab for each tile of columns, added up
afterwards in one order. An absent map is None, and so is what nobody asks for.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import triton
import triton.language as tl

from ..grouped_gemm.product import place
from ..triton_parts import activate, multiply, narrow, slope


@triton.jit
def _table(Matrix, rows, row, columns, mask):
    """[rows, columns] of a matrix whose rows lie `row` apart."""
    return tl.load(Matrix + rows[:, None] * row + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _expand(base, low, b, scale):
    """[M, N] float32: what the activation gets."""
    return base + multiply(low, tl.trans(b), tl.zeros(base.shape, tl.float32)) * scale


@triton.jit
def _shrink(wide, matrix):
    """[M, N] x [N, R], the first one rounded to the type of the second."""
    return multiply(narrow(wide, matrix.dtype), matrix, tl.zeros((wide.shape[0], matrix.shape[1]), tl.float32))


@triton.jit
def add(Total, at, value, mask, first):
    """Onto what the columns before `first` left there."""
    if first > 0:
        value += tl.load(Total + at, mask=mask, other=0.0)
    tl.store(Total + at, value, mask=mask)


@triton.jit
def forward(Gate, Up, LowGate, LowUp, BGate, BUp, ADown, Scale, Token, Expert, Row, Offsets, Hidden, LowDown,
            row_tiles, pairs, experts, first, n, r, gate_row, up_row, b_gate_expert, b_gate_row, b_up_expert, b_up_row, a_expert, a_row,
            ACT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """h into Hidden [P, n]; its product with the map behind onto LowDown [slabs, P, r]."""
    row_tile, part = place(tl.program_id(0), row_tiles, tl.cdiv(n, N))
    expert = tl.load(Expert + row_tile).to(tl.int64)
    if expert >= experts:
        return
    rows = tl.load(Row + row_tile).to(tl.int64) + tl.arange(0, M)
    inside, ranks = part * N + tl.arange(0, N), tl.arange(0, R)
    real, here, ranked = rows < tl.load(Offsets + expert), inside < n, ranks < r
    mask, low_mask, b_mask = (
        real[:, None] & here[None, :],
        real[:, None] & ranked[None, :],
        here[:, None] & ranked[None, :],
    )
    token = tl.load(Token + rows, mask=real, other=0)
    columns = (first + inside).to(tl.int64)
    scale = tl.load(Scale + expert)

    up = _table(Up, token, up_row, columns, mask).to(tl.float32)
    if BUp is not None:
        b_up = _table(BUp + expert * b_up_expert, columns, b_up_row, ranks, b_mask)
        up = _expand(up, _table(LowUp, rows, r, ranks, low_mask), b_up, scale)
    if Gate is None:
        hidden = activate(up, ACT)
    else:
        gate = _table(Gate, token, gate_row, columns, mask).to(tl.float32)
        if BGate is not None:
            b_gate = _table(BGate + expert * b_gate_expert, columns, b_gate_row, ranks, b_mask)
            gate = _expand(gate, _table(LowGate, rows, r, ranks, low_mask), b_gate, scale)
        hidden = activate(gate, ACT) * up
    tl.store(Hidden + rows[:, None] * n + inside[None, :], narrow(hidden, Hidden.dtype.element_ty), mask=mask)
    if ADown is not None:
        a = _table(ADown + expert * a_expert, ranks, a_row, columns, ranked[:, None] & here[None, :])
        slab = part.to(tl.int64) * pairs + rows
        add(LowDown, slab[:, None] * r + ranks[None, :], _shrink(hidden, tl.trans(a)), low_mask, first)


@triton.jit
def backward(Gate, Up, LowGate, LowUp, BGate, BUp, ADown, Scale, Token, Expert, Row, Offsets, Weight, Grad, GradLow,
             Hidden, ToGate, ToUp, ToLowGate, ToLowUp, Dots,
             row_tiles, pairs, experts, first, n, r, gate_row, up_row, b_gate_expert, b_gate_row, b_up_expert, b_up_row, a_expert, a_row,
             grad_row, ACT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """h into Hidden, gradients of what the activation got into ToGate and ToUp, [P, n]; those of the low-rank rows onto
    ToLowGate and ToLowUp [slabs, P, r], <grad, h> onto Dots [slabs, P]."""
    row_tile, part = place(tl.program_id(0), row_tiles, tl.cdiv(n, N))
    expert = tl.load(Expert + row_tile).to(tl.int64)
    if expert >= experts:
        return
    rows = tl.load(Row + row_tile).to(tl.int64) + tl.arange(0, M)
    inside, ranks = part * N + tl.arange(0, N), tl.arange(0, R)
    real, here, ranked = rows < tl.load(Offsets + expert), inside < n, ranks < r
    mask, low_mask, b_mask = (
        real[:, None] & here[None, :],
        real[:, None] & ranked[None, :],
        here[:, None] & ranked[None, :],
    )
    token = tl.load(Token + rows, mask=real, other=0)
    columns = (first + inside).to(tl.int64)
    scale = tl.load(Scale + expert)
    slab = part.to(tl.int64) * pairs + rows
    low_at, at = slab[:, None] * r + ranks[None, :], rows[:, None] * n + inside[None, :]
    kind = Hidden.dtype.element_ty

    got = _table(Grad, token, grad_row, columns, mask).to(tl.float32)
    back = got * tl.load(Weight + rows, mask=real, other=0.0).to(tl.float32)[:, None]
    if ADown is not None:
        a = _table(ADown + expert * a_expert, ranks, a_row, columns, ranked[:, None] & here[None, :])
        back = multiply(_table(GradLow, rows, r, ranks, low_mask), a, back)
    up = _table(Up, token, up_row, columns, mask).to(tl.float32)
    if BUp is not None:
        b_up = _table(BUp + expert * b_up_expert, columns, b_up_row, ranks, b_mask)
        up = _expand(up, _table(LowUp, rows, r, ranks, low_mask), b_up, scale)
    if Gate is None:
        hidden = activate(up, ACT)
        to_up = back * slope(up, ACT)
    else:
        gate = _table(Gate, token, gate_row, columns, mask).to(tl.float32)
        if BGate is not None:
            b_gate = _table(BGate + expert * b_gate_expert, columns, b_gate_row, ranks, b_mask)
            gate = _expand(gate, _table(LowGate, rows, r, ranks, low_mask), b_gate, scale)
        act = activate(gate, ACT)
        hidden = act * up
        to_up = back * act
        to_gate = back * up * slope(gate, ACT)
        tl.store(ToGate + at, narrow(to_gate, kind), mask=mask)
        if BGate is not None:
            add(ToLowGate, low_at, _shrink(to_gate, b_gate) * scale, low_mask, first)
    tl.store(ToUp + at, narrow(to_up, kind), mask=mask)
    if BUp is not None:
        add(ToLowUp, low_at, _shrink(to_up, b_up) * scale, low_mask, first)
    tl.store(Hidden + at, narrow(hidden, kind), mask=mask)
    add(Dots, slab, tl.sum(tl.where(mask, got * hidden, 0.0), 1), real, first)
