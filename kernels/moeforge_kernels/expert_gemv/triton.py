"""The op on a GPU: two launches, bound by reading the weights once a slot.

First h = act(G x) * (U x) for every slot, one program a slot and tile of F; then sum_s w_s D h_s, one program a token and tile of D, which
walks through its slots in order: no atomics, so the same bits every time. Two tokens that chose the same expert read its weights twice,
from the L2 cache the second time where they fit.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import canonical
from ..triton_parts import activate, narrow, opaque

ROWS, DEPTH = 16, 256
"""Of a tile of weights: 8 kB of bfloat16; many small programs keep more reads in flight than few large ones."""


@triton.jit
def _up(X, Index, Up, Bias, Hidden, slots, experts, n, depth, x_row, x_column, w_expert, w_row, w_depth,
        ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    slot = tl.program_id(0)
    expert = tl.load(Index + slot).to(tl.int64)
    if expert >= experts:
        return
    rows = tl.program_id(1) * N + tl.arange(0, N)
    here = rows < n
    x = X + (slot // slots).to(tl.int64) * x_row
    w = Up + expert * w_expert + rows.to(tl.int64)[:, None] * w_row
    gate = tl.zeros((N, K), tl.float32)
    value = tl.zeros((N, K), tl.float32)
    for at in range(0, depth, K):
        k = at + tl.arange(0, K)
        mask = here[:, None] & (k < depth)[None, :]
        part = tl.load(x + k * x_column, mask=k < depth, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(w + k[None, :] * w_depth, mask=mask, other=0.0).to(tl.float32) * part
        if GATED:
            value += tl.load(w + n * w_row + k[None, :] * w_depth, mask=mask, other=0.0).to(tl.float32) * part
    made = tl.sum(gate, 1)
    width = n
    if GATED:
        width = 2 * n
    if BIAS:
        made += tl.load(Bias + expert * width + rows, mask=here, other=0.0).to(tl.float32)
    made = activate(made, ACT)
    if GATED:
        other = tl.sum(value, 1)
        if BIAS:
            other += tl.load(Bias + expert * width + n + rows, mask=here, other=0.0).to(tl.float32)
        made *= other
    tl.store(Hidden + slot.to(tl.int64) * n + rows, made, mask=here)


@triton.jit
def _down(Hidden, Index, Weight, Down, Bias, Out, experts, n, depth, w_expert, w_row, w_depth,
          SLOTS: tl.constexpr, BIAS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    token = tl.program_id(0)
    rows = tl.program_id(1) * N + tl.arange(0, N)
    here = rows < n
    total = tl.zeros((N,), tl.float32)
    for slot in range(0, SLOTS):
        expert = tl.load(Index + token * SLOTS + slot).to(tl.int64)
        if expert < experts:
            h = Hidden + (token * SLOTS + slot).to(tl.int64) * depth
            w = Down + expert * w_expert + rows.to(tl.int64)[:, None] * w_row
            acc = tl.zeros((N, K), tl.float32)
            for at in range(0, depth, K):
                k = at + tl.arange(0, K)
                part = tl.load(h + k, mask=k < depth, other=0.0)[None, :]
                mask = here[:, None] & (k < depth)[None, :]
                acc += tl.load(w + k[None, :] * w_depth, mask=mask, other=0.0).to(tl.float32) * part
            made = tl.sum(acc, 1)
            if BIAS:
                made += tl.load(Bias + expert * n + rows, mask=here, other=0.0).to(tl.float32)
            total += made * tl.load(Weight + token * SLOTS + slot).to(tl.float32)
    tl.store(Out + token.to(tl.int64) * n + rows, narrow(total, Out.dtype.element_ty), mask=here)


def _fake(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
          activation: str, gated: bool) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], down.shape[1])


@opaque(_fake)
def gemv(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
         activation: str, gated: bool) -> Tensor:  # fmt: skip
    """Both launches; contiguous index, weight and biases."""
    tokens, slots = index.shape
    experts, n, f = down.shape
    out = x.new_empty(tokens, n)
    # float32 between the two: it is small
    hidden = torch.empty(tokens * slots, f, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    _up[(tokens * slots, triton.cdiv(f, ROWS))](
        x, index, up, up_bias, hidden, slots, experts, f, up.shape[2], x.stride(0), x.stride(1), up.stride(0), up.stride(1), up.stride(2),
        ACT=activation, GATED=gated, BIAS=up_bias is not None, N=ROWS, K=DEPTH, num_warps=4,
    )  # fmt: skip
    _down[(tokens, triton.cdiv(n, ROWS))](
        hidden, index, weight, down, down_bias, out, experts, n, f, down.stride(0), down.stride(1), down.stride(2),
        SLOTS=slots, BIAS=down_bias is not None, N=ROWS, K=DEPTH, num_warps=4,
    )  # fmt: skip
    return out


@torch.no_grad()
def expert_gemv(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *, activation: str, gated: bool,
                up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_gemv.expert_gemv`."""
    biases = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    return gemv(x, index.contiguous(), weight.contiguous(), up, down, *biases, canonical(activation), gated)
