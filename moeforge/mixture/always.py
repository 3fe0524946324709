"""The router that decides nothing: every token visits one given expert with weight 1 (plain LoRA beside mixtures; forced routes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeforge_kernels.pairs import Pairs

from .routing import Routing


class Always(nn.Module):
    """Has no parameters, and says nothing that losses or statistics could use.

    Args:
        expert: which.
        experts: E.
    """

    def __init__(self, expert: int = 0, experts: int = 1) -> None:
        super().__init__()
        self.expert, self.experts = expert, experts

    def forward(self, x: Tensor, **_: object) -> Routing:
        """[T, D] -> Routing of T pairs."""
        tokens = torch.arange(len(x), device=x.device)
        weight = torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        expert = torch.full_like(tokens, self.expert)
        offsets = len(x) * (torch.arange(self.experts, device=x.device) >= self.expert).to(torch.int32)
        return Routing(Pairs(tokens, expert, weight, offsets, tokens, len(x), 1), None, None)
