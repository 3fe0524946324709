"""What LoRA experts of one FFN do between its two products (provisional: plain torch until the back ends land)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activation as find
from ..combine import combine
from ..grouped_gemm import grouped_gemm
from ..pairs import Pairs


def lora_ffn(gate: Tensor | None, up: Tensor, low_gate: Tensor | None, low_up: Tensor | None, pairs: Pairs, b_gate: Tensor | None,
             b_up: Tensor | None, a_down: Tensor | None, scale: Tensor, *, activation: str, rest: bool, backend: str | None = None
             ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """mixed [T, F] and low_down [P, r]; see the module that uses it."""
    act = find(activation)
    real = (pairs.expert < pairs.experts).unsqueeze(-1)
    s = scale[pairs.expert.clamp_max(pairs.experts - 1)].unsqueeze(-1)

    def ahead(base: Tensor, low: Tensor | None, b: Tensor | None) -> Tensor:
        if low is None or b is None:
            return base[pairs.token]
        delta = grouped_gemm(low, b.contiguous(), pairs, gather=False) * s
        return base[pairs.token] + torch.where(real, delta, torch.zeros((), dtype=delta.dtype)).to(base.dtype)

    u = ahead(up, low_up, b_up)
    h = act(u) if gate is None else act(ahead(gate, low_gate, b_gate)) * u
    mixed = combine(h, pairs)
    if rest:
        left = 1 - pairs.gates().sum(-1, keepdim=True)
        mixed = mixed + (left * (act(up) if gate is None else act(gate) * up)).to(mixed.dtype)
    low_down = None if a_down is None else grouped_gemm(h, a_down, pairs, gather=False)
    return mixed, low_down
