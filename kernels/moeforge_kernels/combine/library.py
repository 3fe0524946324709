"""torch's own kernels: one pass over the answers on a CPU (`embedding_bag`), gather, multiply and sum elsewhere.

Backward is a gather, which no gradient of an indexing operation (a scatter) is: dy_p = w_p * dout_t, dw_p = <dout_t, y_p>.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import Pairs


def combine(y: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`moeforge_kernels.combine.combine`."""
    return _Combine.apply(y, pairs.weight, pairs._replace(weight=pairs.weight.detach()))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        return sum_rows(y, pairs, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, weight, ctx.pairs = inputs
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype = y.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weight = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        rows = grad[pairs.token]
        to_y = to_weight = None
        if ctx.needs_input_grad[0]:
            to_y = (rows * weight.unsqueeze(-1)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dots = (rows.to(weight.dtype) * y).sum(-1).to(weight.dtype)
            to_weight = dots.masked_fill(pairs.expert == pairs.experts, 0)
        return to_y, to_weight, None


def sum_rows(rows: Tensor, pairs: Pairs, weight: Tensor | None) -> Tensor:
    """[P, N] -> [T, N] in the same dtype: the rows of each token, summed in float32 (float64 stays); times `weight` [P] where given.

    What stands in rows of empty pairs is never looked at. Not differentiable.
    """
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        return _bags(rows, pairs, weight)
    wide = torch.promote_types(rows.dtype, torch.float32)
    empty = (pairs.expert == pairs.experts)[pairs.by_token].unsqueeze(-1)
    ordered = rows[pairs.by_token].masked_fill(empty, 0)
    if weight is not None:
        ordered = ordered * weight.to(wide)[pairs.by_token].unsqueeze(-1)
    if pairs.slots is not None:
        return ordered.view(pairs.tokens, pairs.slots, rows.shape[1]).sum(1, dtype=wide).to(rows.dtype)
    return torch.segment_reduce(ordered.to(wide), "sum", lengths=pairs.lengths(), axis=0, unsafe=True).to(rows.dtype)


def _bags(rows: Tensor, pairs: Pairs, weight: Tensor | None) -> Tensor:
    """One fused pass over the real rows."""
    order, token = pairs.by_token, pairs.token[pairs.by_token]
    if int(pairs.offsets[-1]) < len(order):
        real = pairs.expert[order] < pairs.experts
        order, token = order[real], token[real]
    starts = torch.searchsorted(token, torch.arange(pairs.tokens))

    def total(gates: Tensor | None) -> Tensor:
        return F.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=gates)

    if weight is None:
        return total(None)
    gates = weight[order]
    rounded = gates.to(rows.dtype)
    out = total(rounded)
    if rounded.dtype.itemsize < gates.dtype.itemsize:
        # the kernel wants weights of the rows' type; what rounding took from them is added as a second sum
        out += total((gates - rounded).to(rows.dtype))
    return out
