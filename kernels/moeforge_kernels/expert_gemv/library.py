"""torch's own kernels: a matrix-vector product a slot, in place on a CPU, batched over gathered weights elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import between


@torch.no_grad()
def expert_gemv(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *, activation: str, gated: bool,
                up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_gemv.expert_gemv`."""
    product = _each if x.device.type == "cpu" and not torch.compiler.is_compiling() else _batched
    tokens, slots = index.shape
    flat = index.reshape(-1)
    hidden = product(x.repeat_interleave(slots, 0), up, up_bias, flat)
    hidden = between(hidden, activation, gated)
    y = product(hidden, down, down_bias, flat).view(tokens, slots, down.shape[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    empty = (index == len(up)).unsqueeze(-1)
    return (y.to(wide).masked_fill(empty, 0) * weight.to(wide).unsqueeze(-1).masked_fill(empty, 0)).sum(1).to(x.dtype)


def _each(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """[P, K] -> [P, N]: reads each weight where it lies; rows of empty slots are zero."""
    made = rows.new_zeros(len(rows), weight.shape[1])
    for row, e in enumerate(expert.tolist()):
        if e < len(weight):
            made[row] = F.linear(rows[row], weight[e], None if bias is None else bias[e])
    return made


def _batched(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """[P, K] -> [P, N] without asking which experts were chosen; rows of empty slots are those of the last expert."""
    chosen = expert.clamp_max(len(weight) - 1)
    made = torch.bmm(weight[chosen], rows.unsqueeze(-1)).squeeze(-1)
    return made if bias is None else made + bias[chosen]
