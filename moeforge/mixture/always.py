"""The router that decides nothing: one expert, which every token visits with weight 1 (plain LoRA beside mixtures)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeforge_kernels.pairs import Pairs

from .routing import Routing


class Always(nn.Module):
    """Has no parameters, and says nothing that losses or statistics could use."""

    def forward(self, x: Tensor, **_: object) -> Routing:
        """[T, D] -> Routing of T pairs."""
        tokens = torch.arange(len(x), device=x.device)
        weight = torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        offsets = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        return Routing(Pairs(tokens, torch.zeros_like(tokens), weight, offsets, tokens, len(x), 1), None, None)
