"""What the back ends must give: one expert after the other, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs


def lora_experts(x: Tensor, pairs: Pairs, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """See :func:`moeforge_kernels.lora_experts.lora_experts`."""
    gates = pairs.gates()
    out = x.new_zeros(len(x), lora_b.shape[1], dtype=gates.dtype)
    for e in range(pairs.experts):
        low = x @ lora_a[e if len(lora_a) > 1 else 0].T
        out = out + gates[:, e, None] * (scale[e] * (low @ lora_b[e].T))
    return out.to(x.dtype)


def lora_shrink(x: Tensor, pairs: Pairs, lora_a: Tensor) -> Tensor:
    """See :func:`moeforge_kernels.lora_experts.lora_shrink`."""
    made = torch.stack([x @ a.T for a in lora_a.expand(pairs.experts, -1, -1)], 1)
    made = made[pairs.token, pairs.expert.clamp_max(pairs.experts - 1)]
    return made.masked_fill((pairs.expert == pairs.experts).unsqueeze(-1), 0)


def lora_expand(low: Tensor, pairs: Pairs, lora_b: Tensor, scale: Tensor) -> Tensor:
    """See :func:`moeforge_kernels.lora_experts.lora_expand`."""
    out = low.new_zeros(pairs.tokens, lora_b.shape[1], dtype=torch.promote_types(low.dtype, pairs.weight.dtype))
    for e in range(pairs.experts):
        at = (pairs.expert == e).nonzero().squeeze(-1)
        made = pairs.weight[at, None] * (scale[e] * (low[at] @ lora_b[e].T))
        out = out.index_add(0, pairs.token[at], made.to(out.dtype))
    return out.to(low.dtype)
