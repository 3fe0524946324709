"""The op on a GPU: two products and a sum forward, two products, two Gram products and a sum backward.

Of everything that is as long as the list of pairs, forward keeps only what the activation was given, [P, 2F]; without a gradient
not even that is written. One temporary [P, D] stands between the second product and the sum over a token's pairs, so that the sum has
one order and its result one value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import canonical
from ..combine.triton import sum_rows
from ..expert_gemv import TOKENS
from ..expert_gemv.triton import expert_gemv
from ..grouped_gemm.gram import gram
from ..grouped_gemm.product import product
from ..pairs import Pairs
from .hidden import hidden_gradient


def expert_ffn(x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, *, activation: str, gated: bool,
               up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_ffn.expert_ffn`."""
    bare = pairs._replace(weight=pairs.weight.detach())
    inputs = (x, pairs.weight, up, down, up_bias, down_bias)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if not keep and pairs.slots is not None and pairs.tokens <= TOKENS:
        index, weight = (value.view(pairs.tokens, pairs.slots) for value in pairs.token_order())
        return expert_gemv(
            x, index, weight, up, down, activation=activation, gated=gated, up_bias=up_bias, down_bias=down_bias
        )
    return _ExpertFFN.apply(*inputs, bare, canonical(activation), gated, keep)[0]


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
                pairs: Pairs, activation: str, gated: bool, keep: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        count = len(pairs.token)
        hidden, pre = product(x, up, up_bias, pairs.token, pairs.offsets, count, activation, gated, keep, False)
        y, _ = product(hidden, down, down_bias, None, pairs.offsets, count, "identity", False, False, False)
        return sum_rows(y, pairs, weight), pre

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, up, down, up_bias, down_bias, ctx.pairs, ctx.activation, ctx.gated, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros [P, 2F] are made for it on every backward
        ctx.save_for_backward(x, weight, up, down, down_bias, output[1])
        ctx.up_bias = up_bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, up, down, down_bias, pre = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        token, offsets = pairs.token, pairs.offsets
        needs = ctx.needs_input_grad
        to_pre, hidden, dots = hidden_gradient(
            grad, down, pre, weight.contiguous(), token, offsets, ctx.activation, ctx.gated
        )
        to_x = to_weight = to_up = to_down = to_up_bias = to_down_bias = None
        if needs[0]:
            rows, _ = product(
                to_pre, up.transpose(1, 2), None, None, offsets, len(token), "identity", False, False, False
            )
            to_x = sum_rows(rows, pairs, None)
        if needs[1]:
            if down_bias is not None:
                # [T, E] products and a look-up, rather than a bias for every pair
                dots = dots + (grad @ down_bias.t())[token, pairs.expert.clamp_max(pairs.experts - 1)]
            to_weight = dots.masked_fill(pairs.expert == pairs.experts, 0)
        if needs[2] or needs[4]:
            to_up, to_up_bias = gram(to_pre, x, token, offsets, False, True, ctx.up_bias)
        if needs[3]:
            to_down, _ = gram(grad, hidden, token, offsets, True, False, False)
        if needs[5]:
            # sum_p w_p dout_t of every expert: its [E, T] weights times dout
            to_down_bias = (pairs._replace(weight=weight).gates().t() @ grad.to(weight.dtype)).to(grad.dtype)
        return (
            to_x,
            to_weight,
            to_up,
            to_down,
            to_up_bias if ctx.up_bias else None,
            to_down_bias,
            None,
            None,
            None,
            None,
        )
