"""torch's own kernels: two grouped products and what stands between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..activations import between
from ..combine.library import combine
from ..grouped_gemm.library import grouped_gemm
from ..grouped_gemm.library import why_not as product_why_not
from ..pairs import Pairs


def why_not(x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, **_: Any) -> str | None:
    """What torch's grouped product refuses, in one sentence."""
    return product_why_not(x, up, pairs) or product_why_not(x, down, pairs)


def expert_ffn(x: Tensor, pairs: Pairs, up: Tensor, down: Tensor, *, activation: str, gated: bool,
               up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:  # fmt: skip
    """See :func:`moeforge_kernels.expert_ffn.expert_ffn`."""
    hidden = grouped_gemm(x, up, pairs, bias=up_bias)
    hidden = between(hidden, activation, gated)
    return combine(grouped_gemm(hidden, down, pairs, bias=down_bias, gather=False), pairs)
