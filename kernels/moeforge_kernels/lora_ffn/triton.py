"""The op on a GPU: rows of pairs (rows.py), then their sums over tokens (mixing.py), some columns of F at a time.

Forward keeps nothing, backward makes again what stood before the activation. What is as long as the list of pairs is never wider than
`COLUMNS`, and has the deltas' type. Shapes and launches do not depend on the choice, so it may be captured in a CUDA graph.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (a launch is written in another language: its options are keywords)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..activations import canonical
from ..grouped_gemm.gram import gram
from ..grouped_gemm.tiles import tiles
from ..pairs import Pairs
from ..triton_parts import opaque
from . import mixing, rows
from .share import frozen_share

COLUMNS = 1024
"""Of F that are worked on before the next ones."""
TALL, WIDE = 64, 64
"""Rows (at most) and columns of a tile over pairs: with eight warps backward's registers just hold it."""


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See :func:`moeforge_kernels.lora_ffn.lora_ffn`."""
    share = frozen_share(pairs, pairs.weight) if rest else None
    ends = None if pairs.slots else pairs.lengths().cumsum(0)
    if gate is None or low_gate is None or b_gate is None:
        low_gate = b_gate = None
    if low_up is None or b_up is None:
        low_up = b_up = None
    elif low_up is low_gate:
        low_up = low_up.view_as(low_up)  # torch.compile takes no tensor twice
    mixed, low_down = _LoraFFN.apply(gate, up, low_gate, low_up, pairs.weight, b_gate, b_up, a_down, scale, share, pairs.token,
                                     pairs.offsets, pairs.by_token, ends, pairs.slots or 0, canonical(activation))  # fmt: skip
    return mixed, None if a_down is None else low_down


class _LoraFFN(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return lora_ffn_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.slots, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_low: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = list(ctx.needs_input_grad[:8])
        made = lora_ffn_backward(grad, grad_low, *ctx.saved_tensors, ctx.slots, ctx.activation, wanted)
        return *(tensor if want else None for tensor, want in zip(made, wanted, strict=True)), *[None] * 8


def _rows(tensor: Tensor | None) -> Any:
    """Rows (and experts) may lie apart, their elements may not."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None, at: int) -> int:
    return 0 if tensor is None else tensor.stride(at)


class _Given(NamedTuple):
    """What both ways are given, in this order."""

    gate: Tensor | None
    up: Tensor
    low_gate: Tensor | None
    low_up: Tensor | None
    weight: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    scale: Tensor
    share: Tensor | None
    token: Tensor
    offsets: Tensor
    by_token: Tensor
    ends: Tensor | None
    """[T] where in `by_token` a token's pairs end; None where each has `slots`."""
    slots: int
    activation: str

    def kind(self) -> torch.dtype:
        """The deltas' type, and so of what is kept for pairs."""
        return next((t.dtype for t in (self.b_gate, self.b_up, self.a_down) if t is not None), self.up.dtype)

    def readable(self) -> _Given:
        """As the kernels read it."""
        kind = self.kind()
        low_gate, low_up = (None if t is None else t.to(kind).contiguous() for t in (self.low_gate, self.low_up))
        return self._replace(
            gate=_rows(self.gate), up=_rows(self.up), low_gate=low_gate, low_up=low_up, weight=self.weight.contiguous(),
            b_gate=_rows(self.b_gate), b_up=_rows(self.b_up), a_down=_rows(self.a_down), scale=self.scale.contiguous(),
        )  # fmt: skip

    def over_pairs(self) -> tuple[int, dict[str, Any]]:
        """Tiles of rows, and what both kernels of rows.py are launched with."""
        count, experts = len(self.token), len(self.offsets)
        height = min(TALL, max(16, triton.next_power_of_2(-(-count // experts))))  # as tall as an expert's share
        rank = next((t.shape[1] for t in (self.low_gate, self.low_up, self.a_down) if t is not None), 1)
        expert, row = tiles(self.offsets, count, height)
        b_gate, b_up, a_down = self.b_gate, self.b_up, self.a_down
        return len(expert), dict(
            Gate=self.gate, Up=self.up, LowGate=self.low_gate, LowUp=self.low_up, BGate=b_gate, BUp=b_up, ADown=a_down, Scale=self.scale,
            Token=self.token, Expert=expert, Row=row, Offsets=self.offsets, row_tiles=len(expert), pairs=count, experts=experts, r=rank,
            gate_row=_stride(self.gate, 0), up_row=self.up.stride(0), b_gate_expert=_stride(b_gate, 0), b_gate_row=_stride(b_gate, 1),
            b_up_expert=_stride(b_up, 0), b_up_row=_stride(b_up, 1), a_expert=_stride(a_down, 0), a_row=_stride(a_down, 1),
            ACT=self.activation, M=height, N=WIDE, R=max(16, triton.next_power_of_2(rank)), num_warps=4 if height < TALL else 8,
        )  # fmt: skip

    def over_tokens(self) -> dict[str, Any]:
        """What both kernels of mixing.py are launched with."""
        return dict(
            Gate=self.gate, Up=self.up, Share=self.share, ByToken=self.by_token, Ends=self.ends, Offsets=self.offsets,
            experts=len(self.offsets), gate_row=_stride(self.gate, 0), up_row=self.up.stride(0), out_row=self.up.shape[1],
            ACT=self.activation, SLOTS=self.slots,
        )  # fmt: skip

    def columns(self) -> Iterator[tuple[int, int]]:
        """(first, how many)."""
        width = self.up.shape[1]
        for first in range(0, width, COLUMNS):
            yield first, min(COLUMNS, width - first)

    def slabs(self, *width: int) -> Tensor:
        """[slabs, P, ...] float32, one for each tile of columns; rows of empty pairs are never written."""
        return self.up.new_empty(
            triton.cdiv(min(self.up.shape[1], COLUMNS), WIDE), len(self.token), *width, dtype=torch.float32
        )

    def added(self, slabs: Tensor) -> Tensor:
        """[P, ...], zero for empty pairs."""
        empty = torch.arange(len(self.token), device=slabs.device) >= self.offsets[-1]
        return slabs.sum(0).masked_fill_(empty.unsqueeze(-1) if slabs.dim() > 2 else empty, 0)


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    given = _Given(*inputs)
    rank = 0 if given.a_down is None else given.a_down.shape[1]
    return given.up.new_empty(given.up.shape), given.up.new_empty(len(given.token), rank)


@opaque(_fake_forward)
def lora_ffn_forward(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, weight: Tensor, b_gate: Tensor | None,
                     b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None, token: Tensor, offsets: Tensor,
                     by_token: Tensor, ends: Tensor | None, slots: int, activation: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mixed [T, F], low_down [P, r] or [P, 0])."""
    given = _Given(gate, up, low_gate, low_up, weight, b_gate, b_up, a_down, scale, share, token, offsets, by_token, ends, slots,
                   activation).readable()  # fmt: skip
    mixed, low_down = _fake_forward(*given)
    if not mixed.numel():
        return mixed, low_down.zero_()
    row_tiles, over_pairs = given.over_pairs()
    over_tokens, slabs = given.over_tokens(), given.slabs(low_down.shape[1])
    for first, n in given.columns():
        hidden = up.new_empty(len(token), n, dtype=given.kind())
        rows.forward[(row_tiles * triton.cdiv(n, WIDE),)](**over_pairs, Hidden=hidden, LowDown=slabs, first=first, n=n)
        mixing.forward[(len(up),)](
            **over_tokens, Hidden=hidden, Weight=given.weight, Out=mixed, first=first, n=n, N=triton.next_power_of_2(n)
        )  # fmt: skip
    return mixed, low_down if a_down is None else given.added(slabs).to(up.dtype)


def _fake_backward(grad: Tensor, grad_low: Tensor, *inputs: Any) -> list[Tensor]:
    *given, wanted = inputs
    up = given[1]
    return [of.new_empty(of.shape) if want else up.new_empty(0) for of, want in zip(given[:8], wanted, strict=True)]


@opaque(_fake_backward)
def lora_ffn_backward(grad: Tensor, grad_low: Tensor, gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None,
                      weight: Tensor, b_gate: Tensor | None, b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, share: Tensor | None,
                      token: Tensor, offsets: Tensor, by_token: Tensor, ends: Tensor | None, slots: int, activation: str,
                      wanted: list[bool]) -> list[Tensor]:  # fmt: skip
    """Gradients of gate, up, low_gate, low_up, weight, b_gate, b_up, a_down; [0] for those that are not wanted, or absent."""
    given = _Given(gate, up, low_gate, low_up, weight, b_gate, b_up, a_down, scale, share, token, offsets, by_token, ends, slots,
                   activation)  # fmt: skip
    made = _fake_backward(grad, grad_low, *given, wanted)
    if not up.numel():
        return [tensor.zero_() for tensor in made]
    to_gate, to_up, to_low_gate, to_low_up, to_weight, to_b_gate, to_b_up, to_a = made
    given = given.readable()
    kind, (row_tiles, over_pairs), over_tokens = given.kind(), given.over_pairs(), given.over_tokens()
    grad, grad_low = _rows(grad), grad_low.to(kind).contiguous()
    low_gates, low_ups = (None if low is None else given.slabs(low.shape[1]) for low in (low_gate, low_up))
    dots, alone = given.slabs(), None if share is None else up.new_empty(len(up), dtype=torch.float32)
    for first, n in given.columns():
        hidden, back_gate, back_up = (up.new_empty(len(token), n, dtype=kind) for _ in range(3))
        rows.backward[(row_tiles * triton.cdiv(n, WIDE),)](
            **over_pairs, Weight=given.weight, Grad=grad, GradLow=grad_low, Hidden=hidden, ToGate=back_gate, ToUp=back_up,
            ToLowGate=low_gates, ToLowUp=low_ups, Dots=dots, grad_row=grad.stride(0), first=first, n=n,
        )  # fmt: skip
        mixing.backward[(len(up),)](
            **over_tokens, Grad=grad, ToGate=back_gate, ToUp=back_up, OutGate=to_gate if wanted[0] else None,
            OutUp=to_up if wanted[1] else None, Alone=alone, grad_row=grad.stride(0), first=first, n=n, N=triton.next_power_of_2(n),
        )  # fmt: skip
        columns = slice(first, first + n)
        for to, back, low in ((to_b_gate, back_gate, given.low_gate), (to_b_up, back_up, given.low_up)):
            if to.numel():
                to[:, columns] = gram(back, low, token, offsets, False, False, False)[0] * scale.view(-1, 1, 1)
        if to_a.numel():
            to_a[:, :, columns] = gram(grad_low, hidden, token, offsets, False, False, False)[0]
    if alone is not None:
        dots[0] -= alone[token]
    for to, slabs in ((to_low_gate, low_gates), (to_low_up, low_ups), (to_weight, dots)):
        if to.numel() and slabs is not None:
            to.copy_(given.added(slabs))
    return made
