"""Blocks of one expert's rows at a time, forward and backward. Nothing as wide as F is kept for a pair: the backward pass computes the
hidden rows again from what the frozen products gave. So K experts a token need less memory than one plain LoRA, which keeps the gate,
its activation, the other half and their product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..activations import activation as find
from ..pairs import Pairs
from .share import frozen_share

ROWS = 512
"""Pairs of a block: a few rows of F numbers that stay in the cache between two operations."""


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_ffn.lora_ffn`."""
    mixed, low_down = _Blocked.apply(
        gate, up, low_gate, low_up, pairs.weight, b_gate, b_up, a_down, scale, pairs, activation, rest
    )
    return mixed, None if a_down is None else low_down


def _blocks(pairs: Pairs) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, rows of the list, their tokens)."""
    start = 0
    for expert, stop in enumerate(pairs.offsets.tolist()):
        for first in range(start, stop, ROWS):
            rows = slice(first, min(first + ROWS, stop))
            yield expert, rows, pairs.token[rows]
        start = stop


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, weight: Tensor,
                b_gate: Tensor | None, b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, pairs: Pairs, activation: str,
                rest: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        act, scales = find(activation), scale.tolist()
        mixed = torch.zeros(up.shape, dtype=up.dtype, device=up.device)
        low_down = up.new_zeros(len(pairs.token), 0 if a_down is None else a_down.shape[1])
        for e, rows, token in _blocks(pairs):
            hidden = act(_ahead(up, low_up, b_up, e, rows, token, scales)) if gate is None else (
                act(_ahead(gate, low_gate, b_gate, e, rows, token, scales)) * _ahead(up, low_up, b_up, e, rows, token, scales))  # fmt: skip
            if a_down is not None:
                low_down[rows] = hidden @ a_down[e].T
            mixed.index_add_(0, token, hidden * weight[rows].unsqueeze(-1).to(hidden.dtype))
        if rest:
            left = frozen_share(pairs, weight)
            for token in left.nonzero().squeeze(-1).split(ROWS):
                alone = act(up[token]) if gate is None else act(gate[token]) * up[token]
                mixed.index_add_(0, token, alone * left[token].unsqueeze(-1).to(alone.dtype))
        ctx.save_for_backward(gate, up, low_gate, low_up, weight, b_gate, b_up, a_down, *pairs[:5])
        ctx.tokens, ctx.slots, ctx.scales, ctx.activation, ctx.rest = (
            pairs.tokens,
            pairs.slots,
            scales,
            activation,
            rest,
        )
        return mixed, low_down

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor, d_low: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low_gate, low_up, weight, b_gate, b_up, a_down, *listed = ctx.saved_tensors
        token_of, expert_of, _, offsets, by_token = listed
        pairs, act, scales = (
            Pairs(token_of, expert_of, weight, offsets, by_token, ctx.tokens, ctx.slots),
            find(ctx.activation),
            ctx.scales,
        )

        def zeros(like: Tensor | None) -> Any:
            return None if like is None else torch.zeros(like.shape, dtype=like.dtype, device=like.device)

        g_gate, g_up, g_low_gate, g_low_up, g_weight = map(zeros, (gate, up, low_gate, low_up, weight))
        g_b_gate, g_b_up, g_a_down = map(zeros, (b_gate, b_up, a_down))
        for e, rows, token in _blocks(pairs):
            got = d_mixed[token]
            with torch.enable_grad():
                u = _ahead(up, low_up, b_up, e, rows, token, scales).detach().requires_grad_()
                g = (
                    None
                    if gate is None
                    else _ahead(gate, low_gate, b_gate, e, rows, token, scales).detach().requires_grad_()
                )
                hidden = act(u) if g is None else act(g) * u
            g_weight[rows] = (got * hidden.detach()).sum(-1, dtype=g_weight.dtype)
            d_hidden = got * weight[rows].unsqueeze(-1).to(got.dtype)
            if a_down is not None:
                d_hidden = torch.addmm(d_hidden, d_low[rows], a_down[e])
                g_a_down[e].addmm_(d_low[rows].T, hidden.detach())
            ahead = [u] if g is None else [u, g]
            made = torch.autograd.grad(hidden, ahead, d_hidden)
            halves = [(made[0], g_up, low_up, b_up, g_low_up, g_b_up)]
            if g is not None:
                halves.append((made[1], g_gate, low_gate, b_gate, g_low_gate, g_b_gate))
            for d, g_base, low, b, g_low, g_b in halves:
                g_base.index_add_(0, token, d)
                if low is not None and b is not None:
                    g_low[rows] = torch.mm(d, b[e]).mul_(scales[e])
                    g_b[e].addmm_(d.T, low[rows], alpha=scales[e])
        if ctx.rest:
            _backward_of_rest(gate, up, weight, pairs, act, d_mixed, g_gate, g_up, g_weight)
        return g_gate, g_up, g_low_gate, g_low_up, g_weight, g_b_gate, g_b_up, g_a_down, None, None, None, None


def _ahead(
    base: Tensor, low: Tensor | None, b: Tensor | None, e: int, rows: slice, token: Tensor, scales: list[float]
) -> Tensor:
    """[rows, F] what the activation gets."""
    value = base[token]
    return value if low is None or b is None else value.addmm_(low[rows], b[e].T, alpha=scales[e])


def _backward_of_rest(gate: Tensor | None, up: Tensor, weight: Tensor, pairs: Pairs, act: Any, d_mixed: Tensor, g_gate: Any, g_up: Any,
                      g_weight: Tensor) -> None:  # fmt: skip
    """The weights' gradient through 1 - sum w is there for every token, also where that is 0."""
    left = frozen_share(pairs, weight)
    through = torch.empty(pairs.tokens, dtype=weight.dtype, device=weight.device)
    for token in torch.arange(pairs.tokens, device=up.device).split(ROWS):
        with torch.enable_grad():
            u = up[token].detach().requires_grad_()
            g = None if gate is None else gate[token].detach().requires_grad_()
            alone = act(u) if g is None else act(g) * u
        got = d_mixed[token]
        through[token] = (got * alone.detach()).sum(-1, dtype=weight.dtype)
        if bool(left[token].any()):
            shared = got * left[token].unsqueeze(-1).to(got.dtype)
            made = torch.autograd.grad(alone, [u] if g is None else [u, g], shared)
            g_up.index_add_(0, token, made[0])
            if g is not None:
                g_gate.index_add_(0, token, made[1])
    g_weight -= through[pairs.token].masked_fill(pairs.expert == pairs.experts, 0)
