"""The Triton kernels over tokens: the sum over a token's pairs, in the order of its slots, and the frozen network's own share.

One program a token, for the columns [first, first + n) of F; N is n filled up to a power of two. No atomics. An absent gate is None, and
so is what nobody asks for.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_parts import activate, narrow, slope
from .rows import add


@triton.jit
def _span(Ends, token, SLOTS: tl.constexpr):
    """Where a token's pairs stand in ByToken."""
    if SLOTS > 0:
        return token * SLOTS, token * SLOTS + SLOTS
    else:
        return tl.load(Ends + token - 1, mask=token > 0, other=0), tl.load(Ends + token)


@triton.jit
def _row(Rows, pair, inside, n, real):
    """[N] of pair's row of [P, n]; nothing is read of an empty pair's."""
    return tl.load(Rows + pair * n + inside, mask=inside < tl.where(pair < real, n, 0), other=0.0).to(tl.float32)


@triton.jit
def forward(Gate, Up, Share, ByToken, Ends, Offsets, Hidden, Weight, Out, experts, first, n, gate_row, up_row, out_row,
            ACT: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """sum of weight h, and share act(gate) up where there is a Share, into columns of Out [T, F]."""
    token = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, N)
    columns = first + inside
    here = inside < n
    acc = tl.zeros((N,), tl.float32)
    if Share is not None:
        share = tl.load(Share + token).to(tl.float32)
        read = inside < tl.where(share != 0, n, 0)  # most tokens leave nothing
        up = tl.load(Up + token * up_row + columns, mask=read, other=0.0).to(tl.float32)
        if Gate is None:
            acc += activate(up, ACT) * share
        else:
            gate = tl.load(Gate + token * gate_row + columns, mask=read, other=0.0).to(tl.float32)
            acc += activate(gate, ACT) * up * share
    begin, end = _span(Ends, token, SLOTS)
    real = tl.load(Offsets + experts - 1)
    for at in range(begin, end):
        pair = tl.load(ByToken + at)
        acc += _row(Hidden, pair, inside, n, real) * tl.load(Weight + pair).to(tl.float32)
    tl.store(Out + token * out_row + columns, narrow(acc, Out.dtype.element_ty), mask=here)


@triton.jit
def backward(Gate, Up, Share, ByToken, Ends, Offsets, Grad, ToGate, ToUp, OutGate, OutUp, Alone, experts, first, n,
             gate_row, up_row, grad_row, out_row, ACT: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """The pairs' gradients summed into columns of OutGate and OutUp [T, F]; <grad, act(gate) up> onto Alone [T]."""
    token = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, N)
    columns = first + inside
    here = inside < n
    to_gate = tl.zeros((N,), tl.float32)
    to_up = tl.zeros((N,), tl.float32)
    if Share is not None:
        got = tl.load(Grad + token * grad_row + columns, mask=here, other=0.0).to(tl.float32)
        up = tl.load(Up + token * up_row + columns, mask=here, other=0.0).to(tl.float32)
        back = got * tl.load(Share + token).to(tl.float32)
        if Gate is None:
            alone = activate(up, ACT)
            to_up += back * slope(up, ACT)
        else:
            gate = tl.load(Gate + token * gate_row + columns, mask=here, other=0.0).to(tl.float32)
            act = activate(gate, ACT)
            alone = act * up
            to_up += back * act
            to_gate += back * up * slope(gate, ACT)
        add(Alone, token, tl.sum(tl.where(here, got * alone, 0.0), 0), token >= 0, first)
    begin, end = _span(Ends, token, SLOTS)
    real = tl.load(Offsets + experts - 1)
    for at in range(begin, end):
        pair = tl.load(ByToken + at)
        to_up += _row(ToUp, pair, inside, n, real)
        if Gate is not None:
            to_gate += _row(ToGate, pair, inside, n, real)
    if OutUp is not None:
        tl.store(OutUp + token * out_row + columns, narrow(to_up, OutUp.dtype.element_ty), mask=here)
    if OutGate is not None:
        tl.store(OutGate + token * out_row + columns, narrow(to_gate, OutGate.dtype.element_ty), mask=here)
