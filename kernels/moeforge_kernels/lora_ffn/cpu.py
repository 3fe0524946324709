"""The op on a processor: everything between the two products in one compiled pass over columns of F each way.

Forward keeps nothing; backward makes again what stood before the activation. Sums are in float32 throughout, and have the same bits
whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activations import canonical
from ..cpu import library, pages
from ..pairs import Pairs
from .share import frozen_share


def why_not(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
            b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, **_: object) -> str | None:  # fmt: skip
    """What is in the way, in one sentence."""
    bases = {"gate": gate, "up": up}
    weights = {"b_gate": b_gate, "b_up": b_up, "a_down": a_down}
    for given in (bases, weights):
        named = [(name, tensor) for name, tensor in given.items() if tensor is not None]
        for name, tensor in named:
            first, like = named[0]
            if tensor.device.type != "cpu":
                return f"{name} is on {tensor.device.type}"
            if tensor.dtype not in library.DTYPES or tensor.dtype != like.dtype:
                return f"it reads float32 or bfloat16, {' and '.join(given)} alike; {name} is {tensor.dtype}, {first} {like.dtype}"
    if (reason := unlike_ranks(low_gate, low_up, a_down)) is not None:
        return reason
    narrow = any(t is not None and t.dtype == torch.bfloat16 for t in (*bases.values(), *weights.values()))
    return library.lacks(narrow, tiles=False)


def unlike_ranks(low_gate: Tensor | None, low_up: Tensor | None, a_down: Tensor | None) -> str | None:
    """The same where maps have different ranks, which the fused kernels do not take."""
    ranks = {tensor.shape[-1] for tensor in (low_gate, low_up) if tensor is not None}
    if a_down is not None:
        ranks.add(a_down.shape[1])
    return f"it has one rank for all maps; here are {', '.join(map(str, sorted(ranks)))}" if len(ranks) > 1 else None


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_ffn.lora_ffn`."""
    share = frozen_share(pairs, pairs.weight) if rest else None
    if low_up is not None and low_up is low_gate:
        low_up = low_up.view_as(low_up)  # a matrix of gate and up has one: torch.compile takes no tensor twice
    # without gradients torch.compile cannot trace a function that has a way back
    run: Any = _LoraFFN.apply if torch.is_grad_enabled() else _LoraFFN.forward
    mixed, low_down = run(gate, up, low_gate, low_up, pairs.weight, b_gate, b_up, a_down, scale, share, pairs.token,
                                     pairs.offsets, canonical(activation))  # fmt: skip
    return mixed, None if a_down is None else low_down


class _LoraFFN(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return (torch.ops.moeforge.cpu_lora_ffn if torch.compiler.is_compiling() else _forward)(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.activation = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_low: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run: Any = torch.ops.moeforge.cpu_lora_ffn_backward if torch.compiler.is_compiling() else _backward
        wanted = list(ctx.needs_input_grad[:8])
        saved = ctx.saved_tensors  # once: recomputed activations may not be asked for twice
        up = saved[1]
        made = run(up.new_zeros(up.shape) if grad is None else grad, grad_low, *saved, ctx.activation, wanted)
        return *(tensor if want else None for tensor, want in zip(made, wanted, strict=True)), *[None] * 5


def _narrow(tensor: Tensor | None) -> Tensor | None:
    """[P, r] as the kernels read it."""
    return None if tensor is None else tensor.detach().float().contiguous()


def arguments(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, weight: Tensor, b_gate: Tensor | None,
              b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None, token: Tensor, offsets: Tensor,
              activation: str) -> tuple[library.LoraCall, list[Tensor | None]]:  # fmt: skip
    """The call, and what must live until it has ended."""
    weights = [tensor for tensor in (b_gate, b_up, a_down) if tensor is not None]
    call = library.LoraCall(
        T=len(up), P=len(token), F=up.shape[1], E=len(offsets), r=_rank(low_gate, low_up, a_down),
        activation=library.ACTIVATIONS.index(activation), threads=torch.get_num_threads(),
        bf16_weights=bool(weights) and weights[0].dtype == torch.bfloat16,
    )  # fmt: skip
    held: list[Tensor | None] = [
        token.contiguous(),
        _narrow(weight),
        offsets.contiguous(),
        _narrow(scale),
        _narrow(share),
    ]
    for name, tensor in zip(("token", "weight", "offsets", "scale", "rest"), held, strict=True):
        setattr(call, name, library.pointer(tensor))
    for half, base, low, b in ((call.gate, gate, low_gate, b_gate), (call.up, up, low_up, b_up)):
        if base is None:
            continue
        base = library.rows(base)
        half.base, half.base_row = base.data_ptr(), base.stride(0)
        held.append(base)
        if low is not None and b is not None:
            low, b = _narrow(low), library.rows(b)
            half.low, half.b, half.b_expert, half.b_row = library.pointer(low), b.data_ptr(), b.stride(0), b.stride(1)
            held += [low, b]
    if a_down is not None:
        a_down = library.rows(a_down)
        call.a_down, call.a_expert, call.a_row = a_down.data_ptr(), a_down.stride(0), a_down.stride(1)
        held.append(a_down)
    return call, held


def _rank(low_gate: Tensor | None, low_up: Tensor | None, a_down: Tensor | None) -> int:
    return next((t.shape[-1] for t in (low_gate, low_up) if t is not None), 1 if a_down is None else a_down.shape[1])


def _forward_shapes(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, weight: Tensor, b_gate: Tensor | None,
                    b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None, token: Tensor, offsets: Tensor,
                    activation: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    return up.new_empty(up.shape), up.new_empty(len(token), 0 if a_down is None else a_down.shape[1])


def _forward(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, weight: Tensor, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None, token: Tensor, offsets: Tensor,
             activation: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    call, held = arguments(
        gate, up, low_gate, low_up, weight, b_gate, b_up, a_down, scale, share, token, offsets, activation
    )
    mixed = pages.empty(tuple(up.shape), up.dtype)
    low_down = library.empty(len(token), call.r if a_down is not None else 0).zero_()
    call.mixed, call.low_down = mixed.data_ptr(), low_down.data_ptr() if a_down is not None else None
    library.run("lora_forward", call, up.dtype)
    return mixed, low_down.to(up.dtype)


def _backward_shapes(grad: Tensor, grad_low: Tensor | None, gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None,
                     weight: Tensor, b_gate: Tensor | None, b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None,
                     token: Tensor, offsets: Tensor, activation: str, wanted: list[bool]) -> list[Tensor]:  # fmt: skip
    given = (gate, up, low_gate, low_up, weight, b_gate, b_up, a_down)
    return [
        up.new_empty(0) if of is None or not want else of.new_empty(of.shape)
        for of, want in zip(given, wanted, strict=True)
    ]


def _backward(grad: Tensor, grad_low: Tensor | None, gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None,
              weight: Tensor, b_gate: Tensor | None, b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None,
              token: Tensor, offsets: Tensor, activation: str, wanted: list[bool]) -> list[Tensor]:  # fmt: skip
    # what the map behind got reached nobody: nothing comes back through it
    behind = None if grad_low is None else a_down
    call, held = arguments(
        gate, up, low_gate, low_up, weight, b_gate, b_up, behind, scale, share, token, offsets, activation
    )
    rows, low_rows = library.rows(grad), _narrow(grad_low)
    call.grad, call.grad_row, call.grad_low_down = rows.data_ptr(), rows.stride(0), library.pointer(low_rows)
    given = (gate, up, low_gate, low_up, weight, b_gate, b_up, a_down)
    made = []
    for number, (tensor, want) in enumerate(zip(given, wanted, strict=True)):
        if tensor is None or not want:
            made.append(up.new_empty(0))
        elif number < 2:
            made.append(pages.empty(tuple(tensor.shape), tensor.dtype))
        else:
            made.append(library.empty(*tensor.shape).zero_())
    to = [tensor.data_ptr() if tensor.numel() else None for tensor in made]
    call.gate.grad_base, call.up.grad_base, call.grad_weight = to[0], to[1], to[4]
    for half, low, b in ((call.gate, to[2], to[5]), (call.up, to[3], to[6])):
        if half.low:
            half.grad_low, half.grad_b = low, b
    if behind is not None:
        call.grad_a = to[7]
    library.run("lora_backward", call, up.dtype)
    return [tensor if of is None else tensor.to(of.dtype) for tensor, of in zip(made, given, strict=True)]


torch.library.custom_op("moeforge::cpu_lora_ffn", _forward, mutates_args=()).register_fake(_forward_shapes)
torch.library.custom_op("moeforge::cpu_lora_ffn_backward", _backward, mutates_args=()).register_fake(_backward_shapes)
