"""The definition: gather token by token, multiply, sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs


def combine(y: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`moeforge_kernels.combine.combine`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    empty = (pairs.expert == pairs.experts).unsqueeze(-1)
    weighted = y.to(wide).masked_fill(empty, 0) * pairs.weight.to(wide).unsqueeze(-1)
    ordered = weighted[pairs.by_token]
    if pairs.slots is not None:
        return ordered.view(pairs.tokens, pairs.slots, y.shape[-1]).sum(1).to(y.dtype)
    return torch.segment_reduce(ordered, "sum", lengths=pairs.lengths(), axis=0, unsafe=True).to(y.dtype)
