"""torch's own grouped product (`torch.nn.functional.grouped_mm`), which takes the offsets as they are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..pairs import Pairs


def grouped_gemm(x: Tensor, weight: Tensor, pairs: Pairs, *, bias: Tensor | None = None, gather: bool = True) -> Tensor:
    """See :func:`moeforge_kernels.grouped_gemm.grouped_gemm`."""
    rows = x[pairs.token] if gather else x
    empty = (pairs.expert == pairs.experts).unsqueeze(-1)
    # rows past the last offset are never written, neither in the answer nor in the gradient: masked on both sides
    rows = rows.masked_fill(empty, 0)
    made = F.grouped_mm(rows.to(weight.dtype), weight.transpose(-2, -1), offs=pairs.offsets).to(x.dtype)
    if bias is not None:
        made = made + bias[pairs.expert.clamp_max(pairs.experts - 1)].to(x.dtype)
    return made.masked_fill(empty, 0)
