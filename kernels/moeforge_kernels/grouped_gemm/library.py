"""torch's own grouped product (`torch.nn.functional.grouped_mm`), which takes the offsets as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import Pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor, weight: Tensor, pairs: Pairs, *, bias: Tensor | None = None, gather: bool = True) -> str | None:
    """What torch's kernel refuses, in one sentence."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm (2.10 does)"
    if weight.dtype not in DTYPES:
        return f"grouped_mm multiplies float32, bfloat16 and float16, not {weight.dtype}"
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "grouped_mm needs compute capability 8.0"
    step = 16 // weight.element_size()
    if weight.shape[1] % step or weight.shape[2] % step:
        return f"rows must be whole multiples of 16 bytes, {step} elements; the weight is {list(weight.shape)}"
    return None


def grouped_gemm(x: Tensor, weight: Tensor, pairs: Pairs, *, bias: Tensor | None = None, gather: bool = True) -> Tensor:
    """See :func:`moeforge_kernels.grouped_gemm.grouped_gemm`."""
    made = _GroupedGemm.apply(x.to(weight.dtype), weight, bias, pairs._replace(weight=pairs.weight.detach()), gather)
    return made.to(x.dtype)


class _GroupedGemm(torch.autograd.Function):
    """Keeps x, not its gathered rows; sums the rows' gradients token by token, in one order.

    Rows past the last offset are never written by the product, neither in its answer nor in a gradient: set to zero in place.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs, gather: bool) -> Tensor:
        made = _multiply(x[pairs.token] if gather else x.contiguous(), _aligned(weight).transpose(1, 2), pairs.offsets)
        if bias is not None:
            made += bias[pairs.expert.clamp_max(pairs.experts - 1)]
        return _clear_tail(made, pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.pairs, ctx.gather = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        grad = grad.contiguous()  # a sum's gradient has strides of zero
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _clear_tail(_multiply(grad, _aligned(weight), pairs.offsets), pairs)
            if ctx.gather:
                to_x = sum_by_token(to_x, pairs)
        if ctx.needs_input_grad[1]:
            rows = x[pairs.token] if ctx.gather else x.contiguous()
            to_weight = _multiply(grad.t(), rows, pairs.offsets)
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            to_bias = sum_by_expert(grad, pairs).to(ctx.bias)
        return to_x, to_weight, to_bias, None, None


def sum_by_token(rows: Tensor, pairs: Pairs) -> Tensor:
    """[P, N] -> [T, N], summed in float32."""
    from ..combine.library import sum_rows

    return sum_rows(rows, pairs, None)


def sum_by_expert(rows: Tensor, pairs: Pairs) -> Tensor:
    """[P, N] -> [E, N], summed in float32; the tail is one more segment, left out."""
    lengths = torch.cat([pairs.counts(), len(rows) - pairs.offsets[-1:]]).long()
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True)[:-1]


def _clear_tail(rows: Tensor, pairs: Pairs) -> Tensor:
    return rows.masked_fill_((pairs.expert == pairs.experts).unsqueeze(-1), 0)


def _aligned(weight: Tensor) -> Tensor:
    """The kernel wants one of the last two strides to be 1 and the others whole multiples of 16 bytes, and on a CPU a base so aligned
    (torch 2.10 and older; memory-mapped weights start anywhere)."""
    step = 16 // weight.element_size()
    inner = 1 in weight.stride()[1:]
    strided = all(stride == 1 or stride % step == 0 for stride in weight.stride())
    return weight if inner and strided else weight.contiguous()


def _multiply(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    # inductor's own grouped_mm takes bfloat16 only
    if torch.compiler.is_compiling() and a.dtype != torch.bfloat16:
        return torch.ops.moeforge.grouped_mm(a, b, offsets)
    return F.grouped_mm(a, b, offs=offsets)


@torch.library.custom_op("moeforge::grouped_mm", mutates_args=())
def _opaque(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=offsets)


@_opaque.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (offsets.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(shape)
