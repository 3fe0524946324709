"""Scores and selection joined: hidden states -> Routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.pairs import pairs_from_slots

from .config import RouterConfig
from .routing import Routing


class Router(nn.Module):
    """Logits are float32 whatever the model computes in: bfloat16 ties on one token in 200, and a tie sends it elsewhere.

    Args:
        config: which policy; checked.
        width: D.
        experts: E, without null experts.
    """

    def __init__(self, config: RouterConfig, width: int, experts: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor, *, real: Tensor | None = None, labels: Tensor | None = None) -> Routing:
        """[T, D] -> Routing; padding (`real` False) goes to no expert."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        probabilities = logits.softmax(-1)
        weight, index = probabilities.topk(self.config.top_k, -1)
        if self.config.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        if real is not None:
            index = index.masked_fill(~real.unsqueeze(-1), self.experts)
        return Routing(pairs_from_slots(index, weight, self.experts), logits, probabilities)
