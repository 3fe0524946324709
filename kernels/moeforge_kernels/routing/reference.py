"""The definition: score, choose, score the chosen, sort."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs, pairs_from_slots


def route(logits: Tensor, top_k: int, *, score: str, select_first: bool, renormalise: bool, factor: float, bias: Tensor | None,
          real: Tensor | None) -> Pairs:  # fmt: skip
    """See :func:`moeforge_kernels.routing.route`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    preference = wide.detach() if select_first else scores(wide.detach(), score)
    if bias is not None:
        preference = preference + bias
    index = torch.sort(preference, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weight = weigh(wide, index, score, select_first, renormalise, factor)
    experts = logits.shape[1]
    if real is not None:
        index = index.masked_fill(~real.unsqueeze(-1), experts)
    return pairs_from_slots(index, weight, experts)


def scores(logits: Tensor, kind: str) -> Tensor:
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def weigh(logits: Tensor, index: Tensor, score: str, select_first: bool, renormalise: bool, factor: float) -> Tensor:
    """[T, K] weights of a choice; differentiable in the logits."""
    if select_first:
        weight = scores(logits.gather(1, index), score)
    else:
        weight = scores(logits, score).gather(1, index)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return weight * factor
