"""The definition: the same sum as expert_ffn's reference, over the sorted list."""

from __future__ import annotations

import torch
from torch import Tensor

from ..expert_ffn.reference import expert_ffn
from ..pairs import pairs_from_slots


@torch.no_grad()
def expert_gemv(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *, activation: str, gated: bool,
                up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_gemv.expert_gemv`."""
    pairs = pairs_from_slots(index, weight, len(up))
    return expert_ffn(x, pairs, up, down, activation=activation, gated=gated, up_bias=up_bias, down_bias=down_bias)
