"""The op on a GPU: product.py forward and for the rows' gradient, gram.py for the weights'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..combine.triton import sum_rows
from ..pairs import Pairs
from .gram import gram
from .product import product


def grouped_gemm(x: Tensor, weight: Tensor, pairs: Pairs, *, bias: Tensor | None = None, gather: bool = True) -> Tensor:
    """See :func:`moeforge_kernels.grouped_gemm.grouped_gemm`."""
    return _GroupedGemm.apply(x, weight, bias, pairs._replace(weight=pairs.weight.detach()), gather)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs, gather: bool) -> Tensor:
        token = pairs.token if gather else None
        return product(x, weight, bias, token, pairs.offsets, len(pairs.token), "identity", False, False, True)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.pairs, ctx.gather = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x, _ = product(grad, weight.transpose(1, 2), None, None, pairs.offsets, len(pairs.token), "identity", False, False, not ctx.gather)  # fmt: skip
            if ctx.gather:
                to_x = sum_rows(to_x, pairs, None)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            to_weight, to_bias = gram(grad, x, pairs.token, pairs.offsets, False, ctx.gather, ctx.bias)
        return to_x, to_weight, to_bias if ctx.bias else None, None, None
