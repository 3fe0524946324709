"""The definition: every pair on its own terms, through the reference ops."""

from __future__ import annotations

from torch import Tensor

from ..activations import between
from ..combine.reference import combine
from ..grouped_gemm.reference import grouped_gemm
from ..pairs import Pairs


def expert_ffn(x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, *, activation: str, gated: bool,
               up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_ffn.expert_ffn`."""
    hidden = grouped_gemm(x, up, pairs, bias=up_bias)
    hidden = between(hidden, activation, gated)
    return combine(grouped_gemm(hidden, down, pairs, bias=down_bias, gather=False), pairs)
