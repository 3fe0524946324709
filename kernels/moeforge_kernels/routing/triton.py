"""The op on a GPU: two launches and a small sum between them, no sort.

First every program scores a block of tokens, takes the best expert K times, and counts how many of its tokens chose each expert. The
counts of the blocks, added up in order, say where a block's pairs of an expert begin. Then every program puts its pairs there: since a
token visits an expert at most once, a pair's rank is the number of tokens before it that chose the same one. So tokens ascend within
an expert, as a stable sort leaves them, and the result does not depend on the order in which programs run.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a kernel's body is another language: literals are constexpr, launch options are keywords)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pairs import Pairs
from ..triton_parts import opaque
from .reference import weigh

ELEMENTS = 4096
"""Logits that one program holds."""


@triton.jit
def _choose(Logits, Bias, Real, Index, Counts, tokens, experts, row, column, SOFTMAX: tl.constexpr, FIRST: tl.constexpr,
            BIAS: tl.constexpr, MASK: tl.constexpr, SLOTS: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * T + tl.arange(0, T)
    expert = tl.arange(0, E)
    there = (token < tokens)[:, None] & (expert < experts)[None, :]
    at = token.to(tl.int64)[:, None] * row + expert[None, :] * column
    preference = tl.load(Logits + at, mask=there, other=float("-inf")).to(tl.float32)
    if not FIRST:
        if SOFTMAX:
            powers = tl.exp(preference - tl.max(preference, 1)[:, None])
            preference = powers / tl.sum(powers, 1)[:, None]
        else:
            preference = tl.sigmoid(preference)
    if BIAS:
        preference += tl.load(Bias + expert, mask=expert < experts, other=0.0).to(tl.float32)[None, :]
    real = token < tokens
    if MASK:
        real = real & (tl.load(Real + token, mask=token < tokens, other=0) != 0)
    preference = tl.where(there, preference, float("-inf"))
    taken = tl.zeros((T, E), tl.int32)
    for slot in range(0, SLOTS):
        top = tl.max(preference, 1)
        # the lowest index among equals; a taken one is never taken again, even where all that is left is -inf
        free = (preference == top[:, None]) & (taken == 0)
        best = tl.min(tl.where(free, expert[None, :], E), 1)
        hit = expert[None, :] == best[:, None]
        taken += hit.to(tl.int32)
        preference = tl.where(hit, float("-inf"), preference)
        tl.store(Index + token.to(tl.int64) * SLOTS + slot, tl.where(real, best, experts), mask=token < tokens)
    taken = tl.where(real[:, None], taken, 0)
    tl.store(Counts + tl.program_id(0) * experts + expert, tl.sum(taken, 0), mask=expert < experts)


@triton.jit
def _place(
    Index,
    Before,
    Offsets,
    Order,
    ByToken,
    tokens,
    experts,
    SLOTS: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
):
    token = tl.program_id(0) * T + tl.arange(0, T)
    expert = tl.arange(0, E)
    there = token < tokens
    chosen = tl.zeros((T, E), tl.int32)
    for slot in range(0, SLOTS):
        index = tl.load(Index + token.to(tl.int64) * SLOTS + slot, mask=there, other=-1)
        chosen += (index[:, None] == expert[None, :]).to(tl.int32)
    inside = expert < experts
    begin = tl.load(Offsets + expert - 1, mask=inside & (expert > 0), other=0)
    begin += tl.load(Before + tl.program_id(0) * experts + expert, mask=inside, other=0)
    position = begin[None, :] + tl.cumsum(chosen, 0) - 1
    # tokens that go nowhere have only empty pairs; what is real before a token says how many of them stand before it
    filled = tl.load(Offsets + experts - 1)
    earlier = tl.sum(tl.load(Before + tl.program_id(0) * experts + expert, mask=inside, other=0), 0)
    own = tl.sum(tl.where(inside[None, :], chosen, 0), 1)  # an empty slot's mark, E, may be a column of padding
    absent = filled + token * SLOTS - (earlier + tl.cumsum(own, 0) - own)
    for slot in range(0, SLOTS):
        pair = token.to(tl.int64) * SLOTS + slot
        index = tl.load(Index + pair, mask=there, other=-1)
        place = tl.sum(tl.where(index[:, None] == expert[None, :], position, 0), 1)
        place = tl.where(index == experts, absent + slot, place).to(tl.int64)
        tl.store(ByToken + pair, place, mask=there)
        tl.store(Order + place, pair, mask=there)


def _fake(logits: Tensor, bias: Tensor | None, real: Tensor | None, top_k: int, score: str, select_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, experts = logits.shape
    whole = {"dtype": torch.int64}
    return (logits.new_empty(tokens, top_k, **whole), logits.new_empty(tokens * top_k, **whole),
            logits.new_empty(tokens * top_k, **whole), logits.new_empty(experts, dtype=torch.int32))  # fmt: skip


@opaque(_fake)
def place(logits: Tensor, bias: Tensor | None, real: Tensor | None, top_k: int, score: str, select_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(index [T, K], order [P]: the slot of each pair, by_token [P]: the pair of each slot, offsets [E])."""
    index, order, by_token, offsets = _fake(logits, bias, real, top_k, score, select_first)
    tokens, experts = logits.shape
    if not tokens:
        return index, order, by_token, offsets.zero_()
    wide = triton.next_power_of_2(experts)
    height = min(max(1, ELEMENTS // wide), 64)
    grid = triton.cdiv(tokens, height)
    counts = torch.empty(grid, experts, dtype=torch.int32, device=logits.device)
    _choose[(grid,)](
        logits, bias, None if real is None else real.to(torch.int8), index, counts, tokens, experts, logits.stride(0), logits.stride(1),
        SOFTMAX=score == "softmax", FIRST=select_first, BIAS=bias is not None, MASK=real is not None, SLOTS=top_k, T=height, E=wide,
    )  # fmt: skip
    upto = counts.cumsum(0, dtype=torch.int32)
    offsets = upto[-1].cumsum(0, dtype=torch.int32)
    _place[(grid,)](
        index, upto - counts, offsets, order, by_token, tokens, experts, SLOTS=top_k, T=height, E=wide
    )  # fmt: skip
    return index, order, by_token, offsets


def route(logits: Tensor, top_k: int, *, score: str, select_first: bool, renormalise: bool, factor: float, bias: Tensor | None,
          real: Tensor | None) -> Pairs:  # fmt: skip
    """See :func:`moeforge_kernels.routing.route`."""
    how: tuple[Any, ...] = (top_k, score, select_first)
    index, order, by_token, offsets = place(logits.detach(), bias, real, *how)
    experts = logits.shape[1]
    weight = weigh(logits.float(), index.clamp_max(experts - 1), score, select_first, renormalise, factor)
    expert = index.reshape(-1)[order]
    gates = weight.reshape(-1)[order].masked_fill(expert == experts, 0)
    return Pairs(order // top_k, expert, gates, offsets, by_token, logits.shape[0], top_k)
