"""The op on a processor: gather, two products, what stands between them and the weighted sum in one compiled call each way.

Of everything that is as long as the list of pairs, forward keeps only what stood before the activation, [P, 2F or F], and nothing at all
without a gradient. One temporary [P, D] stands before the sum over a token's pairs, so that the sum has one order and its result
the same bits whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activations import canonical
from ..cpu import library, pages
from ..pairs import Pairs


def why_not(x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, *, activation: str, gated: bool,
            up_bias: Tensor | None, down_bias: Tensor | None) -> str | None:  # fmt: skip
    """What is in the way, in one sentence."""
    given = {"x": x, "up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device.type}"
        if tensor.dtype not in library.DTYPES or tensor.dtype != x.dtype:
            return f"it computes in float32 or bfloat16, all tensors alike; {name} is {tensor.dtype}, x {x.dtype}"
    for name, tensor in (("up", up), ("down", down)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"it reads rows of weights as they lie in memory; the last dimension of {name} has stride {tensor.stride(-1)}"
    return library.lacks(x.dtype == torch.bfloat16)


def expert_ffn(x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, *, activation: str, gated: bool,
               up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_ffn.expert_ffn`."""
    inputs = (x, pairs.weight, up, down, up_bias, down_bias)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    if not keep and not torch.compiler.is_compiling():
        return _forward(*inputs, pairs.token, pairs.offsets, canonical(activation), gated, False)[0]
    return _ExpertFFN.apply(*inputs, pairs.token, pairs.offsets, canonical(activation), gated, keep)[0]


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return (torch.ops.moeforge.cpu_expert_ffn if torch.compiler.is_compiling() else _forward)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.activation, ctx.gated, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros are made for what was kept, at its full size
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run: Any = torch.ops.moeforge.cpu_expert_ffn_backward if torch.compiler.is_compiling() else _backward
        wanted = list(ctx.needs_input_grad[:6])
        made = run(grad, *ctx.saved_tensors, ctx.activation, ctx.gated, wanted)
        return (
            *(tensor if want else None for tensor, want in zip(made, wanted, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


def _rows(tensor: Tensor) -> Tensor:
    """Rows may lie apart, their elements may not."""
    return tensor if tensor.stride(-1) == 1 and tensor.shape[-1] > 1 else tensor.contiguous()


def _arguments(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
               token: Tensor, offsets: Tensor, activation: str, gated: bool) -> tuple[library.Call, tuple[Any, ...]]:  # fmt: skip
    """The call, and what must live until it has ended."""
    held = (_rows(x.detach()), weight.detach().float().contiguous(), token.contiguous(), offsets.contiguous(),
            *(None if bias is None else bias.detach().contiguous() for bias in (up_bias, down_bias)))  # fmt: skip
    rows, gates, ids, ends, inner, outer = held
    experts, width, ffn = down.shape
    call = library.Call(
        T=len(x), P=len(ids), D=width, F=ffn, E=experts,
        activation=library.ACTIVATIONS.index(activation), gated=gated, threads=torch.get_num_threads(),
        x=rows.data_ptr(), x_row=rows.stride(0), token=ids.data_ptr(), weight=gates.data_ptr(), offsets=ends.data_ptr(),
        up=up.data_ptr(), up_expert=up.stride(0), up_row=up.stride(1),
        down=down.data_ptr(), down_expert=down.stride(0), down_row=down.stride(1),
        up_bias=library.pointer(inner), down_bias=library.pointer(outer),
    )  # fmt: skip
    return call, held


def _kept_shape(up: Tensor, token: Tensor, keep: bool) -> tuple[int, int, int]:
    """What stood before the activation, in panels of 16 rows of one expert, [panels, 2F or F, 16]: every expert may leave one unfilled."""
    return (token.shape[0] // 16 + up.shape[0] if keep else 0), up.shape[1], 16


def _forward(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
             token: Tensor, offsets: Tensor, activation: str, gated: bool, keep: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    call, held = _arguments(x, weight, up, down, up_bias, down_bias, token, offsets, activation, gated)
    out = library.empty(*x.shape, dtype=x.dtype)
    before = pages.empty(_kept_shape(up, token, keep), x.dtype)
    pairs = pages.empty((len(token), down.shape[1]), x.dtype)
    call.hidden = before.data_ptr() if keep else None
    call.pairs, call.out = pairs.data_ptr(), out.data_ptr()
    library.run("forward", call, x.dtype)
    return out, before


def _forward_shapes(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
                    token: Tensor, offsets: Tensor, activation: str, gated: bool, keep: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(_kept_shape(up, token, keep))


def _backward(grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
              token: Tensor, offsets: Tensor, before: Tensor, activation: str, gated: bool, wanted: list[bool]) -> list[Tensor]:  # fmt: skip
    call, held = _arguments(x, weight, up, down, up_bias, down_bias, token, offsets, activation, gated)
    rows = _rows(grad)
    call.grad, call.grad_row, call.hidden = rows.data_ptr(), rows.stride(0), before.data_ptr()
    made = [library.empty(*x.shape, dtype=x.dtype) if wanted[0] else x.new_empty(0)]
    gates = library.empty(*weight.shape).zero_()
    idle = (torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0).nonzero().flatten().tolist()
    for tensor, want in zip((up, down, up_bias, down_bias), wanted[2:], strict=True):
        made.append(pages.gradient(tensor, idle) if tensor is not None and want else x.new_empty(0))
    to_x, to_up, to_down, to_up_bias, to_down_bias = made
    names = {"x": to_x, "up": to_up, "down": to_down, "up_bias": to_up_bias, "down_bias": to_down_bias, "weight": gates}
    for (name, tensor), want in zip(names.items(), (wanted[0], *wanted[2:], wanted[1]), strict=True):
        setattr(call, f"grad_{name}", tensor.data_ptr() if want else None)
    pairs = pages.empty((len(token) if wanted[0] else 0, down.shape[1]), x.dtype)
    call.pairs = pairs.data_ptr()
    library.run("backward", call, x.dtype)
    return [
        to_x,
        gates.to(weight.dtype) if wanted[1] else weight.new_empty(0),
        to_up,
        to_down,
        to_up_bias,
        to_down_bias,
    ]


def _backward_shapes(grad: Tensor, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
                     token: Tensor, offsets: Tensor, before: Tensor, activation: str, gated: bool, wanted: list[bool]) -> list[Tensor]:  # fmt: skip
    return [
        tensor.new_empty(tensor.shape) if tensor is not None and want else x.new_empty(0)
        for tensor, want in zip((x, weight, up, down, up_bias, down_bias), wanted, strict=True)
    ]


torch.library.custom_op("moeforge::cpu_expert_ffn", _forward, mutates_args=()).register_fake(_forward_shapes)
torch.library.custom_op("moeforge::cpu_expert_ffn_backward", _backward, mutates_args=()).register_fake(_backward_shapes)
