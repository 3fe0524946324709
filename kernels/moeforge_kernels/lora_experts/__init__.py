"""LoRA experts beside a linear map (provisional: plain torch until the back ends land)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs


def lora_experts(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor, *, backend: str | None = None) -> Tensor:
    """out_t = sum over pairs (t, e, w) of w * scale_e * B_e A_e x_t: [T, D] -> [T, D']."""
    gates = (pairs.gates() * scale).to(x.dtype)
    low = torch.einsum("td,erd->ter", x, lora_a)
    return (low * gates.unsqueeze(-1)).flatten(1) @ lora_b.transpose(1, 2).flatten(0, 1)


def lora_shrink(x: Tensor, pairs: Pairs, lora_a: Tensor) -> Tensor:
    """A_e x of each pair, [P, r]; zero for empty pairs."""
    low = torch.einsum("td,erd->ter", x, lora_a)
    made = low[pairs.token, pairs.expert.clamp_max(lora_a.shape[0] - 1)]
    return made * (pairs.expert < pairs.experts).unsqueeze(-1).to(made.dtype)
