"""What is left for the frozen network where a token's weights do not sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs

EXACT = 1e-6
"""Weights whose sum is this close to 1 leave nothing: only rounding is there."""


def frozen_share(pairs: Pairs, weight: Tensor) -> Tensor:
    """[T] 1 - sum of each token's weights, and exactly 0 where that is rounding. Not differentiable.

    Args:
        weight: [P]; what stands at empty pairs is ignored.
    """
    real = weight.detach().masked_fill(pairs.expert == pairs.experts, 0)
    left = 1 - torch.zeros(pairs.tokens, dtype=weight.dtype, device=weight.device).index_add_(0, pairs.token, real)
    return left.masked_fill(left.abs() <= EXACT, 0)
